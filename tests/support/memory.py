"""A file whose content is in memory for whoever opens it to read: no disk, and no system calls."""

import builtins
import io
import os
from types import TracebackType
from typing import Any, Self

_READING = ("r", "rt", "rb")


class Served:
    """While it is entered, `open` gives bytes from memory for one path.

    What opens the file otherwise (`os.open`, memory maps) or asks for its size sees the file on the disk.

    Attributes:
        blob: What it holds.
        count: How often it was opened.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Of this path, however it is spelled by `os.fspath`."""
        self._path, self._open, self._builtin = os.fspath(path), io.open, builtins.open
        self.blob, self.count = b"", 0

    def __enter__(self) -> Self:
        io.open = self._opened  # type: ignore[assignment]  # pathlib's
        builtins.open = self._opened  # type: ignore[assignment]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        io.open, builtins.open = self._open, self._builtin  # type: ignore[assignment]

    def _opened(
        self,
        file: Any,
        mode: str = "r",
        buffering: int = -1,
        encoding: Any = None,
        errors: Any = None,
        *more: Any,
        **named: Any,
    ) -> Any:
        if mode not in _READING or isinstance(file, int) or os.fspath(file) != self._path:
            return self._open(file, mode, buffering, encoding, errors, *more, **named)
        self.count += 1
        content = io.BytesIO(self.blob)
        return content if mode == "rb" else io.TextIOWrapper(content, encoding, errors, *more, **named)
