"""Ratios against named peers and limits: `python -m benchmarks`."""
