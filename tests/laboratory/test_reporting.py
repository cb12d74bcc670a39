"""The laboratory's report, from ledgers whole and not."""

import json
import struct

import pytest
from support.ledgers import SETTINGS, SKILLS, make_ledger, without
from support.matrix import few

from m3jax.errors import M3Error
from m3jax.laboratory.experiments import AVERAGE, DRAW, EQUAL, M3, TUNED
from m3jax.laboratory.figures import finish_figure, make_figure, save_alphas, save_bars, save_curves
from m3jax.laboratory.findings import find
from m3jax.laboratory.reporting import FILES, report_lines, table, write_report

ARMS = {EQUAL: 0.0, DRAW: 0.05, TUNED: 0.06, M3: 0.1}
ABOUT = {
    "command": "scripts/laboratory --out here",
    "settings": SETTINGS._asdict(),
    "models": {"parameters": 912_345, "training": {"base": {"steps": 1600, "seconds": 61.2, "whole": True}}},
    "machine": "1 device (x86_64)",
    "seconds": 200.0,
    "held_out": "sentiment: no phrase is in two splits; arithmetic: no wording with the same numbers is",
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
    tuning = {"sentiment": {"losses": [0.9, 0.5, 0.25], "drift": {"all": 0.0123}}}
    write_report(ledger, tmp_path / "new" / "report", {**ABOUT, "tuning": tuning})
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
    assert {one["expert"] for one in told["alone"]} == {"arithmetic", "programs"}
    assert told["surpassed"][1] == {"other": "best expert alone", "rows": 24, "above": 24, "surely": 24}
    text = (place / "report.md").read_text()
    assert all(f"]({name})" in text for name in FILES if name.endswith("png"))
    assert "| sentiment | 0.900 |" in text
    assert "| sentiment | 1.23 |" in text


def test_the_words_follow_the_numbers(ledger):
    text = text_of(ledger, ABOUT)
    assert "| 1. M³ improves the merged model across tasks | held |" in text
    arms = "60.0 | 66.0 | 65.0 | 70.0"
    assert f"| sentiment + programs | TIES | yes | {arms} | 30.0 | programs: 60.0 |" in text
    assert "less best of a grid (at equal budget): +4.0 points of test accuracy (95 % interval +4.0 to +4.0," in text
    assert "| base | sentiment | 30.0 | 20.0 | 24.0 | 0.200 | deepwordbug |" in text
    assert "- command: `scripts/laboratory --out here`" in text
    assert "    - base: steps 1,600, seconds 61.2, whole yes" in text
    assert "- time: training 1 min 01 s, experiments 3 min 20 s" in text
    assert f"- held out: {ABOUT['held_out']}" in text
    assert f"one of scale. What is held out: {ABOUT['held_out']}." in text
    assert "models of 912,345 parameters" in text
    assert "A merge in memory takes 2.0 ms, 0.40% of one examination" in text
    assert "points against" not in text
    assert "Here 120 of 120 such pairs of test scores are the same" in text
    assert "Here 0 of 120 such pairs" in text_of(make_ledger())
    assert "missing" not in text
    worse = text_of(make_ledger({**ARMS, M3: -0.1}, noise=0.0), ABOUT)
    assert "| 1. M³ improves the merged model across tasks | did not hold |" in worse
    assert "−10.0 points of test accuracy (95 % interval −10.0 to −10.0, 5 seeds): did not hold" in worse


def test_a_claim_held_in_part_says_which():
    text = text_of(make_ledger(ARMS, noise=0.0))
    held = "M³ without DARE less a grid with DARE; M³ with DARE less a grid with DARE"
    assert f"held in part: {held}. Not: M³ with DARE less M³ without" in text
    assert text.count("It is held only where all of these are.") == 1


def test_a_grid_of_another_size_is_said(ledger):
    def cut(line, points):
        if line["kind"] != "merge" or len(line["group"]) == 2:
            return line
        return {**line, "trials": {**line["trials"], TUNED: (line["trials"][TUNED] * 2)[:points]}}

    for points in (6, 9):
        text = text_of([cut(line, points) for line in ledger])
        assert f"favours the larger: {points} points against 8 draws for 3 experts." in text


def section(text, title):
    return text.split(f"## {title}")[1].split("\n## ")[0]


def test_merging_is_compared_with_not_merging(ledger):
    found = find(ledger, ABOUT)
    assert [(one.other, one.rows, one.above, one.surely) for one in found.surpassed] == [
        ("base", 24, 24, 24),
        ("best expert alone", 24, 24, 24),
    ]
    text = text_of(ledger, ABOUT)
    told = section(text, "Test accuracy, %")
    assert "it is chosen after the fact" in told
    assert "above the base in 24 of 24 rows by its mean; the paired interval is above 0 in 24." in told
    assert "above the best expert alone in 24 of 24 rows by its mean; the paired interval is above 0 in 24." in told
    for title, base, best in (("Accuracy out", "20.0", "40.0"), ("Accuracy under", "24.0", "40.0")):
        assert f"| {base} | arithmetic: {best} |" in section(text, title)
        assert "of 24 rows" not in section(text, title)
    assert "base |" not in section(text, "Performance drop rate")


def test_merges_worse_than_an_expert_are_not_said_to_beat_it():
    """Experts score 40, 50 and 60 % in all skills, and M³'s draws 55 %."""
    text = text_of(make_ledger({M3: -0.05}, noise=0.0))
    assert "above the base in 24 of 24 rows" in text
    assert "above the best expert alone in 6 of 24 rows by its mean; the paired interval is above 0 in 6." in text


def test_differences_from_unmerged_models_are_paired_by_seed():
    """Examples that are harder in some seeds are so for both: a difference that is always the same is certain."""
    lines = make_ledger({M3: 0.02}, noise=0.0)

    def easier(scores, seed):
        return {skill: score + 0.05 * (seed - 2) for skill, score in scores.items()}

    for line in lines:
        for result in (*line.get("models", {}).values(), *line.get("arms", {}).values()):
            result["test"] = easier(result["test"], line["seed"])
    base, best = find(lines, {}).surpassed
    assert (base.above, base.surely, best.above, best.surely) == (24, 24, 24, 24)


def test_an_uncertain_lead_is_above_by_means_alone():
    lines = make_ledger({M3: 0.02}, noise=0.0)
    for line in lines:
        for result in line.get("models", {}).values():
            result["test"] = {skill: score + 0.3 * (line["seed"] == 0) for skill, score in result["test"].items()}
    base, best = find(lines, {}).surpassed
    assert (base.above, base.surely) == (24, 24)
    assert (best.above, best.surely) == (6, 0)  # of the two lesser experts alone


def test_adversaries_are_told_by_what_they_did(ledger):
    told = section(text_of(ledger), "Performance drop rate")
    assert "keeps the worst that it finds: sentiment (deepwordbug). A perturbation" in told
    assert "whatever the model makes of it: arithmetic (typos), programs (paraphrase). The PDR of a group is" in told
    assert "1 − Σ attacked / Σ clean" in told
    unattacked = section(text_of(make_ledger(names=SKILLS[1:])), "Performance drop rate")
    assert "keeps the worst that it finds: no skill." in unattacked


def test_times_that_are_not_known_are_not_told(ledger):
    assert "- time" not in text_of(ledger)
    assert "- time: experiments 4 s\n" in text_of(ledger, {"seconds": 4.0})
    assert "- held out" not in text_of(ledger)
    assert "What is held out" not in text_of(ledger)


def test_one_seed_has_no_interval():
    text = text_of(make_ledger(ARMS, how=SETTINGS._replace(seeds=1)))
    assert "±" not in text.split("## Test accuracy")[1].split("## What follows")[0]
    assert "(one seed, so no interval): undecided" in text
    assert "All intervals are over 1 seed," in text
    assert "rows by its mean; no row has an interval." in text


def test_what_is_missing_is_said(ledger):
    text = text_of(without(ledger, kind="merge", seed=4, method=AVERAGE), ABOUT)
    assert "Not there: 8 pieces." in text
    assert f"- merge, sentiment+arithmetic, {AVERAGE}, 0.5, seed 4" in text
    assert f"| sentiment + programs | {AVERAGE} | no | 60.0 (4 seeds)" in text
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


@pytest.mark.parametrize("kind", few(["models", "merge", "alpha", "curve"], "merge", "curve"))
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


@pytest.mark.parametrize("save", [save_curves, save_bars, save_alphas])
def test_pictures_are_written_whole_or_not_at_all(tmp_path, monkeypatch, ledger, save):
    path = tmp_path / "picture.png"
    path.write_bytes(b"an earlier one")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", full)
        with pytest.raises(M3Error, match="No space left"):
            save(ledger, path)
    assert path.read_bytes() == b"an earlier one"
    assert list(tmp_path.iterdir()) == [path]
    assert save(ledger, path)
    assert min(size_of(path)) > 400
    assert list(tmp_path.iterdir()) == [path]


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


@pytest.mark.parametrize("panels", [1, 3])
def test_a_legend_fits_its_figure(panels, tmp_path):
    figure, axes = make_figure(panels)
    for number in range(9):
        axes[0].plot([0, 1], [0, number], label=f"something with a name that is long, number {number}")
    finish_figure(figure, axes, tmp_path / "picture.png")
    (legend,) = figure.legends
    assert legend.get_window_extent().width <= figure.bbox.width
