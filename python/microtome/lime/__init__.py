"""LIME: a sparse linear model of a model around one input."""
