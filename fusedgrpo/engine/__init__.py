"""Prompts -> samples -> rewards -> advantages -> update. One noun per file."""
