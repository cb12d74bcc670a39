"""One model stored in two ways: block by block, and stacked along an axis."""

from collections.abc import Mapping

from m3jax.anatomy.types import Part
from m3jax.checkpoints.views_stacked import BlockPlace, Stacking
from m3jax.errors import M3Error

Shape = tuple[int, ...]


def block_places(parts: Mapping[str, Part]) -> dict[str, BlockPlace]:
    """Where each tensor is, by canonical name; one that stacks blocks is there once for each.

    Args:
        parts: What the tensors of a model are, by stored name.
    """
    found: dict[str, BlockPlace] = {}
    for name, part in parts.items():
        if part.stack_axis is None:
            found[part.canonical] = BlockPlace(name)
        for index, own in enumerate(part.block_names):
            found[own] = BlockPlace(name, part.stack_axis, index)
    return found


def find_layout(
    wanted: tuple[Mapping[str, Part], Mapping[str, Shape]], own: tuple[Mapping[str, Part], Mapping[str, Shape]]
) -> dict[str, Stacking]:
    """The tensors of one model that another has too, but with its blocks stacked otherwise.

    Args:
        wanted: Parts and shapes of the model whose layout is wanted.
        own: Those of the model that is to be seen in it.

    Returns:
        By the wanted name, what it is made of; nothing where no block is stacked otherwise. A tensor that the other
        model has only in part is left out.

    Raises:
        M3Error: One of the models stacks along an axis that cannot be told.
    """
    places, shapes = block_places(own[0]), own[1]
    found = {}
    for name, part in wanted[0].items():
        # Of as many blocks as entries the shape is the same along either axis.
        if shapes.get(name) == wanted[1][name] and own[0][name].stack_axis in (part.stack_axis, None):
            _check_told(name, part, own[0][name])
            continue
        names = (part.canonical,) if part.stack_axis is None else part.block_names
        blocks = tuple(places[block] for block in names if block in places)
        if len(blocks) != len(names):
            continue
        block_shape = _without(wanted[1][name], part.stack_axis)
        if all(_without(shapes[block.stored], block.axis) == block_shape for block in blocks):
            found[name] = Stacking(blocks, part.stack_axis)
    otherwise = any(s.axis is not None or any(block.axis is not None for block in s.blocks) for s in found.values())
    # A model with more blocks is another one: none may get lost, or stand beside those that are stacked.
    known = block_places(wanted[0]).keys()
    inside = (name for name, block in places.items() if own[0][block.stored].groups and _counts(own[0][block.stored]))
    return found if otherwise and known >= set(inside) else {}


def _counts(part: Part) -> bool:
    return part.kind in ("parameter", "statistics")


def _check_told(name: str, part: Part, own: Part) -> None:
    """Raise M3Error where one model says along which axis it stacks, and the other may stack along another."""
    doubt = own.doubt if part.stack_axis is not None and own.stack_axis is None else None
    doubt = part.doubt if own.stack_axis is not None and part.stack_axis is None else doubt
    if doubt is not None:
        raise M3Error(f"{name}: is stacked as only one of two models says: {doubt}")


def _without(shape: Shape, axis: int | None) -> Shape:
    return shape if axis is None else (*shape[:axis], *shape[axis + 1 :])
