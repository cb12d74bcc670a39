"""The trusted half of a sandbox: it runs the tests, and asks the program's process for what the program must compute.

Values come back as plain built-in data, so comparisons are Python's own whatever the program did to its `__eq__`, to
`assert` or to the builtins. A pass means: every test ran to its end here, and the program was asked at least once.
"""

import ast
import builtins
import importlib
import sys
from typing import Any, NoReturn

from m3jax.evaluation.sandbox.wire import Channel, MessageError, decode, encode


class Gone(BaseException):
    """The program's process ended, or answered nonsense; not an `Exception`, so that no test can swallow it."""


class RemoteError(Exception):
    """An error of the program that has no built-in type."""


class Conversation:
    """What the examiner knows of the program: its names, and the way to ask."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self.asked = 0
        self.gone = ""
        self.objects: dict[int, Remote] = {}

    def find(self, number: int) -> "Remote":
        """The stand-in for one of the program's objects."""
        return self.objects.setdefault(number, Remote(self, number))

    def leave(self, why: str) -> NoReturn:
        """The program is lost: remember it, whatever the tests do with the exception."""
        self.gone = why
        raise Gone(why)

    def receive(self) -> dict[str, Any]:
        """The program's next message."""
        try:
            message = self._channel.receive()
        except (MessageError, OSError, MemoryError) as error:
            self.leave(str(error) or type(error).__name__)
        if message is None:
            self.leave("the program ended before the tests did")
        return message

    def ask(self, operation: str, *args: Any, **kwargs: Any) -> Any:
        """Have the program's process do one operation; its value, or its error raised here."""
        if self.gone:
            raise Gone(self.gone)
        self.asked += 1
        message = {
            "operation": operation,
            "args": [encode(arg, _number) for arg in args],
            "kwargs": {name: encode(arg, _number) for name, arg in kwargs.items()},
        }
        try:
            self._channel.send(message)
        except OSError as error:
            self.leave(str(error))
        answer = self.receive()
        try:
            if "error" in answer:
                name, text = answer["error"]
                raise _error(str(name), str(text))
            for place, now in answer.get("changed", []):
                _replace(args[1 + int(place)], decode(now, self.find))
            return decode(answer["value"], self.find)
        except (MessageError, KeyError, TypeError, ValueError, IndexError) as error:
            if "error" in answer:
                raise
            self.leave(f"not an answer: {error}")


def _number(value: Any) -> int:
    if isinstance(value, Remote):
        return object.__getattribute__(value, "_number")  # type: ignore[no-any-return]
    raise TypeError(f"a test handed the program a {type(value).__name__}, which cannot travel")


def _error(name: str, text: str) -> Exception:
    kind = getattr(builtins, name, None)
    if not (isinstance(kind, type) and issubclass(kind, Exception)):
        return RemoteError(text)
    try:
        return kind(text)
    except TypeError:
        return RemoteError(text)


def _replace(holder: Any, now: Any) -> None:
    """Bring an argument to the state that the program left it in."""
    if isinstance(holder, list | bytearray):
        holder[:] = now
    elif isinstance(holder, dict | set):
        holder.clear()
        holder.update(now)


class Remote:
    """Stands for an object of the program: a function, a class, an instance, an iterator."""

    def __init__(self, conversation: Conversation, number: int) -> None:
        object.__setattr__(self, "_conversation", conversation)
        object.__setattr__(self, "_number", number)

    def _ask(self, operation: str, *args: Any, **kwargs: Any) -> Any:
        conversation: Conversation = object.__getattribute__(self, "_conversation")
        return conversation.ask(operation, self, *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Have the program call it."""
        return self._ask("call", *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return self._ask("getattr", name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._ask("setattr", name, value)

    def __getitem__(self, key: Any) -> Any:
        return self._ask("getitem", key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._ask("setitem", key, value)

    def __contains__(self, item: Any) -> bool:
        return bool(self._ask("contains", item))

    def __len__(self) -> int:
        return int(self._ask("len"))

    def __iter__(self) -> Any:
        return self._ask("iter")

    def __next__(self) -> Any:
        return self._ask("next")

    def __str__(self) -> str:
        return str(self._ask("str"))

    def __repr__(self) -> str:
        return str(self._ask("repr"))

    def __bool__(self) -> bool:
        return bool(self._ask("bool"))

    def __eq__(self, other: object) -> bool:
        # Against plain data the program's own __eq__ has no say: it could always claim equality.
        return isinstance(other, Remote) and bool(self._ask("eq", other))

    def __lt__(self, other: object) -> bool:
        return bool(self._ask("lt", other)) if isinstance(other, Remote) else NotImplemented

    __hash__ = object.__hash__


def _wanted(tests: str, defined: set[str]) -> set[str]:
    """The program's names that the tests use.

    A name that is also a builtin's is taken from the program only where the tests use nothing else of it: a program
    may be asked for a function called `sum`, but must not slip its own `abs` under a test.
    """
    used = {node.id for node in ast.walk(ast.parse(tests)) if isinstance(node, ast.Name)} & defined
    own = {name for name in used if not hasattr(builtins, name)}
    return own or used


def _namespace(tests: str, conversation: Conversation, names: dict[str, Any]) -> dict[str, Any]:
    namespace: dict[str, Any] = {"__name__": "tests"}
    for name in _wanted(tests, set(names)):
        shown = names[name]
        if "module" not in shown:
            namespace[name] = decode(shown["value"], conversation.find)
        elif shown["module"].partition(".")[0] in sys.stdlib_module_names:
            namespace[name] = importlib.import_module(shown["module"])  # ours, not the one the program may have patched
    return namespace


def examine(tests: str, channel: Channel) -> dict[str, Any]:
    """Run the tests against the program behind the channel.

    Returns:
        `reason` ("passed", or why not) and `detail`.
    """
    conversation = Conversation(channel)
    try:
        loaded = conversation.receive()
        if "error" in loaded:
            return {"reason": "error", "detail": str(loaded["error"][1])}
        code = compile(tests, "tests.py", "exec")
        exec(code, _namespace(tests, conversation, loaded["names"]))
    except Gone as error:
        return {"reason": "died", "detail": str(error)}
    except BaseException as error:
        if conversation.gone:
            return {"reason": "died", "detail": conversation.gone}
        return {"reason": "failed", "detail": _explained(error, tests)}
    if conversation.gone:
        return {"reason": "died", "detail": conversation.gone}
    if conversation.asked == 0:
        return {"reason": "untested", "detail": "the tests never used the program"}
    return {"reason": "passed", "detail": ""}


def _explained(error: BaseException, tests: str) -> str:
    """The error and the line of the tests where it arose."""
    line = None
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "tests.py":
            line = trace.tb_lineno
        trace = trace.tb_next
    lines = tests.splitlines()
    where = f" at: {lines[line - 1].strip()[:300]}" if line is not None and 0 < line <= len(lines) else ""
    message = str(error)[:1000]
    return type(error).__name__ + (f": {message}" if message else "") + where
