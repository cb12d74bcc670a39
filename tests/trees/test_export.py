"""Every jitted function of a merge lowers for CPU, CUDA, ROCm and TPU: no float64, nothing that one of them lacks."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from support.matrix import DTYPES, FAST, METHODS, SPARSIFIERS, few, pairwise

import m3jax
from m3jax.arithmetic import threefry
from m3jax.methods.base import Extent, Place
from m3jax.methods.leaf import Pipeline, leaf_scalars, settings_of, with_found
from m3jax.streaming import findings
from m3jax.trees import arrays

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
NEUTRAL = {"Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape"}  # known to the partitioner of every platform
ZERO, SIZE, START = np.uint32(0), np.uint32(60), np.zeros(2, np.uint32)
SHAPE, SIZE_OF_ALL = (16, 8), 128


def lowered(function, *args):
    """The StableHLO of a function for all platforms, checked for what one of them does not have."""
    text = jax.export.export(jax.jit(function), platforms=PLATFORMS)(*args).mlir_module()
    assert not re.search(r"\bf64\b|xf64", text)
    calls = set(re.findall(r'custom_call\s*@([\w.]+)|call_target_name = "([\w.]+)"', text))
    assert {a or b for a, b in calls} <= NEUTRAL
    return text


def prepared(method, sparsifier, dtype, shape, n=2):
    """A pipeline, n experts, a base where it is used, the scalars of a leaf, and its settings."""
    pipe = Pipeline(METHODS[method][0], SPARSIFIERS[sparsifier][0], n)
    leaf = jnp.zeros(shape, DTYPES[dtype])
    settings = settings_of(pipe, (0.5,) * pipe.num_weights, pipe.method.scale)
    keys = threefry.pair_keys(threefry.root_key(0), "w", n) if pipe.random else None
    scalars = leaf_scalars(pipe, settings, SHAPE, keys)
    return pipe, (leaf,) * n, leaf if pipe.uses_base else None, scalars, settings


SOME = [(*case, "bfloat16", platform) for case in FAST[3:6] for platform in ("cpu", "gpu")]
EVERY = pairwise(METHODS, SPARSIFIERS, DTYPES, ("cpu", "gpu"), apart=((0, 1),))


@pytest.mark.parametrize(("method", "sparsifier", "dtype", "platform"), few(dict.fromkeys([*SOME, *EVERY]), *SOME))
def test_merging_and_measuring_lower_everywhere(method, sparsifier, dtype, platform):
    pipe, experts, base, scalars, settings = prepared(method, sparsifier, dtype, SHAPE)
    _, flat, flat_base, _, _ = prepared(method, sparsifier, dtype, (SIZE_OF_ALL,))
    layout = findings.Layout(1, 0, SHAPE if pipe.rows else (SIZE_OF_ALL,))
    for stage in pipe.stages:
        rows = {"row": SHAPE[:1]}.get(stage.measure.scope, ())
        state = stage.begin(pipe, settings, Extent(SIZE_OF_ALL, rows, len(experts)))
        for streamed in (False, True):
            place = Place(streamed, platform, 2**40)
            for each in stage.measure.rounds(place):
                static = (pipe, stage.key, each.name, place)
                if streamed:
                    count = functools.partial(findings.count_chunk, *static, layout)
                    lowered(count, flat, flat_base, scalars, state, START, SIZE, ZERO)
                else:
                    lowered(functools.partial(arrays._count, *static, None), experts, base, scalars, state, ZERO)
        scalars = with_found(pipe, scalars, stage, state, settings)
    lowered(functools.partial(arrays.merge_array, pipe, jnp.dtype(dtype), None, None), experts, base, scalars, ZERO)
    lowered(functools.partial(findings.merge_chunk, pipe, dtype, layout), flat, flat_base, scalars, START, ZERO)


def callers_jit(method, sparsifier):
    made, sparse = METHODS[method][0], SPARSIFIERS[sparsifier][0]
    return lambda e, b, w, k: m3jax.merge(
        e, made, base=b, weights=w, sparsify=sparse, key=jax.random.wrap_key_data(k, impl="threefry2x32")
    )


def trees(dtype, n, put=lambda x: x):
    tree = {"w": put(jnp.zeros((16, 8), DTYPES[dtype])), "b": jnp.zeros(16, DTYPES[dtype])}
    return [tree] * n, tree


OF_CALLERS = [
    ("linear", "none", "float32", True),
    ("ties_paper", "dare", "float16", False),
    ("ties_mergekit", "none", "float32", True),
]


@pytest.mark.parametrize(
    ("method", "sparsifier", "dtype", "by_scatter"),
    few(
        dict.fromkeys([*OF_CALLERS, *pairwise(METHODS, SPARSIFIERS, DTYPES, (True, False), apart=((0, 1),))]),
        *OF_CALLERS,
    ),
)
def test_merges_in_a_callers_jit_lower_everywhere(method, sparsifier, dtype, by_scatter, monkeypatch):
    monkeypatch.setattr(arrays, "_platform_of", lambda _: "cpu" if by_scatter else "gpu")
    text = lowered(callers_jit(method, sparsifier), *trees(dtype, 2), jnp.ones(2), jnp.zeros(2, jnp.uint32))
    assert "callback" not in text
    stacked = [
        {"layers.kernel": jnp.zeros((3, 16, 8), DTYPES[dtype]), "layers.bias": jnp.zeros((3, 16), DTYPES[dtype])}
    ]
    text = lowered(callers_jit(method, sparsifier), stacked * 2, stacked[0], jnp.ones(2), jnp.zeros(2, jnp.uint32))
    assert "callback" not in text


def test_only_slerp_calls_back_in_a_callers_jit():
    experts, _ = trees("bfloat16", 2)
    text = jax.jit(lambda e: m3jax.merge(e, m3jax.slerp(), weights=0.3)).lower(experts).as_text()
    assert "callback" in text


COLLECTIVES = ("all-reduce", "all-gather", "collective-permute", "all-to-all", "reduce-scatter")
APART = [("linear", "dare", AxisType.Auto), ("ties_untrimmed_sum", "dare_weights", AxisType.Explicit)]
ELEMENTWISE = pairwise(
    [m for m in METHODS if m in ("linear", "ties_untrimmed_sum") or m.startswith("task_arithmetic")],
    [s for s in SPARSIFIERS if not s.startswith(("magnitude", "breadcrumbs", "della"))],
    (AxisType.Auto, AxisType.Explicit),
)


@pytest.mark.parametrize(("method", "sparsifier", "kind"), few(dict.fromkeys([*APART, *ELEMENTWISE]), *APART))
def test_elementwise_merges_of_sharded_inputs_exchange_nothing(method, sparsifier, kind):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))
    place = NamedSharding(mesh, PartitionSpec("x", "y"))
    args = *trees("bfloat16", 2, lambda x: jax.device_put(x, place)), jnp.ones(2), jnp.zeros(2, jnp.uint32)
    text = jax.jit(callers_jit(method, sparsifier)).lower(*args).compile().as_text()
    assert not [word for word in COLLECTIVES if word in text]
