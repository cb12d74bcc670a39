"""The laboratory's report, from ledgers whole and not."""

import json
import struct

import pytest
from laboratory.ledgers import SETTINGS, SKILLS, make_ledger, without

from m3jax.errors import M3Error
from m3jax.laboratory.experiments import AVERAGE, DRAW, EQUAL, M3, TUNED
from m3jax.laboratory.findings import find
from m3jax.laboratory.reporting import FILES, report_lines, table, write_report

ARMS = {EQUAL: 0.0, DRAW: 0.05, TUNED: 0.06, M3: 0.1}
ABOUT = {
    "command": "scripts/laboratory --out here",
    "settings": SETTINGS._asdict(),
    "models": {"parameters": 912_345, "training": {"base": {"steps": 1600, "seconds": 61.2, "whole": True}}},
    "machine": "1 device (x86_64)",
    "seconds": 200.0,
}


@pytest.fixture(scope="module")
def ledger():
    return make_ledger(ARMS, noise=0.0)


def text_of(lines, about=None):
    return "\n".join(report_lines(find(lines, about or {})))


def size_of(picture):
    content = picture.read_bytes()
    assert content[:4] == b"\x89PNG"
    return struct.unpack(">II", content[16:24])


def test_the_files(tmp_path, ledger):
    write_report(ledger, tmp_path / "new" / "report", ABOUT)
    place = tmp_path / "new" / "report"
    assert sorted(path.name for path in place.iterdir()) == sorted(FILES)
    assert all(min(size_of(place / name)) > 400 for name in FILES if name.endswith("png"))
    told = json.loads((place / "report.json").read_text())
    assert told["seeds"] == [0, 1, 2, 3, 4]
    assert told["missing"] == []
    assert told["about"]["settings"]["alphas"] == list(SETTINGS.alphas)
    first = told["claims"][0]
    assert first["verdict"] == "held"
    assert first["comparisons"][0]["difference"]["mean"] == pytest.approx(0.1)
    assert told["cells"][0]["test"]["seeds"] == 5
    text = (place / "report.md").read_text()
    assert all(f"]({name})" in text for name in FILES if name.endswith("png"))


def test_the_words_follow_the_numbers(ledger):
    text = text_of(ledger, ABOUT)
    assert "| 1. M³ improves the merged model across tasks | held |" in text
    assert "| sentiment + programs | TIES | yes | 60.0 ± 0.0 | 66.0 ± 0.0 | 65.0 ± 0.0 | 70.0 ± 0.0 |" in text
    assert "less best of a grid (at equal budget): +4.0 points of test accuracy (95 % interval +4.0 to +4.0," in text
    assert "| base | sentiment | 30.0 ± 0.0 | 20.0 ± 0.0 | 24.0 ± 0.0 | typos |" in text
    assert "- command: `scripts/laboratory --out here`" in text
    assert "    - base: steps 1,600, seconds 61.2, whole yes" in text
    assert "- time: 3 min 20 s" in text
    assert "models of 912,345 parameters" in text
    assert "A merge in memory takes 2.0 ms, 0.40% of one examination" in text
    assert "6 points against 8 draws for 3 experts" in text
    assert "Here 120 of 120 such pairs of test scores are the same" in text
    assert "Here 0 of 120 such pairs" in text_of(make_ledger())
    assert "missing" not in text
    worse = text_of(make_ledger({**ARMS, M3: -0.1}, noise=0.0), ABOUT)
    assert "| 1. M³ improves the merged model across tasks | did not hold |" in worse
    assert "−10.0 points of test accuracy (95 % interval −10.0 to −10.0, 5 seeds): did not hold" in worse


def test_a_claim_held_in_part_says_which():
    text = text_of(make_ledger(ARMS, noise=0.0))
    told = (
        "held in part: gain of M³ alone less gain of DARE alone; M³ with DARE less DARE alone. Not: M³ with DARE less"
    )
    assert told in text


def test_one_seed_has_no_interval():
    text = text_of(make_ledger(ARMS, how=SETTINGS._replace(seeds=1)))
    assert "±" not in text.split("## Test accuracy")[1].split("## What follows")[0]
    assert "(one seed, so no interval): undecided" in text
    assert "All intervals are over 1 seed," in text


def test_what_is_missing_is_said(ledger):
    text = text_of(without(ledger, kind="merge", seed=4, method=AVERAGE), ABOUT)
    assert "Not there: 8 pieces." in text
    assert f"- merge, sentiment+arithmetic, {AVERAGE}, 0.5, seed 4" in text
    assert f"| sentiment + programs | {AVERAGE} | no | 60.0 ± 0.0 (4 seeds)" in text
    half = [line for line in ledger if line["seed"] < 2]
    assert find(half, {}).missing == ()
    assert len(find(half, ABOUT).missing) == 3 * 37
    assert "- and 99 more" in text_of(half, ABOUT)
    later = make_ledger(how=SETTINGS._replace(first=7, seeds=2))
    assert find(later, {}).missing == find(later, {"settings": {"first": 7, "seeds": 2}}).missing == ()


def test_a_missing_arm_is_said(ledger):
    cut = [
        {**line, "arms": {arm: one for arm, one in line["arms"].items() if arm != TUNED}}
        if line["kind"] == "merge" and line["seed"] == 0
        else line
        for line in ledger
    ]
    found = find(cut, ABOUT)
    assert len(found.missing) == 24
    assert found.missing[0] == f"merge, sentiment+arithmetic, {AVERAGE}, 0.5, seed 0: arm tuned"


@pytest.mark.parametrize("kind", ["models", "merge", "alpha", "curve"])
def test_a_kind_alone_and_all_but_it(tmp_path, ledger, kind):
    """Whatever is missing, the report says what there is; pictures of an earlier one do not stay."""
    for name in FILES:
        (tmp_path / name).touch()
    for lines in ([line for line in ledger if line["kind"] == kind], without(ledger, kind=kind)):
        write_report(lines, tmp_path, {})
        text = (tmp_path / "report.md").read_text()
        for name in FILES[2:]:
            assert (tmp_path / name).exists() == (f"]({name})" in text)
        json.loads((tmp_path / "report.json").read_text())


@pytest.mark.parametrize("trials", [{}, {M3: []}])
def test_lines_without_trials_or_arms(tmp_path, ledger, trials):
    bare = [{**line, "trials": trials, "arms": {}, "curve": []} for line in ledger if line["kind"] != "models"]
    write_report(bare, tmp_path, {})
    assert "Nothing to draw: dev accuracy over λ." in (tmp_path / "report.md").read_text()


def test_two_skills(tmp_path):
    write_report(make_ledger(ARMS, names=SKILLS[:2], how=SETTINGS._replace(seeds=2, samples=4)), tmp_path, {})
    assert "points against" not in (tmp_path / "report.md").read_text()


def test_an_empty_ledger_is_refused(tmp_path):
    with pytest.raises(M3Error, match="holds no experiment"):
        write_report([], tmp_path / "report", ABOUT)
    assert not (tmp_path / "report").exists()


def test_a_report_that_is_there_may_be_kept(tmp_path, ledger):
    few = [line for line in ledger if line["kind"] == "models"]
    write_report(few, tmp_path, {})
    with pytest.raises(M3Error, match="already there"):
        write_report(few, tmp_path, {}, overwrite=False)


def test_cells_cannot_break_a_table():
    assert list(table(["a"], [["b|c\nd"]])) == ["| a |", "|---|", "| b/c d |"]
