"""What is said of an exploration while it goes on."""

import io

import pytest
from support.terminals import Terminal

from m3jax.cli.displays.exploration import reporter
from m3jax.exploration.selection import Result


def result(sample: int, **scores: float) -> Result:
    return Result(sample, {"model": (0.5, 0.5)}, 1.0, scores, 0.0, "model")


def test_results_are_shown_as_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """A live table on a terminal, lines elsewhere, nothing when quiet."""
    results = [result(0, x=0.25, y=0.5), result(1, x=0.5, y=0.5)._replace(share=0.25, most={"x": 0.5, "y": 0.75})]
    results += [result(4, x=0.75, y=0.5)._replace(optimized=0)]
    stopped = "sample 1 stopped at 0.25 of the examples (at most x 0.5000, y 0.7500): 0.5000 0.5000: x 0.5000, y 0.5000"
    for stream, words in [
        (Terminal(), ["sample", "4 from 0", "0.7500", "0.6250", "2 of 4 evaluations", "0.25 stopped", "learning"]),
        (
            io.StringIO(),
            [
                "sample 0: 0.5000 0.5000: x 0.2500, y 0.5000; 1 of 4 evaluations\n",  # others may be quicker
                f"{stopped}; 2 of 4 evaluations, ",
                " left\n",
                "sample 4 from 0: 0.5000 0.5000: x 0.7500, y 0.5000; 2 of 4 evaluations and 1 learned\n",
                "learning",
            ],
        ),
    ]:
        monkeypatch.setattr("sys.stderr", stream)
        with reporter(4, quiet=False) as (watch, tell):
            for one in results:
                watch(one, False)
            tell("learning")
        for word in words:
            assert word in stream.getvalue()
    with reporter(4, quiet=True) as shown:
        assert shown == (None, None)
