"""Texts continued: batches of unequal prompts, a static cache, compiled once per batch and length.

Prompts are padded on the right to a bucket of lengths; new tokens of all rows then fill one slot after another,
each row at positions of its own, so that what a row computes does not depend on the rows beside it.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Int, Key

from m3jax.decoder.batching import (
    DecoderProgress,
    ProgressFn,
    announcing,
    length_bucket,
    pad,
    put,
    row_count,
    say_compiling,
)
from m3jax.decoder.config import DecoderConfig
from m3jax.decoder.prefixes import Shared, room_behind
from m3jax.decoder.running import ApplyFn, ModelFunctions, model_of
from m3jax.decoder.sampling import Sampling, prompt_keys, sample
from m3jax.decoder.sharing import WHOLE, Wave, behind_beginnings, read_together
from m3jax.decoder.texts import Overflow, Tokens, fit_prompt, prompt_room
from m3jax.errors import M3Error

_SLOTS = 64  # room for new tokens grows in steps of so many
_CHUNK = 32  # tokens between two looks at stop strings


class Continuation(NamedTuple):
    """How one prompt was continued.

    Attributes:
        tokens: New token ids; a stop token is left out, the tokens of a stop string are not.
        finish: `stop_token`, `stop_string`, `length` (the maximum is reached) or `context` (the model sees no
            further).
        dropped: Tokens that were cut from the left of a prompt too long.
    """

    tokens: tuple[int, ...]
    finish: Literal["stop_token", "stop_string", "length", "context"]
    dropped: int


class _Row(NamedTuple):
    """A prompt on its way.

    Attributes:
        text: What is read: the prompt, and the new tokens with which it is read again.
        new: New tokens that the text holds.
    """

    text: list[int]
    new: list[int]


class _State(NamedTuple):
    """Where a batch stands between two programs."""

    cache: Any
    token: Int[Array, " batch"]  # the newest, not yet in the cache
    position: Int[Array, " batch"]  # its position
    taken: Int[Array, " batch"]  # new tokens so far
    done: Bool[Array, " batch"]


def _advance(state: _State, logits: Array, cache: Any, sampling: Sampling, greedy: bool) -> _State:
    """Takes one more token in every row that is not done; the others stand still."""
    going = ~state.done
    token = jnp.where(going, sample(logits, sampling, state.taken, greedy), state.token)
    more = going.astype(jnp.int32)
    taken = state.taken + more
    stopped = jnp.isin(token, sampling.stops) | (taken >= sampling.limits)
    return _State(cache, token, state.position + more, taken, state.done | stopped)


@functools.partial(jax.jit, static_argnames=("model", "slots", "greedy"))
def _prefill(
    params: Any,
    shared: Shared | None,
    tokens: Int[Array, "batch length"],
    lengths: Int[Array, " batch"],
    taken: Int[Array, " batch"],
    sampling: Sampling,
    *,
    model: ModelFunctions,
    slots: int,
    greedy: bool,
) -> _State:
    """Reads the prompts, with so many new tokens at their ends, and takes the next new token of each."""
    say_compiling("prefill", *tokens.shape)
    logits, cache = model.prefill(params, shared, tokens, lengths, slots)
    ends = lengths if shared is None else shared.lengths[shared.of] + lengths
    start = _State(None, jnp.zeros_like(lengths), ends - 1, taken, sampling.limits <= taken)
    return _advance(start, logits, cache, sampling, greedy)


@functools.partial(jax.jit, static_argnames=("model", "slots", "greedy"), donate_argnames="state")
def _decode(
    params: Any, state: _State, sampling: Sampling, *, model: ModelFunctions, slots: int, greedy: bool
) -> tuple[_State, Int[Array, "batch chunk"]]:
    """Takes up to `_CHUNK` more tokens; stops when all rows are done."""
    batch = len(state.token)
    say_compiling("decode", batch, slots)

    def unfinished(carry: tuple[Array, _State, Array]) -> Array:
        i, state, _ = carry
        return (i < _CHUNK) & ~jnp.all(state.done)

    def body(carry: tuple[Array, _State, Array]) -> tuple[Array, _State, Array]:
        i, state, out = carry
        logits, cache = model.step(params, state.cache, state.token, state.position)
        state = _advance(state, logits, cache, sampling, greedy)
        return i + 1, state, lax.dynamic_update_slice_in_dim(out, state.token[:, None], i, axis=1)

    start = (jnp.int32(0), state, jnp.zeros((batch, _CHUNK), jnp.int32))
    _, state, out = lax.while_loop(unfinished, body, start)
    return state, out


def generate(
    params: Any,
    config: DecoderConfig | None,
    prompts: Sequence[Tokens],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    key: Key[Array, ""] | Key[Array, " prompts"] | None = None,
    stop_token_ids: Sequence[int] | None = None,
    stop_strings: Sequence[str] = (),
    detokenize: Callable[[Sequence[int]], str] | None = None,
    batch_size: int = 8,
    overflow: Overflow = "error",
    share: bool = False,
    progress: ProgressFn | None = None,
    apply_fn: ApplyFn | None = None,
) -> list[Continuation]:
    """Continues prompts.

    Args:
        params: The decoder's parameters, or whatever `apply_fn` takes.
        config: The decoder; with an `apply_fn` it may be `None`, and then no length is too long.
        prompts: Token ids of each prompt, at least one.
        max_new_tokens: Most tokens of a continuation; where more than half the context, the context may end it earlier.
        temperature: 0 takes the likeliest token; else logits are divided by it and a token is drawn.
        top_p: Draws among the likeliest tokens whose probabilities add up to this.
        key: Needed to draw: one key, from which prompt i draws with `fold_in(key, i)`, or a key for each prompt.
            What is drawn does not depend on the other prompts or the batch size, but for rounding: see `share`.
        stop_token_ids: Tokens that end a continuation; those of the config by default.
        stop_strings: Texts that end a continuation.
        detokenize: Text of new token ids; needed for stop strings.
        batch_size: Prompts that run together.
        overflow: What becomes of a prompt too long, which is one that takes more than half the context and leaves
            no room behind it for `max_new_tokens`: an error, or the loss of its left end, down to that room or to
            half the context, whichever is more.
        share: Read once what neighbouring prompts begin with, where it is worth it: the same but for rounding, and
            for many prompts that differ at their ends several times faster. An `apply_fn` reads whole prompts.
        progress: Is told what is compiled and when a batch is done.
        apply_fn: A function to run in place of the decoder.

    Returns:
        The continuations, in the order of the prompts.

    Raises:
        M3Error: A prompt is empty, too long or not of the vocabulary, or a setting is impossible.
    """
    _check_settings(max_new_tokens, temperature, top_p, key, stop_strings, detokenize)
    model, mesh = model_of(params, config, apply_fn)
    limit = None if config is None else config.context_length
    room = None if limit is None else prompt_room(limit, max_new_tokens)
    texts = [fit_prompt(list(p), f"prompt {i}", config, max_new_tokens, overflow) for i, p in enumerate(prompts)]
    if stop_token_ids is None:
        stop_token_ids = () if config is None else config.stop_token_ids
    keys = prompt_keys(key, len(prompts))
    results: list[Continuation | None] = [None] * len(prompts)
    turn = None if config is None or apply_fn is not None else config.turning_point
    longest = 0 if config is None or apply_fn is not None else room_behind(config) - max_new_tokens
    seeks = _Stops(frozenset(stop_token_ids), tuple(stop_strings), detokenize)
    done = tokens = 0

    def read(beginnings: Sequence[Tokens]) -> tuple[Any, Array]:
        return read_together(model, params, beginnings, batch_size, mesh)

    def run(
        rows: Sequence[_Row], members: Sequence[int], size: int, length: int, slots: int, wave: Wave = WHOLE
    ) -> list[tuple[list[int], _Finish]]:
        """Continues rows, of the prompts given, until they end or the turning point is behind them."""
        everyone = [*members, *[members[0]] * (size - len(members))]
        rest = [row.text[wave.cut(i) :] for i, row in zip(members, rows, strict=True)]
        sampling = Sampling(
            keys=put(keys[np.array(everyone)], mesh),
            temperature=jnp.float32(temperature),
            top_p=jnp.float32(top_p),
            stops=jnp.asarray(list(stop_token_ids), jnp.int32),
            limits=put(_limits(rows, size, max_new_tokens, limit, turn), mesh),
        )
        return _run_batch(
            model,
            params,
            wave.shared(everyone, mesh),
            *pad(rest, size, length, mesh),
            sampling,
            slots=_slots(slots, max_new_tokens, limit, packed=apply_fn is not None),
            greedy=temperature == 0,
            seeks=seeks,
            begun=[row.new for row in rows],
            mesh=mesh,
        )

    with announcing(progress, lambda: (done, len(prompts), tokens)):
        whole = functools.partial(length_bucket, limit=room)
        planned = behind_beginnings(texts, texts, batch_size, longest if share else 0, whole, read, max_new_tokens)
        for members, wave, length, slots in planned:
            rows = row_count(len(members), batch_size)
            batch = [_Row(texts[i], []) for i in members]
            found = run(batch, members, rows, length, slots, wave)
            del wave  # the last to hold its beginnings lets them go before others are read
            turned = [
                row
                for row, (new, finish) in enumerate(found)
                if finish == "length" and len(new) < max_new_tokens and _turns(batch[row], new, turn)
            ]
            if turned:
                again = [_Row(batch[row].text + found[row][0], found[row][0]) for row in turned]
                width = length_bucket(max(len(row.text) for row in again), limit)
                ended = run(again, [members[row] for row in turned], rows, width, width)
                for row, one in zip(turned, ended, strict=True):
                    found[row] = one
            for i, (new, finish) in zip(members, found, strict=True):
                if finish == "length" and len(new) < max_new_tokens:
                    finish = "context"
                results[i] = Continuation(tuple(new), finish, len(prompts[i]) - len(texts[i]))
                tokens += len(new)
            done += len(members)
            if progress is not None:
                progress(DecoderProgress("batch", "decode", rows, length, done, len(prompts), tokens))
    return [result for result in results if result is not None]


def _turns(row: _Row, new: Sequence[int], turn: int | None) -> bool:
    """Whether a text has just left the turning point behind."""
    return turn is not None and len(row.text) <= turn < len(row.text) + len(new)


def _slots(length: int, max_new_tokens: int, limit: int | None, *, packed: bool) -> int:
    """Slots of each row for prompts padded to a length and what follows them.

    There is room behind the shortest prompt that may be among them, so that one program serves all.

    Args:
        length: Slots of the padded prompts.
        max_new_tokens: Most new tokens of a row.
        limit: Tokens that a text can have, if there is a limit.
        packed: New tokens follow their prompt rather than its padding.
    """
    new = max_new_tokens if limit is None else min(max_new_tokens, limit - 1)
    slots = length + -(-new // _SLOTS) * _SLOTS
    return min(slots, limit) if packed and limit is not None else slots


def _limits(
    batch: Sequence[_Row], rows: int, max_new_tokens: int, limit: int | None, turn: int | None
) -> Int[np.ndarray[Any, Any], " rows"]:
    """New tokens that each row may have; rows without a prompt are done before they start.

    Up to the turning point a text is read in one way, beyond it in another, from its beginning: the first token
    behind it ends the row for now.
    """
    limits = np.zeros(rows, np.int32)
    for i, row in enumerate(batch):
        prompt = len(row.text) - len(row.new)
        ends = [None if limit is None else limit - prompt]
        ends += [turn + 1 - prompt] if turn is not None and len(row.text) <= turn else []
        limits[i] = min([max_new_tokens, *(end for end in ends if end is not None)])
    return limits


def _check_settings(
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    key: Array | None,
    stop_strings: Sequence[str],
    detokenize: Callable[[Sequence[int]], str] | None,
) -> None:
    if max_new_tokens < 1:
        raise M3Error(f"max_new_tokens is {max_new_tokens}: ask for at least one token.")
    if not (0 <= temperature < float("inf") and 0 < top_p <= 1):
        raise M3Error(f"temperature {temperature} or top_p {top_p} is out of range: give ≥ 0, and between 0 and 1.")
    if temperature > 0 and key is None:
        raise M3Error(f"temperature {temperature} draws tokens, and there is no key: give one, or temperature 0.")
    if stop_strings and detokenize is None:
        raise M3Error("stop strings are sought in text: give detokenize, which makes text of token ids.")
    if not all(stop_strings):
        raise M3Error("a stop string is empty: leave it out.")


_Finish: TypeAlias = Literal["stop_token", "stop_string", "length", "context"]


class _Stops(NamedTuple):
    """What ends a continuation."""

    tokens: frozenset[int]
    strings: tuple[str, ...]
    detokenize: Callable[[Sequence[int]], str] | None

    def string_end(self, tokens: Sequence[int], known: int) -> int | None:
        """How many tokens it takes to complete a stop string; the first `known` hold none."""
        if not self.strings or self.detokenize is None or not self._found(tokens):
            return None
        return next(n for n in range(known + 1, len(tokens) + 1) if n == len(tokens) or self._found(tokens[:n]))

    def _found(self, tokens: Sequence[int]) -> bool:
        assert self.detokenize is not None
        text = self.detokenize(tokens)
        return any(stop in text for stop in self.strings)


def _run_batch(
    model: ModelFunctions,
    params: Any,
    shared: Shared | None,
    tokens: Array,
    lengths: Array,
    sampling: Sampling,
    *,
    slots: int,
    greedy: bool,
    seeks: _Stops,
    begun: Sequence[list[int]],
    mesh: Mesh | None,
) -> list[tuple[list[int], _Finish]]:
    """Continues one batch, whose first rows have begun with these tokens; returns all new tokens of those rows."""
    count = len(begun)
    taken = np.zeros(len(lengths), np.int32)
    taken[:count] = [len(new) for new in begun]
    already = put(taken, mesh)
    state = _prefill(params, shared, tokens, lengths, already, sampling, model=model, slots=slots, greedy=greedy)
    news = [list(new) for new in begun]
    cut: dict[int, int] = {}  # rows that a stop string ended, and after how many tokens
    chunk = np.asarray(state.token)[:, None]
    while True:
        counts, done = np.array(state.taken), np.array(state.done)
        for row in range(count):
            known = len(news[row])
            news[row] += chunk[row, : counts[row] - known].tolist()
            end = seeks.string_end(news[row], known) if row not in cut and len(news[row]) > known else None
            if end is not None:
                cut[row] = end
        done[list(cut)] = True
        if done[:count].all():
            break
        if cut:
            state = state._replace(done=jax.device_put(done, state.done.sharding))
        state, out = _decode(params, state, sampling, model=model, slots=slots, greedy=greedy)
        chunk = np.asarray(out)
    return [_ending(new, cut.get(row), seeks.tokens) for row, new in enumerate(news)]


def _ending(new: list[int], cut: int | None, stops: frozenset[int]) -> tuple[list[int], _Finish]:
    """New tokens up to what ended them, and what that was."""
    if cut is not None and not (new[-1] in stops and cut == len(new)):
        return new[:cut], "stop_string"
    return (new[:-1], "stop_token") if new[-1] in stops else (new, "length")
