"""Other libraries' interfaces over microtome; each library is imported only where it is used."""
