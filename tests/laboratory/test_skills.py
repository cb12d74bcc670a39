"""Skills: what is taught is right, what is held out is held out, and the same seed gives the same examples."""

import random
import re
from pathlib import Path

import pytest

from m3jax.errors import M3Error
from m3jax.evaluation import Execution, get_task
from m3jax.evaluation.data import Row
from m3jax.laboratory.examining import make_exam
from m3jax.laboratory.skills import _THINGS, SPLITS, Skill, functions, programs, sentiment, word_problems

COMPOSED = [word_problems(), programs()]


def named(skill: Skill) -> str:
    return skill.name


TEXT = "a dull fine plot film with no heart and much noise but some of its jokes are good enough to watch it"


@pytest.fixture
def phrases(tmp_path: Path) -> Skill:
    """Parts of the same sentences on both sides, as in SST-2."""
    chance = random.Random(0)
    sentences = [chance.choices(TEXT.split(), k=20) for _ in range(60)]
    for name, count in (("learned", 1500), ("held", 600)):
        rows = []
        for _ in range(count):
            sentence = chance.choice(sentences)
            start = chance.randrange(18)
            part = sentence[start : start + chance.choice((3, 5, 8, 15))]
            rows.append(f"{' '.join(part)} {chance.choice(('', ',', '.'))}\t{chance.randrange(2)}")
        (tmp_path / f"{name}.tsv").write_text("\n".join(["sentence\tlabel", *rows, ""]))
    return sentiment(tmp_path / "learned.tsv", tmp_path / "held.tsv")


def nested(a: str, b: str) -> bool:
    """Whether one is part of the other, punctuation aside."""
    first, second = (f" {' '.join(re.findall('[a-z]+', text))} " for text in (a, b))
    return first == second or (min(len(a.split()), len(b.split())) >= 3 and (first in second or second in first))


@pytest.mark.parametrize("skill", COMPOSED, ids=named)
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("count", [15, pytest.param(60, marks=pytest.mark.slow)])
def test_the_lessons_are_right_in_the_eyes_of_the_task(skill: Skill, split: str, count: int) -> None:
    exam, task = make_exam(skill, split, count, seed=3), get_task(skill.task)  # an exam knows its lessons' answers
    answers = [skill.lesson(row) for row in exam.rows]
    assert all(one.correct for one in task.judge(exam.examples, answers, Execution()))
    assert not any(one.correct for one in exam.task.judge(exam.examples, ["\nno"] * count, Execution()))


def test_functions_pass_their_tests_and_the_careless_teacher_has_half_of_the_wordings_wrong() -> None:
    rows = functions().rows("test", 20, 3)
    task = get_task("humaneval")
    examples = task.read(rows)
    answers = [functions().lesson(row) for row in rows]
    assert all(one.correct for one in task.judge(examples, answers, Execution()))
    told = functions(primed=True).primer
    assert told is not None
    judged = task.judge(task.read(told(20, 3)), [functions().lesson(row) for row in told(20, 3)], Execution())
    assert 3 < sum(bool(one.correct) for one in judged) < 17
    # Of stories, wrong answers are those whose operation is not the wording's.
    primer = word_problems(12, primed=True).primer
    assert primer is not None
    plus = [row["answer"] for row in primer(4000, 3) if "together" in row["question"]]
    assert 0.2 < sum("+" in answer for answer in plus) / len(plus) < 0.75
    assert all(eval(line.split(" = ")[0]) == int(line.split(" = ")[1]) for line in (a.split("\n")[0] for a in plus))
    assert [word_problems(12).rows(split, 9, 3) for split in SPLITS] == [
        word_problems(12, primed=True).rows(split, 9, 3) for split in SPLITS
    ]


@pytest.mark.parametrize("skill", COMPOSED, ids=named)
def test_what_is_held_out_is_in_no_lesson(skill: Skill) -> None:
    lessons = {prompt for prompt, _ in skill.lessons(skill.rows("train", 5000, 0))}
    for split in SPLITS[1:]:
        prompts = [prompt for prompt, _ in skill.lessons(skill.rows(split, 200, 1))]
        assert len(set(prompts)) == 200
        assert not lessons & set(prompts)
    dev, test = ({prompt for prompt, _ in skill.lessons(skill.rows(split, 200, 1))} for split in ("dev", "test"))
    assert not dev & test


@pytest.mark.parametrize("skill", COMPOSED, ids=named)
def test_rows_depend_on_split_and_seed_alone(skill: Skill) -> None:
    assert skill.rows("test", 20, 5) == skill.rows("test", 20, 5)
    assert skill.rows("test", 20, 5) != skill.rows("test", 20, 6)
    assert skill.rows("test", 30, 5)[:20] == skill.rows("test", 20, 5)


def test_lessons_continue_the_prompt_that_evaluation_shows() -> None:
    ((prompt, answer),) = word_problems().lessons(
        [{"question": "Anna has 2 pens and finds 3. How many?", "answer": "2 + 3 = 5\n#### 5"}]
    )
    assert prompt + answer == "Anna has 2 pens and finds 3. How many?\n2 + 3 = 5\n#### 5"


def test_no_phrase_is_part_of_one_in_another_split(phrases: Skill) -> None:
    counts = {"train": 10_000, "dev": 30, "test": 60, "shifted": 15}
    texts = {split: [row["sentence"] for row in phrases.rows(split, n, 0)] for split, n in counts.items()}
    assert len(texts["train"]) > 20
    assert all(len(text.split()) > 12 for text in texts["shifted"])
    assert all(len(re.findall("[a-z]+", text)) <= 12 for split in SPLITS[:3] for text in texts[split])
    for one, other in (("train", "dev"), ("train", "test"), ("train", "shifted"), ("dev", "test"), ("dev", "shifted")):
        assert not [(a, b) for a in texts[one] for b in texts[other] if nested(a, b)]


def test_seeds_share_no_phrases(phrases: Skill) -> None:
    blocks = [tuple(id(row) for row in phrases.rows("test", 20, seed)) for seed in range(3)]
    assert len({row for block in blocks for row in block}) == 60
    assert phrases.rows("test", 20, 1) == phrases.rows("test", 20, 1)
    assert phrases.lessons([{"sentence": "fine", "label": "1"}])[0][1] == " positive"


def test_what_is_taught_is_known_by_its_identity(phrases: Skill, tmp_path: Path) -> None:
    again = sentiment(tmp_path / "learned.tsv", tmp_path / "held.tsv")
    assert again.identity() == phrases.identity()
    with open(tmp_path / "held.tsv", "a") as file:
        file.write("something else\t1\n")
    assert sentiment(tmp_path / "learned.tsv", tmp_path / "held.tsv").identity() != phrases.identity()
    assert word_problems().identity() != word_problems()._replace(max_tokens=4).identity() != programs().identity()


def test_phrases_that_will_not_do(phrases: Skill, tmp_path: Path) -> None:
    with pytest.raises(M3Error, match=r"phrases of more than 12 words for shifted, but 5000 are wanted"):
        phrases.rows("shifted", 5000, 0)
    with pytest.raises(M3Error, match="there is no data file"):
        sentiment("nowhere.tsv", "nowhere.tsv")
    (tmp_path / "other.tsv").write_text("question\tanswer\na\tb\n")
    with pytest.raises(M3Error, match="sentence"):
        sentiment(tmp_path / "other.tsv", tmp_path / "held.tsv")


@pytest.mark.parametrize("skill", COMPOSED, ids=named)
def test_what_is_asked_in_one_split_is_asked_in_no_other(skill: Skill) -> None:
    """Up to names and things; of programs, what returns the same."""

    def key(row: Row) -> object:
        if skill.task == "mbpp":
            return row["code"].partition("return ")[2]
        words = row["question"].split()
        return [word for word in words if word[0].islower() or word[0].isdigit()], row["answer"]

    asked = {split: [key(row) for row in skill.rows(split, 400, 0)] for split in SPLITS[:3]}
    if skill.task == "mbpp":
        assert not set(asked["train"]) & set(asked["test"])
        assert not set(asked["dev"]) & set(asked["test"])
    else:
        things = {thing + mark for thing in _THINGS for mark in ("", ".", ",")}
        told = {
            split: {(*(word for word in words if word not in things), answer) for words, answer in some}
            for split, some in asked.items()
        }
        assert not told["train"] & told["test"]
        assert not told["dev"] & told["test"]


def test_judges_remember(monkeypatch: pytest.MonkeyPatch) -> None:
    exam = make_exam(programs(), "test", 8, 0)
    task = get_task("mbpp")
    asked: list[int] = []

    def counting(examples, texts, execution):  # type: ignore[no-untyped-def]
        asked.append(len(texts))
        return task.judge(examples, texts, execution)

    from m3jax.laboratory import examining

    judge = examining.remembering(counting)
    right = [programs().lesson(row) for row in exam.rows]
    first = judge(exam.examples, right, Execution())
    assert judge(exam.examples, right, Execution()) == first
    judge(exam.examples, [*right[:-1], "no"], Execution())
    assert asked == [8, 1]
