"""M³: merging weights that are drawn, λ ~ Beta(α, α), from the bits of a key and nothing else.

References:
    Zhou et al., Mixup Model Merge: Enhancing model merging performance through randomized linear interpolation,
    arXiv 2502.15434, 2025.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from m3jax.arithmetic import threefry
from m3jax.errors import M3Error

GRANULARITIES = ("model", "layer", "tensor")


class Mixup(NamedTuple):
    """How merging weights are drawn.

    Attributes:
        alpha: The concentration α of Beta(α, α), or of the symmetric Dirichlet for more than two experts; or the two
            shape parameters (a, b) of a Beta, for exactly two experts.
        granularity: One draw for the whole "model", one per transformer block ("layer"), or one per "tensor".
    """

    alpha: float | tuple[float, float] = 0.5
    granularity: str = "model"


def mixup(alpha: float | tuple[float, float] = 0.5, granularity: str = "model") -> Mixup:
    """Weights drawn by M³.

    Args:
        alpha: See `Mixup`.
        granularity: See `Mixup`.

    Raises:
        M3Error: `alpha` is not positive and finite, or the granularity is unknown.

    Example:
        >>> mixup(alpha=0.5)
        Mixup(alpha=0.5, granularity='model')
    """
    shapes = alpha if isinstance(alpha, tuple | list) else (alpha,)
    if len(shapes) not in (1, 2) or not all(np.isfinite(a) and a > 0 for a in shapes):
        raise M3Error(f"mixup: alpha is {alpha}, but must be a positive number or a pair of them")
    if granularity not in GRANULARITIES:
        raise M3Error(f"mixup: granularity is {granularity!r}, but must be one of {', '.join(GRANULARITIES)}")
    return Mixup(tuple(shapes) if len(shapes) == 2 else shapes[0], granularity)  # type: ignore[arg-type]


def uniform(key: threefry.Words, draw: int) -> np.ndarray:
    """A number in (0, 1] with 64 random bits: the words of counter (0, draw) under `key`, in float64.

    Args:
        key: uint32[2, ...] on the host: one key, or many at once.
        draw: Which number of this key's stream.

    Returns:
        float64[...].
    """
    with np.errstate(over="ignore"):
        u, v = threefry.threefry2x32((key[0], key[1]), (np.uint32(0), np.uint32(draw)))
    return np.asarray((u.astype(np.float64) * 2.0**32 + v.astype(np.float64) + 0.5) / 2.0**64)


def beta_quantile(p: np.ndarray | np.float64, a: float, b: float) -> np.ndarray:
    """The p-quantile of Beta(a, b), computed in float64 and rounded to float32.

    SciPy's inverse of the regularised incomplete beta function; the manifest stores what came out, so that a replay
    does not depend on it.
    """
    from scipy.special import betaincinv

    return np.asarray(betaincinv(a, b, p)).astype(np.float32)


def group_key(key: Any, group: str | None) -> threefry.Words:
    """The key from which the weights of `group` are drawn; `None` is the whole model."""
    words = threefry.key_words(key)
    if not isinstance(words, np.ndarray):
        raise TypeError("weights are drawn on the host: call m3jax.draw_weights outside of jit and pass them in")
    root = threefry.fold_in(words, threefry.WEIGHTS)
    return root if group is None else threefry.fold_in_name(root, group)


def draw_weights(
    key: Any, alpha: float | tuple[float, float], num_experts: int = 2, group: str | None = None
) -> tuple[float, ...]:
    """Merging weights drawn from a symmetric Dirichlet by stick-breaking; for two experts, (λ, 1 − λ), λ ~ Beta.

    Args:
        key: An integer seed or a threefry2x32 key, known on the host.
        alpha: The concentration, or the two shape parameters of the Beta (two experts only).
        num_experts: n ≥ 2.
        group: The transformer block or tensor the weights are for; None for the whole model.

    Returns:
        n numbers that sum to one; each stick's fraction is a float32, the arithmetic on them is float64.

    Raises:
        M3Error: Two shape parameters for other than two experts, or one that is no number above 0.

    Example:
        >>> a, b = draw_weights(0, alpha=0.5)
        >>> a + b
        1.0
    """
    if isinstance(alpha, tuple | list) and num_experts != 2:
        raise M3Error(
            f"mixup: alpha has two shape parameters {tuple(alpha)}, which define a draw for two experts, "
            f"but there are {num_experts}: give one number"
        )
    shapes = alpha if isinstance(alpha, tuple | list) else (alpha,)
    if len(shapes) > 2 or not all(isinstance(a, int | float | np.number) and 0 < a < np.inf for a in shapes):
        raise M3Error(f"mixup: alpha is {alpha!r}, but must be a number above 0, or two of them")
    words = group_key(key, group)
    return weights_at([float(uniform(words, stick)) for stick in range(num_experts - 1)], alpha)


def weights_at(p: Sequence[float], alpha: float | tuple[float, float]) -> tuple[float, ...]:
    """The weights that lie at a point of the unit cube: stick-breaking by the quantiles of the sticks' Betas.

    Args:
        p: One probability per stick; uniform ones give Dirichlet weights.
        alpha: As for `draw_weights`.

    Returns:
        One weight more than there are sticks.

    Example:
        >>> weights_at([0.5], alpha=2.0)
        (0.5, 0.5)
    """
    weights, rest = [], 1.0
    for stick, probability in enumerate(p):
        a, b = alpha if isinstance(alpha, tuple | list) else (alpha, alpha * (len(p) - stick))
        fraction = float(beta_quantile(np.float64(probability), a, b))
        weights.append(rest * fraction)
        rest *= 1.0 - fraction
    return (*weights, rest)


def likelihood_of_one(alpha: float | tuple[float, float], num_experts: int, share: float) -> float:
    """How likely a draw is to give one expert more than a share of the whole.

    Args:
        alpha: As for `draw_weights`.
        num_experts: n ≥ 2.
        share: At least ½, so that no two experts can have it at once.

    Example:
        >>> round(likelihood_of_one(0.5, 2, 0.95), 3)
        0.287
    """
    from scipy.special import betainc

    if isinstance(alpha, tuple | list):
        a, b = alpha
        return float(betainc(a, b, 1.0 - share) + betainc(b, a, 1.0 - share))
    # Each weight of a symmetric Dirichlet is Beta(α, (n − 1)·α).
    return float(num_experts * betainc(alpha * (num_experts - 1), alpha, 1.0 - share))


def draw_walk(
    key: Any,
    alpha: float | tuple[float, float],
    num_experts: int,
    blocks: Mapping[int, str],
    smooth: float,
) -> dict[str, tuple[float, ...]]:
    """Merging weights of blocks that share a random walk, each block's distributed as `draw_weights` has it.

    Each stick of each block is a standard normal number, `smooth` times its neighbour's and the rest its own; the Beta
    quantile is taken at that number's probability. Without `smooth` these are the weights of `draw_weights`.

    Args:
        key: As for `draw_weights`.
        alpha: As for `draw_weights`.
        num_experts: As for `draw_weights`.
        blocks: The group of each block, by its number; numbers that are absent are walked past.
        smooth: The correlation of neighbours, in [0, 1).

    Returns:
        Weights by group.

    Example:
        >>> draw_walk(0, 0.5, 2, {3: "layers.3"}, 0.9)["layers.3"] == draw_weights(0, 0.5, 2, "layers.3")
        True
    """
    from scipy.special import ndtr, ndtri

    found, before, last = {}, np.zeros(num_experts - 1), None
    for number in sorted(blocks):
        words = group_key(key, blocks[number])
        p = np.array([float(uniform(words, stick)) for stick in range(num_experts - 1)])
        own = ndtri(np.clip(p, 2.0**-64, 1.0 - 2.0**-53))
        shared = 0.0 if last is None else smooth ** (number - last)
        if shared:
            before = shared * before + np.sqrt(1.0 - shared * shared) * own
            p = ndtr(before)
        else:
            before = own
        found[blocks[number]] = weights_at([float(each) for each in p], alpha)
        last = number
    return found


def draw_position(key: Any, alpha: float | tuple[float, float], group: str | None = None) -> float:
    """The position t ~ Beta(α, α) between two models, for methods that take one (slerp).

    Args:
        key: As for `draw_weights`.
        alpha: As for `draw_weights`.
        group: As for `draw_weights`.
    """
    return draw_weights(key, alpha, 2, group)[0]


def draw(
    weighting: str, key: Any, alpha: float | tuple[float, float], num_experts: int, group: str | None
) -> tuple[float, ...]:
    """What M³ draws for a method.

    Args:
        weighting: As `Method.weighting`.
        key: As for `draw_weights`.
        alpha: As for `draw_weights`.
        num_experts: How many are merged.
        group: As for `draw_weights`.

    Raises:
        M3Error: The method takes no weights.
    """
    if weighting == "none":
        raise M3Error("mixup: draws weights, but this method takes none: leave mixup out or take another method")
    if weighting == "position":
        return (draw_position(key, alpha, group),)
    return draw_weights(key, alpha, num_experts, group)
