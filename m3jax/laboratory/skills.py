"""Skills small enough for small models: word problems with worked answers, programs with tests, sentiment of phrases.

Each is a task that `m3jax evaluate` knows, so that its data are files in that task's format. Word problems and programs
are composed from a seed; what is held out differs from all lessons in its text.
"""

import hashlib
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from m3jax.errors import M3Error
from m3jax.evaluation import get_task, load_rows, render
from m3jax.evaluation.data import Row

SPLITS = ("train", "dev", "test", "shifted")
"""Lessons; what choices are made on; what is reported; what is reported out of distribution."""

TEMPLATE = "none"
_TEST_SHARES = {"dev": 8, "test": 9}  # tenths of all texts; the others are lessons


class Skill(NamedTuple):
    """Something that a model can learn and be examined in.

    Attributes:
        name: What it is called.
        task: The task that examines it.
        max_tokens: Longest answer.
        rows: From a split, a number of examples and a seed to rows of the task's data files.
        lesson: The answer that a row teaches, as it continues the prompt.
        shift: What is different in the split "shifted".
        seen: The share of its lessons that the base learns from, too.
    """

    name: str
    task: str
    max_tokens: int
    rows: Callable[[str, int, int], list[Row]]
    lesson: Callable[[Row], str]
    shift: str
    seen: float = 1.0

    def lessons(self, rows: Sequence[Row]) -> list[tuple[str, str]]:
        """Prompts, as evaluation shows them, with their answers.

        Args:
            rows: Of the task's data files.
        """
        examples = get_task(self.task).read(rows)
        return [
            (render(TEMPLATE, example.instruction), self.lesson(row))
            for example, row in zip(examples, rows, strict=True)
        ]


def _tenth(text: str) -> int:
    """Which tenth of all texts a text is in."""
    return hashlib.sha256(text.encode()).digest()[0] % 10


def _belongs(text: str, split: str) -> bool:
    if split == "shifted":
        return True
    tenth = _tenth(text)
    return tenth == _TEST_SHARES[split] if split in _TEST_SHARES else tenth not in _TEST_SHARES.values()


def _composed(compose: Callable[[random.Random, bool], Row], text: str, split: str, count: int, seed: int) -> list[Row]:
    """Rows of a split; those of dev, test and shifted are all different."""
    chance = random.Random(f"{text}, {split}, {seed}")  # seeded by its SHA-512, the same everywhere
    rows: list[Row] = []
    seen: set[str] = set()
    while len(rows) < count:
        row = compose(chance, split == "shifted")
        if _belongs(row[text], split) and (split == "train" or row[text] not in seen):
            seen.add(row[text])
            rows.append(row)
    return rows


# --- Word problems ------------------------------------------------------------------------------------------------

_NAMES = (
    "Anna", "Ben", "Carla", "David", "Emma", "Felix", "Grace", "Hugo", "Iris", "Jonas", "Karin", "Leo",
    "Maria", "Nina", "Oscar", "Peter", "Rosa", "Simon", "Tina", "Vera", "Walter", "Yann", "Zoe", "Adam",
)  # fmt: skip
_THINGS = (
    "apples", "books", "coins", "stamps", "pens", "marbles", "cards", "shells", "bananas", "cups", "flowers", "keys",
    "pears", "pictures", "letters", "hats", "spoons", "nuts", "candles", "eggs", "chairs", "plates", "toys", "stones",
)  # fmt: skip

# By operation: how lessons word a problem, and how only the shifted split does.
_STORIES = {
    "sum": (
        (
            "{one} has {a} {things}. {one} buys {b} more. How many {things} does {one} have now?",
            "{one} has {a} {things} and {two} has {b} {things}. How many {things} do they have together?",
            "There are {a} {things} on the table. {one} adds {b} {things}. How many {things} are on the table?",
            "{one} finds {a} {things} and {two} finds {b}. How many {things} do they find together?",
            "{two} gives {b} {things} to {one}, who has {a} {things}. How many {things} does {one} have now?",
            "There are {a} {things} in a bag. {one} puts {b} more into the bag. How many {things} are in the bag?",
        ),
        (
            "{one} buys {a} {things} and {two} buys {b}. How many {things} do they have together?",
            "There are {a} {things} in a box. {one} puts {b} more into the box. How many {things} are in the box?",
            "{one} has {a} {things} and finds {b} more. How many {things} does {one} have now?",
        ),
    ),
    "difference": (
        (
            "{one} has {a} {things}. {one} gives {b} to {two}. How many {things} are left?",
            "{one} has {a} {things} and loses {b} of them. How many {things} does {one} have now?",
            "There are {a} {things} on the table. {one} takes {b}. How many {things} are left on the table?",
            "{one} buys {a} {things} and loses {b}. How many {things} are left?",
            "{two} takes {b} {things} from {one}, who has {a} {things}. How many {things} are left?",
            "There are {a} {things} in a bag. {one} takes {b} out of the bag. How many {things} are left in the bag?",
        ),
        (
            "{one} finds {a} {things} and gives {b} to {two}. How many {things} are left?",
            "There are {a} {things} in a box. {one} takes {b} out of the box. How many {things} are left in the box?",
            "{one} has {a} {things}. {two} takes {b}. How many {things} does {one} have now?",
        ),
    ),
    "product": (
        (
            "{one} has {a} boxes with {b} {things} in each. How many {things} does {one} have?",
            "There are {a} bags and {b} {things} in each bag. How many {things} are there?",
            "{one} buys {a} bags with {b} {things} in each. How many {things} does {one} buy?",
            "There are {a} boxes on the table with {b} {things} in each. How many {things} are on the table?",
        ),
        (
            "{one} finds {a} bags with {b} {things} in each. How many {things} does {one} find?",
            "There are {a} boxes and {b} {things} in each box. How many {things} are there?",
        ),
    ),
    "both": (
        (
            "{one} has {a} {things}, buys {b} more and gives {c} to {two}. How many {things} are left?",
            "{one} has {a} {things}. {two} gives {b} more to {one}. {one} loses {c}. How many {things} are left?",
            "There are {a} {things} on the table. {one} adds {b} and {two} takes {c}. How many {things} are left?",
            "{one} finds {a} {things} and buys {b} more. {two} takes {c} of them. How many {things} are left?",
        ),
        (
            "{one} has {a} {things}, finds {b} more and loses {c}. How many {things} are left?",
            "There are {a} {things} in a bag. {one} puts {b} into it and {two} takes {c}. How many {things} are left?",
        ),
    ),
}


def _word_problem(chance: random.Random, shifted: bool) -> Row:
    kind = chance.choice(list(_STORIES))
    one, two = chance.sample(_NAMES, 2)
    things = chance.choice(_THINGS)
    a, b = chance.randint(2, 20), chance.randint(2, 20)
    c = 0
    if kind == "difference":
        a, b = max(a, b) + 1, min(a, b)
    if kind == "product":
        a, b = chance.randint(2, 9), chance.randint(2, 9)
    if kind == "both":
        c = chance.randint(1, a + b - 1)
    story = chance.choice(_STORIES[kind][shifted])
    steps = {
        "sum": ((f"{a} + {b}", a + b),),
        "difference": ((f"{a} - {b}", a - b),),
        "product": ((f"{a} * {b}", a * b),),
        "both": ((f"{a} + {b}", a + b), (f"{a + b} - {c}", a + b - c)),
    }[kind]
    worked = "\n".join(f"{step} = {value}" for step, value in steps)
    question = story.format(one=one, two=two, things=things, a=a, b=b, c=c)
    return {"question": question, "answer": f"{worked}\n#### {steps[-1][1]}"}


def word_problems() -> Skill:
    """Arithmetic in one or two steps, told as stories; examined by the task gsm8k."""
    return Skill(
        name="arithmetic",
        task="gsm8k",
        max_tokens=32,
        rows=lambda split, count, seed: _composed(_word_problem, "question", split, count, seed),
        lesson=lambda row: "\n" + str(row["answer"]),
        shift="other wordings",
    )


# --- Programs -----------------------------------------------------------------------------------------------------


class _Kind(NamedTuple):
    """A kind of program: how it is asked for, what it returns, and on which arguments it is tried."""

    asked: tuple[str, ...]
    asked_anew: str
    parameters: str
    returns: str
    arguments: Callable[[random.Random], tuple[Any, ...]]


def _number(chance: random.Random) -> tuple[int]:
    return (chance.randint(0, 20),)


def _numbers(chance: random.Random) -> tuple[int, int]:
    return chance.randint(0, 20), chance.randint(0, 20)


def _list(chance: random.Random) -> tuple[list[int]]:
    return ([chance.randint(0, 9) for _ in range(chance.randint(2, 4))],)


def _word(chance: random.Random) -> tuple[str]:
    return (chance.choice(("red", "blue", "green", "cat", "dog", "sun", "moon", "tree")),)


_KINDS = (
    _Kind(("adds {k} to x", "returns x plus {k}"), "gives the sum of x and {k}", "x", "x + {k}", _number),
    _Kind(("subtracts {k} from x", "returns x minus {k}"), "takes {k} away from x", "x", "x - {k}", _number),
    _Kind(("multiplies x by {k}", "returns {k} times x"), "gives the product of x and {k}", "x", "x * {k}", _number),
    _Kind(("adds {k} to x and then multiplies by {j}", "returns {j} times the sum of x and {k}"),
          "multiplies x plus {k} by {j}", "x", "(x + {k}) * {j}", _number),
    _Kind(("subtracts {k} from x and then multiplies by {j}", "returns {j} times the difference of x and {k}"),
          "multiplies x minus {k} by {j}", "x", "(x - {k}) * {j}", _number),
    _Kind(("multiplies x by {k} and then adds {j}", "returns {k} times x plus {j}"),
          "adds {j} to the product of x and {k}", "x", "x * {k} + {j}", _number),
    _Kind(("multiplies x by {k} and then subtracts {j}", "returns {k} times x minus {j}"),
          "subtracts {j} from the product of x and {k}", "x", "x * {k} - {j}", _number),
    _Kind(("tells whether x is larger than {k}", "returns x > {k}"), "says if x > {k}", "x", "x > {k}", _number),
    _Kind(("tells whether {k} divides x", "returns x % {k} == 0"), "says if {k} divides x",
          "x", "x % {k} == 0", _number),
    _Kind(("adds x and y and then {k}", "returns the sum of x, y and {k}"), "returns x plus y plus {k}", "x, y",
          "x + y + {k}", _numbers),
    _Kind(("multiplies x and y and then adds {k}", "returns the product of x and y plus {k}"),
          "returns x times y plus {k}", "x, y", "x * y + {k}", _numbers),
    _Kind(("adds {k} to the larger of x and y", "returns the maximum of x and y plus {k}"),
          "tells which of x and y is larger and adds {k}", "x, y", "max(x, y) + {k}", _numbers),
    _Kind(("subtracts {k} from the smaller of x and y", "returns the minimum of x and y minus {k}"),
          "tells which of x and y is smaller and subtracts {k}", "x, y", "min(x, y) - {k}", _numbers),
    _Kind(("adds up the list x and then adds {k}", "returns the sum of the list x plus {k}"),
          "gives the sum of the list x and {k}", "x", "sum(x) + {k}", _list),
    _Kind(("sorts the list x and takes the first {j}", "returns the first {j} items of the list x sorted"),
          "gives the {j} smallest of the list x", "x", "sorted(x)[:{j}]", _list),
    _Kind(("takes the first {j} items of the list x", "returns the first {j} of the list x"),
          "gives {j} items of the list x", "x", "x[:{j}]", _list),
    _Kind(("multiplies the largest in the list x by {k}", "returns {k} times the maximum of the list x"),
          "gives the product of the largest in the list x and {k}", "x", "max(x) * {k}", _list),
    _Kind(("counts the items of the list x and adds {k}", "returns the length of the list x plus {k}"),
          "tells the length of the list x and adds {k}", "x", "len(x) + {k}", _list),
    _Kind(("reverses the word x and repeats it {j} times", "returns {j} copies of the word x reversed"),
          "gives the word x reversed {j} times", "x", "x[::-1] * {j}", _word),
    _Kind(("repeats the word x {j} times", "returns {j} copies of the word x"), "gives the word x {j} times",
          "x", "x * {j}", _word),
)  # fmt: skip
_VERBS = ("get", "find", "make", "do", "calc", "my", "run", "new")
_NOUNS = ("it", "value", "result", "thing", "answer", "output", "one", "all")


def _program(chance: random.Random, shifted: bool) -> Row:
    kind = chance.choice(_KINDS)
    k, j = chance.randint(2, 30), chance.randint(2, 4)
    name = f"{chance.choice(_VERBS)}_{chance.choice(_NOUNS)}"
    returns = kind.returns.format(k=k, j=j)
    asked = kind.asked_anew if shifted else chance.choice(kind.asked)
    tests = []
    for _ in range(2):
        arguments = kind.arguments(chance)
        value = eval(returns, {}, dict(zip(("x", "y"), arguments, strict=False)))
        tests.append(f"assert {name}({', '.join(map(repr, arguments))}) == {value!r}")
    text = f"Write a function {name} that {asked.format(k=k, j=j)}."
    return {"text": text, "test_list": tests, "code": f"def {name}({kind.parameters}):\n    return {returns}\n"}


def programs() -> Skill:
    """Functions of one line, asked for in words and tested by two asserts; examined by the task mbpp."""
    return Skill(
        name="programs",
        task="mbpp",
        max_tokens=32,
        rows=lambda split, count, seed: _composed(_program, "text", split, count, seed),
        lesson=lambda row: "\n" + str(row["code"]).rstrip("\n"),
        shift="other wordings",
        seen=0.1,  # it is learned so fast that more would leave its expert nothing to add
    )


# --- Sentiment ----------------------------------------------------------------------------------------------------

_SHORT = 12  # words; longer phrases are never lessons


def sentiment(lessons: str | Path, held_out: str | Path) -> Skill:
    """Sentiment of phrases from film reviews (Socher et al., 2013); examined by the task sst2.

    Args:
        lessons: Data of the task: a file or a hub data set.
        held_out: Likewise; the examinations are taken from it.

    Raises:
        M3Error: One of them cannot be used, or has too few phrases.
    """
    task = get_task("sst2")
    learned, examined = (
        [row for row in load_rows(source, task.columns) if str(row.get("sentence", "")).strip()]
        for source in (lessons, held_out)
    )
    places = {
        "train": [row for row in learned if _is_short(row)],
        "dev": [row for row in examined if _is_short(row) and _tenth(row["sentence"]) < 5],
        "test": [row for row in examined if _is_short(row) and _tenth(row["sentence"]) >= 5],
        "shifted": [row for row in examined if not _is_short(row)],
    }

    def rows(split: str, count: int, seed: int) -> list[Row]:
        there = places[split]
        if split != "train" and len(there) < count:
            source = f"{held_out}: has {len(there)} phrases of {'more than' if split == 'shifted' else 'at most'}"
            raise M3Error(f"{source} {_SHORT} words for {split}, but {count} are wanted: give a larger file")
        chance = random.Random(f"sentence, {split}, {seed}")
        return chance.sample(there, min(count, len(there)))

    return Skill(
        name="sentiment",
        task="sst2",
        max_tokens=4,
        rows=rows,
        lesson=lambda row: f" {task.read([row])[0].gold}",
        shift=f"phrases of more than {_SHORT} words",
    )


def _is_short(row: Row) -> bool:
    return len(str(row["sentence"]).split()) <= _SHORT
