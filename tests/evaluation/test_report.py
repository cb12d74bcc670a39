"""Results of several runs in one table and one picture."""

import json
import struct

import pytest

from m3jax.cli import commands
from m3jax.errors import M3Error
from m3jax.evaluation import report

SUMMARY = {"model": "models/a|b", "task": "sst2", "examples": 10, "accuracy": 0.8, "interval": [0.5, 0.9]}
DROP = {"examples": 10, "clean": 0.8, "attacked": 0.2, "pdr": 0.75, "interval": [0.5, 0.9]}
ATTACK = {
    **SUMMARY,
    "profile": "promptbench",
    "prompt": "Good `or` bad?\n{content}",
    "attacks": [{"attack": "deepwordbug", "drop": DROP, "queries": 1234, "prompt": "God `or` bad?\n{content}"}],
    "shifts": [{"shift": "typos", "drop": {**DROP, "pdr": None, "interval": None}, "changed": 3}],
}


def run(directory, **files):
    directory.mkdir(parents=True)
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return directory


def test_the_table_has_every_figure(tmp_path):
    one = run(tmp_path / "one", attack=ATTACK)
    two = run(tmp_path / "two", summary={**SUMMARY, "model": "models/c"})
    lines = list(report.table_lines(report.collect([one, two])))
    assert lines[2:6] == [
        "| models/a\\|b | sst2 | clean | 10 | 80.0% |  | 50.0% to 90.0% |  |",
        "| models/a\\|b | sst2 | deepwordbug | 10 | 20.0% | 0.750 | 0.500 to 0.900 | 1,234 |",
        "| models/a\\|b | sst2 | typos | 10 | 20.0% | undefined (too little is right) |  |  |",
        "| models/c | sst2 | clean | 10 | 80.0% |  | 50.0% to 90.0% |  |",
    ]
    assert lines[6:] == [
        "",
        "models/a|b, sst2, deepwordbug:",
        "- original: `Good 'or' bad?⏎{content}`",
        "- attacked: `God 'or' bad?⏎{content}`",
    ]


def test_runs_say_their_data_and_whether_they_are_complete(tmp_path):
    told = {"data": "dev.tsv", "limit": 1000, "complete": False}
    one, two = run(tmp_path / "one", attack={**ATTACK, **told}), run(tmp_path / "two", attack=ATTACK)
    found = report.collect([one, two])
    assert [(line.data, line.limit, line.complete) for line in found.lines[::3]] == [
        ("dev.tsv", 1000, False),
        (None, None, True),
    ]
    lines = list(report.table_lines(found))
    assert [line.startswith("| models/a\\|b (incomplete) |") for line in lines[2:8]] == [True] * 3 + [False] * 3
    said = "data `dev.tsv`, limit 1,000, 10 examples measured, incomplete: the attack was interrupted"
    assert lines[8:10] == ["", f"- models/a|b, sst2 ({one}): {said}"]
    assert lines[10:12] == ["", "models/a|b, sst2, deepwordbug:"]


def test_profiles_do_not_share_a_condition(tmp_path):
    paper = run(tmp_path / "paper", attack={**ATTACK, "profile": "m3-paper"})
    lines = report.collect([run(tmp_path / "one", attack=ATTACK), paper]).lines
    names = ["clean", "deepwordbug", "typos", "clean", "deepwordbug (m3-paper)", "typos"]
    assert [line.condition for line in lines] == names


def test_the_files(tmp_path, capsys):
    one = run(tmp_path / "one", attack=ATTACK, summary=SUMMARY)
    unjudged = run(tmp_path / "two", summary={**SUMMARY, "accuracy": None, "interval": None})
    arguments = ["report", str(one), str(unjudged), "--out", str(tmp_path / "out")]
    assert commands.main([*arguments, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown == json.loads((tmp_path / "out" / "report.json").read_text())
    assert [line["accuracy"] for line in shown["lines"]] == [0.8, 0.8, 0.2, 0.2, None]
    picture = (tmp_path / "out" / "report.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", picture[16:24])
    assert width > 600
    assert height > 600
    assert "![accuracy and drop rates](report.png)" in (tmp_path / "out" / "report.md").read_text()
    assert commands.main(arguments) == 2
    assert "is already there: give another directory, or --overwrite" in capsys.readouterr().err
    assert commands.main([*arguments, "--overwrite"]) == 0


def exploration(directory, **changes):
    def result(scores, reference=None, sample=0, most=None):
        return {
            "reference": reference,
            "scores": scores,
            "sample": sample,
            "weights": {"model": [0.25, 0.75]},
            "most": most,
        }

    stopped = result({"sst2": 0.1}, most={"sst2": 0.5})
    content = {
        "directory": "merges/best",
        "strategy": "auto",
        "examples": {"sst2": 10},
        "experts": ["models/a|b", "models/c"],
        "references": [result({"sst2": 0.0}, "models/a|b"), result({"sst2": 0.5}, "equal weights")],
        "choice": result({"sst2": 0.9}, sample=3),
        "samples": [result({"sst2": 0.9}, sample=3), stopped],
        "remarks": ["its scores flatter it"],
    }
    return run(directory, exploration={**content, **changes})


def test_explorations_stand_beside_evaluations(tmp_path):
    """Under the same names and colours; a directory that was explored leads to its samples."""
    exploration(tmp_path / "best.exploration")
    (tmp_path / "best").mkdir()
    found = report.collect([run(tmp_path / "one", attack=ATTACK), tmp_path / "best"])
    lines = list(report.table_lines(found))
    known = "dev examples of an exploration"
    assert lines[5:8] == [
        f"| models/a\\|b | sst2 | {known} | 10 | 0.0% |  | 0.0% to 27.8% |  |",
        f"| equal weights | sst2 | {known} | 10 | 50.0% |  | 23.7% to 76.3% |  |",
        f"| merges/best | sst2 | {known} | 10 | 90.0% |  | 59.6% to 98.2% |  |",
    ]
    said = "2 samples by auto, 1 stopped early, sample 3 chosen, a|b 0.2500, c 0.7500"
    assert lines[8:11] == ["", f"- {tmp_path / 'best.exploration'}: {said}", "    - its scores flatter it"]
    runs = report._runs(found)
    assert runs == [("models/a|b", "sst2", ""), ("equal weights", "sst2", ""), ("merges/best", "sst2", "")]
    assert len(set(report._colours([*runs, ("merges/best", "cola", "")]).values())) == 3
    many = report._colours([(str(number), "sst2", "") for number in range(30)])
    assert len({tuple(colour) for colour in many.values()}) == 30
    report.write(found, tmp_path / "out")
    own = exploration(tmp_path / "own", examples={})
    with pytest.raises(M3Error, match="compared by a score of one's own"):
        report.collect([own])


def test_bars_have_the_heights_of_the_table(tmp_path):
    """One group of bars for each condition; an undefined rate has no bar."""
    from matplotlib.figure import Figure

    found = report.collect([run(tmp_path / "one", attack=ATTACK)])
    axes = Figure().subplots()
    report._draw(axes, found, [("models/a|b", "sst2", str(tmp_path / "one"))], ["deepwordbug", "typos"], "pdr", 6.4)
    assert [(bar.get_x() + bar.get_width() / 2, bar.get_height()) for bar in axes.patches] == [(0, 0.75)]
    named = axes.get_xticklabels()
    assert [(label.get_text(), label.get_rotation()) for label in named] == [("deepwordbug", 0), ("typos", 0)]
    report._draw(axes, found, [("models/a|b", "sst2", str(tmp_path / "one"))], ["deepwordbug", "typos"], "pdr", 2.0)
    assert {label.get_rotation() for label in axes.get_xticklabels()} == {20}  # where there is no room to stand level


def test_runs_of_one_model_have_bars_of_their_own(tmp_path):
    runs = [("m", "sst2", "one"), ("m", "sst2", "two"), ("other/n", "sst2", "three")]
    assert report._labels(runs) == ["m, sst2 (one)", "m, sst2 (two)", "n, sst2"]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        (None, None, "holds neither summary.json nor attack.json"),
        ("summary.json", "{", "cannot read"),
        ("summary.json", "[]", "cannot read"),
        ("attack.json", "{}", "lacks 'accuracy'; make it again"),
        ("attack.json", json.dumps({**ATTACK, "attacks": [{"attack": "x"}]}), "lacks 'drop'"),
        ("attack.json", json.dumps({**ATTACK, "interval": 3}), "cannot read"),
        ("attack.json", json.dumps({**ATTACK, "accuracy": "x"}), "cannot read"),
        ("attack.json", json.dumps({**ATTACK, "limit": "x"}), "cannot read"),
    ],
)
def test_directories_that_hold_no_results(tmp_path, name, content, sentence):
    if name is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(M3Error, match=sentence):
        report.collect([tmp_path])


@pytest.mark.parametrize(
    "change",
    [
        {"accuracy": 1e999},
        {"accuracy": float("nan")},
        {"accuracy": True},
        {"accuracy": "0.8"},
        {"interval": [1]},
        {"interval": 3},
        {"examples": -1},
        {"examples": 1e999},
        {"limit": []},
    ],
)
def test_odd_figures_are_said(tmp_path, change):
    place = run(tmp_path / "one", summary={**SUMMARY, **change})
    with pytest.raises(M3Error, match=r"cannot read .*summary\.json: .*make it again"):
        report.collect([place])


@pytest.mark.parametrize("text", ["[" * 10**5, '{"a":' * 10**5, "9" * 5000, "[]", '"x"'])
def test_results_that_are_none(tmp_path, text):
    place = run(tmp_path / "one")
    (place / "summary.json").write_text(text)
    with pytest.raises(M3Error, match=r"cannot read .*summary\.json"):
        report.collect([place])


def test_names_that_mean_harm_are_written_and_drawn(tmp_path):
    names = {"model": "$\\frac{\x1b[2J|\n", "task": "_hidden$", "data": "a`\x07", "prompt": "\u202ex"}
    attacked = {**ATTACK, **names, "attacks": [{**ATTACK["attacks"][0], "attack": "$\\bad"}]}
    report.write(report.collect([run(tmp_path / "one", attack=attacked)]), tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert text.replace("\n", "").isprintable()
    assert "\\x1b[2J" in text
