"""GPU memory: planned before a run, retried in it."""
