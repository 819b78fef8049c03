"""Known models in plain parts, and the wave that runs many patched rows through them."""
