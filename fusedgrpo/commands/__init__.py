"""The commands of ``fusedgrpo``, one file each. What is heavy is imported when a command runs."""
