"""What is copied with an item of Orbax from its step: the step's other items, and files that are no item's.

It is taken as files beside safetensors are: regular files of the step's own, and no code.
"""

import json
import os
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from blake3 import blake3

from m3jax.checkpoints.digest import digest_file
from m3jax.checkpoints.files import is_below
from m3jax.checkpoints.protocol import natural_key
from m3jax.checkpoints.remote import RemotePath, changed, download
from m3jax.checkpoints.storage import is_dir, list_names, open_file, read_file
from m3jax.checkpoints.trust import check_size, code_keys, is_code, is_config, own_file, said_of_code, without_code
from m3jax.documents import TooDeepError, parse_json
from m3jax.errors import M3Error

_COPIED = 1 << 22  # bytes in memory at a time
_OWNER_FILE, _OWNER_DIRECTORY = 0o600, 0o700  # what whoever makes a copy needs, and is theirs anyway


class BesideItem(NamedTuple):
    """What stands in a step beside the item that is read.

    Attributes:
        files: Those that are copied, by their names in the step.
        code: Files of Python and keys of configurations that are not, in words.
    """

    files: Mapping[str, Path]
    code: tuple[str, ...]

    @property
    def size(self) -> int:
        """Bytes of what is copied."""
        return sum(path.stat().st_size for path in self.files.values())

    def note(self, name: str) -> str | None:
        """What to say of a model whose step brings code; None of one that brings none.

        Args:
            name: What the user calls the model.
        """
        return said_of_code(name, self.code)


def find_beside(places: Iterable[Path]) -> BesideItem:
    """What is copied of items and files of a step.

    Args:
        places: The items and files, each directly in its step, local or remote.

    Raises:
        M3Error: A link leads out of the step or to a directory, something is no file, a name is none that an output
            could have, or a directory cannot be listed.
    """
    found: dict[str, Path] = {}
    for place in places:
        found |= dict(_remote_files(place) if isinstance(place, RemotePath) else _local_files(place))
    code = [name for name in found if is_code(name)]
    keys = [f"{key} in {name}" for name, path in found.items() for key in _keys(path)]
    return BesideItem({name: path for name, path in found.items() if not is_code(name)}, (*sorted(code), *keys))


def _local_files(place: Path) -> Iterator[tuple[str, Path]]:
    step, waiting = place.parent, [place]
    while waiting:
        path = waiting.pop()
        name = path.relative_to(step).as_posix()
        if not is_dir(path):
            if not is_code(name):
                own_file(path, step)
            yield _checked(name, path), path
        elif path.is_symlink():
            raise M3Error(f"{path} is a link to a directory: put a copy there in place of the link, if it is meant.")
        else:
            waiting += [path / each for each in sorted(list_names(path), key=natural_key, reverse=True)]


def _remote_files(place: RemotePath) -> Iterator[tuple[str, Path]]:
    if not place.is_dir():
        yield _checked(place.name, place), place
        return
    for below in place.objects():
        if not below.endswith("/"):  # a folder that a console or a mount has made
            name = f"{place.name}/{below}"
            yield _checked(name, place), place / below


def _checked(name: str, path: Path) -> str:
    """The name of a file, which is one below the step and can be written."""
    text = name.encode("utf-8", "ignore").decode()
    if not is_below(name) or name != PurePosixPath(name).as_posix() or name != text:
        raise M3Error(f"{path} has the name {name!r} beside it or in it, which no output can have: rename it.")
    return name


# --- Configurations --------------------------------------------------------------------------------------


def _entries(path: Path) -> object:
    """What a configuration says; None of any other file, and of one that is no JSON."""
    if not is_config(path.name):
        return None
    check_size(path, path.stat().st_size)
    try:
        return parse_json(read_file(path), halves=True)
    except TooDeepError as error:
        raise M3Error(f"{path}: {error}: restore the file") from None
    except ValueError:
        return None


def _keys(path: Path) -> list[str]:
    """The keys of a configuration that name code."""
    return sorted(code_keys(_entries(path)))


def _edited(path: Path) -> bytes | None:
    """A configuration without what names code; None where all of a file is copied."""
    entries = _entries(path)
    told = without_code(entries)
    return None if told == entries else (json.dumps(told, indent=2) + "\n").encode()


# --- Copies ----------------------------------------------------------------------------------------------


def digest_copy(path: Path) -> str:
    """The digest of a file as it is copied.

    Args:
        path: One of those that `find_beside` finds.

    Raises:
        M3Error: It cannot be read.
    """
    content = _edited(path)
    return digest_file(path) if content is None else blake3(content).hexdigest()


def copy_beside(places: Iterable[Path], step: Path) -> None:
    """Copies items and files of a step to another; what is there under their names is replaced.

    Args:
        places: As for `find_beside`.
        step: Where to, on this disk.

    Raises:
        M3Error: As `find_beside`; or something has changed since it was found.
        OSError: The operating system fails.
    """
    places = tuple(places)
    found = find_beside(places)
    for place in places:
        shutil.rmtree(step / place.name, ignore_errors=True)
    for name, path in found.files.items():
        target, content = step / name, _edited(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        if not isinstance(path, RemotePath):
            _copy(path, name, step, content)
        elif content is None:
            download(path, target)
        else:
            target.write_bytes(content)


def _copy(path: Path, name: str, step: Path, content: bytes | None) -> None:
    """Copies a local file that is still its step's own."""
    origin = path.parents[name.count("/")]
    for directory in list(PurePosixPath(name).parents)[:-1]:
        close_as(origin / directory, step / directory)
    told = own_file(path, origin)
    with open(open_file(path), "rb") as source, open(step / name, "wb") as copy:
        opened = os.fstat(source.fileno())
        if (opened.st_dev, opened.st_ino) != (told.st_dev, told.st_ino):
            raise changed(path)
        close_as(path, step / name)  # before there is anything in it
        if content is None:
            shutil.copyfileobj(source, copy, _COPIED)
        else:
            copy.write(content)


def close_as(source: Path, target: Path) -> None:
    """Takes from a copy the permissions that its source does not give; what is remote has none.

    Args:
        source: A file or directory.
        target: The copy.

    Raises:
        OSError: The operating system fails.
    """
    if not isinstance(source, RemotePath):
        told = source.stat().st_mode
        allowed = told | (_OWNER_DIRECTORY if stat.S_ISDIR(told) else _OWNER_FILE)
        target.chmod(stat.S_IMODE(target.stat().st_mode) & stat.S_IMODE(allowed))
