"""Merge methods and sparsifiers as people and programs read of them: what the catalogue says, without JAX."""

import difflib
import math
import re
import textwrap
from collections.abc import Iterator
from typing import Any, TypeAlias

from m3jax.errors import M3Error
from m3jax.methods import catalogue
from m3jax.methods.rows import MethodRow, Parameter, SparsifierRow

Described: TypeAlias = MethodRow | SparsifierRow

_WIDTH = 100  # where stdout is no terminal
_BASES = {
    "task_vectors": "a base model",
    "expert": "no base model",
    "optional": "a base model or none (with one, task vectors are merged)",
    "first": "no base model (one that is given is the first of the models)",
}
_WEIGHTINGS = {
    "each": "a weight for each expert, given or drawn by mixup",
    "position": "a position between the models, given or drawn by mixup",
    "none": "no weights",
}
_LEVELS = {"expert": "each expert and tensor", "tensor": "each tensor", "merge": "the merge"}
_SYMBOLS = (
    ("p", "the base"),
    ("xᵢ", "expert i"),
    ("δᵢ", "its task vector, xᵢ − p"),
    ("wᵢ", "the weight of expert i"),
    ("λ", "lambda"),
    ("n", "how many experts there are"),
    ("·a", "the first model"),
    ("·b", "the second model"),
    ("θ", "the angle between vectors"),
)


# --- what is known of a row ---------------------------------------------------------------------------------------


def explained(name: str) -> tuple[MethodRow | None, SparsifierRow | None]:
    """The method and the sparsifier of a name.

    Args:
        name: Of one or both of them.

    Raises:
        M3Error: There is neither, or the package that brings the method fails.
    """
    sparsifier = next((row for row in catalogue.SPARSIFIERS if row.name == name), None)
    if name in catalogue.names():
        return catalogue.method_row(name), sparsifier
    if sparsifier is None and name in catalogue.LEFT_OUT:
        raise M3Error(catalogue.LEFT_OUT[name])
    if sparsifier is None:
        known = [*catalogue.names(), *(row.name for row in catalogue.SPARSIFIERS)]
        close = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
        mend = f"did you mean {close[0]!r}?" if close else "m3jax methods lists them"
        raise M3Error(f"{name!r} is no merge method or sparsifier here: {mend}")
    return None, sparsifier


def _needs(row: MethodRow) -> list[str]:
    fewest, most = row.experts
    noun = "model" if row.base == "first" else "expert"
    if fewest == most:
        count = f"{fewest} {noun}{'' if fewest == 1 else 's'}"
    elif most is None:
        count = f"{fewest} {noun} or more" if fewest == 1 else f"{fewest} {noun}s or more"
    else:
        count = f"{fewest} to {most} {noun}s"
    measured = [f"{row.statistics} statistics of each"] if row.statistics else []
    return [_BASES[row.base], count, _WEIGHTINGS[row.weighting], *measured]


def _value(value: object) -> str:
    if value is None:
        return "must be given"
    return str(value).lower() if isinstance(value, bool) else str(value)


def range_text(parameter: Parameter) -> str:
    """Which values a parameter may have."""
    if parameter.only:
        return f"{_value(parameter.default)} only"
    if parameter.kind == "flag":
        return "true, false"
    if parameter.kind == "choice":
        return ", ".join(parameter.choices)
    low, high = parameter.low, parameter.high
    if math.isinf(low) and math.isinf(high):
        return "any number"
    if math.isinf(low) or math.isinf(high):
        return f"at most {high:g}" if math.isinf(low) else f"at least {low:g}"
    return f"{low:g} to {high:g}"


def level_text(parameter: Parameter, of_sparsifier: bool) -> str:
    """For what a parameter may have a value of its own; the block `sparsify` is not an expert's."""
    return _LEVELS["tensor" if of_sparsifier and parameter.level == "expert" else parameter.level]


def _help(parameter: Parameter) -> str:
    whole = parameter.whole
    return parameter.help if whole is None else f"{parameter.help}; one value for the merge with {': '.join(whole)}"


def example(row: Described) -> dict[str, Any]:
    """A recipe that uses a method or a sparsifier, as plain data.

    Args:
        row: Of the catalogue.
    """
    if isinstance(row, SparsifierRow):
        asked = {"method": row.name, **{p.name: _instance(p) for p in row.parameters if _shown(p)}}
        models = ["org/expert-a", "org/expert-b"]
        return {"merge_method": "task_arithmetic", "base_model": "org/base", "models": models, "sparsify": asked}
    fewest, most = row.experts
    count = min(max(2, fewest), max(2, fewest) if most is None else most)
    weights = [p for p in row.parameters if p.sets == "weights" and p.level == "expert"]
    names = [f"org/expert-{chr(ord('a') + i % 26)}" for i in range(count)]
    entries: list[Any] = list(names)
    if weights and row.weighting == "each":
        entries = [
            {"model": name, "parameters": {weights[0].name: share}}
            for name, share in zip(names, _shares(count), strict=True)
        ]
    if row.statistics:
        entries = [
            {**(entry if isinstance(entry, dict) else {"model": entry}), "statistics": f"{name}-{row.statistics}"}
            for entry, name in zip(entries, names, strict=True)
        ]
    recipe: dict[str, Any] = {"merge_method": row.name, "models": entries}
    if row.base == "task_vectors":
        recipe = {"merge_method": row.name, "base_model": "org/base", "models": entries}
    parameters = {p.name: _instance(p) for p in row.parameters if p not in weights and _shown(p)}
    return recipe | ({"parameters": parameters} if parameters else {})


def _shares(count: int) -> list[float]:
    """Unequal weights that sum to one."""
    total = count * (count + 1) // 2
    return [round((count - i) / total, 2) for i in range(count)]


def _shown(parameter: Parameter) -> bool:
    """Whether an example gives a parameter: one that must be given, or a share that does nothing by default."""
    return not parameter.only and (parameter.default is None or (parameter.kind == "number" and parameter.high == 1.0))


def _instance(parameter: Parameter) -> float | bool | str:
    if parameter.default is not None and parameter.default != parameter.high:
        return parameter.default
    if parameter.kind == "flag":
        return True
    if parameter.kind == "choice":
        return parameter.choices[0]
    bounds = [bound for bound in (parameter.low, parameter.high) if not math.isinf(bound)]
    return sum(bounds) / len(bounds) if bounds else 1.0


# --- for people ---------------------------------------------------------------------------------------------------


def methods_lines(width: int | None = None) -> Iterator[str]:
    """All methods and sparsifiers, then what is wrong with packages that bring some.

    Args:
        width: Longest line wanted.
    """
    problems = list(catalogue.clashes())
    yield "Methods (merge_method):"
    for row in catalogue.rows():
        if isinstance(row, M3Error):
            problems.append(str(row))
        else:
            yield ""
            yield from _entry(row, width)
    yield ""
    yield "Sparsifiers (sparsify.method):"
    for sparsifier in catalogue.SPARSIFIERS:
        yield ""
        yield from _entry(sparsifier, width)
    yield ""
    yield "m3jax methods NAME explains one."
    for problem in problems:
        yield f"note: {problem}"


def _entry(row: Described, width: int | None) -> Iterator[str]:
    yield from _wrapped(f"{row.name}: {row.summary}", "", "  ", width)
    defaults = [p.name if p.default is None else f"{p.name}={_value(p.default)}" for p in row.parameters if not p.only]
    yield from _field("parameters", ", ".join(defaults) or "none", width)
    if isinstance(row, MethodRow):
        yield from _field("needs", ", ".join(_needs(row)), width)
    yield from _field("paper", row.paper, width)
    if (origin := _origin_text(row)) is not None:
        yield from _field("package", origin, width)


def _origin_text(row: Described) -> str | None:
    origin = catalogue.origin_of(row.name) if isinstance(row, MethodRow) else None
    return None if origin is None else str(origin)


def _field(name: str, text: str, width: int | None) -> Iterator[str]:
    yield from _wrapped(text, f"  {name:<12}", " " * 14, width)


def _wrapped(text: str, first: str, others: str, width: int | None) -> Iterator[str]:
    room = max(width or _WIDTH, 40)
    yield from textwrap.wrap(
        text, room, initial_indent=first, subsequent_indent=others, break_long_words=False, break_on_hyphens=False
    )


def method_lines(name: str, width: int | None = None) -> Iterator[str]:
    """One name explained: the method and the sparsifier that it names.

    Args:
        name: As for `explained`.
        width: Longest line wanted.

    Raises:
        M3Error: As `explained`.
    """
    method, sparsifier = explained(name)
    if method is not None:
        yield from _explanation(method, width)
    if method is not None and sparsifier is not None:
        yield ""
        yield f"The sparsifier of this name (sparsify: {{method: {name}}}):"
        yield ""
    if sparsifier is not None:
        yield from _explanation(sparsifier, width)


def _explanation(row: Described, width: int | None) -> Iterator[str]:
    import yaml

    yield from _wrapped(f"{row.name}: {row.summary}", "", "  ", width)
    if isinstance(row, MethodRow):
        yield ""
        yield from _wrapped(f"merged = {row.formula}", "  ", "      ", width)
        told = [f"{symbol.strip('·')}: {meaning}" for symbol, meaning in _SYMBOLS if _has(row.formula, symbol)]
        yield from _wrapped("; ".join(told), "  ", "  ", width)
        yield ""
        yield from _field("needs", ", ".join(_needs(row)), width)
    else:
        yield ""
    yield from _field("paper", row.paper, width)
    if (origin := _origin_text(row)) is not None:
        yield from _field("package", origin, width)
    if row.parameters:
        yield ""
        yield from _parameters(row, width)
    yield ""
    yield "Example:"
    yield ""
    yield from textwrap.indent(yaml.safe_dump(example(row), sort_keys=False).rstrip(), "  ").splitlines()


def _has(formula: str, symbol: str) -> bool:
    """Whether a formula has a symbol; a Latin letter inside a word is none."""
    inside = r"[^\W\d_]" if symbol.isascii() else r"(?!)"
    return re.search(f"(?<!{inside}){re.escape(symbol)}(?!{inside})", formula) is not None


def _parameters(row: Described, width: int | None) -> Iterator[str]:
    head = ("parameter", "default", "range", "one value for")
    of_sparsifier = isinstance(row, SparsifierRow)
    rows = [(p.name, _value(p.default), range_text(p), level_text(p, of_sparsifier)) for p in row.parameters]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    helps = ["", *map(_help, row.parameters)]
    for cells, said in zip((head, *rows), helps, strict=True):
        yield "  " + "  ".join(cell.ljust(room) for cell, room in zip(cells, widths, strict=True)).rstrip()
        yield from _wrapped(said, "      ", "      ", width)


# --- for programs -------------------------------------------------------------------------------------------------


def methods_json() -> dict[str, Any]:
    """All methods and sparsifiers as plain data, and what is wrong with packages that bring some."""
    rows = list(catalogue.rows())
    return {
        "methods": [_plain(row) for row in rows if isinstance(row, MethodRow)],
        "sparsifiers": [_plain(row) for row in catalogue.SPARSIFIERS],
        "problems": [*catalogue.clashes(), *(str(row) for row in rows if isinstance(row, M3Error))],
    }


def method_json(name: str) -> dict[str, Any]:
    """One name explained, as plain data: the method and the sparsifier that it names, or null.

    Args:
        name: As for `explained`.

    Raises:
        M3Error: As `explained`.
    """
    method, sparsifier = explained(name)
    return {
        "name": name,
        "method": None if method is None else {**_plain(method), "example": example(method)},
        "sparsifier": None if sparsifier is None else {**_plain(sparsifier), "example": example(sparsifier)},
    }


def _plain(row: Described) -> dict[str, Any]:
    told: dict[str, Any] = {"name": row.name, "summary": row.summary}
    if isinstance(row, MethodRow):
        origin = catalogue.origin_of(row.name)
        told |= {
            "formula": row.formula,
            "base": row.base,
            "experts": list(row.experts),
            "weighting": row.weighting,
            "sparsifies": row.sparsifies,
            "statistics": row.statistics or None,
            "needs": _needs(row),
            "package": None if origin is None else origin._asdict(),
        }
    return told | {"paper": row.paper, "parameters": [_plain_parameter(p) for p in row.parameters]}


def _plain_parameter(parameter: Parameter) -> dict[str, Any]:
    return {
        "name": parameter.name,
        "help": parameter.help,
        "kind": parameter.kind,
        "default": parameter.default,
        "low": None if math.isinf(parameter.low) else parameter.low,
        "high": None if math.isinf(parameter.high) else parameter.high,
        "choices": list(parameter.choices),
        "level": parameter.level,
    }


# --- a merged model -----------------------------------------------------------------------------------------------


def merged_by_line(merged_by: dict[str, str] | None) -> Iterator[str]:
    """By which method of a package outside a model was merged, if it was."""
    if merged_by is not None:
        told = "merged by {method}, of the package {package} {version}".format(**merged_by)
        yield told if told.isprintable() else told.encode("unicode_escape").decode()
