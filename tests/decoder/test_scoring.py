import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.decoders import CONFIGS, weights

from m3jax import M3Error
from m3jax.decoder import DecoderConfig, bind, generate, log_likelihoods, params_from_tree

ENTRIES = CONFIGS["mistral"] | {"num_hidden_layers": 1}
CONFIG = DecoderConfig.from_dict(ENTRIES)
PARAMS = params_from_tree(weights(ENTRIES), CONFIG)
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(3, 64, n).tolist() for n in (5, 1, 19, 9)]


@jax.jit
def forward(params, tokens):
    decoder = bind(CONFIG, params)
    return decoder.logits(decoder(tokens)[0])


def apply_fn(params, tokens, lengths):
    return forward(params, tokens)


def test_a_function_of_the_callers_stands_in():
    pairs = [(PROMPTS[0], [5, 6]), (PROMPTS[1], [7])]
    ours = log_likelihoods(PARAMS, CONFIG, pairs)
    theirs = log_likelihoods(PARAMS, None, pairs, apply_fn=apply_fn)
    assert [score.log_prob for score in ours] == pytest.approx([score.log_prob for score in theirs], abs=1e-4)


def test_log_likelihoods_are_those_of_a_run_without_padding():
    pairs = [(PROMPTS[0], PROMPTS[3]), (PROMPTS[1], [7]), (PROMPTS[2], PROMPTS[2])]
    for (context, continuation), found in zip(pairs, log_likelihoods(PARAMS, CONFIG, pairs, batch_size=2), strict=True):
        length = len(context) + len(continuation)
        text = jnp.asarray([context + continuation + [0] * (64 - length)])
        logits = forward(PARAMS, text)[0, len(context) - 1 : length - 1]
        log_probs = jax.nn.log_softmax(logits)[jnp.arange(len(continuation)), jnp.asarray(continuation)]
        assert found.log_prob == pytest.approx(float(log_probs.sum()), abs=1e-4)
        assert found.is_greedy == (np.argmax(logits, -1).tolist() == continuation)


def test_greedy_texts_are_found_to_be_greedy():
    written = generate(PARAMS, CONFIG, PROMPTS, max_new_tokens=12, stop_token_ids=(), batch_size=4)
    pairs = [(prompt, completion.tokens) for prompt, completion in zip(PROMPTS, written, strict=True)]
    assert all(found.is_greedy for found in log_likelihoods(PARAMS, CONFIG, pairs, batch_size=2))


def test_scored_texts_use_the_whole_context():
    context, continuation = RNG.integers(3, 64, 120).tolist(), RNG.integers(3, 64, 9).tolist()
    full = log_likelihoods(PARAMS, CONFIG, [(context, continuation)])[0]
    assert full.dropped == 0
    with pytest.raises(M3Error, match="context 0 with its continuation has 130 tokens where the model sees 128"):
        log_likelihoods(PARAMS, CONFIG, [([4, 5, *context], continuation)])
    cut = log_likelihoods(PARAMS, CONFIG, [([4, 5, *context], continuation)], overflow="truncate_left")[0]
    assert cut == full._replace(dropped=2)


@pytest.mark.parametrize("length", [128, 129, 135, 300])
def test_of_a_continuation_too_long_the_last_tokens_are_scored(length):
    context, continuation = [4, 5, 6], RNG.integers(3, 64, length).tolist()
    text = (context + continuation)[-129:]
    scored = min(length, 128)
    with pytest.raises(M3Error, match="context 0 with its continuation"):
        log_likelihoods(PARAMS, CONFIG, [(context, continuation)])
    (found,) = log_likelihoods(PARAMS, CONFIG, [(context, continuation)], overflow="truncate_left")
    log_probs = jax.nn.log_softmax(forward(PARAMS, jnp.asarray([text[:-1]]))[0])
    want = log_probs[jnp.arange(128), jnp.asarray(text[1:])][-scored:].sum()
    assert found.log_prob == pytest.approx(float(want), abs=1e-3)
    assert found.dropped == length + 3 - 129


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_reading_once_what_contexts_begin_with_changes_no_score(batch_size):
    shots = RNG.integers(3, 64, 30).tolist()
    contexts = [shots + RNG.integers(3, 64, n).tolist() for n in (0, 1, 7, 12)]
    pairs = [(context, RNG.integers(3, 64, n).tolist()) for context in contexts for n in (1, 1, 3, 6)]
    pairs += [(shots[:1], shots[1:]), ([5], [6]), (contexts[3], contexts[3])]  # as long as the context allows, or short
    asked = {"batch_size": batch_size}
    shared, whole = [], []
    together = log_likelihoods(PARAMS, CONFIG, pairs, share=True, progress=shared.append, **asked)
    alone = log_likelihoods(PARAMS, CONFIG, pairs, progress=whole.append, **asked)
    np.testing.assert_allclose([s.log_prob for s in together], [s.log_prob for s in alone], rtol=2e-5, atol=2e-5)
    assert [s[1:] for s in together] == [s[1:] for s in alone]
    read, of_all = (sum(e.batch * e.length for e in events if e.event == "batch") for events in (shared, whole))
    assert read < 0.7 * of_all


def test_no_pairs_give_no_scores():
    assert log_likelihoods(PARAMS, CONFIG, []) == []
