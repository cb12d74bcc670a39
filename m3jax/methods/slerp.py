"""Spherical interpolation: along the arc between two parameter vectors, tensor by tensor.

References:
    Shoemake, Animating rotation with quaternion curves, 1985.
"""

import math
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from m3jax.arithmetic.double import Double
from m3jax.methods.base import Known, Method, Settings, Values
from m3jax.methods.linear import stack, weighted_sum
from m3jax.methods.measures import Products, measure_products, on_host, products_of

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


def _coefficients(state: Products, t: float) -> list[np.ndarray]:
    """The two float32 coefficients of a tensor and their derivatives in t."""
    products = products_of(state)
    step = 1e-4  # central difference: the weights are smooth, and a derivative needs no last bit
    ahead, behind = arc_weights(products, t + step), arc_weights(products, t - step)
    slope = [(x - y) / (2 * step) for x, y in zip(ahead, behind, strict=True)]
    return [np.asarray(stack(list(arc_weights(products, t)))), np.array(slope, np.float32)]


@jax.custom_jvp
def _traced_coefficients(state: Products, high: Float[Array, ""], low: Float[Array, ""]) -> Float[Array, "2"]:
    """The coefficients at a position that is known only to a trace, as high + low: the bits are the host's."""
    value: Array = _call_back(state, high, low)[0]
    return value


def _call_back(state: Products, *position: Any) -> Any:
    return on_host(lambda found, *words: _coefficients(found, sum(map(float, words))), [(2,), (2,)], state, *position)


@_traced_coefficients.defjvp
def _traced_coefficients_jvp(primals, tangents):  # type: ignore[no-untyped-def]
    value, slope = _call_back(*primals)
    return value, slope * tangents[1]


def _conclude(options: None, state: Products, settings: Settings) -> Float[Any, "2"]:
    (position,) = settings.weights
    if isinstance(position, Double):
        return _traced_coefficients(state, position.high, position.low)
    (found,) = on_host(lambda found: _coefficients(found, position)[:1], [(2,)], state)
    return found


def _fold(options: None, settings: Settings) -> None:
    return None  # the arc's weights come from the inner products


def _combine(options: None, values: Values, known: Known) -> Float[Array, "..."]:
    return weighted_sum(known.found["arc"], values, known.zero)


_ARC = measure_products("arc", "tensor", _conclude)


def slerp() -> Method:
    """Spherical linear interpolation between exactly two experts, per tensor; `weights` is the position t in [0, 1].

    t = 0 is the first expert. Tensors that are nearly parallel (|cos| > 0.9995) are interpolated linearly, and so are
    those whose entries are all so small (below 10⁻¹⁹) that their squares are flushed.

    References:
        Shoemake, Animating rotation with quaternion curves, 1985.
    """
    return Method("slerp", _fold, _combine, measures=(_ARC,), weighting="position", experts=(2, 2), sparsifies=False)
