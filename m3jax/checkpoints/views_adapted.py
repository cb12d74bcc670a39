"""A checkpoint seen with low-rank adapters added to its weights and with other tensors in place of some.

An entry is W + s·L·R as `arithmetic.lowrank` has it, rounded once to the dtype of W: what merging the adapter into a
copy of the model would have written. Entries are made in blocks of whole rows, each once where reading is in order.
"""

import threading
from collections import OrderedDict
from collections.abc import Collection, Mapping
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from m3jax.checkpoints.protocol import DTYPES, Checkpoint, TensorInfo, in_natural_order, room_for
from m3jax.checkpoints.views import MakingView, Stored, stored_at, stored_digests
from m3jax.errors import M3Error

if TYPE_CHECKING:
    from m3jax.arithmetic.lowrank import Factors

Array: TypeAlias = npt.NDArray[Any]

FLOATS = ("F32", "BF16", "F16")
"""The dtypes that weights and factors have."""

_AT_ONCE = 2**19  # entries of a block, unless a row has more
_BLOCKS_KEPT = 2
_FACTORS_KEPT = 2
_INFINITIES = {"F32": 0x7F800000, "BF16": 0x7F80, "F16": 0x7C00}  # without the sign; NaNs are above


class Factor(NamedTuple):
    """A matrix that a tensor holds.

    Attributes:
        stored: The tensor; None for ones.
        shape: Of the matrix.
        transposed: Whether the tensor holds its transpose.
    """

    stored: str | None
    shape: tuple[int, int]
    transposed: bool = False


class Product(NamedTuple):
    """What is added to a tensor: scale · left · right.

    Attributes:
        left: As many rows as the tensor has, when all of its axes but the first count as one; of a vector one.
        right: As many columns.
        scale: What their product is multiplied by.
    """

    left: Factor
    right: Factor
    scale: float


class Adaptation(NamedTuple):
    """What becomes of one tensor.

    Attributes:
        stored: The tensor that has its entries: itself, or the one that stands in its place.
        product: What is added to them; None for nothing.
    """

    stored: str
    product: Product | None


def adapted(checkpoint: Checkpoint, adaptations: Mapping[str, Adaptation], dropped: Collection[str] = ()) -> Checkpoint:
    """A checkpoint with low-rank products added to its tensors, and with some tensors in the place of others.

    Args:
        checkpoint: An open checkpoint, which the view closes.
        adaptations: What becomes of tensors, by their names; shapes fit, and dtypes are those of `FLOATS`.
        dropped: Tensors that are not seen, such as the factors.

    Returns:
        The view, in which each tensor keeps its shape and dtype; its location is the checkpoint's.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from m3jax.checkpoints import ShardWriter, open_safetensors
        >>> file = Path(tempfile.mkdtemp()) / "model.safetensors"
        >>> infos = [TensorInfo("w", (2, 2), "F32"), TensorInfo("b", (2, 1), "F32"), TensorInfo("a", (1, 2), "F32")]
        >>> with ShardWriter(file, infos) as shard:
        ...     for name, values in (("w", [1, 2, 3, 4]), ("b", [1, 10]), ("a", [1, 2])):
        ...         shard.write(name, 0, np.float32(values))
        ...     shard.finish()
        >>> added, room = Product(Factor("b", (2, 1)), Factor("a", (1, 2)), 0.5), np.empty((2, 2), np.float32)
        >>> with adapted(open_safetensors(file), {"w": Adaptation("w", added)}, dropped=("a", "b")) as view:
        ...     view.read_into("w", 0, room.reshape(-1).view(np.uint8))
        ...     print(room.tolist())
        [[1.5, 3.0], [8.0, 14.0]]
    """
    return _Adapted(checkpoint, adaptations, dropped)


class _Kept(threading.local):
    """What a thread has made last: threads go through tensors of their own."""

    def __init__(self) -> None:
        self.factors: OrderedDict[str, Factors] = OrderedDict()
        self.blocks: OrderedDict[tuple[str, int], Array] = OrderedDict()


class _Adapted(MakingView):
    """See `adapted`."""

    def __init__(self, checkpoint: Checkpoint, adaptations: Mapping[str, Adaptation], dropped: Collection[str]) -> None:
        super().__init__(checkpoint)
        self._adaptations = dict(adaptations)
        self._kept = _Kept()
        self.tensors: Mapping[str, TensorInfo] = in_natural_order(
            {name: info for name, info in checkpoint.tensors.items() if name not in dropped}
        )

    def source_name(self, name: str) -> Stored:
        """Where the entries that are added to are stored; see `Borrowing.source_name`."""
        if name not in self.tensors:
            raise M3Error(f"{self.location} has no tensor {name!r}: check the name.")
        return stored_at(self._checkpoint, self._stored(name))

    def source_digests(self, name: str, digest: str) -> dict[str, str]:
        """The digests of the tensor and of the factors; see `stored_digests`."""
        stored, product = self._adaptations.get(name, Adaptation(name, None))
        if product is None and not self._is_made(name):
            return stored_digests(self._checkpoint, stored, digest)
        factors = () if product is None else (product.left.stored, product.right.stored)
        return self._digests_of(each for each in (stored, *factors) if each is not None)

    def read_into(self, name: str, start: int, out: memoryview | npt.NDArray[np.uint8]) -> None:
        """Fills `out` with the little-endian bytes of a tensor's entries; see `Checkpoint.read_into`."""
        view = room_for(self, name, start, out)
        if not self._is_made(name):
            self._checkpoint.read_into(self._stored(name), start, view)
            return
        if not len(view):
            return
        info = self.tensors[name]
        size = self._rows_of_block(info) * _columns(info) * DTYPES[info.dtype].itemsize
        room = np.frombuffer(view, np.uint8)
        for number in range(start // size, -(-(start + len(view)) // size)):
            raw = self._block(name, number)
            at = number * size - start
            room[max(at, 0) : at + len(raw)] = raw[max(-at, 0) : len(room) - at]

    def _stored(self, name: str) -> str:
        return self._adaptations[name].stored if name in self._adaptations else name

    def _is_made(self, name: str) -> bool:
        """Whether the bytes of a tensor are not simply those of a stored one."""
        if name not in self._adaptations:
            return False
        stored, product = self._adaptations[name]
        return product is not None or self._checkpoint.tensors[stored].dtype != self.tensors[name].dtype

    def _rows_of_block(self, info: TensorInfo) -> int:
        return max(1, min(_AT_ONCE // max(_columns(info), 1), _rows(info)))

    def _block(self, name: str, number: int) -> npt.NDArray[np.uint8]:
        """The bytes of a block of whole rows."""
        kept = self._kept.blocks
        if (name, number) not in kept:
            kept[name, number] = self._made(name, number)
            while len(kept) > _BLOCKS_KEPT:
                kept.popitem(last=False)
        return kept[name, number].reshape(-1).view(np.uint8)

    def _made(self, name: str, number: int) -> Array:
        """The rows of a block."""
        info, (stored, product) = self.tensors[name], self._adaptations[name]
        source = self._checkpoint.tensors[stored]
        columns, most = _columns(info), self._rows_of_block(info)
        first, rows = number * most, min(most, _rows(info) - number * most)
        held = np.zeros((most, columns), DTYPES[source.dtype])  # the last block is as large: fewer shapes to compile
        raw = held[:rows].reshape(-1).view(np.uint8)
        begin = first * columns * held.itemsize
        self._checkpoint.read_into(stored, begin, raw)
        self._passing.take(stored, begin, raw)
        with np.errstate(over="ignore", invalid="ignore"):
            weights = held.astype(DTYPES[info.dtype], copy=False)
        made = weights[:rows] if product is None else self._sum(name, product, weights, first)[:rows]
        if not _all_finite(made, info.dtype) and _all_finite(held[:rows], source.dtype):
            raise M3Error(
                f"{self.location}: {name} with its adapter is beyond {info.dtype}: check the adapter and its"
                " lora_alpha, or get it again."
            )
        return made

    def _sum(self, name: str, product: Product, weights: Array, first: int) -> Array:
        """Rows of a tensor, from one on, with the product added."""
        from m3jax.arithmetic import lowrank  # late: it brings JAX, which those who look at headers do not wait for

        whole = self._factors_of(name, product)
        left = whole.left[first : first + len(weights)]
        if len(left) < len(weights):
            left = np.concatenate([left, np.zeros((len(weights) - len(left), left.shape[1]), np.float32)])
        return lowrank.host_add_product(weights, whole._replace(left=left), self._is_short(product))

    def _is_short(self, product: Product) -> bool:
        from m3jax.arithmetic import lowrank

        stored = [factor.stored for factor in (product.left, product.right)]
        return None not in stored and lowrank.are_short(
            *(DTYPES[self._checkpoint.tensors[name].dtype] for name in stored if name is not None)
        )

    def _factors_of(self, name: str, product: Product) -> "Factors":
        """The factors of a tensor, read once as long as they are in use."""
        kept = self._kept.factors
        if name not in kept:
            from m3jax.arithmetic import lowrank

            kept[name] = lowrank.host_factors(self._matrix(product.left), self._matrix(product.right), product.scale)
            if len(kept) > _FACTORS_KEPT:
                kept.popitem(last=False)
        kept.move_to_end(name)
        return kept[name]

    def _matrix(self, factor: Factor) -> Array:
        if factor.stored is None:
            return np.ones(factor.shape, np.float32)
        info = self._checkpoint.tensors[factor.stored]
        raw = np.empty(info.nbytes, np.uint8)
        self._checkpoint.read_into(factor.stored, 0, raw)
        self._passing.take(factor.stored, 0, raw)
        matrix = raw.view(DTYPES[info.dtype])
        if not _all_finite(matrix, info.dtype):
            raise M3Error(f"{self.location}: {factor.stored} holds NaN or infinite entries: get the adapter again.")
        shape = factor.shape[::-1] if factor.transposed else factor.shape
        matrix = matrix.reshape(shape)
        return np.ascontiguousarray(matrix.T) if factor.transposed else matrix


def _rows(info: TensorInfo) -> int:
    return info.shape[0] if len(info.shape) > 1 else 1


def _columns(info: TensorInfo) -> int:
    return prod(info.shape[1:]) if len(info.shape) > 1 else info.size


def _all_finite(values: Array, dtype: str) -> bool:
    """Whether floats hold no NaN and no infinity."""
    infinity = _INFINITIES[dtype]
    words = values.reshape(-1).view(f"u{values.itemsize}")
    return bool((words & (words.dtype.type(-1 % (1 << 8 * values.itemsize)) >> 1)).max(initial=0) < infinity)
