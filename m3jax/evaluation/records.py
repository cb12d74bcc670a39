"""The journal of a run: one JSON line per example, written as examples finish, and resumed after an interruption."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from m3jax.errors import M3Error

_IDENTITY = "run.json"
_RECORDS = "records.jsonl"


class Record(NamedTuple):
    """What became of one example.

    Attributes:
        number: Its place in the test set, from 0.
        id: Its name there.
        prompt: The prompt, template and all.
        completion: What the model wrote.
        parsed: The answer found in it.
        gold: The right answer.
        correct: The verdict; None where only a judge elsewhere can say, or the example was skipped.
        unparsed: Whether no answer was found; such an example counts as wrong.
        truncated: Whether the completion hit its limit of tokens.
        prompt_truncated: Whether the prompt did not fit and was cut.
        skipped: Whether the prompt did not fit and the example was left out.
        tokens: Number of generated tokens.
        detail: Why it is wrong, where more is known.
    """

    number: int
    id: str
    prompt: str
    completion: str
    parsed: str | None
    gold: str
    correct: bool | None
    unparsed: bool
    truncated: bool
    prompt_truncated: bool
    skipped: bool
    tokens: int
    detail: str


def digest(value: Any) -> str:
    """SHA-256 of JSON data, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


class Journal:
    """The records of one run in a directory; see `open_journal`."""

    def __init__(self, directory: Path, done: dict[int, Record]) -> None:
        self.directory = directory
        self.done = done

    def add(self, records: Sequence[Record]) -> None:
        """Append finished examples; they are on disk when this returns."""
        text = "".join(_line(record) for record in records)
        with open(self.directory / _RECORDS, "a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        self.done |= {record.number: record for record in records}

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Put the records in the order of the test set and write `summary.json`."""
        _replace(self.directory / _RECORDS, "".join(_line(self.done[number]) for number in sorted(self.done)))
        _replace(self.directory / "summary.json", json.dumps(summary, indent=2, ensure_ascii=False) + "\n")


def open_journal(directory: Path, identity: Mapping[str, Any], resume: bool) -> Journal:
    """Begin a run's journal, or go on with one.

    Args:
        directory: Where it is; made if it is not there.
        identity: What the run is of: JSON data. A run is gone on with only where all of it is the same.
        resume: Whether to go on with a run that is there.

    Raises:
        M3Error: There is a run and `resume` is false, or it is another run.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise M3Error(f"cannot make the directory {directory}: {error.strerror}") from error
    path = directory / _IDENTITY
    if not path.exists():
        if (directory / _RECORDS).exists():
            raise M3Error(f"{directory} holds records of a run but no {_IDENTITY}; give another output directory")
        _replace(path, json.dumps({**identity, "digest": digest(identity)}, indent=2, ensure_ascii=False) + "\n")
        return Journal(directory, {})
    if not resume:
        raise M3Error(
            f"{directory} already holds a run; pass --resume to go on with it, or give another output directory"
        )
    _check_identity(path, identity)
    return Journal(directory, _read_records(directory / _RECORDS))


def _check_identity(path: Path, identity: Mapping[str, Any]) -> None:
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
        known = dict(there)
    except (OSError, ValueError, TypeError) as error:
        raise M3Error(f"cannot read {path}: {error}; give another output directory") from error
    if known.get("digest") == digest(identity):
        return
    wanted = json.loads(json.dumps(identity))
    different = [key for key in wanted if known.get(key) != wanted[key]]
    raise M3Error(
        f"{path.parent} holds another run: it differs in {', '.join(different) or 'its contents'}; "
        "run with the same settings to resume, or give another output directory"
    )


def _read_records(path: Path) -> dict[int, Record]:
    """The whole records of a journal; a last line that an interruption cut short is removed."""
    if not path.exists():
        return {}
    blob = path.read_bytes()
    whole = blob[: blob.rfind(b"\n") + 1]
    if len(whole) < len(blob):
        with open(path, "r+b") as file:
            file.truncate(len(whole))
    done = {}
    for number, line in enumerate(whole.split(b"\n")[:-1], 1):
        try:
            record = Record(**json.loads(line))
        except (ValueError, TypeError) as error:
            raise M3Error(
                f"{path} line {number} is no record of a run ({error}); give another output directory"
            ) from error
        done[record.number] = record
    return done


def _line(record: Record) -> str:
    # Escaped, so that half a surrogate pair in what a model wrote can be stored.
    return json.dumps(record._asdict()) + "\n"


def _replace(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    beside = path.with_name(path.name + ".part")
    with open(beside, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
