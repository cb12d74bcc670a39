"""Every call that opens or reads a file fails, or gives less than was asked: what a command makes of it.

What fails once may be asked for again or be done without, if the output is right all the same; else the command says so
and leaves nothing, or what was there before.
"""

import builtins
import errno
import io
import os
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

from support.faults import place_of

OPENING = ("open", "scandir", "listdir")
ASKING = ("stat", "lstat", "readlink")
READING = ("read", "pread", "preadv")
KINDS: dict[str, tuple[str, ...]] = {
    "EIO": (*OPENING, *ASKING, *READING),
    "ESTALE": (*OPENING, *ASKING, *READING),
    "EACCES": (*OPENING, *ASKING),
    "EMFILE": OPENING,
    "ENFILE": OPENING,
    "short": READING,
}
"""Of each fault the calls that it is of; the last gives half of what was asked."""


class ReadFaults:
    """Counts the calls that read what is below directories; the one of a number fails.

    Attributes:
        calls: What was called so far.
    """

    def __init__(self, roots: tuple[Path, ...], at: int, kind: str) -> None:
        self._roots, self._at, self._kind = tuple(map(str, roots)), at, kind
        self.calls: list[str] = []
        self._lock = threading.RLock()
        self._stack = ExitStack()

    def __enter__(self) -> "ReadFaults":
        for name in (*OPENING[1:], *ASKING, *READING):
            self._patch(os, name)
        self._patch(os, "open", lambda path, flags, *_, **__: not flags & (os.O_CREAT | os.O_WRONLY | os.O_RDWR))
        for module in (builtins, io):
            self._stack.enter_context(mock.patch.object(module, "open", self._opened(module.open)))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _patch(self, module: Any, name: str, is_meant: Callable[..., bool] = lambda *_, **__: True) -> None:
        plain = getattr(module, name)

        def patched(*args: Any, **keys: Any) -> Any:
            if args and is_meant(*args, **keys) and self._is_hit(name, args[0], keys.get("dir_fd")):
                return plain(args[0], _half(args[1]), *args[2:])
            return plain(*args, **keys)

        self._stack.enter_context(mock.patch.object(module, name, patched))

    def _opened(self, plain: Any) -> Any:
        """`open`, whose files count as they are read."""

        def opened(file: Any, mode: str = "r", buffering: int = -1, *args: Any, **keys: Any) -> Any:
            if set(mode) & set("wax+") or isinstance(file, int) or not self._counts(place_of(file, None)):
                return plain(file, mode, buffering, *args, **keys)
            self._is_hit("open", file, None)
            raw = _Raw(file, self)
            if buffering == 0:
                return raw
            buffered = io.BufferedReader(raw)
            return buffered if "b" in mode else io.TextIOWrapper(buffered, *args, **keys)

        return opened

    def has(self, call: str) -> bool:
        """Whether a call of those counted is one that the fault is of: others are not counted."""
        return True

    def _counts(self, place: str) -> bool:
        return place.startswith(self._roots)

    def _is_hit(self, name: str, target: Any, directory: int | None) -> bool:
        """Counts a call; raises if it is to fail; returns whether it is to give half."""
        try:
            place = place_of(target, directory)
        except OSError:  # of a descriptor that is none
            return False
        if name not in KINDS[self._kind] or not self._counts(place):
            return False
        with self._lock:
            self.calls.append(f"{name} {place}")
            if len(self.calls) != self._at:
                return False
        if self._kind == "short":
            return True
        number = getattr(errno, self._kind)
        named = () if isinstance(target, int) else (place,)
        raise OSError(number, os.strerror(number), *named)


class _Raw(io.FileIO):
    """A file whose reads count."""

    def __init__(self, file: Any, faults: ReadFaults) -> None:
        super().__init__(file)
        self._faults = faults

    def readinto(self, buffer: Any) -> int | None:
        view = memoryview(buffer).cast("B")
        return super().readinto(_half([view])[0] if self._faults._is_hit("read", self.fileno(), None) else view)

    def readall(self) -> bytes:
        pieces: list[bytes] = []
        while piece := self.read(1 << 20):
            pieces.append(piece)
        return b"".join(pieces)

    def read(self, size: int | None = -1) -> bytes:
        if size is None or size < 0:
            return self.readall()
        buffer = bytearray(size)
        return bytes(buffer[: self.readinto(buffer)])


def _half(asked: Any) -> Any:
    """Half of a size, or of a buffer in a list; never nothing, which would be the end."""
    if isinstance(asked, int):
        return -(-asked // 2)
    (buffer,) = asked
    view = memoryview(buffer).cast("B")
    return [view[: -(-len(view) // 2)]]
