"""Reading test sets: local files of the usual formats, or data sets of the Hugging Face hub."""

import csv
import gzip
import io
import logging
import os
import reprlib
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from m3jax.documents import parse_json
from m3jax.errors import M3Error
from m3jax.text import size_text

Row = Mapping[str, Any]

_GZIP = b"\x1f\x8b"
_LARGEST = 2**30  # bytes of text, unpacked; the largest test set here has 15 million
_INSTALL = "pip install 'm3jax[eval]'"


@contextmanager
def quiet_hub() -> Iterator[None]:
    """Keeps the hub client from printing every attempt that fails; what comes of them is said in a sentence."""
    logger = logging.getLogger("huggingface_hub")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


class HubSet(NamedTuple):
    """A data set of the hub: its id, its configuration, and its split."""

    id: str
    config: str | None = None
    split: str = "test"


class Field(NamedTuple):
    """A field that a task reads.

    Attributes:
        names: Its names in data files, the usual one first.
        required: Whether a row must have it.
    """

    names: tuple[str, ...]
    required: bool = True


def source_text(source: str | Path | HubSet) -> str:
    """A data source as people write it, for records.

    Args:
        source: As of `load_rows`.

    Example:
        >>> source_text(HubSet("openai/gsm8k", "main"))
        'openai/gsm8k:test'
    """
    return f"{source.id}:{source.split}" if isinstance(source, HubSet) else str(source)


def load_rows(source: str | Path | HubSet, columns: Sequence[str] = ()) -> list[Row]:
    """Read a test set.

    Args:
        source: A file (.jsonl, .json, .tsv, .csv, .parquet; .gz of the textual ones), or a data set of the hub, as
            `HubSet` or as text "owner/name", "owner/name:split".
        columns: Names of the columns of a TSV or CSV file that has no header line.

    Returns:
        Its rows.

    Raises:
        M3Error: There is no such file, it is not of the format its name says, or it is empty.
    """
    if not isinstance(source, HubSet | str | os.PathLike):
        raise M3Error(f"data is {reprlib.repr(source)}, but must be the path of a file, or a hub data set as text")
    if isinstance(source, HubSet):
        rows = _from_hub(source)
    elif Path(source).exists():
        rows = _from_file(Path(source), columns)
    elif _looks_like_hub(str(source)):
        name, _, split = str(source).partition(":")
        rows = _from_hub(HubSet(name, None, split or "test"))
    else:
        raise M3Error(
            f"there is no data file {source}; give a file, or a hub data set as owner/name or owner/name:split"
        )
    if not rows:
        raise M3Error(f"{source_text(source)} holds no examples; check that it is the file you mean")
    return rows


def _looks_like_hub(source: str) -> bool:
    name = source.partition(":")[0]
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and _format(Path(name)) not in _READERS


def _format(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() != ".gz"]
    return suffixes[-1] if suffixes else ""


def _from_file(path: Path, columns: Sequence[str]) -> list[Row]:
    kind = _format(path)
    if path.is_dir():
        raise M3Error(f"{path} is a directory; give one of the files in it")
    if kind == ".parquet":
        return _from_parquet(path)
    if kind not in _READERS:
        raise M3Error(f"{path}: cannot read this kind of file; known are {', '.join(_READERS)} (and .gz) and .parquet")
    if not path.is_file():
        raise M3Error(f"{path} is no regular file; give one with the data in it")
    try:
        blob = _content(path)
    except (OSError, EOFError, zlib.error) as error:
        raise M3Error(f"cannot read {path}: it is damaged ({type(error).__name__}); get it again") from error
    if len(blob) > _LARGEST:
        raise M3Error(f"cannot read {path}: it holds more than {size_text(_LARGEST)}, more than any test set; split it")
    try:
        text = blob.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise M3Error(f"cannot read {path}: it is no text in UTF-8; get it again") from error
    return _READERS[kind](text, path, columns)


def _content(path: Path) -> bytes:
    """What is in a file, unpacked; a byte more than the largest where it has more."""
    with open(path, "rb") as file:
        if file.read(2) != _GZIP:
            file.seek(0)
            return file.read(_LARGEST + 1)
    with gzip.open(path) as unpacked:
        return unpacked.read(_LARGEST + 1)


def _from_json_lines(text: str, path: Path, columns: Sequence[str]) -> list[Row]:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            rows.append(_json(line, f"{path} line {number}"))
            _check_row(rows[-1], f"{path} line {number}")
    return rows


def _from_json(text: str, path: Path, columns: Sequence[str]) -> list[Row]:
    found = _json(text, str(path))
    if isinstance(found, dict):
        lists = [value for value in found.values() if isinstance(value, list)]
        found = lists[0] if len(lists) == 1 else found  # {"data": [...]}
    if not isinstance(found, list):
        raise M3Error(f"{path} must hold a list of objects, one for each example; it holds one {type(found).__name__}")
    for number, row in enumerate(found, 1):
        _check_row(row, f"{path} entry {number}")
    return found


def _json(text: str, where: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise M3Error(f"{where} is not JSON ({error}); mend it, or give the file in its own format") from error


def _check_row(row: Any, where: str) -> None:
    if not isinstance(row, dict):
        raise M3Error(f"{where} must be an object with named fields; it is a {type(row).__name__}")


def _from_tabs(text: str, path: Path, columns: Sequence[str]) -> list[Row]:
    # Tab-separated test sets (GLUE's) quote nothing: a lone quotation mark is part of the text.
    return _from_table(csv.reader(io.StringIO(text), delimiter="\t", quoting=csv.QUOTE_NONE), path, columns)


def _from_commas(text: str, path: Path, columns: Sequence[str]) -> list[Row]:
    return _from_table(csv.reader(io.StringIO(text, newline="")), path, columns)


def _from_table(reader: Any, path: Path, columns: Sequence[str]) -> list[Row]:
    try:
        lines = [line for line in reader if line]
    except csv.Error as error:
        raise M3Error(f"cannot read {path}: {error}") from error
    if not lines:
        return []
    headerless = len(lines[0]) == len(columns) and not set(lines[0]) & set(columns)
    names, body = (list(columns), lines) if headerless else (lines[0], lines[1:])
    for number, line in enumerate(body, 1 if headerless else 2):
        if len(line) != len(names):
            raise M3Error(
                f"{path} line {number} has {len(line)} columns where {len(names)} are due: {', '.join(names)}"
            )
    return [dict(zip(names, line, strict=True)) for line in body]


_READERS = {".jsonl": _from_json_lines, ".json": _from_json, ".tsv": _from_tabs, ".csv": _from_commas}


def _from_parquet(path: Path) -> list[Row]:
    try:
        import pyarrow.parquet as parquet  # type: ignore[import-untyped, import-not-found, unused-ignore]
    except ImportError as error:
        raise M3Error(f"reading {path} needs pyarrow; install it with {_INSTALL}, or give the file as JSONL") from error
    try:
        rows: list[Row] = parquet.read_table(path).to_pylist()
    except Exception as error:  # pyarrow raises of every kind
        raise M3Error(f"cannot read {path}: it is damaged or no Parquet file; get it again") from error
    return rows


def _from_hub(source: HubSet) -> list[Row]:
    try:
        import datasets  # type: ignore[import-untyped, import-not-found, unused-ignore]
    except ImportError as error:
        raise M3Error(
            f"reading the data set {source.id} from the hub needs the datasets package; install it with {_INSTALL}, "
            "or give a local file"
        ) from error
    try:
        with quiet_hub():
            return [dict(row) for row in datasets.load_dataset(source.id, source.config, split=source.split)]
    except Exception as error:  # the hub client raises of every kind
        raise M3Error(
            f"cannot load the split {source.split!r} of the data set {source.id}: {error}; give a local file"
        ) from error


def read_fields(rows: Sequence[Row], fields: Mapping[str, Field], task: str) -> list[dict[str, Any]]:
    """Find a task's fields under any of their names.

    Args:
        rows: The rows of a test set.
        fields: For each of the task's own names, the names it has in files.
        task: Name of the task, for the sentence about what is missing.

    Returns:
        For each row, the fields it has, by the task's own names.

    Raises:
        M3Error: A row lacks a required field: says the fields found and those wanted.
    """
    return [_read_row(row, number, fields, task) for number, row in enumerate(rows, 1)]


def _read_row(row: Row, number: int, fields: Mapping[str, Field], task: str) -> dict[str, Any]:
    found, missing = {}, []
    for own, field in fields.items():
        name = next((name for name in field.names if row.get(name) is not None), None)
        if name is not None:
            found[own] = row[name]
        elif field.required:
            missing.append(" or ".join(field.names))
    if missing:
        raise M3Error(
            f"example {number} is not {task} data: it has the fields {', '.join(map(str, row)) or '(none)'}, "
            f"and {task} wants {' and '.join(missing)}"
        )
    return found
