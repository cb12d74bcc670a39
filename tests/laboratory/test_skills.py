"""Skills: what is taught is right, what is held out is held out, and the same seed gives the same examples."""

import random
from pathlib import Path

import pytest

from m3jax.errors import M3Error
from m3jax.evaluation import Execution, get_task
from m3jax.laboratory.examining import make_exam
from m3jax.laboratory.skills import SPLITS, Skill, programs, sentiment, word_problems

COMPOSED = [word_problems(), programs()]


def named(skill: Skill) -> str:
    return skill.name


@pytest.fixture
def phrases(tmp_path: Path) -> Skill:
    chance = random.Random(0)
    for name in ("learned", "held"):
        rows = [
            f"{' '.join(chance.choices(['dull', 'fine', 'plot', 'film'], k=chance.randint(1, 20)))} {name}{i}\t{i % 2}"
            for i in range(400)
        ]
        (tmp_path / f"{name}.tsv").write_text("\n".join(["sentence\tlabel", *rows, ""]))
    return sentiment(tmp_path / "learned.tsv", tmp_path / "held.tsv")


@pytest.mark.parametrize("skill", COMPOSED, ids=named)
@pytest.mark.parametrize("split", SPLITS)
def test_the_lessons_are_right_in_the_eyes_of_the_task(skill: Skill, split: str) -> None:
    exam = make_exam(skill, split, 60, seed=3)
    answers = [skill.lesson(row) for row in exam.rows]
    assert all(one.correct for one in exam.task.judge(exam.examples, answers, Execution()))
    assert not any(one.correct for one in exam.task.judge(exam.examples, ["\nno"] * 60, Execution()))


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


def test_phrases(phrases: Skill) -> None:
    assert phrases.lessons([{"sentence": "fine", "label": "1"}])[0][1] == " positive"
    places = {split: {row["sentence"] for row in phrases.rows(split, 60, 0)} for split in SPLITS}
    assert all("learned" in text for text in places["train"])
    assert all("held" in text for split in SPLITS[1:] for text in places[split])
    assert not places["dev"] & places["test"]
    assert all(len(text.split()) > 12 for text in places["shifted"])
    assert all(len(text.split()) <= 12 for split in SPLITS[:3] for text in places[split])
    assert len(phrases.rows("train", 10_000, 0)) == len({row["sentence"] for row in phrases.rows("train", 10_000, 0)})


def test_too_few_phrases(phrases: Skill) -> None:
    with pytest.raises(M3Error, match=r"phrases of more than 12 words for shifted, but 5000 are wanted"):
        phrases.rows("shifted", 5000, 0)
    with pytest.raises(M3Error, match="there is no data file"):
        sentiment("nowhere.tsv", "nowhere.tsv")


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
