"""What M³ draws for the groups of a tree: on the host where the key is known there, else by calls from the program.

A Beta quantile that is correctly rounded in float32 and integers alone would have to repeat SciPy's every rounding, and
coefficients are folded from the drawn weights in float64. So a program in which the key is traced calls the host back,
which draws and folds as it does everywhere else.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from m3jax.arithmetic.double import Double, thirds
from m3jax.arithmetic.threefry import Words
from m3jax.errors import M3Error
from m3jax.methods.base import Settings
from m3jax.methods.leaf import Pipeline
from m3jax.methods.measures import on_host
from m3jax.methods.mixup import Mixup, draw_groups
from m3jax.trees.parts import ParameterTree

Weigh = Callable[[tuple[Any, ...]], Settings]
"""The settings of tensors that have these weights."""

Folded = Mapping[Any, tuple[Settings, Any]]
"""By group: its settings, and what the method folded them into."""


class Drawing(NamedTuple):
    """How the weights of a merge are drawn.

    Attributes:
        how: As the caller says.
        weighting: As `Method.weighting`.
        num_weights: How many a tensor has.
        walks: Of each tower the groups of its blocks, by number.
        root: uint32[2], what is drawn from: of numpy, or traced.
    """

    how: Mixup
    weighting: str
    num_weights: int
    walks: tuple[Mapping[int, str], ...]
    root: Words

    def drawn(self, root: Words, groups: Sequence[str | None]) -> dict[str | None, tuple[float, ...]]:
        """The weights of groups, drawn on the host."""
        return draw_groups(self.weighting, root, self.how.alpha, self.num_weights, groups, self.walks, self.how.smooth)


def walks_of(tree: ParameterTree, names: Sequence[str]) -> tuple[Mapping[int, str], ...]:
    """Of each tower the groups of its blocks, by number.

    Args:
        tree: The template.
        names: Of the leaves that are merged.
    """
    walks: dict[str | None, dict[int, str]] = {}
    for name in names:
        part = tree.parts[name]
        numbers = part.blocks if part.stack_axis is not None else (part.block,) * len(part.groups)
        for number, group in zip(numbers, part.groups, strict=True):
            walks.setdefault(part.tower, {})[number or 0] = group
    return tuple(walks.values())


def folded(drawing: Drawing, pipe: Pipeline, groups: Sequence[str | None], weigh: Weigh) -> Folded:
    """The settings of groups whose weights are drawn, and what they fold into: the same bits in a program as outside.

    Args:
        drawing: How they are drawn.
        pipe: What is done.
        groups: Which.
        weigh: What becomes of a group's weights.
    """
    fold = pipe.method.fold
    if isinstance(drawing.root, np.ndarray):
        known = {group: weigh(weights) for group, weights in drawing.drawn(drawing.root, groups).items()}
        return {group: (settings, fold(pipe.method.options, settings)) for group, settings in known.items()}
    if not isinstance(weigh((0.5,) * drawing.num_weights).scale, Double):
        return _called_back(drawing, pipe, groups, weigh)
    # A scale known to the program alone is folded there, in double-float, as are weights that are traced.
    return {
        group: (settings, fold(pipe.method.options, settings))
        for group, settings in zip(groups, _weighed(drawing, groups, weigh), strict=True)
    }


def _weighed(drawing: Drawing, groups: Sequence[str | None], weigh: Weigh) -> list[Settings]:
    """Settings of weights that a program gets from the host."""

    def of_root(root: np.ndarray) -> list[np.ndarray]:
        return [thirds(np.array(list(drawing.drawn(root, groups).values())))]

    shapes = [(len(groups), drawing.num_weights, 3)]
    (parts,) = on_host(lambda roots: _of_each(roots, of_root), shapes, drawing.root, batched=True)
    return [weigh(tuple(Double(*parts[row, i]) for i in range(drawing.num_weights))) for row in range(len(groups))]


def _called_back(drawing: Drawing, pipe: Pipeline, groups: Sequence[str | None], weigh: Weigh) -> Folded:
    """What a program gets from the host: weights, and what they were folded into there."""
    options, fold = pipe.method.options, pipe.method.fold
    settings = weigh((0.5,) * drawing.num_weights)
    like = fold(options, settings)
    leaves, structure = jax.tree.flatten(like)

    def filled(leaf: Any, made: Any) -> np.ndarray:
        """A factor that is None, as it changes nothing, is ones."""
        return np.ones(np.shape(leaf), np.float32) if made is None else np.asarray(made, np.float32)

    def of_group(weights: tuple[float, ...]) -> list[np.ndarray]:
        try:
            return jax.tree.leaves(jax.tree.map(filled, like, fold(options, weigh(weights))))
        except M3Error:  # in a program nothing can be refused
            return [np.full(np.shape(leaf), np.nan, np.float32) for leaf in leaves]

    def of_root(root: np.ndarray) -> list[np.ndarray]:
        drawn = drawing.drawn(root, groups)
        made = [of_group(drawn[group]) for group in groups]
        own = [weigh(drawn[group]).weights for group in groups]
        return [thirds(np.array(own, np.float64)), *(np.stack(each) for each in zip(*made, strict=True))]

    count = len(settings.weights)
    wanted = [(len(groups), count, 3), *((len(groups), *np.shape(leaf)) for leaf in leaves)]
    parts, *stacked = on_host(lambda roots: _of_each(roots, of_root), wanted, drawing.root, batched=True)
    return {
        group: (
            settings._replace(weights=tuple(Double(*parts[row, i]) for i in range(count))),
            jax.tree.unflatten(structure, [each[row] for each in stacked]),
        )
        for row, group in enumerate(groups)
    }


def _of_each(roots: np.ndarray, function: Callable[[np.ndarray], list[np.ndarray]]) -> list[np.ndarray]:
    """What a function gives for each of many keys uint32[..., 2], stacked."""
    made = [function(root) for root in roots.reshape(-1, 2)]
    return [np.stack(each).reshape(*roots.shape[:-1], *each[0].shape) for each in zip(*made, strict=True)]
