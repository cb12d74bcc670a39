"""Which weights are tried next: independent draws, quasi-random points, a grid, successive halving, CMA-ES.

A strategy is a generator: it yields batches of trials, is sent their values, and ends when its budget is spent. It has
no state beside that, so that a journal of values brings it back to where it was.

References:
    Owen, Scrambling Sobol' and Niederreiter–Xing points, 1998. Jamieson & Talwalkar, Non-stochastic best arm
    identification and hyperparameter optimization, 2016. Hansen, The CMA evolution strategy: a tutorial, 2016,
    arXiv 1604.00772. Lange, evosax, 2022, arXiv 2212.04180.
"""

import itertools
import math
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from m3jax.arithmetic import threefry
from m3jax.errors import M3Error
from m3jax.evaluation.checks import check_whole
from m3jax.exploration.samples import Space, Weights, at_point, drawn, equal_weights, everywhere


class Trial(NamedTuple):
    """One evaluation to do.

    Attributes:
        sample: The number of the weights; the same weights may be tried on more examples later.
        weights: The weights.
        share: Of the dev examples to evaluate on; also what the trial costs.
    """

    sample: int
    weights: Weights
    share: float = 1.0


Strategy = Generator[list[Trial], list[float], None]
"""Yields trials, is sent their values, larger being better."""


def _draws(space: Space, budget: int) -> Strategy:
    for sample in range(budget):
        yield [Trial(sample, drawn(space, sample))]


def _chance(space: Space, *purpose: int) -> np.random.Generator:
    """Random numbers of a recipe's seed."""
    key = threefry.fold_in(space.root, threefry.SAMPLES)
    return np.random.Generator(np.random.PCG64([*(int(word) for word in key), *purpose]))


def _sobol_points(space: Space) -> Iterator[np.ndarray]:
    """Scrambled Sobol points of the unit cube, without end.

    They are asked for one by one, so that a larger budget goes on where a smaller one ended.
    """
    from scipy.stats import qmc

    if space.dimensions > qmc.Sobol.MAXDIM:
        raise M3Error(
            f"sobol: there are {space.dimensions} ratios to draw, but Sobol points have at most {qmc.Sobol.MAXDIM}: "
            "take the strategy draw, or mixup.granularity: layer"
        )
    points = qmc.Sobol(space.dimensions, scramble=True, rng=_chance(space))
    while True:
        yield points.random(1)[0]


def _quasi_random(space: Space, budget: int) -> Strategy:
    for sample, point in zip(range(budget), _sobol_points(space), strict=False):
        yield [Trial(sample, at_point(space, point))]


def _lattice(num_experts: int, budget: int) -> Iterator[tuple[float, ...]]:
    """The finest even grid on the simplex that has at most `budget` points."""
    steps = 0
    while math.comb(steps + num_experts, num_experts - 1) <= budget:
        steps += 1
    if steps == 0:
        yield (1.0 / num_experts,) * num_experts
        return
    for bars in itertools.combinations(range(steps + num_experts - 1), num_experts - 1):
        edges = (-1, *bars, steps + num_experts - 1)
        yield tuple((after - before - 1) / steps for before, after in itertools.pairwise(edges))


def _grid(space: Space, budget: int) -> Strategy:
    for sample, weights in enumerate(_lattice(space.num_experts, budget)):
        yield [Trial(sample, everywhere(space, weights))]


def _rounds(budget: int) -> list[tuple[int, float]]:
    """How many candidates each round has, and on which share of the examples: at most `budget` whole evaluations."""

    def cost(first: int, rounds: int) -> Fraction:
        return sum((Fraction(first >> i, 2 ** (rounds - 1 - i)) for i in range(rounds)), Fraction(0))

    for rounds in (4, 3, 2):
        first = max((n for n in range(2 * rounds * budget) if cost(n, rounds) <= budget), default=0)
        if first >= 2**rounds:  # the last round compares two or more
            return [(first >> i, 2.0 ** (i + 1 - rounds)) for i in range(rounds)]
    return [(budget, 1.0)]


def _halving(space: Space, budget: int) -> Strategy:
    schedule = _rounds(budget)
    alive = [Trial(sample, drawn(space, sample)) for sample in range(schedule[0][0])]
    for count, share in schedule:
        alive = [trial._replace(share=share) for trial in alive[:count]]
        values: list[float] = []
        for trial in alive:
            values += yield [trial]
        ranked = sorted(range(len(alive)), key=lambda place: (-values[place], place))
        alive = [alive[place] for place in ranked]


def _evosax(name: str = "cma") -> Any:
    try:
        from evosax.algorithms import CMA_ES
    except ImportError as error:
        raise M3Error(
            f"{name}: needs evosax, which is not installed: pip install 'm3jax[explore]', or take the strategy draw"
        ) from error
    return CMA_ES


@contextmanager
def _as_evosax_computes() -> Iterator[None]:
    """One device, whatever mesh there is, and the promotions that evosax's own arithmetic asks for."""
    import jax

    device = jax.local_devices()[0]
    with jax.default_device(device), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def _generations(space: Space, first: int, last: int, population: int) -> Strategy:
    """CMA-ES on normal variables whose first generation, mean 0 and spread 1, has the draws' own distribution."""
    cma_es = _evosax()
    import jax
    import jax.numpy as jnp
    from scipy.special import ndtr

    dimensions = space.dimensions
    words = threefry.fold_in(space.root, threefry.SAMPLES)
    key = jax.random.wrap_key_data(jnp.asarray(words), impl="threefry2x32")
    with _as_evosax_computes():
        search = cma_es(population_size=population, solution=jnp.zeros(dimensions))
        params = search.default_params
        state = search.init(jax.random.fold_in(key, 0), jnp.zeros(dimensions), params)
    for generation, start in enumerate(range(first, last, population), 1):
        asked, told = jax.random.split(jax.random.fold_in(key, generation))
        with _as_evosax_computes():
            points, state = search.ask(asked, state, params)
        cube = ndtr(np.asarray(points, np.float64))
        trials = [Trial(start + i, at_point(space, p)) for i, p in enumerate(cube[: last - start])]
        values = yield trials
        if len(values) == population:
            with _as_evosax_computes():
                state, _ = search.tell(told, points, -jnp.asarray(np.array(values, np.float32)), state, params)


def _population(space: Space) -> int:
    """Hansen's default."""
    return 4 + int(3 * math.log(space.dimensions))


def _evolution(space: Space, budget: int) -> Strategy:
    yield from _generations(space, 0, budget, min(_population(space), max(budget // 2, 2)))


def _automatic(space: Space, budget: int) -> Strategy:
    """Equal weights, which draws have to beat, then CMA-ES; what is tried next depends on no budget."""
    yield [Trial(0, equal_weights(space))]
    yield from _generations(space, 1, budget, _population(space))


STRATEGIES: dict[str, Callable[[Space, int], Strategy]] = {
    "auto": _automatic,
    "draw": _draws,
    "sobol": _quasi_random,
    "grid": _grid,
    "halving": _halving,
    "cma": _evolution,
}
RANKING = ("auto", "halving", "cma")
"""Strategies whose trials depend on the order of all values before, and not on which is the best alone."""

EXTENSIBLE = ("auto", "draw", "sobol")
"""Strategies whose trials do not depend on the budget: a larger one goes on."""


def strategy_of(name: str, space: Space, budget: int) -> Strategy:
    """A strategy at work.

    Args:
        name: Of `STRATEGIES`.
        space: Where it looks.
        budget: Evaluations on all dev examples that it may cost at most.

    Raises:
        M3Error: The name is unknown, the budget is not positive, or a package is missing.
    """
    if name not in STRATEGIES:
        raise M3Error(f"strategy is {name!r}, but must be one of {', '.join(STRATEGIES)}")
    check_whole("the number of samples", budget)
    if budget < 1:
        raise M3Error(f"samples: is {budget}, but must be at least 1")
    if name in ("auto", "cma"):
        _evosax(name)
    return STRATEGIES[name](space, budget)


def pursue(search: Strategy, worth: Callable[[Trial], float]) -> None:
    """Follow a strategy to its end.

    Args:
        search: The strategy, at its beginning.
        worth: Does a trial and gives its value, larger being better.
    """
    batch = next(search)
    while True:
        values = [worth(trial) for trial in batch]
        try:
            batch = search.send(values)
        except StopIteration:
            return
