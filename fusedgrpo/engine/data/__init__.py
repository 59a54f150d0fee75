"""Prompts: read, encoded and checked before the first step."""
