"""What each tensor of a checkpoint is: its block, its kind, its aliases, its axis of tokens. No values, no JAX."""

from m3jax.anatomy.building import anatomy_of, block_name, block_position, group_of
from m3jax.anatomy.canonical import canonical_names, is_flax_tree
from m3jax.anatomy.summary import AnatomySummary, TowerRow, summarise
from m3jax.anatomy.types import (
    KINDS,
    MODEL_KINDS,
    OUTSIDE_BLOCKS,
    Anatomy,
    Kind,
    Overrides,
    Part,
    Tower,
    position,
)

__all__ = [
    "KINDS",
    "MODEL_KINDS",
    "OUTSIDE_BLOCKS",
    "Anatomy",
    "AnatomySummary",
    "Kind",
    "Overrides",
    "Part",
    "Tower",
    "TowerRow",
    "anatomy_of",
    "block_name",
    "block_position",
    "canonical_names",
    "group_of",
    "is_flax_tree",
    "position",
    "summarise",
]
