"""Eight fake CPU devices, JAX at its strictest, and the annotated shapes and types of the core checked at run time."""

import gc
import os
import signal
from importlib import metadata
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Bits are the same however much the compiler optimises, and most of a test is compilation: as little as it can here; as
# users have it where support/compiling is used, in tests/scripts/test_golden.py, and in the processes of tests/cluster.
# Without fusion emitters a third less is to compile; XLA ends a process that gives it a flag that it does not know.
os.environ["XLA_FLAGS"] = " ".join(
    [
        "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0",
        "--xla_cpu_use_fusion_emitters=false" * metadata.version("jaxlib").startswith("0.10."),
        os.environ.get("XLA_FLAGS", ""),
    ]
)

import hypothesis
import jax
import pytest
from jaxtyping import install_import_hook
from support.shapes import checked

# Every call of these rooms is checked against its annotations: shapes that disagree with each other too. The hook acts
# when a module is imported, so it comes before any test imports one.
install_import_hook(
    ["m3jax.arithmetic", "m3jax.methods", "m3jax.trees", "m3jax.streaming"],
    f"{checked.__module__}.{checked.__qualname__}",
)

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# What an earlier run or the other worker compiled is used again.
jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parent.parent / ".pytest_cache" / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # in the background of a shell: commands would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

MOST_MAPS = 15_000

gc.set_threshold(100_000, 20, 50)  # traces are made of many small objects, few of them in cycles

# How long an example takes is a matter of what else the machine does.
hypothesis.settings.register_profile("m3jax", deadline=None)
hypothesis.settings.load_profile("m3jax")


@pytest.fixture(scope="module", autouse=True)
def compiled_programs_are_let_go():
    """Each program that XLA compiles maps memory, of which a process has 65,530 pieces; beyond them it crashes."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MOST_MAPS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def data():
    """The public data sets, where they are at hand."""
    place = os.environ.get("M3JAX_DATA")
    if not place or not Path(place).is_dir():
        pytest.skip("M3JAX_DATA does not name a directory with the public data sets")
    return Path(place)


@pytest.fixture(scope="session")
def jax_data(data):
    """Checkpoints that trainers in JAX wrote, where they are at hand."""
    if not (data / "jax").is_dir():
        pytest.skip("M3JAX_DATA holds no jax/ with checkpoints that trainers wrote")
    return data / "jax"
