"""Checks of plain options, each with its one sentence."""

import difflib
import numbers
from collections.abc import Collection
from typing import Any

from m3jax.errors import M3Error


def check_choice(name: str, value: object, known: Collection[str]) -> None:
    """Raise M3Error unless a value is one of those that are known.

    Args:
        name: What the option is called.
        value: What was given.
        known: What may be given.
    """
    if value not in tuple(known):
        raise M3Error(f"{name} is {value!r}, but must be one of {', '.join(known)}")


def check_whole(name: str, value: object) -> None:
    """Raise M3Error unless a value is a whole number.

    Args:
        name: What the option is called.
        value: What was given.
    """
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise M3Error(f"{name} is {value!r}, but must be a whole number")


def check_count(name: str, count: Any, optional: bool = False) -> None:
    """Raise M3Error unless a number of things is whole and at least 1.

    Args:
        name: What is counted: an option as it is typed, such as "--limit", or words such as "batch size".
        count: What was given.
        optional: Whether None will do as well.

    Example:
        >>> check_count("batch size", 8)
    """
    if optional and count is None:
        return
    typed = name.startswith("--")
    check_whole(name if typed else f"the {name}", count)
    if count < 1:
        said = f"{name} is {count}, but must be at least 1" if typed else f"the {name} must be at least 1, not {count}"
        raise M3Error(said)


def check_type(name: str, value: object, kind: type, optional: bool = False) -> None:
    """Raise M3Error unless a value is of a type.

    Args:
        name: What the option is called.
        value: What was given.
        kind: The type.
        optional: Whether None will do as well.
    """
    if not (isinstance(value, kind) or (optional and value is None)):
        raise M3Error(f"{name} is {value!r}, but must be of type {kind.__name__}")


def check_name(what: str, name: object, known: Collection[str]) -> None:
    """Raise M3Error unless there is something of this name; the sentence says which name is near.

    Args:
        what: What has names, such as "task".
        name: What was given.
        known: The names that there are.
    """
    if name not in tuple(known):
        raise M3Error(f"no {what} is called {name!r}{did_you_mean(name, known)}; there are: {', '.join(known)}")


def did_you_mean(name: object, known: Collection[str]) -> str:
    """The known name that is near to one, in brackets; nothing where none is.

    Example:
        >>> did_you_mean("gsm9k", ["gsm8k", "math"]), did_you_mean("x", ["gsm8k"])
        (' (did you mean gsm8k?)', '')
    """
    near = difflib.get_close_matches(name, known, 1) if isinstance(name, str) else []
    return f" (did you mean {near[0]}?)" if near else ""
