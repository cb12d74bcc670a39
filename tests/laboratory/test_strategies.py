"""The comparison of strategies: every one at every budget, on with it after a kill, and what is said of it."""

import itertools
from pathlib import Path
from typing import Any

import pytest

from m3jax.errors import M3Error
from m3jax.exploration.optimizing import Optimization
from m3jax.exploration.strategies import STRATEGIES
from m3jax.laboratory import strategies
from m3jax.laboratory.conducting import Setting
from m3jax.laboratory.experiments import ExperimentSettings
from m3jax.laboratory.models import Curriculum
from m3jax.laboratory.skills import programs, word_problems
from m3jax.laboratory.strategies import GRADIENT, Arena, Contest, arenas_of, compare
from m3jax.laboratory.strategy_report import differences, means, worse, write_report
from m3jax.laboratory.training import Course, Size

SKILLS = [word_problems()._replace(max_tokens=4), programs()._replace(max_tokens=4)]
TINY = Setting(
    Curriculum(Size(16, 1, 2, 300), 100, Course(2, 4, 1e-3, whole=True), Course(2, 4, 1e-2)), ExperimentSettings()
)
HOW = Contest(seeds=1, budgets=(3,), dev=4, test=4, learning=Optimization(batch_size=4))


def made_up(lead: float, seeds: int = 3) -> list[dict[str, Any]]:
    """Runs in which auto leads by so much, give or take a little."""
    return [
        {
            "arena": arena,
            "seed": seed,
            "strategy": name,
            "budget": budget,
            "test": 0.5 + 0.1 * seed + (lead + 0.001 * seed if name == "auto" else 0.0),
            "dev": 0.5,
        }
        for arena, seed, name, budget in itertools.product(
            ("a + b, model", "a + b, layer"), range(seeds), ("auto", "draw", GRADIENT), (8, 16)
        )
    ]


def test_pairs_are_of_one_arena_and_seed(tmp_path: Path) -> None:
    """Seeds differ far more than strategies, which only pairs can tell apart."""
    better, poorer = made_up(0.01), made_up(-0.01)
    gap, mean = differences(better, "draw", 8), means(better, "auto", 8, "test")
    assert gap is not None
    assert mean is not None
    assert (gap.mean, gap.seeds) == (pytest.approx(0.011), 3)
    assert 0 < gap.low < gap.mean < gap.high < 0.02  # type: ignore[operator]
    assert mean.half is not None
    assert mean.half > 0.1
    assert worse(better) == []
    assert worse(poorer) == [("draw", 8), ("draw", 16), (GRADIENT, 8), (GRADIENT, 16)]
    how = HOW._replace(seeds=3, budgets=(8, 16))
    unfinished = [{**poorer[0], "arena": "a + c, model"}]
    write_report([*poorer, *unfinished], tmp_path, how, 0.47)
    with pytest.raises(M3Error, match="no arena is finished yet"):
        write_report(unfinished, tmp_path, how, 0.47)
    page = (tmp_path / "strategies.md").read_text()
    assert "**auto is worse, beyond its interval, than draw at 8, draw at 16, gradient at 8, gradient at 16.**" in page
    assert "| draw | -0.9 ± 0.2 | -0.9 ± 0.2 |" in page
    assert (tmp_path / "strategies" / "strategies.png").stat().st_size > 1000
    assert len((tmp_path / "strategies" / "runs.jsonl").read_text().splitlines()) == len(poorer)


@pytest.mark.slow
def test_every_strategy_chooses_at_every_budget_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("evosax")
    pair = ("arithmetic", "programs")
    assert arenas_of(pair) == [Arena(pair), Arena(pair, "layer")]
    assert arenas_of(("x", *pair)) == [Arena(pair), Arena(("x", *pair)), Arena(pair, "layer")]
    monkeypatch.setattr(strategies, "arenas_of", lambda names: [Arena(tuple(names), "layer")])
    runs = compare(tmp_path / "lab", SKILLS, TINY, HOW, lambda _: None)
    assert [(run["strategy"], run["budget"]) for run in runs] == list(
        itertools.product([*STRATEGIES, GRADIENT], HOW.budgets)
    )
    for run in runs:
        assert len(run["weights"]) == 2  # the block, and what lies outside of blocks
        assert 0 <= run["dev"] <= 1
    ledger = tmp_path / "lab" / "runs" / "ledger.jsonl"
    lines = ledger.read_text().splitlines(keepends=True)
    ledger.write_text("".join(lines[:-3]))
    monkeypatch.setattr(strategies._Bench, "_answers", None)  # all that is asked for is known
    assert compare(tmp_path / "lab", SKILLS, TINY, HOW, lambda _: None) == runs
    with pytest.raises(M3Error, match="holds another comparison, which differs in"):
        compare(tmp_path / "lab", SKILLS, TINY, HOW._replace(dev=5), lambda _: None)
