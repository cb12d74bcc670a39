"""Outputs in S3 and Google Cloud Storage, which cannot rename: they appear whole by the order in which they are sent.

Each finished weight file is sent and deleted here, so that the scratch space of a process is its largest file. What
makes loaders take a prefix for a model (config.json, the index) is sent last. Until then journal objects, one for each
process, tell what has arrived, so that an interrupted merge goes on where it was. Object stores keep no locks: nobody
else may write there meanwhile.
"""

import json
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from m3jax.checkpoints.remote import RemotePath, file_system, identity_of, saying
from m3jax.errors import M3Error
from m3jax.outputs.journal import (
    Entry,
    Journal,
    Journalled,
    finished_in,
    in_order,
    makes_a_model,
    weights_in,
)
from m3jax.outputs.local import check_space
from m3jax.outputs.provenance import FILE_NAME

_JOURNAL = "m3jax-journal-{}.json"
_JOURNALS = "m3jax-journal-*.json"
_OURS = "ours"  # the key of the entry that names objects which are a merge's to replace or remove
_PART = 2**24  # bytes of a part of a large object
_MOST_PARTS = 10_000


class RemoteWorkplace(Journalled):
    """Where one of the processes that make a remote output works: a directory here, for files until they are sent."""

    def __init__(self, out: RemotePath, identity: str, finished: Sequence[Mapping[str, Any]], index: int) -> None:
        """Join at work.

        Args:
            out: Where the output is to appear.
            identity: Digest of everything that the output's bytes depend on.
            finished: What was done before.
            index: This process.
        """
        super().__init__(Path(tempfile.mkdtemp(prefix="m3jax-")), finished)
        self.out = out
        self._journal = out / _JOURNAL.format(index)
        self._own = Journal(identity, [])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    def holds(self, file: str) -> bool:
        """Whether a finished weight file has arrived."""
        return file in weights_in(self.finished)

    def _store(self, entry: Entry) -> Entry:
        """Send the weight file that an entry tells of, if it does, and the journal with the entry."""
        if "shard" in entry:
            local = self.path / entry["shard"]
            entry = {**entry, "sent": _send(local, self.out / entry["shard"])}
            local.unlink()
        self._own.entries.append(entry)
        self._write_journal()
        return entry

    def _write_journal(self) -> None:
        text = json.dumps(self._own._asdict())
        with saying(self._journal):
            file_system(self.out.scheme).pipe_file(str(self._journal.key), text.encode())


class RemoteStaging(RemoteWorkplace):
    """Process 0's workplace, which it also opens and publishes."""

    def __init__(self, out: RemotePath, identity: str, largest: int, overwrite: bool) -> None:
        """Open the place.

        Args:
            out: Where the output is to appear.
            identity: Digest of everything that the output's bytes depend on.
            largest: Bytes of the largest weight file.
            overwrite: Replace a model that is there; it is none any more from here on.

        Raises:
            M3Error: Something is there that may not be replaced, the scratch space is too small, or the storage
                cannot be reached or refuses.
        """
        found = _objects(out)
        journals = {name: _read_journal(out / name) for name in found if fnmatchcase(name, _JOURNALS)}
        _check_free(out, found, journals, overwrite)
        told = [entry for entry in finished_in(journals.values(), identity) if _OURS not in entry]
        arrived = [entry for entry in told if "shard" not in entry or _is_there(entry, found)]
        super().__init__(out, identity, arrived, 0)
        self._ours = {name for name in found if name not in journals}
        try:
            check_space(self.path, largest)
            self._own.entries.extend([*self.finished, {_OURS: sorted(self._ours)}])
            self._write_journal()
            _abort_parts(out)
            # Not before the journal is there, which tells that the rest is ours to replace.
            others = journals.keys() - {self._journal.name}
            _remove(out, [name for name in found if makes_a_model(name) or name in others])
        except BaseException:
            shutil.rmtree(self.path, ignore_errors=True)
            raise

    def publish(self) -> None:
        """Send the small files; with the last of them the output is there."""
        small = {p.relative_to(self.path).as_posix(): p for p in sorted(self.path.rglob("*")) if p.is_file()}
        weights = weights_in(self.finished)
        found = _objects(self.out)
        for name, entry in weights.items():
            if not _is_there(entry, found):
                raise M3Error(
                    f"{self.out / name} is not as it was sent: see that nobody else writes there, then start again."
                ) from OSError()
        others = [n for n in found if n not in small and n not in weights and not fnmatchcase(n, _JOURNALS)]
        foreign = next((name for name in others if name not in self._ours), None)
        if foreign is not None:
            raise M3Error(
                f"{self.out / foreign}: is no part of the merge that is made there: move it away, then start again"
            ) from OSError()
        _remove(self.out, others)
        self._own.entries.append({_OURS: sorted(small)})
        self._write_journal()
        for name in in_order(small):
            _send(small[name], self.out / name)
        _remove(self.out, [name for name in found if fnmatchcase(name, _JOURNALS)])

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, traceback)
        if error is not None and not self.finished and not self._ours:
            with suppress(M3Error):
                _remove(self.out, [self._journal.name])


def check_remote_free(out: RemotePath, overwrite: bool) -> None:
    """Checks, before any work, that an output can be made.

    Args:
        out: Where it is to appear.
        overwrite: Whether a model that is there may be replaced.

    Raises:
        M3Error: Something is there that may not be replaced, or the storage does not let us write there.
    """
    if len(out.key.parts) < 2:
        raise M3Error(f"{out} is a whole bucket: write {out}/name for a place in it.")
    found = _objects(out)
    journals = {name: _read_journal(out / name) for name in found if fnmatchcase(name, _JOURNALS)}
    _check_free(out, found, journals, overwrite)
    if not journals:
        probe = _JOURNAL.format("probe")
        with saying(out / probe):
            file_system(out.scheme).pipe_file(str((out / probe).key), b"{}")
        _remove(out, [probe])


def _check_free(out: RemotePath, found: Mapping[str, Any], journals: Mapping[str, Journal], overwrite: bool) -> None:
    entries = [entry for journal in journals.values() for entry in journal.entries]
    ours = {*weights_in(entries), *(name for entry in entries for name in entry.get(_OURS, ()))}
    others = [name for name in found if name not in ours and name not in journals]
    if not others or (overwrite and FILE_NAME in others):
        return
    if not overwrite:
        raise M3Error(f"{out} exists already: choose another output, or pass --overwrite.")
    raise M3Error(
        f"{out} holds no {FILE_NAME}, and only what m3jax has made is overwritten: choose another output, "
        "or move it away."
    )


def _objects(out: RemotePath) -> dict[str, dict[str, Any]]:
    """What the storage says of every object under a prefix, by name."""
    with saying(out):
        found = file_system(out.scheme).find(str(out.key), detail=True)
    if str(out.key) in found:
        raise M3Error(f"{out} is an object, not a place for a directory: choose another output.")
    return {key.removeprefix(f"{out.key}/"): info for key, info in found.items() if info["type"] == "file"}


def _read_journal(journal: RemotePath) -> Journal:
    """What a journal tells; one that is damaged tells nothing."""
    try:
        told = json.loads(journal.read_bytes())
        return Journal(str(told["identity"]), [dict(entry) for entry in told["entries"]])
    except (ValueError, KeyError, TypeError):
        return Journal("", [])


def _is_there(entry: Mapping[str, Any], found: Mapping[str, dict[str, Any]]) -> bool:
    """Whether the weight file of a journal's entry is as it was sent."""
    info = found.get(entry["shard"])
    return info is not None and entry.get("sent") == _told(info)


def _told(info: Mapping[str, Any]) -> list[Any]:
    """What tells an object from another one under its name."""
    told = identity_of(dict(info))
    return [str(told.tag), told.size]


def _send(local: Path, target: RemotePath) -> list[Any]:
    """Send a file; returns what tells its object from another one."""
    size = local.stat().st_size
    part = max(_PART, -(-size // (_MOST_PARTS * 2**20)) * 2**20)
    try:
        with saying(target):
            file_system(target.scheme).put_file(str(local), str(target.key), chunksize=part)
    except BaseException:
        _abort_parts(target)
        raise
    info = target.info()
    if info is None or _told(info)[1] != size:
        raise M3Error(f"{target} has not arrived in full: start again.") from OSError()
    return _told(info)


def _abort_parts(place: RemotePath) -> None:
    """Delete the parts of unfinished objects there or below, which S3 keeps and charges for, where we may."""
    if place.scheme != "s3":  # the other storage forgets them by itself
        return
    driver, (bucket, *parts) = file_system(place.scheme), place.key.parts
    key = "/".join(parts)
    with suppress(Exception):
        for upload in driver.list_multipart_uploads(bucket):
            if upload["Key"] == key or upload["Key"].startswith(key + "/"):
                driver.abort_mpu(bucket, upload["Key"], upload["UploadId"])


def _remove(out: RemotePath, names: Iterable[str]) -> None:
    for name in names:
        with saying(out / name), suppress(FileNotFoundError):
            file_system(out.scheme).rm_file(str((out / name).key))
