"""Learned ratios: weights on the simplex that follow the gradient of a dev loss through the merge and the model.

References:
    Yang et al., AdaMerging: Adaptive model merging for multi-task learning, 2024, arXiv 2310.02575.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float

from m3jax import decoder
from m3jax.arithmetic.double import Double
from m3jax.checkpoints.views_permuted import Permuted
from m3jax.decoder import ApplyFn, DecoderConfig
from m3jax.decoder.batching import length_bucket, pad
from m3jax.decoder.params import nested_params
from m3jax.decoder.running import ModelFunctions, model_of
from m3jax.errors import M3Error
from m3jax.evaluation import tokens
from m3jax.exploration.resident import Params, Resident, merge_arrays
from m3jax.exploration.samples import Weights, group_of, weights_of
from m3jax.exploration.scoring import Dev
from m3jax.methods.leaf import LeafScalars
from m3jax.methods.mixup import GRANULARITIES
from m3jax.streaming.plan import BlockPlan
from m3jax.trees.moving import moved

LOSSES = ("loss", "entropy")
_SMALLEST = 1e-4  # a weight of 0 has no gradient under softmax: learning starts a little inside

Loss = Callable[[Params, Any], Array]
"""From merged arrays by tensor name and a batch to a scalar; traced by jit."""


class Optimization(NamedTuple):
    """How ratios are learned.

    Attributes:
        loss: "loss" (cross-entropy of the examples' answers) or "entropy" (of the model's next token behind each
            prompt, which needs no answers).
        steps: Of Adam, whose rate falls to 0 along a cosine.
        learning_rate: At the beginning.
        granularity: Of the learned weights: "model", "layer" or "tensor"; the recipe's if None.
        batch_size: Examples per step.
    """

    loss: str = "loss"
    steps: int = 100
    learning_rate: float = 0.05
    granularity: str | None = None
    batch_size: int = 8


class Learned(NamedTuple):
    """What learning gave.

    Attributes:
        weights: By group, rounded to float32.
        losses: Before each step.
    """

    weights: dict[str, tuple[float, ...]]
    losses: tuple[float, ...]


def check_optimization(how: Optimization, position: bool) -> None:
    """Raise M3Error for settings that cannot be followed."""
    if position:
        raise M3Error("--optimize learns weights of sums, and slerp has none: take linear, task_arithmetic or ties")
    if how.loss not in LOSSES:
        raise M3Error(f"--optimize is {how.loss!r}, but must be one of {', '.join(LOSSES)}")
    if how.granularity not in (None, *GRANULARITIES):
        raise M3Error(f"--granularity is {how.granularity!r}, but must be one of {', '.join(GRANULARITIES)}")
    if how.steps < 1 or not (np.isfinite(how.learning_rate) and how.learning_rate > 0):
        raise M3Error(f"--steps is {how.steps} and --learning-rate {how.learning_rate}, but both must be positive")


def _blocks(resident: Resident) -> list[BlockPlan]:
    """Everything that is merged."""
    return [block for tensor in resident.plan.tensors for block in tensor.blocks]


def _traced_scalars(
    resident: Resident, known: Mapping[str, LeafScalars], granularity: str, weights: Mapping[str, Array]
) -> dict[str, LeafScalars]:
    """The scalars of a merge whose weights are traced: what they fold into is folded in the trace.

    Where they fold into nothing, they enter what is concluded from measures, and this is concluded in the trace.
    """
    found = {}
    folds: dict[tuple[Any, ...], Any] = {}  # the same of all tensors that a group's numbers are the same of
    doubled = {group: tuple(Double.of(w) for w in values) for group, values in weights.items()}
    for tensor in resident.plan.tensors:
        if tensor.pipeline is None:
            continue
        method, folded, blocks = tensor.pipeline.method, [], []
        for block in tensor.blocks:
            group, own = group_of(block, granularity), block.settings
            blocks.append(block._replace(settings=own._replace(weights=doubled[group])))
            numbers = (tuple(sorted(each.items())) for each in (own.sparsifier, own.method))
            key = (method, group, own.scale, *numbers, own.comparison, own.divisors)
            if key not in folds:
                folds[key] = method.fold(method.options, blocks[-1].settings)
            folded.append(folds[key])
        if all(each is None for each in folded):
            traced = tensor._replace(blocks=tuple(blocks))
            found[tensor.output.name] = resident.findings.scalars(
                traced, resident.root, None if tensor.axis is not None else 0
            )
            continue
        whole = folded[0] if tensor.axis is None else jax.tree.map(lambda *leaves: jnp.stack(leaves), *folded)
        found[tensor.output.name] = known[tensor.output.name]._replace(method=whole)
    return found


def learn(
    resident: Resident,
    start: Weights,
    granularity: str,
    loss: Loss,
    batches: Sequence[Any],
    steps: int = 100,
    learning_rate: float = 0.05,
    watch: Callable[[int, float], None] | None = None,
) -> Learned:
    """Refine merging weights by Adam on a loss, on the simplex by a softmax.

    Args:
        resident: The experts.
        start: Weights to start from, of this granularity or a coarser one.
        granularity: Of the learned weights.
        loss: What to make small.
        batches: Taken in turn; all of one shape, so that one program serves all.
        steps: How many.
        learning_rate: At the beginning.
        watch: Called with each step's number and its loss.

    Raises:
        M3Error: The loss is not finite.
    """
    blocks = _blocks(resident)
    first = {group_of(block, granularity): weights_of(start, block) for block in reversed(blocks)}
    groups = sorted(first)
    logits = {group: jnp.log(jnp.maximum(jnp.array(first[group], jnp.float32), _SMALLEST)) for group in groups}
    known = resident.scalars(start)
    adam = optax.adam(optax.cosine_decay_schedule(learning_rate, steps))

    @jax.jit
    def step(logits: Any, state: Any, arrays: Any, known: Any, batch: Any, zero: Any) -> tuple[Any, Any, Array]:
        def of_logits(logits: Any) -> Array:
            weights = {group: jax.nn.softmax(values) for group, values in logits.items()}
            scalars = _traced_scalars(resident, known, granularity, weights)
            return loss(merge_arrays(resident.plan, arrays, scalars, zero), batch)

        value, slope = jax.value_and_grad(of_logits)(logits)
        with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer powers
            updates, state = adam.update(slope, state, logits)
        return optax.apply_updates(logits, updates), state, value

    state: Any = adam.init(logits)
    losses = []
    for number in range(steps):
        batch = batches[number % len(batches)]
        logits, state, value = step(logits, state, resident.arrays, known, batch, np.uint32(0))
        losses.append(float(value))
        if not np.isfinite(losses[-1]):
            raise M3Error(f"the loss is {losses[-1]} at step {number}: take a smaller --learning-rate")
        if watch is not None:
            watch(number, losses[-1])
    return Learned({group: _simplex(np.asarray(logits[group])) for group in groups}, tuple(losses))


def _simplex(logits: Float[np.ndarray, " n"]) -> tuple[float, ...]:
    """The softmax of logits, computed in float64 and rounded to float32, so that any machine can record it."""
    powers = np.exp(logits.astype(np.float64) - logits.max())
    return tuple(float(w) for w in (powers / powers.sum()).astype(np.float32))


# --- Losses on dev examples ---------------------------------------------------------------------------------------


class DevBatch(NamedTuple):
    """Some texts.

    Attributes:
        tokens: int32 [rows, length], padded on the right.
        lengths: int32 [rows].
        counted: float32 [rows, length]: 1 where the following token is part of an answer; for the entropy 1 in the
            first column of each row that has a text.
    """

    tokens: Array
    lengths: Array
    counted: Array


def dev_batches(devs: Sequence[Dev], how: Optimization, tokenizer: Any, mesh: Mesh | None) -> list[DevBatch]:
    """The dev examples as batches of one shape: prompts with their answers, or without for the entropy.

    Args:
        devs: The dev sets.
        how: Which loss, and how many examples at a time.
        tokenizer: A transformers tokenizer.
        mesh: Where they go.

    Raises:
        M3Error: The loss needs answers and an example has none.
    """
    pairs = []
    for dev in devs:
        for example, prompt in zip(dev.examples, dev.prompts(tokenizer), strict=True):
            if how.loss == "loss" and not example.gold:
                raise M3Error(f"{dev.task.name}: {example.id} has no answer to learn from: take --optimize entropy")
            answer = f" {example.gold}" if how.loss == "loss" else ""
            pairs.append(tokens.split(tokenizer, prompt, answer) if answer else (decoder.encode(tokenizer, prompt), []))
    length = length_bucket(max(len(before) + len(after) for before, after in pairs))
    batches = []
    for begin in range(0, len(pairs), how.batch_size):
        some = pairs[begin : begin + how.batch_size]
        texts = [[*before, *after] for before, after in some]
        counted = np.zeros((how.batch_size, length), np.float32)
        for row, (before, after) in enumerate(some):
            counted[row, len(before) - 1 : len(before) + len(after) - 1] = 1
            counted[row, 0] = 1 if not after else counted[row, 0]
        batches.append(DevBatch(*pad(texts, how.batch_size, length, mesh), jnp.asarray(counted)))
    return batches


def dev_loss(
    how: Optimization,
    config: DecoderConfig | None,
    params: Any,
    apply_fn: ApplyFn | None,
    theirs: Mapping[str, Permuted] | None = None,
) -> Loss:
    """The loss of merged arrays on a batch of dev examples.

    Args:
        how: Which loss.
        config: The decoder; None where only `apply_fn` knows.
        params: The decoder's parameters of any merge, for the mesh that they lie on.
        apply_fn: A model to run in place of the decoder.
        theirs: How Hugging Face's arrays are made of the merged ones, where those are another library's.
    """
    model, _ = model_of(params, config, apply_fn)
    uses_decoder = config is not None and apply_fn is None

    def loss(arrays: Params, batch: DevBatch) -> Array:
        if uses_decoder and theirs is not None:
            arrays = moved(arrays, theirs)
        own = nested_params(arrays, config, "the merge") if uses_decoder and config is not None else arrays
        return (_cross_entropy if how.loss == "loss" else _entropy)(model, own, batch)

    return loss


def _cross_entropy(model: ModelFunctions, params: Any, batch: DevBatch) -> Array:
    """Mean over examples of the mean negative log probability of their answers' tokens."""
    log_probs, _ = model.score(params, None, batch.tokens, batch.lengths)
    per_row = jnp.sum(batch.counted, axis=1)
    means = jnp.sum(log_probs * batch.counted, axis=1) / jnp.maximum(per_row, 1.0)
    return -jnp.sum(means) / jnp.sum((per_row > 0).astype(jnp.float32))


def _entropy(model: ModelFunctions, params: Any, batch: DevBatch) -> Array:
    """Mean over examples of the entropy of the token behind the prompt."""
    logits, _ = model.prefill(params, None, batch.tokens, batch.lengths, batch.tokens.shape[1])
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    entropies = -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)
    here = batch.counted[:, 0]
    return jnp.sum(entropies * here) / jnp.sum(here)
