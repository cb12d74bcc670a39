"""Test sets in every format, and sentences about those that are not what they should be."""

import gzip
import json
import sys
from pathlib import Path

import pytest

from m3jax.errors import M3Error
from m3jax.evaluation import HubSet, data, get_task, load_rows
from m3jax.evaluation.data import Field, read_fields

ROWS = [{"sentence": 'a "quoted', "label": "1"}, {"sentence": "b, c", "label": "0"}]


def write(place: Path, name: str) -> Path:
    path = place / name
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    match name.split(".", 1)[1]:
        case "jsonl":
            path.write_text(lines)
        case "jsonl.gz":
            path.write_bytes(gzip.compress(lines.encode()))
        case "json":
            path.write_text(json.dumps({"version": 1, "data": ROWS}))
        case "tsv":
            path.write_text("sentence\tlabel\n" + "".join(f"{row['sentence']}\t{row['label']}\n" for row in ROWS))
        case "csv":
            path.write_text('\ufeffsentence,label\n"a ""quoted",1\n"b, c",0\n', encoding="utf-8")
        case "parquet":
            arrow = pytest.importorskip("pyarrow", reason="needs pyarrow")
            import pyarrow.parquet

            pyarrow.parquet.write_table(arrow.Table.from_pylist(ROWS), path)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.tsv", "a.csv", "a.parquet"])
def test_every_format_reads_alike(tmp_path: Path, name: str) -> None:
    assert load_rows(write(tmp_path, name)) == ROWS


def test_a_table_without_a_header_gets_the_names_of_the_task(tmp_path: Path) -> None:
    path = tmp_path / "cola.tsv"
    path.write_text("gj04\t1\t\tOur friends won.\ngj04\t0\t*\tThey drank the pub.\n")
    task = get_task("cola")
    examples = task.read(load_rows(path, task.columns))
    assert [example.gold for example in examples] == ["acceptable", "unacceptable"]
    assert "Sentence: They drank the pub.\n" in examples[1].instruction


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.jsonl", "{}\n[1]\n", r"a.jsonl line 2 must be an object with named fields; it is a list"),
        ("a.jsonl", "{\n", r"a.jsonl line 1 is not JSON"),
        ("a.jsonl", "\n\n", r"a.jsonl holds no examples"),
        ("a.json", '{"a": 1}', r"must hold a list of objects"),
        ("a.json", "[1]", r"entry 1 must be an object"),
        ("a.tsv", "a\tb\n1\n", r"line 2 has 1 columns where 2 are due: a, b"),
        ("a.txt", "x", r"cannot read this kind of file; known are .jsonl, .json, .tsv, .csv"),
        ("a.jsonl.gz", b"\x1f\x8b\x08broken", r"cannot read .*a.jsonl.gz"),
        ("a.jsonl", b"\xff\xfe\xff", r"cannot read .*a.jsonl"),
        ("a.parquet", "not parquet", r"cannot read .*a.parquet|needs pyarrow"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path: Path, name: str, content: str | bytes, sentence: str) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(M3Error, match=sentence):
        load_rows(path)


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(M3Error, match=r"there is no data file /nowhere/a.jsonl; give a file, or a hub data set"):
        load_rows("/nowhere/a.jsonl")
    with pytest.raises(M3Error, match=r"there is no data file data/a\.jsonl"):
        load_rows("data/a.jsonl")
    with pytest.raises(M3Error, match="is a directory"):
        load_rows(tmp_path)


def test_optional_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("datasets", "pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(M3Error, match=r"needs pyarrow; install it with pip install 'm3jax\[eval\]'"):
        load_rows(tmp_path / "a.parquet")
    with pytest.raises(M3Error, match=r"openai/gsm8k from the hub needs the datasets package"):
        load_rows(HubSet("openai/gsm8k", "main"))
    with pytest.raises(M3Error, match=r"owner/name from the hub"):
        load_rows("owner/name:validation")


def test_fields_found_and_wanted_are_said() -> None:
    fields = {"question": Field(("question", "problem")), "answer": Field(("answer",)), "id": Field(("id",), False)}
    assert read_fields([{"problem": "p", "answer": 1}], fields, "t") == [{"question": "p", "answer": 1}]
    with pytest.raises(
        M3Error, match=r"example 2 is not t data: it has the fields a, b, and t wants question or problem and answer"
    ):
        read_fields([{"problem": "p", "answer": 1}, {"a": 1, "b": 2}], fields, "t")


# --- Files that mean harm ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.jsonl", b'{"a": ' + b"[" * 10**5, r"line 1 is not JSON \(brackets inside brackets without end\)"),
        ("a.jsonl", b'{"a": "\\ud800"}', r"line 1 is not JSON \(it holds half a character"),
        ("a.jsonl", b'{"a": ' + b"9" * 5000 + b"}", "line 1 is not JSON"),
        ("a.json", b"[" * 10**5, "without end"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 99, mtime=0)[:-12], "it is damaged"),
        ("a.jsonl.gz", gzip.compress(b"{}", mtime=0)[:10] + b"\xff" * 40, "it is damaged"),
        ("a.csv", b"a\n" + b"x" * 200_000, "field larger than field limit"),
    ],
)
def test_files_that_mean_harm(tmp_path: Path, name: str, content: bytes, sentence: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(M3Error, match=sentence):
        load_rows(tmp_path / name)


def test_a_bomb_is_unpacked_up_to_the_largest_test_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "_LARGEST", 1000)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b"\n" * 10**6))
    with pytest.raises(M3Error, match=r"it holds more than 1\.0 kB, more than any test set; split it"):
        load_rows(tmp_path / "a.jsonl.gz")


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").symlink_to("/dev/zero")
    with pytest.raises(M3Error, match="is no regular file"):
        load_rows(tmp_path / "a.jsonl")
