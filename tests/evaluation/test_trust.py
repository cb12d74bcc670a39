"""Evaluation of models from strangers: their code stays where it is, and their files are their own."""

import json
import os
import shutil
from pathlib import Path

import pytest
from support.tiny_models import build_models

from m3jax.cli import commands
from m3jax.errors import M3Error
from m3jax.evaluation import models
from m3jax.evaluation.attacks.masked_lm import load_masked_words

ROWS = [{"sentence": "a fine film", "label": 1}, {"sentence": "a dull one", "label": 0}]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "models"
    build_models(directory)
    return directory


@pytest.fixture
def place(built: Path, tmp_path: Path) -> Path:
    """Models of which expert-a's config and tokenizer name code that writes a file when it is imported."""
    shutil.copytree(built, tmp_path / "models")
    model = tmp_path / "models" / "expert-a"
    code = {"AutoConfig": "mine.Config", "AutoTokenizer": ["mine.Tokenizer", "mine.Tokenizer"]}
    for name in ("config.json", "tokenizer_config.json"):
        told = json.loads((model / name).read_text())
        (model / name).write_text(json.dumps({**told, "auto_map": code}))
    (model / "mine.py").write_text(f"open({str(tmp_path / 'harm')!r}, 'w').close()\nConfig = Tokenizer = None\n")
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    return tmp_path


def commands_on(place: Path) -> dict[str, list[str]]:
    model, rows = str(place / "models" / "expert-a"), str(place / "rows.jsonl")
    recipe = place / "recipe.yaml"
    entries = [str(place / "models" / name) for name in ("expert-a", "expert-b")]
    recipe.write_text(json.dumps({"merge_method": "linear", "models": entries, "mixup": {"alpha": 1}}))
    how = ["--task", "sst2", "--data", rows]
    return {
        "evaluate": ["evaluate", model, *how, "--max-tokens", "2"],
        "attack": ["attack", model, *how, "--attack", "deepwordbug", "--limit", "1", "--max-tokens", "2"],
        "explore": [
            "explore",
            str(recipe),
            str(place / "out"),
            "--samples",
            "1",
            "--task",
            f"sst2={rows}",
            "--max-tokens",
            "2",
        ],
        "merge": ["merge", str(recipe), str(place / "merged"), "--quiet"],
        "convert": ["convert", model, str(place / "converted")],
    }


@pytest.mark.parametrize("command", ["evaluate", "attack", "explore", "merge", "convert"])
def test_no_command_runs_code_or_asks(
    place: Path, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[object] = []
    monkeypatch.setattr("builtins.input", lambda *said: asked.append(said) or "y")
    commands.main(commands_on(place)[command])
    told = capsys.readouterr().err
    assert not asked
    assert not (place / "harm").exists()
    if command != "merge":  # which is quiet here
        assert "brings Python code (mine.py, auto_map in config.json, auto_map in tokenizer_config.json)" in told


def spoil(file: Path, kind: str) -> None:
    file.unlink(missing_ok=True)
    match kind:
        case "environment":
            file.symlink_to("/proc/self/environ")
        case "pipe":
            os.mkfifo(file)
        case "huge":
            with open(file, "wb") as opened:
                opened.truncate(2**40)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json", "tokenizer.model"])
@pytest.mark.parametrize("kind", ["environment", "pipe", "huge"])
def test_files_that_are_not_the_models_own_are_refused(place: Path, kind: str, name: str) -> None:
    model = place / "models" / "base"
    spoil(model / name, kind)
    for attempt in (models.open_model, load_masked_words):
        with pytest.raises(M3Error, match=rf"base/{name} (leads out of|is not a regular file|has 1,099,511,627,776)"):
            attempt(str(model))
