"""Measurements of this package, each against a named peer in the same run: `python -m benchmarks.run`."""
