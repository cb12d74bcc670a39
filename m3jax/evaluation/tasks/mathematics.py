"""GSM8K and MATH: problems with one right answer."""

from collections.abc import Sequence

from m3jax.errors import M3Error
from m3jax.evaluation.data import Field, HubSet, Row, read_fields
from m3jax.evaluation.protocol import GenerationSettings
from m3jax.evaluation.scorers import equivalent, last_boxed, marked_answer, parse_number, stated_number
from m3jax.evaluation.scorers.paper import paper_answer, paper_equal, paper_number
from m3jax.evaluation.scorers.verified import verified
from m3jax.evaluation.tasks.base import Example, Judgement, Task, each

# Where a model starts to write the next exercise itself; as in the evaluation that the paper follows.
_STOP = ("Instruction:", "Instruction", "Response:", "Response")


def gsm8k() -> Task:
    """Grade-school word problems with a number for an answer (Cobbe et al., 2021).

    The number that the answer's statement gives (`scorers.stated_number`) must equal the gold one exactly. (The
    evaluation that the paper follows rounds both to integers first.)
    """
    return Task(
        name="gsm8k",
        read=_read_gsm8k,
        judge=each(_judge_gsm8k),
        template="wizardmath",
        settings=GenerationSettings(max_tokens=1024, stop=_STOP),
        hub=HubSet("openai/gsm8k", "main"),
        graders={"paper": each(_judge_gsm8k_as_paper), "math_verify": each(_judge_by_math_verify)},
    )


def _read_gsm8k(rows: Sequence[Row]) -> list[Example]:
    fields = {
        "question": Field(("question", "instruction", "problem")),
        "answer": Field(("answer", "output", "solution")),
    }
    examples = []
    for number, row in enumerate(read_fields(rows, fields, "gsm8k"), 1):
        gold = str(row["answer"]).rpartition("####")[2].strip()
        if parse_number(gold) is None or not any(map(str.isdigit, gold)):
            raise M3Error(
                f"example {number} is not gsm8k data: its answer ends in no number after '####': {gold[:80]!r}"
            )
        examples.append(Example(str(number - 1), str(row["question"]), gold))
    return examples


def _judge_gsm8k(example: Example, text: str) -> Judgement:
    number, said = stated_number(text, example.instruction)
    if number is None and said:
        return Judgement(False, None, f"the answer {said[:80]!r} is no single number", unclear=True)
    if number is None:
        return Judgement(False, None)
    return Judgement(number == parse_number(example.gold), str(number))


def _judge_gsm8k_as_paper(example: Example, text: str) -> Judgement:
    number = paper_number(text)
    if number is None:
        return Judgement(False, None)
    return Judgement(number == parse_number(example.gold), str(number))


def _judge_by_math_verify(example: Example, text: str) -> Judgement:
    correct, said = verified(text, example.gold)
    return Judgement(correct, said)


def math() -> Task:
    """Competition problems with an answer in LaTeX (Hendrycks et al., 2021).

    The answer that the solution states (`scorers.marked_answer`) must mean the same as the gold answer
    (`scorers.equivalent`).
    """
    return Task(
        name="math",
        read=_read_math,
        judge=each(_judge_math),
        template="wizardmath",
        settings=GenerationSettings(max_tokens=2048, stop=_STOP),
        hub=HubSet("HuggingFaceH4/MATH-500"),
        graders={"paper": each(_judge_math_as_paper), "math_verify": each(_judge_by_math_verify)},
    )


def _read_math(rows: Sequence[Row]) -> list[Example]:
    fields = {
        "problem": Field(("problem", "question", "instruction")),
        "answer": Field(("answer",), required=False),
        "solution": Field(("solution", "output"), required=False),
        "id": Field(("unique_id", "id"), required=False),
    }
    examples = []
    for number, row in enumerate(read_fields(rows, fields, "math"), 1):
        gold = str(row["answer"]) if "answer" in row else last_boxed(str(row.get("solution", "")))
        if gold is None:
            raise M3Error(
                f"example {number} is not math data: it has the fields {', '.join(map(str, rows[number - 1]))}, "
                "and math wants an answer, or a solution that ends in \\boxed{…}"
            )
        examples.append(Example(str(row.get("id", number - 1)), str(row["problem"]), gold))
    return examples


def _judge_math(example: Example, text: str) -> Judgement:
    answer = marked_answer(text)
    if answer is None:
        return Judgement(False, None)
    return Judgement(equivalent(answer, example.gold, example.instruction), answer)


def _judge_math_as_paper(example: Example, text: str) -> Judgement:
    answer = paper_answer(text)
    if answer is None:
        return Judgement(False, None)
    return Judgement(paper_equal(answer, example.gold), answer)
