"""Leaves that stack blocks along an axis: which axis, and which blocks."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from m3jax.anatomy.canonical import split_collection
from m3jax.errors import M3Error

Shape = tuple[int, ...]


class StackPlace(NamedTuple):
    """Where a leaf stands whose name holds a list of blocks but no block's number.

    Attributes:
        tower: The path of the list as an unstacked tree has it: `decoder.layers`.
        segment: As in `blocks.Spot`.
        stored: The path of the list as it is stored.
        turn: Which block of a cycle of unlike blocks the leaf is of; 0 where all blocks are alike.
        cyclic: Whether the list repeats a cycle of unlike blocks.
        rest: What follows in the leaf's name.
        plain: Whether a module of that name could as well be no list.
    """

    tower: str
    segment: str
    stored: str
    turn: int
    cyclic: bool
    rest: str
    plain: bool


class Stack(NamedTuple):
    """A leaf that stacks blocks.

    Attributes:
        place: Where it stands.
        axis: The axis along which it stacks them.
        length: How many it stacks.
        cycle: How many unlike blocks a cycle has; 1 where all are alike. Entry k is block `cycle · k + turn`.
    """

    place: StackPlace
    axis: int
    length: int
    cycle: int

    def local(self, index: int) -> int:
        """The number within its segment of the block at `index` along the axis."""
        return self.cycle * index + self.place.turn


class Evidence(NamedTuple):
    """What is known beside shapes.

    Attributes:
        axis: The axis that metadata says; None if it says none.
        scanned: Whether metadata says that blocks are stacked; None if it does not say.
        depth: The depth that config.json or metadata says of the one tower; None if it does not say or there are more.
        numbered: How many blocks of a tower are stored one by one beside stacked leaves, by the tower's path.
    """

    axis: int | None = None
    scanned: bool | None = None
    depth: int | None = None
    numbered: Mapping[str, int] = MappingProxyType({})


_LISTS = (
    r"layers|blocks|encoderblock|decoderblock|stacked_layers|scanned_blocks|dense_layers|moe_layers|encoder_layers|"
    r"decoder_layers|transformer_layers|transformer_blocks"
)
_MODULES = r"layer|block|h"
_CYCLE = re.compile(
    r"^(?:(.+)\.)?(?:(layers|scanned_blocks)\.layers\.|(stacked_layers)\.attention_type_)(\d{1,9})\.(.+)$"
)
_LIST = re.compile(rf"^(?:(.+?)\.)?({_LISTS}|{_MODULES})\.(?!\d+(?:\.|$))(.+)$")
_RENAMED = {"stacked_layers": "layers", "scanned_blocks": "layers"}
_SEGMENTS = {"dense_layers": "0", "moe_layers": "1"}


def place_of(name: str) -> StackPlace | None:
    """Where a leaf stands among stacked blocks by its canonical name; None if no list of blocks is in it.

    Example:
        >>> place_of("decoder.layers.mlp.wi_0.kernel").tower
        'decoder.layers'
        >>> place_of("decoder.layers.3.mlp.wi_0.kernel") is None
        True
    """
    match = _CYCLE.match(name)
    if match is not None:
        parent, cycled, gemma, turn, rest = match.groups()
        root = f"{parent}." if parent else ""
        return StackPlace(f"{root}layers", "", f"{root}{cycled or gemma}", int(turn), True, rest, cycled == "layers")
    match = _LIST.match(name)
    if match is None or re.search(r"\.\d+$", match.group(1) or ""):
        return None
    parent, container, rest = match.groups()
    if parent is not None and re.search(rf"(?:^|\.)(?:{_LISTS}|{_MODULES})\.\d+(?:\.|$)", parent):
        return None  # a list inside a numbered block is a part of that block
    root = f"{parent}." if parent else ""
    tower = f"{root}{'layers' if container in _SEGMENTS else _RENAMED.get(container, container)}"
    plain = re.fullmatch(_MODULES, container) is not None
    return StackPlace(tower, _SEGMENTS.get(container, ""), f"{root}{container}", 0, False, rest, plain)


class Stacks(NamedTuple):
    """Stacked leaves by canonical name, and what cannot be told of others."""

    stacks: Mapping[str, Stack]
    doubts: Mapping[str, str]


def find_stacks(
    leading: Mapping[str, Shape], following: Mapping[str, Shape], evidence: Evidence, fixed: Mapping[str, int]
) -> Stacks:
    """Finds the leaves that stack blocks, and along which axis.

    All parameters of one list of blocks stack as many blocks along one axis, so that an axis is told by its size being
    the same in all of them, and the right one where the depth is known. Two such axes, or none, are a doubt.

    Args:
        leading: Shapes of parameters by canonical name: the evidence.
        following: Shapes of other leaves of the model, such as running statistics, that stack like the parameters.
        evidence: What metadata and config say.
        fixed: Axes that the recipe gives, by canonical name; -1 says that a leaf stacks nothing.
    """
    places = {name: place_of(split_collection(name)[1]) for name in (*leading, *following)}
    lists: dict[str, list[str]] = defaultdict(list)
    for name in leading:
        place = places[name]
        if place is not None and name not in fixed:
            lists[place.stored].append(name)
    cycles = _cycles(places)
    stacks: dict[str, Stack] = {}
    doubts: dict[str, str] = {}
    settled: dict[str, tuple[int, int]] = {}
    for stored, names in lists.items():
        first = places[names[0]]
        assert first is not None
        known = evidence._replace(depth=evidence.depth or evidence.numbered.get(first.tower))
        found = _axis({name: leading[name] for name in names}, first, cycles.get(stored, 1), known)
        if isinstance(found, str):
            doubts |= dict.fromkeys(names, found)
        elif found is not None:
            settled[stored] = found
    for name, shape in {**leading, **following}.items():
        place = places[name]
        axis = fixed.get(name)
        if axis == -1:
            continue
        if axis is not None:
            place = place or _beside(name)
            stacks[name] = Stack(place, axis, shape[axis], cycles.get(place.stored, 1))
        elif place is not None and place.stored in settled:
            axis, count = settled[place.stored]
            own = next((a for a in (axis, 0) if len(shape) > a and shape[a] == count), None)
            if own is None:
                doubts[name] = _doubt(place.stored, f"{name} has no axis of {count} blocks")
            else:
                stacks[name] = Stack(place, own, count, cycles.get(place.stored, 1))
    _check_fixed({name: stack for name, stack in stacks.items() if name in fixed})
    return Stacks(stacks, doubts)


def _check_fixed(stacks: Mapping[str, Stack]) -> None:
    """Refuses axes of a recipe along which leaves of one list stack different numbers of blocks."""
    first: dict[str, tuple[str, int]] = {}
    for name, stack in stacks.items():
        other, length = first.setdefault(stack.place.stored, (name, stack.length))
        if length != stack.length:
            raise M3Error(
                f"anatomy: stacked: {other} stacks {length} blocks but {name} {stack.length}: correct the axis of one."
            )


def _beside(name: str) -> StackPlace:
    """Where a leaf stands that only the recipe says to be stacked: its parent is the list."""
    parent, _, leaf = name.rpartition(".")
    return StackPlace(parent or name, "", parent or name, 0, False, leaf, False)


def _cycles(places: Mapping[str, StackPlace | None]) -> Mapping[str, int]:
    """How many unlike blocks the cycle of each list has."""
    lengths: dict[str, int] = {}
    for place in places.values():
        if place is not None and place.cyclic:
            lengths[place.stored] = max(lengths.get(place.stored, 0), place.turn + 1)
    return lengths


def _axis(
    shapes: Mapping[str, Shape], place: StackPlace, cycle: int, evidence: Evidence
) -> tuple[int, int] | str | None:
    """The axis and the number of blocks; a sentence where they cannot be told; None where nothing is stacked."""
    sizes = {axis: _shared_size(shapes.values(), axis) for axis in (0, 1)}
    possible = {axis: size for axis, size in sizes.items() if size is not None}
    if evidence.axis is not None and evidence.axis not in (0, 1):
        size = _shared_size(shapes.values(), evidence.axis)
        possible = {} if size is None else {evidence.axis: size}
    if evidence.scanned is False:
        return None
    told = evidence.scanned or (not place.plain and place.cyclic)
    if evidence.axis is not None:
        possible = {axis: size for axis, size in possible.items() if axis == evidence.axis}
        size, depth = possible.get(evidence.axis), evidence.depth
        if size and depth and place.tower not in evidence.numbered and not _fits(size, place, cycle, depth):
            said = f"metadata says that {place.stored} stacks blocks along axis {evidence.axis}, which has {size}"
            return _doubt(place.stored, f"{said}, and that there are {depth} blocks")
    elif evidence.depth is not None:
        fitting = {axis: size for axis, size in possible.items() if _fits(size, place, cycle, evidence.depth)}
        if place.plain and not fitting:
            return None
        possible = fitting
    elif not told and not _looks_stacked(list(shapes.values())):
        if place.plain:
            return None
        return _doubt(place.stored, f"the shapes below {place.stored} do not tell whether they stack blocks")
    elif place.plain and not place.cyclic:
        return None  # `layer`, `block`, `h` are names of single modules too: only a known depth makes them a stack
    if len(possible) == 1:
        return next(iter(possible.items()))
    if not possible:
        if place.cyclic and place.plain:
            return None
        known = "" if evidence.depth is None else f" of {evidence.depth} blocks"
        return _doubt(place.stored, f"no axis{known} is common to all tensors below {place.stored}")
    counts = " or ".join(f"{size} along axis {axis}" for axis, size in possible.items())
    return _doubt(place.stored, f"{place.stored} stacks {counts} blocks")


def _shared_size(shapes: Iterable[Shape], axis: int) -> int | None:
    sizes = {shape[axis] if len(shape) > axis else None for shape in shapes}
    return sizes.pop() if len(sizes) == 1 else None


def _looks_stacked(shapes: Sequence[Shape]) -> bool:
    """Whether even the smallest leaf has an axis more than a vector, and the largest one more than a matrix."""
    return min(map(len, shapes)) >= 2 and max(map(len, shapes)) >= 3


def _fits(size: int, place: StackPlace, cycle: int, depth: int) -> bool:
    if place.cyclic:
        return 0 <= depth - size * cycle < cycle
    return size == depth or (bool(place.segment) and size < depth)


def _doubt(stored: str, what: str) -> str:
    pattern = re.escape(stored).replace("\\", "")
    return (
        f"{what}: say along which axis blocks are stacked by `anatomy: {{stacked: {{'{pattern}': AXIS}}}}` (-1: none)"
    )
