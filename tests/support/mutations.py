"""Mutations of good files: of their bytes, or of what they say as JSON."""

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

_ODD: tuple[Any, ...] = (
    *(None, True, 0, -1, 1, 2**31, 2**63, 2**64, 10**400, 0.5, -0.0, 1e308, float("inf"), float("nan")),
    *("", "0", "0x1p99999", "\ud800", "\x1b[2J", "../x", "/proc/self/environ", "a" * 5000, "a\0b", "(a+)+$", "1e999"),
    *([], {}, [None], {"": None}, [[]], ["a", "b"], {"a": 1}, [[[[[]]]]], {"model": "x"}),
)
_AS_JSON = 0.7  # of mutations
_PIECES = (
    b"\0",
    b"\xff",
    b"{",
    b"}",
    b"[",
    b"]",
    b'"',
    b":",
    b"*a",
    b"&a ",
    b"<<: ",
    b"!!bool ",
    b"9" * 500,
    b"\n",
    b"- ",
)


def mutated_json(source: random.Random, good: bytes) -> bytes:
    """JSON with some values replaced, some keys gone, some keys added."""
    told = json.loads(good)
    for _ in range(source.randint(1, 3)):
        holders = list(_holders(told))
        if not holders:
            break
        holder = source.choice(holders)
        keys: list[Any] = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        key, odd = source.choice(keys), copy.deepcopy(source.choice(_ODD))
        match source.randint(0, 5):
            case 0:
                del holder[key]
            case 1 if isinstance(holder, dict):
                holder[source.choice(["", "a", "\x1b", "\ud800", "a" * 300, "../x"])] = odd
            case _:
                holder[key] = odd
    return json.dumps(told).encode()


def _holders(told: Any) -> Iterator[Any]:
    if isinstance(told, dict | list) and told:
        yield told
        for inner in told.values() if isinstance(told, dict) else told:
            yield from _holders(inner)


def mutated_bytes(source: random.Random, good: bytes) -> bytes:
    """Bytes with bits turned, pieces put in, left out, repeated or moved."""
    blob = bytearray(good)
    for _ in range(source.choice([1, 1, 2, 4, 16])):
        at, to = sorted(source.randrange(len(blob) + 1) for _ in range(2))
        match source.randint(0, 5):
            case 0 if blob:
                blob[min(at, len(blob) - 1)] ^= 1 << source.randrange(8)
            case 1:
                blob[at:at] = source.choice(_PIECES)
            case 2:
                del blob[at : min(to, at + 20)]
            case 3:
                blob[at:at] = blob[at : min(to, at + 40)] * source.choice([1, 2, 50])
            case 4:
                del blob[at:]
            case _:
                blob[at : at + 1] = bytes([source.randrange(256)])
    return bytes(blob)


def mutated(source: random.Random, good: bytes, is_json: bool) -> bytes:
    """A mutation of a file.

    Args:
        source: Of what is drawn.
        good: The file, or a mutation of it.
        is_json: Whether values of it may be replaced.
    """
    if is_json and source.random() < _AS_JSON:
        try:
            return mutated_json(source, good)
        except (ValueError, RecursionError):  # it has become something else
            pass
    return mutated_bytes(source, good)
