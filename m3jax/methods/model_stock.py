"""Model Stock: between the base and the experts' average, as far as the angle between their task vectors says.

References:
    Jang et al., Model Stock: All we need is just a few fine-tuned models, 2024, arXiv 2403.19522.
"""

import functools
from typing import Any

import numpy as np
from jaxtyping import Array, Float

from m3jax.arithmetic import exact, sums
from m3jax.methods.base import Known, Method, Settings, Values
from m3jax.methods.measures import Products, measure_products, on_host, products_of


def ratio(products: np.ndarray, count: int) -> np.ndarray:
    """t of some inner products, in float64: 0 is the base, 1 the experts' average.

    cos θ is the mean over pairs; a task vector of length 0 is at right angles to all. t = n·cosθ / (1 + (n−1)·cosθ),
    and 0 where that divisor is 0.

    Args:
        products: float64[*rows, pairs], in the order of `sums.pairs_of`.
        count: n.
    """
    matrix = sums.matrix_of(products, count)
    lengths = np.sqrt(np.einsum("...ii->...i", matrix))
    cosines = []
    for i, j in sums.pairs_of(count)[count:]:
        norms = lengths[..., i] * lengths[..., j]
        cosines.append(np.clip(matrix[..., i, j] / np.where(norms > 0, norms, 1.0), -1.0, 1.0) * (norms > 0))
    cosine = functools.reduce(np.add, cosines) / len(cosines)
    divisor = 1.0 + (count - 1) * cosine
    result: np.ndarray = np.where(divisor == 0.0, 0.0, count * cosine / np.where(divisor == 0.0, 1.0, divisor))
    return result


def _conclude(options: bool, state: Products, settings: Settings) -> Float[Any, "*rows"]:
    """λ·t/n, which every task vector is multiplied with."""
    count = len(settings.comparison)
    rows = state.largest.shape[:-1]

    def found(state: Products) -> list[np.ndarray]:
        return [(settings.scale * ratio(products_of(state), count) / count).astype(np.float32)]

    (factor,) = on_host(found, [rows], state)
    return factor


def _fold(options: bool, settings: Settings) -> None:
    return None  # the one coefficient comes from the inner products


def _combine(options: bool, values: Values, known: Known) -> Float[Array, "..."]:
    factor = known.found["ratio"][..., None] if options else known.found["ratio"]
    terms = [exact.multiply(factor, value, known.zero) for value in values]
    return functools.reduce(exact.add, terms)


_MEASURES = {by_row: (measure_products("ratio", "row" if by_row else "tensor", _conclude),) for by_row in (False, True)}


def model_stock(filter_wise: bool = False, scale: float = 1.0) -> Method:
    """base + t·(average of the experts − base), with t from the angle between task vectors; takes no weights.

    Args:
        filter_wise: One t for each row (the last axis), instead of one for each tensor.
        scale: λ, a factor of the task vector.

    References:
        Jang et al., Model Stock, 2024, arXiv 2403.19522.
    """
    return Method(
        "model_stock",
        _fold,
        _combine,
        measures=_MEASURES[filter_wise],
        options=filter_wise,
        uses_base=True,
        scale=scale,
        weighting="none",
        experts=(2, None),
        sparsifies=False,
    )
