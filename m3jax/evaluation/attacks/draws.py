"""Random choices that depend on nothing but a key, a name and a number."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from m3jax.arithmetic import threefry

_BLOCK = 1024

Draw = Callable[[int, int], int]
"""Choice number i among so many, from 0."""


def stream(key: Any, name: str) -> Draw:
    """A stream of choices; each can be asked for alone and again, in any order.

    Args:
        key: An integer seed or a threefry2x32 JAX key.
        name: Tells streams of one key apart.

    Example:
        >>> draw = stream(0, "deepwordbug")
        >>> [draw(i, 6) for i in range(4)] == [stream(0, "deepwordbug")(i, 6) for i in range(4)]
        True
    """
    words = threefry.fold_in_name(threefry.key_words(key), name)

    @functools.lru_cache(maxsize=64)
    def block(number: int) -> list[int]:
        counter = np.arange(_BLOCK, dtype=np.uint32) + np.uint32(number * _BLOCK)
        high, _ = threefry.threefry2x32((words[0], words[1]), (np.zeros(_BLOCK, np.uint32), counter))
        drawn: list[int] = high.tolist()
        return drawn

    def draw(number: int, below: int) -> int:
        return block(number // _BLOCK)[number % _BLOCK] * below >> 32

    return draw
