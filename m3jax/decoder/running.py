"""What runs a model: the decoder with its cache, or a function of the caller's own, behind the same three functions."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from m3jax.decoder.config import DecoderConfig
from m3jax.decoder.modeling import bind
from m3jax.decoder.params import mesh_of
from m3jax.decoder.prefixes import Shared, read_beginnings, read_on
from m3jax.errors import M3Error

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


class ModelFunctions(NamedTuple):
    """Pure functions that generation and scoring are made of; hashable, so that compiled functions are keyed by it.

    Attributes:
        begin: From params, beginnings of texts and their lengths to what was read of them; None where nothing can be
            read apart from what follows.
        prefill: From params, beginnings that were read (None for none), what follows them (tokens and lengths) and a
            number of slots for that and for tokens to come to logits behind each text and a cache.
        step: From params, cache, one token of each row and its position to logits and cache.
        score: From params, beginnings that were read, and what follows them to the log probability of each token that
            follows another there, and whether it is the likeliest.
    """

    begin: Callable[[Any, Array, Array], Any] | None
    prefill: Callable[[Any, Shared | None, Array, Array, int], tuple[Array, Any]]
    step: Callable[[Any, Any, Array, Array], tuple[Array, Any]]
    score: Callable[[Any, Shared | None, Array, Array], tuple[Array, Array]]


@functools.lru_cache(maxsize=64)
def _decoder_model(config: DecoderConfig, mesh: Mesh | None) -> ModelFunctions:
    """The decoder, with a cache."""

    def begin(params: Any, tokens: Array, lengths: Array) -> Any:
        return read_beginnings(bind(config, params), tokens, lengths, mesh)

    def prefill(params: Any, shared: Shared | None, tokens: Array, lengths: Array, slots: int) -> tuple[Array, Any]:
        decoder = bind(config, params)
        hidden, cache = read_on(decoder, shared, tokens, lengths, slots - tokens.shape[1], mesh)
        return decoder.logits(_at(hidden, lengths - 1)), cache

    def step(params: Any, cache: Any, token: Array, position: Array) -> tuple[Array, Any]:
        decoder = bind(config, params)
        hidden, cache = decoder(token[:, None], position[:, None], cache, mesh)
        return decoder.logits(hidden[:, 0]), cache

    def score(params: Any, shared: Shared | None, tokens: Array, lengths: Array) -> tuple[Array, Array]:
        decoder = bind(config, params)
        # The last token is foretold only: it is not read, and does not make the text longer.
        hidden, _ = read_on(decoder, shared, tokens, lengths - 1, mesh=mesh)
        return _in_pieces(lambda h, t: _score_logits(decoder.logits(h), t), hidden, _following(tokens))

    return ModelFunctions(begin, prefill, step, score)


@functools.lru_cache(maxsize=64)
def _applied_model(apply_fn: Callable[..., Any]) -> ModelFunctions:
    """A function without a cache: the texts themselves take its place."""

    def prefill(params: Any, _: Shared | None, tokens: Array, lengths: Array, slots: int) -> tuple[Array, Any]:
        texts = jnp.pad(tokens, ((0, 0), (0, slots - tokens.shape[1])))
        return _at(apply_fn(params, texts, lengths), lengths - 1).astype(jnp.float32), texts

    def step(params: Any, texts: Any, token: Array, position: Array) -> tuple[Array, Any]:
        texts = texts.at[jnp.arange(len(token)), position].set(token)
        return _at(apply_fn(params, texts, position + 1), position).astype(jnp.float32), texts

    def score(params: Any, _: Shared | None, tokens: Array, lengths: Array) -> tuple[Array, Array]:
        return _score_logits(apply_fn(params, tokens, lengths).astype(jnp.float32), _following(tokens))

    return ModelFunctions(None, prefill, step, score)


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


def model_of(params: Any, config: DecoderConfig | None, apply_fn: ApplyFn | None) -> tuple[ModelFunctions, Mesh | None]:
    """The model to run, and the mesh its parameters lie on.

    Args:
        params: The decoder's parameters, or whatever `apply_fn` takes.
        config: The decoder.
        apply_fn: A function to run in its place.

    Raises:
        M3Error: There is neither a config nor a function.
    """
    mesh = mesh_of(params)
    if apply_fn is not None:
        return _applied_model(cast(Callable[..., Any], apply_fn)), mesh
    if config is None:
        raise M3Error("there is neither a config nor an apply_fn: give the config of the parameters.")
    return _decoder_model(config, mesh), mesh
