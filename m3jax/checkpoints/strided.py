"""Tensors whose entries do not lie in their order, read range by range into memory that is."""

from collections.abc import Callable, Iterator
from math import prod
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

_SPAN = 2**20  # bytes that are read at once where entries are picked out of them
_GAP = 2**15  # bytes that are read in the time that another range takes to be asked for

Entries: TypeAlias = npt.NDArray[Any]
Reader: TypeAlias = Callable[[memoryview, int], None]
"""Fills memory from a byte on."""


def in_order(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether entries lie one after the other in row-major order.

    Args:
        shape: The tensor's.
        strides: How many entries it is along each dimension from one to the next.

    Example:
        >>> in_order((2, 3), (3, 1)), in_order((2, 3), (1, 2)), in_order((1, 3), (99, 1)), in_order((0, 3), (1, 1))
        (True, False, True, True)
    """
    after = [prod(shape[axis + 1 :]) for axis in range(len(shape))]
    return 0 in shape or all(
        stride == step for size, stride, step in zip(shape, strides, after, strict=True) if size > 1
    )


def read_strided(
    read: Reader, shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int, start: int, out: memoryview
) -> None:
    """Fills memory with a tensor's bytes in row-major order.

    Args:
        read: Of the storage, from the tensor's first entry on.
        shape: The tensor's.
        strides: How many entries it is along each dimension from one to the next; none is negative.
        itemsize: Bytes of an entry: 1, 2, 4 or 8.
        start: The first byte wanted of the tensor.
        out: Flat bytes to fill; all that is wanted is inside the tensor.
    """
    if not len(out):
        return
    first, last = start // itemsize, -(-(start + len(out)) // itemsize)
    whole = itemsize * first == start and itemsize * (last - first) == len(out)
    kind = np.dtype(f"u{itemsize}")
    entries = np.frombuffer(out, kind) if whole else np.empty(last - first, kind)
    done = 0
    for origin, box in boxes(shape, first, last):
        at = sum(place * stride for place, stride in zip(origin, strides, strict=True))
        fill_box(read, entries[done : done + prod(box)].reshape(box), strides, at)
        done += prod(box)
    if not whole:
        skipped = start - itemsize * first
        out[:] = entries.view(np.uint8).data[skipped : skipped + len(out)]


def boxes(shape: tuple[int, ...], first: int, last: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The boxes that a range of entries in row-major order is made of, in their order.

    Args:
        shape: The tensor's.
        first: The first entry.
        last: The one after the last.

    Yields:
        Of each box its first place and its shape.

    Example:
        >>> list(boxes((2, 3), 1, 6))
        [((0, 1), (1, 2)), ((1, 0), (1, 3))]
    """
    if first >= last:
        return
    if not shape:
        yield (), ()
        return
    inner = prod(shape[1:])
    row, inside = divmod(first, inner)
    if inside:
        stop = min(last, (row + 1) * inner)
        for origin, box in boxes(shape[1:], inside, stop - row * inner):
            yield (row, *origin), (1, *box)
        first, row = stop, row + 1
    end, left = divmod(last, inner)
    if first < last and row < end:
        yield (row, *[0] * (len(shape) - 1)), (end - row, *shape[1:])
    if left and end >= row:
        for origin, box in boxes(shape[1:], 0, left):
            yield (end, *origin), (1, *box)


def _run(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """How many entries of a box lie one after the other."""
    run = 1
    for stride, count in sorted(zip(strides, shape, strict=True)):
        if count > 1 and stride == run:
            run *= count
    return run


def fill_box(read: Reader, box: Entries, strides: tuple[int, ...], at: int) -> None:
    """Fills a box of entries, in as few ranges as waste little.

    Args:
        read: Of the storage.
        box: To fill; it need not be contiguous.
        strides: How many stored entries it is along each of its dimensions from one to the next; none is negative.
        at: Which stored entry is its first.
    """
    size = box.itemsize
    if in_order(box.shape, strides) and box.flags.c_contiguous:
        read(box.reshape(-1).view(np.uint8).data, at * size)
        return
    reach = 1 + sum((count - 1) * stride for count, stride in zip(box.shape, strides, strict=True))
    if reach * size <= min(_SPAN, _GAP * (box.size // _run(box.shape, strides) + 1)):
        span = np.empty(reach, box.dtype)
        read(span.view(np.uint8).data, at * size)
        steps = [size * stride if count > 1 else 0 for count, stride in zip(box.shape, strides, strict=True)]
        box[...] = np.lib.stride_tricks.as_strided(span, box.shape, steps)
        return
    axis = max((axis for axis, count in enumerate(box.shape) if count > 1), key=lambda axis: strides[axis])
    half = box.shape[axis] // 2
    before: list[slice] = [slice(None)] * axis
    fill_box(read, box[(*before, slice(half))], strides, at)
    fill_box(read, box[(*before, slice(half, None))], strides, at + half * strides[axis])
