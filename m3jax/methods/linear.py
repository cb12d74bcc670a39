"""Weighted sums: averages, M³, task arithmetic.

References:
    Wortsman et al., Model soups, 2022. Ilharco et al., Editing models with task arithmetic, 2023.
"""

import functools
from typing import Any

import numpy as np
from jaxtyping import Array, Float

from m3jax.arithmetic import double, exact
from m3jax.arithmetic.exact import Zero
from m3jax.errors import M3Error
from m3jax.methods.base import Fold, Method, Scalar, Scalars, Values


def fold_weights(fold: Fold, members: tuple[int, ...], normalize: bool) -> list[Scalar]:
    """Coefficient of each expert when `members` are those that count; 0 for the others.

    Where the weights of the members sum to exactly 0 they are taken as they are.
    """
    total: Scalar = functools.reduce(lambda a, b: a + b, [fold.weights[i] for i in members], 0.0)

    def coefficient(expert: int) -> Scalar:
        density = fold.densities[expert]
        if expert not in members or density == 0:
            return fold.weights[expert] * 0.0
        value = fold.weights[expert] * fold.scale / density
        return value / double.or_one(total) if normalize else value

    return [coefficient(i) for i in range(len(fold.weights))]


def stack(rows: list[Scalar]) -> Float[Any, " n"]:
    """Scalars rounded to float32 and stacked, on the host if all of them are there."""
    rounded = [double.to_float32(row) for row in rows]
    if all(isinstance(row, np.floating) for row in rounded):
        return np.array(rounded, np.float32)
    import jax.numpy as jnp

    return jnp.stack([jnp.asarray(row, jnp.float32) for row in rounded])


def _fold(method: Method, fold: Fold) -> Float[Any, " n"]:
    if method.normalize and all(isinstance(w, float) for w in fold.weights) and sum(fold.weights) == 0.0:
        weights = ", ".join(f"{w:g}" for w in fold.weights)
        raise M3Error(f"weights: {weights} sum to 0, so they cannot be normalised: change them or set normalize: false")
    return stack(fold_weights(fold, tuple(range(len(fold.weights))), method.normalize))


def weighted_sum(coefficients: Float[Array, " n"], values: Values, zero: Zero) -> Float[Array, "..."]:
    """Σ cᵢ·vᵢ in float32, expert 0 first."""
    terms = [exact.multiply(coefficients[i], value, zero) for i, value in enumerate(values)]
    return functools.reduce(exact.add, terms)


def _combine(method: Method, values: Values, scalars: Scalars, zero: Zero) -> Float[Array, "..."]:
    return weighted_sum(scalars.coefficients, values, zero)


def linear(normalize: bool = True, scale: float = 1.0) -> Method:
    """Weighted average of parameters, Σ wᵢxᵢ; with weights drawn by `mixup` this is M³.

    Args:
        normalize: Divide by Σ wᵢ.
        scale: λ, applied after normalisation.

    Example:
        >>> linear().name
        'linear'
    """
    return Method("linear", _fold, _combine, normalize=normalize, scale=scale)


def task_arithmetic(normalize: bool = False, scale: float = 1.0) -> Method:
    """base + λ·Σ wᵢδᵢ over task vectors δᵢ = xᵢ − base.

    Args:
        normalize: Divide the sum by Σ wᵢ.
        scale: λ.

    References:
        Ilharco et al., Editing models with task arithmetic, 2023.
    """
    return Method("task_arithmetic", _fold, _combine, uses_base=True, normalize=normalize, scale=scale)
