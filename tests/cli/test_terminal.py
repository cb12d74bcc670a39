"""Progress as lines and bars."""

import io
import sys
import threading
import warnings
from typing import Any

import pytest
from support.terminals import Terminal

from m3jax.cli import shell
from m3jax.cli.commands import main
from m3jax.cli.terminal import Lines, Pace, Reporter, progress_reporter
from m3jax.errors import M3Error
from m3jax.evaluation.sandbox import UnsandboxedWarning
from m3jax.progress import Progress


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
    with progress_reporter(quiet=True) as progress:
        assert progress is None
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("columns", ["60", "80", "120"])
def test_bars_on_a_terminal(monkeypatch: pytest.MonkeyPatch, columns: str) -> None:
    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setattr("sys.stderr", terminal)
    with progress_reporter() as progress:
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
    with progress_reporter() as progress:
        assert isinstance(progress, Reporter)
        assert isinstance(progress._display, Lines)


# --- What terminals would obey ---------------------------------------------------------------------------------------

HARM = "\x1b]0;owned\x07\x9b2J\u202e\r\n"


def test_nothing_that_is_said_steers_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise M3Error(f"{HARM}: is no model")

    assert shell.reported(fail, debug=False) == 2
    shell.print_notes([HARM], quiet=False)
    teller = shell.teller(quiet=False)
    assert teller is not None
    teller(HARM)
    Lines(sys.stderr).draw(Progress(f"reading {HARM}", 1, 2), Pace(0.0, 0))
    shell.print_result(dict, lambda: [HARM], as_json=False)
    assert main(["merge", f"{HARM}.yml", "out"]) == 2
    assert main([HARM]) == 2
    said = capsys.readouterr()
    assert len(said.err.splitlines()) == 6
    assert len(said.out.splitlines()) == 1
    assert (said.out + said.err).replace("\n", "").isprintable()


def test_a_warning_of_ours_is_a_note(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    assert main(["--version"]) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn(UnsandboxedWarning("no namespaces"), stacklevel=1)
    assert capsys.readouterr().err.startswith("note: programs that the model wrote run without a sandbox")


def test_names_without_end_are_not_said_whole(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise M3Error(f"{'x' * 10**6} is no model: give another")

    assert shell.reported(fail, debug=False) == 2
    said = capsys.readouterr().err
    assert len(said) < 5000
    assert said.endswith("xx is no model: give another\n")


def test_what_no_exception_is_and_what_is_nested_without_end_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    class PanicException(BaseException):
        pass

    def panic() -> None:
        raise PanicException("index out of bounds")

    def nest() -> None:
        raise RecursionError

    assert (shell.reported(panic, debug=False), shell.reported(nest, debug=False)) == (1, 2)
    panicked, nested = capsys.readouterr().err.splitlines()
    assert panicked == "m3jax: unexpected PanicException: index out of bounds; run with --debug."
    assert nested.startswith("m3jax: something that was read is nested without end")
