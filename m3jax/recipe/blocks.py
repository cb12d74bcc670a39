"""The blocks of parameters, read by what the catalogue says of the method, before the schema looks at the rest."""

from collections.abc import Mapping, Sequence
from typing import Any

from m3jax.methods.catalogue import SPARSIFIERS
from m3jax.methods.rows import MethodRow, SparsifierRow
from m3jax.recipe.settings import Place, RecipeError, Setting, nearest, read_parameters, read_setting
from m3jax.recipe.values import read_method, read_sparsifier

_OLD_DEFAULTS = {"scope": "tensor"}  # written into manifests for sparsifiers that have no such parameter


def weight_parameters(method: MethodRow) -> list[str]:
    """The parameters that give a method's weights, which mixup draws."""
    return [parameter.name for parameter in method.parameters if parameter.sets == "weights"]


def read_blocks(raw: dict[Any, Any]) -> dict[Any, Any]:
    """A recipe's mapping with every block of parameters read.

    Args:
      raw: in the one spelling of `from_dialect`.

    Raises:
      RecipeError: a parameter is unknown, or its value is not what it stands for.
    """
    try:
        row = read_method(raw.get("merge_method"))
    except RecipeError:
        return raw  # the schema says it at its place
    read: dict[Any, Any] = _read_holder(raw, row, ())
    if isinstance(raw.get("modules"), Mapping):
        read["modules"] = {name: _read_holder(part, row, ("modules", name)) for name, part in raw["modules"].items()}
    return read


def _read_holder(raw: Any, row: MethodRow, place: Place) -> Any:
    """A recipe, or one of its modules, with the blocks of its models and slices read."""
    if not isinstance(raw, Mapping):
        return raw
    read = dict(_read_entry(raw, row, place))
    if isinstance(raw.get("models"), list | tuple):
        read["models"] = [_read_entry(entry, row, (*place, "models", i)) for i, entry in enumerate(raw["models"])]
    if isinstance(raw.get("slices"), list | tuple):
        read["slices"] = [_read_slice(part, row, (*place, "slices", i)) for i, part in enumerate(raw["slices"])]
    return read


def _read_entry(entry: Any, row: MethodRow, place: Place) -> Any:
    if not isinstance(entry, Mapping) or "parameters" not in entry:
        return entry
    return {**entry, "parameters": read_parameters(entry["parameters"], row, (*place, "parameters"))}


def _read_slice(part: object, row: MethodRow, place: Place) -> object:
    part = _read_entry(part, row, place)
    if not isinstance(part, Mapping) or not isinstance(part.get("sources"), list | tuple):
        return part
    sources = [_read_entry(entry, row, (*place, "sources", i)) for i, entry in enumerate(part["sources"])]
    return {**part, "sources": sources}


def read_sparsify(raw: Mapping[Any, Any]) -> dict[str, object]:
    """The `sparsify` block with its parameters apart and read.

    Raises:
      RecipeError: the method or a key is unknown, a value is wrong, or one that is needed is missing.
    """
    given = {key: value for key, value in raw.items() if value is not None}
    if set(given) <= {"method", "target", "parameters"} and "parameters" in given:
        return given  # read already
    try:
        row = read_sparsifier(given.get("method"))
    except RecipeError as fault:
        raise RecipeError(str(fault) if "method" in given else "missing; add it", "method") from None
    known = {parameter.name: parameter for parameter in row.parameters}
    for key in set(given) - {"method", "target", *known}:
        if _OLD_DEFAULTS.get(key) != given[key]:
            raise RecipeError(_unknown(row, str(key), ("method", "target", *known)), str(key))
    parameters: dict[str, Setting] = {}
    for name, parameter in known.items():
        if name in given:
            parameters[name] = read_setting(given[name], (name,), parameter)
        elif parameter.default is None:
            raise RecipeError("missing; add it", name)
        else:
            parameters[name] = parameter.default
    for name, parameter in known.items():
        spans = parameter.whole is not None and parameters.get(parameter.whole[0]) == parameter.whole[1]
        if spans and not isinstance(parameters[name], float):
            raise RecipeError("one threshold for the whole model needs one density; write one number", name)
    return {**{key: given[key] for key in ("method", "target") if key in given}, "parameters": parameters}


def _unknown(row: SparsifierRow, key: str, known: Sequence[str]) -> str:
    """What to say of a key that a sparsifier has not."""
    others = [other.name for other in SPARSIFIERS if key in {parameter.name for parameter in other.parameters}]
    if others:
        return f"{row.name} has no {key}, which is for {', '.join(others)}; remove the key"
    return f"unknown key; {nearest(key, known)}"
