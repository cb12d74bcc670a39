"""Consensus merging: task arithmetic on the entries that matter to several experts, as TALL-masks tell.

References:
    Wang et al., Localizing task information for improved model merging and compression, 2024, arXiv 2405.07813.
"""

import functools
import itertools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from m3jax.arithmetic import exact
from m3jax.errors import M3Error
from m3jax.methods.base import Density, Known, Method, Numbers, Settings, Values, checked_number
from m3jax.methods.linear import Sum, fold_sum, stack


class Consensus(NamedTuple):
    """Options of a consensus.

    Attributes:
        agreement: To how many experts an entry must matter.
        normalize: Divide by the sum of the weights.
    """

    agreement: int
    normalize: bool


class Contributions(NamedTuple):
    """What a leaf's numbers fold into.

    Attributes:
        weights: What each expert is multiplied with.
        limits: What the others' sum is multiplied with before an expert is compared with it.
    """

    weights: Float[Any, " n"]
    limits: Float[Any, " n"]


def _fold(options: Consensus, settings: Settings) -> Contributions:
    return Contributions(fold_sum(Sum(options.normalize), settings), stack(list(settings.method["tall_mask_lambda"])))


def _combine(options: Consensus, values: Values, known: Known) -> Float[Array, "..."]:
    weights, limits = known.scalars
    terms = [exact.multiply(weights[i], value, known.zero) for i, value in enumerate(values)]
    before = list(itertools.accumulate(terms, exact.add))
    after = list(itertools.accumulate(terms[::-1], exact.add))[::-1]
    # The multi-task vector without an expert: the sum of those before it and of those after it, nothing cancels.
    none = [jnp.zeros_like(terms[0])]
    others = [exact.add(a, b) for a, b in zip(none + before[:-1], after[1:] + none, strict=True)]
    matters = [
        jnp.abs(term) >= exact.multiply(limits[i], jnp.abs(other), known.zero)
        for i, (term, other) in enumerate(zip(terms, others, strict=True))
    ]
    agree = functools.reduce(jnp.add, [each.astype(jnp.int32) for each in matters])
    return jnp.where(agree >= options.agreement, before[-1], 0.0)


def _check(options: Consensus, numbers: Numbers) -> None:
    count = len(numbers["tall_mask_lambda"])
    if options.agreement > count:
        raise M3Error(
            f"consensus: agreement is {options.agreement}, but there {'is' if count == 1 else 'are'} {count} "
            f"expert{'' if count == 1 else 's'}: no entry matters to more than there are"
        )


def consensus(
    tall_mask_lambda: Density = 1.0, agreement: int = 2, normalize: bool = False, scale: float = 1.0
) -> Method:
    """base + λ·Σ wᵢδᵢ on the entries that matter to at least k experts; elsewhere the base.

    An entry matters to expert i where |wᵢδᵢ| ≥ λᵢ·|Σ wⱼδⱼ − wᵢδᵢ|: its TALL-mask. With k = 1 only entries that matter
    to nobody are dropped ("catastrophic" ones), with k = 2 also those that matter to one alone ("selfish" ones).

    Args:
        tall_mask_lambda: λᵢ, from 0: the larger, the fewer entries matter; one number or one per expert.
        agreement: k.
        normalize: Divide the sum by Σ wᵢ.
        scale: λ.

    Raises:
        M3Error: λᵢ is below 0, or k is no whole number from 1 to the number of experts.

    References:
        Wang et al., Localizing task information for improved model merging and compression, 2024, arXiv 2405.07813.
    """
    least = checked_number("consensus", "agreement", agreement, low=1.0)
    if least != int(agreement):
        raise M3Error(f"consensus: agreement is {agreement:g}, but must be a whole number of experts")
    return Method(
        "consensus",
        _fold,
        _combine,
        options=Consensus(int(agreement), normalize),
        parameters=(("tall_mask_lambda", checked_number("consensus", "tall_mask_lambda", tall_mask_lambda, low=0.0)),),
        uses_base=True,
        scale=scale,
        sparsifies=False,
        check=_check,
    )
