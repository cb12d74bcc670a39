"""Gold answers of the real test sets score 100 %, corrupted ones 0 %."""

import pytest
from support.evaluation import GOLD, corrupted, real_examples, real_file

from m3jax.evaluation import Example, Execution, get_task, load_rows, why_no_sandbox
from m3jax.evaluation.scorers import equivalent
from m3jax.evaluation.tasks import Judgement

SIZES = {"gsm8k": 1319, "math": 500, "humaneval": 164, "mbpp": 500, "sst2": 6735}

# References that fail their own tests, by task: the example's id and why. None does.
FAILING_REFERENCES: dict[str, dict[str, str]] = {"gsm8k": {}, "math": {}, "humaneval": {}, "mbpp": {}, "sst2": {}}


def judged(task: str, examples: list[Example], texts: list[str]) -> list[Judgement]:
    if get_task(task).runs_code and why_no_sandbox() is not None:
        pytest.skip(f"no sandbox here: {why_no_sandbox()}")
    return get_task(task).judge(examples, texts, Execution())


def sampled(examples: list[Example], task: str) -> list[Example]:
    """About a dozen of a code task, all of another."""
    return examples[:: len(examples) // 12] if get_task(task).runs_code else examples


def assert_gold_passes(task: str, form: int, examples: list[Example]) -> None:
    verdicts = judged(task, examples, [GOLD[task][form](example) for example in examples])
    failing = {
        example.id: verdict
        for example, verdict in zip(examples, verdicts, strict=True)
        if not verdict.correct and example.id not in FAILING_REFERENCES[task]
    }
    assert not failing


def assert_corrupted_fails(task: str, examples: list[Example]) -> None:
    verdicts = judged(task, examples, [corrupted(task, example) for example in examples])
    passing = [example.id for example, verdict in zip(examples, verdicts, strict=True) if verdict.correct]
    assert not passing
    unparsed = [example.id for example, verdict in zip(examples, verdicts, strict=True) if verdict.parsed is None]
    assert not unparsed


FORMS = [(task, form) for task in GOLD for form in range(len(GOLD[task]))]
CODE = [(task, form) for task, form in FORMS if task in ("humaneval", "mbpp")]


@pytest.mark.parametrize(("task", "form"), FORMS)
def test_gold_answers_are_right(task: str, form: int) -> None:
    assert_gold_passes(task, form, sampled(real_examples(task), task))


@pytest.mark.parametrize("task", GOLD)
def test_corrupted_answers_are_wrong(task: str) -> None:
    examples = real_examples(task)
    assert len(examples) == SIZES[task]
    assert_corrupted_fails(task, sampled(examples, task))


@pytest.mark.slow
@pytest.mark.parametrize(("task", "form"), CODE)
def test_every_reference_program_passes(task: str, form: int) -> None:
    examples = real_examples(task)
    assert_gold_passes(task, form, examples if form == 0 else examples[::4])


@pytest.mark.slow
@pytest.mark.parametrize("task", ["humaneval", "mbpp"])
def test_corrupted_programs_fail(task: str) -> None:
    assert_corrupted_fails(task, real_examples(task)[::4])


def test_reference_solutions_of_math_end_in_their_answer() -> None:
    # The whole worked solution as a completion: the box in it is found and judged equal.
    task, examples = get_task("math"), real_examples("math")
    solutions = [row["solution"] for row in load_rows(real_file("math"))]
    verdicts = task.judge(examples, solutions, Execution())
    assert [example.id for example, verdict in zip(examples, verdicts, strict=True) if not verdict.correct] == []


def test_reference_solutions_of_gsm8k_end_in_their_answer() -> None:
    examples = real_examples("gsm8k")
    solutions = [row["answer"] for row in load_rows(real_file("gsm8k"))]
    assert all(verdict.correct for verdict in get_task("gsm8k").judge(examples, solutions, Execution()))


def test_answers_of_other_math_problems_are_wrong() -> None:
    # Every pair of distinct gold answers: equal only where they mean the same.
    answers = sorted({example.gold for example in real_examples("math")})[::4]
    same = {(one, other) for one in answers for other in answers if one < other and equivalent(one, other)}
    assert same <= {(r"2 \sqrt{5}", r"2\sqrt{5}"), ("10080", r"10,\!080")}
