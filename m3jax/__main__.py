"""`python -m m3jax`."""

from m3jax.cli.commands import run

if __name__ == "__main__":
    run()
