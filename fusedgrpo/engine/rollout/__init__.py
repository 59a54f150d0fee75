"""Rollouts: their types, the samplers, and the buffer that serves optimizer steps."""
