"""What better choices can gain: of ledgers whose truth is known."""

import pytest

from m3jax.laboratory.experiments import DRAW, EQUAL, M3, TUNED
from m3jax.laboratory.gains import DRAWS, curves_of, expectations_of, expected_best, paired_of, searches_of
from m3jax.laboratory.searches import GRID


def line(kind: str, seed: int, **rest: object) -> dict[str, object]:
    told = {"kind": kind, "seed": seed, "group": ["a", "b"], "method": "average", "dare": False, "alpha": 0.5}
    return {"job": f"{kind} {seed}", **told, **rest}


def test_small_alphas_pay_where_the_ends_are_high() -> None:
    valley, hill = [1.0, 0.0, 1.0], [0.0, 1.0, 0.0]
    for scores, better, worse in ((valley, 0.2, 5.0), (hill, 5.0, 0.2)):
        assert expected_best([0, 0.5, 1], scores, better, 2) > expected_best([0, 0.5, 1], scores, worse, 2) + 0.1
    curve = [
        {"weights": [at, 1 - at], "dev": {"a": at, "b": high}} for at, high in ((1.0, 0.0), (0.0, 0.5), (0.5, 1.0))
    ]
    lines = [line("curve", 0, curve=curve)]
    (found,) = curves_of(lines)
    assert (found.middle, found.best, found.at, found.ends) == (0.75, 0.75, 0.5, (0.25, 0.5))
    for one in expectations_of(lines):
        assert list(one.best) == sorted(one.best)
        assert len(one.best) == len(DRAWS)


def test_a_search_is_paired_with_the_grid_by_seed() -> None:
    def found(test: float, steps: int = 0) -> dict[str, object]:
        return {"evaluations": 4, "steps": steps, "seconds": 2.0 * steps, "dev": {"a": 0.5}, "test": {"a": test}}

    levels = (0.2, 0.5, 0.9)
    lines = [
        line("search", seed, searches={GRID: found(level), "layers": found(level + 0.05, 3)})
        for seed, level in enumerate(levels)
    ]
    grid, layers = searches_of(lines)
    assert grid.difference is None
    assert layers.difference is not None
    assert layers.difference.mean == pytest.approx(0.05)
    assert layers.verdict == "held"  # though levels differ by much more between seeds
    assert (layers.steps, layers.seconds) == (3, 6.0)


def test_examples_that_both_do_right_decide_nothing() -> None:
    marks = {EQUAL: "1100", TUNED: "1101", DRAW: "1100", M3: "1101"}
    arms = {arm: {"marks": {"a": said * 25}} for arm, said in marks.items()}
    found = {(one.more, one.less, one.method): one for one in paired_of([line("merge", 0, arms=arms)])}
    same, more = found[M3, TUNED, "average"], found[M3, EQUAL, "average"]
    assert (same.examples, same.disagreeing, same.difference, same.half) == (100, 0, 0, 0)
    assert same.needed == 193  # 1.96² · 0.02 / 0.02²: who differs by 2 points disagrees at least so often
    assert (more.disagreeing, more.difference) == (0.25, 0.25)
    assert more.half == pytest.approx(1.96 * (0.25 * 0.75 / 100) ** 0.5, rel=1e-3)
    assert more.needed == pytest.approx(1801, abs=1)  # 1.96² · 0.1875 / 0.02²
    assert more.unpaired > more.needed
    assert (M3, TUNED, "TIES") not in found
