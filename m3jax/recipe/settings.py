"""Parameter settings: one number, a gradient over layers, or values chosen by tensor name."""

import difflib
import math
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

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


Setting: TypeAlias = float | bool | str | tuple[float, ...] | tuple[Filtered, ...]


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


def covers(setting: Setting) -> bool:
    """Whether a setting has a value for every tensor."""
    if not isinstance(setting, tuple) or not _filters(setting):
        return True
    return any(entry.filter in (None, "*") and covers(entry.value) for entry in _filters(setting))


def plain(setting: Setting) -> object:
    """A setting in the words of YAML and JSON."""
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
    if isinstance(raw, Mapping | Filtered):
        raise RecipeError("a filter stands in a list; put '- ' before it", *place)
    if not isinstance(raw, list | tuple):
        return number(raw, place, low, high)
    if not raw:
        raise RecipeError("the list is empty; write a number or a list of numbers", *place)
    if any(isinstance(entry, Mapping | Filtered) for entry in raw):
        return tuple(_read_filter(entry, (*place, i), low, high) for i, entry in enumerate(raw))
    return tuple(number(entry, (*place, i), low, high) for i, entry in enumerate(raw))


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


def read_number_setting(raw: object, place: Place = ()) -> Setting:
    """Reads a setting of finite numbers."""
    return _read_numbers(raw, place, -math.inf, math.inf)


def read_share_setting(raw: object, place: Place = ()) -> Setting:
    """Reads a setting of numbers in [0, 1]."""
    return _read_numbers(raw, place, 0.0, 1.0)


def _read_flag(raw: object, place: Place) -> Setting:
    # 0 and 1 too: mergekit writes `normalize: 1.0` into the files it saves
    if isinstance(raw, bool | int | float) and raw in (0, 1):
        return bool(raw)
    raise RecipeError(f"{reprlib.repr(raw)} is not true or false; it is one switch for the whole merge", *place)


def _one_of(*choices: str) -> Callable[[object, Place], Setting]:
    def read(raw: object, place: Place) -> Setting:
        if raw not in choices:
            raise RecipeError(f"{reprlib.repr(raw)} is not one of {', '.join(choices)}; write one of them", *place)
        return str(raw)

    return read


READERS: dict[str, Callable[[object, Place], Setting]] = {
    "weight": read_number_setting,
    "density": read_share_setting,
    "trim_density": read_share_setting,
    "t": read_share_setting,
    "lambda": read_number_setting,
    "normalize": _read_flag,
    "rescale": _read_flag,
    "trim_scope": _one_of("tensor", "model"),
    "sign_election": _one_of("weighted", "unweighted"),
    "int8_mask": _read_flag,
}


def read_parameters(raw: object) -> dict[str, Setting]:
    """Reads a block of parameters, whatever the method.

    Raises:
      RecipeError: the block is no mapping, a name is unknown, or a value is not what the name stands for.
    """
    if raw is None:
        return {}
    if not isinstance(raw, Mapping):
        raise RecipeError(f"{reprlib.repr(raw)} is not a mapping; write 'name: value' lines")
    for name in raw:
        if name not in READERS:
            raise RecipeError(f"unknown parameter; {nearest(str(name), READERS)}", str(name))
    return {name: READERS[name](value, (name,)) for name, value in raw.items() if value is not None}


_GLOBAL: dict[str, Setting] = {"weight": 1.0, "normalize": False, "lambda": 1.0}
_ELECTION: dict[str, Setting] = {"trim_scope": "tensor", "sign_election": "weighted"}

# Each method's parameters and what they are when nobody says; `t` has no default, as in mergekit.
DEFAULTS: dict[str, dict[str, Setting]] = {
    "linear": {"weight": 1.0, "normalize": True},
    "task_arithmetic": _GLOBAL,
    "ties": {**_GLOBAL, "normalize": True, "density": 1.0, "rescale": False, **_ELECTION},
    "dare_linear": {**_GLOBAL, "density": 1.0, "rescale": True},
    "dare_ties": {**_GLOBAL, "density": 1.0, "rescale": True, "trim_density": 1.0, **_ELECTION},
    "slerp": {},
}
# mergekit lets a method ignore what only others use, so files with such lines run here too, with a note.
MERGEKITS = ("weight", "density", "t", "lambda", "normalize", "rescale", "int8_mask")
PER_MODEL = ("weight", "density", "trim_density")
PER_SLICE = (*PER_MODEL, "lambda", "t")


def known_parameters(method: str) -> tuple[str, ...]:
    """The names that a method's `parameters` may have."""
    return (*DEFAULTS[method], *(("t",) if method == "slerp" else ()), "int8_mask")


def dotted(place: Sequence[str | int]) -> str:
    """A place as users type it: `models.0.parameters.weight`."""
    return ".".join(map(str, place))
