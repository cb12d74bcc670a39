"""Experiments: which there are, what each is, and that they go on after a kill and give the same again."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from support.matrix import few

from m3jax.errors import M3Error
from m3jax.laboratory import conducting
from m3jax.laboratory.conducting import LEDGER, Setting, conduct, open_laboratory
from m3jax.laboratory.experiments import (
    AVERAGE,
    EQUAL,
    M3,
    TASK_ARITHMETIC,
    TIES,
    TUNED,
    Experiment,
    ExperimentSettings,
    Laboratory,
    Papers,
    best,
    do,
    equal_weights,
    fixed_ratios,
    jobs_of,
    make_papers,
    recipe_of,
)
from m3jax.laboratory.models import BASE, Curriculum
from m3jax.laboratory.skills import programs, word_problems
from m3jax.laboratory.training import Course, Size
from m3jax.recipe import load_recipe

SKILLS = [word_problems()._replace(max_tokens=4), programs()._replace(max_tokens=4)]
PAIR = ("arithmetic", "programs")
TINY = Setting(
    Curriculum(Size(16, 1, 2, 300), 100, Course(2, 4, 1e-3, whole=True), Course(2, 4, 1e-2)),
    ExperimentSettings(seeds=1, samples=4, alphas=(2.0,), dev=4, test=6, attacked=2, points=3),
)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Laboratory:
    return open_laboratory(tmp_path_factory.mktemp("lab"), SKILLS, TINY, lambda _: None)


@pytest.fixture(scope="module")
def papers() -> Papers:
    return make_papers(SKILLS, TINY.experiments, 0)


def timeless(line: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if key != "seconds"}


def test_every_method_meets_every_group() -> None:
    jobs = jobs_of(["a", "b", "c"], ExperimentSettings(seeds=2, first=7))
    assert len({job.name for job in jobs}) == len(jobs)
    merges = [job for job in jobs if job.kind == "merge"]
    assert len(merges) == 2 * 4 * 3 * 2  # seeds, groups, methods, with and without DARE
    assert {job.seed for job in merges} == {7, 8}
    assert sum(job.kind == "curve" for job in jobs) == 3
    assert sum(job.kind == "alpha" for job in jobs) == 2 * 3 * len(ExperimentSettings().alphas)
    assert sum(job.kind == "models" for job in jobs) == 2
    assert {job.group for job in jobs_of(["a", "b"], ExperimentSettings()) if job.kind == "merge"} == {("a", "b")}


@pytest.mark.parametrize("dare", [False, True])
@pytest.mark.parametrize("method", [AVERAGE, TASK_ARITHMETIC, TIES])
def test_recipes_are_those_of_the_paper(method: str, dare: bool) -> None:
    places = {name: Path("/m") / name for name in (BASE, *PAIR)}
    recipe = load_recipe(recipe_of(Experiment("merge", 3, PAIR, method, dare, 0.5), places)).resolved()
    assert recipe["seed"] == 3
    assert recipe["mixup"] == {"alpha": 0.5, "granularity": "model"}
    assert (recipe["sparsify"] is not None) == dare
    assert (recipe["base_model"] is not None) == (dare or method != AVERAGE)


def test_weights_nobody_chose() -> None:
    assert equal_weights(Experiment("merge", 0, ("a", "b", "c"), AVERAGE)) == pytest.approx((1 / 3, 1 / 3, 1 / 3))
    assert equal_weights(Experiment("merge", 0, ("a", "b"), TASK_ARITHMETIC)) == (1.0, 1.0)
    assert equal_weights(Experiment("merge", 0, ("a", "b"), TIES)) == (0.5, 0.5)


def test_of_the_best_that_nearest_to_equal_weights_is_chosen() -> None:
    tried = [(0.5, 0, 1), (0.1, 1, 1), (0.6, 1, 1), (0.9, 1, 1)]
    trials = [{"weights": [w, 1 - w], "dev": {"a": a, "b": b}} for w, a, b in tried]
    assert best(trials) == (0.6, 0.4)
    assert best(trials[::-1]) == (0.6, 0.4)


@pytest.mark.parametrize("num_experts", [2, 3, 4])
@pytest.mark.parametrize("samples", [1, 3, 10, 40])
def test_the_grid_has_the_middle_and_no_expert_alone(num_experts: int, samples: int) -> None:
    ratios = fixed_ratios(num_experts, samples)
    assert len(set(ratios)) == len(ratios) <= samples
    assert all(min(weights) > 0 and sum(weights) == pytest.approx(1) for weights in ratios)
    assert (1 / num_experts,) * num_experts in ratios


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [({"seeds": 0}, "seeds: is 0"), ({"points": 1}, "at least 2"), ({"first": -1}, "seed: is -1")],
)
def test_settings_that_cannot_be_followed(tmp_path: Path, wrong: dict[str, int], sentence: str) -> None:
    setting = TINY._replace(experiments=TINY.experiments._replace(**wrong))
    with pytest.raises(M3Error, match=sentence):
        conduct(tmp_path / "lab", SKILLS, setting, lambda _: None, "")
    assert not (tmp_path / "lab").exists()  # before anything is trained


def test_the_output_may_not_be_a_file(tmp_path: Path) -> None:
    (tmp_path / "lab").touch()
    with pytest.raises(M3Error, match=r"lab: "):
        conduct(tmp_path / "lab", SKILLS, TINY, lambda _: None, "")
    with pytest.raises(M3Error, match="holds something else than a laboratory"):
        conduct(tmp_path, SKILLS, TINY, lambda _: None, "")
    for name in ("models", "report"):  # somebody else's, though a laboratory has such too
        (tmp_path / "other" / name).mkdir(parents=True)
    with pytest.raises(M3Error, match=r"report: is of no laboratory"):
        conduct(tmp_path / "other", SKILLS, TINY, lambda _: None, "")


@pytest.mark.parametrize(
    ("method", "dare"), few([(m, d) for m in (AVERAGE, TASK_ARITHMETIC, TIES) for d in (False, True)], (TIES, True))
)
def test_a_merge_has_all_arms_and_is_the_same_again(lab: Laboratory, papers: Papers, method: str, dare: bool) -> None:
    job = Experiment("merge", 0, PAIR, method, dare, 0.5)
    line = do(lab, job, papers)
    assert json.loads(json.dumps(line)) == line
    assert set(line["arms"]) == {EQUAL, TUNED, "draw", M3}
    assert [trial["weights"] for trial in line["trials"][TUNED]] == [[0.25, 0.75], [0.5, 0.5], [0.75, 0.25]]
    assert len(line["trials"][M3]) == 3  # as many
    assert line["arms"]["draw"]["weights"] == line["trials"][M3][0]["weights"]
    for name, arm in line["arms"].items():
        assert set(arm["test"]) == set(arm["shifted"]) == set(PAIR)
        assert name == "draw" or set(arm["resistance"]) == set(PAIR)
    assert timeless(do(lab, job, papers)) == timeless(line)


@pytest.mark.slow
def test_the_ends_of_the_curve_are_the_experts(lab: Laboratory, papers: Papers) -> None:
    curve = do(lab, Experiment("curve", 0, PAIR), papers)["curve"]
    assert [point["weights"] for point in curve] == [[0.0, 1.0], [0.5, 0.5], [1.0, 0.0]]
    models = do(lab, Experiment("models", 0, PAIR), papers._replace(test=papers.dev))["models"]
    assert set(models) == {BASE, *PAIR}
    assert curve[-1]["dev"] == models["arithmetic"]["test"]
    assert curve[0]["dev"] == models["programs"]["test"]


class KilledError(Exception):
    """Stands for the end of the process."""


@pytest.mark.slow
def test_a_laboratory_goes_on_where_it_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def counting(lab: Laboratory, job: Experiment, *given: Any) -> dict[str, Any]:
        if len(done) == 3:
            raise KilledError
        done.append(job.name)
        return do(lab, job, *given)

    monkeypatch.setattr(conducting, "do", counting)
    with pytest.raises(KilledError):
        conduct(tmp_path / "lab", SKILLS, TINY, lambda _: None, "scripts/lab")
    with open(tmp_path / "lab" / LEDGER, "ab") as ledger:
        ledger.write(b'{"job": "half a li')
    before = (tmp_path / "lab" / LEDGER).read_bytes().splitlines()[:4]
    first, done[:] = list(done), [""] * 4  # past the kill
    report = conduct(tmp_path / "lab", SKILLS, TINY, lambda _: None, "scripts/lab")
    assert not set(first) & set(done)
    lines = (tmp_path / "lab" / LEDGER).read_bytes().splitlines()
    assert lines[:4] == before
    assert len(lines) == 1 + len(jobs_of([skill.name for skill in SKILLS], TINY.experiments))
    for name in re.findall(r"\]\((\S+\.png)\)", (report / "report.md").read_text()):
        assert (report / name).read_bytes().startswith(b"\x89PNG")
    assert "scripts/lab" in (report / "report.md").read_text()
    with pytest.raises(M3Error, match="holds another experiment, which differs in settings"):
        conduct(
            tmp_path / "lab", SKILLS, TINY._replace(experiments=ExperimentSettings()), lambda _: None, "scripts/lab"
        )
