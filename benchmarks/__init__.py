"""Ours, the peers and the physical floor, side by side: `python benchmarks/run.py`."""
