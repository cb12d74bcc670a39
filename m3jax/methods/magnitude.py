"""Dropping the smallest entries."""

import jax.numpy as jnp

from m3jax.arithmetic import exact
from m3jax.errors import M3Error
from m3jax.methods.base import (
    SCOPES,
    Density,
    Known,
    Numbers,
    Sparsifier,
    Values,
    checked_target,
    plain_density,
)
from m3jax.methods.measures import always, rank_magnitudes


def dropped_below(options: object, numbers: Numbers, size: int) -> list[tuple[int]]:
    """The rank of each expert's smallest entry that is kept, ⌊N·(1 − density)⌋; of density 0 none is."""
    return [(int(size * (1.0 - density)) if density else size + 1,) for density in numbers["density"]]


def drops_some(options: object, numbers: Numbers) -> bool:
    """Whether any expert's density is below 1."""
    return min(numbers["density"]) < 1.0


_MEASURES = {
    scope: (rank_magnitudes("threshold", scope, dropped_below, drops_some if scope == "tensor" else always, "given"),)
    for scope in SCOPES
}


def _fold(options: None, numbers: Numbers, shape: tuple[int, ...]) -> None:
    return None


def _apply(options: None, values: Values, known: Known) -> Values:
    threshold = known.found.get("threshold")
    if threshold is None:
        return values
    return tuple(
        jnp.where(exact.magnitude_bits(value) >= threshold[i, 0], value, 0.0) for i, value in enumerate(values)
    )


def magnitude(density: Density, target: str = "delta", rescale: bool = False, scope: str = "tensor") -> Sparsifier:
    """Keep the largest entries: those of magnitude at least the ⌊N·(1 − density)⌋-th smallest; ties are kept.

    Args:
        density: Share of entries to keep, in [0, 1]; one number or one per expert. 0 keeps nothing.
        target: Sparsify the "delta" (task vector) or the raw "weights".
        rescale: Divide what is kept by the density.
        scope: N entries of each "tensor", or of the whole "model".

    Raises:
        M3Error: An argument is out of range.
    """
    if scope not in SCOPES:
        raise M3Error(f"magnitude: scope is {scope!r}, but must be 'tensor' or 'model'")
    return Sparsifier(
        "magnitude",
        _apply,
        _fold,
        measures=_MEASURES[scope],
        parameters=(("density", plain_density("magnitude", density)),),
        target=checked_target("magnitude", target),
        rescale=rescale,
    )
