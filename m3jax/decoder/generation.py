"""Texts continued and scored: batches of unequal prompts, a static cache, compiled once per batch and length.

Prompts are padded on the right to a bucket of lengths; new tokens of all rows then fill one slot after another,
each row at positions of its own, so that what a row computes does not depend on the rows beside it.
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key

from m3jax.decoder.config import DecoderConfig
from m3jax.decoder.modeling import PADDING, bind, fitting
from m3jax.decoder.params import mesh_of
from m3jax.errors import M3Error

Tokens: TypeAlias = Sequence[int]
Overflow: TypeAlias = Literal["error", "truncate_left"]

_SHORTEST_BUCKET = 32
_SLOTS = 64  # room for new tokens grows in steps of so many
_CHUNK = 32  # tokens between two looks at stop strings
_SCORED_ROWS = 1024  # bounds the memory of logits when whole texts are scored


class ApplyFn(Protocol):
    """A model of the caller's own, to stand in for the decoder.

    Every new token costs a run over its whole text, as there is no cache to speak of.
    """

    def __call__(
        self, params: Any, tokens: Int[Array, "batch length"], lengths: Int[Array, " batch"]
    ) -> Float[Array, "batch length vocab"]:
        """Scores of the token behind each position; traced by jit.

        Args:
            params: What was given to `generate`.
            tokens: int32 texts, padded on the right.
            lengths: int32 number of tokens of each text; what is returned behind them is not read.
        """


class Progress(NamedTuple):
    """What is going on.

    Attributes:
        event: `compile` before a program is compiled, `batch` when a batch is done.
        stage: `prefill`, `decode` or `score`.
        batch: Rows of the batch.
        length: Slots of each row.
        done: Texts finished so far.
        total: Texts asked for.
        tokens: Tokens generated, or scored, so far.
    """

    event: Literal["compile", "batch"]
    stage: Literal["prefill", "decode", "score"]
    batch: int
    length: int
    done: int
    total: int
    tokens: int


ProgressFn: TypeAlias = Callable[[Progress], None]


class Completion(NamedTuple):
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


class LogLikelihood(NamedTuple):
    """How likely a continuation is.

    Attributes:
        log_prob: Natural logarithm of its probability, given the context.
        is_greedy: Whether each of its tokens is the likeliest.
        dropped: Tokens that were cut from the left of a context too long.
    """

    log_prob: float
    is_greedy: bool
    dropped: int


# --- Models: the decoder, or a function of the caller's ----------------------------------------------------------


class _Model(NamedTuple):
    """Pure functions that generation is made of; hashable, so that compiled functions are keyed by it."""

    prefill: Callable[[Any, Array, Array, int], tuple[Array, Any]]  # params, tokens, lengths, slots -> logits, cache
    step: Callable[[Any, Any, Array, Array], tuple[Array, Any]]  # params, cache, token, position -> logits, cache
    score: Callable[[Any, Array, Array], tuple[Array, Array]]  # params, tokens, lengths -> log probs, greedy


@functools.lru_cache(maxsize=64)
def _decoder_model(config: DecoderConfig, mesh: Mesh | None) -> _Model:
    """The decoder, with a cache."""

    def prefill(params: Any, tokens: Array, lengths: Array, slots: int) -> tuple[Array, Any]:
        decoder = bind(config, params)
        hidden, cache = decoder(tokens, _positions(tokens, lengths), mesh=mesh)
        return decoder.logits(_at(hidden, lengths - 1)), cache.extend(slots)

    def step(params: Any, cache: Any, token: Array, position: Array) -> tuple[Array, Any]:
        decoder = bind(config, params)
        hidden, cache = decoder(token[:, None], position[:, None], cache, mesh)
        return decoder.logits(hidden[:, 0]), cache

    def score(params: Any, tokens: Array, lengths: Array) -> tuple[Array, Array]:
        decoder = bind(config, params)
        hidden, _ = decoder(tokens, _positions(tokens, lengths), mesh=mesh)
        return _in_pieces(lambda h, t: _score_logits(decoder.logits(h), t), hidden, _following(tokens))

    return _Model(prefill, step, score)


@functools.lru_cache(maxsize=64)
def _applied_model(apply_fn: Callable[..., Any]) -> _Model:
    """A function without a cache: the texts themselves take its place."""

    def prefill(params: Any, tokens: Array, lengths: Array, slots: int) -> tuple[Array, Any]:
        texts = jnp.pad(tokens, ((0, 0), (0, slots - tokens.shape[1])))
        return _at(apply_fn(params, texts, lengths), lengths - 1).astype(jnp.float32), texts

    def step(params: Any, texts: Any, token: Array, position: Array) -> tuple[Array, Any]:
        texts = texts.at[jnp.arange(len(token)), position].set(token)
        return _at(apply_fn(params, texts, position + 1), position).astype(jnp.float32), texts

    def score(params: Any, tokens: Array, lengths: Array) -> tuple[Array, Array]:
        return _score_logits(apply_fn(params, tokens, lengths).astype(jnp.float32), _following(tokens))

    return _Model(prefill, step, score)


def _positions(tokens: Int[Array, "batch length"], lengths: Int[Array, " batch"]) -> Int[Array, "batch length"]:
    """Where each token stands in its text; padding stands nowhere."""
    slot = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]
    return jnp.where(slot < lengths[:, None], slot, PADDING)


def _at(x: Float[Array, "batch length width"], index: Int[Array, " batch"]) -> Float[Array, "batch width"]:
    """One position of each row."""
    return jnp.take_along_axis(x, index[:, None, None], axis=1)[:, 0]


def _following(tokens: Int[Array, "batch length"]) -> Int[Array, "batch length"]:
    """The token behind each position; behind the last, anything."""
    return jnp.roll(tokens, -1, axis=1)


def _score_logits(
    logits: Float[Array, "batch length vocab"], targets: Int[Array, "batch length"]
) -> tuple[Float[Array, "batch length"], Bool[Array, "batch length"]]:
    """Log probability of each target, and whether it is the likeliest."""
    chosen = jnp.take_along_axis(logits, targets[:, :, None], axis=-1)[:, :, 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1), jnp.argmax(logits, axis=-1) == targets


def _in_pieces(
    score: Callable[[Array, Array], tuple[Array, Array]],
    hidden: Float[Array, "batch length width"],
    targets: Int[Array, "batch length"],
) -> tuple[Float[Array, "batch length"], Bool[Array, "batch length"]]:
    """Scores positions piece by piece, since logits of all at once may take more memory than the model."""
    batch, length, _ = hidden.shape
    size = min(length, max(1, _SCORED_ROWS // batch))
    pieces = -(-length // size)
    short = pieces * size - length
    hidden = jnp.pad(hidden, ((0, 0), (0, short), (0, 0))).reshape(batch, pieces, size, -1).swapaxes(0, 1)
    targets = jnp.pad(targets, ((0, 0), (0, short))).reshape(batch, pieces, size).swapaxes(0, 1)
    log_probs, greedy = lax.map(lambda piece: score(*piece), (hidden, targets))
    flat = (x.swapaxes(0, 1).reshape(batch, -1)[:, :length] for x in (log_probs, greedy))
    return next(flat), next(flat)


# --- Compiled programs -------------------------------------------------------------------------------------------


_announce: contextvars.ContextVar[Callable[[Literal["prefill", "decode", "score"], int, int], None] | None] = (
    contextvars.ContextVar("announce", default=None)
)


def _say_compiling(stage: Literal["prefill", "decode", "score"], batch: int, length: int) -> None:
    """Tells the caller that a program is being compiled: to be called where only tracing comes by."""
    announce = _announce.get()
    if announce is not None:
        announce(stage, batch, length)


class _Sampling(NamedTuple):
    """How tokens are chosen; arrays, so that other values need no other program."""

    keys: Key[Array, " batch"]
    temperature: Float[Array, ""]
    top_p: Float[Array, ""]
    stops: Int[Array, " stops"]
    limits: Int[Array, " batch"]  # new tokens that a row may have


class _State(NamedTuple):
    """Where a batch stands between two programs."""

    cache: Any
    token: Int[Array, " batch"]  # the newest, not yet in the cache
    position: Int[Array, " batch"]  # its position
    taken: Int[Array, " batch"]  # new tokens so far
    done: Bool[Array, " batch"]


def _sample(
    logits: Float[Array, "batch vocab"], sampling: _Sampling, count: Int[Array, " batch"], greedy: bool
) -> Int[Array, " batch"]:
    """The next token of each row; a row's randomness depends on its own key and length alone."""
    if greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    scaled = logits / sampling.temperature
    keys = jax.vmap(jax.random.fold_in)(sampling.keys, count)
    return jax.vmap(jax.random.categorical)(keys, _nucleus(scaled, sampling.top_p)).astype(jnp.int32)


def _nucleus(logits: Float[Array, "batch vocab"], top_p: Float[Array, ""]) -> Float[Array, "batch vocab"]:
    """Rules out all but the likeliest tokens whose probabilities add up to `top_p`, at least one.

    References:
        Holtzman et al., The Curious Case of Neural Text Degeneration, 2020.
    """
    ordered = -jnp.sort(-logits, axis=-1)
    probs = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs
    kept = (before < top_p).at[:, 0].set(True)
    least = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= least, logits, -jnp.inf)


def _advance(state: _State, logits: Array, cache: Any, sampling: _Sampling, greedy: bool) -> _State:
    """Takes one more token in every row that is not done; the others stand still."""
    going = ~state.done
    token = jnp.where(going, _sample(logits, sampling, state.taken, greedy), state.token)
    more = going.astype(jnp.int32)
    taken = state.taken + more
    stopped = jnp.isin(token, sampling.stops) | (taken >= sampling.limits)
    return _State(cache, token, state.position + more, taken, state.done | stopped)


@functools.partial(jax.jit, static_argnames=("model", "slots", "greedy"))
def _prefill(
    params: Any,
    tokens: Int[Array, "batch length"],
    lengths: Int[Array, " batch"],
    sampling: _Sampling,
    *,
    model: _Model,
    slots: int,
    greedy: bool,
) -> _State:
    """Reads the prompts and takes the first new token of each."""
    _say_compiling("prefill", *tokens.shape)
    logits, cache = model.prefill(params, tokens, lengths, slots)
    nothing = jnp.zeros_like(lengths)
    start = _State(None, nothing, lengths - 1, nothing, sampling.limits <= 0)
    return _advance(start, logits, cache, sampling, greedy)


@functools.partial(jax.jit, static_argnames=("model", "slots", "greedy"), donate_argnames="state")
def _decode(
    params: Any, state: _State, sampling: _Sampling, *, model: _Model, slots: int, greedy: bool
) -> tuple[_State, Int[Array, "batch chunk"]]:
    """Takes up to `_CHUNK` more tokens; stops when all rows are done."""
    batch = len(state.token)
    _say_compiling("decode", batch, slots)

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


@functools.partial(jax.jit, static_argnames="model")
def _score(
    params: Any, tokens: Int[Array, "batch length"], lengths: Int[Array, " batch"], *, model: _Model
) -> tuple[Float[Array, "batch length"], Bool[Array, "batch length"]]:
    """Log probability of each token that follows another, and whether it is the likeliest there."""
    _say_compiling("score", *tokens.shape)
    return model.score(params, tokens, lengths)


# --- Batches -----------------------------------------------------------------------------------------------------


def length_bucket(length: int, limit: int | None = None) -> int:
    """The padded length of a text: the next power of two, at least 32, at most `limit`.

    Args:
        length: Tokens in the text.
        limit: The model's context length, if it has one.

    Example:
        >>> length_bucket(5), length_bucket(33), length_bucket(1500, limit=2000)
        (32, 64, 2000)
    """
    bucket = max(_SHORTEST_BUCKET, 1 << (length - 1).bit_length())
    return bucket if limit is None else min(bucket, max(limit, length))


def _batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices of texts, longest first, in batches: like goes with like, and what needs most memory runs first."""
    if batch_size < 1:
        raise M3Error(f"the batch size {batch_size} is not positive: give a whole number such as 8.")
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def _rows(count: int, batch_size: int) -> int:
    """Rows of the batch that holds so many texts: a power of two or the batch size, to compile for few sizes."""
    return min(batch_size, 1 << (count - 1).bit_length())


def _pad(texts: Sequence[Tokens], rows: int, length: int, mesh: Mesh | None) -> tuple[Array, Array]:
    """Texts as one array, padded on the right, and their lengths; missing rows have length 1."""
    tokens, lengths = np.zeros((rows, length), np.int32), np.ones(rows, np.int32)
    for row, text in enumerate(texts):
        tokens[row, : len(text)] = text
        lengths[row] = len(text)
    return _put(tokens, mesh), _put(lengths, mesh)


def _put(x: Any, mesh: Mesh | None) -> Array:
    """An array by batch rows on the mesh, or on the one device."""
    placed: Array = jnp.asarray(x) if mesh is None else jax.device_put(x, fitting(mesh, x.shape, ("fsdp",)))
    return placed


def _check_text(text: Tokens, what: str, config: DecoderConfig | None) -> None:
    """Checks that a text can be fed to the model."""
    if not len(text):
        raise M3Error(f"{what} is empty: begin it with the tokenizer's beginning-of-text token.")
    largest, smallest = max(text), min(text)
    if smallest < 0 or (config is not None and largest >= config.vocab_size):
        wrong = smallest if smallest < 0 else largest
        size = "" if config is None else f" of {config.vocab_size:,}"
        raise M3Error(f"{what} has the token id {wrong}, outside the model's vocabulary{size}: use its own tokenizer.")


def _overflow(what: str, length: int, limit: int) -> M3Error:
    return M3Error(
        f"{what} has {length:,} tokens where the model sees {limit:,}: shorten it, or ask for overflow='truncate_left'."
    )


@contextlib.contextmanager
def _announcing(progress: ProgressFn | None, counts: Callable[[], tuple[int, int, int]]) -> Iterator[None]:
    """Passes on what is compiled inside to the caller."""

    def announce(stage: Literal["prefill", "decode", "score"], batch: int, length: int) -> None:
        if progress is not None:
            progress(Progress("compile", stage, batch, length, *counts()))

    token = _announce.set(announce)
    try:
        yield
    finally:
        _announce.reset(token)


def _model_of(params: Any, config: DecoderConfig | None, apply_fn: ApplyFn | None) -> tuple[_Model, Mesh | None]:
    """The model to run, and the mesh its parameters lie on."""
    mesh = mesh_of(params)
    if apply_fn is not None:
        return _applied_model(cast(Callable[..., Any], apply_fn)), mesh
    if config is None:
        raise M3Error("there is neither a config nor an apply_fn: give the config of the parameters.")
    return _decoder_model(config, mesh), mesh


# --- Generation --------------------------------------------------------------------------------------------------


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
    progress: ProgressFn | None = None,
    apply_fn: ApplyFn | None = None,
) -> list[Completion]:
    """Continues prompts.

    Args:
        params: The decoder's parameters, or whatever `apply_fn` takes.
        config: The decoder; with an `apply_fn` it may be `None`, and then no length is too long.
        prompts: Token ids of each prompt, at least one.
        max_new_tokens: Most tokens of a continuation. It ends earlier where the context does.
        temperature: 0 takes the likeliest token; else logits are divided by it and a token is drawn.
        top_p: Draws among the likeliest tokens whose probabilities add up to this.
        key: Needed to draw: one key, from which prompt i draws with `fold_in(key, i)`, or a key for each prompt.
            What is drawn does not depend on the other prompts or the batch size.
        stop_token_ids: Tokens that end a continuation; those of the config by default.
        stop_strings: Texts that end a continuation.
        detokenize: Text of new token ids; needed for stop strings.
        batch_size: Prompts that run together.
        overflow: What becomes of a prompt that fills the context: an error, or the loss of its left end, such
            that `max_new_tokens` fit behind it but at least half the context is kept.
        progress: Is told what is compiled and when a batch is done.
        apply_fn: A function to run in place of the decoder.

    Returns:
        The continuations, in the order of the prompts.

    Raises:
        M3Error: A prompt is empty, too long or not of the vocabulary, or a setting is impossible.
    """
    _check_settings(max_new_tokens, temperature, top_p, key, stop_strings, detokenize)
    model, mesh = _model_of(params, config, apply_fn)
    limit = None if config is None else config.context_length
    texts = [_fit_prompt(list(p), f"prompt {i}", config, max_new_tokens, overflow) for i, p in enumerate(prompts)]
    if stop_token_ids is None:
        stop_token_ids = () if config is None else config.stop_token_ids
    keys = _prompt_keys(key, len(prompts))
    results: list[Completion | None] = [None] * len(prompts)
    done = tokens = 0
    with _announcing(progress, lambda: (done, len(prompts), tokens)):
        for members in _batches([len(text) for text in texts], batch_size):
            rows = _rows(len(members), batch_size)
            length = length_bucket(max(len(texts[i]) for i in members), limit)
            limits = [min(max_new_tokens, limit - len(texts[i])) if limit else max_new_tokens for i in members]
            limits += [0] * (rows - len(members))  # rows without a prompt are done before they start
            sampling = _Sampling(
                keys=_put(keys[np.array(members + members[:1] * (rows - len(members)))], mesh),
                temperature=jnp.float32(temperature),
                top_p=jnp.float32(top_p),
                stops=jnp.asarray(list(stop_token_ids), jnp.int32),
                limits=_put(np.array(limits, np.int32), mesh),
            )
            found = _run_batch(
                model,
                params,
                *_pad([texts[i] for i in members], rows, length, mesh),
                sampling,
                slots=length + -(-max(limits) // _SLOTS) * _SLOTS,
                greedy=temperature == 0,
                seeks=_Stops(frozenset(stop_token_ids), tuple(stop_strings), detokenize),
                count=len(members),
            )
            for i, (new, finish) in zip(members, found, strict=True):
                if finish == "length" and len(new) < max_new_tokens:
                    finish = "context"
                results[i] = Completion(tuple(new), finish, len(prompts[i]) - len(texts[i]))
                tokens += len(new)
            done += len(members)
            if progress is not None:
                progress(Progress("batch", "decode", rows, length, done, len(prompts), tokens))
    return [result for result in results if result is not None]


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


def _fit_prompt(
    prompt: list[int], what: str, config: DecoderConfig | None, max_new_tokens: int, overflow: Overflow
) -> list[int]:
    """The prompt as it will be read: whole, or its right end."""
    _check_text(prompt, what, config)
    if config is None or len(prompt) < config.context_length:
        return prompt
    if overflow == "error":
        raise _overflow(what, len(prompt), config.context_length)
    return prompt[-max(config.context_length - max_new_tokens, config.context_length // 2) :]


def _prompt_keys(key: Array | None, count: int) -> Key[Array, " prompts"]:
    """A key for each prompt."""
    key = jax.random.key(0) if key is None else key
    if key.ndim == 1:
        if len(key) != count:
            raise M3Error(f"there are {len(key)} keys for {count} prompts: give one key, or one for each.")
        return key
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(count, dtype=jnp.uint32))


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
    model: _Model,
    params: Any,
    tokens: Array,
    lengths: Array,
    sampling: _Sampling,
    *,
    slots: int,
    greedy: bool,
    seeks: _Stops,
    count: int,
) -> list[tuple[list[int], _Finish]]:
    """Continues one batch; returns the new tokens of its first `count` rows."""
    state = _prefill(params, tokens, lengths, sampling, model=model, slots=slots, greedy=greedy)
    news: list[list[int]] = [[] for _ in range(count)]
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


# --- Scoring -----------------------------------------------------------------------------------------------------


def log_likelihoods(
    params: Any,
    config: DecoderConfig | None,
    pairs: Sequence[tuple[Tokens, Tokens]],
    *,
    batch_size: int = 8,
    overflow: Overflow = "error",
    progress: ProgressFn | None = None,
    apply_fn: ApplyFn | None = None,
) -> list[LogLikelihood]:
    """Scores continuations of contexts.

    Args:
        params: The decoder's parameters, or whatever `apply_fn` takes.
        config: The decoder; with an `apply_fn` it may be `None`.
        pairs: Token ids of a context and of its continuation, at least one each.
        batch_size: Pairs that run together.
        overflow: What becomes of a context that leaves no room for its continuation: an error, or the loss of its
            left end. A continuation too long by itself is always an error.
        progress: Is told what is compiled and when a batch is done.
        apply_fn: A function to run in place of the decoder.

    Returns:
        A score for each pair.

    Raises:
        M3Error: A pair is empty, too long or not of the vocabulary.
    """
    model, mesh = _model_of(params, config, apply_fn)
    limit = None if config is None else config.context_length
    texts = [_fit_pair(list(a), list(b), i, config, overflow) for i, (a, b) in enumerate(pairs)]
    results: list[LogLikelihood | None] = [None] * len(pairs)
    done = tokens = 0
    with _announcing(progress, lambda: (done, len(pairs), tokens)):
        for members in _batches([len(text) for text in texts], batch_size):
            rows = _rows(len(members), batch_size)
            # The last token is only to be foretold, but the array that is rolled must hold it: one more than is seen.
            length = length_bucket(max(len(texts[i]) for i in members), None if limit is None else limit + 1)
            batch = _pad([texts[i] for i in members], rows, length, mesh)
            log_probs, greedy = (np.asarray(x) for x in _score(params, *batch, model=model))
            for row, i in enumerate(members):
                continuation = len(pairs[i][1])
                span = slice(len(texts[i]) - 1 - continuation, len(texts[i]) - 1)
                total = float(log_probs[row, span].astype(np.float64).sum())
                dropped = sum(map(len, pairs[i])) - len(texts[i])
                results[i] = LogLikelihood(total, bool(greedy[row, span].all()), dropped)
                tokens += continuation
            done += len(members)
            if progress is not None:
                progress(Progress("batch", "score", rows, length, done, len(pairs), tokens))
    return [result for result in results if result is not None]


def _fit_pair(
    context: list[int], continuation: list[int], i: int, config: DecoderConfig | None, overflow: Overflow
) -> list[int]:
    """Context and continuation as they will be read; the last token is foretold only, and takes no room."""
    _check_text(context, f"context {i}", config)
    _check_text(continuation, f"continuation {i}", config)
    text = context + continuation
    if config is None or len(text) - 1 <= config.context_length:
        return text
    if overflow == "error" or len(continuation) > config.context_length:
        raise _overflow(f"context {i} with its continuation", len(text) - 1, config.context_length)
    return text[-config.context_length - 1 :]
