"""Eight fake CPU devices, and JAX at its strictest."""

import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Most of a test is compilation: what an earlier run or the other worker compiled is used again.
jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parent.parent / ".pytest_cache" / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.fixture(scope="session")
def data():
    """The public data sets, where they are at hand."""
    place = os.environ.get("M3JAX_DATA")
    if not place or not Path(place).is_dir():
        pytest.skip("M3JAX_DATA does not name a directory with the public data sets")
    return Path(place)
