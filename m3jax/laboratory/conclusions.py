"""What follows for the paper's claims, in words that the numbers decide."""

from collections.abc import Iterable, Iterator

from m3jax.laboratory.claims import HELD, IN_PART, SPREAD, UNDECIDED, Claim, Contrast
from m3jax.laboratory.experiments import M3, TUNED
from m3jax.laboratory.findings import LaboratoryFindings
from m3jax.laboratory.outcomes import SHARES
from m3jax.text import count_text

_NOUNS = {
    "test": "test accuracy",
    "shifted": "accuracy out of distribution",
    "attacked": "accuracy under attack or perturbation",
    "pdr": "−PDR",
    SPREAD: "the standard deviation of λ",
}


def claim_lines(found: LaboratoryFindings) -> Iterator[str]:
    """What was measured on each claim, and how sure it is.

    Args:
        found: What is reported.
    """
    yield (
        "Each figure is a difference within one seed, whose arms share their examples, averaged over all merges that "
        "it is about, then over seeds, with its 95 % interval by Student's t. Where the interval is above 0, it held; "
        "below 0, the opposite was measured; else it is undecided. Of many such intervals about one in twenty misses. "
        "−PDR is the drop rate turned round: above 0, less is lost."
    )
    for claim in found.claims:
        yield from ("", f"### {claim.number}. {claim.text}: {claim.verdict}", "", _paragraph(claim))
        if claim.beside:
            yield from ("", "Beside that, and not counted:", "")
            yield from (f"- {_sentence(one)}" for one in claim.beside)
    yield from ("", "### How sure this is", "", _reach(found))


def _paragraph(claim: Claim) -> str:
    said = "Over all it is undecided." if claim.verdict == UNDECIDED else f"Over all it {verdict_text(claim)}."
    whole = ["It is held only where all of these are."] if claim.whole else []
    return " ".join([*(_sentence(one) for one in claim.comparisons), *whole, said])


def verdict_text(claim: Claim) -> str:
    """The verdict, and which comparisons held where not all did.

    Args:
        claim: The claim.
    """
    if claim.verdict != IN_PART:
        return claim.verdict
    same = len({one.measure for one in claim.comparisons}) == 1

    def names(held: bool) -> str:
        some = [one for one in claim.comparisons if (one.verdict == HELD) == held]
        return "; ".join(one.name if same else f"{one.name} ({_NOUNS[one.measure]})" for one in some)

    return f"{IN_PART}: {names(True)}. Not: {names(False)}"


def _sentence(one: Contrast) -> str:
    fair = " (at equal budget)" if one.fair else ""
    return f"{one.name[0].upper()}{one.name[1:]}{fair}: {_difference(one)}."


def _difference(one: Contrast) -> str:
    value = one.difference
    if value is None:
        return f"not measured, so {one.verdict}"
    scale, digits, unit = (100, 1, "points of") if one.measure in SHARES else (1, 3, "in")
    of = f"{_signed(scale * value.mean, digits)} {unit} {_NOUNS[one.measure]}"
    if value.low is None or value.high is None:
        return f"{of} (one seed, so no interval): {one.verdict}"
    span = f"{_signed(scale * value.low, digits)} to {_signed(scale * value.high, digits)}"
    return f"{of} (95 % interval {span}, {count_text(value.seeds, 'seed')}): {one.verdict}"


def _signed(value: float, digits: int) -> str:
    return f"{value:+.{digits}f}".replace("-", "−")


def _reach(found: LaboratoryFindings) -> str:
    seeds = count_text(len(found.seeds), "seed")
    parameters = (found.about.get("models") or {}).get("parameters")
    size = f"models of {parameters:,} parameters" if isinstance(parameters, int) else "tiny models"
    return (
        f"All intervals are over {seeds}, which vary the examples, the draws and DARE's masks. The models were trained "
        f"once, so that nothing here says how it would be with others; and these are {size}, learning small skills, so "
        "that nothing here says how it is with large ones. Equal weights and one draw cost no examination and the "
        "others do: only comparisons at equal budget say what drawing does that choosing does not. In task arithmetic "
        "equal weights sum to the number of experts and drawn ones to 1, so that part of that difference is one of "
        "scale." + _held_out(found) + _uneven(found)
    )


def _held_out(found: LaboratoryFindings) -> str:
    told = found.about.get("held_out")
    return f" What is held out: {str(told).rstrip('.')}." if told else ""


def _uneven(found: LaboratoryFindings) -> str:
    """Where the grid has not as many points as there are draws."""
    counts: dict[tuple[str, int], set[int]] = {}
    for arm, experts, count in found.cost.evaluations:
        counts.setdefault((arm, experts), set()).add(count)
    told = [
        f"{_counts(counts[TUNED, experts])} points against {_counts(draws)} draws for {experts} experts"
        for (arm, experts), draws in counts.items()
        if arm == M3 and counts.get((TUNED, experts), draws) != draws
    ]
    return f" The budgets of grid and draws differ, which favours the larger: {', '.join(told)}." if told else ""


def _counts(counts: Iterable[int]) -> str:
    return "/".join(map(str, sorted(counts)))
