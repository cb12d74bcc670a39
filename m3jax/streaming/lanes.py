"""Lanes: tensors merged at the same time, each in turn from reading to writing, on machines of many cores."""

import os
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import jax

from m3jax.checkpoints.protocol import Checkpoint, is_sequential
from m3jax.errors import M3Error

_CORES = 4  # that a lane keeps busy: its readers, the device and its writer
_MOST = 8

Item = TypeVar("Item")


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def lane_count(lanes: int | None) -> int:
    """How many lanes there are: as asked for, or one for every four cores, at most eight.

    Args:
        lanes: As asked for.

    Raises:
        M3Error: What is asked for is no such number.
    """
    if lanes is None:
        return min(max(usable_cores() // _CORES, 1), _MOST)
    if not isinstance(lanes, int) or isinstance(lanes, bool) or lanes < 1:
        raise M3Error(f"lanes are {lanes!r}, but must be a whole number of at least 1")
    return lanes


def lanes_over(lanes: int | None, checkpoints: Iterable[Checkpoint], alone: bool) -> int:
    """How many lanes a merge has: one where it is asked to go alone, or where an input is best read in order.

    Args:
        lanes: As asked for.
        checkpoints: The inputs.
        alone: Chunks are spread over several devices, or files have to go before others are begun.

    Raises:
        M3Error: What is asked for is no number of lanes.
    """
    count = lane_count(lanes)
    return 1 if alone or any(map(is_sequential, checkpoints)) else count


def divided(items: Sequence[Item], sizes: Sequence[int], lanes: int) -> list[list[Item]]:
    """Items for lanes, each to the one that has least so far, in order: all lanes go through a model side by side.

    Args:
        items: Such as tensors.
        sizes: What each weighs.
        lanes: How many.

    Example:
        >>> divided("abcde", [4, 1, 1, 3, 1], 2)
        [['a', 'e'], ['b', 'c', 'd']]
    """
    parts: list[list[Item]] = [[] for _ in range(min(lanes, len(items)))]
    loads = [0] * len(parts)
    for item, size in zip(items, sizes, strict=True):
        lane = loads.index(min(loads))
        parts[lane].append(item)
        loads[lane] += size
    return [part for part in parts if part]


class LaneStopped(Exception):  # noqa: N818
    """Another lane has failed; this one ends."""


def side_by_side(works: Sequence[Callable[[threading.Event], None]]) -> None:
    """Does several things at the same time, the first of them in this thread.

    Args:
        works: Each looks at the event now and then, and raises `LaneStopped` where it is set.

    Raises:
        BaseException: What went wrong first; the others have ended then.
    """
    stopped, errors = threading.Event(), list[BaseException]()
    device: Any = jax.config.jax_default_device  # type: ignore[attr-defined]  # of this thread alone

    def fail(error: BaseException) -> None:
        errors.append(error)
        stopped.set()

    def run(work: Callable[[threading.Event], None], ended: threading.Event) -> None:
        try:
            with jax.default_device(device):
                work(stopped)
        except LaneStopped:
            pass
        except BaseException as error:  # raised below
            fail(error)
        finally:
            ended.set()

    ends = [threading.Event() for _ in works]
    threads = [
        threading.Thread(target=run, args=each, name=f"lane-{number}", daemon=True)
        for number, each in enumerate(zip(works[1:], ends[1:], strict=True), 1)
    ]
    try:
        start_threads(threads)
        run(works[0], ends[0])
    except BaseException as error:  # an interruption, or there are no more threads: those begun are to end
        fail(error)
    begun = [thread.ident is not None for thread in threads]
    persevere(lambda: [end.wait() for end, there in zip(ends[1:], begun, strict=True) if there], fail)
    for thread, there in zip(threads, begun, strict=True):
        if there:
            thread.join()
    if errors:
        raise errors[0]


def start_threads(threads: Iterable[threading.Thread]) -> None:
    """Starts threads, one after the other.

    Args:
        threads: Not started yet.

    Raises:
        M3Error: The operating system gives us no more of them.
    """
    for thread in threads:
        try:
            thread.start()
        except RuntimeError as error:
            raise M3Error(
                f"there are no more threads to be had, of which a merge has some for each input and lane ({error}): "
                "raise the limit (ulimit -u, or that of the container), or merge with --lanes 1"
            ) from error


def persevere(wait: Callable[[], object], fail: Callable[[BaseException], None]) -> None:
    """Waits to the end, also where that is interrupted: what is waited for still uses what is to be cleared away.

    Not for `Thread.join`, which before Python 3.13 takes a thread for ended once it was interrupted.

    Args:
        wait: May be called again.
        fail: Takes each interruption.
    """
    while True:
        try:
            wait()
            return
        except BaseException as error:
            fail(error)
