"""How much is lost: accuracy clean and attacked, and the performance drop rate with its interval."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 10_000


class Drop(NamedTuple):
    """What became of some examples.

    Attributes:
        examples: How many.
        clean: Share of them that was right before.
        attacked: Share of them that is right now.
        pdr: Performance drop rate, 1 − attacked / clean; None, undefined, where nothing was right before.
        interval: Its 95 % interval; None where it is undefined.
    """

    examples: int
    clean: float
    attacked: float
    pdr: float | None
    interval: tuple[float, float] | None


def measure_drop(clean: Sequence[bool], attacked: Sequence[bool], seed: int, resamples: int = RESAMPLES) -> Drop:
    """The performance drop rate with a percentile bootstrap interval over examples, clean and attacked in pairs.

    Resamples in which nothing was right before have no rate and are left out.

    Args:
        clean: Whether each example was right before; at least one example.
        attacked: Whether it is right now, in the same order.
        seed: Of the resampling.
        resamples: How many.

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
    if not right:
        return Drop(total, 0.0, left / total, None, None)
    # Examples matter by kind alone, so that a resample is one draw of how many there are of each of the four kinds.
    kinds = np.bincount(2 * pairs[0] + pairs[1], minlength=4)
    drawn = np.random.default_rng(seed).multinomial(total, kinds / total, size=resamples)
    before, after = drawn[:, 2] + drawn[:, 3], drawn[:, 1] + drawn[:, 3]
    rates = 1 - after[before > 0] / before[before > 0]
    low, high = np.quantile(rates, [0.025, 0.975]).tolist()
    return Drop(total, right / total, left / total, 1 - left / right, (low, high))
