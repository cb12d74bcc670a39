"""Random recipes over random small checkpoints, each with what the oracle makes of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orbax.checkpoint as ocp
from flax import serialization
from safetensors.numpy import save_file

import m3jax
from m3jax.checkpoints import open_checkpoint
from m3jax.cluster.meshes import parse_mesh
from m3jax.streaming.sampling import verify_sample
from support import oracle
from support.checkpoint_suite import read
from support.matrix import DTYPES
from support.torch_files import write_arrays

Tree = dict[str, np.ndarray]

FORMATS = ("safetensors", "shards", "msgpack", "orbax", "pytorch")
LAYOUTS = ("by block", "axis 0", "axis 1")
METHODS = ("linear", "task_arithmetic", "ties", "slerp", "model_stock")
SPARSIFIERS = ("none", "dare", "magnitude", "breadcrumbs", "della")
_SAMPLED = 3  # tensors that are computed again from the manifest


class Recipe(NamedTuple):
    """A recipe drawn at random, and all that it was drawn from.

    Attributes:
        keys: Of the recipe, but for its models.
        told: The oracle's arguments.
        models: Base and experts, block by block, by canonical name.
        layouts: How the blocks of each model are stacked.
        formats: What each is written as.
        options: Of `m3jax.merge_checkpoint`.
    """

    keys: dict[str, Any]
    told: dict[str, Any]
    models: list[Tree]
    layouts: list[str]
    formats: list[str]
    options: dict[str, Any]

    def said(self) -> str:
        """The recipe in a line."""
        return f"{self.keys} {self.layouts} {self.formats} {self.options}"


def _share(rng: np.random.Generator) -> float:
    return float(rng.choice([0.0, 1.0, *rng.uniform(0, 1, 6).round(3)]))


def _shapes(rng: np.random.Generator, depth: int) -> dict[str, tuple[int, ...]]:
    inner: list[tuple[int, ...]] = [(int(rng.integers(3, 9)),), (7, int(rng.integers(3, 40)))]
    inner.append((2, int(rng.integers(3, 9)), 11) if rng.random() < 0.5 else (130, 601))  # the latter in several chunks
    shapes: dict[str, tuple[int, ...]] = {"embedder.embedding": (int(rng.integers(5, 60)), 6), "final.scale": (6,)}
    for i in range(depth):
        shapes |= {f"layers.{i}.w{k}.kernel": shape for k, shape in enumerate(inner)}
    return shapes


def _models(rng: np.random.Generator, count: int, depth: int, dtype: str) -> list[Tree]:
    shapes = _shapes(rng, depth)
    base = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    trees = [base]
    for _ in range(count):
        step = 2.0 ** -int(rng.integers(2, 8))  # so that ties at thresholds are common, or not
        trees.append(
            {
                n: v + (np.round(rng.standard_normal(v.shape) / 4 / step) * step).astype(np.float32)
                for n, v in base.items()
            }
        )
    return [{name: value.astype(DTYPES[dtype]) for name, value in tree.items()} for tree in trees]


def draw(seed: int) -> Recipe:
    """A recipe of a seed, its models with it."""
    rng = np.random.default_rng(seed)
    method = str(rng.choice(METHODS, p=[0.2, 0.25, 0.35, 0.1, 0.1]))
    count = 2 if method == "slerp" else int(rng.integers(2, 5))
    depth, own = int(rng.integers(2, 5)), int(rng.integers(0, 2**32))
    keys: dict[str, Any] = {"merge_method": method, "seed": own}
    told: dict[str, Any] = {"method": method, "seed": own}
    parameters: dict[str, Any] = {}
    if method in ("linear", "task_arithmetic", "ties"):
        parameters["normalize"] = told["normalize"] = bool(rng.random() < 0.5)
        if method != "linear":
            parameters["lambda"] = told["scale"] = float(rng.choice([1.0, 0.7]))
        if method == "ties":
            told["density"] = parameters["density"] = _share(rng)
            told["trim_scope"] = parameters["trim_scope"] = str(rng.choice(["tensor", "model"]))
            told["election"] = parameters["sign_election"] = str(rng.choice(["weighted", "unweighted"]))
        sparsifier = str(rng.choice(SPARSIFIERS))
        if sparsifier != "none":
            _sparsify(rng, sparsifier, keys, told)
    if method == "model_stock":
        parameters["filter_wise"] = told["by_row"] = bool(rng.random() < 0.5)
    models = _models(rng, count, depth, str(rng.choice(list(DTYPES))))
    _weigh(rng, method, count, own, models[0], keys, told, parameters)
    keys["parameters"] = parameters
    if rng.random() < 0.3:
        keys["dtype"] = told["out"] = str(rng.choice(list(DTYPES)))
    layouts = [str(rng.choice(LAYOUTS)) for _ in models]
    formats = [str(rng.choice(FORMATS)) for _ in models]
    options = {
        "chunk_entries": int(rng.choice([2**16, 2**17])),
        "mesh": str(rng.choice(["x=1", "x=8"])),
        "max_shard_size": str(rng.choice(["100KB", "5GB"])),
    }
    return Recipe(keys, told, models, layouts, formats, options)


def _sparsify(rng: np.random.Generator, name: str, keys: dict[str, Any], told: dict[str, Any]) -> None:
    density = max(_share(rng), 0.01)
    sparsify: dict[str, Any] = {"method": name, "density": density}
    told |= {"sparsify": name, "keep": density}
    if name == "della":
        sparsify["epsilon"] = told["epsilon"] = float(min(density, 1 - density) * rng.uniform(0, 0.9))
    if name == "breadcrumbs":
        sparsify["gamma"] = told["gamma"] = float(rng.uniform(0, 0.2))
    if name == "magnitude":
        sparsify["scope"] = told["scope"] = str(rng.choice(["tensor", "model"]))
    if name in ("dare", "magnitude", "della"):
        sparsify["rescale"] = told["rescale"] = bool(rng.random() < 0.5)
    if name != "breadcrumbs":
        sparsify["target"] = told["target"] = str(rng.choice(["delta", "weights"]))
    keys["sparsify"] = sparsify


def _weigh(
    rng: np.random.Generator,
    method: str,
    count: int,
    seed: int,
    base: Tree,
    keys: dict[str, Any],
    told: dict[str, Any],
    parameters: dict[str, Any],
) -> None:
    """Weights that are given or drawn."""
    if method == "model_stock":
        return
    if rng.random() < 0.5:
        weights = rng.uniform(0.1, 1.5, count).round(3).tolist()
        told["weights"] = float(weights[0] / 2) if method == "slerp" else weights
        if method == "slerp":
            parameters["t"] = told["weights"]
        else:
            keys["weights"] = weights  # put beside each model when they are written
        return
    alpha, granularity = float(rng.uniform(0.2, 3)), str(rng.choice(["model", "layer", "tensor"]))
    keys["mixup"] = {"alpha": alpha, "granularity": granularity}

    def group(name: str) -> str | None:
        layer = ".".join(name.split(".")[:2]) if name.startswith("layers.") else "outside blocks"
        return {"model": None, "layer": layer, "tensor": name}[granularity]

    drawn = {name: oracle.draw(seed, alpha, count, group(name)) for name in base}
    told["weights"] = {name: w[0] for name, w in drawn.items()} if method == "slerp" else drawn


def arranged(tree: Tree, layout: str) -> Tree:
    """The tree with its blocks as files have them: one by one, or stacked along an axis."""
    depth = 1 + max(int(name.split(".")[1]) for name in tree if name.startswith("layers."))
    if layout == "by block":
        return {name.replace("layers.", "layers_", 1): value for name, value in tree.items()}
    held = {name: value for name, value in tree.items() if not name.startswith("layers.")}
    for rest in {name.split(".", 2)[2] for name in tree if name.startswith("layers.")}:
        held[f"layers.{rest}"] = np.stack([tree[f"layers.{i}.{rest}"] for i in range(depth)], int(layout[-1]))
    return held


def _nested(tree: Tree) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for name, value in tree.items():
        *path, last = name.split(".")
        node = nested
        for key in path:
            node = node.setdefault(key, {})
        node[last] = value
    return nested


def _as_shards(tree: Tree, place: Path) -> None:
    names = list(tree)
    for number in range(2):
        save_file({n: tree[n] for n in names[number::2]}, place / f"model-{number + 1:05d}-of-00002.safetensors")


def _as_orbax(tree: Tree, place: Path) -> None:
    place.rmdir()
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(place, _nested(tree))


WRITERS: dict[str, Callable[[Tree, Path], object]] = {
    "safetensors": lambda tree, place: save_file(tree, place / "model.safetensors"),
    "shards": _as_shards,
    "msgpack": lambda tree, place: (place / "flax_model.msgpack").write_bytes(serialization.to_bytes(_nested(tree))),
    "orbax": _as_orbax,
    "pytorch": lambda tree, place: write_arrays(place / "pytorch_model.bin", tree, strided=True),
}


def wrong_tensors(drawn: Recipe, place: Path) -> list[str]:
    """Merges in an empty directory; returns the tensors that are not the oracle's, and what verifying finds."""
    paths = []
    for number, (tree, layout, written) in enumerate(zip(drawn.models, drawn.layouts, drawn.formats, strict=True)):
        paths.append(place / f"model-{number}")
        paths[-1].mkdir()
        WRITERS[written](arranged(tree, layout), paths[-1])
    keys, (base, *experts) = dict(drawn.keys), drawn.models
    weights = keys.pop("weights", None)
    keys["models"] = [
        {"model": str(path)} | ({} if weights is None else {"parameters": {"weight": weights[i]}})
        for i, path in enumerate(paths[1:])
    ]
    if keys["merge_method"] != "slerp":
        keys["base_model"] = str(paths[0])
    options = drawn.options | {"mesh": parse_mesh(drawn.options["mesh"])}
    m3jax.merge_checkpoint(keys, place / "out", **options)
    layout = drawn.layouts[1 if keys["merge_method"] == "slerp" else 0]
    want = arranged(oracle.merge(experts, base, **drawn.told), layout)
    with open_checkpoint(place / "out") as checkpoint:  # in the base's format
        got = {name: read(checkpoint, name) for name in checkpoint.tensors}
    wrong = [
        name
        for name, value in want.items()
        if name not in got or got[name].dtype != value.dtype or got[name].tobytes() != value.tobytes()
    ]
    sampled = verify_sample(place / "out", sample=_SAMPLED, inputs=True)
    return [*wrong, *sorted(got.keys() - want.keys()), *sampled.differences]
