"""Fine-tuning a given model: all parameters or low-rank factors, under Hugging Face's names; killed, it goes on.

What all texts begin with (a system message, an instruction) is read once a batch, and scores are computed where an
answer is only, so that a step costs what its texts have of their own.
"""

import functools
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from m3jax.decoder import DecoderConfig, Prefix, bind, common_prefix, make_prefix, read_behind
from m3jax.decoder.batching import put
from m3jax.decoder.params import nested_params
from m3jax.documents import FAULTS
from m3jax.errors import M3Error, saying_what_failed
from m3jax.evaluation.ownership import PART
from m3jax.evaluation.records import digest
from m3jax.laboratory.training import OPTIMIZER, Course, LessonBatch, Text, batches
from m3jax.progress import Tell

Arrays = dict[str, Array]
"""Tensors under Hugging Face's names."""

_LENGTHS = (24, 40, 64, 96, 128, 192, 256, 384, 512)  # of texts without what they share
_MATRICES = ("attn", "attention", "mlp", "feed_forward")  # where low-rank factors go


class Tuning(NamedTuple):
    """How a given model is fine-tuned.

    Attributes:
        course: Steps, texts in each, rate and order.
        parts: Pieces that a batch is cut into, whose slopes are added up: less memory, the same step.
        rank: Of the factors that are learned in place of all parameters; 0 learns these.
        dtype: Of the arithmetic; parameters are float32.
        every: Steps from one record of the training's state to the next.
    """

    course: Course
    parts: int = 1
    rank: int = 0
    dtype: str = "float32"
    every: int = 50


def check_tuning(how: Tuning) -> None:
    """Raise M3Error for what cannot be done."""
    course = how.course
    for name, number in (("steps", course.steps), ("batch", course.batch), ("parts", how.parts), ("every", how.every)):
        if number < 1:
            raise M3Error(f"{name}: is {number}, but must be at least 1")
    if course.batch % how.parts:
        raise M3Error(f"parts: is {how.parts}, which does not divide the batch of {course.batch}: give a divisor")
    if how.rank < 0:
        raise M3Error(f"rank: is {how.rank}, but must be at least 0, which learns all parameters")
    if course.whole:
        raise M3Error("whole: prompts are not learned in fine-tuning: leave it out")
    if course.pull:
        raise M3Error("pull: fine-tuning is not pulled toward its base: leave it out")


def told(how: Tuning) -> dict[str, Any]:
    """What a training depends on, as plain data.

    Args:
        how: How a model is fine-tuned.
    """
    course = {name: value for name, value in how.course._asdict().items() if name != "pull"}  # which there is not
    return {**how._asdict(), "course": list(course.values())}


class Tuned(NamedTuple):
    """What fine-tuning gave.

    Attributes:
        arrays: float32 tensors.
        losses: Of each step.
        seconds: That it took, over all its parts.
    """

    arrays: Arrays
    losses: tuple[float, ...]
    seconds: float


class _State(NamedTuple):
    """Where training stands."""

    learned: Any
    optimizer: Any


def tune(
    arrays: Mapping[str, Array],
    config: DecoderConfig,
    texts: Sequence[Text],
    how: Tuning,
    record: Path,
    tell: Tell,
    mesh: Mesh | None = None,
) -> Tuned:
    """Fine-tunes a model on the answers of texts.

    Args:
        arrays: All of its tensors, float32; not changed.
        config: The decoder.
        texts: The lessons.
        how: How they are taught.
        record: The file in which the state is kept meanwhile; of the same training, it goes on from there.
        tell: Told in lines how far it is.
        mesh: Where the arrays lie; batches are cut over its axis `fsdp`.

    Raises:
        M3Error: The record is another training's or cannot be used; a loss is not finite.
    """
    check_tuning(how)
    shared = common_prefix([text.tokens[: text.prompt] for text in texts])
    own = [Text(text.tokens[len(shared) :], text.prompt - len(shared)) for text in texts]
    most = max(len(text.tokens) - text.prompt for text in own)
    step = _step_of(config, how.parts, how.rank > 0, how.dtype, most, mesh)
    learned: Any = {name: jnp.copy(x) for name, x in arrays.items()} if not how.rank else _factors(arrays, how)
    state = _State(learned, OPTIMIZER.init(learned))
    identity = digest([told(how), [list(text) for text in texts], sorted(arrays)])
    done, losses, before = 0, list[float](), 0.0
    if record.exists():
        state, losses, before = _recalled(record, state, identity)
        done = len(losses)
        tell(f"going on behind step {done}")
    rates = optax.warmup_cosine_decay_schedule(0.0, how.course.rate, max(how.course.steps // 10, 1), how.course.steps)
    begun, frozen, prefix = time.perf_counter(), {} if not how.rank else dict(arrays), make_prefix(shared)
    for number, batch in enumerate(batches(own, how.course, _LENGTHS), 1):
        if number <= done:
            continue
        rate = jnp.float32(rates(number - 1))
        learned, optimizer, loss = step(*state, frozen, rate, prefix, jax.tree.map(lambda x: put(x, mesh), batch))
        state = _State(learned, optimizer)
        losses.append(float(loss))
        if not math.isfinite(losses[-1]):
            raise M3Error(f"the loss is {losses[-1]} at step {number}: take a smaller rate")
        spent = before + time.perf_counter() - begun
        if number % how.every == 0 and number < how.course.steps:
            _keep(record, state, identity, losses, spent)
        if number % max(how.course.steps // 20, 1) == 0 or number == how.course.steps:
            recent = losses[-max(how.course.steps // 20, 1) :]
            tell(f"step {number} of {how.course.steps}: loss {sum(recent) / len(recent):.4f}, {spent:.0f} s")
    whole = state.learned if not how.rank else _with_factors(frozen, state.learned)
    return Tuned(whole, tuple(losses), before + time.perf_counter() - begun)


# --- A step -------------------------------------------------------------------------------------------------------


def answer_losses(
    arrays: Mapping[str, Array],
    prefix: Prefix,
    batch: LessonBatch,
    *,
    config: DecoderConfig,
    most: int,
    dtype: str = "float32",
    mesh: Mesh | None = None,
) -> Float[Array, ""]:
    """The sum of the cross-entropies of all answers' tokens.

    Args:
        arrays: Tensors of the model.
        prefix: What all texts begin with.
        batch: What follows: prompts and answers.
        config: The decoder.
        most: Tokens that the longest answer has.
        dtype: Of the arithmetic.
        mesh: Where the arrays lie.
    """
    model = bind(config, nested_params({name: x.astype(dtype) for name, x in arrays.items()}, config, "the model"))
    tokens, lengths, prompts = map(jnp.asarray, batch)
    hidden, _ = read_behind(model, prefix, tokens, lengths, mesh=mesh)
    places = prompts[:, None] + jnp.arange(most, dtype=jnp.int32)[None, :]
    counted = places < lengths[:, None]
    places = jnp.where(counted, places, prompts[:, None])  # any place that is there
    before = jnp.take_along_axis(hidden, (places - 1)[:, :, None], axis=1)
    said = jnp.take_along_axis(tokens, places, axis=1)
    losses = optax.softmax_cross_entropy_with_integer_labels(model.logits(before), said)
    return jnp.sum(losses, where=counted)


@functools.lru_cache(maxsize=4)
def _step_of(config: DecoderConfig, parts: int, factored: bool, dtype: str, most: int, mesh: Mesh | None) -> Any:
    """One step of training as a program, which trainings of like lessons share."""

    def loss_of(learned: Any, frozen: Any, prefix: Prefix, batch: LessonBatch) -> Array:
        arrays = _with_factors(frozen, learned) if factored else learned
        return answer_losses(arrays, prefix, batch, config=config, most=most, dtype=dtype, mesh=mesh)

    def slopes_of(learned: Any, frozen: Any, prefix: Prefix, batch: LessonBatch) -> tuple[Array, Any]:
        if parts == 1:
            return jax.value_and_grad(loss_of)(learned, frozen, prefix, batch)
        # Every so many-th row, so that on a mesh each piece lies on all devices.
        pieces = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch)

        def add(sums: Any, piece: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, sums, jax.value_and_grad(loss_of)(learned, frozen, prefix, piece)), None

        nothing = (jnp.float32(0), jax.tree.map(jnp.zeros_like, learned))
        sums, _ = jax.lax.scan(add, nothing, pieces)
        return sums[0], sums[1]

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(
        learned: Any, state: Any, frozen: Any, rate: Array, prefix: Prefix, batch: LessonBatch
    ) -> tuple[Any, Any, Array]:
        loss, slopes = slopes_of(learned, frozen, prefix, batch)
        count = jnp.sum(batch.lengths - batch.prompts).astype(jnp.float32)
        slopes = jax.tree.map(lambda x: x / count, slopes)
        with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer powers
            updates, state = OPTIMIZER.update(slopes, state, learned)
        return jax.tree.map(lambda p, u: p - rate * u, learned, updates), state, loss / count

    return step


# --- Low-rank factors ---------------------------------------------------------------------------------------------


def _factors(arrays: Mapping[str, Array], how: Tuning) -> dict[str, Any]:
    """Factors of every matrix of attention and feed-forward layers, whose product is 0.

    References:
        Hu et al., LoRA, 2021.
    """
    chance = np.random.default_rng(how.course.seed)
    found = {}
    for name, x in sorted(arrays.items()):
        if x.ndim == 2 and any(part in name for part in _MATRICES):
            into = chance.standard_normal((how.rank, x.shape[1]), np.float32) / math.sqrt(x.shape[1])
            found[name] = {"in": jnp.asarray(into), "out": jnp.zeros((x.shape[0], how.rank), jnp.float32)}
    if not found:
        raise M3Error("rank: there is no matrix of attention or feed-forward layers to adapt: give 0, for all")
    return found


def _with_factors(arrays: Mapping[str, Array], factors: Mapping[str, Any]) -> Arrays:
    """W + 2·out·in, as with LoRA's alpha at twice its rank."""
    added = {name: 2 * jnp.matmul(pair["out"], pair["in"], precision="highest") for name, pair in factors.items()}
    return {name: x + added[name] if name in added else x for name, x in arrays.items()}


# --- The record ---------------------------------------------------------------------------------------------------


def _keep(record: Path, state: _State, identity: str, losses: Sequence[float], seconds: float) -> None:
    """Writes the state, whole or not at all."""
    leaves = {str(number): np.ascontiguousarray(x) for number, x in enumerate(jax.tree.leaves(state))}
    notes = {"identity": identity, "losses": json.dumps(losses), "seconds": json.dumps(seconds)}
    beside = record.with_name(record.name + PART)
    with saying_what_failed(record):
        save_file(leaves, beside, metadata=notes)
        with open(beside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(beside, record)


def _recalled(record: Path, state: _State, identity: str) -> tuple[_State, list[float], float]:
    """A state that was kept, where the fresh one lies."""
    leaves, form = jax.tree.flatten(state)
    with saying_what_failed(record):
        try:
            with safe_open(record, "np") as file:
                notes = file.metadata() or {}
                if notes.get("identity") != identity or len(file.keys()) != len(leaves):
                    raise M3Error(f"{record}: is of another training: remove it, or give another place")
                kept = [file.get_tensor(str(number)) for number in range(len(leaves))]
            losses, seconds = json.loads(notes["losses"]), float(json.loads(notes["seconds"]))
        except (*FAULTS, SafetensorError) as error:
            raise M3Error(f"{record}: is no state of a training ({error}): remove it to begin anew") from None
    placed = [jax.device_put(x.reshape(like.shape), like.sharding) for x, like in zip(kept, leaves, strict=True)]
    return jax.tree.unflatten(form, placed), losses, seconds
