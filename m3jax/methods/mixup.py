"""M³: merging weights that are drawn, λ ~ Beta(α, α), from the bits of a key and nothing else.

References:
    Zhou et al., Mixup Model Merge: Enhancing model merging performance through randomized linear interpolation,
    arXiv 2502.15434, 2025.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float

from m3jax.arithmetic import threefry
from m3jax.errors import M3Error
from m3jax.methods.measures import on_host

GRANULARITIES = ("model", "layer", "tensor")


class Mixup(NamedTuple):
    """How merging weights are drawn.

    Attributes:
        alpha: The concentration α of Beta(α, α), or of the symmetric Dirichlet for more than two experts; or the two
            shape parameters (a, b) of a Beta, for exactly two experts.
        granularity: One draw for the whole "model", one per transformer block ("layer"), or one per "tensor".
        smooth: The correlation of neighbouring blocks, of granularity "layer".
        sample: Which sample of an exploration; None for the draw of a merge.
    """

    alpha: float | tuple[float, float] = 0.5
    granularity: str = "model"
    smooth: float = 0.0
    sample: Any = None


def mixup(
    alpha: float | tuple[float, float] = 0.5, granularity: str = "model", *, smooth: float = 0.0, sample: Any = None
) -> Mixup:
    """Weights drawn by M³, from the key that a merge is given; those of a recipe with the same keys and seed.

    Args:
        alpha: See `Mixup`.
        granularity: See `Mixup`.
        smooth: See `Mixup`; in [0, 1).
        sample: The weights of sample k of `m3jax.explore`, by its strategy "draw"; an integer, which may be traced.
            Sample 0 is the key's own draw, and masks are those of the key, whatever the sample.

    Raises:
        M3Error: `alpha` is not positive and finite, the granularity is unknown, `smooth` is none of layers.

    Example:
        >>> mixup(alpha=0.5).granularity
        'model'
    """
    shapes = alpha if isinstance(alpha, tuple | list) else (alpha,)
    if len(shapes) not in (1, 2) or not _are_shapes(shapes):
        raise M3Error(f"mixup: alpha is {alpha}, but must be a positive number or a pair of them")
    if granularity not in GRANULARITIES:
        raise M3Error(f"mixup: granularity is {granularity!r}, but must be one of {', '.join(GRANULARITIES)}")
    if not 0 <= smooth < 1:
        raise M3Error(f"mixup: smooth is {smooth}, but must be at least 0 and below 1")
    if smooth and granularity != "layer":
        raise M3Error(f'mixup: smooth is of neighbouring layers, but granularity is {granularity!r}: give "layer"')
    return Mixup(tuple(shapes) if len(shapes) == 2 else shapes[0], granularity, float(smooth), sample)  # type: ignore[arg-type]


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
    """The p-quantile of Beta(a, b), computed in float64 and rounded to float32; below 2⁻¹²⁵ it is 0.

    SciPy's inverse of the regularised incomplete beta function; the manifest stores what came out, so that a replay
    does not depend on it.
    """
    from scipy.special import betaincinv

    found = np.asarray(betaincinv(a, b, p))
    # Threads in which XLA runs flush what is subnormal, also where a program calls the host back.
    return np.where(found < 2.0**-125, 0.0, found).astype(np.float32)


def group_key(key: Any, group: str | None) -> threefry.Words:
    """The key from which the weights of `group` are drawn; `None` is the whole model."""
    words = threefry.key_words(key)
    if not isinstance(words, np.ndarray):
        raise TypeError("the key is traced: take m3jax.mixup_weights, or m3jax.merge(..., weights=m3jax.mixup(alpha))")
    if words.shape != (2,):
        raise M3Error(f"mixup: there are keys of shape {list(words.shape[:-1])}: m3jax.mixup_weights takes several")
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
    _check_draw(alpha, num_experts)
    words = group_key(key, group)
    return weights_at([float(uniform(words, stick)) for stick in range(num_experts - 1)], alpha)


def _check_draw(alpha: Any, num_experts: int) -> None:
    if isinstance(alpha, tuple | list) and num_experts != 2:
        raise M3Error(
            f"mixup: alpha has two shape parameters {tuple(alpha)}, which define a draw for two experts, "
            f"but there are {num_experts}: give one number"
        )
    shapes = alpha if isinstance(alpha, tuple | list) else (alpha, alpha)
    if len(shapes) != 2 or not _are_shapes(shapes):
        raise M3Error(f"mixup: alpha is {alpha!r}, but must be a number above 0, or two of them")


def _are_shapes(numbers: Sequence[Any]) -> bool:
    """Whether numbers can be shape parameters of a Beta."""
    return all(isinstance(a, int | float | np.number) and 0 < a < np.inf for a in numbers)


def root_of(key: Any, sample: Any = None) -> threefry.Words:
    """The words that weights are drawn from: of a key, or of a sample of an exploration with that key.

    Args:
        key: An integer seed, or one threefry2x32 key.
        sample: Its number; None for the key's own, which sample 0 is too.

    Returns:
        uint32[2], of numpy where key and sample are known, else traced.

    Raises:
        M3Error: There are several keys, or the sample is no number from 0 on.
    """
    words = threefry.key_words(key)
    if words.shape != (2,):
        raise M3Error(
            f"mixup: there are keys of shape {list(words.shape[:-1])}: give one, or map over them by jax.vmap"
        )
    if sample is None:
        return words
    if isinstance(sample, jax.core.Tracer):
        if sample.shape != () or not np.issubdtype(sample.dtype, np.integer):
            raise M3Error(f"mixup: sample is traced, {sample.dtype}{list(sample.shape)}: give one integer")
        return threefry.sample_key(words, sample)
    number = np.asarray(sample)
    if number.shape != () or number.dtype.kind not in "iu" or not 0 <= number < 2**32:
        raise M3Error(f"mixup: sample is {sample!r}, but must be one integer from 0 on")
    return threefry.sample_key(words, int(number))


def mixup_weights(
    key: Any,
    alpha: float | tuple[float, float] = 0.5,
    num_experts: int = 2,
    group: str | None = None,
    *,
    sample: Any = None,
) -> Float[Any, "*batch n"]:
    """Merging weights for many keys or samples at once, or from a key that is traced.

    On the host the numbers are those of `draw_weights`. In a program (under `jit`, `vmap`, `scan`, `shard_map`) the
    host is called back to draw them, which costs some tenths of a millisecond and is no operation that `jax.export` can
    write; there each is rounded to float32. For the bits of a merge whose weights are drawn, rather give
    `weights=mixup(alpha)` and the key to `m3jax.merge`.

    Args:
        key: An integer seed, a threefry2x32 key, or an array of keys.
        alpha: As for `draw_weights`.
        num_experts: As for `draw_weights`.
        group: As for `draw_weights`.
        sample: Samples of an exploration with these keys, an integer or an array of them, as `mixup` takes it; None
            for the keys' own draws.

    Returns:
        One row for each key, or key and sample where both broadcast: float64 of numpy where they are known, else
        float32.

    Raises:
        M3Error: As `draw_weights`, or a sample is no integer from 0 on.

    Example:
        >>> mixup_weights(7, alpha=0.5, sample=range(3)).shape
        (3, 2)
        >>> keys = jax.random.split(jax.random.key(0, impl="threefry2x32"), 4)
        >>> drawn = jax.vmap(mixup_weights)(keys)
        >>> bool((drawn == mixup_weights(keys).astype(np.float32)).all())
        True
    """
    _check_draw(alpha, num_experts)
    words = threefry.key_words(key)
    if isinstance(words, jax.core.Tracer) or isinstance(sample, jax.core.Tracer):

        def found(roots: np.ndarray) -> list[np.ndarray]:
            return [mixup_weights(roots, alpha, num_experts, group).astype(np.float32)]

        drawn: Array = on_host(found, [(num_experts,)], root_of(words, sample), batched=True)[0]
        return drawn
    samples = np.asarray(-1 if sample is None else sample)
    if samples.size and samples.dtype.kind not in "iu":
        raise M3Error(f"mixup: sample is {sample!r}, but must be integers from 0 on")
    shape = np.broadcast_shapes(words.shape[:-1], samples.shape)
    rows, numbers = np.broadcast_to(words, (*shape, 2)).reshape(-1, 2), np.broadcast_to(samples, shape).reshape(-1)
    roots = [root_of(row, None if sample is None else number) for row, number in zip(rows, numbers, strict=True)]
    weights = [draw_weights(root, alpha, num_experts, group) for root in roots]
    return np.array(weights, np.float64).reshape(*shape, num_experts)


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
        fraction = float(beta_quantile(np.float64(probability), *_stick(alpha, len(p) - stick)))
        weights.append(rest * fraction)
        rest *= 1.0 - fraction
    return (*weights, rest)


def point_of(weights: Sequence[float], alpha: float | tuple[float, float]) -> tuple[float, ...]:
    """The point of the unit cube at which weights lie: what `weights_at` is given for them, up to its rounding.

    Args:
        weights: Two or more, above 0, with the sum 1.
        alpha: As for `draw_weights`.

    Example:
        >>> point_of((0.5, 0.5), alpha=2.0)
        (0.5,)
    """
    from scipy.special import betainc

    point, rest = [], 1.0
    for place, weight in enumerate(weights[:-1]):
        point.append(float(betainc(*_stick(alpha, len(weights) - 1 - place), weight / rest)))
        rest -= weight
    return tuple(point)


def _stick(alpha: float | tuple[float, float], left: int) -> tuple[float, float]:
    """The shapes of the Beta that a stick's fraction follows, where so many are left to break."""
    return (alpha[0], alpha[1]) if isinstance(alpha, tuple | list) else (alpha, alpha * left)


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


def draw_groups(
    weighting: str,
    key: Any,
    alpha: float | tuple[float, float],
    num_experts: int,
    groups: Iterable[str | None],
    walks: Iterable[Mapping[int, str]] = (),
    smooth: float = 0.0,
) -> dict[str | None, tuple[float, ...]]:
    """What M³ draws for all groups of a model.

    Args:
        weighting: As for `draw`.
        key: As for `draw`.
        alpha: As for `draw`.
        num_experts: As for `draw`.
        groups: Those that weights are drawn for; None is the whole model.
        walks: Of each tower the groups of its blocks, by their numbers, as `draw_walk` takes them.
        smooth: Their correlation; 0 for none.

    Returns:
        Weights by group.
    """
    drawn = {group: draw(weighting, key, alpha, num_experts, group) for group in groups}
    for blocks in walks if smooth else ():
        walked = draw_walk(key, alpha, num_experts, blocks, smooth)
        drawn |= {group: weights[: len(drawn[group])] for group, weights in walked.items() if group in drawn}
    return drawn
