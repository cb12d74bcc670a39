import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.decoders import CONFIGS, weights

from m3jax import M3Error
from m3jax.decoder import PADDING, DecoderConfig, bind, generate, length_bucket, params_from_tree
from m3jax.decoder.prefixes import alike
from m3jax.decoder.sampling import nucleus
from m3jax.decoder.sharing import behind_beginnings

ENTRIES = CONFIGS["mistral"] | {"num_hidden_layers": 1}  # compiles in half the time of two
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


def run(prompts=PROMPTS, **settings):
    return generate(PARAMS, CONFIG, prompts, **{"max_new_tokens": 40, "stop_token_ids": (), "batch_size": 4} | settings)


@pytest.fixture(scope="module")
def greedy():
    return [completion.tokens for completion in run()]


def test_greedy_is_the_likeliest_token_of_a_run_without_cache(greedy):
    for prompt, tokens in zip(PROMPTS, greedy, strict=True):
        text = jnp.asarray([[*prompt, *tokens] + [0] * (64 - len(prompt) - 40)])
        likeliest = np.argmax(forward(PARAMS, text)[0], axis=-1)
        assert likeliest[len(prompt) - 1 : len(prompt) + 39].tolist() == list(tokens)


def test_neighbours_and_batch_size_change_nothing(greedy):
    assert [completion.tokens for completion in run(batch_size=1)] == greedy
    assert run([PROMPTS[2]])[0].tokens == greedy[2]


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "key": jax.random.key(4)}])
def test_reading_once_what_prompts_begin_with_changes_no_token(settings):
    beginnings = [RNG.integers(3, 64, 20).tolist() for _ in range(2)]
    prompts = [b + RNG.integers(3, 64, n).tolist() for b in beginnings for n in (1, 7, 3, 2, 9)] + PROMPTS
    events = []
    together = run(prompts, share=True, max_new_tokens=8, progress=events.append, **settings)
    assert together == run(prompts, max_new_tokens=8, **settings)
    lengths = [event.length for event in events if event.event == "batch"]
    assert lengths == [32, 12, 8, 8]  # what has no neighbours alike, whole; then what is behind beginnings
    assert len({one.tokens for one in together}) > 10
    alone = generate(PARAMS, None, prompts, max_new_tokens=8, share=True, apply_fn=apply_fn, stop_token_ids=())
    assert settings or [one.tokens for one in alone] == [one.tokens for one in together]


def test_beginnings_are_read_apart_where_that_is_worth_it():
    def planned(texts, longest=1000):
        found = []
        read = lambda beginnings: (found.append([*map(len, beginnings)]), ("cache", "lengths"))[1]  # noqa: E731
        planned = behind_beginnings(texts, texts, 8, longest, length_bucket, read, 8)
        batches = [(len(members), *padded, wave.lengths is not None) for members, wave, *padded in planned]
        return found, batches

    long, short = [*range(500)], [*range(1000, 1012)]
    unlike = [[-i] * 100 for i in range(1, 5)]
    one = [short[:9] + [i] * 91 for i in range(4)] + unlike
    assert planned(one) == ([], [(8, 128, 128, False)])  # which two batches would take twice as long to go on from
    assert planned([[*long, i] for i in range(8)], longest=500) == ([], [(8, 512, 512, False)])
    # A short text holds few slots, whatever is beside it: a long rest, a long beginning, a text that begins otherwise.
    rests = [short + [i] * (90 if i == 9 else 3) for i in range(16)]
    assert planned(rests) == ([[12]], [(8, 96, 96, True), (8, 8, 32, True)])
    beginnings = [[*b, i] for b in (long, short) for i in range(8)]
    assert planned(beginnings + unlike) == ([[500], [12]], [(4, 128, 128, False), (8, 8, 8, True), (8, 8, 8, True)])


def test_texts_go_with_those_that_begin_alike():
    blocks = [[1, 2, 3, 4, part, *range(10, 20), last] for part in (5, 6) for last in range(4)]
    assert alike(blocks, 4) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert alike([[i, *range(20)] for i in range(9)], 4) == [[*range(9)]]  # nothing to share: all together
    assert alike([[1, 2]], 4) == [[0]]


def test_a_function_of_the_callers_stands_in(greedy):
    calls = {"config": None, "params": PARAMS, "apply_fn": apply_fn}
    found = generate(prompts=PROMPTS, max_new_tokens=40, batch_size=4, **calls)
    assert [completion.tokens for completion in found] == greedy


def test_programs_are_compiled_once_per_batch_and_length():
    config = DecoderConfig.from_dict(ENTRIES | {"eos_token_id": 3})  # a config of its own: nothing cached
    events = []
    settings = {"max_new_tokens": 3, "batch_size": 2, "progress": events.append}
    generate(PARAMS, config, PROMPTS, **settings)
    generate(PARAMS, config, [p * 2 for p in PROMPTS], **settings)  # two buckets: one more prefill and decode
    generate(PARAMS, config, PROMPTS, key=jax.random.key(1), stop_token_ids=(7,), **settings)
    compiled = [(e.stage, e.batch, e.length) for e in events if e.event == "compile"]
    assert compiled == [("prefill", 2, 32), ("decode", 2, 96), ("prefill", 2, 64), ("decode", 2, 128)]
    assert [(e.done, e.total) for e in events if e.event == "batch"] == [(2, 4), (4, 4)] * 3


def test_stop_tokens_end_a_text_and_are_left_out(greedy):
    stop = greedy[0][10]
    for completion, whole in zip(run(stop_token_ids=(stop,)), greedy, strict=True):
        end = whole.index(stop) if stop in whole else None
        assert completion.tokens == whole[:end]
        assert completion.finish == ("length" if end is None else "stop_token")
    first = greedy[1][0]
    assert run([PROMPTS[1]], stop_token_ids=(first,))[0] == ((), "stop_token", 0)


def text_of(tokens):
    return "".join(f"<{token}>" for token in tokens)


@pytest.mark.parametrize("place", [0, 12, 38])
def test_stop_strings_end_a_text_with_the_token_that_completes_them(greedy, place):
    stop = f"{greedy[2][place]}><{greedy[2][place + 1]}"
    found = run(stop_strings=(stop,), detokenize=text_of)
    for completion, whole in zip(found, greedy, strict=True):
        ends = [n for n in range(1, 41) if stop in text_of(whole[:n])]
        assert completion.tokens == (whole[: ends[0]] if ends else whole)
        assert completion.finish == ("stop_string" if ends else "length")
    assert found[2].finish == "stop_string"


@pytest.mark.slow
def test_draws_depend_on_key_and_place_in_the_list_alone(greedy):
    settings = {"temperature": 1.5, "key": jax.random.key(7)}
    drawn = [completion.tokens for completion in run(**settings)]
    assert drawn != greedy
    assert [completion.tokens for completion in run(batch_size=1, **settings)] == drawn
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(7), jnp.arange(4))
    assert run([PROMPTS[3]], temperature=1.5, key=keys[3:])[0].tokens == drawn[3]
    assert [completion.tokens for completion in run(temperature=1.5, key=jax.random.key(8))] != drawn
    assert [completion.tokens for completion in run(temperature=1.5, top_p=1e-6, key=jax.random.key(7))] == greedy


def test_nucleus_keeps_the_likeliest():
    logits = jnp.log(jnp.array([[0.1, 0.5, 0.15, 0.25]]))
    for top_p, kept in ((0.4, [1]), (0.6, [1, 3]), (0.8, [1, 2, 3]), (1.0, [0, 1, 2, 3])):
        assert np.flatnonzero(np.isfinite(nucleus(logits, jnp.float32(top_p)))).tolist() == kept


def test_the_context_ends_a_text_openly():
    prompt = RNG.integers(3, 64, 60).tolist()
    (found,) = run([prompt], max_new_tokens=100)  # no more than half the context: read as it is
    assert (len(found.tokens), *found[1:]) == (68, "context", 0)


@pytest.mark.parametrize("length", [89, 127, 128, 200])
def test_every_prompt_that_leaves_no_room_fares_alike(length):
    prompt = RNG.integers(3, 64, length).tolist()
    with pytest.raises(M3Error, match=rf"prompt 0 has {length} tokens, behind which 40 new ones do not fit .*sees 128"):
        run([prompt])
    (cut,) = run([prompt], overflow="truncate_left")
    assert (len(cut.tokens), *cut[1:]) == (40, "length", length - 88)
    assert run([prompt[-88:]]) == [cut._replace(dropped=0)]


def test_one_program_serves_all_prompts_of_a_bucket():
    config = DecoderConfig.from_dict(ENTRIES | {"eos_token_id": 4})  # a config of its own: nothing cached
    events = []
    for length in (33, 40, 50, 63, 64):
        prompts = [RNG.integers(3, 64, n).tolist() for n in (length, 2 * length - 64)]
        # More new tokens than the context leaves behind any of them.
        generate(PARAMS, config, prompts, max_new_tokens=1000, batch_size=2, progress=events.append)
    compiled = [(e.stage, e.batch, e.length) for e in events if e.event == "compile"]
    assert compiled == [("prefill", 2, 64), ("decode", 2, 192)]


def test_a_function_of_the_callers_sees_no_text_longer_than_the_context():
    seen = []

    def limited(params, tokens, lengths):
        seen.append(tokens.shape[1])
        return forward(params, tokens)

    prompt = RNG.integers(3, 64, 60).tolist()
    found = generate(PARAMS, CONFIG, [prompt], max_new_tokens=100, stop_token_ids=(), apply_fn=limited)
    assert max(seen) == CONFIG.context_length
    assert found == run([prompt], max_new_tokens=100)


LONG = CONFIGS["phi3"] | {"num_hidden_layers": 1, "sliding_window": None}
LONG_CONFIG = DecoderConfig.from_dict(LONG)
LONG_PARAMS = params_from_tree(weights(LONG), LONG_CONFIG)


def run_long(prompts, **settings):
    settings = {"max_new_tokens": 20, "stop_token_ids": (), "batch_size": 4} | settings
    return generate(LONG_PARAMS, LONG_CONFIG, prompts, **settings)


def test_a_text_that_grows_beyond_the_turning_point_is_read_again():
    prompts = [RNG.integers(3, 64, n).tolist() for n in (5, 30, 32, 33, 60)]  # the turning point is 32

    @jax.jit
    def likeliest(tokens, positions):
        decoder = bind(LONG_CONFIG, LONG_PARAMS)
        return jnp.argmax(decoder.logits(decoder(tokens, positions)[0]), axis=-1)

    found = run_long(prompts)
    for prompt, completion in zip(prompts, found, strict=True):
        text = list(prompt)
        for _ in range(20):
            row = np.zeros((1, 80), np.int32)
            row[0, : len(text)] = text
            places = jnp.where(jnp.arange(80) < len(text), jnp.arange(80), PADDING)[None, :]
            text.append(int(likeliest(jnp.asarray(row), places)[0, len(text) - 1]))
        assert (list(completion.tokens), *completion[1:]) == (text[len(prompt) :], "length", 0)
    assert [one for prompt in prompts for one in run_long([prompt])] == found


def test_the_turning_point_hides_no_stop_and_no_draw():
    prompts = [RNG.integers(3, 64, n).tolist() for n in (20, 31)]
    whole = run_long(prompts, temperature=1.0, key=jax.random.key(3))
    assert [len(one.tokens) for one in whole] == [20, 20]
    for turned in (1, 2, 3):  # tokens of the second row around the one at which it turns
        short = run_long(prompts, temperature=1.0, key=jax.random.key(3), max_new_tokens=turned)
        assert [one.tokens for one in short] == [one.tokens[:turned] for one in whole]
    end = f"{whole[1].tokens[1]}><{whole[1].tokens[2]}"
    stopped = run_long(prompts, temperature=1.0, key=jax.random.key(3), stop_strings=(end,), detokenize=text_of)
    assert stopped[1].tokens == whole[1].tokens[:3]
    assert stopped[1].finish == "stop_string"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"prompts": [[4], []]}, "prompt 1 is empty"),
        ({"prompts": [[4, 64]]}, "token id 64, outside the model's vocabulary of 64"),
        ({"prompts": [[-1]]}, "token id -1"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"batch_size": 0}, "batch size 0"),
        ({"batch_size": -1, "share": True}, "batch size -1"),
        ({"temperature": 1.0}, "there is no key"),
        ({"temperature": -1.0}, "out of range"),
        ({"top_p": 0.0}, "out of range"),
        ({"stop_strings": ("a",)}, "give detokenize"),
        ({"stop_strings": ("",), "detokenize": text_of}, "stop string is empty"),
        ({"temperature": 1.0, "key": jax.random.split(jax.random.key(0), 3)}, "3 keys for 4 prompts"),
    ],
)
def test_impossible_settings_are_errors(settings, said):
    with pytest.raises(M3Error, match=said):
        run(**settings)
    with pytest.raises(M3Error, match="neither a config nor an apply_fn"):
        generate(PARAMS, None, PROMPTS, max_new_tokens=1)


def test_no_prompts_give_no_texts():
    assert run([]) == []


def test_buckets_are_powers_of_two_within_the_context():
    assert [length_bucket(n) for n in (1, 32, 33, 64, 65)] == [32, 32, 64, 64, 128]
    assert length_bucket(70, 100) == 100
