"""Where outputs appear and are made on a disk, what m3jax itself has put there, and what may be replaced."""

import errno
import glob
import os
import re
import shutil
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from m3jax.checkpoints import ModelDirectory
from m3jax.checkpoints.orbax_names import LOCKED
from m3jax.checkpoints.remote import RemotePath
from m3jax.checkpoints.shards import sync
from m3jax.checkpoints.standing_in import CONVERSION
from m3jax.checkpoints.storage import is_dir, read_file
from m3jax.documents import FAULTS, parse_json
from m3jax.errors import M3Error
from m3jax.outputs.journal import read_journal
from m3jax.outputs.patterns import directories as directories_of
from m3jax.outputs.patterns import matcher
from m3jax.outputs.provenance import FILE_NAME
from m3jax.outputs.written import varying_patterns

JOURNAL = "m3jax-journal.jsonl"
TAKEN = "m3jax-journal.taken"
_OWN = re.compile(r"m3jax-journal(-\d+)?\.jsonl|m3jax-journal\.taken")
ASIDE = ".replaced-"  # behind its name, and before eight digits: where an old output goes
REPLACES = "replaces"  # the key of the entry that names what an output takes the place of
_FIRST_WEIGHTS = ("model.safetensors", "model-?????-of-?????.safetensors", "model.safetensors.index.json")
"""Weight files as the first manifests, which do not list them, had them."""
_SPARE = 2**20  # bytes beyond those announced


def is_own(name: str) -> bool:
    """Whether a file of an output's directory is one of those in which a merge keeps what it has done."""
    return _OWN.fullmatch(name) is not None


def partial_directory(out: Path) -> Path:
    """Where a merge is made before it becomes `out`."""
    return out.with_name(out.name + ".partial")


def intermediates_directory(out: Path) -> Path:
    """Where the merges are made and kept that the merge of `out` starts from."""
    return out.with_name(out.name + ".intermediates")


def check_apart(out: Path, model: ModelDirectory, files: Iterable[Path] = ()) -> None:
    """Checks that an output neither takes the place of what it is made of nor is made inside it.

    Args:
        out: Where the output is to appear, here or in remote storage.
        model: A model that is read.
        files: Its weight files, which may be links.

    Raises:
        M3Error: It does; links are followed.
    """
    parts = [part for part in (model, model.adapter) if part is not None]
    for part in parts:
        target = next((made for made in _made_at(out) if _is_in(part.path.resolve(), made)), None)
        if target is not None:
            raise M3Error(f"{target}: is one of the models, or holds {model.name}: choose another output")
        holds = any(_is_in(made, part.path.resolve()) for made in _made_at(out))
        if holds and (isinstance(part.path, RemotePath) or is_dir(part.path)):
            raise M3Error(f"{out}: would be made inside {model.name}, which is read: choose another output")
    for file in _linked(files):
        if any(_is_in(file.resolve(), made) for made in _made_at(out)):
            raise M3Error(f"{out}: holds the file that {file} of {model.name} leads to: choose another output")


def _made_at(out: Path) -> list[Path]:
    """Where an output appears and where it is made, without links."""
    return [out] if isinstance(out, RemotePath) else [out.resolve(), partial_directory(out).resolve()]


def _is_in(inner: Path, outer: Path) -> bool:
    return inner == outer or outer in inner.parents


def _linked(files: Iterable[Path]) -> list[Path]:
    """Those of some files that may be elsewhere than the directory of their model: links, and what is in one."""
    here = [path for path in files if not isinstance(path, RemotePath)]
    return [path for path in here if path.is_symlink() or path.parent.is_symlink()]


def check_place(out: Path) -> None:
    """Raise M3Error if `out` is no name for a directory, or its parent is not there."""
    if not out.name or out.name == "..":
        raise M3Error(f"{out}: is not a name for a new directory: give one")
    if not out.parent.is_dir():
        state = "is a file" if out.parent.exists() else "does not exist"
        raise M3Error(f"{out}: its parent {state}: make the directory {out.parent}, or choose another place")


def check_free(out: Path, overwrite: bool) -> None:
    """Raise M3Error if `out` is taken, if its parent is not there, or if `OUT.partial` is not a merge's.

    An output that a crash left with its journal may be this very merge's, which `Staging` knows.
    """
    check_place(out)
    if overwrite:
        check_replaceable(out)
    elif is_taken(out) and not published_identity(out):
        raise exists_already(out)
    partial = partial_directory(out)
    if partial.is_symlink() or (partial.exists() and not _is_ours(partial) and replaced_by(out, out) != partial):
        raise M3Error(f"{partial}: is where the merge would be made, but holds something else: move it away")


def unfinished(out: Path) -> str | None:
    """What a crash has left of an output that is not there, and the mend; None where nothing is."""
    partial = partial_directory(out)
    if isinstance(out, RemotePath) or os.path.lexists(out) or not _is_ours(partial):
        return None
    old = replaced_by(partial, out)
    kept = "" if old is None else f", and what it was to replace is in {old}"
    return f"an interrupted merge is in {partial}{kept}: run the same command again to go on"


def published_identity(out: Path) -> str:
    """The identity of the merge that a crash ended just after its output had appeared; empty where none did."""
    return "" if out.is_symlink() else read_journal(out / JOURNAL).identity


def exists_already(out: Path) -> M3Error:
    """The sentence for a place that is taken."""
    return M3Error(f"{out}: exists already: choose another output, or pass --overwrite")


def is_taken(out: Path) -> bool:
    """Whether something is there that a rename would not replace: all but an empty directory."""
    return out.is_symlink() or (out.exists() and not (out.is_dir() and not any(out.iterdir())))


def check_replaceable(out: Path) -> None:
    """Raise M3Error if what is at `out` is not a directory that m3jax has made."""
    if not is_taken(out):
        return
    if out.is_symlink() or not out.is_dir():
        raise M3Error(f"{out}: is not a directory, and only a directory is overwritten: choose another output")
    made = made_files(out)
    if made is None:
        raise M3Error(
            f"{out}: holds no {FILE_NAME} of an output, and only what m3jax has made is overwritten: choose another "
            "output, or move it away"
        )
    other = foreign(out, made, at_work=False)
    if other is not None:
        raise M3Error(f"{out}: holds {other}, which is not of the output that is to be replaced: move it away")


def made_files(out: Path) -> tuple[str, ...] | None:
    """Patterns of the files of an output, as its manifest or a conversion's mark tells; None without.

    Args:
        out: The output, here or in remote storage.
    """
    manifest, mark = (_told_in(out / name) for name in (FILE_NAME, CONVERSION))
    output = manifest.get("output")
    if isinstance(output, dict) and isinstance(output.get("files"), dict):
        weights = output.get("weight_files")
        first = exactly(weights) if isinstance(weights, dict) else _FIRST_WEIGHTS
        links = output.get("links")
        others = exactly([*output["files"], *(links if isinstance(links, dict) else ()), FILE_NAME])
        return (*first, *varying_patterns(output), *others)
    told = mark.get("output")
    files = list(told["files"]) if isinstance(told, dict) and isinstance(told.get("files"), dict) else mark.get("files")
    if isinstance(files, list) and all(isinstance(name, str) for name in files):
        return exactly([*files, CONVERSION])
    return None


def _told_in(file: Path) -> dict[str, Any]:
    """What a file of JSON tells; nothing where it is none."""
    try:
        told = parse_json(read_file(file))
    except (M3Error, *FAULTS):
        return {}
    return told if isinstance(told, dict) else {}


def _is_ours(directory: Path) -> bool:
    """Whether a directory is an unfinished merge, or holds no more than the beginning of a journal."""
    return directory.is_dir() and ((directory / JOURNAL).is_file() or foreign(directory, ()) is None)


def foreign(directory: Path, names: Collection[str], at_work: bool = True) -> str | None:
    """The first thing in a directory that m3jax has not put there; None if all is its own.

    Args:
        directory: Where an output is made, or is.
        names: Patterns of the files that may be there beside journals.
        at_work: Whether they may be there as they are being written (`.tmp`, `.__lock`), too.
    """
    known = tuple(names)
    is_known, is_place = matcher(known), matcher(directories_of(known))
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        written = name.removesuffix(".tmp").removesuffix(LOCKED)  # a journal is written anew in an output as well
        if path.is_dir() and not path.is_symlink():
            own = any(path.iterdir()) or is_known(name) or is_place(name)
        else:
            own = is_own(written) or is_known(written if at_work else name)
        if not own:
            return name
    return None


def exactly(names: Collection[str]) -> tuple[str, ...]:
    """The patterns that match these names and no others."""
    return tuple(glob.escape(name) for name in names)


def check_space(place: Path, needed: int) -> None:
    """Raise M3Error if the disk of a directory, or of what is to be made beside it, has too few bytes free."""
    missing = needed + _SPARE
    free = shutil.disk_usage(place if place.is_dir() else place.parent).free
    if missing > free:
        raise M3Error(
            f"{place}: the disk has {free:,} bytes free, but {missing:,} are needed: free space or choose another place"
        ) from OSError(errno.ENOSPC, "No space left on device")


def remove_journals(directory: Path) -> None:
    """Remove all journals, process 0's last."""
    own = [path for path in directory.iterdir() if is_own(path.name)]
    for path in sorted(own, key=lambda path: path.name == JOURNAL):
        path.unlink()
    sync(directory)


def replaced_by(directory: Path, out: Path) -> Path | None:
    """What an output has replaced or was about to, as the journal in a directory names it, if that is still there.

    Whoever wrote the journal, it is one of the two places beside `out` where what is replaced is put.
    """
    told = [entry[REPLACES] for entry in read_journal(directory / JOURNAL).entries if REPLACES in entry]
    if not told or not isinstance(told[-1], dict):
        return None
    name = str(told[-1].get("name"))
    is_aside = re.fullmatch(re.escape(f"{out.name}{ASIDE}") + "[0-9a-f]{8}", name) is not None
    if name != partial_directory(out).name and not is_aside:
        return None
    try:
        place = out.with_name(name)
        return place if place.lstat().st_ino == told[-1].get("inode") else None
    except (FileNotFoundError, ValueError):  # or no name at all
        return None
