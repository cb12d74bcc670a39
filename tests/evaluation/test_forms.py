"""The public test sets in every form: right answers pass, wrong ones and near misses do not."""

from collections.abc import Iterable

import pytest
from support.evaluation import real_examples
from support.forms import labels, mathematics, numbers, programs

from m3jax.evaluation import Example, Execution, Judgement, get_task, why_no_sandbox
from m3jax.evaluation.scorers import slices
from m3jax.evaluation.tasks.programming import program_finders

SAMPLED = 40  # examples of a test set, evenly chosen; scripts/graders judges them all


def sampled(task: str, number: int = SAMPLED) -> list[Example]:
    examples = real_examples(task)
    return examples[:: max(1, len(examples) // number)]


def judged(
    task: str, cases: Iterable[tuple[Example, str, str]], grader: str = "m3jax"
) -> dict[tuple[str, str], Judgement]:
    """Verdicts by example and form."""
    given = list(cases)
    verdicts = get_task(task, grader).judge([case[0] for case in given], [case[2] for case in given], Execution())
    return {(case[0].id, case[1]): verdict for case, verdict in zip(given, verdicts, strict=True)}


def refused(found: dict[tuple[str, str], Judgement]) -> list[tuple[str, str]]:
    return [key for key, verdict in found.items() if not verdict.correct]


def accepted(found: dict[tuple[str, str], Judgement]) -> list[tuple[str, str]]:
    return [key for key, verdict in found.items() if verdict.correct]


def test_numbers_in_every_form() -> None:
    examples = sampled("gsm8k")
    right = ((e, form, text) for e in examples for form, text in numbers.forms(e.gold, e.instruction).items())
    wrong = (
        (e, form, text) for e in examples for form, text in numbers.forms(numbers.other(e.gold), e.instruction).items()
    )
    near = ((e, form, text) for e in examples for form, text in numbers.neighbours(e.gold, e.instruction).items())
    assert refused(judged("gsm8k", right)) == []
    assert accepted(judged("gsm8k", wrong)) == []
    assert accepted(judged("gsm8k", near)) == []


def test_ranges_are_unclear() -> None:
    example = sampled("gsm8k")[0]
    found = judged(
        "gsm8k", [(example, form, text) for form, text in numbers.neighbours(example.gold, example.instruction).items()]
    )
    for form in ("range n to m", "between n and m", "n or m", "more than n"):
        assert found[example.id, form].unclear


def test_mathematics_in_every_form() -> None:
    examples = sampled("math")
    for forms in (mathematics.statements, mathematics.spellings):
        boxed = forms is mathematics.spellings
        right = ((e, form, f"\\boxed{{{t}}}" if boxed else t) for e in examples for form, t in forms(e.gold).items())
        assert refused(judged("math", right)) == []
    wrong = (
        (e, form, text) for e in examples for form, text in mathematics.statements(mathematics.wrong(e.gold)).items()
    )
    near = (
        (e, form, f"$\\boxed{{{t}}}$")
        for e in examples
        for form, t in mathematics.neighbours(e.gold, e.instruction).items()
    )
    assert accepted(judged("math", wrong)) == []
    assert accepted(judged("math", near)) == []


@pytest.mark.parametrize(
    ("task", "words"), [("sst2", ("negative", "positive")), ("cola", ("unacceptable", "acceptable"))]
)
def test_labels_in_every_form(task: str, words: tuple[str, str]) -> None:
    sentences = ["a fine, not at all dull film", "it 's n't bad ' at all", "dull"]
    rows = [{"sentence": sentence, "label": label} for sentence in sentences for label in words]
    for example in get_task(task).read(rows):
        other = words[1 - words.index(example.gold)]
        sentence = example.extra["sentence"]
        right = ((example, form, text) for form, text in labels.forms(example.gold, other, sentence).items())
        wrong = ((example, form, text) for form, text in labels.forms(other, example.gold, sentence).items())
        assert refused(judged(task, right)) == []
        assert accepted(judged(task, wrong)) == []
        unclear = judged(task, [(example, form, text) for form, text in labels.unclear(example.gold, other).items()])
        assert all(verdict.unclear and verdict.parsed is None for verdict in unclear.values())
        silent = judged(task, [(example, form, text) for form, text in labels.silent().items()])
        assert not any(verdict.unclear or verdict.correct for verdict in silent.values())


@pytest.mark.parametrize("task", ["mbpp", "humaneval"])
def test_programs_in_every_form(task: str) -> None:
    find = program_finders(task)["m3jax"]
    for example in sampled(task, 12):
        names, code = programs.wanted(example), programs.reference(example)
        draft = programs.broken(code)
        for form, text in programs.forms(example, code, draft).items():
            found = find(example, text)
            assert found is not None, form
            tree = slices.parsed(found)
            assert tree is not None, form
            assert set(names) <= slices.bound_names(tree), form
            assert "neither here nor there" not in found.partition("def ")[2] or "draft" in form, form


@pytest.mark.skipif(why_no_sandbox() is not None, reason=f"no sandbox here: {why_no_sandbox()}")
@pytest.mark.parametrize("task", ["mbpp", "humaneval"])
def test_programs_that_must_not_pass(task: str) -> None:
    near = []
    for example in sampled(task, 3):
        code = programs.reference(example)
        near += [(example, form, t) for form, t in programs.neighbours(example, code, programs.broken(code)).items()]
    assert accepted(judged(task, near)) == []


def test_the_papers_grader_reads_only_its_mark() -> None:
    example = sampled("gsm8k")[0]
    found = judged(
        "gsm8k",
        [(example, form, text) for form, text in numbers.forms(example.gold, example.instruction).items()],
        "paper",
    )
    assert found[example.id, "The answer is: n"].correct
    assert found[example.id, "box"].parsed is None
