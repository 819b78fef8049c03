"""One file per peer package, and the plain torch program that everybody would write."""
