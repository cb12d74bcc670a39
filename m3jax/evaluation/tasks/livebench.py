"""LiveBench: instruction following, coding and typo fixing, in LiveBench's own files."""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from m3jax.errors import M3Error
from m3jax.evaluation.data import Field, HubSet, Row, read_fields
from m3jax.evaluation.ownership import check_entries
from m3jax.evaluation.protocol import GenerationSettings
from m3jax.evaluation.records import make_directory, write_whole
from m3jax.evaluation.tasks.base import Answer, Example, Export, Judge, Judgement, Task, each

_SOLUTION = re.compile(r"<solution>(.*?)</solution>", re.DOTALL)
_TAG = re.compile(r"</?solution>")
_BETWEEN_DASHES = re.compile(r" --- (.*?) --- ")


def livebench_instruction_following() -> Task:
    """LiveBench's instruction following (White et al., 2024); writes answers for LiveBench to score."""
    return _livebench("instruction_following", None, _judged_elsewhere)


def livebench_coding() -> Task:
    """LiveBench's coding (White et al., 2024); writes answers for LiveBench to score."""
    return _livebench("coding", None, _judged_elsewhere)


def livebench_typos() -> Task:
    """LiveBench's typo fixing (White et al., 2024): the corrected text must stand in the answer word for word."""
    return _livebench("language", "typos", each(_judge_typos))


_judged_elsewhere: Judge = each(lambda _, text: Judgement(None, text))


def _livebench(category: str, kind: str | None, judge: Judge) -> Task:
    name = f"livebench_{kind or category}"

    def read(rows: Sequence[Row]) -> list[Example]:
        chosen = [row for row in rows if kind is None or row.get("task", kind) == kind]
        if not chosen:
            raise M3Error(f"none of the questions is of the task {kind!r}, which {name} wants")
        return _read(chosen, name, needs_truth=kind is not None)

    return Task(
        name=name,
        read=read,
        judge=judge,
        template="wizardlm",
        settings=GenerationSettings(max_tokens=4096),
        hub=HubSet(f"livebench/{category}"),
        judged_elsewhere=judge is _judged_elsewhere,
        export=exported(str.strip),
    )


def _read(rows: Sequence[Row], name: str, needs_truth: bool) -> list[Example]:
    fields = {
        "id": Field(("question_id",)),
        "turns": Field(("turns",)),
        "truth": Field(("ground_truth",), required=needs_truth),
    }
    examples = []
    for number, row in enumerate(read_fields(rows, fields, name), 1):
        turns = row["turns"]
        if not isinstance(turns, list) or len(turns) != 1:
            raise M3Error(f"example {number} is not {name} data: turns must be a list of one text")
        examples.append(Example(str(row["id"]), str(turns[0]), str(row.get("truth", ""))))
    return examples


def _judge_typos(example: Example, text: str) -> Judgement:
    answer = _flat(_typo_answer(text))
    return Judgement(example.gold != "" and example.gold in answer, answer) if answer else Judgement(False, None)


def _typo_answer(text: str) -> str:
    """What LiveBench takes for the answer: the last <solution>, else what stands between dashes, else everything."""
    tagged = _SOLUTION.findall(text)
    if tagged:
        return str(tagged[-1])
    text = _TAG.sub("", text)
    dashed = _BETWEEN_DASHES.search(text)
    return dashed[1] if dashed else text


def _flat(text: str) -> str:
    return " ".join(line for line in text.strip().split("\n") if line)


def exported(clean: Callable[[str], str]) -> Export:
    """Writes LiveBench's `model_answer/<model>.jsonl`.

    Args:
        clean: What is made of each answer.
    """

    def export(answers: Sequence[Answer], model: str, directory: Path) -> Path:
        place = make_directory(directory / "model_answer")
        label = re.sub(r"[^\w.-]+", "-", model).strip("-") or "model"
        path = place / f"{label}.jsonl"
        lines = [json.dumps(_answer_line(answer, clean, label), ensure_ascii=False) for answer in answers]
        check_entries(path, ("question_id", "answer_id", "model_id"))
        write_whole(path, "".join(line + "\n" for line in lines))
        return path

    return export


def _answer_line(answer: Answer, clean: Callable[[str], str], model: str) -> dict[str, object]:
    digest = hashlib.sha256(f"{model}\n{answer.example.id}\n{answer.text}".encode("utf-8", "replace")).hexdigest()
    return {
        "question_id": answer.example.id,
        "answer_id": digest[:22],
        "model_id": model,
        "choices": [{"index": 0, "turns": [clean(answer.text)]}],
        "tstamp": 0.0,  # no clock: the same answers make the same file
        "total_output_tokens": answer.tokens,
    }
