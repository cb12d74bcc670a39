"""Weighted sums: averages, M³, task arithmetic.

References:
    Wortsman et al., Model soups, 2022. Ilharco et al., Editing models with task arithmetic, 2023.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Float

from m3jax.arithmetic import double, exact
from m3jax.arithmetic.exact import Zero
from m3jax.errors import M3Error
from m3jax.methods.base import Known, Method, Scalar, Settings, Values


class Sum(NamedTuple):
    """Options of a weighted sum.

    Attributes:
        normalize: Divide by the sum of the weights.
    """

    normalize: bool


def fold_weights(settings: Settings, members: tuple[int, ...], normalize: bool) -> list[Scalar]:
    """Coefficient of each expert when `members` are those that count; 0 for the others.

    Where the weights of the members sum to exactly 0 they are taken as they are.
    """
    total: Scalar = functools.reduce(lambda a, b: a + b, [settings.weights[i] for i in members], 0.0)

    def coefficient(expert: int) -> Scalar:
        divisor = settings.divisors[expert]
        if expert not in members or divisor == 0:
            return settings.weights[expert] * 0.0
        value = settings.weights[expert] * settings.scale / divisor
        return value / double.or_one(total) if normalize else value

    return [coefficient(i) for i in range(len(settings.weights))]


def stack(rows: Sequence[Scalar]) -> Float[Any, " n"]:
    """Scalars rounded to float32 and stacked, on the host if all of them are there."""
    rounded = [double.to_float32(row) for row in rows]
    if all(isinstance(row, np.floating) for row in rounded):
        return np.array(rounded, np.float32)
    import jax.numpy as jnp

    return jnp.stack([jnp.asarray(row, jnp.float32) for row in rounded])


def check_normalizer(weights: Sequence[Scalar], otherwise: str | None) -> None:
    """Raise M3Error where weights that are known sum to 0, so that nothing can be divided by their sum.

    Args:
        weights: One per expert.
        otherwise: What to set where they are not to be divided; None if they always are.
    """
    if all(isinstance(w, float) for w in weights) and sum(weights) == 0.0:
        said = ", ".join(f"{w:g}" for w in weights)
        mend = "change them" if otherwise is None else f"change them or set {otherwise}"
        raise M3Error(f"weights: {said} sum to 0, so they cannot be normalised: {mend}")


def fold_sum(options: Sum, settings: Settings) -> Float[Any, " n"]:
    """The coefficient of each expert.

    Raises:
        M3Error: The weights sum to 0 and are to be normalised.
    """
    weights = settings.weights
    if options.normalize:
        check_normalizer(weights, "normalize: false")
    return stack(fold_weights(settings, tuple(range(len(weights))), options.normalize))


def weighted_sum(
    coefficients: Float[Array, " n"] | Sequence[Float[Array, "..."]], values: Sequence[Float[Array, "..."]], zero: Zero
) -> Float[Array, "..."]:
    """Σ cᵢ·vᵢ in float32, expert 0 first; a coefficient is one number, or one for each entry."""
    terms = [exact.multiply(coefficients[i], value, zero) for i, value in enumerate(values)]
    return functools.reduce(exact.add, terms)


def combine_sum(options: Sum, values: Values, known: Known) -> Float[Array, "..."]:
    """Σ cᵢ·vᵢ with the coefficients that were folded."""
    return weighted_sum(known.scalars, values, known.zero)


def linear(normalize: bool = True, scale: float = 1.0) -> Method:
    """Weighted average of parameters, Σ wᵢxᵢ; with weights drawn by `mixup` this is M³.

    Args:
        normalize: Divide by Σ wᵢ.
        scale: λ, applied after normalisation.

    Example:
        >>> linear().name
        'linear'
    """
    return Method("linear", fold_sum, combine_sum, options=Sum(normalize), scale=scale, transparent=True)


def task_arithmetic(normalize: bool = False, scale: float = 1.0) -> Method:
    """base + λ·Σ wᵢδᵢ over task vectors δᵢ = xᵢ − base.

    Args:
        normalize: Divide the sum by Σ wᵢ.
        scale: λ.

    References:
        Ilharco et al., Editing models with task arithmetic, 2023.
    """
    return Method(
        "task_arithmetic",
        fold_sum,
        combine_sum,
        options=Sum(normalize),
        uses_base=True,
        scale=scale,
        transparent=True,
    )
