"""NuSLERP: along the arc between two models, or two task vectors, at the place that their weights say.

References:
    Goddard et al., Arcee's MergeKit, 2024, arXiv 2403.13257.
"""

import numpy as np

from m3jax.arithmetic import angles
from m3jax.methods.base import Method
from m3jax.methods.geometry import RESOLUTION, geometric, measure_coefficients


def position(weights: np.ndarray) -> float:
    """t of two weights: w₁ / (w₀ + w₁), or ½ where they cancel.

    Example:
        >>> position(np.array([1.0, 3.0])), position(np.array([1.0, -1.0]))
        (0.75, 0.5)
    """
    total = float(weights.sum())
    return 0.5 if abs(total) <= 1e-6 * float(np.abs(weights).sum()) else float(weights[1]) / total


def arc(options: None, products: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Coefficients of the two ends; of the line where the angle is 0 or π to the products' rounding.

    A vector of length 0 is at right angles to all.

    Args:
        options: None.
        products: float64[*lines, 3].
        weights: float64[2].
    """
    t = position(weights)
    aa, bb, ab = np.moveaxis(products, -1, 0)
    lengths = np.sqrt(aa) * np.sqrt(bb)
    cosine = np.clip(ab / np.where(lengths > 0, lengths, 1.0), -1.0, 1.0)
    sine = np.sqrt((1.0 - cosine) * (1.0 + cosine))
    straight = sine < RESOLUTION
    angle, sine = angles.arccos(cosine), np.where(straight, 1.0, sine)
    ends = [np.where(straight, share, angles.sin(share * angle) / sine) for share in (1.0 - t, t)]
    return np.stack(ends, axis=-1)


_MEASURES = {scope: measure_coefficients(scope, arc) for scope in ("tensor", "row", "column")}


def nuslerp(flatten: bool = True, row_wise: bool = False, task_vectors: bool = False) -> Method:
    """(sin((1−t)θ)·a + sin(tθ)·b) / sin θ of exactly two experts, with t = w₁ / (w₀ + w₁).

    The vectors keep their lengths. Where they are parallel or opposite (sin θ < 2⁻¹¹, about what inner products tell
    from 0) the line (1−t)·a + t·b is taken.

    Args:
        flatten: One angle for each tensor.
        row_wise: Without `flatten`: one angle for each vector along the first axis, as mergekit understands the word;
            else one for each along the last.
        task_vectors: Of differences from the base, to which the result is added.

    References:
        Goddard et al., Arcee's MergeKit, 2024, arXiv 2403.13257.

    Example:
        >>> nuslerp().experts
        (2, 2)
    """
    scope = "tensor" if flatten else "column" if row_wise else "row"
    return geometric("nuslerp", _MEASURES[scope], uses_base=task_vectors, experts=(2, 2))
