"""The command `m3jax`, and `python -m m3jax`."""

import os
import sys

# Each thread of BLAS looks for work that long, in powers of two cycles, before it sleeps: by default 0.1 s at start-up.
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "20")


def run() -> None:
    """The command as the shell calls it; an interruption while modules are loaded ends it as a later one does."""
    try:
        from m3jax.cli.commands import run as command
    except KeyboardInterrupt:
        print("m3jax: interrupted.", file=sys.stderr, flush=True)
        os._exit(130)
    command()


if __name__ == "__main__":
    run()
