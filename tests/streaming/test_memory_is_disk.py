"""A model in memory and the same model in files: one seed, the same bits, whatever wrote the files."""

import flax.linen as nn
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx, serialization
from safetensors.numpy import save_file
from support.directories import read
from support.matrix import METHODS, SPARSIFIERS, few, pairwise

import m3jax
from m3jax.trees.matching import named_leaves
from m3jax.trees.parts import canonical_leaves

CASES = [("task_arithmetic", "dare"), ("ties_paper", "dare"), ("ties_mergekit", "della"), ("linear", "magnitude")]


class Loop(nnx.Module):
    """Blocks in a list, as NNX keeps them."""

    def __init__(self, seed):
        rngs = nnx.Rngs(seed)
        self.embed = nnx.Embed(12, 8, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(8, 8, rngs=rngs) for _ in range(3)])


class Scan(nn.Module):
    """Blocks in one leaf with partitioning boxes, as linen's scan keeps them."""

    @nn.compact
    def __call__(self, x):
        kernel = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))

        class Body(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return nn.Dense(8, kernel_init=kernel)(x), None

        stack = nn.scan(
            Body,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x, _ = stack(name="layers")(x, None)
        return nn.Dense(4, name="head")(x)


def nnx_models():
    return [nnx.state(Loop(seed), nnx.Param) for seed in range(3)]


def linen_models():
    return [Scan().init(jax.random.key(seed), np.ones((1, 8), np.float32)) for seed in range(3)]


def as_orbax(tree, place):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(place, tree)


def as_msgpack(tree, place):
    place.mkdir()
    pure = nnx.to_pure_dict(tree) if isinstance(tree, nnx.State) else tree
    (place / "flax_model.msgpack").write_bytes(serialization.to_bytes(pure))


def as_safetensors(tree, place):
    place.mkdir()
    leaves = {name: np.asarray(leaf) for name, leaf in named_leaves(tree).items()}
    save_file(leaves, place / "model.safetensors")


WRITERS = {"orbax": as_orbax, "msgpack": as_msgpack, "safetensors": as_safetensors}
MODELS = {"nnx": nnx_models, "linen boxed": linen_models, "linen": lambda: nn.unbox(linen_models())}


# Every kind in every format, and the methods with kinds and formats in turn.
TRIED = [(kind, writer, "task_arithmetic", "dare") for kind in MODELS for writer in WRITERS]
TRIED += pairwise(MODELS, WRITERS, CASES[1:], apart=((0, 1), (1, 2)))
TRIED = [(*row[:2], *row[2]) if len(row) == 3 else row for row in TRIED]


def by_canonical_name(tree):
    return {name: np.asarray(leaf) for name, leaf in canonical_leaves(tree).items()}


@pytest.mark.parametrize(("kind", "writer", "method", "sparsifier"), few(TRIED, *TRIED[:9]))
def test_a_model_in_memory_is_the_same_in_files(tmp_path, kind, writer, method, sparsifier):
    base, *experts = MODELS[kind]()
    made, keys, _ = METHODS[method]
    sparse, more, _ = SPARSIFIERS[sparsifier]
    merged = m3jax.merge(experts, made, base=base, weights=[1.0, 1.0], sparsify=sparse, key=3)
    for name, tree in zip(("base", "a", "b"), (base, *experts), strict=True):
        WRITERS[writer](tree, tmp_path / name)
    asked = {**keys, **more, "seed": 3, "base_model": str(tmp_path / "base")}
    m3jax.merge_checkpoint(
        {**asked, "models": [str(tmp_path / "a"), str(tmp_path / "b")]}, tmp_path / "out", format="safetensors"
    )
    want, got = by_canonical_name(merged), by_canonical_name(read(tmp_path / "out"))
    assert got.keys() == want.keys()
    assert all(np.array_equal(got[name], want[name]) for name in want)
