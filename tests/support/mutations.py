"""Mutations of good files: of their bytes, or of what they say as JSON; some microseconds each."""

import json
import random
import re
from functools import lru_cache
from typing import Any, NamedTuple

_ODD: tuple[Any, ...] = (
    *(None, True, 0, -1, 1, 2**31, 2**63, 2**64, 10**400, 0.5, -0.0, 1e308, float("inf"), float("nan")),
    *("", "0", "0x1p99999", "\ud800", "\x1b[2J", "../x", "/proc/self/environ", "a" * 5000, "a\0b", "(a+)+$", "1e999"),
    *([], {}, [None], {"": None}, [[]], ["a", "b"], {"a": 1}, [[[[[]]]]], {"model": "x"}),
)
_VALUES = [json.dumps(odd).encode() for odd in _ODD]
_KEYS = [json.dumps(key).encode() for key in ("", "a", "\x1b", "\ud800", "a" * 300, "../x")]
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
_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|[\[\]{}:,]|[^\s\[\]{}:,"]+')
_MOST_PREPARED = 512


class _Member(NamedTuple):
    """Where a value of an object or of a list stands in JSON.

    Attributes:
        begin: Of it, with its key.
        value: Where the value itself begins.
        end: Of both.
        following: Where the next member begins, or `end` of the last one.
        before: Where the member before it ends, or `begin` of the first one.
        in_object: Whether it has a key.
    """

    begin: int
    value: int
    end: int
    following: int
    before: int
    in_object: bool


@lru_cache(_MOST_PREPARED)
def _members(good: bytes) -> tuple[_Member, ...]:
    """All values inside a text, in the order in which they begin; none if it is no JSON."""
    found: list[_Member] = []
    try:
        json.loads(good)
        _scan([(token.start(), token.end(), token[0]) for token in _TOKEN.finditer(good)], 0, found)
    except (ValueError, RecursionError):
        return ()
    return tuple(sorted(found))


def _scan(tokens: list[tuple[int, int, bytes]], at: int, found: list[_Member]) -> int:
    """Adds the members of the value at a token, and those inside them; returns the token after it."""
    kind = tokens[at][2]
    at += 1
    if kind not in (b"{", b"["):
        return at
    members: list[tuple[int, int, int]] = []
    while tokens[at][2] not in (b"}", b"]"):
        at += tokens[at][2] == b","
        begin = tokens[at][0]
        at += 2 * (kind == b"{")  # its key
        value = tokens[at][0]
        at = _scan(tokens, at, found)
        members.append((begin, value, tokens[at - 1][1]))
    for number, (begin, value, end) in enumerate(members):
        following = members[number + 1][0] if number + 1 < len(members) else end
        before = members[number - 1][2] if number else begin
        found.append(_Member(begin, value, end, following, before, kind == b"{"))
    return at + 1


def mutated_json(source: random.Random, good: bytes) -> bytes:
    """JSON with some values replaced, some keys gone, some keys added; as it is where it holds no value."""
    members, draw = _members(good), source.random
    count = len(members)
    chosen = sorted({int(draw() * count) for _ in range(1 + int(draw() * 3))}, reverse=True) if members else ()
    first = len(good)
    for number in chosen:
        begin, value, end, following, before, in_object = members[number]
        if max(end, following) > first:
            continue  # what is around the one before
        odd = _VALUES[int(draw() * len(_VALUES))]
        match int(draw() * 6):
            case 0 if following > end:
                good = good[:begin] + good[following:]
            case 0:
                good = good[:before] + good[end:] if before < begin else good[:begin] + good[end:]
            case 1 if in_object:
                good = good[:begin] + _KEYS[int(draw() * len(_KEYS))] + b":" + odd + b"," + good[begin:]
            case _:
                good = good[:value] + odd + good[end:]
        first = before
    return good


def mutated_bytes(source: random.Random, good: bytes) -> bytes:
    """Bytes with bits turned, pieces put in, left out, repeated or moved."""
    blob, draw = bytearray(good), source.random
    for _ in range((1, 1, 2, 4, 16)[int(draw() * 5)]):
        size = len(blob) + 1
        at, to = int(draw() * size), int(draw() * size)
        if to < at:
            at, to = to, at
        match int(draw() * 6):
            case 0 if blob:
                blob[min(at, len(blob) - 1)] ^= 1 << int(draw() * 8)
            case 1:
                blob[at:at] = _PIECES[int(draw() * len(_PIECES))]
            case 2:
                del blob[at : min(to, at + 20)]
            case 3:
                blob[at:at] = blob[at : min(to, at + 40)] * (1, 2, 50)[int(draw() * 3)]
            case 4:
                del blob[at:]
            case _:
                blob[at : at + 1] = bytes((int(draw() * 256),))
    return bytes(blob)


def mutated(source: random.Random, good: bytes, is_json: bool) -> bytes:
    """A mutation of a file.

    Args:
        source: Of what is drawn.
        good: The file, or a mutation of it.
        is_json: Whether values of it may be replaced.
    """
    if is_json and source.random() < _AS_JSON and _members(good):
        return mutated_json(source, good)
    return mutated_bytes(source, good)
