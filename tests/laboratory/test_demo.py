"""The demo: its whole run on models that learned next to nothing."""

import json
import re
import struct
from pathlib import Path

import pytest

from m3jax import load_recipe
from m3jax.errors import M3Error
from m3jax.evaluation import get_task, load_rows
from m3jax.laboratory import Course, Curriculum, ExperimentSettings, Setting, Size, demo

TINY = Setting(
    Curriculum(Size(16, 1, 2, 300), 100, Course(3, 4, 1e-3, whole=True), Course(2, 4, 1e-2)),
    ExperimentSettings(dev=4, test=6, points=3),
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo") / "a demo"


@pytest.fixture(scope="module")
def told(place: Path) -> tuple[dict[str, object], list[str]]:
    lines: list[str] = []
    return demo.main(place, lines.append, TINY), lines


@pytest.mark.slow
def test_the_account(place: Path, told) -> None:
    account, lines = told
    assert json.loads(json.dumps(account)) == account
    assert set(account["models"]["scores"]) == {"base", "arithmetic", "programs"}
    assert [merge["name"] for merge in account["merges"]] == ["average", "task-arithmetic-dare", "ties"]
    assert len({merge["digest"] for merge in account["merges"]}) == 3
    assert len({merge["ratio"] for merge in account["merges"]}) == 1  # one seed, one draw
    assert all(set(merge["scores"]) == {"arithmetic", "programs"} for merge in account["merges"])
    assert account["replay"]["same_digest"]
    assert account["replay"]["differences"] == []
    text = "\n".join(lines)
    assert all(merge["digest"][:12] in text for merge in [*account["merges"], account["exploration"]])
    assert "the same" in text
    assert re.search(
        r"Mean of both skills: base \d+\.\d%, better expert \(\w+\) .* than any model that went into it", text
    )
    assert "'" in lines[-1]  # a path with a space, quoted for the shell


@pytest.mark.slow
def test_the_exploration_takes_the_best_draw(told) -> None:
    exploration = told[0]["exploration"]
    means = [sum(trial["dev"].values()) for trial in exploration["trials"]]
    assert len(means) == demo.SAMPLES
    assert exploration["ratio"] == exploration["trials"][means.index(max(means))]["weights"][0]


@pytest.mark.slow
def test_the_picture(place: Path, told) -> None:
    picture = (place / "lambda.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    assert min(struct.unpack(">II", picture[16:24])) > 500


@pytest.mark.slow
def test_recipes_and_data_are_of_use(place: Path, told) -> None:
    for name in ("average", "task-arithmetic-dare", "ties"):
        assert load_recipe(place / "recipes" / f"{name}.yaml").mixup is not None
    for skill, task in (("arithmetic", "gsm8k"), ("programs", "mbpp")):
        assert len(get_task(task).read(load_rows(place / "data" / f"{skill}-test.jsonl"))) == 6
        assert len(get_task(task).read(load_rows(place / "data" / f"{skill}-dev.jsonl"))) == 4


@pytest.mark.slow
def test_models_are_used_again(place: Path, told) -> None:
    lines: list[str] = []
    again = demo.main(place, lines.append, TINY)
    assert not any("training" in line for line in lines)
    assert [m["digest"] for m in again["merges"]] == [m["digest"] for m in told[0]["merges"]]
    assert again["exploration"]["digest"] == told[0]["exploration"]["digest"]
    with pytest.raises(M3Error, match="made otherwise"):
        demo.main(place, lines.append, TINY._replace(curriculum=TINY.curriculum._replace(seed=1)))


def test_other_directories_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    with pytest.raises(M3Error, match="something else than a demo"):
        demo.main(tmp_path, print, TINY)
    (tmp_path / "file").touch()
    with pytest.raises(M3Error, match="cannot be used"):
        demo.main(tmp_path / "file", print, TINY)
    assert {path.name for path in tmp_path.iterdir()} == {"models", "file"}
