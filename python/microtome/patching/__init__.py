"""Patching: what changes in a model's output when some of its activations are replaced."""
