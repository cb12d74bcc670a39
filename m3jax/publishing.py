"""The output directory: made beside its place, published by one rename, resumable until then."""

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from m3jax.errors import M3Error

_JOURNAL = "m3jax-journal.jsonl"
_LOCK = "m3jax-journal.lock"


def partial_directory(out: Path) -> Path:
    """Where a merge is made before it becomes `out`."""
    return out.with_name(out.name + ".partial")


def check_free(out: Path, overwrite: bool) -> None:
    """Raise M3Error if `out` is taken, or its parent directory is not there."""
    if not out.name or out.name == "..":
        raise M3Error(f"{out}: is not a name for a new directory: give one")
    if not out.parent.is_dir():
        raise M3Error(f"{out}: its parent directory does not exist: make it first")
    taken = out.is_symlink() or (out.exists() and not (out.is_dir() and not any(out.iterdir())))
    if taken and not overwrite:
        raise M3Error(f"{out}: exists already: choose another output, or pass --overwrite")
    if taken and not out.is_dir():
        raise M3Error(f"{out}: is not a directory, and only a directory is overwritten: choose another output")


class Staging:
    """The directory in which an output is made, with a journal of what is finished.

    The journal's first line identifies the merge; a directory left by another merge is emptied. Leaving the context
    by an exception keeps what is finished if anything is, and removes the directory otherwise.
    """

    def __init__(self, out: Path, identity: str, space_needed: int) -> None:
        """Open or make the directory.

        Args:
            out: Where the output is to appear.
            identity: Digest of everything that the output's bytes depend on.
            space_needed: Bytes that will be written.

        Raises:
            M3Error: Another merge is at work there, or the disk is too small.
        """
        self.out = out
        self.path = partial_directory(out)
        self.keep = False
        try:
            self.path.mkdir(exist_ok=True)
            self._lock = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise M3Error(f"{self.path}: cannot be made: {error.strerror}: check the place") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise M3Error(
                f"{self.path}: another merge is writing there: wait for it, or choose another output"
            ) from None
        self.finished = self._resume(identity)
        self._check_space(space_needed)

    def _resume(self, identity: str) -> list[dict[str, Any]]:
        """The journal's entries after its first line, if it is this merge's."""
        lines = _read_lines(self.path / _JOURNAL)
        if not lines or lines[0].get("identity") != identity:
            for entry in self.path.iterdir():
                if entry.name != _LOCK:
                    shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
            lines = [{"identity": identity}]
            self._rewrite(lines)
        return lines[1:]

    def _rewrite(self, lines: list[dict[str, Any]]) -> None:
        with open(self.path / _JOURNAL, "w", encoding="utf-8") as journal:
            journal.writelines(json.dumps(line) + "\n" for line in lines)

    def _check_space(self, needed: int) -> None:
        written = sum(f.stat().st_size for f in self.path.glob("*.safetensors"))
        free = shutil.disk_usage(self.path).free
        if needed - written > free:
            self.keep = bool(self.finished)
            self._close()
            raise M3Error(
                f"{self.out}: the disk has {free:,} bytes free, but {needed - written:,} are needed: "
                "free space or choose another place"
            )

    def record(self, entry: Mapping[str, Any]) -> None:
        """Add an entry to the journal, safely on the disk before returning."""
        with open(self.path / _JOURNAL, "a", encoding="utf-8") as journal:
            journal.write(json.dumps(entry) + "\n")
            journal.flush()
            os.fsync(journal.fileno())
        self.finished.append(dict(entry))

    def write_text(self, name: str, text: str) -> None:
        """Write a small file of the output."""
        (self.path / name).write_text(text, encoding="utf-8")

    def publish(self, overwrite: bool) -> None:
        """Make the directory the output, by one rename."""
        for name in (_JOURNAL, _LOCK):
            (self.path / name).unlink(missing_ok=True)
        _sync_files(self.path)
        replaced = None
        if self.out.is_dir() and not self.out.is_symlink() and not any(self.out.iterdir()):
            self.out.rmdir()
        elif overwrite and self.out.exists():
            replaced = self.out.with_name(self.out.name + ".replaced")
            shutil.rmtree(replaced, ignore_errors=True)
            self.out.rename(replaced)
        try:
            self.path.rename(self.out)
        except OSError as error:
            if replaced is not None:
                replaced.rename(self.out)
            raise M3Error(f"{self.out}: cannot be made: {error.strerror}: the merge is in {self.path}") from error
        _sync(self.out.parent)
        if replaced is not None:
            shutil.rmtree(replaced)

    def _close(self) -> None:
        if self._lock >= 0:
            if not self.keep and self.path.exists():
                shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # What the user can mend without changing the merge (space, an interrupt) is worth resuming from.
        interrupted = error is not None and not (
            isinstance(error, M3Error) and not isinstance(error.__cause__, OSError)
        )
        self.keep = interrupted and bool(self.finished)
        self._close()


def is_disk_full(error: BaseException) -> bool:
    """Whether an error, or what caused it, says that a disk or a quota is full."""
    cause = error.__cause__ if error.__cause__ is not None else error
    return isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT)


def _read_lines(journal: Path) -> list[dict[str, Any]]:
    """The journal's whole lines; a last line cut by a crash is left out."""
    lines: list[dict[str, Any]] = []
    with suppress(OSError, ValueError):
        for line in journal.read_text(encoding="utf-8").splitlines(keepends=True):
            if line.endswith("\n"):
                lines.append(json.loads(line))
    return [line for line in lines if isinstance(line, dict)]


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_files(directory: Path) -> None:
    """Sync every small file and the directory; weight files were synced when they were finished."""
    for path in sorted(directory.rglob("*")):
        if path.is_file() and path.suffix != ".safetensors":
            _sync(path)
    _sync(directory)
