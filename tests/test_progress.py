"""How far work is, in lines that are neither too many nor too few."""

import pytest

from m3jax import progress


def lines_of(monkeypatch: pytest.MonkeyPatch, reports: list[tuple[float, int]], total: int) -> list[str]:
    """What is told of reports: time and how many are done."""
    now, told = [0.0], list[str]()
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    report = progress.progress_lines(told.append, "prompts")
    assert report is not None
    for now[0], done in reports:
        report(done, total)
    return told


def test_lines_come_every_few_seconds_and_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lines_of(monkeypatch, [(second, 2 * second) for second in range(6)], 10) == [
        "6 of 10 prompts, 2.00/s, 2.0 s left",
        "10 of 10 prompts, 2.00/s in 5 s",
    ]


def test_what_was_done_before_is_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lines_of(monkeypatch, [(1.0, 80), (5.0, 82), (8.0, 90), (9.0, 100)], 100) == [
        "80 of 100 prompts were done before",
        "82 of 100 prompts",  # the first of them may have been compiled for
        "90 of 100 prompts, 2.67/s, 4 s left",
        "100 of 100 prompts, 2.50/s in 8 s",
    ]


def test_nobody_is_told_nothing() -> None:
    assert progress.progress_lines(None) is None
