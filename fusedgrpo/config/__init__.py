"""Every option of a run: names, types, ranges, contradictions. Imports no torch."""
