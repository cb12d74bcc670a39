"""Blocks whose number is written in the names of their tensors."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from m3jax.anatomy.canonical import split_collection
from m3jax.anatomy.families import SUBLAYERS, Family
from m3jax.documents import Pattern


class Spot(NamedTuple):
    """Where a name says that a tensor stands.

    Attributes:
        tower: The path of the list of blocks, which all blocks of a tower share: `model.layers`.
        segment: Which part of the tower: the stage in a model of stages, "dense_layers" before "moe_layers"; "" else.
        number: The block's number within its segment.
        group: The name up to the block's number: `model.layers.3`.
    """

    tower: str
    segment: str
    number: int
    group: str


class Numbered(NamedTuple):
    """Blocks found in names.

    Attributes:
        spots: Where each tensor that is in a block stands.
        between: Of a tensor that is in a stage but in none of its blocks: the tower and the stage.
    """

    spots: Mapping[str, Spot]
    between: Mapping[str, tuple[str, str]]


_LISTS = (
    r"layers|layer|h|blocks|block|encoderblock|decoderblock|encoder_layers|decoder_layers|transformer_layers|"
    r"transformer_blocks|resblocks|albert_layer_groups|dense_layers|moe_layers|gated_cross_attn_layers|self_attends|conformer"
)
_BLOCK = re.compile(rf"(?:^|\.)({_LISTS})\.(\d{{1,9}})(?=\.|$)")
_CAMEL = re.compile(r"(?:^|\.)([A-Z]\w*(?:Block|Layer))_(\d{1,9})(?=\.|$)")
# A stage is a list of blocks of its own; `block.0.layer.1` is not one: T5's blocks have numbered sublayers.
_STAGED = re.compile(
    r"(?:^|\.)(?:(?:stages|levels)\.(\d{1,9})\.(?:layers|blocks|layer|block)|layers\.(\d{1,9})\.blocks|blocks?\.(\d{1,9}))"
    r"\.(\d{1,9})(?=\.|$)"
)
_STAGE = re.compile(r"(?:^|\.)(?:stages|levels|layers|blocks?)\.(\d{1,9})(?=\.)")
# Lists of layers of these are a projection's or a head's, not a tower.
_NO_TOWER = re.compile(
    r"(?:^|\.)(?:\w*projector\w*|\w*projection|aligner|merger|classifier|\w*_head|bbox_embed|class_embed|mlp\d?)\."
    r"(?:[^.]+\.)*(?:layers|layer|blocks|block)\.\d+"
)
_SEGMENTS = {"dense_layers": "0", "moe_layers": "1"}  # MaxText writes a mixture's dense blocks as a list of their own


def find_blocks(names: Iterable[str], family: Family, override: Pattern | None = None) -> Numbered:
    """Finds the block of every tensor whose name has a block's number.

    Args:
        names: Canonical names.
        family: What is known of the architecture.
        override: What a recipe says: a pattern whose group 1 is the block's number.
    """
    names = list(names)
    if override is not None:
        found = {name: _by_pattern(name, override) for name in names}
        return Numbered({name: spot for name, spot in found.items() if spot is not None}, {})
    lists = family.parallel or _parallel_lists(names)
    spots: dict[str, Spot] = {}
    for name in names:
        path = split_collection(name)[1]
        spot = _staged(path) or _parallel(path, lists) or _plain(path)
        if spot is not None:
            spots[name] = spot
    towers = {spot.tower for spot in spots.values() if spot.segment and spot.tower not in _lists_of(spots)}
    between = _between(names, spots, towers)
    return Numbered({name: spot for name, spot in spots.items() if name not in between}, between)


def _lists_of(spots: Mapping[str, Spot]) -> set[str]:
    return {spot.tower for spot in spots.values() if spot.group.rpartition(".")[0].endswith(tuple(_SEGMENTS))}


def _by_pattern(name: str, pattern: Pattern) -> Spot | None:
    match = pattern.search(name)
    if match is None or match.group(1) is None:
        return None
    return Spot(name[: match.start(1)].rstrip("._/"), "", int(match.group(1)), name[: match.end(1)])


def _staged(name: str) -> Spot | None:
    match = _STAGED.search(name)
    if match is None:
        return None
    stage = next(group for group in match.groups()[:3] if group is not None)
    start = match.start() + (name[match.start()] == ".")
    stem = name[start:].partition(".")[0]
    return Spot(f"{name[:start]}{stem}", stage, int(match.group(4)), name[: match.end()])


def _parallel_lists(names: Iterable[str]) -> tuple[str, ...]:
    """The lists of sublayers of XLM and Flaubert, where names alone tell them."""
    there = {component for name in names for component in name.split(".")}
    return SUBLAYERS if {"attentions", "ffns"} <= there else ()


def _parallel(name: str, lists: tuple[str, ...]) -> Spot | None:
    """A block of a model that keeps a list for each kind of sublayer, as XLM does."""
    if not lists:
        return None
    match = re.search(rf"(?:^|\.)(?:{'|'.join(lists)})\.(\d{{1,9}})(?=\.|$)", name)
    if match is None:
        return None
    start = match.start() + (name[match.start()] == ".")
    tower = f"{name[:start]}{lists[0]}"
    return Spot(tower, "", int(match.group(1)), f"{tower}.{match.group(1)}")


def _plain(name: str) -> Spot | None:
    if _NO_TOWER.search(name):
        return None
    match = _BLOCK.search(name) or _CAMEL.search(name)
    if match is None:
        return None
    stem, number, group = match.group(1), int(match.group(2)), name[: match.end()]
    tower = group[: -len(match.group(2)) - 1]
    segment = _SEGMENTS.get(stem, "")
    if segment:
        tower = f"{tower[: -len(stem)]}layers"
    if tower.endswith("layers_remainder.layers"):
        tower, segment = tower.removesuffix("_remainder.layers"), "9"
    return Spot(tower, segment, number, group)


def _between(names: Iterable[str], spots: Mapping[str, Spot], towers: set[str]) -> dict[str, tuple[str, str]]:
    found = {}
    for name in names:
        spot = spots.get(name)
        if spot is not None and spot.segment:
            continue
        match = _STAGE.search(name)
        if match is not None and name[: match.start(1) - 1] in towers:
            found[name] = (name[: match.start(1) - 1], match.group(1))
    return found


def segment_offsets(spots: Iterable[Spot]) -> Mapping[tuple[str, str], int]:
    """The number of a segment's first block within its tower, by tower and segment."""
    lengths: dict[str, dict[str, int]] = defaultdict(dict)
    for spot in spots:
        segments = lengths[spot.tower]
        segments[spot.segment] = max(segments.get(spot.segment, 0), spot.number + 1)
    offsets = {}
    for tower, segments in lengths.items():
        start = 0
        for segment in sorted(segments, key=lambda text: (len(text), text)):
            offsets[tower, segment] = start
            start += segments[segment]
    return offsets
