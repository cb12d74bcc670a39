"""Whether a machine makes the bits that m3jax promises: small merges whose digests are known, on each device."""

import hashlib
import importlib.metadata
import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from m3jax.arithmetic import SCHEME
from m3jax.methods.base import Method, Sparsifier
from m3jax.methods.breadcrumbs import breadcrumbs
from m3jax.methods.dare import dare
from m3jax.methods.della import della
from m3jax.methods.linear import linear, task_arithmetic
from m3jax.methods.model_stock import model_stock
from m3jax.methods.slerp import slerp
from m3jax.methods.ties import ties
from m3jax.trees.merging import merge

_SEED = 5
_FLAGS = (
    "jax_enable_x64",
    "jax_default_matmul_precision",
    "jax_default_prng_impl",
    "jax_debug_nans",
    "jax_disable_jit",
    "jax_numpy_dtype_promotion",
)
_VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_PLATFORMS")


class Case(NamedTuple):
    """A small merge.

    Attributes:
        dtype: Of its models.
        method: How they are merged.
        sparsify: What is dropped before.
        weights: What `m3jax.merge` takes.
        digest: SHA-256 of the merged tensors' bytes, of every machine.
    """

    dtype: str
    method: Method
    sparsify: Sparsifier | None
    weights: Any
    digest: str


_EACH = (0.3, 0.45)
CASES: Mapping[str, Case] = {
    "linear": Case(
        "float32", linear(), None, _EACH, "ea8b9807e4f0541a2c1f9a5755e750de15ca56210204a4a29dfe61ed6e6bdee8"
    ),
    "task arithmetic, DARE": Case(
        "bfloat16",
        task_arithmetic(scale=0.7),
        dare(0.3),
        _EACH,
        "7992c3f0a125d3b8afbe4b975d2564eb4b3b222c46eadc61619d080153d5a863",
    ),
    "TIES by tensor, DELLA": Case(
        "bfloat16",
        ties(0.4),
        della(0.5, 0.2),
        _EACH,
        "fb39ca5e5ab38758779181dbfd2956111fc731e4bb1b8c23b55bb7a2f0c81cb5",
    ),
    "TIES by model": Case(
        "float16",
        ties(0.4, trim_scope="model", sign_election="unweighted"),
        breadcrumbs(0.6, 0.1),
        _EACH,
        "ec5506d503256d86ae27235d9b0b99617403ec04a0501113609b174670629d0f",
    ),
    "slerp": Case("bfloat16", slerp(), None, 0.3, "a6df09410251ed21be10b52812418ad612181f184fb299810bcf2c2497c8e92c"),
    "Model Stock by row": Case(
        "float32",
        model_stock(filter_wise=True),
        None,
        None,
        "221073d05ee966740ed882dd30407c3809f7233feffae0b31a59e94f3946dd96",
    ),
}
"""What they cover: fenced sums, masks, ranks of a tensor, of rows and of the model, and sums of products."""


class Made(NamedTuple):
    """What a device made of a case.

    Attributes:
        case: Its name.
        right: Whether its bits are those of every machine.
        seconds: How long it took, compilation with it.
    """

    case: str
    right: bool
    seconds: float


class Examined(NamedTuple):
    """One device.

    Attributes:
        device: As JAX calls it.
        kind: What it is.
        made: What it made.
    """

    device: str
    kind: str
    made: tuple[Made, ...]


class Examination(NamedTuple):
    """A machine.

    Attributes:
        scheme: How bits are made.
        versions: Of JAX and what computes for it.
        flags: Of JAX, and variables of the environment, that are set otherwise than by default.
        devices: What was examined.
    """

    scheme: str
    versions: Mapping[str, str]
    flags: Mapping[str, str]
    devices: tuple[Examined, ...]

    @property
    def right(self) -> bool:
        """Whether every device made every bit."""
        return all(made.right for device in self.devices for made in device.made)

    def to_json(self) -> dict[str, Any]:
        """The examination as plain data."""
        devices = [
            {"device": each.device, "kind": each.kind, "made": [made._asdict() for made in each.made]}
            for each in self.devices
        ]
        return {
            "right": self.right,
            "bits": self.scheme,
            "versions": dict(self.versions),
            "flags": dict(self.flags),
            "devices": devices,
        }


def small_models(case: Case) -> list[dict[str, np.ndarray]]:
    """A base and two experts near it on the host, with small and large exponents among their entries.

    Deltas are coarse, so that ties at thresholds are common; what is subnormal, or flushed, must be so on every device.

    Args:
        case: Whose dtype they get; inner products of large exponents are beyond float32, so that methods which need
            them get none.
    """
    rng = np.random.Generator(np.random.PCG64(0))
    shape = (40, 16)
    base = {"layers.0.w": rng.integers(-256, 257, shape).astype(np.float32) / np.float32(64)}
    deltas = [rng.integers(-20, 21, shape).astype(np.float32) / np.float32(64) for _ in range(2)]
    trees = [base, *({"layers.0.w": base["layers.0.w"] + delta} for delta in deltas)]
    if case.method.weighting == "each":
        for tree in trees:
            words = rng.integers(0, 2**32, 1024, dtype=np.uint32) & np.uint32(0xDFFFFFFF)
            most = np.float32(2.0**12 if case.dtype == "float16" else 2.0**60)
            tree["norm"] = np.clip(words.view(np.float32), -most, most)
    return [{name: leaf.astype(jnp.dtype(case.dtype)) for name, leaf in tree.items()} for tree in trees]


def digest_of(tree: Mapping[str, Any]) -> str:
    """SHA-256 of the bytes of a tree's tensors, in its order."""
    return hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in tree.values())).hexdigest()


def digest_on(case: Case, device: jax.Device) -> str:
    """The digest of a case as a device makes it."""
    base, *experts = jax.device_put(small_models(case), device)
    weights = list(case.weights) if isinstance(case.weights, tuple) else case.weights
    return digest_of(merge(experts, case.method, base=base, weights=weights, sparsify=case.sparsify, key=_SEED))


def _flags() -> Iterator[tuple[str, str]]:
    """What is set otherwise than JAX has it, with names as one sets them."""
    usual = {"jax_default_prng_impl": "threefry2x32", "jax_numpy_dtype_promotion": "standard"}
    for name in _FLAGS:
        value = getattr(jax.config, name, None)
        if value not in (usual.get(name), None, False):
            yield name, str(value)
    for name in _VARIABLES:
        if os.environ.get(name):
            yield name, os.environ[name]


def examine(tell: Callable[[str], None] = lambda line: None) -> Examination:
    """Makes every case on every device of this process.

    Args:
        tell: Told a line before each device.
    """
    devices = []
    for device in jax.local_devices():
        tell(f"{device}: {len(CASES)} merges")
        made = []
        for name, case in CASES.items():
            begun = time.perf_counter()
            right = digest_on(case, device) == case.digest
            made.append(Made(name, right, time.perf_counter() - begun))
        devices.append(Examined(str(device), device.device_kind, tuple(made)))
    versions = {"jax": jax.__version__, "jaxlib": importlib.metadata.version("jaxlib"), "numpy": np.__version__}
    return Examination(SCHEME, versions, dict(_flags()), tuple(devices))
