"""The journal of a run: one JSON line per example or request, written as they finish, and resumed when interrupted."""

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from m3jax.documents import FAULTS, parse_json
from m3jax.errors import M3Error
from m3jax.evaluation.ownership import PART, check_entries

_IDENTITY = "run.json"
_RECORDS = "records.jsonl"
_OUTCOMES: Mapping[str, tuple[str, ...]] = {
    "summary.json": ("task", "model", "examples", "judged"),
    "harness.json": ("model", "harness", "cut"),
}
"""The summaries that a run may end with, and keys that each has, by which it is known to be ours."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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
        unclear: Whether it answers, but says no one thing; such an example counts as wrong.
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
    unclear: bool = False


class Reply(NamedTuple):
    """What a model gave for one request of lm-evaluation-harness.

    Attributes:
        request: Digest of the request.
        answer: The text, or a score and whether it is greedy.
        cut: Whether the request did not fit and was cut.
    """

    request: str
    answer: Any
    cut: bool


_TEXT, _FLAG, _COUNT = (str,), (bool,), (int,)
_KINDS: tuple[tuple[type, ...], ...] = (
    *(_COUNT, _TEXT, _TEXT, _TEXT, (str, type(None)), _TEXT, (bool, type(None))),
    *(_FLAG, _FLAG, _FLAG, _FLAG, _COUNT, _TEXT, _FLAG),
)

_Entry = TypeVar("_Entry", Record, Reply)
"""What a journal holds; its first field tells one from another."""


def digest(value: Any) -> str:
    """SHA-256 of JSON data, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


class RunJournal(Generic[_Entry]):
    """What is done of one run, in a directory; see `open_journal`."""

    def __init__(self, directory: Path, done: dict[Any, _Entry]) -> None:
        self.directory = directory
        self.done: dict[Any, _Entry] = done

    def add(self, lines: Sequence[_Entry]) -> None:
        """Append what is finished; it is on disk when this returns.

        Raises:
            M3Error: It cannot be written; what was there before stays, and a run resumes from it.
        """
        text = "".join(map(_line, lines))
        with _writing(self.directory / _RECORDS), open(self.directory / _RECORDS, "a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        self.done |= {line[0]: line for line in lines}

    def finish(self, summary: Mapping[str, Any], name: str = "summary.json") -> None:
        """Put what is done in order and write the summary.

        Args:
            summary: What came out, as JSON data.
            name: Of the summary's file.

        Raises:
            M3Error: They cannot be written; the lines stay as they were.
        """
        write_whole(self.directory / _RECORDS, "".join(_line(self.done[key]) for key in sorted(self.done)))
        write_whole(self.directory / name, json.dumps(summary, indent=2) + "\n")

    def discard(self) -> None:
        """Remove the run, so that another can begin in its directory.

        Raises:
            M3Error: It cannot be removed.
        """
        for name in (_RECORDS, _IDENTITY):  # records without a run would block the next
            with _writing(self.directory / name, "remove"):
                (self.directory / name).unlink(missing_ok=True)
        self.done = {}


def open_journal(
    directory: Path,
    identity: Mapping[str, Any],
    resume: bool,
    weights: Callable[[], str],
    kind: type[_Entry],
) -> RunJournal[_Entry]:
    """Begin a run's journal, or go on with one.

    Args:
        directory: Where it is; made if it is not there.
        identity: What the run is of: JSON data. A run is gone on with only where all of it is the same.
        resume: Whether to go on with a run that is there. One that has no record yet is begun anew.
        weights: Identifies the weights, which may take long; asked for when all else is known to agree.
        kind: What each line holds: `Record` or `Reply`.

    Raises:
        M3Error: There is a run and `resume` is false, or it is another run, or the directory cannot be written.
    """
    make_directory(directory)
    path, records = directory / _IDENTITY, directory / _RECORDS
    known: dict[str, Any] = {}
    done: dict[Any, _Entry] = {}
    whole = 0
    for name, keys in _OUTCOMES.items():
        check_entries(directory / name, keys)
    if path.exists():
        done, whole = _read_lines(records, kind)
        known = {} if not done and _is_begun(path, identity) else _read_identity(path)
    elif records.exists():
        raise M3Error(f"{directory} holds records of a run but no {_IDENTITY}; give another output directory")
    if not done:
        if known and known.keys() != {*identity, "weights"}:
            raise M3Error(f"{path} is of no run that could be gone on with; give another output directory")
        _cut(records, whole)
        write_whole(path, "{}\n")  # tried first: the weights take longer
        write_whole(path, json.dumps({**identity, "weights": weights()}, indent=2) + "\n")
        return RunJournal(directory, {})
    if not resume:
        raise M3Error(
            f"{directory} already holds a run; pass --resume to go on with it, or give another output directory"
        )
    check_identity(directory, known, {**identity, "weights": known.get("weights")})
    check_identity(directory, known, {**identity, "weights": weights()})
    _cut(records, whole)
    return RunJournal(directory, done)


def count_records(directory: Path) -> int:
    """How many examples or requests the journal in a directory holds; 0 where there is none."""
    try:
        return (directory / _RECORDS).read_bytes().count(b"\n")
    except OSError:
        return 0


def make_directory(directory: Path) -> Path:
    """Make a directory, and those above it, where it is not there.

    Raises:
        M3Error: It cannot be made.
    """
    with _writing(directory, "make the directory"):
        directory.mkdir(parents=True, exist_ok=True)
    return directory


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all.

    Args:
        path: The file; its directory must be there.
        text: Its content. Half a surrogate pair, which a model may write, becomes a question mark.

    Raises:
        M3Error: It cannot be written.
    """
    beside = path.with_name(path.name + PART)
    with _writing(path):
        try:
            with open(beside, "wb") as file:
                file.write(text.encode("utf-8", "replace"))
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
        except OSError:
            with contextlib.suppress(OSError):
                beside.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def _writing(path: Path, what: str = "write") -> Iterator[None]:
    """Say in a sentence what keeps a file from being written, or a directory from being made."""
    try:
        yield
    except OSError as error:
        mend = "make it writable, or give another output directory"
        if isinstance(error, FileExistsError | NotADirectoryError):
            mend = "a file is where a directory is to be, so give another output directory"
        if error.errno in _FULL:
            mend = "make room and try again; a run goes on with --resume"
        raise M3Error(f"cannot {what} {path}: {error.strerror or error}; {mend}") from error


def _is_begun(path: Path, identity: Mapping[str, Any]) -> bool:
    """Whether no more than the beginning of this identity was written."""
    try:
        return json.dumps(identity, indent=2)[:-1].startswith(path.read_text(encoding="utf-8").strip())
    except (OSError, UnicodeDecodeError):
        return False


def _read_identity(path: Path) -> dict[str, Any]:
    try:
        return dict(parse_json(path.read_text(encoding="utf-8"), halves=True))
    except (OSError, *FAULTS) as error:
        raise M3Error(f"cannot read {path}: {error}; give another output directory") from error


def check_identity(directory: Path, known: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Raise M3Error where a run is another one than is asked for.

    Args:
        directory: Of the run.
        known: What it is of.
        identity: What is asked for.
    """
    wanted = json.loads(json.dumps(identity))
    different = [name for key in wanted for name in _differing(key, known.get(key), wanted[key])]
    if different:
        raise M3Error(
            f"{directory} holds another run: it differs in {', '.join(different)}; "
            "run with the same settings to resume, or give another output directory"
        )


def _differing(key: str, known: Any, wanted: Any) -> list[str]:
    """What differs of an entry, by the names of its own entries where it has such."""
    if not isinstance(known, dict) or not isinstance(wanted, dict):
        return [] if known == wanted else [key]
    return [name for name in {**known, **wanted} if known.get(name) != wanted.get(name)]


def _read_lines(path: Path, kind: type[_Entry]) -> tuple[dict[Any, _Entry], int]:
    """The whole lines of a journal, and how many bytes they are: an interruption may have cut the last one short."""
    if not path.exists():
        return {}, 0
    try:
        blob = path.read_bytes()
    except OSError as error:
        raise M3Error(f"cannot read {path}: {error.strerror}; give another output directory") from error
    whole = blob[: blob.rfind(b"\n") + 1]
    begun = f'{{"{kind._fields[0]}": '.encode()
    if not whole and not begun.startswith(blob[: len(begun)]):  # the first line is cut, and so could be anybody's
        raise M3Error(f"{path} holds no record of such a run; give another output directory")
    done = {}
    for number, line in enumerate(whole.split(b"\n")[:-1], 1):
        try:
            entry = _ENTRIES[kind](parse_json(line, halves=True))
        except FAULTS as error:
            raise M3Error(
                f"{path} line {number} is no record of such a run ({error}); give another output directory"
            ) from error
        done[entry[0]] = entry
    return done, len(whole)


def _cut(records: Path, whole: int) -> None:
    """Remove the line that an interruption cut short, once all is known to be ours; see that one can write."""
    if records.exists():
        with _writing(records), open(records, "r+b") as file:
            file.truncate(whole)


def _record(told: Any) -> Record:
    """A record as its line tells it; raises of every kind if it tells something else."""
    record = Record(**told)
    for value, kind in zip(record, _KINDS, strict=True):
        if not isinstance(value, kind) or (isinstance(value, bool) and bool not in kind):
            raise TypeError(f"{value!r:.50} is not of its kind")
    if record.number < 0 or record.tokens < 0:
        raise ValueError("a count is below 0")
    return record


def _reply(told: Any) -> Reply:
    """A reply as its line tells it; raises of every kind if it tells something else."""
    reply = Reply(**told)
    answer, named = reply.answer, isinstance(reply.request, str) and isinstance(reply.cut, bool)
    scored = isinstance(answer, list) and [type(each) for each in answer] in ([float, bool], [int, bool])
    if not named or not (scored or isinstance(answer, str)):
        raise TypeError(f"{told!r:.50} is no reply")
    return reply


_ENTRIES: Mapping[type, Callable[[Any], Any]] = {Record: _record, Reply: _reply}


def _line(record: Record | Reply) -> str:
    # Escaped, so that half a surrogate pair in what a model wrote can be stored.
    return json.dumps(record._asdict()) + "\n"
