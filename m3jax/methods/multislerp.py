"""Multi-SLERP: barycentric interpolation of directions, with the mean of the lengths.

References:
    Goddard, Multi-SLERP, goddard.blog/posts/multislerp-wow-what-a-cool-idea.
"""

import math
from typing import NamedTuple

import numpy as np

from m3jax.arithmetic import sums
from m3jax.errors import M3Error
from m3jax.methods.base import Method, Settings
from m3jax.methods.geometry import RESOLUTION, exactly, geometric, measure_coefficients, normalized
from m3jax.methods.linear import check_normalizer


class Barycentre(NamedTuple):
    """Options.

    Attributes:
        normalize: Divide weights by their sum.
        eps: A mean of unit vectors that is shorter has no direction.
    """

    normalize: bool
    eps: float


def directed(options: Barycentre, products: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The coefficients.

    The tangents at the mean's direction m are projections of unit vectors uᵢ, so their weighted sum is the projection
    of Σ wᵢuᵢ. This is parallel to m: the sum is 0 whatever the vectors, and what is left is m·Σ wᵢ‖xᵢ‖.

    Args:
        options: The method's.
        products: float64[pairs].
        weights: float64[n].

    Raises:
        M3Error: More than two unit vectors have a mean of length 0.
    """
    count = len(weights)
    weights = normalized(weights) if options.normalize else weights
    matrix = sums.matrix_of(products, count)
    lengths = np.sqrt(np.diagonal(matrix))
    shares = np.where(lengths > 0, weights / np.where(lengths > 0, lengths, 1.0), 0.0)
    spread = exactly(np.abs(shares), lengths)
    mean = math.sqrt(max(exactly(shares, [exactly(row, shares) for row in matrix]), 0.0))
    if mean <= max(options.eps, RESOLUTION * spread):
        if count == 2 or spread == 0.0:
            return weights
        raise M3Error("directions of the experts cancel, so that their mean has none: change the weights")
    result: np.ndarray = shares * (exactly(weights, lengths) / mean)
    return result


def _fold(options: Barycentre, settings: Settings) -> None:
    if options.normalize:
        check_normalizer(settings.weights, "normalize_weights: false")


_MEASURE = measure_coefficients("tensor", directed)


def multislerp(normalize: bool = True, eps: float = 1e-8, task_vectors: bool = False) -> Method:
    """The direction of Σ wᵢ·xᵢ/‖xᵢ‖ times the length Σ wᵢ·‖xᵢ‖, tensor by tensor.

    Of two experts whose directions cancel, Σ wᵢxᵢ is taken; of more it is an error, and NaN in a trace.

    Args:
        normalize: Divide weights by their sum.
        eps: A mean of unit vectors that is shorter than this, or than 2⁻¹¹ of the weights, has no direction.
        task_vectors: Of differences from the base, to which the result is added.

    References:
        Goddard, Multi-SLERP, goddard.blog/posts/multislerp-wow-what-a-cool-idea.

    Example:
        >>> multislerp().experts
        (2, None)
    """
    options = Barycentre(normalize, float(eps))
    return geometric("multislerp", _MEASURE, options=options, uses_base=task_vectors, experts=(2, None), fold=_fold)
