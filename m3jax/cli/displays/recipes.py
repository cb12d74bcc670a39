"""What `m3jax merge --explain` and `m3jax recipe` say."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from m3jax.text import count_text, safe_text, table

if TYPE_CHECKING:
    from m3jax.recipe import Recipe
    from m3jax.streaming.explaining import Explanation, Runs, TensorGroup

_SHOWN_NAMES = 6
_SHOWN_DRAWS = 8


def explanation_lines(found: "Explanation", width: int | None = None, name: str | None = None) -> Iterator[str]:
    """A recipe as it is resolved, for people.

    Args:
        found: The explanation.
        width: Of the terminal.
        name: Of a document that others start from.
    """
    for each, within in found.intermediates.items():
        yield from explanation_lines(within, width, each)
        yield ""
    recipe = found.recipe
    if name is not None:
        yield f"{safe_text(name)}, from which others start"
    before = f", after {recipe.sparsify.method}" if recipe.sparsify is not None else ""
    yield f"{recipe.merge_method}{before}: {found.formula}"
    flags = [f"{key} {_said(value)}" for key, value in recipe.parameters.items() if isinstance(value, bool | str)]
    yield ", ".join([*flags, f"seed {recipe.seed}"])
    yield ""
    yield from table(["model", "role"], [[safe_text(each.model), each.role] for each in found.models], width, left=2)
    if found.drawn:
        yield ""
        rows = [[safe_text(group), *(f"{w:.6f}" for w in weights)] for group, weights in found.drawn.items()]
        yield from table(["drawn for", *_numbered(rows)], rows[:_SHOWN_DRAWS], width)
        if len(rows) > _SHOWN_DRAWS:
            yield f"… and {len(rows) - _SHOWN_DRAWS:,} more groups; --json has all"
    families: dict[Any, list[TensorGroup]] = {}
    for group in found.groups:  # those that differ in their layers and numbers alone are told together
        key = (group.treatment._replace(numbers=()), tuple(pattern for pattern, _ in group.names))
        families.setdefault(key, []).append(group)
    for family in families.values():
        yield ""
        yield from _family_lines(family)
    for left, why in found.left_out[:_SHOWN_NAMES]:
        yield ""
        yield f"left out: {safe_text(left)} ({safe_text(why)})"
    if len(found.left_out) > _SHOWN_NAMES:
        yield f"… and {len(found.left_out) - _SHOWN_NAMES:,} more are left out; --json has all"


def _numbered(rows: list[list[str]]) -> list[str]:
    return [str(number) for number in range(1, len(rows[0]))]


def _said(value: object) -> str:
    return {True: "true", False: "false"}.get(value, str(value)) if isinstance(value, bool) else str(value)


def _family_lines(family: "list[TensorGroup]") -> Iterator[str]:
    """Groups of tensors of the same names, treated alike but for numbers."""
    group, members = family[0], sum(each.members for each in family)
    told = group.treatment
    why = f", as it is {safe_text(told.why)}" if told.why else ""
    yield f"{count_text(members, 'tensor')} {told.what}{why}: written as {told.dtype}"
    names = group.names if len(family) == 1 else [(pattern, ()) for pattern, _ in group.names]
    for pattern, runs in names[:_SHOWN_NAMES]:
        yield f"  {_name(pattern, runs)}"
    if len(names) > _SHOWN_NAMES:
        yield f"  … and {len(names) - _SHOWN_NAMES:,} more names; --json has all"
    models = [_source(each.model, each.shift) for each in told.sources if each.role == "expert"]
    measured = [_source(each.model, each.shift) for each in told.sources if each.role == "statistics"]
    base = next((_source(each.model, each.shift) for each in told.sources if each.role == "base"), None)
    by = f", by the statistics {', '.join(measured)}" if measured else ""
    yield f"    of {', '.join(models)}{'' if base is None else f', over {base}'}{by}"
    for each in family:
        numbers = [f"{name} {_values(values)}" for name, values in each.treatment.numbers if values]
        blocks = dict.fromkeys(runs for _, runs in each.names)
        where = "" if len(family) == 1 else f"{' and '.join(map(_run_text, blocks))}: "
        if numbers:
            yield f"    {where}{'; '.join(numbers)}"
    if told.masks:
        keys = sum(len(each.keys) for each in family)
        other = "" if not keys else f", but for {count_text(keys, 'tensor')} (--json says which)"
        yield f"    masks are drawn from the seed and each tensor's own name{other}"


def _name(pattern: str, runs: "Runs") -> str:
    return safe_text(pattern.replace("*", f"{{{_run_text(runs)}}}", 1) if runs else pattern)


def _run_text(runs: "Runs") -> str:
    return ", ".join(f"{first}" if first == last else f"{first}..{last}" for first, last in runs)


def _source(model: str, shift: int) -> str:
    if not shift:
        return safe_text(model)
    return f"{safe_text(model)} (its layers {abs(shift)} {'further on' if shift > 0 else 'before'})"


def _values(values: tuple[float, ...]) -> str:
    return f"{values[0]:.6g}" if len(set(values)) == 1 else ", ".join(f"{value:.6g}" for value in values)


def check_json(recipe: "Recipe") -> dict[str, Any]:
    """A recipe that was read, as plain data."""
    return {"recipe": recipe.resolved(), "models": list(recipe.named_models), "notes": list(recipe.notes())}


def check_lines(recipe: "Recipe") -> Iterator[str]:
    """A recipe that was read."""
    documents = f", after {', '.join(str(each.name) for each in recipe.needed)}" if recipe.needed else ""
    yield f"{recipe.merge_method} of {', '.join(map(safe_text, recipe.named_models))}{safe_text(documents)}: reads well"
