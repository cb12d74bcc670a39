"""Whose rule judges can be chosen, and each grader judges by its own."""

import importlib.util
import json
from pathlib import Path

import pytest

import m3jax
from m3jax.errors import M3Error
from m3jax.evaluation import GRADERS, Completion, Execution, evaluate_task, get_task
from m3jax.evaluation.options import Evaluation, check_evaluation
from m3jax.evaluation.scorers.paper import paper_answer, paper_equal, paper_label, paper_number, paper_program

GSM8K = [{"question": "What is 9 * 2?", "answer": "#### 18"}]
MATH = [{"problem": "Half of one?", "answer": r"\frac{1}{2}"}]
SST2 = [{"sentence": "a good film", "label": 1}]
HAS_MATH_VERIFY = importlib.util.find_spec("math_verify") is not None


def verdict(task: str, rows: list[dict[str, object]], text: str, grader: str) -> tuple[bool | None, str | None]:
    chosen = get_task(task, grader)
    return chosen.judge(chosen.read(rows), [text], Execution())[0][:2]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The answer is: 18", 18),
        ("The answer is: 17.6", 18),
        ("The answer is: 2.5", 2),
        ("The answer is: 1,234", 1234),
        ("The answer is: 1,234,567", 1234),
        ("The answer is: 7/2", 4),
        ("The answer is: 7/0", 7),
        ("The answer is: -3 or 4", -3),
        ("The answer is: 5. The answer is: 6", 6),
        ("The answer is 18", None),
        ("#### 18", None),
        ("The answer is: none", None),
    ],
)
def test_numbers_by_the_papers_rule(text: str, number: int | None) -> None:
    assert paper_number(text) == number


@pytest.mark.parametrize(
    ("answer", "gold", "verdict"),
    [
        (r"\dfrac12", r"\frac{1}{2}", True),
        ("0.5", r"\frac{1}{2}", True),
        ("1/2", r"\frac12", True),
        ("x=5", "5", True),
        (r"90^\circ", "90", True),
        (r"5\text{ cm}", "5", True),
        (r"\sqrt3", r"\sqrt{3}", True),
        (r"\left( 1, 2 \right)", "(1,2)", True),
        ("2/4", "1/2", False),
        ("0.25", r"\frac14", False),
        (r"\frac", "1", False),
        (r"\sqrt{21}/5", r"\frac{\sqrt{21}}{5}", False),
        ("b+a", "a+b", False),
    ],
)
def test_equality_by_the_papers_rule(answer: str, gold: str, verdict: bool) -> None:
    assert paper_equal(answer, gold) is verdict


def test_answers_by_the_papers_rule() -> None:
    assert paper_answer("The answer is: $x$.\nMore.") == "$x$"
    assert paper_answer("The answer is: 5.") == "5"
    assert paper_answer(r"\boxed{5}") is None


def test_programs_by_the_papers_rule() -> None:
    assert paper_program("Sure:\n```python\nx = 1\n```\nDone.", "mbpp") == "x = 1"
    assert paper_program("x = 1\n# Example usage\nprint(x)", "mbpp") == "x = 1"
    assert paper_program("x = 1\n# Test examples\nassert x", "mbpp") == "x = 1"
    assert paper_program("x = 1\n# Test examples\nassert x", "humaneval") == "x = 1\n# Test examples\nassert x"
    assert paper_program('x = 1\nif __name__ == "__main__":\n\tprint(x)', "humaneval") == "x = 1"
    assert paper_program("The solution is:\nx = 1\n\nThe answer is: 1", "humaneval") == "x = 1"


def test_labels_by_the_papers_rule() -> None:
    labels = ("negative", "positive")
    said = ["Positive.", "It is 'negative'", "not positive", "positive, I think", "negative</s>", ""]
    assert [paper_label(text, labels) for text in said] == [
        "positive", "negative", "positive", None, "negative", None,
    ]  # fmt: skip


def test_each_grader_judges_by_its_own_rule() -> None:
    assert verdict("gsm8k", GSM8K, "#### 18", "m3jax") == (True, "18")
    assert verdict("gsm8k", GSM8K, "#### 18", "paper") == (False, None)
    assert verdict("gsm8k", GSM8K, "The answer is: 17.6", "paper") == (True, "18")
    assert verdict("math", MATH, "The answer is: 2/4", "m3jax") == (True, "2/4")
    assert verdict("math", MATH, "The answer is: 2/4", "paper") == (False, "2/4")
    assert verdict("sst2", SST2, "Not positive", "m3jax") == (False, "negative")
    assert verdict("sst2", SST2, "Not positive", "paper") == (True, "positive")


def test_a_grader_must_have_a_rule_for_the_task() -> None:
    assert get_task("gsm8k").grader == "m3jax"
    assert get_task("gsm8k", "paper").grader == "paper"
    with pytest.raises(M3Error, match="the grader paper has no rule for alpaca_eval; choose among m3jax"):
        get_task("alpaca_eval", "paper")
    with pytest.raises(M3Error, match="the grader math_verify has no rule for mbpp; choose among m3jax, paper"):
        get_task("mbpp", "math_verify")
    with pytest.raises(M3Error, match=r"no grader is called 'papers' \(did you mean paper\?\)"):
        get_task("gsm8k", "papers")
    with pytest.raises(M3Error, match="--grader is 'us', but must be one of m3jax, paper, math_verify"):
        check_evaluation(Evaluation(grader="us"))


def test_math_verify_must_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        M3Error, match=r"math_verify needs the package math-verify, .*: pip install 'm3jax\[math-verify\]'"
    ):
        get_task("math", "math_verify")


@pytest.mark.skipif(not HAS_MATH_VERIFY, reason="math-verify is not installed")
@pytest.mark.filterwarnings("ignore")
def test_math_verify_judges() -> None:
    assert verdict("math", MATH, "The answer is $0.5$.", "math_verify")[0] is True
    assert verdict("math", MATH, "The answer is $0.25$.", "math_verify")[0] is False
    assert verdict("gsm8k", GSM8K, "so \\boxed{18}", "math_verify")[0] is True


def test_the_grader_is_part_of_a_run(tmp_path: Path) -> None:
    def answer(prompts: object, settings: object) -> list[Completion]:
        return [Completion("#### 18", 1, finished=True)]

    task = get_task("gsm8k", "paper")
    summary = evaluate_task(task, task.read(GSM8K), answer, out_dir=tmp_path)
    assert (summary.grader, summary.correct, summary.unparsed) == ("paper", 0, 1)
    task = get_task("gsm8k")
    with pytest.raises(M3Error, match="holds another run: it differs in grader"):
        evaluate_task(task, task.read(GSM8K), answer, out_dir=tmp_path, resume=True)


def test_unclear_answers_are_counted(tmp_path: Path) -> None:
    texts = iter(["Neither.", "", "Positive"])
    task = get_task("sst2")
    summary = evaluate_task(
        task,
        task.read(SST2 * 3),
        lambda prompts, settings: [Completion(next(texts), 1, finished=True) for _ in prompts],
        out_dir=tmp_path,
    )
    assert (summary.unclear, summary.unparsed, summary.correct, summary.judged) == (1, 1, 1, 3)
    records = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    assert [(record["unclear"], record["unparsed"]) for record in records] == [
        (True, False),
        (False, True),
        (False, False),
    ]
    assert json.loads((tmp_path / "summary.json").read_text())["unclear"] == 1


def test_parameters_in_memory_are_graded_alike() -> None:
    with pytest.raises(M3Error, match="the grader math_verify has no rule for sst2"):
        m3jax.evaluate({}, None, None, "sst2", apply_fn=lambda *given: None, grader="math_verify")
    assert GRADERS == ("m3jax", "paper", "math_verify")
