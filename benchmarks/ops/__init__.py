"""One file per op, named after it."""
