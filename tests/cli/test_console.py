"""What people see: texts, tables, summaries and progress."""

import io
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from m3jax.checkpoints import TensorInfo
from m3jax.checkpoints.inspection import (
    Comparison,
    Difference,
    DtypeTotal,
    Mismatch,
    Overview,
    TensorDifference,
    WeightFile,
)
from m3jax.cli import console
from m3jax.cli.console import Lines, Pace, Reporter, table
from m3jax.outputs.manifest import Verification
from m3jax.progress import Progress


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (999_949, "999.9 kB"),
        (999_950, "1.0 MB"),
        (2.2e9, "2.2 GB"),
        (5e15, "5000.0 TB"),
    ],
)
def test_sizes(count: float, text: str) -> None:
    assert console.size_text(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (2.94, "2.9 s"),
        (3, "3 s"),
        (59.6, "1 min 00 s"),
        (200, "3 min 20 s"),
        (3599.7, "1 h 00 min"),
        (90000, "25 h 00 min"),
    ],
)
def test_times(seconds: float, text: str) -> None:
    assert console.time_text(seconds) == text


def test_shares_are_whole_only_where_exact() -> None:
    assert console.share_text(10**9 - 1, 10**9) == "99.99 %"
    assert console.share_text(1, 10**9) == "0.01 %"
    assert console.share_text(0, 5) == "0 %"
    assert console.share_text(5, 5) == "100 %"
    assert console.share_text(0, 0) == "–"


def test_control_characters_are_escaped() -> None:
    assert console.safe_text("a\x1b[31m\nb") == "a\\x1b[31m\\nb"
    assert console.safe_text("größe.weight") == "größe.weight"


# --- Tables ----------------------------------------------------------------------------------------------

HEAD, ROWS = ["tensor", "entries", "bytes"], [["embed", "12", "24 B"], ["layers.0.weight", "1,000", "2.0 kB"]]


def test_table_aligns() -> None:
    assert list(table(HEAD, ROWS)) == [
        "tensor           entries   bytes",
        "embed                 12    24 B",
        "layers.0.weight    1,000  2.0 kB",
    ]


def test_table_leaves_out_a_spare_column_first() -> None:
    assert list(table(HEAD, ROWS, width=31, spare=1)) == [
        "tensor            bytes",
        "embed              24 B",
        "layers.0.weight  2.0 kB",
    ]


def test_table_gives_names_lines_of_their_own() -> None:
    lines = list(table(HEAD, ROWS, width=22, spare=1))
    assert lines == ["tensor", "     bytes", "embed", "      24 B", "layers.0.weight", "    2.0 kB"]
    assert max(map(len, table(HEAD, ROWS, width=31))) <= 31


def test_table_without_rows() -> None:
    assert list(table(HEAD, [])) == ["tensor  entries  bytes"]


# --- Checkpoints -----------------------------------------------------------------------------------------


def test_overview_ends_with_totals() -> None:
    overview = Overview(
        location="org/model",
        revision="abc",
        format="msgpack",
        model=None,
        metadata={"format": "pt\x07"},
        files=(WeightFile("model.safetensors", 1500),),
        tensors=(TensorInfo("w\x1b", (2, 3), "F32"), TensorInfo("s", (), "I64")),
        hidden=1,
        dtypes=(DtypeTotal("F32", 1, 6, 24), DtypeTotal("I64", 1, 1, 8)),
    )
    lines = list(console.overview_lines(overview))
    assert lines[0] == "org/model at abc"
    assert all(line.isprintable() for line in lines)
    assert lines[-6:] == [
        "dtype  tensors  parameters  bytes",
        "F32          1           6   24 B",
        "I64          1           1    8 B",
        "all          2           7   32 B",
        "1 msgpack file, 1.5 kB",
        "1 more tensor not matched by the filter",
    ]


def compared(**changes: Any) -> Comparison:
    same = Difference(entries=4, equal=4, finite=4, squares_a=4.0, squares_b=4.0, products=4.0, signed=4, same_sign=4)
    return Comparison("x", "y", (TensorDifference("w", same),), same, (), (), (), ())._replace(**changes)


def test_comparison_of_equals() -> None:
    lines = list(console.comparison_lines(compared()))
    assert lines[-1] == "the same: 4 entries, all equal"
    assert lines[4].split() == ["w", "2", "2", "0", "1.000000", "0", "100", "%", "100", "%"]


def test_comparison_says_what_is_left_out() -> None:
    odd = Difference(entries=4, nonfinite_a=4)
    lines = list(
        console.comparison_lines(
            compared(
                tensors=(TensorDifference("w", odd),),
                total=odd,
                only_a=("u",),
                only_b=("v",),
                shapes=(Mismatch("s", "2 × 3", "3"),),
                dtypes=(Mismatch("d", "F32", "BF16"),),
            )
        )
    )
    for expected in (
        "  w: 4 in a, 0 in b",
        "only in a (1):",
        "  v",
        "  s: 2 × 3 in a, 3 in b",
        "  d: F32 in a, BF16 in b",
    ):
        assert expected in lines
    assert lines[-1] == "different: 4 of the 4 entries compared"


def test_comparison_of_nothing() -> None:
    lines = list(console.comparison_lines(compared(tensors=(), total=Difference(), only_a=("u",))))
    assert lines[-1] == "different: no tensor can be compared"


# --- Merges ----------------------------------------------------------------------------------------------


def merged(manifest: dict[str, Any], **changes: Any) -> Any:
    """What `MergeResult` looks like; its module imports JAX."""
    fields: dict[str, Any] = {
        "directory": Path("my models/out"),
        "digest": "ab" * 32,
        "manifest": manifest,
        "seconds": 2.0,
        "bytes_read": 2_000_000_000,
        "bytes_written": 1_000_000_000,
        "resumed_shards": 0,
        "notes": (),
    }
    fields.update(changes)
    return SimpleNamespace(**fields)


def drawn(*weights: float) -> dict[str, list[Any]]:
    return {"decimal": list(weights), "hex": [weight.hex() for weight in weights]}


def test_merge_summary() -> None:
    recipe = {"base_model": "base", "models": [{"model": "base"}, {"model": "math"}, {"model": "code"}]}
    result = merged({"recipe": recipe, "weights": {"model": drawn(0.25, 0.75)}}, resumed_shards=1)
    assert list(console.merge_lines(result)) == [
        "merged   'my models/out'",
        "took     2.0 s: 2.0 GB read, 1.0 GB written, 1.5 GB/s, 1 shard kept from before",
        "weights  0.250000  math",
        "         0.750000  code",
        f"digest   {'ab' * 32}",
        "replay   m3jax replay 'my models/out' NEW_DIRECTORY",
    ]


def test_merge_summary_of_many_groups() -> None:
    groups = {f"model.layers.{index}": drawn(0.5, 0.5) for index in range(6)}
    lines = list(console.merge_lines(merged({"recipe": {"models": []}, "weights": groups}, seconds=0.0)))
    assert lines[2] == "weights  0.500000  0.500000  model.layers.0"
    assert lines[6] == "         … and 2 more groups, in the manifest"
    assert "/s" not in lines[1]


def test_merge_summary_without_known_names_or_weights() -> None:
    recipe = {"models": [{"model": "a"}]}
    lines = list(console.merge_lines(merged({"recipe": recipe, "weights": {"model": drawn(0.5, 0.5)}})))
    assert lines[2:4] == ["weights  0.500000  expert 0", "         0.500000  expert 1"]
    assert not any(line.startswith("weights") for line in console.merge_lines(merged({})))


def test_verification() -> None:
    same = Verification(Path("out"), "ab", 3, 2, ())
    assert list(console.verification_lines(same)) == ["out: as recorded, 3 tensors and 2 other files", "digest   ab"]
    lines = list(console.verification_lines(same._replace(differences=("w: its bytes differ",))))
    assert lines[:2] == ["w: its bytes differ", "out: not as recorded, 1 difference in 3 tensors and 2 other files"]
    assert console.verification_json(same)["as_recorded"]


# --- Progress --------------------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def lines_of(reports: list[tuple[float, str, int, int]]) -> list[str]:
    """What plain lines show of reports: time, stage, done, total."""
    stream, clock = io.StringIO(), Clock()
    report = Reporter(Lines(stream), clock)
    for clock.now, stage, done, total in reports:
        report(Progress(stage, done, total))
    return stream.getvalue().splitlines()


def test_lines_come_every_few_seconds() -> None:
    gigabyte = 10**9
    reports = [(tenth / 10, "merging", tenth * gigabyte // 20, 5 * gigabyte) for tenth in range(101)]
    assert lines_of(reports) == [
        "merging: 30 % of 5.0 GB, 500.0 MB/s, 7 s left",
        "merging: 60 % of 5.0 GB, 500.0 MB/s, 4 s left",
        "merging: 90 % of 5.0 GB, 500.0 MB/s, 1.0 s left",
        "merging: 5.0 GB in 10 s, 500.0 MB/s",
    ]


def test_lines_become_rarer() -> None:
    reports = [(float(second), "merging", second, 20_000) for second in range(10_000)]
    assert 150 < len(lines_of(reports)) < 220


def test_what_is_over_at_once_is_not_shown() -> None:
    assert lines_of([(0.0, "comparing", 0, 10), (0.5, "comparing", 10, 10)]) == []


def test_resumed_work_does_not_count_as_speed() -> None:
    lines = lines_of([(0.0, "merging", 900, 1000), (5.0, "merging", 950, 1000), (10.0, "merging", 1000, 1000)])
    assert lines == ["merging: 95 % of 1.0 kB, 10 B/s, 5 s left", "merging: 1.0 kB in 10 s, 10 B/s"]


def test_stages_have_rates_of_their_own() -> None:
    lines = lines_of(
        [
            (0.0, "ranking", 0, 1000),
            (4.0, "ranking", 400, 1000),
            (5.0, "ranking", 1000, 1000),
            (5.0, "ranking", 1000, 1000),
            (5.0, "merging", 0, 500),
            (9.0, "merging", 40, 500),
        ]
    )
    assert lines == [
        "ranking: 40 % of 1.0 kB, 100 B/s, 6 s left",
        "ranking: 1.0 kB in 5 s, 200 B/s",
        "merging: 8 % of 500 B, 10 B/s, 46 s left",
    ]


def test_late_reports_do_not_turn_back() -> None:
    pace = Pace(0.0, 0)
    pace.update(1.0, 100)
    pace.update(2.0, 50)
    assert pace.done == 100
    assert pace.rate() == 50.0


def test_rates_follow_a_change() -> None:
    pace = Pace(0.0, 0)
    for second in range(1, 101):
        pace.update(float(second), min(second, 50) * 1000 + max(second - 50, 0) * 10)
    assert pace.rate() == pytest.approx(10, rel=0.01)
    assert pace.overall() == pytest.approx(505)


def test_empty_stage() -> None:
    assert lines_of([(0.0, "merging", 0, 0), (9.0, "merging", 0, 0)]) == []
    assert lines_of([(9.0, "merging", 0, 0)]) == ["merging: 0 B in 0.0 s"]


def test_reports_from_many_threads() -> None:
    stream, clock = io.StringIO(), Clock()
    report = Reporter(Lines(stream), clock)
    clock.now = 5.0

    def work(thread: int) -> None:
        for step in range(1000):
            report(Progress("merging", step * 8 + thread, 8000))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    report(Progress("merging", 8000, 8000))
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2
    assert lines[-1].startswith("merging: 8.0 kB in")


def test_quiet_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with console.progress_reporter(quiet=True) as progress:
        assert progress is None
    assert capsys.readouterr() == ("", "")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("columns", ["60", "80", "120"])
def test_bars_on_a_terminal(monkeypatch: pytest.MonkeyPatch, columns: str) -> None:
    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setattr("sys.stderr", terminal)
    with console.progress_reporter() as progress:
        assert isinstance(progress, Reporter)
        bars: Any = progress._display
        progress._due = 0.0
        progress(Progress("[counting] signs", 0, 2_000_000_000))
        progress._due = 0.0
        progress(Progress("[counting] signs", 1_000_000_000, 2_000_000_000))
        progress._due = 0.0
        progress(Progress("merging", 0, 0))
        bars.live.refresh()
        assert [(task.completed, task.total) for task in bars.live.tasks] == [(10**9, 2 * 10**9), (1, 1)]
    shown = terminal.getvalue()
    assert "[counting] signs" in shown
    assert "50 % of 2.0 GB" in shown


def test_dumb_terminals_get_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr("sys.stderr", Terminal())
    with console.progress_reporter() as progress:
        assert isinstance(progress, Reporter)
        assert isinstance(progress._display, Lines)
