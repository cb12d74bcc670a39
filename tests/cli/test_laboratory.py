"""The command: one sentence for what will not do, before anything is trained."""

import subprocess
import sys
from pathlib import Path

import pytest


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "m3jax.laboratory", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


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
def test_what_will_not_do(tmp_path: Path, phrases: dict[str, str], train: str, options: tuple[str, ...], sentence: str):
    found = run("--train", phrases[train], "--held-out", phrases["few"], "--out", str(tmp_path / "lab"), *options)
    assert found.returncode == 2, found.stderr
    (line,) = found.stderr.splitlines()
    assert line.startswith("m3jax: ")
    assert sentence in line
    assert not (tmp_path / "lab").exists()
