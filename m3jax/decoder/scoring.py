"""Continuations scored: how likely a model finds them behind their contexts."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from m3jax.decoder.batching import (
    DecoderProgress,
    ProgressFn,
    announcing,
    length_bucket,
    pad,
    row_count,
    say_compiling,
)
from m3jax.decoder.config import DecoderConfig
from m3jax.decoder.prefixes import Shared, room_behind
from m3jax.decoder.running import ApplyFn, ModelFunctions, model_of
from m3jax.decoder.sharing import behind_beginnings, read_together
from m3jax.decoder.texts import Overflow, Tokens, check_text
from m3jax.errors import M3Error


class Likelihood(NamedTuple):
    """How likely a continuation is.

    Attributes:
        log_prob: Natural logarithm of its probability, given the context.
        is_greedy: Whether each of its tokens is the likeliest.
        dropped: Tokens that were cut from the left: of the context, and of the continuation where it is longer
            than what the model sees; then the rest of it is scored.
    """

    log_prob: float
    is_greedy: bool
    dropped: int


@functools.partial(jax.jit, static_argnames="model")
def _score(
    params: Any,
    shared: Shared | None,
    tokens: Int[Array, "batch length"],
    lengths: Int[Array, " batch"],
    *,
    model: ModelFunctions,
) -> tuple[Float[Array, "batch length"], Bool[Array, "batch length"]]:
    """Log probability of each token that follows another, and whether it is the likeliest there."""
    say_compiling("score", *tokens.shape)
    return model.score(params, shared, tokens, lengths)


def log_likelihoods(
    params: Any,
    config: DecoderConfig | None,
    pairs: Sequence[tuple[Tokens, Tokens]],
    *,
    batch_size: int = 8,
    overflow: Overflow = "error",
    share: bool = False,
    progress: ProgressFn | None = None,
    apply_fn: ApplyFn | None = None,
) -> list[Likelihood]:
    """Scores continuations of contexts.

    Args:
        params: The decoder's parameters, or whatever `apply_fn` takes.
        config: The decoder; with an `apply_fn` it may be `None`.
        pairs: Token ids of a context and of its continuation, at least one each.
        batch_size: Pairs that run together.
        overflow: What becomes of a context that leaves no room for its continuation: an error, or the loss of its
            left end, and of the continuation's where that alone is too long; of such a pair the last tokens that
            the model sees are scored.
        share: Read once what contexts of neighbouring pairs begin with, as `generate` does for prompts.
        progress: Is told what is compiled and when a batch is done.
        apply_fn: A function to run in place of the decoder.

    Returns:
        A score for each pair.

    Raises:
        M3Error: A pair is empty, too long or not of the vocabulary.
    """
    model, mesh = model_of(params, config, apply_fn)
    limit = None if config is None else config.context_length
    texts = [_fit_pair(list(a), list(b), i, config, overflow) for i, (a, b) in enumerate(pairs)]
    results: list[Likelihood | None] = [None] * len(pairs)
    done = tokens = 0
    scored = [min(len(pair[1]), len(text) - 1) for pair, text in zip(pairs, texts, strict=True)]
    heads = [text[: len(text) - count] for text, count in zip(texts, scored, strict=True)]
    longest = room_behind(config) if share and config is not None and apply_fn is None else 0
    # The last token is only to be foretold, but the array that is rolled must hold it: one more than is seen.
    whole = functools.partial(length_bucket, limit=None if limit is None else limit + 1)

    def read(beginnings: Sequence[Tokens]) -> tuple[Any, Array]:
        return read_together(model, params, beginnings, batch_size, mesh)

    with announcing(progress, lambda: (done, len(pairs), tokens)):
        for members, wave, length, _ in behind_beginnings(texts, heads, batch_size, longest, whole, read):
            rows = row_count(len(members), batch_size)
            batch = pad([texts[i][wave.cut(i) :] for i in members], rows, length, mesh)
            shared = wave.shared([*members, *[members[0]] * (rows - len(members))], mesh)
            log_probs, greedy = (np.asarray(x) for x in _score(params, shared, *batch, model=model))
            for row, i in enumerate(members):
                end = len(texts[i]) - 1 - wave.cut(i)
                span = slice(end - scored[i], end)
                total = float(log_probs[row, span].astype(np.float64).sum())
                dropped = sum(map(len, pairs[i])) - len(texts[i])
                results[i] = Likelihood(total, bool(greedy[row, span].all()), dropped)
                tokens += scored[i]
            del wave, shared  # the last to hold its beginnings let them go before others are read
            done += len(members)
            if progress is not None:
                progress(DecoderProgress("batch", "score", rows, length, done, len(pairs), tokens))
    return [result for result in results if result is not None]


def _fit_pair(
    context: list[int], continuation: list[int], i: int, config: DecoderConfig | None, overflow: Overflow
) -> list[int]:
    """Context and continuation as they will be read; the last token is foretold only, and takes no room."""
    check_text(context, f"context {i}", config)
    check_text(continuation, f"continuation {i}", config)
    text = context + continuation
    if config is None or len(text) - 1 <= config.context_length:
        return text
    if overflow == "error":
        raise M3Error(
            f"context {i} with its continuation has {len(text) - 1:,} tokens where the model sees"
            f" {config.context_length:,}: shorten it, or ask for overflow='truncate_left'."
        )
    return text[-config.context_length - 1 :]
