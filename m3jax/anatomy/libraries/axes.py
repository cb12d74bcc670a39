"""How a tensor lies in another, in a notation of axes: `"(heads dim) width"` is a matrix of heads after heads.

Axes stand in their order, those in brackets are one axis of the tensor, the first of them outermost.
"""

import re
from collections.abc import Mapping
from math import prod
from typing import NamedTuple, TypeAlias

Axes: TypeAlias = tuple[tuple[str, ...], ...]
"""For each axis of a tensor the names of what it consists of."""


def parse(text: str) -> Axes:
    """Axes from their notation.

    Example:
        >>> parse("(heads dim) width")
        (('heads', 'dim'), ('width',))
    """
    return tuple(tuple(group.strip("()").split()) for group in re.findall(r"\([^)]*\)|\S+", text))


class Sizes(NamedTuple):
    """What a shape says of axes.

    Attributes:
        known: Their sizes, with those that were known before.
        fault: What does not fit, as a phrase that follows the tensor's name; None if all fits.
    """

    known: Mapping[str, int]
    fault: str | None = None


def solve(axes: Axes, shape: tuple[int, ...], known: Mapping[str, int]) -> Sizes:
    """The sizes of a tensor's axes.

    Args:
        axes: What its axes consist of.
        shape: Its shape.
        known: Sizes that are known already.

    Example:
        >>> solve(parse("(heads dim) width"), (8, 3), {"heads": 2}).known["dim"]
        4
        >>> solve(parse("(heads dim) width"), (9, 3), {"heads": 2}).fault
        'is [9, 3], of which axis 0, 9, is not divided by 2 (heads)'
    """
    said = f"is {list(shape)}"
    if len(shape) != len(axes):
        return Sizes(known, f"{said}, but is to have {len(axes)} axes")
    sizes = dict(known)
    for at, (group, size) in enumerate(zip(axes, shape, strict=True)):
        unknown = [name for name in group if name not in sizes]
        there = [name for name in group if name in sizes]
        rest = prod(sizes[name] for name in there)
        told = " x ".join(f"{sizes[name]} ({name})" for name in there)
        if len(unknown) > 1:
            return Sizes(known, f"{said}, of which it is not known how axis {at} divides into {' and '.join(unknown)}")
        if unknown and (not rest or size % rest):
            return Sizes(known, f"{said}, of which axis {at}, {size}, is not divided by {told}")
        if unknown:
            sizes[unknown[0]] = size // rest
        elif size != rest:
            return Sizes(known, f"{said}, of which axis {at}, {size}, is to be {told}")
    return Sizes(sizes)


def strides(axes: Axes, sizes: Mapping[str, int]) -> dict[str, int]:
    """How many entries of a tensor it is along each axis from one to the next.

    Example:
        >>> strides(parse("(heads dim) width"), {"heads": 2, "dim": 4, "width": 3})
        {'width': 1, 'dim': 3, 'heads': 12}
    """
    found, step = {}, 1
    for name in reversed([name for group in axes for name in group]):
        found[name] = step
        step *= sizes[name]
    return found


def shape_of(axes: Axes, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of a tensor whose axes have these sizes."""
    return tuple(prod(sizes[name] for name in group) for group in axes)
