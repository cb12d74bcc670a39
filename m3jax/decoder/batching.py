"""Texts in batches of few sizes, so that few programs are compiled, and word of what is going on."""

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from m3jax.decoder.modeling import fitting
from m3jax.decoder.texts import Tokens
from m3jax.errors import M3Error

Stage: TypeAlias = Literal["prefill", "decode", "score"]

_SHORTEST_BUCKET = 32
_NARROWEST_BUCKET = 8


class DecoderProgress(NamedTuple):
    """What is going on.

    Attributes:
        event: `compile` before a program is compiled, `batch` when a batch is done.
        stage: `prefill`, `decode` or `score`.
        batch: Rows of the batch.
        length: Slots of each row.
        done: Texts finished so far.
        total: Texts asked for.
        tokens: Tokens generated, or scored, so far.
    """

    event: Literal["compile", "batch"]
    stage: Stage
    batch: int
    length: int
    done: int
    total: int
    tokens: int


ProgressFn: TypeAlias = Callable[[DecoderProgress], None]


def length_bucket(length: int, limit: int | None = None) -> int:
    """The padded length of a text: the next power of two, at least 32, at most `limit`.

    Args:
        length: Tokens in the text.
        limit: The model's context length, if it has one.

    Example:
        >>> length_bucket(5), length_bucket(33), length_bucket(1500, limit=2000)
        (32, 64, 2000)
    """
    bucket = max(_SHORTEST_BUCKET, 1 << (length - 1).bit_length())
    return bucket if limit is None else min(bucket, max(limit, length))


def narrow_bucket(length: int) -> int:
    """The padded length of a part of a text: the next power of two or three quarters of it, at least 8.

    Args:
        length: Tokens in the part.

    Example:
        >>> narrow_bucket(5), narrow_bucket(17), narrow_bucket(25)
        (8, 24, 32)
    """
    bucket = max(_NARROWEST_BUCKET, 1 << (length - 1).bit_length())
    return 3 * bucket // 4 if _NARROWEST_BUCKET <= length <= 3 * bucket // 4 else bucket


def batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices of texts, longest first, in batches: like goes with like, and what needs most memory runs first.

    Args:
        lengths: Tokens of each text.
        batch_size: Texts that run together.

    Raises:
        M3Error: The batch size is not positive.
    """
    if batch_size < 1:
        raise M3Error(f"the batch size {batch_size} is not positive: give a whole number such as 8.")
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def row_count(count: int, batch_size: int) -> int:
    """Rows of the batch that holds so many texts: a power of two or the batch size, to compile for few sizes.

    Args:
        count: Texts in the batch.
        batch_size: Most of them.
    """
    return min(batch_size, 1 << (count - 1).bit_length())


def pad(texts: Sequence[Tokens], rows: int, length: int, mesh: Mesh | None) -> tuple[Array, Array]:
    """Texts as one array, padded on the right; missing rows have length 1.

    Args:
        texts: Token ids of each text.
        rows: Rows of the array, at least as many as texts.
        length: Its columns.
        mesh: Where it goes, by rows.

    Returns:
        Tokens, int32 [rows, length], and how many each row has, int32 [rows].
    """
    tokens, lengths = np.zeros((rows, length), np.int32), np.ones(rows, np.int32)
    for row, text in enumerate(texts):
        tokens[row, : len(text)] = text
        lengths[row] = len(text)
    return put(tokens, mesh), put(lengths, mesh)


def put(x: Any, mesh: Mesh | None) -> Array:
    """An array by batch rows on the mesh, or on the one device.

    Args:
        x: An array whose first axis is the batch.
        mesh: The mesh; `None` is the one device.
    """
    placed: Array = jnp.asarray(x) if mesh is None else jax.device_put(x, fitting(mesh, x.shape, ("fsdp",)))
    return placed


_announce: contextvars.ContextVar[Callable[[Stage, int, int], None] | None] = contextvars.ContextVar(
    "announce", default=None
)


def say_compiling(stage: Stage, batch: int, length: int) -> None:
    """Tells the caller that a program is being compiled: to be called where only tracing comes by.

    Args:
        stage: What the program does.
        batch: Rows that it takes.
        length: Slots of each row.
    """
    announce = _announce.get()
    if announce is not None:
        announce(stage, batch, length)


@contextlib.contextmanager
def announcing(progress: ProgressFn | None, counts: Callable[[], tuple[int, int, int]]) -> Iterator[None]:
    """Passes on what is compiled inside to the caller.

    Args:
        progress: Is told.
        counts: Texts done, texts in all and tokens so far.
    """

    def announce(stage: Stage, batch: int, length: int) -> None:
        if progress is not None:
            progress(DecoderProgress("compile", stage, batch, length, *counts()))

    token = _announce.set(announce)
    try:
        yield
    finally:
        _announce.reset(token)
