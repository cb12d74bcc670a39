"""Values between the two processes of a sandbox, as JSON lines that can hold built-in data and nothing else.

Neither side ever unpickles. Subclasses of built-in types arrive as the type itself, so no overridden method travels.
What is not plain data stays where it is and travels as a numbered reference.
"""

import collections
import datetime
import decimal
import fractions
import json
import socket
from collections.abc import Callable
from typing import Any

_EXACT_INTEGER = 1 << 53
_LONGEST_LINE = 32 << 20
_DEEPEST = 200
_VIEWS: tuple[Any, ...] = (type({}.keys()), type({}.items()))  # equal to sets
_NAMED_TYPES = {
    kind.__name__: kind
    for kind in (bool, int, float, complex, str, bytes, bytearray, list, tuple, set, frozenset, dict, type(None))
}


class MessageError(Exception):
    """A message that is not one, or a value too large or too deep to travel."""


def encode(value: Any, keep: Callable[[Any], int], depth: int = 0) -> Any:
    """A value as JSON data.

    Args:
        value: Anything.
        keep: Called with an object that is not plain data; stores it and returns its number.
        depth: How deep in the value we are.
    """
    if depth > _DEEPEST:
        raise MessageError(f"a value nested more than {_DEEPEST} deep")

    def inner(item: Any) -> Any:
        return encode(item, keep, depth + 1)

    if value is None or value is True or value is False:
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        number = int.__add__(value, 0)
        return number if -_EXACT_INTEGER < number < _EXACT_INTEGER else {"int": hex(number)}
    if isinstance(value, float):
        return {"float": float.hex(value)}
    if isinstance(value, list):
        return [inner(item) for item in list.__iter__(value)]
    if isinstance(value, tuple):
        return {"tuple": [inner(item) for item in tuple.__iter__(value)]}
    if isinstance(value, dict):
        name = next(
            (kind.__name__ for kind in (collections.Counter, collections.OrderedDict) if type(value) is kind), "dict"
        )
        return {name: [[inner(key), inner(item)] for key, item in dict.items(value)]}
    if isinstance(value, set | frozenset):
        return {"set" if isinstance(value, set) else "frozenset": [inner(item) for item in list(value)]}
    if isinstance(value, _VIEWS):
        return {"set": [inner(item) for item in value]}
    kind = type(value)
    if kind in (bytes, bytearray):
        return {kind.__name__: bytes(value).hex()}
    if kind is complex:
        return {"complex": [value.real.hex(), value.imag.hex()]}
    if kind is range:
        return {"range": [inner(value.start), inner(value.stop), inner(value.step)]}
    if kind is collections.deque:
        return {"deque": [inner(item) for item in value]}
    if kind in (decimal.Decimal, fractions.Fraction):
        return {kind.__name__: str(value)}
    if kind in (datetime.date, datetime.time) or (kind is datetime.datetime and value.tzinfo is None):
        return {kind.__name__: value.isoformat()}
    if kind is datetime.timedelta:
        return {"timedelta": [value.days, value.seconds, value.microseconds]}
    if kind is type and value in _NAMED_TYPES.values():
        return {"type": value.__name__}
    return {"reference": keep(value)}


def _pairs(decoded: Callable[[Any], Any], body: Any) -> list[tuple[Any, Any]]:
    return [(decoded(key), decoded(item)) for key, item in body]


_READERS: dict[str, Callable[[Callable[[Any], Any], Any], Any]] = {
    "int": lambda _, body: int(body, 16),
    "float": lambda _, body: float.fromhex(body),
    "tuple": lambda decoded, body: tuple(map(decoded, body)),
    "set": lambda decoded, body: set(map(decoded, body)),
    "frozenset": lambda decoded, body: frozenset(map(decoded, body)),
    "dict": lambda decoded, body: dict(_pairs(decoded, body)),
    "Counter": lambda decoded, body: collections.Counter(dict(_pairs(decoded, body))),
    "OrderedDict": lambda decoded, body: collections.OrderedDict(_pairs(decoded, body)),
    "deque": lambda decoded, body: collections.deque(map(decoded, body)),
    "bytes": lambda _, body: bytes.fromhex(body),
    "bytearray": lambda _, body: bytearray.fromhex(body),
    "complex": lambda _, body: complex(float.fromhex(body[0]), float.fromhex(body[1])),
    "range": lambda decoded, body: range(*map(decoded, body)),
    "Decimal": lambda _, body: decimal.Decimal(body),
    "Fraction": lambda _, body: fractions.Fraction(body),
    "date": lambda _, body: datetime.date.fromisoformat(body),
    "time": lambda _, body: datetime.time.fromisoformat(body),
    "datetime": lambda _, body: datetime.datetime.fromisoformat(body),
    "timedelta": lambda _, body: datetime.timedelta(*body),
    "type": lambda _, body: _NAMED_TYPES[body],
}


def decode(data: Any, find: Callable[[int], Any]) -> Any:
    """The value that `encode` wrote.

    Args:
        data: JSON data.
        find: Called with the number of a reference; returns what stands for it on this side.

    Raises:
        MessageError: The data was not written by `encode`.
    """
    if data is None or isinstance(data, bool | int | str):
        return data
    try:
        if isinstance(data, list):
            return [decode(item, find) for item in data]
        ((name, body),) = data.items()
        if name == "reference":
            return find(int(body))
        return _READERS[name](lambda item: decode(item, find), body)
    except (ArithmeticError, AttributeError, IndexError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise MessageError(f"not a value: {error}") from error


class Channel:
    """One side of the conversation: JSON objects, one to a line, over a socket."""

    def __init__(self, link: socket.socket) -> None:
        self._link = link
        self._reader = link.makefile("rb")

    def send(self, message: dict[str, Any]) -> None:
        """Send one message."""
        self._link.sendall(json.dumps(message).encode("ascii") + b"\n")

    def receive(self) -> dict[str, Any] | None:
        """The next message, or None when the other side has gone.

        Raises:
            MessageError: The line is no message.
        """
        line = self._reader.readline(_LONGEST_LINE)
        if not line:
            return None
        try:
            message = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise MessageError("not a message") from error
        if not isinstance(message, dict):
            raise MessageError("not a message")
        return message
