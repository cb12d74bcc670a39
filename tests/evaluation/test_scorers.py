"""Answers are found in what a model wrote, and equal what means the same."""

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3jax.evaluation.scorers import (
    equivalent,
    extract_code,
    last_boxed,
    marked_answer,
    parse_label,
    parse_number,
)
from m3jax.evaluation.scorers.code import continuation
from m3jax.evaluation.statistics import matthews_correlation, wilson_interval

SAME = [
    (r"1+\sqrt{19}, 1-\sqrt{19}", r"1 \pm \sqrt{19}"),
    ("x=5", "5"),
    ("-2,1", "1,-2"),
    ("-q+p", "p - q"),
    ("2(k+1)", "2k+2"),
    ("C", r"\text{(C)}"),
    ("(C)", r"\text{(C)}"),
    ("evelyn", r"\text{Evelyn}"),
    ("1.8", r"1\frac{4}{5}"),
    ("137.5", r"137 \frac{1}{2}"),
    ("864 square inches", r"864 \mbox{ inches}^2"),
    ("864", r"864 \mbox{ inches}^2"),
    ("15 cm^2", r"15\mbox{ cm}^2"),
    ("5.4", r"5.4 \text{ cents}"),
    ("11111111100", r"11,\! 111,\! 111,\! 100"),
    ("$32348", r"\$32,\!348"),
    ("58500", "58,500"),
    ("90", r"90^\circ"),
    ("90 degrees", r"90^{\circ}"),
    ("90°", r"90^\circ"),
    (r"(3,\pi/2)", r"\left( 3, \frac{\pi}{2} \right)"),
    ("(3, 1.5707963267948966)", r"(3,\frac{\pi}{2})"),
    (r"\frac{1}{\sqrt{3}}", r"\frac{\sqrt{3}}{3}"),
    ("[-2,7]", r"x \in [-2,7]"),
    (r"-2 \le x \leq 7", r"x \in [-2,7]"),
    (r"3 < x \le 4", "(3,4]"),
    ("2x+3", "y = 2x + 3"),
    ("y-2x-3=0", "y = 2x + 3"),
    ("10x-14y=-8-22z", "5x - 7y + 11z + 4 = 0"),
    (r"\begin{bmatrix}-1/3\\2/3\\5/3\end{bmatrix}", r"\begin{pmatrix} -1/3 \\ 2/3 \\ 5/3 \end{pmatrix}"),
    (r"(12,102)\cup(2,12)", r"(2,12) \cup (12,102)"),
    ("52_{8}", "52_8"),
    ("0.35", r"\frac{7}{20}"),
    ("7i-2", "-2 + 7i"),
    (r"1/\tan x", r"\cot x"),
    ("6.72e-5", ".0000672"),
    (r"6.72\times 10^{-5}", ".0000672"),
    ("(b+2)(a+5)", "(a+5)(b+2)"),
    (r"\$18.9", r"\$18.90"),
    ("36 dollars", r"\$36"),
    (r"\{1+\sqrt5,1-\sqrt5,-2\}", r"\{1\pm\sqrt{5},-2\}"),
    ("sqrt(53)", r"\sqrt{53}"),
    (r"(5,+\infty)", r"(5,\infty)"),
    ("3,5 and 7", "3, 5, 7"),
    ("x=1 or x=-2", "1,-2"),
    (r"50\%", "50"),
    ("50%", r"50\%"),
    (r"\dfrac{17}{50}", r"\tfrac{17}{50}"),
    (r"\frac43", "4/3"),
    (r"\frac 59", "5/9"),
    (r"2^{10}", "1024"),
    ("4!", "24"),
    (r"\binom{5}{2}", "10"),
    (r"\log_2 8", "3"),
    (r"\sqrt[3]{27}", "3"),
    (r"|{-3}|", "3"),
    (r"\sin^2 x + \cos^2 x", "1"),
    (r"\frac{\sqrt{21}}{5}", r"\sqrt{21}/5"),
    ("x^2+2x+1", "(x+1)^2"),
    ("−5", "-5"),
    ("7", "7.0"),
    ("12π", r"12\pi"),
    (r"\text{odd}", "odd"),
    ("2√5", r"2\sqrt{5}"),
]

DIFFERENT = [
    ("q-p", "p-q"),
    ("[3,4]", "(3,4]"),
    ("(2,1)", "(1,2)"),
    ("52", "52_8"),
    ("42", "52_8"),
    ("seat", r"\text{east}"),
    (r"\infty", r"(5,\infty)"),
    ("", "0"),
    ("0.333", r"\frac13"),
    ("3.14159", r"\pi"),
    ("1,2", "1,2,3"),
    ("1,1,2", "1,2,2"),
    ("x+1", "x+2"),
    ("y", "x"),
    ("x=5", "x=6"),
    ("5", "6"),
    (r"2^{100000000}", "3"),
    ("(" * 500, "1"),
    ("1/0", "1"),
    (r"\begin{pmatrix}1&2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    ("50", "0.5"),
    (r"\frac{1}{2", "0.5"),
    ("-2", "2"),
    (r"\text{even}", r"\text{odd}"),
    ("9" * 40, "9" * 39 + "8"),
    ("{" * 999 + "}" * 999, "1"),
    (r"\frac", "1"),
    ("5x - 7y + 11z + 4 = 0", "5x - 7y + 11z + 5 = 0"),
    (r"\sqrt", "2"),
    ("^", "_"),
    ("1" + "!" * 400, "2"),
    ("D", r"\text{(C)}"),
]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_answers_that_mean_the_same(one: str, other: str) -> None:
    assert equivalent(one, other)
    assert equivalent(other, one)


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_answers_that_do_not(one: str, other: str) -> None:
    assert not equivalent(one, other)
    assert not equivalent(other, one)


@given(st.text(alphabet=r"\frac{}sqt12/()[],.^_+-x=&! piul$%", max_size=40))
def test_any_text_can_be_judged(text: str) -> None:
    equivalent(text, "1")
    parse_number(text)
    marked_answer("The answer is: " + text)
    if text.strip(" .$"):
        equivalent(text, text)


@given(st.integers(-(10**30), 10**30), st.integers(1, 10**6))
def test_fractions_equal_themselves_however_written(above: int, below: int) -> None:
    fraction = Fraction(above, below)
    assert equivalent(rf"\frac{{{above}}}{{{below}}}", f"{fraction.numerator}/{fraction.denominator}")
    assert not equivalent(rf"\frac{{{above}}}{{{below}}}", f"{fraction.numerator + 1}/{fraction.denominator}")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1,080.", 1080),
        ("$1,234.5", Fraction(2469, 2)),
        ("18 dollars", 18),
        ("-5", -5),
        ("−5", -5),
        ("1/0", None),
        ("3.50", Fraction(7, 2)),
        ("17%", 17),
        ("**18**", 18),
        (r"\boxed{18}", 18),
        (r"$\frac{3}{4}$", Fraction(3, 4)),
        ("x = 3 + 4 = 7", 7),
        ("10,000,000", 10_000_000),
        (r"1{,}000", 1000),
        ("abc", None),
        ("", None),
        (".5", Fraction(1, 2)),
        (r"\$1,000", 1000),
        ("- 3", -3),
        (r"\text{about } 5", 5),
        ("-$5", -5),
        ("3/4 of it", Fraction(3, 4)),
        ("€ 7", 7),
    ],
)
def test_numbers_as_people_write_them(text: str, number: Fraction | None) -> None:
    assert parse_number(text) == number


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The answer is: 5.", "5"),
        ("the answer is: 5. The answer is: $6$.", "$6$"),
        ("The answer is 5", "5"),
        ("Final Answer: 7", "7"),
        ("answer: 8", "8"),
        ("nothing", None),
        (r"\boxed{1} and \boxed{2}", "1, 2"),
        (r"\boxed{1}, then \boxed{2}", "2"),
        (r"The answer is: $\boxed{\frac12}$.", r"\frac12"),
        ("**The answer is: 9**", "9"),
        ("The answer is:", None),
        (r"\boxed{44}, so our answer is correct.", "44"),
        ("The answer is: 3.5.\n\nMore.", "3.5"),
        (r"\boxed{1", None),
        ("The final answer is 12. Thanks for asking", "12"),
        ("The answer is:\n\\[5\\]", "\\[5\\]"),
    ],
)
def test_marked_answers(text: str, answer: str | None) -> None:
    assert marked_answer(text) == answer


def test_last_box_has_its_braces_balanced() -> None:
    assert last_boxed(r"\boxed{a} \boxed{\{1, \frac{2}{3}\}} end") == r"\{1, \frac{2}{3}\}"
    assert last_boxed(r"\boxed 5.") == "5"
    assert last_boxed(r"\fbox{6}") == "6"
    assert last_boxed("none") is None


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("Positive.", "positive"),
        ("The sentiment is **negative**", "negative"),
        ("not positive", "negative"),
        ("neither", None),
        ("positively", None),
        ("", None),
        ("It isn't a negative review", "positive"),
        ("POSITIVE or negative", None),
    ],
)
def test_labels(text: str, label: str | None) -> None:
    assert parse_label(text, ("negative", "positive")) == label


def test_unacceptable_is_not_acceptable() -> None:
    labels = ("unacceptable", "acceptable")
    assert parse_label("Unacceptable.", labels) == "unacceptable"
    assert parse_label("Not acceptable", labels) == "unacceptable"
    assert parse_label("acceptable", labels) == "acceptable"


ONE = "def one():\n    return 1\n"


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (f"Sure:\n```python\n{ONE}```\nDone.", ONE),
        (f"```\n{ONE}```", ONE),
        (f"```Python3\r\n{ONE}```", ONE),
        (f"~~~py\n{ONE}~~~", ONE),
        (f"```python\n{ONE}", ONE),
        ("1. Do this:\n   ```python\n   def one():\n       return 1\n   ```", ONE),
        (f"```python\ndef one(): return 0\n```\nBetter:\n```python\n{ONE}```\nUse:\n```python\nprint(one())\n```", ONE),
        (f"```python\nimport os\nx = 1\n```\nthen\n```python\n{ONE}```", "import os\n" + ONE),
        (f"```bash\npip install it\n```\n```python\n{ONE}```", ONE),
        (ONE, ONE),
        (f"# it\n{ONE}", f"# it\n{ONE}"),
        (f"Here is the code:\n{ONE}\nThis returns one.", ONE + "\n"),
        (f"Here you are:\n\nimport os\n\n{ONE}", "import os\n\n" + ONE + "\n"),
        ("I cannot do that.", None),
        ("", None),
    ],
)
def test_code_in_chat(text: str, code: str | None) -> None:
    found = extract_code(text, "one")
    assert (found.rstrip() if found is not None else None) == (code.rstrip() if code is not None else None)


def test_unparsable_code_is_still_tried() -> None:
    assert extract_code("def one(:\n    return 1", "one") == "def one(:\n    return 1"


def test_blocks_without_the_name_are_taken_together() -> None:
    assert extract_code("```python\na = 1\n```\n```python\nb = 2\n```", "one") == "a = 1\n\nb = 2\n"


def test_continuation_ends_where_indentation_does() -> None:
    assert continuation("    return 1\n\n\ndef other():\n    pass\n") == "    return 1\n\n"
    assert continuation("\treturn 1\nprint()") == "    return 1"
    assert continuation("return 1") == "    return 1"
    assert continuation("x = 1\n    return x\nmore") == "    x = 1\n    return x"


def test_wilson_interval_against_known_values() -> None:
    # Newcombe (1998), Statistics in Medicine 17: 857-872, table I, method 3.
    for correct, total, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        found = wilson_interval(correct, total)
        assert [round(bound, 4) for bound in found] == [low, high]
    assert wilson_interval(5, 5)[1] == 1.0


def test_matthews_correlation() -> None:
    pairs = [("a", "a")] * 6 + [("b", "b")] * 3 + [("a", "b")] * 1 + [("b", "a")] * 2
    assert math.isclose(matthews_correlation(pairs), (6 * 3 - 1 * 2) / math.sqrt(8 * 7 * 4 * 5))
    assert matthews_correlation([("a", "a"), ("b", "b")]) == 1.0
    assert matthews_correlation([("a", None), ("b", None)]) == 0.0
    assert matthews_correlation([("a", "a")]) == 0.0
