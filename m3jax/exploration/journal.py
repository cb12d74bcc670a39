"""What an exploration has done so far, on disk after every sample, so that it may be killed at any point."""

import fcntl
import json
import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from m3jax.errors import M3Error
from m3jax.exploration.samples import from_hex, to_hex
from m3jax.exploration.selection import Result

FILE = "journal.jsonl"


class Journal:
    """A directory with one line per evaluated sample; the first line says of what exploration.

    Attributes:
        directory: The directory.
        done: The results of earlier runs and of this one.
    """

    def __init__(self, directory: Path, identity: Mapping[str, Any]) -> None:
        """Open or begin.

        Args:
            directory: Made if it is not there; its parent is.
            identity: What results depend on; a journal of something else is refused.

        Raises:
            M3Error: It belongs to another exploration, another process has it open, or it cannot be used.
        """
        self.directory, self.done = directory, list[Result]()
        self._path = directory / FILE
        with ExitStack() as stack:
            try:
                directory.mkdir(exist_ok=True)
                self._file = stack.enter_context(open(self._path, "a+b"))
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._read(json.loads(json.dumps(identity)))
            except BlockingIOError:
                raise M3Error(
                    f"{directory}: another exploration is at work there: wait, or give another place with --journal DIR"
                ) from None
            except OSError as error:
                raise M3Error(
                    f"{self._path}: {error.strerror or error}: give another place with --journal DIR"
                ) from error
            stack.pop_all()  # the file stays open, and with it the lock

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def _read(self, identity: Mapping[str, Any]) -> None:
        self._file.seek(0)
        blob = self._file.read()
        whole = blob[: blob.rfind(b"\n") + 1]
        if len(whole) < len(blob):  # a kill cut the last line short
            self._file.truncate(len(whole))
        lines = whole.splitlines()
        if not lines:
            self._write(identity)
            return
        try:
            known, *entries = [json.loads(line) for line in lines]
            self.done = [_result(entry) for entry in entries]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise M3Error(
                f"{self._path}: is no journal of an exploration ({error}): give another place with --journal DIR"
            ) from None
        different = [key for key in {**known, **identity} if known.get(key) != identity.get(key)]
        if different:
            raise M3Error(
                f"{self.directory}: holds another exploration, which differs in {', '.join(sorted(different))}: "
                "run with the same settings to go on with it, or give another place with --journal DIR"
            )

    def _write(self, entry: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(entry).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def find(self, sample: int, share: float, weights: Mapping[str, tuple[float, ...]]) -> Result | None:
        """The result of a trial, if it was evaluated before."""
        same = (r for r in self.done if (r.sample, r.share, r.weights) == (sample, share, weights))
        return next(same, None)

    def add(self, result: Result) -> None:
        """Note a result, safely on the disk before returning.

        Raises:
            M3Error: It cannot be written.
        """
        try:
            self._write({**result._asdict(), "weights": to_hex(result.weights), "scores": dict(result.scores)})
        except OSError as error:
            raise M3Error(
                f"{self._path}: {error.strerror or error}: make room; the same command then goes on"
            ) from error
        self.done.append(result)


def _result(entry: Mapping[str, Any]) -> Result:
    result = Result(**{**entry, "weights": from_hex(entry["weights"])})
    if not isinstance(result.sample, int) or not all(isinstance(s, float | int) for s in result.scores.values()):
        raise ValueError("a line is no result")
    return result
