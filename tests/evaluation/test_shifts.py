"""Every shift against examples worked by hand."""

import random
import re
import string

import pytest

from m3jax.errors import M3Error
from m3jax.evaluation.shifts import SHIFTS, make_shift, number_format, shift_text, typos, whitespace


def by_hand(choices):
    """Choices given beforehand; all others are the last possible, which means no hit."""
    return lambda number, below: choices.get(number, below - 1)


@pytest.mark.parametrize(
    ("way", "wanted"),
    [(0, "iflm day"), (1, "ilm day"), (2, "ffilm day"), (3, "gilm day")],
)
def test_each_kind_of_typo(way, wanted):
    assert typos("film day", by_hand({0: 0, 1: way, 2: 1}), 0.5) == wanted


def test_typos_keep_to_letters_and_case():
    assert typos("A 1é!", by_hand({0: 0, 1: 3, 2: 0}), 0.1) == "S 1é!"
    assert typos("ab", by_hand({3: 0, 4: 0}), 0.1) == "a" + "b"  # nothing to swap with at the end
    assert typos("12 34 %", lambda number, below: 0, 1.0) == "12 34 %"
    assert typos("", lambda number, below: 0, 1.0) == ""
    assert typos("ll", by_hand({0: 0, 1: 2}), 0.1) == "lll"


def test_typos_hit_at_their_rate():
    text = "".join(random.Random(0).choices(string.ascii_lowercase, k=20_000))
    shift = make_shift("typos=0.1")
    for seed in range(3):
        made = shift_text(shift, text, seed, "a")
        # Doubled and omitted letters, a quarter of the hits each, leave the length about the same.
        assert abs(len(made) - len(text)) < 200
        doubled = len(re.findall(r"(.)\1", made)) - len(re.findall(r"(.)\1", text))
        assert 350 < doubled < 650  # a quarter of 2,000


def test_whitespace_by_hand():
    assert whitespace("a b c", by_hand({2: 0, 3: 0}), 0.5) == "a  b c"
    assert whitespace("a b c", by_hand({2: 0, 3: 2, 6: 0, 7: 1}), 0.5) == "a\tb   c"
    assert whitespace(" a  b\n", lambda number, below: 0, 1.0) == " a  b\n"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("3 films", "three films"),
        ("0 or 12 or 13", "zero or twelve or 13"),
        ("1000, 999 and 1234567.", "1,000, 999 and 1,234,567."),
        ("1,234 and 12,34", "1234 and 12,34"),
        ("3.5 and .5 and 2%", "3.5 and .5 and 2%"),
        ("$3 and 3kg and x3 and -3", "$3 and 3kg and x3 and -3"),
        ("2+2 and 2 and \\frac{1}{2}", "2+2 and two and \\frac{1}{2}"),
        ("007 at 3:30", "007 at 3:30"),
        ("in 3.", "in three."),
    ],
)
def test_numbers_keep_their_value(text, wanted):
    assert number_format(text, by_hand({})) == wanted


def test_case():
    assert make_shift("lowercase").apply("A Film", by_hand({})) == "a film"
    assert make_shift("uppercase").apply("A Film", by_hand({})) == "A FILM"
    assert make_shift("mixed-case").apply("A Film", by_hand({0: 0, 2: 0, 4: 0})) == "a fIlM"


def test_paraphrases_hold_the_instruction():
    shift = make_shift("paraphrase")
    made = {shift_text(shift, "Name {x}.", seed, "1") for seed in range(60)}
    assert len(made) == 6
    assert all(text.endswith("\nName {x}.") for text in made)
    assert shift.whole


@pytest.mark.parametrize("name", SHIFTS)
def test_shifts_replay_and_differ_by_example(name):
    shift = make_shift(name)
    text = "There are 3 quite good films and 2000 bad ones in the town"
    assert shift_text(shift, text, 5, "1") == shift_text(shift, text, 5, "1") != text
    seen = {shift_text(shift, text, 5, str(example)) for example in range(20)}
    assert (len(seen) > 1) == (name in ("typos", "whitespace", "mixed-case", "paraphrase"))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("typo", "did you mean typos"),
        ("typos=2", "rate above 0 and up to 1, as in typos=0.1"),
        ("typos=x", "rate above 0"),
        ("typos=", "rate above 0"),
        ("typos=nan", "rate above 0"),
        ("uppercase=1", "has no rate"),
    ],
)
def test_shifts_that_are_none(text, sentence):
    with pytest.raises(M3Error, match=sentence):
        make_shift(text)
