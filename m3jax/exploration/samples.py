"""Where an exploration looks: points of the unit cube and the merging weights that lie there."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from m3jax.arithmetic import threefry
from m3jax.errors import M3Error
from m3jax.methods.mixup import draw_weights, weights_at
from m3jax.recipe import Recipe
from m3jax.streaming.plan import WHOLE_MODEL, BlockPlan, MergePlan

Weights = Mapping[str, tuple[float, ...]]
"""Merging weights by group of tensors, as a manifest records them; for slerp the one position t."""


class Space(NamedTuple):
    """What an exploration draws.

    Attributes:
        groups: The groups that have weights of their own; `WHOLE_MODEL` alone where one draw serves the model.
        num_experts: Weights per group.
        alpha: Of the Beta or Dirichlet that independent draws follow.
        position: The method takes a position t for its weights.
        root: uint32[2], the recipe's root key.
    """

    groups: tuple[str, ...]
    num_experts: int
    alpha: float | tuple[float, float]
    position: bool
    root: threefry.Words

    @property
    def dimensions(self) -> int:
        """Of the unit cube: one per group and stick."""
        return len(self.groups) * (self.num_experts - 1)


def space_of(recipe: Recipe, plan: MergePlan) -> Space:
    """The space of a recipe's draws.

    Args:
        recipe: With a `mixup`.
        plan: Its plan.

    Raises:
        M3Error: The recipe draws nothing.
    """
    if recipe.mixup is None:
        raise M3Error(
            "the recipe has no mixup, so there are no ratios to explore: add a line such as mixup: {alpha: 1}"
        )
    if recipe.mixup.weights is not None:
        raise M3Error("mixup.weights: are given, so there are no ratios to explore: remove them")
    if recipe.mixup.smooth:
        raise M3Error(
            "mixup.smooth: exploration draws each layer by itself: leave it out (--set mixup.smooth=0), or merge with"
            " several seeds"
        )
    pipe = plan.pipeline
    root = threefry.root_key(recipe.seed)
    return Space(tuple(plan.weights), pipe.num_experts, recipe.mixup.alpha, pipe.method.weighting == "position", root)


def _stored(space: Space, weights: tuple[float, ...]) -> tuple[float, ...]:
    return weights[:1] if space.position else weights


def drawn(space: Space, sample: int) -> Weights:
    """The weights of one independent draw, which no other draw enters; the first is what `m3jax merge` draws.

    Args:
        space: The space.
        sample: The number of the draw.

    Example:
        >>> space = Space(("model",), 2, 0.5, False, threefry.root_key(0))
        >>> sum(drawn(space, 3)["model"])
        1.0
    """
    key = threefry.sample_key(space.root, sample)
    return {
        group: _stored(
            space, draw_weights(key, space.alpha, space.num_experts, None if group == WHOLE_MODEL else group)
        )
        for group in space.groups
    }


def at_point(space: Space, point: Sequence[float] | np.ndarray) -> Weights:
    """The weights at a point of the unit cube; a uniform point gives the draws' own distribution.

    Args:
        space: The space.
        point: `space.dimensions` probabilities.
    """
    rows = np.asarray(point, np.float64).reshape(len(space.groups), space.num_experts - 1)
    sets = (weights_at([float(p) for p in row], space.alpha) for row in rows)
    return {group: _stored(space, weights) for group, weights in zip(space.groups, sets, strict=True)}


def equal_weights(space: Space) -> Weights:
    """The same share of every expert."""
    return everywhere(space, (1.0 / space.num_experts,) * space.num_experts)


def everywhere(space: Space, weights: tuple[float, ...]) -> Weights:
    """The same weights in every group."""
    return dict.fromkeys(space.groups, _stored(space, weights))


def weights_of(weights: Weights, block: BlockPlan) -> tuple[float, ...]:
    """The weights of a tensor's block, whatever the granularity that they were drawn at.

    Args:
        weights: By group.
        block: Of a tensor's plan.
    """
    return weights[next(group for group in (WHOLE_MODEL, block.layer, block.key) if group in weights)]


def group_of(block: BlockPlan, granularity: str) -> str:
    """The group of a tensor's block.

    Args:
        block: Of a tensor's plan.
        granularity: "model", "layer" or "tensor".
    """
    return {"model": WHOLE_MODEL, "layer": block.layer}.get(granularity, block.key)


def to_hex(weights: Weights) -> dict[str, list[str]]:
    """Weights as JSON holds them exactly."""
    return {group: [float(value).hex() for value in values] for group, values in weights.items()}


def from_hex(told: Mapping[str, Sequence[str]]) -> Weights:
    """What `to_hex` was given."""
    return {group: tuple(float.fromhex(value) for value in values) for group, values in told.items()}
