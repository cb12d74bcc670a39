"""What is said of the paper's claims where the truth is known."""

import random

import pytest
from scipy import stats
from support.ledgers import SETTINGS, make_ledger, without

from m3jax.laboratory.claims import (
    HELD,
    IN_PART,
    NOT_HELD,
    OPPOSITE,
    UNDECIDED,
    claims_of,
    compared,
    verdict_of,
    verdict_on,
)
from m3jax.laboratory.experiments import AVERAGE, DRAW, EQUAL, M3, TIES, TUNED
from m3jax.laboratory.outcomes import (
    SeedMean,
    cells_of,
    depths_of,
    estimate,
    models_of,
    outcomes,
    over_seeds,
    shapes_of,
)

GOOD = {EQUAL: 0.0, DRAW: 0.05, TUNED: 0.06, M3: 0.1}


def only(found):
    (one,) = found
    return one


def test_the_interval_is_students():
    chance = random.Random(3)
    values = [chance.gauss(0.5, 0.1) for _ in range(7)]
    found = estimate(values)
    low, high = stats.t.interval(0.95, 6, loc=stats.tmean(values), scale=stats.sem(values))
    assert (found.mean, found.low, found.high) == pytest.approx((stats.tmean(values), low, high), abs=1e-12)
    assert found.half == pytest.approx((high - low) / 2)
    assert found.seeds == 7


def test_one_value_has_no_interval_and_none_no_mean():
    assert estimate([0.3]) == SeedMean(0.3, None, None, 1)
    assert estimate([0.3]).half is None
    assert estimate([]) is None
    assert verdict_of(estimate([0.3])) == verdict_of(None) == UNDECIDED


def test_seeds_are_averaged_before_intervals():
    found = over_seeds([(0, 0.1), (0, 0.3), (1, 0.4), (1, None), (2, None)])
    assert found == estimate([0.2, 0.4])


@pytest.mark.parametrize(
    ("interval", "verdict"),
    [
        ((0.1, 0.5), HELD),
        ((-0.5, -0.1), OPPOSITE),
        ((-0.1, 0.5), UNDECIDED),
        ((0.0, 0.5), UNDECIDED),
        ((1e-16, 1e-16), UNDECIDED),  # sums in another order
    ],
)
def test_the_verdict_follows_from_the_interval(interval, verdict):
    assert verdict_of(SeedMean(sum(interval) / 2, *interval, 5)) == verdict


UP, DOWN, OPEN = ((low, low + 0.1) for low in (0.1, -0.2, -0.05))


@pytest.mark.parametrize(
    ("paper", "fair", "verdict"),
    [
        (UP, UP, HELD),
        (UP, OPEN, IN_PART),
        (UP, DOWN, NOT_HELD),
        (OPEN, UP, IN_PART),
        (OPEN, OPEN, UNDECIDED),
        (DOWN, OPEN, NOT_HELD),
    ],
)
def test_a_claim_needs_its_fair_comparison(paper, fair, verdict):
    said = [
        compared("a", "test", SeedMean(0, *paper, 5)),
        compared("b", "test", SeedMean(0, *fair, 5), fair=True),
    ]
    assert verdict_on(said) == verdict


def test_a_gain_is_found():
    keeps = {EQUAL: 0.6, TUNED: 0.7, M3: 0.8}
    claims = claims_of(make_ledger(GOOD, dare=0.02, resistance=keeps, alphas={1.0: 0.3}))
    assert [claim.verdict for claim in claims] == [HELD] * 4
    paper, fair, one = (comparison.difference for comparison in claims[0].comparisons)
    assert paper.mean == pytest.approx(0.1, abs=0.005)
    assert fair.mean == pytest.approx(0.04, abs=0.005)
    assert one.mean == pytest.approx(0.05, abs=0.005)
    assert {comparison.difference.seeds for claim in claims for comparison in claim.comparisons} == {SETTINGS.seeds}
    drops = [one.difference.mean for one in claims[1].comparisons if one.measure == "pdr"]
    assert drops == pytest.approx([0.2, 0.1], abs=0.01)
    gains = [comparison.difference.mean for comparison in claims[2].comparisons]
    assert gains == pytest.approx([0.1 - 0.08, 0.02, 0.04], abs=0.005)
    beside = [one.difference.mean for one in claims[2].beside]
    assert beside == pytest.approx([0.05 - 0.02, 0.1, 0.02, 0.08], abs=0.005)


def test_where_there_is_no_gain_none_is_found():
    same = dict.fromkeys(GOOD, 0.0)
    claims = claims_of(make_ledger(same, noise=0.0))
    assert [claim.verdict for claim in claims] == [UNDECIDED] * 4
    noisy = [claims_of(make_ledger(same, noise=0.05))[number] for number in range(4)]
    assert HELD not in [claim.verdict for claim in noisy]


def test_choosing_alone_is_not_mixing():
    """The draws gain as much as a grid does: better than equal weights, but not by being drawn."""
    claim = claims_of(make_ledger({**GOOD, TUNED: 0.1}, noise=0.001))[0]
    assert claim.verdict != HELD
    assert claim.comparisons[0].verdict == HELD
    assert claim.comparisons[1].verdict == UNDECIDED


def test_the_opposite_is_said():
    claims = claims_of(make_ledger({EQUAL: 0.1, TUNED: 0.05}, dare=-0.05, resistance={M3: 0.5}))
    assert [claim.verdict for claim in claims[:3]] == [NOT_HELD] * 3
    assert claims[0].comparisons[1].verdict == OPPOSITE


def test_less_than_the_grid_did_not_hold_though_more_than_equal_weights():
    claim = claims_of(make_ledger({**GOOD, TUNED: 0.2}))[0]
    assert claim.comparisons[0].verdict == HELD
    assert claim.verdict == NOT_HELD


def test_a_peak_in_the_middle_is_a_balance():
    lines = make_ledger({M3: 0.0}, alphas={0.2: -0.1, 1.0: 0.15, 5.0: -0.2}, noise=0.0)
    claim = claims_of(lines)[3]
    assert claim.verdict == HELD
    assert [one.name for one in claim.comparisons] == [
        "the α's in the middle (0.5, 1, 2), averaged, less the smallest (0.2)",
        "the α's in the middle (0.5, 1, 2), averaged, less the largest (5)",
    ]
    assert all(one.fair for one in claim.comparisons)
    assert [one.difference.mean for one in claim.comparisons] == pytest.approx([0.15, 0.25])
    draws, after_the_fact, spread = claim.beside
    assert draws.difference.mean == pytest.approx(0.0)
    assert "picked after the fact" in after_the_fact.name
    assert after_the_fact.difference.mean == pytest.approx(0.35)
    assert spread.verdict == HELD


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_what_rises_to_an_extreme_is_no_balance(sign, noise):
    lines = make_ledger(alphas={0.2: -0.1 * sign, 1.0: 0.1 * sign, 2.0: 0.2 * sign, 5.0: 0.3 * sign}, noise=noise)
    claim = claims_of(lines)[3]
    assert {one.verdict for one in claim.comparisons} == {HELD, OPPOSITE}
    assert claim.verdict == NOT_HELD


def test_what_rises_and_stays_is_not_decided():
    claim = claims_of(make_ledger(alphas={0.2: -0.1}, noise=0.0))[3]
    assert [one.verdict for one in claim.comparisons] == [HELD, UNDECIDED]
    assert claim.verdict == UNDECIDED


def test_alphas_decide_by_all_seeds():
    """Student's t over seeds: one seed in five that says otherwise leaves it open."""
    lines = make_ledger(alphas={0.2: -0.1, 5.0: -0.1}, noise=0.0)
    other = make_ledger(alphas={0.2: 0.2, 5.0: 0.2}, noise=0.0)
    mixed = [one if line["seed"] == 4 else line for line, one in zip(lines, other, strict=True)]
    claim = claims_of(mixed)[3]
    assert [one.difference.mean for one in claim.comparisons] == pytest.approx([0.04, 0.04])
    assert claim.verdict == UNDECIDED


@pytest.mark.parametrize("alphas", [(), (0.2,)])
def test_two_alphas_have_no_middle(alphas):
    claim = claims_of(make_ledger(GOOD, how=SETTINGS._replace(alphas=alphas)))[3]
    assert all(one.difference is None for one in claim.comparisons)
    assert claim.verdict == UNDECIDED


@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_choosing_is_not_credited_to_mixing(noise):
    """Grid and draws gain the same, DARE nothing: more than DARE, but not by being drawn."""
    claim = claims_of(make_ledger({**GOOD, TUNED: 0.1}, noise=noise))[2]
    assert claim.verdict not in (HELD, IN_PART)
    assert all(one.fair for one in claim.comparisons)
    unfair = {one.name: one.verdict for one in claim.beside}
    assert unfair["gain of M³ alone less gain of DARE alone, which compares a choice with none"] == HELD


def test_less_than_dare_did_not_hold():
    claim = claims_of(make_ledger({**GOOD, TUNED: 0.2}))[2]
    assert [one.verdict for one in claim.comparisons] == [OPPOSITE, UNDECIDED, OPPOSITE]
    assert claim.verdict == NOT_HELD


def test_shapes_and_depths():
    lines = make_ledger(GOOD, noise=0.0)
    shapes = shapes_of(lines)
    assert [shape.alpha for shape in shapes] == [0.2, 0.5, 1.0, 2.0, 5.0]
    assert [shape.draws for shape in shapes] == [8] * 5
    assert shapes[1].test.mean == pytest.approx(0.7)  # the merges of the tables
    assert shapes[2].law == pytest.approx(12**-0.5)  # the uniform distribution's
    spreads = [shape.spread.mean for shape in shapes]
    assert spreads == sorted(spreads, reverse=True)
    depths = depths_of(lines)
    assert [depth.draws for depth in depths] == [1, 2, 4, 8]
    means = [depth.dev.mean for depth in depths]
    assert means == sorted(means)
    assert means[0] < means[-1]


def test_cells_are_scores_over_the_group():
    lines = make_ledger(GOOD, noise=0.0, resistance={M3: 0.9})
    cells = cells_of(outcomes(lines))
    assert len(cells) == 4 * 3 * 2 * 4
    cell = only(c for c in cells if c[:4] == (("sentiment", "programs"), TIES, True, M3))
    assert cell.test.mean == pytest.approx(0.7)
    assert cell.shifted.mean == pytest.approx(0.6)
    assert cell.attacked.mean == pytest.approx(0.63)
    assert cell.pdr.mean == pytest.approx(0.1)
    whole = cells_of(outcomes(lines), whole=True)
    assert len(whole) == 4 * 4
    models = models_of(lines)
    assert len(models) == 4 * 3
    assert [one.pdr.mean for one in models] == pytest.approx([0.2] * 12)


def test_drop_rates_of_models_that_get_nothing_right_are_undefined():
    lines = make_ledger({EQUAL: -0.6}, noise=0.0)
    cells = [cell for cell in cells_of(outcomes(lines)) if cell.arm == EQUAL]
    assert all(cell.pdr is None and cell.attacked.mean == 0 for cell in cells)
    drops = [one for one in claims_of(lines)[1].comparisons if one.measure == "pdr"]
    assert [one.difference is None for one in drops] == [True, False]


def test_one_seed_decides_nothing():
    claims = claims_of(make_ledger(GOOD, how=SETTINGS._replace(seeds=1)))
    assert [claim.verdict for claim in claims] == [UNDECIDED] * 4
    assert claims[0].comparisons[0].difference.low is None


def test_what_is_missing_is_not_compared():
    lines = make_ledger(GOOD)
    without_fair = [
        {**line, "arms": {arm: one for arm, one in line["arms"].items() if arm != TUNED}} if "arms" in line else line
        for line in lines
    ]
    claim = claims_of(without_fair)[0]
    assert claim.comparisons[1].difference is None
    assert claim.verdict == IN_PART
    fewer = claims_of(without(lines, kind="merge", seed=4))[0].comparisons[0].difference
    assert fewer.seeds == 4
    without_dare = claims_of(without(lines, kind="merge", dare=True))[2]
    assert all(one.difference is None for one in without_dare.comparisons)
    assert without_dare.verdict == UNDECIDED
    without_alphas = claims_of(without(lines, kind="alpha"))[3]
    assert all(one.difference is None for one in without_alphas.comparisons)
    assert claims_of([])[0].verdict == UNDECIDED


def test_a_job_that_was_done_again_counts_once():
    lines = make_ledger(GOOD)
    merge = only(line for line in lines if line["job"] == f"merge, sentiment+arithmetic, {AVERAGE}, 0.5, seed 0")
    assert claims_of([merge, *lines]) == claims_of(lines)
