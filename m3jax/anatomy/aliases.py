"""Names that are one tensor."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from m3jax.anatomy.families import Family, family_of, subconfig
from m3jax.anatomy.vocabulary import Words
from m3jax.naming import SIDES

Shape = tuple[int, ...]


class Ties(NamedTuple):
    """Whether the output embedding is the input embedding, and on what evidence.

    Attributes:
        tied: None if nothing says so.
        note: A sentence where evidence disagrees; None where it does not.
    """

    tied: bool | None
    note: str | None = None


_BIASES = (
    ("cls.predictions.decoder.bias", "cls.predictions.bias"),
    ("lm_head.decoder.bias", "lm_head.bias"),
    ("predictions.decoder.bias", "predictions.bias"),
)


def read_ties(config: Mapping[str, Any] | None, family: Family, has_head: bool, override: bool | None) -> Ties:
    """What a recipe, config.json and the family's default say, in this order.

    Args:
        config: config.json; None if there is none.
        family: What is known of the architecture.
        has_head: Whether an output embedding is stored.
        override: What the recipe says.
    """
    if override is not None:
        return Ties(override)
    if config is None:
        return Ties(None)
    text = subconfig(config, "text") or {}
    outer, inner = config.get("tie_word_embeddings"), text.get("tie_word_embeddings")
    if isinstance(outer, bool):
        if isinstance(inner, bool) and inner != outer:
            disagreement = "config.json and its text_config disagree on tie_word_embeddings"
            if not has_head:
                return Ties(True, f"{disagreement}: no output embedding is stored, so they are tied")
            return Ties(outer, f"{disagreement}: {str(outer).lower()}, as config.json says")
        return Ties(outer)
    if isinstance(inner, bool):
        return Ties(inner)
    if family.ties is not None:
        return Ties(family.ties)
    return Ties(family_of(text.get("model_type")).ties)


class Aliases(NamedTuple):
    """Names of one tensor, by canonical name.

    Attributes:
        of: The original of each copy.
        candidates: Copies and originals that are one tensor if their bits are equal.
    """

    of: Mapping[str, str]
    candidates: tuple[tuple[str, str], ...]


def find_aliases(shapes: Mapping[str, Shape], words: Words, family: Family, tied: bool | None) -> Aliases:
    """Finds stored names that are copies of another stored tensor.

    Args:
        shapes: Shapes of all tensors, by canonical name.
        words: Those with an axis of tokens.
        family: What is known of the architecture.
        tied: Whether the output embedding is the input embedding; None if it is not known.
    """
    of: dict[str, str] = {}
    candidates: list[tuple[str, str]] = []
    if words.embeddings:
        original = words.embeddings[0]
        copies = [name for name in words.embeddings[1:] if SIDES.search(name)]
        shared = family.always_shared or (tied is not False and original.rpartition(".")[0].endswith("shared"))
        for copy, known in [*((c, shared) for c in copies), *((h, tied is True) for h in words.heads)]:
            if shapes[copy] != shapes[original] or (tied is False and not (known and copy in copies)):
                continue
            candidates.append((copy, original))
            if known:
                of[copy] = original
    for copy, original in _BIASES:
        if copy in shapes and original in shapes and shapes[copy] == shapes[original]:
            of[copy] = original
            candidates.append((copy, original))
    return Aliases(of, tuple(candidates))
