"""AlpacaEval: open instructions, judged elsewhere by the alpaca_eval program."""

import json
from collections.abc import Sequence
from pathlib import Path

from m3jax.evaluation.data import Field, HubSet, Row, read_fields
from m3jax.evaluation.ownership import check_entries
from m3jax.evaluation.protocol import GenerationSettings
from m3jax.evaluation.records import write_whole
from m3jax.evaluation.tasks.base import Answer, Example, Judgement, Task, each


def alpaca_eval() -> Task:
    """Instructions of AlpacaEval (Li et al., 2023); writes `model_outputs.json` for alpaca_eval to judge."""
    return Task(
        name="alpaca_eval",
        read=_read,
        judge=each(lambda _, text: Judgement(None, text)),
        template="wizardlm",
        settings=GenerationSettings(max_tokens=2048),
        hub=HubSet("tatsu-lab/alpaca_eval", "alpaca_eval", "eval"),
        judged_elsewhere=True,
        export=_export,
    )


def _read(rows: Sequence[Row]) -> list[Example]:
    fields = {"instruction": Field(("instruction",)), "dataset": Field(("dataset",), required=False)}
    return [
        Example(str(number), str(row["instruction"]), "", {"dataset": row["dataset"]} if "dataset" in row else {})
        for number, row in enumerate(read_fields(rows, fields, "alpaca_eval"))
    ]


def _export(answers: Sequence[Answer], model: str, directory: Path) -> Path:
    path = directory / "model_outputs.json"
    outputs = [
        {
            "instruction": answer.example.instruction,
            "output": answer.text.strip(),  # as alpaca_eval's own runs do
            "generator": model,
            **answer.example.extra,
        }
        for answer in answers
    ]
    check_entries(path, ("instruction", "output", "generator"))
    write_whole(path, json.dumps(outputs, ensure_ascii=False, indent=1) + "\n")
    return path
