"""Sections of the report that a pretrained base adds, and those on what better choices can gain."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from m3jax.laboratory.experiments import DRAW, EQUAL, M3, TUNED
from m3jax.laboratory.gains import DRAWS, Curve, Expectation, Paired, WayScores
from m3jax.laboratory.markdown import table
from m3jax.laboratory.outcomes import Line, SeedMean
from m3jax.laboratory.searches import GRID

_DIGITS = 12  # of a digest
_STAGES = 8  # parts of a training whose losses are told
_ARMS = {EQUAL: "equal weights", TUNED: "best of a grid", DRAW: "one draw", M3: "best of M³'s draws"}


def tuning_lines(tuning: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """The losses of every expert, and how far it went.

    Args:
        tuning: Of each expert "losses", one a step, and "drift", by what tensors are.
    """
    yield "Cross-entropy of the answers' tokens, as means over eighths of each training:"
    yield ""
    yield from table(
        ["expert", "first step", *(f"to {stage}/{_STAGES}" for stage in range(1, _STAGES + 1))],
        ([name, *(f"{value:.3f}" for value in _stages(one["losses"]))] for name, one in tuning.items()),
    )
    kinds = list(dict.fromkeys(kind for one in tuning.values() for kind in one["drift"]))
    yield from ("", "Drift from the base, ‖expert − base‖ / ‖base‖, in %:", "")
    yield from table(
        ["expert", *kinds],
        ([name, *(f"{100 * one['drift'].get(kind, 0.0):.2f}" for kind in kinds)] for name, one in tuning.items()),
    )


def _stages(losses: Sequence[float]) -> list[float]:
    cuts = [len(losses) * stage // _STAGES for stage in range(_STAGES + 1)]
    parts = [losses[start:end] or losses[-1:] for start, end in itertools.pairwise(cuts)]
    return [losses[0], *(sum(part) / len(part) for part in parts)]


def sample_lines(samples: Mapping[str, Mapping[str, Sequence[Sequence[str]]]]) -> Iterator[str]:
    """What models answer to the first test examples.

    Args:
        samples: Of each model, by skill: what was asked, what is right, and what it said.
    """
    asked: dict[tuple[str, str, str], dict[str, str]] = {}
    for model, by_skill in samples.items():
        for skill, some in by_skill.items():
            for question, gold, said in some:
                asked.setdefault((skill, question, gold), {})[model] = said
    yield from table(
        ["skill", "question", "right", *samples],
        (
            [skill, question, gold, *(repr(said.get(model, "")) for model in samples)]
            for (skill, question, gold), said in asked.items()
        ),
    )


def expectation_lines(curves: Iterable[Curve], expectations: Sequence[Expectation]) -> Iterator[str]:
    """When which shape of Beta pays.

    Args:
        curves: What the pairs' curves are like.
        expectations: What draws let expect on them.
    """
    yield (
        "Of the curve over λ on dev examples, straight between its points: the mean of the best of k draws from "
        "Beta(α, α), computed and not drawn. Small α looks at the ends, large α at the middle: which pays is a "
        "question of where the curve is high, and with more draws of how much of it is."
    )
    for curve in curves:
        mine = [one for one in expectations if one.group == curve.group]
        low, high = curve.ends
        yield ""
        yield (
            f"{' and '.join(curve.group)}: {100 * curve.middle:.1f} % at λ = ½, at most {100 * curve.best:.1f} % at "
            f"λ = {curve.at:.3g}; {curve.group[0]} alone {100 * high:.1f} %, {curve.group[-1]} alone {100 * low:.1f} %."
        )
        yield ""
        yield from table(
            ["α", *(f"best of {count}" if count > 1 else "one draw" for count in DRAWS)],
            ([f"{one.alpha:g}", *(f"{100 * value:.1f}" for value in one.best)] for one in mine),
        )
        told = ", ".join(
            f"{max(mine, key=lambda one: one.best[place]).alpha:g} for {count}" for place, count in enumerate(DRAWS)
        )
        yield from ("", f"The best of these α by the number of draws: {told}.")


def search_lines(searches: Sequence[WayScores], examination: float | None) -> Iterator[str]:
    """What weights of layers and tensors give against one ratio.

    Args:
        searches: What each way of looking gave.
        examination: Seconds that an evaluation takes, if known.
    """
    yield (
        "Average merging of pairs; every way may examine as many merges on dev examples, those along slopes take half "
        "of them to find where to begin. Differences are in test accuracy, paired by seed; of equals on dev examples "
        "the first is chosen."
    )
    yield ""
    yield from table(
        ["weights", "evaluations", "steps", "time, s", "dev, %", "test, %", f"less {GRID}, points", "verdict"],
        (
            [
                *(one.way, str(one.evaluations), str(one.steps) if one.steps else "–", _time(one, examination)),
                *(_share(one.dev), _share(one.test)),
                "–" if one.difference is None else _share(one.difference, signed=True),
                one.verdict or "–",
            ]
            for one in searches
        ),
    )


def _time(one: WayScores, examination: float | None) -> str:
    return "–" if examination is None else f"{one.evaluations * examination + one.seconds:,.0f}"


def _share(value: SeedMean | None, signed: bool = False) -> str:
    if value is None:
        return "–"
    half = "" if value.half is None else f" ± {100 * value.half:.1f}"
    return f"{100 * value.mean:{'+' if signed else ''}.1f}{half}".replace("-", "−")


def _gain(one: Paired) -> str:
    """A difference with its interval, where anything differs."""
    half = f" ± {100 * one.half:.1f}" if one.disagreeing else ""
    return f"{100 * one.difference:+.1f}{half}".replace("-", "−")


def paired_lines(paired: Iterable[Paired]) -> Iterator[str]:
    """Differences over the same examples, and how many it takes.

    Args:
        paired: The differences.
    """
    yield (
        "Arms are examined on the same examples, so that only those count which exactly one of them does right. The "
        "intervals are over examples of all seeds (95 %, normal), not over seeds, and say how it would be with other "
        "examples but the same draws. The last columns: examples with which such an interval is ± 2 points for one "
        "merge, paired (arms that differ by 2 points disagree on at least 2 %) and with examples of each arm's own."
    )
    yield ""
    yield from table(
        ["difference", "method", "examples", "disagreeing, %", "points", "needed", "needed unpaired"],
        (
            [
                f"{_ARMS[one.more]} less {_ARMS[one.less]}",
                *(one.method or "all", f"{one.examples:,}", f"{100 * one.disagreeing:.1f}"),
                _gain(one),
                *(f"{one.needed:,}", f"{one.unpaired:,}"),
            ]
            for one in paired
        ),
    )


def written_lines(written: Iterable[Line]) -> Iterator[str]:
    """What was written, and whether it is what was reported.

    Args:
        written: The merges.
    """
    yield (
        "The best of the first seed's draws on dev examples, over all methods: written by what `m3jax merge` calls, "
        "with the draw's weights in its manifest, made again by `m3jax replay`, and evaluated from the disk by what "
        "`m3jax evaluate` calls, in whose batches a model may round otherwise than in those of the tables."
    )
    yield ""
    yield from table(
        ["experts", "method", "DARE", "weights", "digest", "replayed", "evaluated, %", "reported, %"],
        (
            [
                *(" + ".join(one["group"]), one["method"], "yes" if one["dare"] else "no"),
                " / ".join(f"{weight:.4f}" for weight in one["weights"]),
                f"`{one['digest'][:_DIGITS]}`",
                "the same" if one["again"] == one["digest"] else f"`{one['again'][:_DIGITS]}`",
                *(_by_skill(one["test"]), _by_skill(one["reported"])),
            ]
            for one in written
        ),
    )


def _by_skill(scores: Mapping[str, float]) -> str:
    return ", ".join(f"{skill} {100 * score:.1f}" for skill, score in scores.items())
