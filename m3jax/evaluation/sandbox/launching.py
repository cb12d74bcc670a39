"""How orders get to launchers: one of its own for an order, or one forked from the server of this process."""

import atexit
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from m3jax.evaluation.sandbox import forkserver

# The launcher's interpreter sees the standard library and these packages, emptied: importing them must not bring jax.
_BOOT = """
import sys, types
for name, place in zip(sys.argv[1::2], sys.argv[2::2]):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [place]
"""
_START = "from m3jax.evaluation.sandbox.launcher import main; main()"
_SERVE = "from m3jax.evaluation.sandbox.forkserver import serve; serve()"


def _nameless() -> int:
    """A file in memory, or on disk where Python was built without those or the system refuses them."""
    with contextlib.suppress(AttributeError, OSError):
        return os.memfd_create("m3jax")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


@contextlib.contextmanager
def file_of(content: bytes) -> Iterator[int]:
    """A file without a name. What it holds travels apart from the program, whose process never holds it.

    Args:
        content: What it holds.
    """
    file = _nameless()
    try:
        with open(file, "wb", closefd=False) as writer:
            writer.write(content)
        os.lseek(file, 0, os.SEEK_SET)
        yield file
    finally:
        os.close(file)


def _command(work: str) -> list[str]:
    """A command line of the bare interpreter: no site packages, nothing from the environment."""
    here = Path(__file__).resolve().parent
    packages = {"m3jax.evaluation.sandbox": here, "m3jax.evaluation": here.parent, "m3jax": here.parents[1]}
    executable = getattr(sys, "_base_executable", sys.executable)  # the interpreter behind a virtual environment
    stubs = [word for name, place in packages.items() for word in (name, str(place))]
    return [os.path.realpath(executable), "-I", "-S", "-c", _BOOT + work, *stubs]


class Lifeline(NamedTuple):
    """Two sockets, one of which launchers hold: when the other is closed they end, and all that they started.

    Attributes:
        ours: This process's alone, so that it is closed however the process ends.
        theirs: Their end, to be handed to them.
    """

    ours: socket.socket
    theirs: socket.socket

    def cut(self) -> None:
        """Have the launchers end."""
        with contextlib.suppress(OSError):  # it may be closed already
            self.ours.shutdown(socket.SHUT_RDWR)  # whoever else may hold it
        self.ours.close()


_lifelines: set[Lifeline] = set()


@contextlib.contextmanager
def lifeline() -> Iterator[Lifeline]:
    """A lifeline for launchers, which is cut in the end."""
    line = Lifeline(*socket.socketpair())
    _lifelines.add(line)
    try:
        yield line
    finally:
        line.cut()
        line.theirs.close()
        _lifelines.discard(line)


class Ended(NamedTuple):
    """What a launcher left: its exit code, None where it was not done in time, the outcome and its complaints."""

    code: int | None
    answer: bytes = b""
    complaint: bytes = b""


def started(order: dict[str, Any], seconds: float, tests: int, key: int, line: Lifeline) -> Ended:
    """Has a launcher of its own run an order.

    Args:
        order: What `launcher.read_order` takes.
        seconds: How long it may take.
        tests: A file.
        key: A file.
        line: What it lives by; cut where waiting is interrupted.
    """
    told = order | {"tests": tests, "secret": key, "line": line.theirs.fileno()}
    with subprocess.Popen(
        _command(_START),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={},
        cwd="/",
        start_new_session=True,
        pass_fds=(tests, key, told["line"]),
    ) as launcher:
        try:
            answer, complaint = launcher.communicate(json.dumps(told).encode(), seconds)
        except subprocess.TimeoutExpired:
            launcher.kill()
            launcher.communicate()  # until the keeper has ended too, and all that it started
            return Ended(None)
        except BaseException:
            line.cut()
            with contextlib.suppress(subprocess.TimeoutExpired):
                launcher.wait(forkserver.SECONDS_TO_END)
            raise
    return Ended(launcher.returncode, answer, complaint)


def forked(order: dict[str, Any], seconds: float, tests: int, key: int, line: Lifeline) -> Ended | None:
    """Has a launcher forked from the server run an order; None where there is no server.

    Args:
        order: What `launcher.read_order` takes.
        seconds: How long it may take.
        tests: A file.
        key: A file.
        line: What it lives by; cut where waiting is interrupted.
    """
    numbers = {"tests": forkserver.TESTS, "secret": forkserver.SECRET, "line": forkserver.LINE}
    told = json.dumps(order | numbers).encode()
    for _ in range(2):  # a server that something ended is started anew, once
        link = _link()
        if link is None:
            return None
        with (
            file_of(told) as given,  # anew each time: another launcher may have read or written them
            file_of(b"") as answer,
            file_of(b"") as complaint,
            contextlib.suppress(OSError),
        ):
            launched = forkserver.launch(link, given, answer, complaint, tests, key, line.theirs.fileno())
            code = forkserver.exit_code(launched, seconds, line.cut)
            return Ended(code, *(os.pread(file, os.fstat(file).st_size, 0) for file in (answer, complaint)))
        _end_server(link)
    return None


class _Server(NamedTuple):
    """The server of this process."""

    process: subprocess.Popen[bytes]
    link: socket.socket


_server: _Server | None = None
_lock = threading.Lock()


def _link() -> socket.socket | None:
    """The way to the server, which is started if there is none; None where the system has not what it needs."""
    global _server
    with _lock:
        if _server is None:
            try:
                os.close(os.pidfd_open(os.getpid()))
            except (AttributeError, OSError):
                return None
            here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with there:
                process = subprocess.Popen(
                    _command(_SERVE),
                    stdin=there.fileno(),
                    stdout=subprocess.PIPE,  # nothing comes; but Python's own streams are made for what they are
                    stderr=subprocess.PIPE,
                    env={},
                    cwd="/",
                    start_new_session=True,
                )
            _server = _Server(process, here)
        return _server.link


@atexit.register
def _end_server(link: socket.socket | None = None) -> None:
    """Closes the link, upon which the server ends.

    Args:
        link: To the server that is meant, which another thread may have ended and replaced.
    """
    global _server
    with _lock:
        if _server is not None and link in (_server.link, None):
            _server.link.shutdown(socket.SHUT_RDWR)  # whoever else may hold it
            _server.link.close()
            _server.process.communicate()
            _server = None


def _forget_launchers() -> None:
    """In a process that was forked: server and lifelines are its parent's, and so is whoever held the lock."""
    global _lock, _server
    _lock = threading.Lock()
    for line in _lifelines:
        line.ours.close()  # and not cut
    _lifelines.clear()
    if _server is not None:
        with _server.link, _server.process as process:  # upon which its ends of them are closed
            process.returncode = 0  # nothing for this process to wait for
        _server = None


os.register_at_fork(after_in_child=_forget_launchers)
