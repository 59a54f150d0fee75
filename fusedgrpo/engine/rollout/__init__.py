"""What is sampled: its types, the samplers, and the buffer that serves optimizer steps."""
