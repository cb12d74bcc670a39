"""Which tensors have an axis of tokens, and which axis."""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from m3jax.anatomy.families import CERTAIN_HEAD, FLAX_EMBEDDING, Family
from m3jax.naming import HEAD, INPUT_EMBEDDING, NO_WORDS

Shape = tuple[int, ...]


class Words(NamedTuple):
    """Tensors with an axis of tokens, by canonical name.

    Attributes:
        axes: The axis of each.
        embeddings: Input embeddings, the one that others are tied to first.
        heads: Output embeddings: matrices.
    """

    axes: Mapping[str, int]
    embeddings: tuple[str, ...]
    heads: tuple[str, ...]


def find_words(shapes: Mapping[str, Shape], family: Family, flax: bool, size: int | None) -> Words:
    """Finds the tensors with an axis of tokens among those that are in no block.

    Args:
        shapes: Shapes of parameters and quantised weights outside blocks, by canonical name.
        family: What is known of the architecture.
        flax: Whether names are of a Flax tree, where a head is `[d, vocabulary]`.
        size: How many tokens there are; None if it is not known.
    """
    embeddings = [name for name, shape in shapes.items() if _is_embedding(name, shape, family, flax, size)]
    embeddings.sort(key=_rank)
    sizes = {shapes[name][0] for name in embeddings} | ({size} if size is not None else set())
    axes = dict.fromkeys(embeddings, 0)
    heads = []
    for name, shape in shapes.items():
        if name in axes or not HEAD.search(name):
            continue
        axis = _token_axis(name, shape, sizes, flax)
        if axis is not None:
            axes[name] = axis
            if len(shape) == 2 and min(shape) > 1 and (flax or axis == 0):
                heads.append(name)
    return Words({name: axes[name] for name in shapes if name in axes}, tuple(embeddings), tuple(heads))


def _is_embedding(name: str, shape: Shape, family: Family, flax: bool, size: int | None) -> bool:
    if len(shape) != 2 or (size is not None and shape[0] < size):
        return False
    if family.words is not None and re.search(family.words, name):
        return True
    if flax:
        return FLAX_EMBEDDING.search(name) is not None and NO_WORDS.search(name) is None
    return INPUT_EMBEDDING.search(name) is not None and NO_WORDS.search(name) is None


def _rank(name: str) -> int:
    """What is tied to what: all to `shared`, else encoder and head to the decoder's own embedding."""
    if name.rpartition(".")[0].endswith("shared"):
        return 0
    if "per_layer" in name:
        return 3
    return 2 if "encoder." in name else 1


def _token_axis(name: str, shape: Shape, sizes: Iterable[int], flax: bool) -> int | None:
    order = range(len(shape) - 1, -1, -1) if flax else range(len(shape))
    found = next((axis for axis in order if shape[axis] in set(sizes)), None)
    # A head that is padded to another size, or whose embedding is not stored, is laid out as its software does it.
    if found is None and len(shape) == 2 and CERTAIN_HEAD.search(name):
        return len(shape) - 1 if flax else 0
    return found
