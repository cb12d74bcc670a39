"""The command: one sentence for what will not do, before anything is trained."""

import subprocess
import sys
from pathlib import Path

import pytest

from m3jax.cli import laboratory


@pytest.fixture
def phrases(tmp_path: Path) -> dict[str, str]:
    rows = [f"phrase number {i} of a film that goes on and {'on ' * (i % 2 * 9)}\t{i % 2}" for i in range(60)]
    (tmp_path / "few.tsv").write_text("\n".join(["sentence\tlabel", *rows, ""]))
    (tmp_path / "other.tsv").write_text("question\tanswer\na\tb\n")
    return {name: str(tmp_path / f"{name}.tsv") for name in ("few", "other", "nowhere")}


@pytest.mark.parametrize(
    ("train", "options", "sentence"),
    [
        ("nowhere", (), "phrases are given with --train and --held-out, or found in $M3JAX_DATA"),
        ("other", (), "sentence"),
        ("few", (), "but 96 are wanted: give a larger file"),
        ("few", ("--seeds", "0"), "seeds: is 0, but must be at least 1"),
    ],
)
def test_what_will_not_do(
    tmp_path: Path,
    phrases: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    train: str,
    options: tuple[str, ...],
    sentence: str,
) -> None:
    given = ["--train", phrases[train], "--held-out", phrases["few"], "--out", str(tmp_path / "lab"), *options]
    monkeypatch.setattr(sys, "argv", ["scripts/lab", *given])
    with pytest.raises(SystemExit) as ended:
        laboratory.run()
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("m3jax: ")
    assert sentence in line
    assert not (tmp_path / "lab").exists()


def test_it_is_a_module_to_run(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "m3jax.laboratory",
        "--train",
        "nowhere",
        "--held-out",
        "nowhere",
        "--out",
        str(tmp_path / "lab"),
    ]
    found = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert (found.returncode, found.stderr.count("\n")) == (2, 1)
    assert found.stderr.startswith("m3jax: there is no data file ")


def test_a_report_does_not_tell_where_files_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = []
    monkeypatch.setattr(laboratory, "conduct", lambda *given: told.append(given[4]) or tmp_path)
    monkeypatch.setattr(laboratory, "_sentiment", lambda *_: None)
    given = ["--train", "phrases/train.tsv", f"--held-out={tmp_path}/dev.tsv", "--out", str(tmp_path / "lab")]
    monkeypatch.setattr(sys, "argv", ["lab", *given])
    laboratory.main()
    assert told == ["scripts/lab --train phrases/train.tsv --held-out=dev.tsv --out lab"]
