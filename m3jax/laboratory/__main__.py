"""`python -m m3jax.laboratory`."""

from m3jax.cli.laboratory import run

if __name__ == "__main__":
    run()
