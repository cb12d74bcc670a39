"""Sums Σ cᵢ·xᵢ whose coefficients follow from weights and from the inner products of what is summed.

A method gives the rule from the ones to the others, in float64 on the host; here it becomes a measure and a combine
that work by tensor, by row or by column, eagerly or in a trace, where the rule is called back.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from m3jax.arithmetic import exact
from m3jax.arithmetic.double import Double, to_float32
from m3jax.errors import M3Error
from m3jax.methods.base import Known, Measure, Method, Settings, Values
from m3jax.methods.linear import weighted_sum
from m3jax.methods.measures import Products, measure_products, on_host, products_of

RESOLUTION = 2.0**-11
"""Sines, and lengths of sums of unit vectors, below it may be rounding: products are rounded to 24 bits, squares are so
small."""

_STEP = 1e-4  # of central differences: coefficients are smooth in the weights, and a derivative needs no last bit
_FOUND = "coefficients"

Coefficients = Callable[[Any, np.ndarray, np.ndarray], np.ndarray]
"""(options, inner products float64[*lines, pairs] in the order of `sums.pairs_of`, weights float64[k]) → coefficients
float64[*lines, n]. It raises M3Error where there are none."""


class Rule(NamedTuple):
    """How coefficients are made.

    Attributes:
        coefficients: The rule.
        slopes: The same, but for jumps, from which derivatives in the weights are taken.
        options: The method's.
    """

    coefficients: Coefficients
    slopes: Coefficients
    options: Any


def exactly(a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray) -> float:
    """Σ aᵢbᵢ with products in float64 and one rounding of their sum: no library's order of additions decides bits."""
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def normalized(weights: np.ndarray) -> np.ndarray:
    """Weights divided by their sum; as they are where it is 0."""
    result: np.ndarray = weights / (math.fsum(weights) or 1.0)
    return result


# --- on the host --------------------------------------------------------------------------------------------------


def _checked_products(state: Products) -> np.ndarray:
    products = products_of(state)
    if not np.isfinite(products).all():
        raise M3Error(
            "has no inner products, as entries are NaN, infinite or beyond 10¹⁹: restore the model, or exclude the "
            "tensor"
        )
    return products


def _rounded(rule: Rule, state: Products, weights: np.ndarray) -> np.ndarray:
    """The coefficients in float32, flushed as `double.to_float32` does it.

    Raises:
        M3Error: There are none, or one is beyond float32.
    """
    found = rule.coefficients(rule.options, _checked_products(state), weights)
    largest = found.flat[np.argmax(np.abs(found))] if found.size else 0.0
    to_float32(float(largest))  # which refuses what is beyond float32
    rounded = found.astype(np.float32)
    result: np.ndarray = np.where(np.abs(rounded) < np.float32(2.0**-125), np.copysign(np.float32(0), rounded), rounded)
    return result


def _sloped(rule: Rule, state: Products, weights: np.ndarray) -> np.ndarray:
    """Derivatives in each weight, along a last axis."""
    products = _checked_products(state)
    moves = np.eye(len(weights)) * _STEP

    def along(move: np.ndarray) -> np.ndarray:
        ahead, behind = (rule.slopes(rule.options, products, w) for w in (weights + move, weights - move))
        return (ahead - behind) / (2 * _STEP)

    return np.stack([along(move) for move in moves], axis=-1).astype(np.float32)


def _or_nan(function: Callable[[], np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """What a function gives; NaN where it refuses, for a trace, in which nothing can be refused."""
    try:
        return function()
    except M3Error:
        return np.full(shape, np.nan, np.float32)


# --- in a trace ---------------------------------------------------------------------------------------------------


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _traced(rule: Rule, shape: tuple[int, ...], state: Products, parts: Float[Array, "3 k"]) -> Float[Array, "*shape"]:
    """The coefficients of weights, each the sum of three parts, known only to the trace: the bits are the host's."""
    value: Array = _call_back(rule, shape, False, state, parts)[0]
    return value


def _call_back(rule: Rule, shape: tuple[int, ...], slopes: bool, state: Products, parts: Any) -> Any:
    wide = (*shape, parts.shape[-1])

    def found(state: Products, parts: np.ndarray) -> list[np.ndarray]:
        weights = parts.astype(np.float64).sum(axis=0)  # of three terms, one after the other: exact
        value = _or_nan(lambda: _rounded(rule, state, weights), shape)
        return [value, _or_nan(lambda: _sloped(rule, state, weights), wide)] if slopes else [value]

    return on_host(found, [shape, wide] if slopes else [shape], state, parts)


@_traced.defjvp
def _traced_jvp(rule, shape, primals, tangents):  # type: ignore[no-untyped-def]
    value, slopes = _call_back(rule, shape, True, *primals)
    moved = tangents[1].sum(axis=0)
    return value, jnp.sum(slopes * moved.reshape((1,) * len(shape) + (-1,)), axis=-1)


# --- parts of methods ---------------------------------------------------------------------------------------------


def _conclude(
    coefficients: Coefficients, slopes: Coefficients, options: Any, state: Products, settings: Settings
) -> Float[Any, "*lines n"]:
    rule = Rule(coefficients, slopes, options)
    shape = (*state.largest.shape[:-1], len(settings.comparison))
    if any(isinstance(weight, Double) for weight in settings.weights):
        pairs = [Double.of(weight) for weight in settings.weights]
        parts = [(w.high, w.low, jnp.zeros_like(w.low) if w.rest is None else w.rest) for w in pairs]
        return _traced(rule, shape, state, jnp.stack([jnp.stack(own) for own in zip(*parts, strict=True)]))
    weights = np.array(settings.weights, np.float64)
    if not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(state)):
        return _rounded(rule, state, weights)
    return on_host(lambda found: [_or_nan(lambda: _rounded(rule, found, weights), shape)], [shape], state)[0]


def measure_coefficients(scope: str, coefficients: Coefficients, slopes: Coefficients | None = None) -> Measure:
    """The coefficients of a sum, from the experts' inner products.

    Args:
        scope: "tensor", "row" or "column": what they are told of.
        coefficients: The rule.
        slopes: One without jumps, where the rule has some: derivatives are taken from it.
    """
    return measure_products(_FOUND, scope, functools.partial(_conclude, coefficients, slopes or coefficients))


def _combine(scope: str, options: Any, values: Values, known: Known) -> Float[Array, "..."]:
    found = known.found[_FOUND]
    if scope == "tensor":
        return weighted_sum(found, values, known.zero)
    own = [found[..., i] for i in range(len(values))]
    lines = [each[..., None] if scope == "row" else each[None, :] for each in own]
    terms = [exact.multiply(line, value, known.zero) for line, value in zip(lines, values, strict=True)]
    return functools.reduce(exact.add, terms)


def _fold(options: Any, settings: Settings) -> None:
    return None  # the coefficients come from the inner products


_COMBINE = {scope: functools.partial(_combine, scope) for scope in ("tensor", "row", "column")}


def geometric(name: str, measure: Measure, **fields: Any) -> Method:
    """A method that is such a sum.

    Args:
        name: The method's.
        measure: Of `measure_coefficients`; one object for equal methods, which share compiled programs.
        **fields: More of `Method`.
    """
    fold = fields.pop("fold", _fold)
    return Method(name, fold, _COMBINE[measure.scope], measures=(measure,), sparsifies=False, **fields)
