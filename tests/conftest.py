"""Eight fake CPU devices, and JAX at its strictest."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def data():
    """The public data sets, where they are at hand."""
    from pathlib import Path

    place = os.environ.get("M3JAX_DATA")
    if not place or not Path(place).is_dir():
        pytest.skip("M3JAX_DATA does not name a directory with the public data sets")
    return Path(place)
