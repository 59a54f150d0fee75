"""Everything that a run shows and writes beside its checkpoints."""
