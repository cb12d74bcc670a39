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
from support.adapters import PREFIX, write_adapter
from support.checkpoint_suite import read
from support.matrix import DTYPES
from support.torch_files import write_arrays

Tree = dict[str, np.ndarray]
Named = dict[str, Any]

FORMATS = ("safetensors", "shards", "msgpack", "orbax", "pytorch")
LAYOUTS = ("by name", "by block", "axis 0", "axis 1")
_OFTEN = {"linear": 0.1, "task_arithmetic": 0.1, "ties": 0.14}
_ALONE = (
    *("slerp", "model_stock", "sce", "ram", "ramplus_tl", "nearswap", "magmax", "consensus", "pcb"),
    *("fisher", "nuslerp", "multislerp", "karcher", "passthrough"),
)
METHODS = _OFTEN | dict.fromkeys(_ALONE, (1 - sum(_OFTEN.values())) / len(_ALONE))
"""How often each is drawn; sparsifiers go before the first three."""
SPARSIFIERS = ("none", "dare", "magnitude", "breadcrumbs", "della")
FEATURES = {
    "adapter": "an adapter on an expert",
    "gradient": "weights by depth",
    "slices": "slices",
    "smooth": "draws of neighbouring layers alike",
}
_EXPERTS = {"slerp": (2, 2), "nuslerp": (2, 2), "nearswap": (1, 1), "passthrough": (1, 1)}
_UNWEIGHTED = ("model_stock", "sce", "ram", "ramplus_tl", "nearswap", "magmax", "passthrough")
_BASELESS = ("slerp", "fisher", "passthrough")
_SPARSE = ("sparsify", "keep", "epsilon", "gamma", "scope", "rescale", "target")
_FILES = ("safetensors", "shards", "pytorch")  # beside which an adapter may stand
_SAMPLED = 3  # tensors that are computed again from the manifest
_RANK = 2  # of adapters, which are added to one weight of each block


class Recipe(NamedTuple):
    """A recipe drawn at random, and all that it was drawn from.

    Attributes:
        keys: Of the recipe, but for its models.
        told: The oracle's arguments.
        models: Base and experts, block by block, by canonical name.
        layouts: How the blocks of each model are stacked.
        formats: What each is written as.
        options: Of `m3jax.merge_checkpoint`.
        of_experts: Parameters that stand beside each expert in the recipe.
        has_base: Whether the recipe names the base.
        adapters: Of some experts, by number, the factors of each adapted weight: left and right.
        slices: Of each how many blocks it takes, and of every model from which one on; none for whole models.
        statistics: Of each expert, for a method that asks for some.
        features: What else it has, by the names of `FEATURES`.
    """

    keys: Named
    told: Named
    models: list[Tree]
    layouts: list[str]
    formats: list[str]
    options: Named
    of_experts: list[Named]
    has_base: bool
    adapters: dict[int, dict[str, tuple[np.ndarray, np.ndarray]]]
    slices: list[tuple[int, list[int]]]
    statistics: list[Tree]
    features: frozenset[str]

    def said(self) -> str:
        """The recipe in a line."""
        more = f"{self.of_experts} base: {self.has_base} adapters: {sorted(self.adapters)} slices: {self.slices}"
        return f"{self.keys} {more} {self.layouts} {self.formats} {self.options}"


# --- drawing ------------------------------------------------------------------------------------------------------


def _share(rng: np.random.Generator) -> float:
    return float(rng.choice([0.0, 1.0, *rng.uniform(0, 1, 6).round(3)]))


def _shapes(rng: np.random.Generator, depth: int, last: str) -> dict[str, tuple[int, ...]]:
    inner: list[tuple[int, ...]] = [(int(rng.integers(3, 9)),), (7, int(rng.integers(3, 40)))]
    inner.append((2, int(rng.integers(3, 9)), 11) if rng.random() < 0.5 else (130, 601))  # the latter in several chunks
    shapes: dict[str, tuple[int, ...]] = {"embedder.embedding": (int(rng.integers(5, 60)), 6), "final.scale": (6,)}
    for i in range(depth):
        shapes |= {f"layers.{i}.w{k}.{last}": shape for k, shape in enumerate(inner)}
    return shapes


def _models(rng: np.random.Generator, count: int, shapes: dict[str, tuple[int, ...]], dtype: str) -> list[Tree]:
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
    method = str(rng.choice(list(METHODS), p=list(METHODS.values())))
    count = int(rng.integers(*_EXPERTS.get(method, (2, 4)), endpoint=True))
    depth, own = int(rng.integers(2, 5)), int(rng.integers(0, 2**32))
    keys: Named = {"merge_method": method, "seed": own}
    told: Named = {"method": method, "seed": own}
    parameters, of_experts = _parameters_of(rng, method, count, told), [{} for _ in range(count)]
    if method in _OFTEN:
        sparsifier = str(rng.choice(SPARSIFIERS))
        if sparsifier != "none":
            _sparsify(rng, sparsifier, keys, told)
    unstacked = bool(rng.random() < 0.4)  # as models are that have adapters and slices
    last = str(rng.choice(["kernel", "weight"])) if unstacked else "kernel"
    models = _models(rng, count, _shapes(rng, depth, last), str(rng.choice(list(DTYPES))))
    layouts = [LAYOUTS[0] if unstacked else str(rng.choice(LAYOUTS)) for _ in models]
    formats = [str(rng.choice(FORMATS)) for _ in models]
    adapters = {} if method == "fisher" else _adapters(rng, models, formats)
    has_base = method not in _BASELESS and told.get("deltas", True)
    slices = []
    if unstacked and method != "fisher" and rng.random() < 0.4:
        slices = _slices(rng, len(models), depth)
        if method in ("linear", "karcher"):  # in whose slices a base is one more expert
            has_base = False
            keys, told = ({k: v for k, v in each.items() if k not in _SPARSE} for each in (keys, told))
    names = list(_cut(models, slices)[0])
    _weigh(rng, method, names, keys, told, parameters, of_experts, bool(slices))
    keys["parameters"] = parameters
    if rng.random() < 0.3:
        keys["dtype"] = told["out"] = str(rng.choice(list(DTYPES)))
    options = {
        "chunk_entries": int(rng.choice([2**16, 2**17])),
        "mesh": str(rng.choice(["x=1", "x=8"])),
        "max_shard_size": str(rng.choice(["100KB", "5GB"])),
        "format": "safetensors" if slices else None,  # trees of Orbax have no place for stacks
    }
    statistics = [_statistics(rng, tree) for tree in models[1:]] if method == "fisher" else []
    gradients = [v for each in (parameters, *of_experts) for k, v in each.items() if k in ("weight", "lambda", "t")]
    has = {
        "adapter": bool(adapters),
        "gradient": any(isinstance(value, list | str) for value in gradients),
        "slices": bool(slices),
        "smooth": "smooth" in keys.get("mixup", {}),
    }
    features = frozenset(feature for feature, there in has.items() if there)
    drawn = (keys, told, models, layouts, formats, options, of_experts, has_base, adapters, slices, statistics)
    return Recipe(*drawn, features)


def _parameters_of(rng: np.random.Generator, method: str, count: int, told: Named) -> Named:
    """What a method has of its own, for the recipe; the oracle is told likewise."""
    found: Named = {}
    if method in ("linear", "task_arithmetic", "ties", "consensus", "pcb"):
        found["normalize"] = told["normalize"] = bool(rng.random() < 0.5)
    if method in ("task_arithmetic", "ties", "consensus", "pcb", "magmax"):
        found["lambda"] = told["scale"] = float(rng.choice([1.0, 0.7]))
    match method:
        case "ties":
            told["density"] = found["density"] = _share(rng)
            told["trim_scope"] = found["trim_scope"] = str(rng.choice(["tensor", "model"]))
            told["election"] = found["sign_election"] = str(rng.choice(["weighted", "unweighted"]))
        case "model_stock":
            found["filter_wise"] = told["by_row"] = bool(rng.random() < 0.5)
        case "sce":
            found = told["more"] = {"select_topk": _share(rng)}
        case "ram":
            found = told["more"] = {"epsilon": float(rng.choice([0.0, 1e-5, 0.1, 0.25]))}
        case "ramplus_tl":
            found = {"r": float(rng.uniform(0, 1)), "alpha": float(rng.uniform(0, 2))}
            found = told["more"] = {**found, "epsilon": float(rng.choice([0.0, 1e-5, 0.1, 0.25]))}
        case "nearswap":
            found = told["more"] = {"t": float(rng.choice([0.0, 1e-4, 0.1, 0.25]))}
        case "consensus":
            told["more"] = {"limits": float(rng.uniform(0.2, 1.5)), "agreement": int(rng.integers(1, count + 1))}
            found |= {"tall_mask_lambda": told["more"]["limits"], "agreement": told["more"]["agreement"]}
        case "pcb":
            told["trim_scope"] = found["trim_scope"] = str(rng.choice(["tensor", "model"]))
            told["more"] = {"density": max(_share(rng), 0.01)}
            found["density"] = told["more"]["density"]
        case "fisher":
            found = told["more"] = {"epsilon": float(rng.choice([0.0, 1e-6, 1.0]))}
        case "nuslerp":
            told["deltas"], told["lines"] = bool(rng.random() < 0.5), str(rng.choice(["tensor", "row", "column"]))
            found = {"nuslerp_flatten": told["lines"] == "tensor", "nuslerp_row_wise": told["lines"] == "column"}
        case "multislerp":
            told["deltas"] = bool(rng.random() < 0.5)
        case "passthrough":  # which is a sum of one
            scale = float(rng.choice([1.0, 0.5, -0.3]))
            found["scale"] = scale
            told |= {"method": "linear", "normalize": False, "weights": [scale]}
    return found


def _sparsify(rng: np.random.Generator, name: str, keys: Named, told: Named) -> None:
    density = max(_share(rng), 0.01)
    sparsify: Named = {"method": name, "density": density}
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
    names: list[str],
    keys: Named,
    told: Named,
    parameters: Named,
    of_experts: list[Named],
    sliced: bool,
) -> None:
    """Weights that are given, by depth too, or drawn; and the factor of task vectors by depth."""
    by_depth, count = not sliced and rng.random() < 0.3, len(of_experts)
    if by_depth and "lambda" in parameters:
        parameters["lambda"] = f"linear({parameters['lambda']}, 1.5)"
        told["scale"] = {name: told["scale"] + (1.5 - told["scale"]) * _depth(name, names) for name in names}
    if method in _UNWEIGHTED:
        return
    if rng.random() < 0.5:
        ends = rng.uniform(0.1, 1.0, (count, 3 if by_depth else 1)).round(3).tolist()
        weights = {name: [_along(points, _depth(name, names)) for points in ends] for name in names}
        said = [points if by_depth else points[0] for points in ends]
        if method == "slerp":
            parameters["t"], told["weights"] = said[0], {name: each[0] for name, each in weights.items()}
        else:
            told["weights"] = weights
            for beside, weight in zip(of_experts, said, strict=True):
                beside["weight"] = weight
        return
    alpha, granularity = float(rng.uniform(0.2, 3)), str(rng.choice(["model", "layer", "tensor"]))
    keys["mixup"] = {"alpha": alpha, "granularity": granularity}

    def group(name: str) -> str | None:
        layer = ".".join(name.split(".")[:2]) if name.startswith("layers.") else "outside blocks"
        return {"model": None, "layer": layer, "tensor": name}[granularity]

    drawn = {name: oracle.draw(keys["seed"], alpha, count, group(name)) for name in names}
    if granularity == "layer" and rng.random() < 0.6:
        keys["mixup"]["smooth"] = smooth = float(rng.uniform(0.1, 0.99))
        blocks = sorted({group(name) or "" for name in names if name.startswith("layers.")})
        walked = oracle.walk(keys["seed"], alpha, count, blocks, smooth)
        drawn = {name: walked.get(group(name) or "", weights) for name, weights in drawn.items()}
    told["weights"] = {name: w[0] for name, w in drawn.items()} if method == "slerp" else drawn


def _depth(name: str, names: list[str]) -> float:
    """How deep in the model a tensor is: from 0, at what is before the blocks, to 1."""
    last = max(int(each.split(".")[1]) for each in names if each.startswith("layers."))
    if not name.startswith("layers."):
        return float(name.startswith("final"))
    return int(name.split(".")[1]) / last if last else 1.0


def _along(points: list[float], depth: float) -> float:
    left = min(int(depth * (len(points) - 1)), max(len(points) - 2, 0))
    part = depth * (len(points) - 1) - left
    return (1.0 - part) * points[left] + part * points[min(left + 1, len(points) - 1)]


def _adapters(
    rng: np.random.Generator, models: list[Tree], formats: list[str]
) -> dict[int, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Factors for some of the experts that can have an adapter."""
    found = {}
    for number, tree in enumerate(models[1:]):
        weights = {name: value.shape for name, value in tree.items() if name.endswith(".w1.weight")}
        if not weights or formats[number + 1] not in _FILES or rng.random() < 0.4:
            continue
        found[number] = {
            name: tuple(rng.standard_normal(shape).astype(np.float32) for shape in ((rows, _RANK), (_RANK, columns)))
            for name, (rows, columns) in weights.items()
        }
    return found


def _slices(rng: np.random.Generator, count: int, depth: int) -> list[tuple[int, list[int]]]:
    found = []
    for _ in range(int(rng.integers(1, 4))):
        length = int(rng.integers(1, depth + 1))
        found.append((length, rng.integers(0, depth - length + 1, count).tolist()))
    return found


def _statistics(rng: np.random.Generator, tree: Tree) -> Tree:
    """Numbers of many magnitudes, zeros too; the last tensor has none."""

    def of(value: np.ndarray) -> np.ndarray:
        found = np.exp2(rng.uniform(-120, 20, value.shape)).astype(np.float32)
        return np.where(rng.random(value.shape) < 0.3, np.float32(0), found).astype(np.float32)

    return {name: of(value) for name, value in tree.items() if name != "final.scale"}


# --- writing and merging ------------------------------------------------------------------------------------------


def _cut(models: list[Tree], slices: list[tuple[int, list[int]]]) -> list[Tree]:
    """Models of the blocks that slices take, numbered anew."""
    if not slices:
        return models
    cut = []
    for number, tree in enumerate(models):
        taken = [first[number] + i for length, first in slices for i in range(length)]
        held = {name: value for name, value in tree.items() if not name.startswith("layers.")}
        for block, of in enumerate(taken):
            inside = f"layers.{of}."
            held |= {f"layers.{block}.{n.removeprefix(inside)}": v for n, v in tree.items() if n.startswith(inside)}
        cut.append(held)
    return cut


def wanted(drawn: Recipe) -> Tree:
    """What the oracle makes of a recipe, block by block."""
    base, *experts = drawn.models
    experts = [
        tree
        | {
            name: oracle.adapted(tree[name], left, right, 2.0)
            for name, (left, right) in drawn.adapters.get(i, {}).items()
        }
        for i, tree in enumerate(experts)
    ]
    base, *experts = _cut([base, *experts], drawn.slices)
    given = {"statistics": drawn.statistics} if drawn.statistics else {}
    return oracle.merge(experts, base, **drawn.told, **given)


def arranged(tree: Tree, layout: str) -> Tree:
    """The tree with its blocks as files have them: one by one, in either spelling, or stacked along an axis."""
    if layout == "by name":
        return tree
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


def _written(place: Path, tree: Tree, layout: str, format: str) -> Path:
    place.mkdir()
    WRITERS[format](arranged(tree, layout), place)
    return place


def _adapted(model: Path, factors: dict[str, tuple[np.ndarray, np.ndarray]]) -> str:
    """An adapter written beside a model; what a recipe calls both."""
    stored = {}
    for name, pair in factors.items():
        stored |= {
            f"{PREFIX}{name.removesuffix('.weight')}.lora_{which}.weight": value
            for which, value in zip("BA", pair, strict=True)
        }
    return f"{model}+{write_adapter(model.with_name(model.name + '-adapter'), stored)}"  # alpha is twice the rank


def _recipe_in(place: Path, drawn: Recipe) -> Named:
    """Writes the models; returns the recipe that names them."""
    each = zip(drawn.models, drawn.layouts, drawn.formats, strict=True)
    paths = [_written(place / f"model-{i}", *model) for i, model in enumerate(each)]
    names = [str(path) for path in paths]
    for number, factors in drawn.adapters.items():
        names[number + 1] = _adapted(paths[number + 1], factors)
    entries: list[Named] = [
        {"model": name} | ({"parameters": parameters} if parameters else {})
        for name, parameters in zip(names[1:], drawn.of_experts, strict=True)
    ]
    for i, tree in enumerate(drawn.statistics):
        beside = _written(place / f"statistics-{i}", tree, drawn.layouts[i + 1], drawn.formats[i + 1])
        entries[i]["statistics"] = str(beside)
    keys = dict(drawn.keys) | ({"base_model": names[0]} if drawn.has_base else {})
    if not drawn.slices:
        return keys | {"models": entries}
    sources = [{"model": names[0]}] * drawn.has_base + entries
    firsts = [(length, first if drawn.has_base else first[1:]) for length, first in drawn.slices]
    return keys | {
        "slices": [
            {"sources": [source | {"layer_range": [f, f + length]} for source, f in zip(sources, first, strict=True)]}
            for length, first in firsts
        ]
    }


def wrong_tensors(drawn: Recipe, place: Path) -> list[str]:
    """Merges in an empty directory; returns the tensors that are not the oracle's, and what verifying finds."""
    options = drawn.options | {"mesh": parse_mesh(drawn.options["mesh"])}
    m3jax.merge_checkpoint(_recipe_in(place, drawn), place / "out", **options)
    want = arranged(wanted(drawn), drawn.layouts[0 if drawn.has_base else 1])
    with open_checkpoint(place / "out") as checkpoint:  # in the base's format, or the first expert's
        got = {name: read(checkpoint, name) for name in checkpoint.tensors}
    wrong = [
        name
        for name, value in want.items()
        if name not in got or got[name].dtype != value.dtype or got[name].tobytes() != value.tobytes()
    ]
    sampled = verify_sample(place / "out", sample=_SAMPLED, inputs=True)
    return [*wrong, *sorted(got.keys() - want.keys()), *sampled.differences]
