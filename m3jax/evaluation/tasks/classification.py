"""SST-2 and CoLA, and any other task of naming a sentence's class."""

import re
from collections.abc import Sequence

from m3jax.errors import M3Error
from m3jax.evaluation.data import Field, HubSet, Row, read_fields
from m3jax.evaluation.protocol import GenerationSettings
from m3jax.evaluation.scorers.labels import read_label
from m3jax.evaluation.scorers.paper import paper_label
from m3jax.evaluation.tasks.base import Example, Judgement, Task, each

_FEWEST_WORDS = 3  # of a sentence that an answer may repeat; "positive" alone may be both


def classification(
    name: str, question: str, labels: Sequence[str], hub: HubSet | None = None, columns: tuple[str, ...] = ()
) -> Task:
    """A task of naming a sentence's class in words.

    Args:
        name: What users call it.
        question: What the model is asked about each sentence; the sentence follows on a line of its own.
        labels: The classes' words; the test set numbers them from 0, or names them.
        hub: Where the test set is on the hub.
        columns: Columns of its files that have no header line.
    """

    def read(rows: Sequence[Row]) -> list[Example]:
        fields = {
            "sentence": Field(("sentence", "text", "content")),
            "label": Field(("label",)),
            "id": Field(("idx", "id"), required=False),
        }
        return [
            Example(
                id=str(row.get("id", number)),
                instruction=f"{question}\nSentence: {str(row['sentence']).strip()}\nAnswer:",
                gold=_gold(row["label"], labels, name, number + 1),
                extra={"sentence": str(row["sentence"]).strip()},
            )
            for number, row in enumerate(read_fields(rows, fields, name))
        ]

    def judge_one(example: Example, text: str) -> Judgement:
        said, is_unclear = read_label(_without_sentence(text, example), labels)
        detail = "the answer settles on no label" if is_unclear else ""
        return Judgement(said == example.gold, said, detail, unclear=is_unclear)

    def judge_as_paper(example: Example, text: str) -> Judgement:
        said = paper_label(text, labels)
        return Judgement(said == example.gold, said)

    return Task(
        name=name,
        read=read,
        judge=each(judge_one),
        template="alpaca",
        settings=GenerationSettings(max_tokens=32),
        hub=hub,
        columns=columns,
        has_correlation=True,
        graders={"paper": each(judge_as_paper)},
    )


def _without_sentence(text: str, example: Example) -> str:
    """The answer without the sentence it is about, which may speak of labels and negate them itself."""
    sentence = str(example.extra.get("sentence", ""))
    if len(sentence.split()) < _FEWEST_WORDS:
        return text
    return re.sub(re.escape(sentence), "quoted", text, flags=re.IGNORECASE)


def _gold(label: object, labels: Sequence[str], task: str, number: int) -> str:
    text = str(label).strip().lower()
    if text in labels:
        return text
    if text.isdigit() and int(text) < len(labels):
        return labels[int(text)]
    if text == "-1":
        raise M3Error(
            f"example {number} has the label -1: this split of {task} hides its labels; use its validation split"
        )
    numbered = ", ".join(f"{place} ({word})" for place, word in enumerate(labels))
    raise M3Error(f"example {number} is not {task} data: its label is {label!r} and should be one of {numbered}")


def sst2() -> Task:
    """Sentiment of sentences from film reviews (Socher et al., 2013)."""
    return classification(
        "sst2",
        "Classify the sentiment of the sentence as 'positive' or 'negative'. Answer with one word.",
        ("negative", "positive"),
        HubSet("stanfordnlp/sst2", split="validation"),
    )


def cola() -> Task:
    """Whether sentences are grammatical (Warstadt et al., 2019)."""
    return classification(
        "cola",
        "Judge the grammar of the sentence: is it 'acceptable' or 'unacceptable'? Answer with one word.",
        ("unacceptable", "acceptable"),
        HubSet("nyu-mll/glue", "cola", "validation"),
        columns=("source", "label", "star", "sentence"),
    )
