"""Finished pieces of long work, on disk after every one, so that it may be killed at any point and goes on."""

import fcntl
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from m3jax.documents import FAULTS, parse_json
from m3jax.errors import M3Error


class Ledger:
    """A file with one JSON object per line, of which the first says what work the others belong to.

    Attributes:
        path: The file.
        entries: What earlier runs and this one added.
    """

    def __init__(
        self, path: Path, identity: Mapping[str, Any], work: str, elsewhere: str, told: Sequence[str] = ()
    ) -> None:
        """Open or begin.

        Args:
            path: Its directory is made if it is not there; that one's parent is.
            identity: What entries depend on; a ledger of something else is refused, unless it has no entries.
            work: What the work is called, such as "exploration".
            elsewhere: How another place is given, such as "with --journal DIR".
            told: What of the identity may differ.

        Raises:
            M3Error: It belongs to other work, another process has it open, or it cannot be used.
        """
        self.path, self.entries = path, list[dict[str, Any]]()
        self._told = frozenset(told)
        self._work, self._mend = work, f"give another place {elsewhere}"
        with ExitStack() as stack:
            try:
                path.parent.mkdir(exist_ok=True)
                self._file = stack.enter_context(open(path, "a+b", buffering=0))  # what failed is not tried again
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._read(json.loads(json.dumps(identity)))
            except BlockingIOError:
                raise M3Error(f"{path.parent}: another {work} is at work there: wait, or {self._mend}") from None
            except OSError as error:
                raise M3Error(f"{path}: {error.strerror or error}: {self._mend}") from error
            stack.pop_all()  # the file stays open, and with it the lock

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def _read(self, identity: Mapping[str, Any]) -> None:
        self._file.seek(0)
        blob = self._file.read() or b""
        whole = blob[: blob.rfind(b"\n") + 1]
        lines = whole.splitlines()
        if not lines:
            if not _line(identity).startswith(blob):  # a file of somebody else's
                raise self.no_ledger(ValueError("its first line is cut"))
            self._begin(identity)
            return
        try:
            known, *self.entries = [dict(parse_json(line, halves=True)) for line in lines]
        except FAULTS as error:
            raise self.no_ledger(error) from None
        names = {**known, **identity}.keys() - self._told
        different = [key for key in names if known.get(key) != identity.get(key)]
        if different and not self.entries and known.keys() == identity.keys():  # nothing is lost, as nothing was done
            self._begin(identity)
        elif different:
            raise M3Error(
                f"{self.path.parent}: holds another {self._work}, which differs in {', '.join(sorted(different))}: "
                f"run with the same settings to go on with it, or {self._mend}"
            )
        elif len(whole) < len(blob):  # a kill cut the last line short
            self._file.truncate(len(whole))

    def _begin(self, identity: Mapping[str, Any]) -> None:
        self._file.truncate(0)
        self._write(identity)

    def no_ledger(self, error: Exception) -> M3Error:
        """What to raise where an entry is none of this work's.

        Args:
            error: What is wrong with it.
        """
        return M3Error(f"{self.path}: is no journal of an {self._work} ({error}): {self._mend}")

    def _write(self, entry: Mapping[str, Any]) -> None:
        line = memoryview(_line(entry))
        while line:
            line = line[self._file.write(line) :]
        os.fsync(self._file.fileno())

    def add(self, entry: Mapping[str, Any]) -> None:
        """Note an entry, safely on the disk before returning.

        Args:
            entry: Plain data for JSON.

        Raises:
            M3Error: It cannot be written.
        """
        try:
            self._write(entry)
        except OSError as error:
            raise M3Error(
                f"{self.path}: {error.strerror or error}: make room; the same command then goes on"
            ) from error
        self.entries.append(dict(entry))


def _line(entry: Mapping[str, Any]) -> bytes:
    return json.dumps(entry).encode() + b"\n"
