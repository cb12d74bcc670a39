"""Methods and sparsifiers made from rows of the catalogue and a recipe's parameters."""

import importlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from m3jax.errors import M3Error
from m3jax.methods import catalogue
from m3jax.methods.rows import MethodRow, Parameter, arguments

if TYPE_CHECKING:
    from m3jax.methods.base import Method, Sparsifier

_Made = TypeVar("_Made")


def _factory(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


def _made(place: str, parameters: tuple[Parameter, ...], owner: str, values: Mapping[str, Any], **more: Any) -> Any:
    given = {argument: values[name] for argument, name in arguments(parameters, owner, "merge").items()}
    defaults = {parameter.name: parameter.default for parameter in parameters}
    # Each leaf has its own: what the factory gets is what nobody asks for.
    leaf = {a: 1.0 if defaults[n] is None else defaults[n] for a, n in arguments(parameters, owner, "leaf").items()}
    return _factory(place)(**leaf, **given, **more)


def _made_outside(row: MethodRow, make: Callable[[], _Made]) -> _Made:
    """What a factory makes; where a package outside brings it, its faults are told as its own.

    Raises:
        M3Error: The factory refuses its arguments, or it is one of a package outside and fails.
    """
    if catalogue.origin_of(row.name) is None:
        return make()
    try:
        return make()
    except M3Error:
        raise
    except Exception as error:  # whatever a package outside raises
        raise M3Error(
            f"{catalogue.said_of(row.name)} cannot be made ({catalogue.told_of(error)}): mend or remove it"
        ) from error


def make_method(row: MethodRow, values: Mapping[str, Any], has_base: bool = False) -> "Method":
    """The method of a row; what may differ between tensors is in each leaf's settings.

    Args:
        row: Of `method_row`.
        values: The parameters of the whole merge, by name.
        has_base: Whether there is a base, for methods that can do without.

    Raises:
        M3Error: A parameter is out of range; or a package outside brings the method, and what it makes is no method or
            is not what its row says.
    """
    more = dict(row.fixed) | ({"task_vectors": has_base} if row.base == "optional" else {})
    method: Method = _made_outside(row, lambda: _made(row.method, row.parameters, "method", values, **more))
    if catalogue.origin_of(row.name) is not None:
        _check_outside(row, method, has_base)
    return method


def _check_outside(row: MethodRow, method: Any, has_base: bool) -> None:
    """Raise M3Error unless a method is what its row says: recipes are read by the row alone."""
    from m3jax.methods.base import Method

    said = catalogue.said_of(row.name)
    _check_made(row, method, Method, "method")
    told = {
        "weighting": (row.weighting, method.weighting),
        "experts": (tuple(row.experts), tuple(method.experts)),
        "base": (row.base == "task_vectors" or (row.base == "optional" and has_base), method.uses_base),
        "sparsifies": (row.sparsifies, method.sparsifies),
        "statistics": (row.statistics, method.statistics),
    }
    odd = next((field for field, (asked, made) in told.items() if asked != made), None)
    if odd is not None:
        raise M3Error(f"{said}: its row and the method that it makes say different things of {odd}: mend or remove it")


def _check_made(row: MethodRow, made: Any, kind: type, owner: str) -> None:
    """Raise M3Error unless what a factory of a package outside made can be used, with the parameters of its row."""
    said = catalogue.said_of(row.name)
    if not isinstance(made, kind):
        raise M3Error(f"{said} makes a {type(made).__name__} where a {kind.__name__} is wanted: mend or remove it")
    asked = sorted(arguments(row.parameters, owner, "leaf"))
    if asked != sorted(dict(made.parameters)):  # type: ignore[attr-defined]
        raise M3Error(
            f"{said}: its row and the {owner} that it makes say different things of parameters: mend or remove it"
        )
    try:
        hash(made)
    except TypeError as error:
        raise M3Error(f"{said} cannot be hashed ({error}), so no program is compiled for it: mend it") from error


def make_sparsifier(
    place: str, parameters: tuple[Parameter, ...], values: Mapping[str, Any], target: str = "delta"
) -> "Sparsifier":
    """The sparsifier of a row.

    Args:
        place: Its factory.
        parameters: Of the row.
        values: The parameters of the whole merge, by name.
        target: What it drops entries of.
    """
    sparsifier: Sparsifier = _made(place, parameters, "sparsifier", values, target=target)
    return sparsifier


def make_own_sparsifier(row: MethodRow, values: Mapping[str, Any]) -> "Sparsifier | None":
    """The sparsifier that a method always has, if any.

    Args:
        row: Of `method_row`.
        values: The parameters of the whole merge, by name.

    Raises:
        M3Error: As `make_method`.
    """
    from m3jax.methods.base import Sparsifier

    place = row.sparsifier
    if place is None:
        return None
    sparsifier = _made_outside(row, lambda: make_sparsifier(place, row.parameters, values))
    if catalogue.origin_of(row.name) is not None:
        _check_made(row, sparsifier, Sparsifier, "sparsifier")
    return sparsifier
