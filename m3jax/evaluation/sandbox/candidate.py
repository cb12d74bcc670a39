"""The untrusted half of a sandbox: it runs the program and then does what the examiner asks of it.

It is told neither the tests nor where the verdict goes, so a program can pass only by returning right values.
"""

import operator
import sys
import types
from collections.abc import Callable
from typing import Any

from m3jax.evaluation.sandbox.wire import Channel, decode, encode

_MUTABLE = (list, dict, set, bytearray)
_MODULE_NAME = "solution"  # not __main__: a script's main block is not part of what is tested

_OPERATIONS: dict[str, Callable[..., Any]] = {
    "call": lambda target, args, kwargs: target(*args, **kwargs),
    "getattr": getattr,
    "setattr": setattr,
    "getitem": operator.getitem,
    "setitem": operator.setitem,
    "contains": operator.contains,
    "len": len,
    "iter": iter,
    "next": next,
    "str": str,
    "repr": repr,
    "bool": bool,
    "eq": lambda one, other: bool(one == other),
    "lt": lambda one, other: bool(one < other),
}


def _described(error: BaseException) -> list[str]:
    """The error's nearest built-in type and its message."""
    name = next(kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "builtins")
    try:
        return [name, f"{type(error).__name__}: {error}"[:2000]]
    except BaseException:
        return [name, type(error).__name__]


def _load(source: str) -> dict[str, Any]:
    module = types.ModuleType(_MODULE_NAME)
    sys.modules[_MODULE_NAME] = module
    exec(compile(source, "solution.py", "exec"), module.__dict__)
    return module.__dict__


def _changed(given: list[Any], args: list[Any], keep: Callable[[Any], int]) -> list[list[Any]]:
    """The arguments that the call changed in place: their places and what they hold now."""
    after = [(place, encode(arg, keep)) for place, arg in enumerate(args) if isinstance(arg, _MUTABLE)]
    return [[place, now] for place, now in after if now != given[place]]


def serve(source: str, channel: Channel) -> None:
    """Run the program, say which names it defined, and answer the examiner until it hangs up."""
    kept: list[Any] = []

    def keep(value: Any) -> int:
        kept.append(value)
        return len(kept) - 1

    try:
        names = _load(source)
        shown = {
            name: {"module": value.__name__} if isinstance(value, types.ModuleType) else {"value": encode(value, keep)}
            for name, value in list(names.items())
            if isinstance(name, str) and not (name.startswith("__") and name.endswith("__"))
        }
    except BaseException as error:
        channel.send({"error": _described(error)})
        return
    channel.send({"names": shown})
    while (message := channel.receive()) is not None:
        channel.send(_answer(message, kept, keep))


def _answer(message: dict[str, Any], kept: list[Any], keep: Callable[[Any], int]) -> dict[str, Any]:
    try:
        args = [decode(arg, kept.__getitem__) for arg in message["args"]]
        if message["operation"] != "call":
            return {"value": encode(_OPERATIONS[message["operation"]](*args), keep)}
        target, *rest = args
        kwargs = {name: decode(arg, kept.__getitem__) for name, arg in message["kwargs"].items()}
        value = _OPERATIONS["call"](target, rest, kwargs)
        return {"value": encode(value, keep), "changed": _changed(message["args"][1:], rest, keep)}
    except BaseException as error:
        return {"error": _described(error)}
