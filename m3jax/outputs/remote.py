"""Outputs in S3 and Google Cloud Storage, which cannot rename: they appear whole by the order in which they are sent.

Each finished weight file is sent and deleted here, so that the scratch space of a process is its largest file. What
makes loaders take a prefix for a model (config.json, the index) is sent last. Until then journal objects, one for each
process, tell what has arrived, so that an interrupted merge goes on where it was. Object stores keep no locks: nobody
else may write there meanwhile.

An output of Orbax is sent to a place aside, `OUT.partial`, because a manager of Orbax takes any prefix under a step's
number for a step (S3), or removes it as a save that was cut (Google's storage, until `commit_success.txt` is there). At
the end the storage itself copies the objects, which does not bring their bytes here, and `commit_success.txt` is last.
"""

import json
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeVar

from m3jax.checkpoints.remote import RemotePath, download, file_system, identity_of, saying
from m3jax.documents import FAULTS, parse_json
from m3jax.errors import M3Error
from m3jax.outputs.journal import (
    Entry,
    Journal,
    Journalled,
    are_patterns,
    files_of,
    finished_in,
    in_order,
    is_entry,
    makes_a_model,
    weights_in,
)
from m3jax.outputs.patterns import matcher
from m3jax.outputs.places import check_space, made_files
from m3jax.outputs.provenance import FILE_NAME

_JOURNAL = "m3jax-journal-{}.json"
_JOURNALS = re.compile(r"m3jax-journal-(\d+|probe)\.json")
_ASIDE = ".partial"  # ends the name of the place where an output is made that is no model to anyone meanwhile
_COPIES = 16  # objects that are sent or copied at a time
_OURS = "ours"  # the key of the entry that names objects which are a merge's to replace or remove
_PART = 2**24  # bytes of a part of a large object
_MOST_PARTS = 10_000

_Result = TypeVar("_Result")


class RemoteWorkplace(Journalled):
    """Where one of the processes that make a remote output works: a directory here, for files until they are sent."""

    def __init__(
        self,
        out: RemotePath,
        identity: str,
        finished: Sequence[Mapping[str, Any]],
        index: int,
        aside: bool = False,
    ) -> None:
        """Join at work.

        Args:
            out: Where the output is to appear.
            identity: Digest of everything that the output's bytes depend on.
            finished: What was done before.
            index: This process.
            aside: Make it aside, and copy it at the end.
        """
        super().__init__(Path(tempfile.mkdtemp(prefix="m3jax-")), finished)
        self.out = out
        self.place = _aside(out) if aside else out
        self._journal = self.place / _JOURNAL.format(index)
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
            names = files_of(entry)
            if names != [entry["shard"]]:  # other names each time, so that what is sent of them has to be known as ours
                self._own.entries.append({_OURS: names})
                self._write_journal()
            entry = {**entry, "sent": dict(zip(names, _at_once(self._send_file, names), strict=True))}
        self._own.entries.append(entry)
        self._write_journal()
        return entry

    def _send_file(self, name: str) -> list[Any]:
        """Send a file of weights, which goes here; returns what tells its object from another one."""
        sent = _send(self.path / name, self.place / name)
        (self.path / name).unlink()
        return sent

    def _write_journal(self) -> None:
        text = json.dumps(self._own._asdict())
        with saying(self._journal):
            file_system(self.place.scheme).pipe_file(str(self._journal.key), text.encode())


class RemoteStaging(RemoteWorkplace):
    """Process 0's workplace, which it also opens and publishes."""

    def __init__(
        self,
        out: RemotePath,
        identity: str,
        largest: int,
        overwrite: bool,
        aside: bool = False,
        names: Collection[str] = (),
    ) -> None:
        """Open the place.

        Args:
            out: Where the output is to appear.
            identity: Digest of everything that the output's bytes depend on.
            largest: Bytes of scratch space that are needed.
            overwrite: Replace a model that is there; it is none any more from here on.
            aside: Make it aside, and copy it at the end.
            names: Patterns of the objects that will be made.

        Raises:
            M3Error: Something is there that may not be replaced, the scratch space is too small, or the storage
                cannot be reached or refuses.
        """
        place = _aside(out) if aside else out
        there = _look(out)
        _check_free(out, there, overwrite)
        found = there.aside if aside else there.out
        told = [entry for entry in finished_in(there.journals.values(), identity) if _OURS not in entry]
        arrived = [entry for entry in told if "shard" not in entry or _is_there(entry, found)]
        super().__init__(out, identity, arrived, 0, aside)
        self._ours = {name for name in {**there.out, **found} if not _is_journal(name)}
        try:
            check_space(self.path, largest)
            # What is sent comes before the journal that tells of it: what it is called is told before.
            self._own = self._own._replace(names=tuple(names))
            self._own.entries.extend([*self.finished, {_OURS: sorted(self._ours)}])
            self._write_journal()
            _abort_parts(place)
            # Not before the journal is there, which tells that the rest is ours to replace.
            _remove([out / name for name in there.out if makes_a_model(name)])
            stale = () if aside else [_aside(out) / name for name in there.aside]  # of a merge that was made otherwise
            _remove(stale)  # before the journals that tell whose it is
            _remove(journal for journal in there.journals if journal != self._journal)
        except BaseException:
            shutil.rmtree(self.path, ignore_errors=True)
            raise

    def bring(self, wanted: Callable[[str], bool]) -> None:
        """Copy to this disk what has been sent of the weights, by any process.

        Args:
            wanted: Which of their files.
        """

        def fetch(name: str) -> None:
            (self.path / name).parent.mkdir(parents=True, exist_ok=True)
            download(self.place / name, self.path / name)

        _at_once(fetch, [name for name in self._sent() if wanted(name)])

    def _sent(self) -> dict[str, Any]:
        """What was sent of the weights, and what tells each from others."""
        return {name: told for entry in weights_in(self.finished).values() for name, told in entry["sent"].items()}

    def publish(self) -> None:
        """Send the small files; with the last of them the output is there."""
        sent = self._sent()
        small = {p.relative_to(self.path).as_posix(): p for p in sorted(self.path.rglob("*")) if p.is_file()}
        small = {name: path for name, path in small.items() if name not in sent}
        found = _objects(self.place)
        for name, told in sent.items():
            if name not in found or _told(found[name]) != told:
                raise M3Error(
                    f"{self.place / name} is not as it was sent: see that nobody else writes there, then start again."
                ) from OSError()
        there = found if self.place == self.out else _objects(self.out)
        others = [n for n in there if n not in small and n not in sent and not _is_journal(n)]
        foreign = next((self.out / name for name in others if name not in self._ours), None)
        if self.place != self.out and foreign is None:
            beside = (name for name in found if name not in sent and not self._is_begun(name))
            foreign = next((self.place / name for name in beside), None)
        if foreign is not None:
            raise M3Error(
                f"{foreign}: is no part of the merge that is made there: move it away, then start again"
            ) from OSError()
        self._own.entries.append({_OURS: sorted({*small, *sent})})
        self._write_journal()
        _remove([self.out / name for name in others])
        try:
            if self.place != self.out:
                _at_once(lambda name: _copy(self.place / name, self.out / name, sent[name][1]), list(sent))
            for name in in_order(small):
                _send(small[name], self.out / name)
        except BaseException:
            if self.place != self.out:  # what is there already may pass for a whole step
                with suppress(M3Error):
                    _remove([self.out / name for name in _objects(self.out) if name in small or name in sent])
            raise
        for place in {self.place, self.out}:  # of an upload that was begun twice, as the first answer was lost
            _abort_parts(place)
        kept = {} if self.place != self.out else found
        _remove([self.place / name for name in found if name not in kept and not _is_journal(name)])
        _remove([self.place / name for name in found if _is_journal(name)])

    def _is_begun(self, name: str) -> bool:
        """Whether an object at work is a journal, or of this merge or one before it, whole or not."""
        begun = {each for entry in self._own.entries for each in entry.get(_OURS, ())}
        return _is_journal(name) or name in self._ours | begun or _matches(name, self._own.names)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, traceback)
        if error is not None and not self.finished and not self._ours:
            begun = {name for entry in self._own.entries for name in entry.get(_OURS, ())}
            with suppress(M3Error):  # what was sent, but not told of, goes before the journal that makes it ours
                sent = [name for name in _objects(self.place) if name in begun or _matches(name, self._own.names)]
                _remove([*(self.place / name for name in sent), self._journal])


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
    there = _look(out)
    _check_free(out, there, overwrite)
    if not there.journals:
        probe = out / _JOURNAL.format("probe")
        with saying(probe):
            file_system(out.scheme).pipe_file(str(probe.key), b"{}")
        _remove([probe])


def begun_in(out: RemotePath) -> bool:
    """Whether a merge of an output was begun, and interrupted.

    Args:
        out: Where it is to appear.
    """
    return bool(_look(out).journals)


class _There(NamedTuple):
    """What is where an output is to appear.

    Attributes:
        out: The objects there, by name.
        aside: Those where it may be made.
        journals: What each journal tells.
    """

    out: dict[str, dict[str, Any]]
    aside: dict[str, dict[str, Any]]
    journals: dict[RemotePath, Journal]


def _aside(out: RemotePath) -> RemotePath:
    """Where an output is made that is to be copied."""
    return out.with_name(out.name + _ASIDE)


def _look(out: RemotePath) -> _There:
    found = {place: _objects(place) for place in (out, _aside(out))}
    journals = {
        place / name: _read_journal(place / name)
        for place, objects in found.items()
        for name in objects
        if _is_journal(name)
    }
    return _There(found[out], found[_aside(out)], journals)


def _check_free(out: RemotePath, there: _There, overwrite: bool) -> None:
    entries = [entry for journal in there.journals.values() for entry in journal.entries]
    ours = {name for entry in weights_in(entries).values() for name in files_of(entry)}
    ours |= {name for entry in entries for name in entry.get(_OURS, ())}
    ours |= {path.name for path in there.journals}
    told = [pattern for journal in there.journals.values() for pattern in journal.names]
    odd = next((name for name in there.aside if name not in ours and not _matches(name, told)), None)
    if odd is not None:
        raise M3Error(f"{_aside(out) / odd} is where the merge would be made, but is not of one: move it away.")
    others = [name for name in there.out if name not in ours and not _matches(name, told)]
    if not others:
        return
    if not overwrite:
        raise M3Error(f"{out} exists already: choose another output, or pass --overwrite.")
    made = made_files(out)
    if made is None:
        raise M3Error(
            f"{out} holds no {FILE_NAME} of an output, and only what m3jax has made is overwritten: choose another "
            "output, or move it away."
        )
    odd = next((name for name in others if not _matches(name, made)), None)
    if odd is not None:
        raise M3Error(f"{out / odd} is not of the output that is to be replaced: move it away.")


def _is_journal(name: str) -> bool:
    """Whether an object is a journal of a process, or what is sent to see that one may write."""
    return _JOURNALS.fullmatch(name) is not None


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return matcher(tuple(patterns))(name)


def _objects(out: RemotePath) -> dict[str, dict[str, Any]]:
    """What the storage says of every object under a prefix, by name."""
    with saying(out):
        found = file_system(out.scheme).find(str(out.key), detail=True)
    if str(out.key) in found:
        raise M3Error(f"{out} is an object, not a place for a directory: choose another output.")
    # An object whose name ends in a slash is a folder that a console or a mount has made.
    files = {key: info for key, info in found.items() if info["type"] == "file" and not key.endswith("/")}
    return {key.removeprefix(f"{out.key}/"): info for key, info in files.items()}


def _read_journal(journal: RemotePath) -> Journal:
    """What a journal tells; one that is damaged tells nothing."""
    try:
        told = parse_json(journal.read_bytes())
        names = told.get("names", [])
        if not are_patterns(names):
            raise TypeError("names are patterns of files")
        return Journal(str(told["identity"]), [entry for entry in told["entries"] if is_entry(entry)], tuple(names))
    except FAULTS:
        return Journal("", [])


def _is_there(entry: Mapping[str, Any], found: Mapping[str, dict[str, Any]]) -> bool:
    """Whether what was sent of the weight file of a journal's entry is as it was."""
    sent = entry.get("sent")
    return isinstance(sent, dict) and all(name in found and _told(found[name]) == told for name, told in sent.items())


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


def _copy(source: RemotePath, target: RemotePath, size: int) -> None:
    """Have the storage copy an object."""
    with saying(target):
        file_system(source.scheme).cp_file(str(source.key), str(target.key))
    info = target.info()
    if info is None or _told(info)[1] != size:
        raise M3Error(f"{target} has not been copied in full: start again.") from OSError()


def _at_once(act: Callable[[str], _Result], names: Sequence[str]) -> list[_Result]:
    """What comes of each name, some of them at a time."""
    if len(names) < 2:
        return [act(name) for name in names]
    with ThreadPoolExecutor(_COPIES) as pool:
        return list(pool.map(act, names))


def _remove(places: Iterable[RemotePath]) -> None:
    for place in places:
        with saying(place), suppress(FileNotFoundError):
            file_system(place.scheme).rm_file(str(place.key))
