"""Weights of layers and of tensors against one ratio for the model, looked for in several ways at equal budgets.

References:
    Zhou et al., Mixup Model Merge, arXiv 2502.15434, 2025. Yang et al., AdaMerging, arXiv 2310.02575, 2024. Hansen, The
    CMA evolution strategy: a tutorial, arXiv 1604.00772, 2016.
"""

import functools
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from m3jax import decoder
from m3jax.arithmetic import threefry
from m3jax.decoder import DecoderConfig, Prefix, bind, read_behind
from m3jax.decoder.params import nested_params
from m3jax.exploration.optimizing import learn
from m3jax.exploration.resident import Resident
from m3jax.exploration.samples import Space, Weights, everywhere
from m3jax.exploration.strategies import Strategy, Trial, pursue, strategy_of
from m3jax.laboratory.training import LessonBatch, Text, lesson_batch
from m3jax.laboratory.tuning import answer_losses
from m3jax.methods.mixup import draw_walk, draw_weights
from m3jax.naming import OUTSIDE_BLOCKS

GRID, DRAWN = "one ratio, grid", "one ratio, drawn"
"""What the others are measured against."""

_ROWS = 16  # lessons of a step of learning
_RATE = 0.3  # of learning in few steps
_LONGEST_ANSWER = 64  # tokens of an answer that are learned from
_SMOOTH = 0.9  # correlation of neighbouring layers in a random walk

Examine = Callable[[Weights], dict[str, float]]
"""From weights to the scores of their merge on dev examples."""


class Sought(NamedTuple):
    """What one way of looking found.

    Attributes:
        weights: The best of what was tried, by group.
        dev: Its scores on the dev examples.
        evaluations: How many merges were examined.
        steps: Of learning, along slopes.
        seconds: That these took.
        losses: Before each of them.
    """

    weights: Weights
    dev: dict[str, float]
    evaluations: int
    steps: int = 0
    seconds: float = 0.0
    losses: tuple[float, ...] = ()


class Ground(NamedTuple):
    """Where weights are looked for.

    Attributes:
        resident: The experts.
        space: Of one ratio for the model.
        examine: Scores weights.
        grid: From a number of evaluations to one ratio's grid.
        lessons: Dev examples with their answers, as batches to learn from.
        config: The decoder.
        budget: Evaluations that each way may cost.
    """

    resident: Resident
    space: Space
    examine: Examine
    grid: Callable[[int], Sequence[tuple[float, ...]]]
    lessons: Sequence["AlikeLessons"]
    config: DecoderConfig
    budget: int


class AlikeLessons(NamedTuple):
    """Lessons that begin alike.

    Attributes:
        prefix: What they begin with.
        rest: What follows.
    """

    prefix: Prefix
    rest: LessonBatch


def lesson_batches(texts: Sequence[Sequence[Text]]) -> list[AlikeLessons]:
    """Lessons as batches of one shape, of each skill in turn.

    Args:
        texts: The lessons of each skill.
    """
    shared = [decoder.common_prefix([text.tokens[: text.prompt] for text in some]) for some in texts]
    rest = [
        [Text(text.tokens[len(before) :], text.prompt - len(before)) for text in some]
        for some, before in zip(texts, shared, strict=True)
    ]
    slots = max(map(len, shared))
    length = max(len(text.tokens) for some in rest for text in some)
    size = min([_ROWS, *map(len, rest)])

    def batch(before: list[int], some: list[Text], start: int) -> AlikeLessons:
        made = lesson_batch(some[start : start + size], length)
        return AlikeLessons(decoder.make_prefix(before, slots), jax.tree.map(jnp.asarray, made))

    return [
        batch(before, some, start)
        for start in range(0, min(map(len, rest)) - size + 1, size)
        for some, before in zip(rest, shared, strict=True)
    ]


def ways_of(ground: Ground) -> dict[str, Callable[[], Sought]]:
    """All ways of looking, by name; each is deterministic.

    Args:
        ground: Where.
    """
    space, budget = ground.space, ground.budget
    layers, tensors = (_groups(ground.resident, kind) for kind in ("layer", "key"))
    by_layer, by_tensor = (space._replace(groups=groups) for groups in (layers, tensors))

    def tried(search: Strategy) -> Callable[[], Sought]:
        return lambda: _tried(ground, search)

    def learned(granularity: str, loss: Any) -> Callable[[], Sought]:
        return lambda: _learned(ground, granularity, loss)

    return {
        GRID: tried(_ratios(space, ground.grid(budget))),
        DRAWN: tried(strategy_of("draw", space, budget)),
        "layers, drawn": tried(strategy_of("draw", by_layer, budget)),
        "layers, random walk": tried(_walks(by_layer, budget)),
        "layers, CMA-ES": tried(strategy_of("cma", by_layer, budget)),
        "tensors, drawn": tried(strategy_of("draw", by_tensor, budget)),
        "one ratio, by the slope of the answers' loss": learned("model", _answers_loss),
        "layers, by the slope of the answers' loss": learned("layer", _answers_loss),
        "layers, by the slope of the entropy": learned("layer", _entropy),
    }


def _groups(resident: Resident, kind: str) -> tuple[str, ...]:
    blocks = (block for tensor in resident.plan.tensors for block in tensor.blocks)
    return tuple(dict.fromkeys(getattr(block, kind) for block in blocks))


# --- Trials -------------------------------------------------------------------------------------------------------


def _tried(ground: Ground, search: Strategy) -> Sought:
    trials: list[tuple[Weights, dict[str, float]]] = []

    def worth(trial: Trial) -> float:
        trials.append((trial.weights, ground.examine(trial.weights)))
        return _mean(trials[-1][1])

    pursue(search, worth)
    weights, dev = _best(trials)
    return Sought(weights, dev, len(trials))


def _best(trials: Sequence[tuple[Weights, dict[str, float]]]) -> tuple[Weights, dict[str, float]]:
    """That of the best mean score; of equals the first."""
    return max(trials, key=lambda trial: round(_mean(trial[1]), 9))


def _mean(scores: Mapping[str, float]) -> float:
    return sum(scores.values()) / len(scores)


def _ratios(space: Space, ratios: Sequence[tuple[float, ...]]) -> Strategy:
    for sample, weights in enumerate(ratios):
        yield [Trial(sample, everywhere(space, weights))]


def _walks(space: Space, budget: int) -> Strategy:
    """Draws in which neighbouring layers are alike; what is in no layer is drawn by itself."""
    numbers = {group: re.search(r"\d+(?=\D*$)", group) for group in space.groups if group != OUTSIDE_BLOCKS}
    blocks = {int(found[0]): group for group, found in numbers.items() if found}
    for sample in range(budget):
        key = threefry.sample_key(space.root, sample)
        walk = draw_walk(key, space.alpha, space.num_experts, blocks, _SMOOTH)
        others = {
            group: draw_weights(key, space.alpha, space.num_experts, group)
            for group in space.groups
            if group not in walk
        }
        yield [Trial(sample, {**walk, **others})]


# --- Slopes -------------------------------------------------------------------------------------------------------


def _learned(ground: Ground, granularity: str, loss: Any) -> Sought:
    """Half the budget looks for a beginning on one ratio's grid; learning goes on from there."""
    ratios = ground.grid(max(ground.budget // 2, 1))
    trials = [(weights := everywhere(ground.space, ratio), ground.examine(weights)) for ratio in ratios]
    begun, steps = time.perf_counter(), ground.budget
    program = functools.partial(loss, config=ground.config)
    found = learn(ground.resident, _best(trials)[0], granularity, program, ground.lessons, steps, _RATE)
    spent = time.perf_counter() - begun
    trials.append((found.weights, ground.examine(found.weights)))
    weights, dev = _best(trials[::-1])  # of equals what was learned
    return Sought(weights, dev, len(trials), steps, spent, found.losses)


def _answers_loss(arrays: Any, batch: AlikeLessons, *, config: DecoderConfig) -> Float[Array, ""]:
    """Mean cross-entropy of the answers' tokens."""
    most = min(_LONGEST_ANSWER, batch.rest.tokens.shape[1])
    total = answer_losses(arrays, batch.prefix, batch.rest, config=config, most=most)
    return total / jnp.sum(batch.rest.lengths - batch.rest.prompts).astype(jnp.float32)


def _entropy(arrays: Any, batch: AlikeLessons, *, config: DecoderConfig) -> Float[Array, ""]:
    """Mean entropy of the token behind each prompt, which asks for no answers."""
    model = bind(config, nested_params(arrays, config, "the merge"))
    tokens, _, prompts = map(jnp.asarray, batch.rest)
    hidden, _ = read_behind(model, batch.prefix, tokens, prompts)
    last = jnp.take_along_axis(hidden, (prompts - 1)[:, None, None], axis=1)[:, 0]
    log_probs = jax.nn.log_softmax(model.logits(last), axis=-1)
    return -jnp.mean(jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1))


def plain(weights: Weights) -> dict[str, list[float]]:
    """Weights as the ledger holds them.

    Args:
        weights: By group.
    """
    return {group: [float(np.float32(value)) for value in values] for group, values in weights.items()}
