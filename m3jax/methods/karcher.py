"""The Karcher mean: the point of the sphere from which the experts' directions lie around evenly.

References:
    Karcher, Riemannian center of mass and mollifier smoothing, 1977. As a merge: mergekit, arXiv 2403.13257.
"""

import math
from typing import NamedTuple

import numpy as np

from m3jax.arithmetic import angles, sums
from m3jax.errors import M3Error
from m3jax.methods.base import Method, Settings
from m3jax.methods.geometry import RESOLUTION, exactly, geometric, measure_coefficients, normalized
from m3jax.methods.linear import check_normalizer


class Iteration(NamedTuple):
    """Options.

    Attributes:
        most: How many steps.
        tolerance: A step that is shorter is not taken, and is the last.
    """

    most: int
    tolerance: float


def mean_of(cosines: np.ndarray, weights: np.ndarray, how: Iteration) -> np.ndarray:
    """The Karcher mean of unit vectors as a combination of them.

    It begins at the direction of Σ wᵢuᵢ, or of the first vector where this has none. A vector that is opposite to the
    mean so far has no direction to go to, and is left out of that step.

    Args:
        cosines: float64[n, n], of the angles between them.
        weights: float64[n], which sum to 1.
        how: The iteration.

    Returns:
        float64[n], the coefficients of a vector of length 1.
    """

    def along(vector: np.ndarray) -> np.ndarray:
        return np.array([exactly(row, vector) for row in cosines])

    def length(vector: np.ndarray) -> float:
        return math.sqrt(max(exactly(vector, along(vector)), 0.0))

    start = length(weights)
    mean = np.eye(len(weights))[0] if start < max(how.tolerance, RESOLUTION) else weights / start
    for _ in range(how.most):
        cosine = np.clip(along(mean), -1.0, 1.0)
        sine = np.sqrt((1.0 - cosine) * (1.0 + cosine))
        apart = sine >= RESOLUTION
        stretch = np.where(apart, angles.arccos(cosine) / np.where(apart, sine, 1.0), cosine > 0)
        tangents = weights * stretch
        step = tangents - exactly(tangents, cosine) * mean
        size = length(step)
        if size < how.tolerance or size == 0.0:
            break
        mean = float(angles.cos(size)) * mean + float(angles.sin(size)) / size * step
        mean = mean / length(mean)
    return mean


def centred(options: Iteration, products: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The coefficients: those of the mean direction over the lengths, times Σ wᵢ‖xᵢ‖; vectors of length 0 have none.

    Args:
        options: The method's.
        products: float64[pairs].
        weights: float64[n].

    Raises:
        M3Error: The weights of the vectors that have a direction sum to 0.
    """
    weights = normalized(weights)
    matrix = sums.matrix_of(products, len(weights))
    lengths = np.sqrt(np.diagonal(matrix))
    there = np.flatnonzero(lengths > 0)
    if not there.size:
        return weights
    total = math.fsum(weights[there])
    if abs(total) <= 1e-8 * float(np.abs(weights[there]).sum()):
        raise M3Error("the weights of the experts that are not zero here sum to 0, so they have no mean: change them")
    units = 1.0 / lengths[there]
    cosines = np.clip(matrix[np.ix_(there, there)] * units * units[:, None], -1.0, 1.0)
    np.fill_diagonal(cosines, 1.0)
    result = np.zeros(len(weights))
    result[there] = mean_of(cosines, weights[there] / total, options) * units * exactly(weights, lengths)
    return result


def _evenly(options: Iteration, products: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The coefficients after all steps: how many are taken would jump as the weights move."""
    return centred(options._replace(tolerance=0.0), products, weights)


def _fold(options: Iteration, settings: Settings) -> None:
    check_normalizer(settings.weights, None)


_MEASURE = measure_coefficients("tensor", centred, _evenly)


def karcher(max_iter: int = 10, tol: float = 1e-5) -> Method:
    """The Riemannian mean of the experts' directions times the mean of their lengths, tensor by tensor.

    u ← exp_u(Σ wᵢ·log_u(xᵢ/‖xᵢ‖)), with weights that are divided by their sum. All iterates are combinations of the
    experts, so the iteration goes over n coefficients and their n×n inner products, and weights are read twice.

    Args:
        max_iter: At most so many steps.
        tol: The iteration ends before a step that is shorter.

    Raises:
        M3Error: `max_iter` is no count, or `tol` is negative.

    References:
        Karcher, Riemannian center of mass and mollifier smoothing, 1977. As a merge: mergekit, arXiv 2403.13257.

    Example:
        >>> karcher().experts
        (2, None)
    """
    if max_iter != int(max_iter) or max_iter < 0:
        raise M3Error(f"karcher: max_iter is {max_iter:g}, but must be a whole number, 0 or more")
    if not tol >= 0:
        raise M3Error(f"karcher: tol is {tol:g}, but must be 0 or more")
    return geometric("karcher", _MEASURE, options=Iteration(int(max_iter), float(tol)), experts=(2, None), fold=_fold)
