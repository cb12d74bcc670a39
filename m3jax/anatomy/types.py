"""What is known of a checkpoint's tensors: plain data."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, NamedTuple, TypeAlias

from m3jax.naming import OUTSIDE_BLOCKS as OUTSIDE_BLOCKS
from m3jax.naming import position as position

Kind: TypeAlias = Literal["parameter", "buffer", "statistics", "optimizer", "step", "random", "adapter", "quantised"]
"""What a tensor is for; "statistics" are the running mean and variance of batch normalisation."""

KINDS: tuple[Kind, ...] = (
    "parameter",
    "buffer",
    "statistics",
    "optimizer",
    "step",
    "random",
    "adapter",
    "quantised",
)
MODEL_KINDS: frozenset[Kind] = frozenset({"parameter", "buffer", "statistics", "adapter", "quantised"})
"""Kinds that are of the model itself, not of its training."""


class Part(NamedTuple):
    """What one stored tensor is.

    Attributes:
        kind: What it is for.
        canonical: Its canonical name (`canonical_names`).
        tower: The name of the tower it belongs to, in a block or outside; None where there is none.
        block: Its block's number within the tower; None outside blocks and where it stacks several.
        stack_axis: The axis along which it stacks blocks; None if it does not.
        blocks: The numbers of the blocks it stacks, in order along that axis.
        block_names: What the tensor of each of these blocks is called, in the same order.
        groups: The canonical names of the blocks it is of: one, or those that it stacks; none outside blocks.
        vocabulary_axis: The axis of tokens; None if it has none.
        alias_of: The stored tensor that it is one with; None if there is none.
        position: Where gradients are read, in [0, 1] per tower; for a stacked leaf use `block_position`.
        doubt: A sentence that says what cannot be told of it and which key of a recipe tells it; None if nothing.
    """

    kind: Kind
    canonical: str
    tower: str | None = None
    block: int | None = None
    stack_axis: int | None = None
    blocks: tuple[int, ...] = ()
    block_names: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    vocabulary_axis: int | None = None
    alias_of: str | None = None
    position: float = 1.0
    doubt: str | None = None


class Tower(NamedTuple):
    """A stack of blocks: a language model, a vision tower, an encoder, a decoder.

    Attributes:
        name: "model" where there is only one, else what it is: "text", "vision", "encoder", "decoder", …
        depth: How many blocks it has.
        stacked: Whether leaves stack its blocks.
    """

    name: str
    depth: int
    stacked: bool = False


class Anatomy(NamedTuple):
    """What each tensor of a checkpoint is.

    Attributes:
        parts: By stored name, in the order given.
        towers: By name.
        family: The `model_type` of config.json, or the layout that names tell ("maxtext", "gemma", "tunix"); None if
            neither is known.
        ties_embeddings: Whether the output embedding is the input embedding; None if nothing says so.
        notes: Sentences on what was assumed, what disagrees and what cannot be told.
        quantisation: The scheme in which weights are quantised; None if they are not.
        embedding: The stored name of the input embedding; None if there is none.
        head: The stored name of the output embedding; None if there is none.
        tied_candidates: Pairs of stored names, a copy and its original, that are one tensor if their bits are equal:
            those that config ties, and those of which nothing says whether they are tied.
    """

    parts: Mapping[str, Part]
    towers: Mapping[str, Tower]
    family: str | None = None
    ties_embeddings: bool | None = None
    notes: tuple[str, ...] = ()
    quantisation: str | None = None
    embedding: str | None = None
    head: str | None = None
    tied_candidates: tuple[tuple[str, str], ...] = ()


class Overrides(NamedTuple):
    """What a recipe's key `anatomy` says; it outranks all other evidence. Patterns are searched in stored names.

    Attributes:
        blocks: A regular expression whose group 1 is the block's number; a tensor in which it is not found is outside.
        stacked: The axis along which tensors stack blocks, by pattern; -1 says that they stack none.
        kinds: What tensors are, by pattern.
        tied: Whether the output embedding is the input embedding.
    """

    blocks: str | None = None
    stacked: Mapping[str, int] = MappingProxyType({})
    kinds: Mapping[str, Kind] = MappingProxyType({})
    tied: bool | None = None
