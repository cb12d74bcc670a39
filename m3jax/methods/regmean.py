"""RegMean: the weights whose outputs are nearest, in least squares, to those of each expert on its own inputs.

References:
    Jin, Ren, Preotiuc-Pietro & Cheng, Dataless knowledge fusion by merging weights of language models, 2022,
    arXiv 2212.09849.
"""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from m3jax.arithmetic import systems
from m3jax.errors import M3Error
from m3jax.methods.base import Density, Known, Method, Preparation, Settings, checked_number
from m3jax.methods.linear import check_normalizer
from m3jax.methods.measures import on_host

KIND = "gram"
"""What its statistics are called where they are recorded."""

_TOLERANCE = 2.0**-6  # of what was measured in 16 bits: how far a Gram matrix may be from one
_SMALLEST = np.float32(2.0**-125)


def _fold(options: None, settings: Settings) -> None:
    weights = settings.weights
    check_normalizer(weights, None)
    lowest = min((weight for weight in weights if isinstance(weight, float)), default=0.0)
    if lowest < 0.0:
        raise M3Error(f"regmean: a weight is {lowest:g}, but shares are not negative: give weights from 0 on")


# --- Gram matrices ------------------------------------------------------------------------------------------------


def _symmetric(statistics: npt.NDArray[Any]) -> systems.Doubles:
    """A Gram matrix in float64.

    Raises:
        M3Error: It is none.
    """
    single = np.asarray(statistics, np.float32)
    matrix = np.where(np.abs(single) < _SMALLEST, np.float32(0), single).astype(np.float64)
    squares = np.diagonal(matrix)
    if not np.isfinite(matrix).all() or (squares < 0).any():
        raise M3Error("its Gram matrix holds NaN, infinities or negative squares: measure it again")
    lengths = np.sqrt(squares)
    bound = np.multiply.outer(lengths, lengths)
    turned = matrix.T
    if (np.abs(matrix) > (1.0 + _TOLERANCE) * bound).any() or (np.abs(matrix - turned) > _TOLERANCE * bound).any():
        raise M3Error(
            "its statistics are no Gram matrix, which is symmetric and nowhere larger than the root of the product of "
            "its squares: measure it again"
        )
    symmetric: systems.Doubles = (matrix + turned) * 0.5
    return symmetric


def _weighed(statistics: npt.NDArray[Any], weight: float, ratio: float) -> systems.Doubles:
    """wᵢ·Gᵢ' of an expert."""
    matrix = _symmetric(statistics)
    squares = np.diagonal(matrix) * weight
    matrix *= ratio
    matrix *= weight
    np.fill_diagonal(matrix, squares)
    return matrix


def _unseen(matrix: systems.Doubles, silent: npt.NDArray[np.bool_], weight: float) -> systems.Doubles:
    """The same with squares at inputs that are zero in all data, of which the experts' weights are averaged."""
    numbers = np.flatnonzero(silent)
    matrix[numbers, numbers] = weight
    return matrix


def _make(options: None, settings: Settings, statistics: Sequence[npt.NDArray[Any]]) -> tuple[systems.Applied, ...]:
    """(wᵢ·Gᵢ')·(Σ wⱼ·Gⱼ')⁻¹ of each expert but the first."""
    weights, (ratio, *_) = settings.weights, settings.method["reduce_non_diagonal_ratio"]
    if len(weights) == 1:
        return ()
    experts = list(zip(statistics, weights, strict=True))
    total = _weighed(*experts[0], ratio)
    for own in experts[1:]:
        total += _weighed(*own, ratio)
    silent = np.diagonal(total) == 0
    total = _unseen(total, silent, float(sum(weights)))
    try:
        factor = systems.factored(total)
    except systems.SingularError:
        raise M3Error(
            f"the sum of its Gram matrices is singular, so regmean's equations have no one solution: measure on more "
            f"than {len(total)} tokens, or take a smaller reduce_non_diagonal_ratio than {ratio:g}"
        ) from None
    found = []
    for matrix, weight in experts[1:]:
        right = _unseen(_weighed(matrix, weight, ratio), silent, weight)
        found.append(systems.prepared(systems.solved(factor, right)))
    return tuple(found)


def _nbytes(width: int, experts: int) -> int:
    """The experts' matrices, those that are worked on, and what is kept of each expert, of this tensor and another."""
    return width * width * (4 * experts + 5 * 8 + 2 * 8 * (experts - 1))


# --- rows of weights ----------------------------------------------------------------------------------------------


def _rows(
    matrices: Sequence[systems.Applied], is_single: bool, *values: npt.NDArray[np.float32]
) -> list[npt.NDArray[np.float32]]:
    """x₀ + Σ (xᵢ − x₀)·Aᵢ of rows; those that are not finite become NaN."""
    odd = ~np.logical_and.reduce([np.isfinite(value).all(axis=-1) for value in values])
    wide = [np.where(odd[..., None], np.float32(0), value).astype(np.float64) for value in values]
    total = wide[0].reshape(-1, wide[0].shape[-1]).copy()
    for value, matrix in zip(wide[1:], matrices, strict=True):
        total += systems.applied((value - wide[0]).reshape(total.shape), matrix)
    with np.errstate(over="ignore"):
        rounded = total.astype(np.float32) if is_single else systems.rounded_to_odd(total)
    flushed = np.where(np.abs(rounded) < _SMALLEST, np.copysign(np.float32(0), rounded), rounded)
    return [np.where(odd[..., None], np.float32(np.nan), flushed.reshape(values[0].shape))]


def _combine(options: None, values: Sequence[Any], known: Known) -> Any:
    """The merged rows, of numpy where those of the experts are."""
    is_single = np.dtype(known.dtype) == np.float32
    (merged,) = on_host(functools.partial(_rows, known.prepared, is_single), [values[0].shape], *values)
    return merged


def regmean(reduce_non_diagonal_ratio: Density = 0.9) -> Method:
    """(Σ wᵢ·Wᵢ·Gᵢ')·(Σ wᵢ·Gᵢ')⁻¹ of weights W [out, in], where Gᵢ is the Gram matrix Xᵀ·X of the expert's inputs.

    G' is G with what is beside its diagonal made smaller. Inputs that are zero in all data are averaged. Weights are
    not negative. The equations are solved on the host in float64, with the same bits everywhere (`arithmetic.systems`);
    there are no derivatives.

    Args:
        reduce_non_diagonal_ratio: What entries of G beside the diagonal are multiplied with, from 0 to 1; the paper's
            α. At 0, each column of W is the mean weighed by how large its inputs are.

    Raises:
        M3Error: The ratio is out of range.

    References:
        Jin et al., Dataless knowledge fusion by merging weights of language models, 2022, arXiv 2212.09849.
    """
    ratio = checked_number("regmean", "reduce_non_diagonal_ratio", reduce_non_diagonal_ratio, 0.0, 1.0)
    return Method(
        "regmean",
        _fold,
        _combine,
        parameters=(("reduce_non_diagonal_ratio", ratio),),
        sparsifies=False,
        rows=True,
        statistics=KIND,
        preparation=Preparation(_make, _nbytes),
    )
