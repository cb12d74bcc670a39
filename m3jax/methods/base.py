"""What every merge method is made of: plain data and pure functions of leaves.

A leaf is one parameter array, or one flat chunk of it: methods are elementwise once the few scalars that depend on
more than one entry are known, so they cannot tell the difference.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Float, Int32, UInt32

from m3jax.arithmetic.exact import Zero
from m3jax.errors import M3Error

TARGETS = ("delta", "weights")
SCOPES = ("tensor", "model")

Values = tuple[Float[Array, "..."], ...]
"""One float32 array per expert, all of one shape."""

Index = tuple[UInt32[Array, "..."], UInt32[Array, "..."]]
"""High and low word of each entry's flat row-major index in its whole tensor."""

Scalar = Any
"""A host float, or a traced scalar (`m3jax.arithmetic.double.Double`)."""


class Scalars(NamedTuple):
    """The run-time scalars of one leaf; what a method does not use stays at its neutral value.

    Attributes:
        coefficients: What each expert is multiplied with: [n], or [2ⁿ, n] indexed by which experts agree (TIES).
        election: Factor of each expert in the election of a sign; None for ones.
        comparison: Factor that makes an expert's magnitudes comparable between tensors; None for ones.
        enlarge: 1/density where it cannot be folded into a coefficient (sparsified raw weights).
        mask_keys: Threefry keys of the leaf's mask streams.
        keep_below: DARE keeps an entry whose word is below this.
        keep_all: DARE keeps every entry of this expert.
        drop_below: The magnitude sparsifier keeps bits of |δ| at least this large.
        trim_below: TIES keeps bits of |δ̃| at least this large.
        tie_sign: The sign elected where the sum is exactly zero: −1, 0 or 1.
    """

    coefficients: Float[Any, "..."]
    election: Float[Any, " n"] | None
    comparison: Float[Any, " n"] | None
    enlarge: Float[Any, " n"]
    mask_keys: UInt32[Any, "pairs 2"]
    keep_below: UInt32[Any, " n"]
    keep_all: Any
    drop_below: UInt32[Any, " n"]
    trim_below: UInt32[Any, " n"]
    tie_sign: Int32[Any, ""]


class Fold(NamedTuple):
    """What the coefficients of a leaf are folded from: host floats, or traced scalars for the weights.

    Attributes:
        weights: One per expert.
        densities: What each expert's coefficient is divided by; 0 drops the expert.
        scale: λ of task arithmetic and TIES.
    """

    weights: Sequence[Scalar]
    densities: Sequence[float]
    scale: Scalar


class Method(NamedTuple):
    """A way to combine experts.

    Attributes:
        name: As in recipes.
        fold: `Fold` → the float32 coefficients, folded in float64 and rounded once.
        combine: Pure elementwise function (values, scalars, zero) → float32 array, before the base is added.
        uses_base: Works on task vectors, so it needs a base.
        normalize: Divide by the sum of the weights.
        scale: λ, applied after normalisation.
        density: Share of entries that trimming keeps, one number or one per expert; None for methods that never trim.
        trim_scope: "model" or "tensor": over what the magnitudes are ranked.
        sign_election: "unweighted", "weighted", or None for methods that elect no sign.
        interpolates: Takes a position t between two experts for its weights and needs their inner products (slerp).
    """

    name: str
    fold: Callable[["Method", Fold], Any]
    combine: Callable[["Method", Values, Scalars, Zero], Float[Array, "..."]]
    uses_base: bool = False
    normalize: bool = False
    scale: float = 1.0
    density: float | tuple[float, ...] | None = None
    trim_scope: str = "tensor"
    sign_election: str | None = None
    interpolates: bool = False


class Sparsifier(NamedTuple):
    """A way to drop entries of each expert before they are combined.

    Attributes:
        name: "dare" or "magnitude".
        apply: Pure elementwise function (values, scalars, index) → values with dropped entries made zero.
        density: Share of entries kept, one number or one per expert.
        target: "delta" (task vectors) or "weights" (the raw parameters).
        rescale: Divide what is kept by the density.
        scope: For "magnitude": "tensor" or "model".
    """

    name: str
    apply: Callable[[Values, Scalars, Index], Values]
    density: float | tuple[float, ...]
    target: str = "delta"
    rescale: bool = True
    scope: str = "tensor"


Density = float | tuple[float, ...]
"""One share of entries for all experts, or one for each."""


def plain_density(where: str, density: float | Sequence[float]) -> Density:
    """A density or several as hashable numbers.

    Raises:
        M3Error: One is not in [0, 1].
    """
    values = [density] if isinstance(density, int | float | np.number) else list(density)
    for value in values:
        if not 0 <= value <= 1:
            raise M3Error(f"{where}: density is {value:g}, but must lie between 0 and 1")
    numbers = tuple(float(value) for value in values)
    return numbers[0] if isinstance(density, int | float | np.number) else numbers


def per_expert(value: float | Sequence[float], num_experts: int) -> tuple[float, ...]:
    """One number per expert, of one number or of a sequence of them.

    Raises:
        M3Error: The sequence has another length.
    """
    if isinstance(value, int | float | np.floating):
        return (float(value),) * num_experts
    if len(value) != num_experts:
        raise M3Error(f"density: {len(value)} are given, but there are {num_experts} experts")
    return tuple(float(v) for v in value)
