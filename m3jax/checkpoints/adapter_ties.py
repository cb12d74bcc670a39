"""Tensors of a base that are one under several names, which an adapter has to change alike."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from m3jax.checkpoints.adapter_config import StoredAdapter
from m3jax.checkpoints.protocol import Checkpoint, TensorInfo
from m3jax.checkpoints.views_adapted import Adaptation
from m3jax.errors import M3Error
from m3jax.naming import HEAD, INPUT_EMBEDDING, NO_WORDS, SIDES, block_of

_AT_ONCE = 2**24  # bytes of two tensors that are compared


class _Words(NamedTuple):
    """The tensors of a base that may be one: its embedding, that of its encoder and decoder, output embeddings."""

    original: str
    sides: tuple[str, ...]
    heads: tuple[str, ...]


def with_ties(
    adaptations: dict[str, Adaptation], base: Checkpoint, config: Mapping[str, Any], adapter: StoredAdapter
) -> dict[str, Adaptation]:
    """Adaptations that leave one tensor one: all copies of what is tied change alike, as ensure_weight_tying says.

    Raises:
        M3Error: A tied tensor would change under one of its names, or it is not known whether it is tied.
    """
    text = config.get("text_config")
    text = text if isinstance(text, dict) else {}
    words = _words_of(base.tensors, text.get("vocab_size", config.get("vocab_size")))
    if words is None or adaptations.keys().isdisjoint((words.original, *words.sides, *words.heads)):
        return adaptations
    said = [part["tie_word_embeddings"] for part in (config, text) if isinstance(part.get("tie_word_embeddings"), bool)]
    told = None if not said else True if not words.heads and True in said else said[0]
    copies = [
        *(each for each in words.sides if told is not False or _are_alike(base, each, words.original)),
        *(each for each in words.heads if told or (told is None and _are_alike(base, each, words.original))),
    ]
    not_stored = (told is not False and not words.heads) or (_is_shared(words.original) and not words.sides)
    names = (words.original, *copies)
    changed = [name for name in names if name in adaptations]
    if not changed or not (copies or not_stored):
        return adaptations
    if not adapter.config.get("ensure_weight_tying"):
        raise _tied_fault(changed[0], words, copies, told, adapter)
    stored, product = adaptations[changed[0]]
    return adaptations | {name: Adaptation(name if stored == changed[0] else stored, product) for name in names}


def _tied_fault(changed: str, words: _Words, copies: list[str], told: bool | None, adapter: StoredAdapter) -> M3Error:
    other = next((name for name in copies if name != changed), None) if changed == words.original else words.original
    if told is None and other is not None:
        return M3Error(
            f"{adapter.name} changes {changed}, of which {other} may be a copy, for both hold the same: say in the"
            " base's config.json by tie_word_embeddings whether they are one."
        )
    shared = told is False or (changed != words.original and changed in words.sides)
    what = "the embedding of encoder and decoder" if shared else "the output embedding"
    what = "the input embedding" if changed in words.heads else what
    mend = (
        "merge the adapter in PEFT first"
        if shared
        else "store the base with an output embedding of its own and tie_word_embeddings false"
    )
    beside = "" if other is None else f" ({other})"
    return M3Error(
        f"{adapter.name} changes {changed}, which is {what} too{beside}, though it was trained as one of the two:"
        f" {mend}."
    )


def _words_of(tensors: Mapping[str, TensorInfo], size: Any) -> _Words | None:
    """What of a base may be tied, of one shape; None where it has no input embedding."""
    matrices = {
        name: info.shape
        for name, info in tensors.items()
        if len(info.shape) == 2 and block_of(name) is None and not (isinstance(size, int) and info.shape[0] < size)
    }
    heads = [name for name in matrices if HEAD.search(name)]
    others = [name for name in matrices if name not in heads and not NO_WORDS.search(name)]
    known = [name for name in others if INPUT_EMBEDDING.search(name)]
    shapes = {matrices[name] for name in heads}  # of some architectures the embedding has another name
    words = known or [n for n in others if matrices[n] in shapes or (not heads and matrices[n][0] == size)]
    if not words:
        return None
    original = min(words, key=lambda name: (not _is_shared(name), "per_layer" in name, "encoder." in name))
    alike = [name for name in matrices if matrices[name] == matrices[original] and name != original]
    sides = tuple(name for name in alike if _is_shared(original) and SIDES.search(name))
    return _Words(original, sides, tuple(name for name in alike if name in heads))


def _is_shared(name: str) -> bool:
    return name.rpartition(".")[0].endswith("shared")


def _are_alike(checkpoint: Checkpoint, one: str, other: str) -> bool:
    """Whether two tensors of one shape have the same dtype and bytes."""
    first, second = checkpoint.tensors[one], checkpoint.tensors[other]
    if first.dtype != second.dtype:
        return False
    for start in range(0, first.nbytes, _AT_ONCE):
        own, its = (np.empty(min(_AT_ONCE, first.nbytes - start), np.uint8) for _ in range(2))
        checkpoint.read_into(one, start, own)
        checkpoint.read_into(other, start, its)
        if not np.array_equal(own, its):
            return False
    return True
