"""What a row of the catalogue is: a method or sparsifier as recipes know it; plain data, without JAX."""

from collections import Counter
from typing import Any, NamedTuple


class Parameter(NamedTuple):
    """One parameter of a method or sparsifier, as recipes give it.

    Attributes:
        name: In recipes.
        sets: What it sets: "weights", "scale", "method.ARGUMENT" or "sparsifier.ARGUMENT" (an argument of the
            factory).
        help: What it is, in a few words.
        default: Its value when nobody says; None if it must be given.
        kind: "number", "flag" or "choice".
        low: The smallest number.
        high: The largest number.
        choices: Of a choice.
        level: Where it may vary: "expert" (and tensor), "tensor", or "merge" (the same in the whole merge).
        whole: (parameter, value): where that parameter has that value, this one is one number for the merge.
        only: Why it can have no value but its default.
        note: What a reader who knows mergekit should be told where the flag is set.
        mergekit: Whether mergekit has it; methods that do not use it then ignore it, with a note.
    """

    name: str
    sets: str
    help: str
    default: float | bool | str | None
    kind: str = "number"
    low: float = -float("inf")
    high: float = float("inf")
    choices: tuple[str, ...] = ()
    level: str = "merge"
    whole: tuple[str, str] | None = None
    only: str = ""
    note: str = ""
    mergekit: bool = True


class MethodRow(NamedTuple):
    """One merge method, as recipes call it.

    Attributes:
        name: `merge_method` in recipes.
        method: Its factory, "module:function", imported when it is used.
        summary: What it does, in one line.
        formula: The merged parameter.
        paper: Where it comes from: authors, title, year, arXiv number.
        parameters: In the order in which they are shown.
        sparsifier: The factory of the sparsifier that it always has, if any.
        base: "task_vectors": differences from the base are merged; "expert": a base among the models is one of them;
            "first": the base is the first expert; "optional": task vectors where there is a base, else the experts
            themselves: its factory takes `task_vectors`.
        experts: The fewest and the most experts; None for any number.
        weighting: As `Method.weighting`.
        without: The method that is the same without the sparsifier.
        sparsifies: Whether recipes may put a sparsifier before it.
        fixed: Arguments of the factory that no parameter sets.
        statistics: As `Method.statistics`.
    """

    name: str
    method: str
    summary: str
    formula: str
    paper: str
    parameters: tuple[Parameter, ...]
    sparsifier: str | None = None
    base: str = "task_vectors"
    experts: tuple[int, int | None] = (1, None)
    weighting: str = "each"
    without: str = ""
    sparsifies: bool = True
    fixed: tuple[tuple[str, Any], ...] = ()
    statistics: str = ""


class SparsifierRow(NamedTuple):
    """One sparsifier, as the `sparsify` block of recipes calls it.

    Attributes:
        name: `sparsify.method` in recipes.
        sparsifier: Its factory, "module:function".
        summary: What it does, in one line.
        paper: Where it comes from.
        parameters: Its own, beside `target`.
        random: Whether it drops entries at random.
    """

    name: str
    sparsifier: str
    summary: str
    paper: str
    parameters: tuple[Parameter, ...]
    random: bool = False


def arguments(parameters: tuple[Parameter, ...], owner: str, level: str) -> dict[str, str]:
    """The arguments of a factory that parameters of one level set: parameter names by argument.

    Args:
        parameters: Of a row.
        owner: "method" or "sparsifier".
        level: "merge", or "leaf" for those that may differ between tensors.
    """
    found = {}
    for parameter in parameters:
        whose, _, argument = parameter.sets.partition(".")
        if whose == owner and argument and (parameter.level == "merge") == (level == "merge"):
            found[argument] = parameter.name
    return found


# --- rows that packages outside give ---------------------------------------------------------------------------------


def as_read(parameter: Parameter) -> Parameter:
    """A parameter whose default is what a recipe that gives it reads, so that a replay's is the same."""
    number = parameter.kind == "number" and parameter.default is not None
    return parameter._replace(default=float(parameter.default)) if number else parameter  # type: ignore[arg-type]


_KINDS, _LEVELS = ("number", "flag", "choice"), ("expert", "tensor", "merge")
_BASES, _WEIGHTINGS = ("task_vectors", "expert", "first", "optional"), ("each", "position", "none")


def fault_of(row: MethodRow) -> str:
    """What is wrong with a row that a package outside gives; empty if nothing is."""
    texts = (row.method, row.summary, row.formula, row.paper, row.without, row.sparsifier or "", row.statistics)
    if not all(isinstance(text, str) for text in texts):
        return "method, summary, formula, paper, without, sparsifier and statistics are texts"
    if not all(isinstance(parameter, Parameter) for parameter in row.parameters):
        return "parameters holds something that is no Parameter"
    for field, value, known in (("base", row.base, _BASES), ("weighting", row.weighting, _WEIGHTINGS)):
        if value not in known:
            return f"{field} is {value!r}, not one of {', '.join(known)}"
    for parameter in row.parameters:
        if fault := _parameter_fault(parameter):
            return f"the parameter {parameter.name}: {fault}"
    twice = [name for name, count in Counter(parameter.name for parameter in row.parameters).items() if count > 1]
    if twice:
        return f"the parameter {twice[0]} is there twice"
    sets = Counter(parameter.sets.partition(".")[0] for parameter in row.parameters)
    wanted = 0 if row.weighting == "none" else 1
    if sets["weights"] != wanted:
        return f"{sets['weights']} parameters set the weights, where weighting {row.weighting!r} needs {wanted}"
    if sets["scale"] > 1:
        return "several parameters set the scale"
    if sets["sparsifier"] and row.sparsifier is None:
        return "parameters are a sparsifier's, but there is none"
    return ""


def _parameter_fault(parameter: Parameter) -> str:
    whose, _, argument = parameter.sets.partition(".")
    for field, value, known in (("kind", parameter.kind, _KINDS), ("level", parameter.level, _LEVELS)):
        if value not in known:
            return f"{field} is {value!r}, not one of {', '.join(known)}"
    if parameter.sets not in ("weights", "scale", "") and not (whose in ("method", "sparsifier") and argument):
        return f"sets is {parameter.sets!r}, not weights, scale, method.ARGUMENT or sparsifier.ARGUMENT"
    if parameter.kind != "number" and parameter.level != "merge":
        return f"a {parameter.kind} is the same in the whole merge, so its level is merge"
    if parameter.sets in ("weights", "scale") and parameter.level == "merge":
        return f"{parameter.sets} may vary between tensors, so its level is tensor or expert"
    default = parameter.default
    fits = {
        "number": isinstance(default, int | float) and not isinstance(default, bool),
        "flag": isinstance(default, bool),
        "choice": default in parameter.choices,
    }
    if default is None:
        return ""
    if not fits[parameter.kind]:
        return f"the default {default!r} is no {parameter.kind}"
    inside = parameter.kind != "number" or parameter.low <= float(default) <= parameter.high
    return "" if inside else f"the default {default!r} is outside [{parameter.low:g}, {parameter.high:g}]"
