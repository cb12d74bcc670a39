"""What a program sees of the machine: the interpreter with its own library, shared libraries and small tools.

Looked up once, in the harness, so that no program waits for it.
"""

import functools
import glob
import os
import re
import sys
from collections.abc import Iterable, Iterator

from m3jax.evaluation.sandbox.confine import MachineView

_SYSTEM = ("/", "/usr", "/usr/local")
_LIBRARIES = re.compile("lib(x?[0-9]+)?")
_SHOWN = ("/etc/ld.so.cache", "/nix", "/usr/share/zoneinfo", "/usr/share/terminfo")
_OF_A_MACHINE = re.compile(".+-linux-.+")  # of shared libraries, such as x86_64-linux-gnu
_BESIDE_THE_LIBRARY = ("site-packages", "dist-packages", "ensurepip/_bundled")
_STORE = "/nix/store/*/lib/python3*/*-packages"  # where each package has a place of its own, shared libraries too
_PYTHON = re.compile(r".*(\.py|\.pyc|\.pyz|\.whl|\.egg|\.zip|\.cpython-.*\.so|\.abi3\.so)")
_MOST_LOOKED_AT = 2000  # entries below a directory; one that has more is not shown


@functools.cache
def machine_view() -> MachineView:
    """What programs see of this machine: verdicts must not depend on packages that happen to be there."""
    prefixes = {os.path.realpath(place) for place in (sys.base_prefix, sys.base_exec_prefix)}
    interpreter = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
    tools = [os.path.join(prefix, "bin") for prefix in _SYSTEM]
    return view_of([*_SYSTEM, *sorted(prefixes)], _library(), [*tools, interpreter])


def _library() -> list[str]:
    """The directories of the interpreter's own library, and of its extension modules where they are apart."""
    dynamic = (os.path.dirname(place) for place in sys.path if os.path.basename(place) == "lib-dynload")
    return list(dict.fromkeys(os.path.realpath(place) for place in (os.path.dirname(os.__file__), *dynamic)))


def view_of(prefixes: Iterable[str], library: Iterable[str], tools: Iterable[str]) -> MachineView:
    """Places that are seen, and directories and files in them that are seen empty.

    Args:
        prefixes: Such as /usr, which have directories of libraries.
        library: The directories of the interpreter's library, wherever they are.
        tools: What else is seen: the interpreter, and directories of programs.
    """
    kept = list(library)
    places = [place for prefix in dict.fromkeys(prefixes) for place in _libraries(prefix)]
    shown = dict.fromkeys([*places, *_SHOWN])
    for place in (*kept, *tools):
        if not any(place.startswith(f"{one}/") for one in shown):
            shown[place] = None
    hidden = [f"{place}/{name}" for place in kept for name in _BESIDE_THE_LIBRARY]
    for place in places:
        if not os.path.islink(place):
            hidden += _foreign(place, kept)
    hidden += glob.glob(_STORE)
    return MachineView(shown=list(shown), hidden=[place for place in dict.fromkeys(hidden) if os.path.exists(place)])


def _libraries(prefix: str) -> list[str]:
    try:
        names = os.listdir(prefix)
    except OSError:
        return []
    return [os.path.join(prefix, name) for name in sorted(names) if _LIBRARIES.fullmatch(name)]


def _foreign(place: str, kept: list[str]) -> Iterator[str]:
    """What in a directory of libraries holds Python that is not the interpreter's, or too much to be looked through."""
    for entry in _entries(place):
        if entry.is_symlink() or entry.path in kept:  # a link leads to what is seen or hidden where it is
            continue
        if not entry.is_dir():
            if _PYTHON.fullmatch(entry.name):
                yield entry.path
        elif _OF_A_MACHINE.fullmatch(entry.name) or any(one.startswith(f"{entry.path}/") for one in kept):
            yield from _foreign(entry.path, kept)
        elif entry.name.startswith("python") or _holds_python(entry.path):  # another interpreter's, whatever it holds
            yield entry.path


def _holds_python(place: str) -> bool:
    looked_at = 0
    for _, directories, files in os.walk(place):
        looked_at += len(directories) + len(files)
        if looked_at > _MOST_LOOKED_AT or any(map(_PYTHON.fullmatch, files)):
            return True
    return False


def _entries(place: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(place) as found:
            return sorted(found, key=lambda entry: entry.name)
    except OSError:  # programs, which are nobody's, cannot look there either
        return []
