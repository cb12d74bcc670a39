"""Towers: which stacks of blocks there are, what each is called, and which tensors outside blocks are of it."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

_ROLES: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("cross", re.compile(r"cross_attn_layers")),
    ("mtp", re.compile(r"(?:^|[._])(?:mtp|nextn)(?:[._]|$)")),
    ("resampler", re.compile(r"resampler|perceiver|abstractor")),
    ("qformer", re.compile(r"q_?former", re.IGNORECASE)),
    ("text", re.compile(r"(?:^|\.)(?:text|language|llm|txt)(?:[._]|$)")),
    ("vision", re.compile(r"(?:^|\.)(?:vision|visual|image|img|vit|vpm)(?:[._]|$)|vision_", re.IGNORECASE)),
    ("audio", re.compile(r"(?:^|\.)(?:audio|speech|sound|apm)(?:[._]|$)", re.IGNORECASE)),
)
_SIDE = re.compile(r"(?:^|[._])(encoder|decoder)(?:[._]|$)", re.IGNORECASE)
_GUESTS = frozenset({"cross", "mtp"})  # they have no embedding or final norm of their own
_PROJECTION = re.compile(r"projector|projection|connector|aligner|merger|adapter|bridge")


def name_towers(paths: Iterable[str]) -> Mapping[str, str]:
    """What each tower is called, by the path of its list of blocks.

    Example:
        >>> name_towers(["model.layers"])
        {'model.layers': 'model'}
        >>> name_towers(["language_model.model.layers", "vision_tower.encoder.layers"]).values()
        dict_values(['text', 'vision'])
    """
    paths = list(paths)
    if len(paths) == 1:
        return {paths[0]: "model"}
    roles = {path: _role(path) for path in paths}
    unknown = [path for path in paths if roles[path] is None]
    if len(unknown) == 1 and "text" not in roles.values():
        roles[unknown[0]] = "text"  # beside eyes and ears, what has no name is the language model
    names = {}
    for path, role in roles.items():
        same = [other for other in paths if roles[other] == role]
        own = role if role is not None and len(same) == 1 else _side(path, same) or _own_component(path, same)
        names[path] = own if role in {None, "text", own} else f"{role} {own}"
    counts = list(names.values())
    return {path: name if counts.count(name) == 1 else path for path, name in names.items()}


def _side(path: str, others: Sequence[str]) -> str | None:
    """ "encoder" or "decoder", where a path says so and no other does."""
    side = _SIDE.findall(path)[-1:]
    return side[0].lower() if side and sum(_SIDE.findall(other)[-1:] == side for other in others) == 1 else None


def _own_component(path: str, others: Sequence[str]) -> str:
    """The first component of a path in which it differs from the others; the whole path where there is none."""
    split = [other.split(".") for other in others if other != path]
    components = enumerate(path.split("."))
    return next((own for i, own in components if all(other[i : i + 1] != [own] for other in split)), path)


def _role(path: str) -> str | None:
    return next((role for role, pattern in _ROLES if pattern.search(path)), None)


class Placing(NamedTuple):
    """Where towers stand.

    Attributes:
        names: The name of each tower by the path of its blocks.
        language: The tower that reads tokens and the one that writes them; None where there is none.
    """

    names: Mapping[str, str]
    language: tuple[str | None, str | None]


def place_towers(names: Mapping[str, str]) -> Placing:
    """Adds to the towers' names which of them language goes in at, and which it comes out of."""
    there = set(names.values())
    first = next((name for name in ("model", "encoder", "text", "decoder") if name in there), None)
    last = next((name for name in ("model", "decoder", "text", "encoder") if name in there), None)
    return Placing(names, (first, last))


def tower_of(name: str, placing: Placing) -> str | None:
    """The tower of a tensor that is in no block: the one whose path shares most with it; None if several share alike.

    Args:
        name: The tensor's canonical name.
        placing: The towers.
    """
    if len(placing.names) == 1:
        return next(iter(placing.names.values()))
    components = name.split(".")
    shared = {path: _common(components, path.split(".")) for path in placing.names}
    most = max(shared.values(), default=0)
    nearest = [path for path, length in shared.items() if length == most]
    if len(nearest) > 1:  # a norm beside `model.layers` is that list's, not that of `model.vision_model.layers`
        beside = [path for path in nearest if path.count(".") == most and placing.names[path] not in _GUESTS]
        nearest = beside or nearest
    if most and len(nearest) == 1 and not (components[:most] == ["model"] and _PROJECTION.search(name)):
        return placing.names[nearest[0]]
    role = None if _PROJECTION.search(name) else _role(name)
    return role if role in placing.names.values() else None


def _common(left: Sequence[str], right: Sequence[str]) -> int:
    length = 0
    for a, b in zip(left, right, strict=False):
        if a != b:
            break
        length += 1
    return length
