"""One name per tensor of a Flax tree, however it was boxed, wrapped and spelled."""

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping

from m3jax.anatomy.kinds import is_training_state

_WRAPPERS = frozenset({"params", "param", "model_params", "train_state", "state", "target", "items", "default"})
_ROOTS_OF_STATE = frozenset({"optimizer", "opt_state", "optimizer_state", "step", "rngs", "nnx_aux"})
_COLLECTIONS = frozenset({"batch_stats", "collections"})  # linen keeps statistics beside the parameters
_NESTED = ("collections", "batch_stats")  # Kauldron's
_STATISTICS = "batch_stats."
_BOX = "value"
_BOX_SIBLINGS = frozenset({"names", "mesh", "rules", "sharding", "sharding_names", "sharding_rules", "raw_value"})
_NUMBERED = re.compile(r"^([a-z]\w*?(?:layers?|blocks?)|layers?|blocks?|h|encoderblock|decoderblock)_(\d{1,9})$")
_PLURALS = {"layer": "layers", "block": "blocks"}


def is_flax_tree(names: Collection[str]) -> bool:
    """Whether names are of a Flax tree: PyTorch calls a matrix `weight`, Flax `kernel`, and only NNX boxes a `value`.

    Some modules of Flax call a norm's scale `weight`, so that the more frequent of the two decides.

    Example:
        >>> is_flax_tree(["layers_0.mlp.kernel"]), is_flax_tree(["model.layers.0.mlp.up_proj.weight"])
        (True, False)
    """
    ends = Counter(name.replace("/", ".").rpartition(".")[2] for name in names)
    boxed = any(name.endswith((".weight.value", ".kernel.value")) for name in names)
    return boxed or ends["kernel"] + ends["embedding"] >= ends["weight"]


def canonical_names(names: Iterable[str]) -> Mapping[str, str]:
    """The canonical name of every tensor of one checkpoint.

    Names of PyTorch's models stay as they are. In a Flax tree boxes (`.value`) and wrappers around the whole tree
    (`params`, the name of an Orbax item) are dropped from what belongs to the model, "/" becomes ".", and a numbered
    block is spelled `layers.3` whether the tree says `layers_3`, `layer_3` or `layers.3`.

    Args:
        names: All names of the checkpoint.

    Returns:
        Canonical names by name; no two are equal.

    Example:
        >>> canonical_names(["params.params.layers_0.kernel.value", "step"])["params.params.layers_0.kernel.value"]
        'layers.0.kernel'
    """
    stored = list(names)
    if not is_flax_tree(stored):
        return {name: name for name in stored}
    paths = {name: tuple(name.replace("/", ".").split(".")) for name in stored}
    boxed = _boxed(paths.values())
    canonical = {name: path[:-1] if path in boxed else path for name, path in paths.items()}
    model = [name for name in stored if not is_training_state(name)]
    inner = _unwrapped([canonical[name] for name in model], set(paths.values()), any(paths[n] in boxed for n in model))
    canonical |= dict(zip(model, inner, strict=True))
    canonical = {name: path[1:] if path[:2] == _NESTED else path for name, path in canonical.items()}
    spelled = {name: ".".join(_spelled(path)) for name, path in canonical.items()}
    # Two trees under one roof may meet in one name: such names stay as they are stored.
    met = Counter(spelled.values())
    return {name: name if met[new] > 1 else new for name, new in spelled.items()}


def split_collection(name: str) -> tuple[str, str]:
    """A canonical name as linen's collection that it stands in, and the path of its module.

    Example:
        >>> split_collection("batch_stats.layers.0.bn.mean"), split_collection("layers.0.bn.scale")
        (('batch_stats.', 'layers.0.bn.mean'), ('', 'layers.0.bn.scale'))
    """
    return (_STATISTICS, name.removeprefix(_STATISTICS)) if name.startswith(_STATISTICS) else ("", name)


def _boxed(paths: Iterable[tuple[str, ...]]) -> set[tuple[str, ...]]:
    """Paths that end in a box: `value` alone below its parent, or beside nothing but the box's own metadata."""
    children: dict[tuple[str, ...], set[str]] = defaultdict(set)
    ends = []
    for path in paths:
        for i in range(len(path)):
            children[path[:i]].add(path[i])
        if len(path) > 1 and path[-1] == _BOX:
            ends.append(path)
    return {path for path in ends if children[path[:-1]] <= {_BOX, *_BOX_SIBLINGS}}


def _unwrapped(
    paths: list[tuple[str, ...]], everything: set[tuple[str, ...]], any_boxed: bool
) -> list[tuple[str, ...]]:
    """The model's paths without the components that all of them begin with and that name no module."""
    roots = {path[0] for path in everything}
    while paths and all(len(path) > 1 for path in paths):
        firsts = {path[0] for path in paths if path[0] not in _COLLECTIONS}
        if len(firsts) != 1:
            break
        (first,) = firsts
        # A module may be called `model`: it wraps the tree where training state stands beside it, or in an NNX state.
        wraps = first in _WRAPPERS or (first == "model" and (any_boxed or bool(roots & _ROOTS_OF_STATE)))
        gemma = first == "transformer" and any(path[-2:-1] == ("attn_vec_einsum",) for path in paths)
        if not wraps and not gemma:
            break
        paths = [path[1:] if path[0] == first else path for path in paths]
    return paths


def _spelled(path: tuple[str, ...]) -> Iterable[str]:
    for i, component in enumerate(path):
        match = _NUMBERED.match(component)
        if match is not None:
            yield _PLURALS.get(match.group(1), match.group(1))
            yield match.group(2)
        elif component in _PLURALS and i + 1 < len(path) and path[i + 1].isdecimal():
            yield _PLURALS[component]
        else:
            yield component
