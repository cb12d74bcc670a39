"""Parameter settings: one number, a gradient over layers, or values chosen by tensor name."""

import difflib
import functools
import math
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from m3jax.methods import catalogue
from m3jax.methods.rows import MethodRow, Parameter
from m3jax.recipe.formulas import NAMES, Formula, split_formula

Place: TypeAlias = tuple[str | int, ...]


class RecipeError(ValueError):
    """Something wrong at a place of the recipe; becomes the sentence that the user reads."""

    def __init__(self, message: str, *place: str | int) -> None:
        super().__init__(message)
        self.place: Place = place


@dataclass(frozen=True)
class Filtered:
    """A setting for the tensors whose name contains `filter`; None and "*" stand for every tensor."""

    filter: str | None
    value: "Setting"

    def matches(self, tensor_name: str) -> bool:
        """Whether the setting is meant for this tensor."""
        return self.filter in (None, "*") or str(self.filter) in tensor_name


Setting: TypeAlias = float | bool | str | Formula | tuple[float, ...] | tuple[Filtered, ...]


def _filters(setting: tuple[float, ...] | tuple[Filtered, ...]) -> list[Filtered]:
    return [entry for entry in setting if isinstance(entry, Filtered)]


def _points(setting: tuple[float, ...] | tuple[Filtered, ...]) -> list[float]:
    return [entry for entry in setting if not isinstance(entry, Filtered)]


def evaluate(setting: Setting, tensor_name: str, t: float) -> float | bool | str | None:
    """What a setting says for one tensor.

    A gradient is piecewise linear over `t`, with its points spread evenly over [0, 1]. Of a list of filters,
    the first that matches decides.

    Args:
      setting: a parsed setting.
      tensor_name: the name that filters look into.
      t: the tensor's position in the model, see `layer_position`.

    Returns:
      The value, or None where no filter matches.

    Example:
      >>> evaluate((0.0, 1.0, 0.5), "model.norm.weight", 0.75)
      0.75
      >>> evaluate((Filtered("mlp", 0.2), Filtered(None, 0.9)), "layers.0.mlp.up", 0.0)
      0.2
    """
    if isinstance(setting, Formula):
        return setting.at(t)
    if not isinstance(setting, tuple):
        return setting
    if filters := _filters(setting):
        value = next((entry.value for entry in filters if entry.matches(tensor_name)), None)
        return None if value is None else evaluate(value, tensor_name, t)
    points = _points(setting)
    scaled = min(max(t, 0.0), 1.0) * (len(points) - 1)
    left = int(scaled)
    right = min(left + 1, len(points) - 1)
    part = scaled - left
    return (1.0 - part) * points[left] + part * points[right]


def is_gradient(setting: Setting) -> bool:
    """Whether a setting has a formula or a list of several points, which are read at a tensor's layer."""
    if isinstance(setting, Formula):
        return True
    if not isinstance(setting, tuple):
        return False
    if filters := _filters(setting):
        return any(is_gradient(entry.value) for entry in filters)
    return len(setting) > 1


def covers(setting: Setting) -> bool:
    """Whether a setting has a value for every tensor."""
    if not isinstance(setting, tuple) or not _filters(setting):
        return True
    return any(entry.filter in (None, "*") and covers(entry.value) for entry in _filters(setting))


def plain(setting: Setting) -> object:
    """A setting in the words of YAML and JSON."""
    if isinstance(setting, Formula):
        return str(setting)
    if not isinstance(setting, tuple):
        return setting
    if filters := _filters(setting):
        return [{"filter": entry.filter, "value": plain(entry.value)} for entry in filters]
    return list(_points(setting))


def plain_parameters(parameters: Mapping[str, Setting]) -> dict[str, object]:
    """A block of parameters in the words of YAML and JSON."""
    return {name: plain(setting) for name, setting in parameters.items()}


def nearest(word: str, known: Iterable[str]) -> str:
    """The mend for a word that is not known: the nearest one that is, or all of them.

    Example:
      >>> nearest("wieght", ["weight", "density"])
      "did you mean 'weight'?"
    """
    known = list(known)
    close = difflib.get_close_matches(word.lower(), known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}"


def number(raw: object, place: Place, low: float = -math.inf, high: float = math.inf) -> float:
    """Reads one finite number in [low, high], also from text ("1e-3" is text to YAML 1.1).

    Raises:
      RecipeError: it is not a number (booleans are none), not finite, or out of range.
    """
    try:
        if isinstance(raw, bool) or not isinstance(raw, int | float | str):
            raise ValueError
        value = float(raw)
    except (ValueError, OverflowError):
        raise RecipeError(f"{reprlib.repr(raw)} is not a number; write one such as 0.5", *place) from None
    if not math.isfinite(value):
        raise RecipeError(f"{value} is not finite; write a finite number", *place)
    if not low <= value <= high:
        raise RecipeError(f"{value:g} is outside [{low:g}, {high:g}]; write a number inside", *place)
    return value


def _read_numbers(raw: object, place: Place, low: float, high: float) -> Setting:
    if isinstance(raw, Mapping | Filtered):  # one filter by itself, as mergekit reads it too
        return (_read_filter(raw, place, low, high),)
    if isinstance(raw, Formula) or (isinstance(raw, str) and split_formula(raw) is not None):
        return _read_formula(str(raw), place, low, high)
    if not isinstance(raw, list | tuple):
        return number(raw, place, low, high)
    if not raw:
        raise RecipeError("the list is empty; write a number or a list of numbers", *place)
    if any(isinstance(entry, Mapping | Filtered) for entry in raw):
        return tuple(_read_filter(entry, (*place, i), low, high) for i, entry in enumerate(raw))
    return tuple(number(entry, (*place, i), low, high) for i, entry in enumerate(raw))


def _read_formula(raw: str, place: Place, low: float, high: float) -> Formula:
    name, ends = split_formula(raw) or ("", [])
    if name not in NAMES:
        raise RecipeError(f"{name} is no formula; {nearest(name, NAMES)}", *place)
    if len(ends) != 2:
        raise RecipeError(f"{raw} has not two numbers; write such as {name}(0, 1)", *place)
    first, last = (number(end, place, low, high) for end in ends)
    return Formula(name, first, last)


def _read_filter(raw: object, place: Place, low: float, high: float) -> Filtered:
    if isinstance(raw, Filtered):
        raw = {"filter": raw.filter, "value": raw.value}
    if not isinstance(raw, Mapping):
        raise RecipeError(f"{reprlib.repr(raw)} stands among filters; write it as 'value: ...'", *place)
    for key in raw:
        if key not in ("filter", "value"):
            raise RecipeError(f"unknown key; {nearest(str(key), ('filter', 'value'))}", *place, str(key))
    if raw.get("value") is None:
        raise RecipeError("the filter has no value; add 'value: ...'", *place)
    pattern = raw.get("filter")
    if pattern is not None and not isinstance(pattern, str):
        raise RecipeError(f"{reprlib.repr(pattern)} is not text; quote it", *place, "filter")
    return Filtered(pattern, _read_numbers(raw["value"], (*place, "value"), low, high))


def _read_flag(raw: object, place: Place) -> Setting:
    # 0 and 1 too: mergekit writes `normalize: 1.0` into the files it saves
    if isinstance(raw, bool | int | float) and raw in (0, 1):
        return bool(raw)
    raise RecipeError(f"{reprlib.repr(raw)} is not true or false; it is one switch for the whole merge", *place)


def _read_choice(raw: object, place: Place, choices: Sequence[str]) -> Setting:
    if raw not in choices:
        raise RecipeError(f"{reprlib.repr(raw)} is not one of {', '.join(choices)}; write one of them", *place)
    return str(raw)


def read_setting(raw: object, place: Place, parameter: Parameter) -> Setting:
    """Reads what a recipe says of one parameter.

    Args:
      raw: what is written there.
      place: where it is written.
      parameter: the catalogue's.

    Raises:
      RecipeError: it is not what the parameter stands for.
    """
    if parameter.kind == "flag":
        return _read_flag(raw, place)
    if parameter.kind == "choice":
        return _read_choice(raw, place, parameter.choices)
    if parameter.level == "merge":
        return number(raw, place, parameter.low, parameter.high)
    return _read_numbers(raw, place, parameter.low, parameter.high)


def parameters_of(method: MethodRow) -> dict[str, Parameter]:
    """The parameters that a recipe of a method may have, by name."""
    return {parameter.name: parameter for parameter in (*method.parameters, catalogue.IGNORED)}


@functools.cache
def _all_parameters() -> dict[str, Parameter]:
    """The parameters of all of our methods; where some share a name, the one that reads most."""
    rows = [parameter for row in catalogue.METHODS for parameter in row.parameters]
    return {parameter.name: parameter for parameter in (catalogue.IGNORED, *rows)}


def mergekits(name: str) -> bool:
    """Whether a parameter is one of mergekit's, which lets methods ignore what only others use."""
    parameter = _all_parameters().get(name)
    return parameter is not None and parameter.mergekit


def users_of(name: str) -> list[str]:
    """The methods that have a parameter, those of packages outside too."""
    rows = (row for row in catalogue.rows() if isinstance(row, MethodRow))
    return [row.name for row in rows if name in {parameter.name for parameter in row.parameters}]


def read_parameters(raw: object, method: MethodRow, place: Place = ()) -> dict[str, Setting]:
    """Reads a block of parameters; those of other methods too, so that later checks can say whose they are.

    Raises:
      RecipeError: the block is no mapping, a name is unknown, or a value is not what the name stands for.
    """
    if raw is None:
        return {}
    if not isinstance(raw, Mapping):
        raise RecipeError(f"{reprlib.repr(raw)} is not a mapping; write 'name: value' lines", *place)
    known = {**_all_parameters(), **parameters_of(method)}
    for name in raw:
        if name not in known:
            raise RecipeError(_unknown(str(name), method, known), *place, str(name))
    return {name: read_setting(value, (*place, name), known[name]) for name, value in raw.items() if value is not None}


def _unknown(name: str, method: MethodRow, known: Mapping[str, Parameter]) -> str:
    """What to say of a parameter that neither a method nor one of our own has."""
    users = ", ".join(users_of(name))
    if users:  # of packages outside
        return f"{method.name} does not use it, {users} does; remove it or change the method"
    own = parameters_of(method)
    close = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
    if close and close[0] not in own:
        return f"unknown parameter; did you mean {close[0]!r}, which is for {', '.join(users_of(close[0]))}?"
    return f"unknown parameter; {nearest(name, own)}"


def defaults_of(method: MethodRow) -> dict[str, Setting]:
    """What a method's parameters are when nobody says; those without a default must be given."""
    return {parameter.name: parameter.default for parameter in method.parameters if parameter.default is not None}


def dotted(place: Sequence[str | int]) -> str:
    """A place as users type it: `models.0.parameters.weight`."""
    return ".".join(map(str, place))
