"""Spherical interpolation: along the arc between two parameter vectors, tensor by tensor.

References:
    Shoemake, Animating rotation with quaternion curves, 1985.
"""

import math

import numpy as np

from m3jax.methods.base import Method
from m3jax.methods.geometry import geometric, measure_coefficients

NEARLY_PARALLEL = 0.9995  # as in mergekit: beyond this cosine the arc is a line to float32


def arc_weights(products: np.ndarray, t: float) -> tuple[float, float]:
    """Weights of the two ends at position t of the arc, in float64; of the line where there is no arc.

    Args:
        products: ⟨a,a⟩, ⟨b,b⟩ and ⟨a,b⟩, float64.
        t: Position in [0, 1]; 0 is a.
    """
    aa, bb, ab = map(float, products)
    norms = math.sqrt(aa) * math.sqrt(bb)
    cosine = min(1.0, max(-1.0, ab / norms)) if norms > 0 else 1.0
    if abs(cosine) > NEARLY_PARALLEL:
        return 1.0 - t, t
    angle = math.acos(cosine)
    return math.sin((1.0 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def _ends(options: None, products: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return np.array(arc_weights(products, float(weights[0])))


_ARC = measure_coefficients("tensor", _ends)


def slerp() -> Method:
    """Spherical linear interpolation between exactly two experts, per tensor; `weights` is the position t in [0, 1].

    t = 0 is the first expert. Tensors that are nearly parallel (|cos| > 0.9995) are interpolated linearly, and so are
    those whose entries are all so small (below 10⁻¹⁹) that their squares are flushed.

    References:
        Shoemake, Animating rotation with quaternion curves, 1985.
    """
    return geometric("slerp", _ARC, weighting="position", experts=(2, 2))
