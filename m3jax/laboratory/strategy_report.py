"""What the comparison of strategies found: a page with paired differences, and a picture."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from m3jax.errors import M3Error
from m3jax.evaluation.records import make_directory, write_whole
from m3jax.exploration.strategies import STRATEGIES
from m3jax.laboratory.outcomes import ROUNDING, SeedMean, over_seeds
from m3jax.laboratory.strategies import GRADIENT, Contest

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Run = Mapping[str, Any]

AUTO = "auto"
PAGE, PICTURE, RUNS = "strategies.md", "strategies.png", "runs.jsonl"
_COLOURS = ("#d55e00", "#8c8c8c", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_MARKS = "os^vDPX"
_SPREAD = 0.05  # of a budget, between the marks of two strategies

_HEAD = """\
# Strategies of exploration, compared

Written by `scripts/strategies`. A base and three experts are trained from scratch (Llamas of {parameters}; sentiment of
phrases, arithmetic word problems, small programs), and linear merges of them explored:
{arenas}.
Every strategy chooses weights by accuracy on {dev} dev examples of each skill, at budgets of {budgets} evaluations of
all of them. The seeds {seeds} decide examples and draws. What is reported is the mean accuracy of the chosen merge
on {test} other examples of each skill; a program is right if it is the one that was taught, letter by letter.
Intervals are 95 % by Student's t over seeds, arenas averaged within a seed first.

`gradient` is `--optimize loss` from equal weights: a step of Adam on a batch costs three evaluations of its examples,
one there and two back, and the budget also pays for evaluating where it begins and ends. Of `halving` parts of the dev
examples cost parts of an evaluation. `auto` is equal weights, then the same search as `cma`.

What `auto` does was chosen by such a comparison with the seeds 0 to 4, so these do not test it, and others do. There
are {compared} comparisons of `auto` below, each with its own 95 % interval, and no correction for their number.
"""


def write_report(runs: Sequence[Run], directory: Path, how: Contest, millions: float) -> None:
    """Writes `strategies.md`, and beside it a directory with the picture and the runs.

    Args:
        runs: Lines of `compare`; arenas that are not finished are left out.
        directory: Where.
        how: What was compared.
        millions: Of parameters that each model has.

    Raises:
        M3Error: No arena is finished, or it cannot be written.
    """
    runs = finished(runs, how)
    if not runs:
        raise M3Error("no arena is finished yet: run the comparison to its end")
    beside = directory / "strategies"
    make_directory(beside)
    save_picture(runs, beside / PICTURE)
    write_whole(beside / RUNS, "".join(json.dumps(dict(run)) + "\n" for run in runs))
    arenas = "; ".join(
        arena.replace(", model", ", one ratio").replace(", layer", ", ratios by layer") for arena in _arenas(runs)
    )
    head = _HEAD.format(
        parameters=f"{millions:.2f} M parameters",
        arenas=arenas,
        dev=how.dev,
        test=how.test,
        budgets=", ".join(map(str, how.budgets)),
        seeds=", ".join(map(str, sorted({run["seed"] for run in runs}))),
        compared=(len(_strategies(runs)) - 1) * len(how.budgets),
    )
    write_whole(directory / PAGE, "\n".join([head, *_body(runs), ""]))


def finished(runs: Sequence[Run], how: Contest) -> list[Run]:
    """The runs of arenas in which every strategy has chosen at every budget with every seed.

    Args:
        runs: Lines of `compare`.
        how: What was compared.
    """
    wanted = how.seeds * len(how.budgets) * len(_strategies(runs))
    counts = Counter(run["arena"] for run in runs)
    return [run for run in runs if counts[run["arena"]] == wanted]


def _arenas(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(run["arena"] for run in runs))


def _budgets(runs: Sequence[Run]) -> list[int]:
    return sorted({run["budget"] for run in runs})


def _strategies(runs: Sequence[Run]) -> list[str]:
    there = {run["strategy"] for run in runs}
    return [name for name in (*STRATEGIES, GRADIENT) if name in there]


def means(runs: Sequence[Run], strategy: str, budget: int, figure: str) -> SeedMean | None:
    """What a strategy came to at a budget.

    Args:
        runs: Of whatever arenas.
        strategy: Which.
        budget: Which.
        figure: "test" or "dev".
    """
    return over_seeds((r["seed"], r[figure]) for r in runs if (r["strategy"], r["budget"]) == (strategy, budget))


def differences(runs: Sequence[Run], other: str, budget: int, figure: str = "test") -> SeedMean | None:
    """By how much auto is better than another strategy, in pairs of the same arena and seed.

    Args:
        runs: Of whatever arenas.
        other: The other.
        budget: Of both.
        figure: "test" or "dev".
    """
    mine = {(r["arena"], r["seed"]): r[figure] for r in runs if (r["strategy"], r["budget"]) == (AUTO, budget)}
    theirs = [r for r in runs if (r["strategy"], r["budget"]) == (other, budget) and (r["arena"], r["seed"]) in mine]
    return over_seeds((r["seed"], mine[r["arena"], r["seed"]] - r[figure]) for r in theirs)


def worse(runs: Sequence[Run]) -> list[tuple[str, int]]:
    """The strategies and budgets at which auto is worse than another beyond the interval of their difference.

    Args:
        runs: Of all arenas.
    """
    found = []
    for other in _strategies(runs):
        for budget in _budgets(runs):
            gap = differences(runs, other, budget) if other != AUTO else None
            if gap is not None and gap.high is not None and gap.high < -ROUNDING:
                found.append((other, budget))
    return found


def _body(runs: Sequence[Run]) -> Iterator[str]:
    budgets, names = _budgets(runs), _strategies(runs)
    yield f"![mean accuracy by budget](strategies/{PICTURE})"
    yield ""
    there = worse(runs)
    if there:
        yield f"**auto is worse, beyond its interval, than {', '.join(f'{n} at {b}' for n, b in there)}.**"
    else:
        yield "**At no budget is auto worse than another strategy beyond the interval of their difference.**"
    yield ""
    yield "## All arenas"
    yield ""
    yield from _table(
        "accuracy, %", runs, names, budgets, lambda name, budget: _share(means(runs, name, budget, "test"))
    )
    yield "auto's lead over the others in pairs, in points of accuracy:"
    yield ""
    others = [name for name in names if name != AUTO]
    yield from _table("auto minus", runs, others, budgets, lambda name, budget: _gap(differences(runs, name, budget)))
    yield "The same on the dev examples that chose, where a better search shows without the luck of other examples:"
    yield ""
    yield from _table(
        "auto minus", runs, others, budgets, lambda name, budget: _gap(differences(runs, name, budget, "dev"))
    )
    for arena in _arenas(runs):
        mine = [run for run in runs if run["arena"] == arena]
        yield f"## {arena.replace(', model', ', one ratio').replace(', layer', ', ratios by layer')}"
        yield ""
        yield from _table(
            "accuracy, %",
            mine,
            names,
            budgets,
            lambda name, budget, mine=mine: _share(means(mine, name, budget, "test")),
        )
    yield f"Every choice is a line of [`strategies/{RUNS}`](strategies/{RUNS})."


def _table(first: str, runs: Sequence[Run], names: Sequence[str], budgets: Sequence[int], cell: Any) -> Iterator[str]:
    yield f"| {first} | {' | '.join(f'{budget} evaluations' for budget in budgets)} |"
    yield f"|---|{'---|' * len(budgets)}"
    for name in names:
        yield f"| {name} | {' | '.join(cell(name, budget) for budget in budgets)} |"
    yield ""


def _share(found: SeedMean | None) -> str:
    if found is None:
        return "–"
    return f"{found.mean:.1%}"[:-1] + ("" if found.half is None else f" ± {100 * found.half:.1f}")


def _gap(found: SeedMean | None) -> str:
    if found is None:
        return "–"
    half = "" if found.half is None else f" ± {100 * found.half:.1f}"
    return f"{100 * found.mean:+.1f}{half}"


def save_picture(runs: Sequence[Run], path: Path) -> None:
    """Draws accuracy on test and dev examples over the budget, a line for each strategy.

    Args:
        runs: Lines of `compare`.
        path: The PNG file.

    Raises:
        M3Error: It cannot be written.
    """
    from m3jax.laboratory.figures import finish_figure, make_figure

    figure, axes = make_figure(2)
    for place, (panel, what, words) in enumerate(
        zip(axes, ("test", "dev"), ("examples that chose nothing", "dev examples, which chose"), strict=True)
    ):
        panel.set_title(words, fontsize=10)
        _draw(panel, runs, what)
        panel.set(xlabel="evaluations", ylabel="mean accuracy" if place == 0 else "")
    finish_figure(figure, axes, path)


def _draw(panel: "Axes", runs: Sequence[Run], what: str) -> None:
    names, budgets = _strategies(runs), _budgets(runs)
    for place, name in enumerate(names):
        found = [(budget, each) for budget in budgets if (each := means(runs, name, budget, what)) is not None]
        apart = 1 + _SPREAD * (place - (len(names) - 1) / 2)
        panel.errorbar(
            [budget * apart for budget, _ in found],
            [each.mean for _, each in found],
            yerr=[each.half or 0.0 for _, each in found],
            color=_COLOURS[place % len(_COLOURS)],
            marker=_MARKS[place % len(_MARKS)],
            markersize=5,
            linewidth=2.2 if name == AUTO else 1.2,
            elinewidth=0.8,
            capsize=2,
            label=name,
            zorder=3 if name == AUTO else 2,
        )
    panel.set_xscale("log", base=2)
    panel.set_xticks(budgets, list(map(str, budgets)))
