"""`python -m m3jax`."""

import sys

from m3jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
