"""`python -m microtome` is the `microtome` command."""

import sys

from microtome.cli import main

if __name__ == "__main__":
    sys.exit(main())
