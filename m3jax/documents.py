"""What files of strangers say, read so that nothing in them stops, fills or stalls the reader: JSON and patterns."""

import functools
import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from m3jax.errors import M3Error

FAULTS = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)
"""What plain data raises where it is used, if it is not what it should be."""

DEEPEST = 100
"""Brackets inside brackets that a file may have; the deepest configurations have a dozen."""

LARGEST_FILE = 2**28
"""Bytes that a manifest, index, tokenizer or configuration may have; the largest have some tens of millions."""

MOST_DIGITS = 300
"""Of a whole number in a file; a float64 holds those of 308."""

_LONGEST_PATTERN = 10_000
_MOST_REPEATS = 100_000  # of all counts in a pattern, multiplied: what compiling it unrolls
_COUNT = re.compile(r"\{(\d*)(?:,(\d*))?\}")
_SEARCH_SECONDS = 1.0  # for one name, of which there are thousands: patterns that end take microseconds


def read_bounded(path: Path, largest: int) -> bytes:
    """The whole of a file, if it is no larger than files of its kind are.

    Args:
        path: The file; pipes too, so that a shell may make one.
        largest: Bytes.

    Raises:
        OSError: It cannot be read.
        ValueError: It is larger, or never ends; or its name is none.
    """
    with open(path, "rb") as file:
        content = file.read(largest + 1)
    if len(content) > largest:
        raise ValueError(f"it has more than {largest:,} bytes")
    return content


# --- JSON --------------------------------------------------------------------------------------------------------


class TooDeepError(ValueError):
    """Plain data is deeper than anything that is meant."""

    def __init__(self) -> None:
        super().__init__("brackets inside brackets without end")


def parse_json(raw: bytes | str, unique: bool = False, halves: bool = False) -> Any:
    """What JSON says.

    Args:
        raw: The JSON.
        unique: Whether a key that is written twice is a fault, as either value could be meant.
        halves: Whether half a surrogate pair, which is no text, may be in it.

    Raises:
        ValueError: It is no JSON, deeper than anything that is meant, or has a whole number that no float64 holds.

    Example:
        >>> parse_json('{"a": [1]}')
        {'a': [1]}
    """
    try:
        told = json.loads(raw, object_pairs_hook=_unique if unique else None, parse_int=_whole)
        check_depth(told)
        if not halves:
            json.dumps(told, ensure_ascii=False).encode()
    except RecursionError:
        raise TooDeepError from None
    except UnicodeEncodeError:
        raise ValueError("it holds half a character (a lone surrogate such as \\ud800)") from None
    return told


def _whole(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"it has a number of {len(digits):,} digits")
    return int(digits)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    parsed = dict(pairs)
    if len(parsed) < len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"it names {twice!r} twice")
    return parsed


def check_depth(told: Any) -> None:
    """Raise TooDeepError where plain data is deeper than anything that is meant."""
    level = [told]
    for _ in range(DEEPEST + 1):
        holders = [each for each in level if isinstance(each, dict | list)]
        if not holders:
            return
        level = [inner for each in holders for inner in (each.values() if isinstance(each, dict) else each)]
    raise TooDeepError


# --- Regular expressions -----------------------------------------------------------------------------------------


class Pattern:
    """A regular expression that is given up where it takes too long; patterns that backtrack without end do."""

    def __init__(self, text: str) -> None:
        """Reads it.

        Args:
            text: As for Python's `re`.

        Raises:
            ValueError: It is none.
        """
        if len(text) > _LONGEST_PATTERN:
            raise ValueError(f"it has more than {_LONGEST_PATTERN:,} characters")
        counts = [max(int(count) for count in found if count) for found in _COUNT.findall(text) if any(found)]
        if math.prod(count for count in counts if count) > _MOST_REPEATS:
            raise ValueError(f"its counts multiply to more than {_MOST_REPEATS:,}")
        import regex  # type: ignore[import-untyped, unused-ignore]  # late: commands are to start at once

        try:
            self._compiled = regex.compile(text)
        except (regex.error, OverflowError, MemoryError) as error:
            raise ValueError(str(error) or type(error).__name__) from None
        except RecursionError:
            raise ValueError("parentheses inside parentheses without end") from None
        self.text = text
        self.groups = self._compiled.groups

    def search(self, name: str) -> Any:
        """Where it is found first: a match as Python's `re` gives one, or None.

        Args:
            name: What to look into.

        Raises:
            M3Error: That takes too long.
        """
        try:
            return self._compiled.search(name, timeout=_SEARCH_SECONDS)
        except (TimeoutError, MemoryError):
            raise M3Error(
                f"the pattern {self.text!r} tries without end on {name!r}: write it without a repetition inside a "
                "repetition"
            ) from None


@functools.lru_cache(1024)
def pattern(text: str) -> Pattern:
    """A regular expression, read once; see `Pattern`."""
    return Pattern(text)


# --- Libraries -----------------------------------------------------------------------------------------------------


@contextmanager
def failing_plainly(what: str, mend: str) -> Iterator[None]:
    """Says in a sentence what the libraries behind tokenizers raise: every kind, Rust's panics among them.

    Args:
        what: What fails.
        mend: What to do about it.

    Raises:
        M3Error: In place of whatever is raised.
    """
    try:
        yield
    except (M3Error, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # a panic is no Exception
        said = " ".join(str(error).splitlines()[:1]) or type(error).__name__
        raise M3Error(f"{what} ({said:.500}): {mend}") from error
