"""The transformations against examples worked by hand, the search, and the drop it is measured by."""

import functools
import hashlib
import itertools
import random
import re
import string

import jax
import numpy as np
import pytest

from m3jax.errors import M3Error
from m3jax.evaluation.attacks import (
    ATTACKS,
    Sources,
    Wording,
    edits,
    get_profile,
    greedy,
    make_attack,
    measure_drop,
    read_embeddings,
    sentences,
    synonyms,
)
from m3jax.evaluation.attacks.edits import levenshtein
from m3jax.evaluation.attacks.masked_lm import best_first, masked_words
from m3jax.evaluation.attacks.search import modifiable
from m3jax.evaluation.attacks.words import STOP_WORDS
from m3jax.evaluation.statistics import wilson_interval

PROMPT = "Decide whether the mood of this text is 'positive' or 'negative'.\nText: {content}\nAnswer:"
LABELS = ("positive", "negative")


def wording(prompt=PROMPT):
    return Wording.of(prompt, LABELS)


# --- Words and what lies between ---------------------------------------------------------------------------------


def test_a_prompt_comes_apart_and_together():
    prompt = wording()
    assert prompt.text == PROMPT
    assert [word for index, word in enumerate(prompt.words) if index in prompt.fixed] == ["positive", "negative"]
    assert "content" not in prompt.words
    assert Wording.of("a-b c_d don't {x}{y} é2").words == ("a-b", "c_d", "don't", "é2")
    assert Wording.of("{content}").words == ()
    assert Wording.of("") == Wording((), ("",), frozenset())


def test_labels_of_several_words_and_inside_others_are_kept():
    prompt = Wording.of("Say Very Good, or verygood, or good-natured; never bad.", ["very good", "good"])
    kept = [prompt.words[i] for i in sorted(prompt.fixed)]
    assert kept == ["Very", "Good", "good-natured"]


def test_leaving_a_word_out_takes_one_space():
    prompt = Wording.of("Say  it, now.")
    assert [prompt.without(i) for i in range(3)] == [" it, now.", "Say , now.", "Say  it,."]


def test_additions_go_behind_the_last_word_or_placeholder():
    assert Wording.of("Good or bad: {content}").followed_by(" x") == "Good or bad: {content} x"
    assert Wording.of("{content}\nAnswer:").followed_by(" x") == "{content}\nAnswer x:"
    assert Wording.of("Answer.").followed_by(" x") == "Answer x."
    assert Wording.of("").followed_by(" x") == " x"


# --- Letters -----------------------------------------------------------------------------------------------------


def test_edits_by_hand():
    assert [edits.swap("film", at) for at in range(3)] == ["iflm", "flim", "fiml"]
    assert [edits.substitute("film", at, "x") for at in range(4)] == ["xilm", "fxlm", "fixm", "filx"]
    assert [edits.delete("film", at) for at in range(4)] == ["ilm", "flm", "fim", "fil"]
    assert [edits.insert("film", at, "x") for at in range(5)] == ["xfilm", "fxilm", "fixlm", "filxm", "filmx"]
    assert edits.look_alikes("at1") == ["ɑt1", "a𝚝1", "atl"]
    assert edits.look_alikes("É!") == []


def slow_levenshtein(a, b):
    if not a or not b:
        return len(a) + len(b)
    rest = slow_levenshtein(a[1:], b[1:]) + (a[0] != b[0])
    return min(rest, slow_levenshtein(a[1:], b) + 1, slow_levenshtein(a, b[1:]) + 1)


def test_edit_distance_is_that_of_the_definition():
    chance = random.Random(0)
    for _ in range(200):
        a, b = ("".join(chance.choices("abc", k=chance.randrange(6))) for _ in range(2))
        assert levenshtein(a, b) == slow_levenshtein(a, b)
    assert levenshtein("a" * 100 + "b" * 100, "b" * 100 + "a" * 100) == 200
    assert levenshtein("intention", "execution") == 5


def test_deepwordbug_has_one_edit_of_each_kind():
    found = {kind: set() for kind in ("swap", "substitute", "delete", "insert")}
    for seed in range(900):
        four = edits.deepwordbug(seed)(Wording.of("film"), 0)
        for kind, word in zip(found, four, strict=True):
            found[kind].add(word)
    assert found["swap"] == {"iflm", "flim", "fiml"}
    assert found["delete"] == {"ilm", "flm", "fim", "fil"}
    assert all(len(word) == 4 and levenshtein(word, "film") == 1 for word in found["substitute"])
    assert all(len(word) == 5 and levenshtein(word, "film") == 1 for word in found["insert"])
    places = {next((i for i, (x, y) in enumerate(zip(w, "film", strict=False)) if x != y), 4) for w in found["insert"]}
    assert places == {0, 1, 2, 3, 4}
    assert len({w[i] for w in found["substitute"] for i in range(4) if w[i] != "film"[i]}) == 52


def test_textbugger_leaves_first_and_last_letter_but_for_look_alikes():
    inserted, deleted, swapped = set(), set(), set()
    for seed in range(100):
        made = edits.textbugger(seed)(Wording.of("films"), 0)
        assert made[3:] == edits.look_alikes("films")
        inserted.add(made[0])
        deleted.add(made[1])
        swapped.add(made[2])
    assert inserted == {"f ilms", "fi lms", "fil ms", "film s"}
    assert deleted == {"flms", "fims", "fils"}
    assert swapped == {"flims", "fimls"}
    assert edits.textbugger(0)(Wording.of("A"), 0) == []
    assert edits.textbugger(0)(Wording.of("at"), 0) == ["a t", "ɑt", "a𝚝"]


def test_words_of_one_letter_have_no_neighbours():
    assert [len(word) for word in edits.deepwordbug(0)(Wording.of("I"), 0)] == [1, 2]


# --- Sentences ---------------------------------------------------------------------------------------------------


def test_stresstest_has_three_tautologies():
    assert sentences.stresstest(Wording.of("Good or bad? {content}")) == [
        "Good or bad? {content} and true is true",
        "Good or bad? {content} and false is not true",
        "Good or bad? {content}" + " and true is true" * 5,
    ]


def test_checklist_has_fifty_random_sequences():
    variants = sentences.checklist(3)(Wording.of("Answer."))
    assert len(set(variants)) == 50
    assert all(re.fullmatch(r"Answer [A-Za-z0-9]{10}\.", variant) for variant in variants)
    assert set("".join(variant[7:-1] for variant in variants)) >= set("09azAZ")
    assert variants == sentences.checklist(jax.random.key(3))(Wording.of("Answer."))
    assert variants != sentences.checklist(4)(Wording.of("Answer."))


# --- Words -------------------------------------------------------------------------------------------------------

VECTORS = "good 1 0\nfine 0.9 0.1\nbad -1 0\ngreat 0.8 0.6\nfilm 0 1\n"


def test_synonyms_are_the_nearest_by_cosine(tmp_path):
    (tmp_path / "vectors.txt").write_text(VECTORS)
    embeddings = read_embeddings(tmp_path / "vectors.txt")
    prompt = Wording.of("Good film, good day")
    assert synonyms(embeddings, 10)(prompt, 0) == ["Fine", "Great", "Film", "Bad"]
    assert synonyms(embeddings, 10, 0.6)(prompt, 2) == ["fine", "great"]
    assert synonyms(embeddings, 1)(prompt, 2) == ["fine"]
    assert synonyms(embeddings, 10)(prompt, 3) == []
    np.testing.assert_allclose(np.linalg.norm(embeddings.vectors, axis=1), 1, rtol=1e-6)
    (tmp_path / "headed.txt").write_text("5 2\n" + VECTORS)
    assert read_embeddings(tmp_path / "headed.txt").rows == embeddings.rows


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "No such file"),
        ("", "holds no word vectors"),
        ("good 0 0\nbad 0 0\n", "holds no word vectors"),
        ("good 1 0\nbad x 0\n", "line 2 is no word vector"),
        ("good 1 0\nbad 1 nan\n", "line 2 is no word vector"),
        ("good 1 0\nbad 1\n", "line 2 has 1 numbers where the first has 2"),
    ],
)
def test_embeddings_that_are_none(tmp_path, text, sentence):
    path = tmp_path / "vectors.txt"
    if text is not None:
        path.write_text(text)
    with pytest.raises(M3Error, match=sentence):
        read_embeddings(path)


class Pieces:
    """A tokenizer of known words and their pieces."""

    names = ("[CLS]", "[SEP]", "good", "bad", "film", "##s", "##y", "the", "!", "Fine")
    all_special_ids = (0, 1)

    def __len__(self):
        return len(self.names)

    def convert_ids_to_tokens(self, ids):
        return [self.names[i] for i in ids]

    def __call__(self, text, return_offsets_mapping):
        found = [(0, (0, 0))]
        for word in re.finditer(r"good|bad|film|the", text):
            found.append((self.names.index(word[0]), word.span()))
            if text[word.end() : word.end() + 1] in ("s", "y"):
                found.append((self.names.index("##" + text[word.end()]), (word.end(), word.end() + 1)))
        found.append((1, (0, 0)))
        return {"input_ids": [token for token, _ in found], "offset_mapping": [span for _, span in found]}


def test_masked_words_are_the_likeliest_words():
    likes = {"good": 5.0, "the": 4.5, "bad": 4.0, "##y": 3.5, "!": 3.0, "Fine": 2.0, "film": 1.0}

    def scores(text):
        rows = np.zeros((len(text), len(Pieces.names)), np.float32)
        rows[:] = [likes.get(name, -9.0) for name in Pieces.names]
        rows[:, 5] += 3 * (np.array(text) == 5)
        return rows

    candidates = masked_words(Pieces(), scores, 6)
    assert candidates(Wording.of("a good film"), 1) == ["bad", "Fine"]
    assert candidates(Wording.of("a good film"), 2) == ["good", "bad", "Fine"]
    assert candidates(Wording.of("a xyz film"), 1) == []
    two = masked_words(Pieces(), scores, 4)(Wording.of("films"), 0)
    assert two == ["goodgood", "goodthe", "thegood", "goodbad"]
    letter = functools.partial(masked_words, Pieces(), scores, to_the_letter=True)
    assert letter(4)(Wording.of("films"), 0) == ["goodgood", "goodthe", "goodbad", "goody"]  # not the best: the first
    assert letter(6)(Wording.of("a good film"), 2) == ["good", "the", "bad", "Fine"]
    assert letter(6)(Wording.of("a xyz film"), 1) == []


def test_best_combinations_come_first():
    chance = np.random.default_rng(0)
    choices = [sorted((float(loss), token) for token, loss in enumerate(chance.random(4))) for _ in range(3)]
    every = [(a[0] + b[0] + c[0], (a[1], b[1], c[1])) for a in choices[0] for b in choices[1] for c in choices[2]]
    assert best_first(choices, 20) == [tokens for _, tokens in sorted(every)[:20]]
    assert len(best_first(choices, 100)) == 64


# --- The search --------------------------------------------------------------------------------------------------


def scoring(rule, batches=None):
    """Scores prompts by a rule, and notes what comes in one batch."""

    def score(prompts):
        if batches is not None:
            batches.append(list(prompts))
        return np.array([rule(prompt) for prompt in prompts], np.float64)

    return score


def test_the_search_takes_the_most_important_word_first():
    """Worked by hand: without 'mood' accuracy is 0.4, without 'text' 0.7; each has a candidate that costs as much."""
    costs = {"mood": 0.6, "text": 0.3}
    batches = []
    score = scoring(lambda prompt: 1.0 - sum(cost for word, cost in costs.items() if word not in prompt), batches)
    prompt = Wording.of("the text has a mood today", [])
    found = greedy(prompt, score, lambda p, i: [p.words[i] + "s", p.words[i][::-1]], "unk", stop_words=STOP_WORDS)
    assert batches[0] == [prompt.text]
    assert batches[1] == ["the [UNK] has a mood today", "the text has a [UNK] today", "the text has a mood [UNK]"]
    assert batches[2] == ["the text has a moods today", "the text has a doom today"]
    assert batches[3] == ["the texts has a doom today", "the txet has a doom today"]
    assert batches[4] == ["the txet has a doom todays", "the txet has a doom yadot"]
    assert found.prompt == "the txet has a doom today"
    assert found.score == pytest.approx(0.1)
    assert [(change.before, change.after) for change in found.changes] == [("mood", "doom"), ("text", "txet")]
    assert (found.clean, found.queries, found.exhausted) == (1.0, 10, False)


def test_the_search_stops_where_nothing_is_left():
    score = scoring(lambda prompt: float("mood" in prompt))
    found = greedy(Wording.of("one mood two"), score, lambda p, i: ["x"], "delete")
    assert (found.prompt, found.score, found.queries) == ("one x two", 0.0, 5)
    none = greedy(Wording.of("one two"), score, lambda p, i: ["x"], "delete")
    assert (none.prompt, none.queries, none.changes) == ("one two", 1, ())


def test_an_attack_that_has_nothing_to_try_says_so():
    found = greedy(Wording.of("one mood two"), scoring(lambda prompt: 1.0), lambda p, i: [], "delete")
    assert (found.candidates, found.prompt) == (0, "one mood two")
    assert greedy(Wording.of("one"), scoring(lambda prompt: 1.0), lambda p, i: ["a", "b"], "unk").candidates == 2


@pytest.mark.parametrize("name", ["deepwordbug", "textbugger", "stresstest", "checklist"])
def test_a_budget_is_never_exceeded(name):
    scored = []
    score = scoring(lambda prompt: scored.append(prompt) or 1.0 / len(prompt))
    whole = make_attack(name, 0).run(wording(), score, None)
    assert whole.queries == len(scored) == len(set(scored))
    assert not whole.exhausted
    for budget in (1, 2, 3, whole.queries - 1, whole.queries):
        scored.clear()
        found = make_attack(name, 0).run(wording(), score, budget)
        assert found.queries == len(scored) == budget
        assert found.exhausted == (budget < whole.queries)
        assert found.score <= found.clean


def test_the_papers_limits_take_three_words():
    prompt = Wording.of("first second third fourth fifth sixth seventh eighth", ["second"])
    assert modifiable(prompt, frozenset(), get_profile("m3-paper").positions) == [3, 4, 7]
    assert modifiable(Wording.of("a b c"), frozenset(), get_profile("m3-paper").positions) == [2]
    found = make_attack("deepwordbug", 0, get_profile("m3-paper")).run(prompt, scoring(lambda p: 1 / len(p)), None)
    assert {change.place for change in found.changes} <= {3, 4, 7}


def test_names_that_are_none():
    with pytest.raises(M3Error, match="did you mean deepwordbug"):
        make_attack("deepwordbugs", 0)
    with pytest.raises(M3Error, match="--masked-lm MODEL"):
        make_attack("bertattack", 0)
    with pytest.raises(M3Error, match="--embeddings FILE"):
        make_attack("textfooler", 0)
    with pytest.raises(M3Error, match="did you mean m3-paper"):
        get_profile("m3paper")


# --- What holds for any prompt -----------------------------------------------------------------------------------


def random_prompt(chance):
    """Words, labels, placeholders, punctuation and foreign letters."""
    kinds = [
        lambda: "".join(chance.choices(string.ascii_letters, k=chance.randrange(1, 9))),
        lambda: chance.choice([*LABELS, "Positive", "the", "of", "{content}", "{other}", "naïve", "12,5", "don't"]),
    ]
    pieces = [chance.choice(kinds)() + chance.choice([" ", " ", ", ", "\n", ". '", ""]) for _ in range(7)]
    return "".join(pieces)


def test_distance_and_protected_words_hold_on_ten_thousand_prompts():
    chance = random.Random(7)
    attacks = [make_attack(name, 5) for name in ("deepwordbug", "textbugger", "stresstest", "checklist")]
    kept = re.compile(r"\{[^{}\s]*\}|(?<![^\W_])(?:positive|negative)(?![^\W_])", re.IGNORECASE)
    changed = 0
    for number in range(10_000):
        prompt = Wording.of(random_prompt(chance), LABELS)
        scored = []
        attacks[number % 4].run(prompt, scoring(lambda text, seen=scored: seen.append(text) or chance.random()), 12)
        fixed = kept.findall(prompt.text)
        for text in scored:
            changed += text != prompt.text
            left = iter(kept.findall(text))  # a space put into "thenegative" makes one more label
            assert all(one in left for one in fixed), (prompt.text, text)
            assert number % 4 or "[UNK]" in text or levenshtein(prompt.text, text) <= 30
    assert changed > 50_000


def test_the_bound_on_the_distance_is_reached_and_kept():
    prompt = Wording.of(" ".join(f"word{letter}" for letter in string.ascii_lowercase * 2))
    untouched = scoring(lambda text: -levenshtein(prompt.text, text) / 1000 + 1)
    found = make_attack("deepwordbug", 0).run(prompt, untouched, None)
    assert 29 <= levenshtein(prompt.text, found.prompt) <= 30


def test_the_same_key_gives_the_same_attack():
    score = scoring(lambda text: (hash_of(text) % 1000) / 1000)
    for name in ("deepwordbug", "textbugger", "checklist"):
        runs = [make_attack(name, key).run(wording(), score, None) for key in (9, jax.random.key(9), 10)]
        assert runs[0] == runs[1]
        assert runs[0] != runs[2] or name == "textbugger"  # whose look-alikes, which won here, are not random


def hash_of(text):
    """A hash that does not change from run to run."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


# --- Planted classifiers -----------------------------------------------------------------------------------------


def only_letters_of_ours(text):
    return all(ord(letter) < 128 for letter in text)


def substituted(text):
    """Whether one ASCII letter gave way to another, which deepwordbug alone does."""
    near = len(text) == len(PROMPT) and sum(a != b for a, b in zip(text, PROMPT, strict=True)) < 9
    return near and only_letters_of_ours(text) and sorted(text) != sorted(PROMPT)


PLANTED = {
    "deepwordbug": lambda text: not substituted(text),
    "textbugger": only_letters_of_ours,
    "bertattack": lambda text: "zebra" not in text.lower(),
    "textfooler": lambda text: "temper" not in text.lower(),
    "stresstest": lambda text: "false is not true" not in text,
    "checklist": lambda text: not re.search(r"Answer [A-Za-z0-9]{10}:", text),
    "semantic": lambda text: "emotional bent" not in text,
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    path = tmp_path_factory.mktemp("vectors") / "vectors.txt"
    path.write_text("mood 1 0\ntemper 0.9 0.1\ntext -1 0\n")
    return Sources(lambda most, to_the_letter: lambda prompt, index: ["zebra"], read_embeddings(path), "sst2")


@pytest.mark.parametrize("name", ATTACKS)
def test_a_planted_classifier_is_broken_by_its_attack_and_no_other(name, sources):
    assert set(PLANTED) == set(ATTACKS)
    near = sources._replace(embeddings=None)  # synonyms are textfooler's alone here, not textbugger's fifth bug
    for planted, rule in PLANTED.items():
        attack = make_attack(name, 0, sources=sources if name == "textfooler" else near)
        found = attack.run(wording(), scoring(lambda text, rule=rule: float(rule(text))), None)
        assert (found.clean, found.score) == (1.0, 0.0 if planted == name else 1.0), planted
        assert (found.prompt == PROMPT) == (planted != name)


@pytest.mark.parametrize("name", ATTACKS)
def test_a_constant_classifier_is_broken_by_none(name, sources):
    for constant in (0.0, 0.5, 1.0):
        found = make_attack(name, 0, sources=sources).run(wording(), scoring(lambda text, c=constant: c), None)
        assert (found.prompt, found.score, found.changes) == (PROMPT, constant, ())


# --- The drop ----------------------------------------------------------------------------------------------------


def test_the_drop_rate_by_hand():
    drop = measure_drop([True] * 8 + [False] * 2, [True] * 2 + [False] * 7 + [True], seed=1)
    assert drop[:3] == (10, 0.8, 0.3)
    assert drop.pdr == pytest.approx(0.625)
    assert drop.interval[0] < 0.625 < drop.interval[1] <= 1


def test_no_interval_of_finite_data_is_a_point():
    """Where every resample has one rate, Wilson's interval of what is left takes their place."""
    kept, lost = measure_drop([True, False], [True, False], 0), measure_drop([True] * 5, [False] * 5, 0)
    assert (kept.pdr, kept.interval) == (0.0, (0.0, pytest.approx(1 - wilson_interval(1, 1)[0])))
    assert (lost.pdr, lost.interval) == (1.0, (pytest.approx(1 - wilson_interval(0, 5)[1]), 1.0))
    for total in range(1, 5):
        for kinds in itertools.product(range(4), repeat=total):
            clean, attacked = [kind > 1 for kind in kinds], [kind % 2 == 1 for kind in kinds]
            drop = measure_drop(clean, attacked, 0, 200)
            assert (drop.pdr is None) == (not any(clean))
            assert drop.interval is None or drop.interval[0] < drop.interval[1]


def test_the_drop_rate_of_nothing_is_undefined():
    assert measure_drop([False] * 3, [True, False, False], 0) == (3, 0.0, 1 / 3, None, None)
    # Some resamples have nothing right before: they are left out, and no division by zero warns.
    assert measure_drop([True, False], [False, False], 0).interval[1] == 1.0
    few = [True] + [False] * 63
    assert measure_drop(few, [False] * 64, 0) == (64, 1 / 64, 0.0, None, None)  # next to nothing is below the floor
    assert measure_drop(few, [False] * 64, 0, floor=0.0).pdr == 1.0


def test_the_interval_covers_the_truth():
    """Of many samples from a known population, about 95 in 100 intervals hold its rate."""
    chance = np.random.default_rng(3)
    covered = 0
    for seed in range(200):
        clean = chance.random(200) < 0.8
        attacked = clean & (chance.random(200) < 0.7)
        low, high = measure_drop(clean.tolist(), attacked.tolist(), seed, 2000).interval
        covered += low <= 0.3 <= high
    assert 180 <= covered <= 199


def test_the_interval_is_that_of_resampled_examples():
    chance = np.random.default_rng(0)
    clean, attacked = chance.random(60) < 0.7, chance.random(60) < 0.5
    picks = chance.integers(0, 60, (20_000, 60))
    rates = 1 - attacked[picks].sum(1) / clean[picks].sum(1)
    drop = measure_drop(clean.tolist(), attacked.tolist(), 0)
    np.testing.assert_allclose(drop.interval, np.quantile(rates, [0.025, 0.975]), atol=0.02)
