"""How much is lost: accuracy clean and attacked, and the performance drop rate with its interval."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from m3jax.evaluation.statistics import wilson_interval

RESAMPLES = 10_000

FLOOR = 0.05
"""Clean accuracy below which a drop rate is undefined: of next to nothing nothing can be lost that means anything."""


class Drop(NamedTuple):
    """What became of some examples.

    Attributes:
        examples: How many.
        clean: Share of them that was right before.
        attacked: Share of them that is right now.
        pdr: Performance drop rate, 1 − attacked / clean; None, undefined, where next to nothing was right before.
        interval: Its 95 % interval; None where it is undefined.
    """

    examples: int
    clean: float
    attacked: float
    pdr: float | None
    interval: tuple[float, float] | None


def is_defined(clean: float, floor: float = FLOOR) -> bool:
    """Whether a model is right often enough for a drop rate.

    Args:
        clean: Its clean accuracy.
        floor: The least that is enough, where that is above 0.
    """
    return clean > 0 and clean >= floor


def measure_drop(
    clean: Sequence[bool],
    attacked: Sequence[bool],
    seed: int,
    resamples: int = RESAMPLES,
    floor: float = FLOOR,
) -> Drop:
    """The performance drop rate with a percentile bootstrap interval over examples, clean and attacked in pairs.

    Resamples in which nothing was right before have no rate and are left out. Where all others have one rate (nothing
    was lost, or all), Wilson's interval of what is left of that which was right takes their place, so that no interval
    of finite data is a point.

    Args:
        clean: Whether each example was right before; at least one example.
        attacked: Whether it is right now, in the same order.
        seed: Of the resampling.
        resamples: How many.
        floor: Clean accuracy below which the rate is undefined.

    Example:
        >>> drop = measure_drop([True, True, True, False], [True, False, False, False], seed=0)
        >>> drop.clean, drop.attacked, round(drop.pdr, 3)
        (0.75, 0.25, 0.667)

    References:
        Zhu et al., PromptBench, 2023; Efron, Bootstrap Methods: Another Look at the Jackknife, 1979.
    """
    pairs = np.stack([np.asarray(clean, bool), np.asarray(attacked, bool)]).astype(np.int64)
    total = pairs.shape[1]
    right, left = (int(count) for count in pairs.sum(axis=1))
    if not is_defined(right / total, floor):
        return Drop(total, right / total, left / total, None, None)
    # Examples matter by kind alone, so that a resample is one draw of how many there are of each of the four kinds.
    kinds = np.bincount(2 * pairs[0] + pairs[1], minlength=4)
    drawn = np.random.default_rng(seed).multinomial(total, kinds / total, size=resamples)
    before, after = drawn[:, 2] + drawn[:, 3], drawn[:, 1] + drawn[:, 3]
    rates = 1 - after[before > 0] / before[before > 0]
    low, high = np.quantile(rates, [0.025, 0.975]).tolist()
    if low == high:
        least, most = wilson_interval(min(left, right), right)
        low, high = min(low, 1 - most), max(high, 1 - least)
    return Drop(total, right / total, left / total, 1 - left / right, (low, high))
