"""Adapters of peft: found, checked, trained, saved and put back."""
