"""The demo: its whole run on models that learned next to nothing, and the commands that it says to type next."""

import json
import re
import struct
from pathlib import Path
from typing import Any

import pytest

from m3jax import load_recipe
from m3jax.cli.commands import main
from m3jax.errors import M3Error
from m3jax.evaluation import get_task, load_rows
from m3jax.laboratory import Course, Curriculum, ExperimentSettings, Setting, Size, demo
from m3jax.laboratory.examining import Answered

TINY = Setting(
    Curriculum(Size(16, 1, 2, 300), 100, Course(3, 4, 1e-3, whole=True), Course(2, 4, 1e-2, pull=1.0)),
    ExperimentSettings(dev=4, test=6),
)
MERGES = ["merged, λ = ½", "first draw", "best draw"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo") / "a demo"


@pytest.fixture(scope="module")
def told(place: Path) -> tuple[dict[str, Any], list[str]]:
    lines: list[str] = []
    return demo.main(place, lines.append, 5, TINY), lines


@pytest.mark.slow
def test_the_account(place: Path, told) -> None:
    account, lines = told
    assert json.loads(json.dumps(account)) == account
    rows = account["rows"]
    assert [row["name"].split(", λ = 0.")[0] for row in rows] == [
        "base", "expert: arithmetic", "expert: programs", *MERGES
    ]  # fmt: skip
    assert [row["moved"] is None for row in rows] == [True, False, False, True, True, True]
    for row in rows:
        for score in row["scores"].values():
            assert score["of"] == 6
            assert score["interval"][0] <= score["share"] <= score["interval"][1]
    assert account["replay"]["same_digest"]
    assert account["replay"]["differences"] == []
    text = "\n".join(lines)
    assert all(row["name"] in text for row in rows)
    assert re.search(r"λ = ½ (does not have|on new questions)", text)
    assert "'" in lines[-1]  # a path with a space, quoted for the shell
    # The best of the draws by the dev examples, of which the first is what `m3jax merge` draws.
    means = [sum(draw["dev"].values()) for draw in account["draws"]]
    assert len(means) == demo.SAMPLES
    assert rows[5]["weight"] == account["draws"][means.index(max(means))]["weight"]
    assert rows[4]["weight"] == account["draws"][0]["weight"]
    # The picture, the recipes and the data are of use.
    picture = (place / demo.PICTURE).read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    assert min(struct.unpack(">II", picture[16:24])) > 500
    drawn = {
        name: load_recipe(place / "recipes" / f"{name}.yaml").mixup is not None for name in ("half", "draw", "ties")
    }
    assert drawn == {"half": False, "draw": True, "ties": True}
    for skill, task in (("arithmetic", "gsm8k"), ("programs", "humaneval")):
        for split, count in (("test", 6), ("dev", 4)):
            assert len(get_task(task).read(load_rows(place / "data" / f"{skill}-{split}.jsonl"))) == count


@pytest.mark.slow
def test_the_next_commands_work(told, capsys: pytest.CaptureFixture[str]) -> None:
    account, lines = told
    assert {words[0] for words in account["next"]} == {
        "merge", "verify", "inspect", "evaluate", "diff", "explore", "report", "replay"
    }  # fmt: skip
    for words in account["next"]:
        assert main(words) == 0, capsys.readouterr().err
    assert len([line for line in lines if line.startswith("  m3jax ")]) == len(account["next"])


def row(name: str, arithmetic: str, programs: str, text: str = "") -> demo.Marked:
    """A model's answers, of which each letter says whether one is right."""
    answers = {
        skill: [Answered(f"{text or name} {number}", letter == "+") for number, letter in enumerate(marks)]
        for skill, marks in (("arithmetic", arithmetic), ("programs", programs))
    }
    return demo.Marked(name, Path(name), answers)


def test_the_verdict_says_what_the_draws_found() -> None:
    experts = [row("base", "--" * 50, "--" * 50), row("a", "++" * 50, "--" * 50), row("b", "--" * 50, "++" * 50)]
    bad, good = row("half", "+-" * 50, "+-" * 50), row("best", "++" * 45 + "--" * 5, "++" * 50)
    for half, best, said in (
        (bad, good, "found what λ = ½ does not have: +45.0%"),
        (good, bad, "did worse than λ = ½ on new questions: -45.0%"),
        (good, good, "found nothing that λ = ½ does not have: +0.0% (-"),
    ):
        verdict = demo._verdict([*experts, half, half, best])
        assert said in "\n".join(demo._verdict_lines(verdict))
    verdict = demo._verdict([*experts, bad, bad, good])
    assert verdict["kept"] == {"arithmetic": pytest.approx(0.9), "programs": 1.0}
    assert all(told["gain"] == 1.0 and told["interval"][0] > 0.9 for told in verdict["learned"].values())


def test_the_question_shown_is_not_chosen_by_the_merge() -> None:
    from m3jax.laboratory import functions, word_problems
    from m3jax.laboratory.examining import make_exam

    test = {skill.name: make_exam(skill, "test", 3, 0) for skill in (word_problems(), functions())}
    rows = [row("base", "+--", "---"), row("a", "++-", "---"), row("b", "---", "+++"), row("half", "---", "---")]
    asked = demo._ask([*rows, rows[3], row("best", "---", "---")], test)
    assert asked is not None
    assert asked["question"] == test["arithmetic"].examples[1].instruction
    assert asked["answers"]["a"] == {"text": "a 1", "right": True}
    assert asked["answers"]["best"] == {"text": "best 1", "right": False}
    assert demo._ask([rows[0], rows[0], *rows[2:], rows[3], rows[3]], test) is None


def test_other_directories_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    with pytest.raises(M3Error, match="something else than a demo"):
        demo.main(tmp_path, print, 0, TINY)
    (tmp_path / "file").touch()
    with pytest.raises(M3Error, match="cannot be used"):
        demo.main(tmp_path / "file", print, 0, TINY)
    assert {path.name for path in tmp_path.iterdir()} == {"models", "file"}
