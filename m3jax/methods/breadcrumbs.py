"""Model Breadcrumbs: drop the largest entries of each task vector, which are outliers, and the smallest.

References:
    Davari & Belilovsky, Model Breadcrumbs: Scaling multi-task model merging with sparse masks, 2023, arXiv 2312.06795.
"""

import jax.numpy as jnp

from m3jax.arithmetic import exact
from m3jax.methods.base import (
    Density,
    Known,
    Numbers,
    Sparsifier,
    Values,
    checked_share,
    checked_target,
    plain_density,
)
from m3jax.methods.magnitude import drops_some
from m3jax.methods.measures import rank_magnitudes


def _ranks(options: None, numbers: Numbers, size: int) -> list[tuple[int, int]]:
    """The ranks of the smallest and of the largest entry that each expert keeps."""
    found = []
    for density, gamma in zip(numbers["density"], numbers["gamma"], strict=True):
        kept = int(density * size)
        largest = min(int(gamma * size), size - kept)
        smallest = size - largest - kept
        # Rank 0 lies below everything; a rank beyond the last one above everything.
        found.append(
            (smallest + 1 if kept and smallest else 0 if kept else size + 1, size - largest if largest else size + 1)
        )
    return found


_MEASURES = (rank_magnitudes("kept", "tensor", _ranks, drops_some, "given"),)


def _fold(options: None, numbers: Numbers, shape: tuple[int, ...]) -> None:
    return None


def _apply(options: None, values: Values, known: Known) -> Values:
    kept = known.found.get("kept")
    if kept is None:
        return values
    magnitudes = [exact.magnitude_bits(value) for value in values]
    return tuple(
        jnp.where((bits >= kept[i, 0]) & (bits <= kept[i, 1]), value, 0.0)
        for i, (bits, value) in enumerate(zip(magnitudes, values, strict=True))
    )


def breadcrumbs(density: Density, gamma: Density = 0.01, target: str = "delta", rescale: bool = False) -> Sparsifier:
    """Drop the ⌊γN⌋ largest entries, and of the rest the smallest until ⌊dN⌋ are left; ties at a rank are kept.

    Where d + γ > 1, fewer of the largest are dropped.

    Args:
        density: d, the share of entries to keep, in [0, 1]; one number or one per expert. 0 keeps nothing.
        gamma: γ, the share of the largest entries to drop, in [0, 1]; one number or one per expert.
        target: Sparsify the "delta" (task vector) or the raw "weights".
        rescale: Divide what is kept by the density.

    Raises:
        M3Error: An argument is out of range.

    Example:
        >>> breadcrumbs(0.9).parameters
        (('density', 0.9), ('gamma', 0.01))

    References:
        Davari & Belilovsky, Model Breadcrumbs, 2023, arXiv 2312.06795.
    """
    return Sparsifier(
        "breadcrumbs",
        _apply,
        _fold,
        measures=_MEASURES,
        parameters=(
            ("density", plain_density("breadcrumbs", density)),
            ("gamma", checked_share("breadcrumbs", "gamma", gamma)),
        ),
        target=checked_target("breadcrumbs", target),
        rescale=rescale,
    )
