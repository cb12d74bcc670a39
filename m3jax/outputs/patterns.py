"""Patterns of the names of an output's files: those of `fnmatch`, in which `[0-9]+` is a number."""

import re
from collections.abc import Callable
from fnmatch import translate
from functools import lru_cache

_NUMBER = "[0-9]+"  # what a number is in patterns; of names that are escaped it is never a part


@lru_cache(maxsize=16)
def matcher(patterns: tuple[str, ...]) -> Callable[[str], bool]:
    """Tells whether a name is one of an output's files.

    Args:
        patterns: Of the files, whoever has written them: none takes long, whatever the name.

    Example:
        >>> known = matcher(("config.json", "d/[0-9a-f]", "part_[0-9]+/*.x"))
        >>> [known(name) for name in ("config.json", "d/7", "d/70", "part_12/a.x", "part_/a.x")]
        [True, True, False, True, False]
    """
    plain = frozenset(pattern for pattern in patterns if not any(sign in pattern for sign in "*?["))
    others = dict.fromkeys(pattern for pattern in patterns if pattern not in plain)
    # Digits that were taken are not given back: that is where numbers that follow each other would try without end.
    joined = "|".join(translate(pattern).replace(r"[0-9]\+", "[0-9]++") for pattern in others)
    found = re.compile(joined).match if others else None
    return lambda name: name in plain or (found is not None and found(name) is not None)


def directories(patterns: tuple[str, ...]) -> tuple[str, ...]:
    """Patterns of the directories in which files may be.

    Args:
        patterns: Of the files.

    Example:
        >>> directories(("a/b/*.json", "config.json"))
        ('a', 'a/b')
    """
    parts = [pattern.split("/")[:-1] for pattern in patterns]
    return tuple(dict.fromkeys("/".join(each[: depth + 1]) for each in parts for depth in range(len(each))))
