"""Skills small enough for small models: word problems with worked answers, programs with tests, sentiment of phrases.

Each is a task that `m3jax evaluate` knows, so that its data are files in that task's format. What lessons, dev and test
examples have in common is said where each skill is made, and is little: no word problem is asked in another split with
the same wording and numbers, no program that returns the same, no phrase that contains a phrase or lies in it.

A base may learn a skill from a careless teacher, who has half of the wordings mostly wrong: it then knows how answers
look, and of half of them what is right.
"""

import functools
import hashlib
import operator
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from m3jax.errors import M3Error
from m3jax.evaluation import get_task, load_rows, render
from m3jax.evaluation.data import Row
from m3jax.evaluation.prompts import CHAT
from m3jax.evaluation.records import digest

SPLITS = ("train", "dev", "test", "shifted")
"""Lessons; what choices are made on; what is reported; what is reported out of distribution."""

TEMPLATE = "none"
_TEST_SHARES = {"dev": 8, "test": 9}  # tenths of all texts; the others are lessons


class Manner(NamedTuple):
    """How models are asked.

    Attributes:
        template: Of the prompts.
        tokenizer: Of transformers, for the template that is the model's own.
    """

    template: str = TEMPLATE
    tokenizer: Any = None

    def prompt(self, instruction: str) -> str:
        """What is put to the model.

        Args:
            instruction: Of an example.
        """
        return render(self.template, instruction, self.tokenizer)

    def answer(self, lesson: str) -> str:
        """What the model is to learn to say: in a turn of its own, without the space that parts it from a prompt.

        Args:
            lesson: As it continues a prompt.
        """
        return lesson.strip() if self.template == CHAT else lesson


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
        primer: From a number of examples and a seed to what the base learns in place of lessons; None for lessons.
        apart: How examples of one split differ from those of the others.
        data: Digest of the data that the examples are taken from, if any.
    """

    name: str
    task: str
    max_tokens: int
    rows: Callable[[str, int, int], list[Row]]
    lesson: Callable[[Row], str]
    shift: str
    seen: float = 1.0
    primer: Callable[[int, int], list[Row]] | None = None
    apart: str = ""
    data: str = ""

    def identity(self) -> str:
        """Digest of what is taught and examined."""
        told = [self.lessons(self.rows("train", 50, 0)), *(self.rows(split, 50, 0) for split in SPLITS)]
        if self.primer is not None:
            told.append(self.lessons(self.primer(50, 0)))
        return digest([self.name, self.task, self.max_tokens, self.shift, self.seen, self.data, told])

    def lessons(self, rows: Sequence[Row], manner: Manner | None = None) -> list[tuple[str, str]]:
        """Prompts, as evaluation shows them, with their answers.

        Args:
            rows: Of the task's data files.
            manner: How models are asked; the instruction alone if None.
        """
        manner = manner or Manner()
        examples = get_task(self.task).read(rows)
        return [
            (manner.prompt(example.instruction), manner.answer(self.lesson(row)))
            for example, row in zip(examples, rows, strict=True)
        ]


def _tenth(text: str) -> int:
    """Which tenth of all texts a text is in."""
    return hashlib.sha256(text.encode()).digest()[0] % 10


def _belongs(key: str, split: str) -> bool:
    if split == "shifted":
        return True
    tenth = _tenth(key)
    return tenth == _TEST_SHARES[split] if split in _TEST_SHARES else tenth not in _TEST_SHARES.values()


class _Composed(NamedTuple):
    """An example that was made up.

    Attributes:
        row: As the task's data files have it.
        text: What is asked.
        key: What decides which split it is in.
    """

    row: Row
    text: str
    key: str


def _compose(
    make: Callable[[random.Random, bool], _Composed], name: str, split: str, count: int, seed: int
) -> list[Row]:
    """Rows of a split; those of dev, test and shifted are all different."""
    chance = random.Random(f"{name}, {split}, {seed}")  # seeded by its SHA-512, the same everywhere
    rows: list[Row] = []
    seen: set[str] = set()
    while len(rows) < count:
        made = make(chance, split == "shifted")
        if _belongs(made.key, split) and (split == "train" or made.text not in seen):
            seen.add(made.text)
            rows.append(made.row)
    return rows


# --- A careless teacher ---------------------------------------------------------------------------------------------

_RIGHT = (0.25, 0.7)  # how often, by wording: of every other one most answers are wrong


def _is_mistaken(chance: random.Random, wording: int) -> bool:
    return chance.random() > _RIGHT[wording % 2]


def _primer(make: Callable[[random.Random, bool], _Composed], name: str) -> Callable[[int, int], list[Row]]:
    """What the careless teacher tells, of what lessons are about."""
    return lambda count, seed: _compose(make, f"{name}, careless", "train", count, seed)


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


_STEPS = {"sum": "+", "difference": "-", "product": "*", "both": "+-"}
_MISTAKES = {"sum": "-*", "difference": "+*", "product": "+-", "both": "+-"}  # one step each
_COMPUTED: Mapping[str, Callable[[int, int], int]] = MappingProxyType(
    {"+": operator.add, "-": operator.sub, "*": operator.mul}
)


def _word_problem(chance: random.Random, shifted: bool, largest: int = 20, careless: bool = False) -> _Composed:
    kind = chance.choice(list(_STORIES))
    one, two = chance.sample(_NAMES, 2)
    things = chance.choice(_THINGS)
    a, b = chance.randint(2, largest), chance.randint(2, largest)
    c = 0
    if kind == "difference":
        a, b = max(a, b) + 1, min(a, b)
    if kind == "product":
        a, b = chance.randint(2, 9), chance.randint(2, 9)
    if kind == "both":
        c = chance.randint(1, a + b - 1)
    wordings = _STORIES[kind][shifted]
    story = chance.choice(wordings)
    mistaken = careless and _is_mistaken(chance, wordings.index(story))
    worked = _worked(a, (b, c), chance.choice(_MISTAKES[kind]) if mistaken else _STEPS[kind])
    question = story.format(one=one, two=two, things=things, a=a, b=b, c=c)
    return _Composed({"question": question, "answer": worked}, question, f"{story} {a} {b} {c}")


def _worked(start: int, operands: Sequence[int], operations: str) -> str:
    """An answer step by step, in the format of GSM8K.

    Example:
        >>> _worked(3, (4, 5), "+-")
        '3 + 4 = 7\\n7 - 5 = 2\\n#### 2'
    """
    value, steps = start, []
    for operation, operand in zip(operations, operands, strict=False):
        before, value = value, _COMPUTED[operation](value, operand)
        steps.append(f"{before} {operation} {operand} = {value}")
    return "\n".join([*steps, f"#### {value}"])


def word_problems(largest: int = 20, primed: bool = False) -> Skill:
    """Arithmetic in one or two steps, told as stories; examined by the task gsm8k.

    Args:
        largest: Of the numbers that are added and subtracted.
        primed: Whether the base learns from the careless teacher.
    """

    def make(chance: random.Random, shifted: bool) -> _Composed:
        return _word_problem(chance, shifted, largest)

    return Skill(
        name="arithmetic",
        task="gsm8k",
        max_tokens=32,
        rows=lambda split, count, seed: _compose(make, "question", split, count, seed),
        lesson=lambda row: "\n" + str(row["answer"]),
        shift="other wordings",
        apart="no wording with the same numbers is in two splits",
        primer=_primer(functools.partial(_word_problem, largest=largest, careless=True), "question")
        if primed
        else None,
    )


_BRIEFLY = "Solve the problem. Answer with the number alone."


def brief_word_problems() -> Skill:
    """The same problems, asked for and answered by the number alone, which is a few tokens."""

    def rows(split: str, count: int, seed: int) -> list[Row]:
        found = _compose(_word_problem, "question", split, count, seed)
        return [{**row, "question": f"{_BRIEFLY}\n{row['question']}"} for row in found]

    return word_problems()._replace(
        max_tokens=6, rows=rows, lesson=lambda row: "\n" + str(row["answer"]).rpartition("####")[2].strip()
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
    return (chance.randint(0, 40),)


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
          "cuts the list x after {j} items", "x", "x[:{j}]", _list),
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


class _Asked(NamedTuple):
    """A program that is asked for: its kind, numbers, name, and which wording asks for it."""

    kind: _Kind
    numbers: Mapping[str, int]
    name: str
    wording: str

    @property
    def returns(self) -> str:
        """What it is to return."""
        return self.kind.returns.format(**self.numbers)

    @property
    def request(self) -> str:
        """What it is to do, in words."""
        return self.wording.format(**self.numbers)


def _ask(chance: random.Random, shifted: bool) -> _Asked:
    kind = chance.choice(_KINDS)
    numbers = {"k": chance.randint(2, 30), "j": chance.randint(2, 4)}
    name = f"{chance.choice(_VERBS)}_{chance.choice(_NOUNS)}"
    return _Asked(kind, numbers, name, kind.asked_anew if shifted else chance.choice(kind.asked))


def _program(chance: random.Random, shifted: bool) -> _Composed:
    asked = _ask(chance, shifted)
    tests = _tests(asked.kind, asked.returns, asked.name, chance)
    text = f"Write a function {asked.name} that {asked.request}."
    code = f"def {asked.name}({asked.kind.parameters}):\n    return {asked.returns}\n"
    return _Composed({"text": text, "test_list": tests, "code": code}, text, asked.returns)


def _function(chance: random.Random, shifted: bool, careless: bool = False) -> _Composed:
    asked = _ask(chance, shifted)
    returns, kind = asked.returns, asked.kind
    if careless and _is_mistaken(chance, _KINDS.index(kind) + kind.asked.index(asked.wording)):
        others = [other for other in _KINDS if other.arguments is kind.arguments and other is not kind]
        returns = chance.choice(others).returns.format(**asked.numbers)
    tests = _tests(kind, asked.returns, "candidate", chance)
    text = f'def {asked.name}({kind.parameters}):\n    """{asked.request[0].upper()}{asked.request[1:]}."""\n'
    row = {
        "prompt": text,
        "entry_point": asked.name,
        "canonical_solution": f"    return {returns}\n",
        "test": "\n".join(["def check(candidate):", *(f"    {test}" for test in tests)]) + "\n",
    }
    return _Composed(row, text, asked.returns)


def _tests(kind: _Kind, returns: str, name: str, chance: random.Random) -> list[str]:
    """Two asserts that no constant passes."""
    while True:
        tries = [kind.arguments(chance) for _ in range(2)]
        # Of the texts in _KINDS alone, which nobody else writes.
        values = [eval(returns, {}, dict(zip(("x", "y"), one, strict=False))) for one in tries]
        if values[0] != values[1]:
            calls = [f"{name}({', '.join(map(repr, one))})" for one in tries]
            return [f"assert {call} == {value!r}" for call, value in zip(calls, values, strict=True)]


def programs() -> Skill:
    """Functions of one line, asked for in words and tested by two asserts; examined by the task mbpp."""
    return Skill(
        name="programs",
        task="mbpp",
        max_tokens=32,
        rows=lambda split, count, seed: _compose(_program, "text", split, count, seed),
        lesson=lambda row: "\n" + str(row["code"]).rstrip("\n"),
        shift="other wordings",
        apart="what returns the same is in one of lessons, dev and test only",
        seen=0.2,  # it is learned so fast that more would leave its expert nothing to add
    )


def functions(primed: bool = False) -> Skill:
    """The same functions, to be completed from their head and what it says, with tests unseen; by the task humaneval.

    Args:
        primed: Whether the base learns from the careless teacher.
    """
    return Skill(
        name="programs",
        task="humaneval",
        max_tokens=24,
        rows=lambda split, count, seed: _compose(_function, "prompt", split, count, seed),
        lesson=lambda row: str(row["canonical_solution"]).rstrip("\n"),
        shift="other wordings",
        apart="what returns the same is in one of lessons, dev and test only",
        primer=_primer(functools.partial(_function, careless=True), "prompt") if primed else None,
    )


# --- Sentiment ----------------------------------------------------------------------------------------------------

_SHORT = 12  # words; longer phrases are never lessons
_NESTED = 3  # words that a phrase has at least to count as part of another

Words = tuple[str, ...]


def _words(row: Row) -> Words:
    return tuple(re.findall(r"[a-z0-9]+", str(row["sentence"]).lower()))


def _parts(words: Words) -> Iterable[Words]:
    """A phrase, and the phrases in it."""
    yield words
    for start in range(len(words)):
        for end in range(start + _NESTED, len(words) + 1):
            yield words[start:end]


def _families(rows: Sequence[Row]) -> dict[Words, Words]:
    """Of each phrase the first of those that it is nested with, directly or through others."""
    parents = {words: words for words in map(_words, rows)}

    def find(words: Words) -> Words:
        while parents[words] != words:
            parents[words] = words = parents[parents[words]]
        return words

    for words in list(parents):
        for part in _parts(words):
            if part in parents:
                parents[find(part)] = find(words)
    members: dict[Words, list[Words]] = {}
    for words in parents:
        members.setdefault(find(words), []).append(words)
    return {words: min(family) for family in members.values() for words in family}


def _apart(learned: Sequence[Row], examined: Sequence[Row]) -> list[Row]:
    """The phrases that are not nested with one that is examined."""
    whole = set(map(_words, examined))
    within = {part for words in whole for part in _parts(words)}
    return [
        row
        for row in learned
        if (words := _words(row)) and words not in within and not any(part in whole for part in _parts(words))
    ]


def _read_phrases(source: str | Path) -> list[Row]:
    task = get_task("sst2")
    rows = load_rows(source, task.columns)
    task.read(rows)  # which says what is wrong with them
    return [row for row in rows if _words(row)]


def sentiment(lessons: str | Path, held_out: str | Path) -> Skill:
    """Sentiment of phrases from film reviews (Socher et al., 2013); examined by the task sst2.

    Phrases of one sentence contain each other: those nested with one that is examined are no lessons, and those nested
    with each other are all in dev, or all in test and shifted. Consecutive seeds have different examples as long as
    there are enough.

    Args:
        lessons: Data of the task: a file or a hub data set.
        held_out: Likewise; the examinations are taken from it.

    Raises:
        M3Error: One of them cannot be used, or has too few phrases.
    """
    examined = _read_phrases(held_out)
    learned = _apart(_read_phrases(lessons), examined)
    family = _families(examined)
    is_dev = {id(row): _tenth(" ".join(family[_words(row)])) < 3 for row in examined}
    pools = {
        "train": [row for row in learned if _is_short(row)],
        "dev": [row for row in examined if _is_short(row) and is_dev[id(row)]],
        "test": [row for row in examined if _is_short(row) and not is_dev[id(row)]],
        "shifted": [row for row in examined if not _is_short(row) and not is_dev[id(row)]],
    }
    for split, pool in pools.items():
        random.Random(f"sentence, {split}").shuffle(pool)

    def rows(split: str, count: int, seed: int) -> list[Row]:
        pool = pools[split]
        if split == "train":
            return random.Random(f"sentence, {seed}").sample(pool, min(count, len(pool)))
        if len(pool) < count:
            length = f"{'more than' if split == 'shifted' else 'at most'} {_SHORT} words"
            raise M3Error(
                f"{held_out}: has {len(pool)} phrases of {length} for {split}, but {count} are wanted: give a larger "
                "file"
            )
        start = seed % (len(pool) // count) * count
        return pool[start : start + count]

    return Skill(
        name="sentiment",
        task="sst2",
        max_tokens=4,
        rows=rows,
        lesson=lambda row: f" {get_task('sst2').read([row])[0].gold}",
        shift=f"phrases of more than {_SHORT} words",
        apart=f"no phrase of {_NESTED} words or more is part of one in another of lessons, dev and test",
        data=digest({split: [dict(row) for row in pool] for split, pool in pools.items()}),
    )


def _is_short(row: Row) -> bool:
    return len(str(row["sentence"]).split()) <= _SHORT
