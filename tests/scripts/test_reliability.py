"""scripts/reliability adds up what pieces of long runs have counted, and keeps apart what cannot be added."""

import importlib.machinery
import importlib.util
import json
import re
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts" / "reliability"


def reliability():
    loader = importlib.machinery.SourceFileLoader("reliability", str(SCRIPT))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("reliability", loader))
    loader.exec_module(module)
    return module


def test_pieces_are_added_up(tmp_path, monkeypatch):
    script = reliability()
    monkeypatch.setattr(script, "PAGE", tmp_path / "page.md")
    fuzz = "| reader | executions | read | refused | faults |\n|---|---:|---:|---:|---|\n| a | 1,000 | 3 | 997 | {} |\n"
    soak = "| method | sparsifier | recipes | right |\n|---|---|---|---|\n| ties | none | 4 | 4 |\n| all | | 4 | 4 |\n"
    memory = "\n| merges in one process | resident MiB |\n|---|---|\n| 20 | 300 |\n"
    faults = (
        "| command | begins | at | calls | again |\n|---|---|---|---|---|\n| merge | new | x | 3 | 3 of 3 right |\n"
    )
    said = [("fuzz", fuzz.format("none")), ("fuzz", fuzz.format("KeyError at a.py:1 (2)")), ("soak", soak + memory)]
    said += [("soak", soak), ("faults", faults), ("faults", faults)]
    for number, (name, text) in enumerate(said):
        piece = {"script": name, "command": f"scripts/{name}", "minutes": 1.0, "code": int(number == 1), "said": text}
        (tmp_path / f"{number}.json").write_text(json.dumps(piece))
    assert script.write(script.kept(tmp_path)) == 1
    page = (tmp_path / "page.md").read_text()
    assert "| a | 2,000 | 6 | 1,994 | KeyError at a.py:1 (2) |" in page
    assert re.search(r"^Found, mended and tested since: .*\bbert \d", page, re.MULTILINE)
    assert "| ties | none | 8 | 8 |" in page
    assert "| all |  | 8 | 8 |" in page
    assert "| 20 | 300 |" in page
    assert "| merge | new | x | 6 | 6 of 6 right |" in page
    assert page.count("- `scripts/fuzz`, 1.0 minutes, exit code") == 2
    assert script.add(tmp_path / "empty") == 1
    assert (tmp_path / "page.md").read_text() == page
    assert script.add(tmp_path) == 1  # what is added goes, so that nothing is counted twice
    twice = (tmp_path / "page.md").read_text()
    assert "| a | 4,000 | 12 | 3,988 | KeyError at a.py:1 (4) |" in twice
    assert "| merge | new | x | 12 | 12 of 12 right |" in twice
    assert twice.count("- `scripts/fuzz`, 1.0 minutes, exit code") == 4
    assert not list(tmp_path.glob("*.json"))


def test_what_a_script_says_is_kept(tmp_path):
    script = reliability()
    assert script.run(tmp_path, "fuzz", ["--seconds", "0.05", "--only", "recipe"]) == 0
    (piece,) = (json.loads(file.read_text()) for file in tmp_path.glob("*.json"))
    assert piece["command"] == "scripts/fuzz --seconds 0.05 --only recipe"
    assert "| recipe |" in piece["said"]


def test_pieces_that_differ_by_their_seeds_are_a_line(tmp_path, monkeypatch):
    script = reliability()
    monkeypatch.setattr(script, "PAGE", tmp_path / "page.md")
    head = "| reader | executions | read | refused | faults |\n|---|---:|---:|---:|---|\n"
    table = head + "| a | 1,000 | 3 | 997 | none |\n"

    def ran(number, command, code=0):
        piece = {"script": "fuzz", "command": f"scripts/fuzz {command}", "minutes": 0.75, "code": code, "said": table}
        (tmp_path / f"{number}.json").write_text(json.dumps(piece))

    for number, seed in enumerate([12, 3, 10, 11, 7]):
        ran(number, f"--seed {seed} --only a", code=int(seed == 7))
    ran(5, "--seed 13 --only b")
    ran(6, "--only a")
    script.write(script.kept(tmp_path))
    page = (tmp_path / "page.md").read_text()
    assert [row for row in page.splitlines() if row.startswith("- ")] == [
        "- `scripts/fuzz --seed SEED --only a`, SEED 3, 10 to 12, 3.0 minutes, exit code 0",
        "- `scripts/fuzz --seed 7 --only a`, 0.8 minutes, exit code 1",
        "- `scripts/fuzz --seed 13 --only b`, 0.8 minutes, exit code 0",
        "- `scripts/fuzz --only a`, 0.8 minutes, exit code 0",
    ]
    for file in tmp_path.glob("*.json"):
        file.unlink()
    assert script.add(tmp_path) == 1  # read again, it is the same page
    assert (tmp_path / "page.md").read_text() == page
    ran(7, "--seed 4 --only a")
    script.add(tmp_path)
    again = (tmp_path / "page.md").read_text()
    assert "- `scripts/fuzz --seed SEED --only a`, SEED 3 to 4, 10 to 12, 3.8 minutes, exit code 0" in again
    assert "| a | 8,000 | 24 | 7,976 | none |" in again
