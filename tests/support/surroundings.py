"""What a hostile program could harm: a file, sockets, a secret, processes; and what is left of it afterwards."""

import contextlib
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

from m3jax.evaluation.sandbox import Limits, Outcome, run_program

SECRET = "M3JAX_TEST_SECRET"
TESTS = "assert f(3) == 4"
REASONS = ("failed", "error", "timeout", "memory", "died", "untested")
_PATIENCE = 60.0  # seconds: the machine may be busy, and nothing here ends by itself
_FORBIDDEN = ("/harm", "/etc/harm", "/usr/harm", "/dev/shm/harm")


class Surroundings(NamedTuple):
    """What a program could harm."""

    canary: Path
    tcp: socket.socket
    udp: socket.socket
    unix: socket.socket
    name: str

    def fill_in(self, program: str) -> str:
        """A program with its marks replaced by what they stand for."""
        for mark, value in (
            ("@CANARY@", str(self.canary)),
            ("@DIRECTORY@", str(self.canary.parent)),
            ("@PORT@", str(self.tcp.getsockname()[1])),
            ("@UNIX@", self.name),
            ("@PARENT@", str(os.getpid())),
            ("@SECRET@", SECRET),
        ):
            program = program.replace(mark, value)
        return program

    def harm(self) -> list[str]:
        """What is not as it was."""
        place = self.canary.parent
        found = [
            ("the canary is changed", self.canary.is_file() and self.canary.read_text() == "alive"),
            ("the canary's mode is changed", self.canary.is_file() and self.canary.stat().st_mode & 0o777 == 0o666),
            ("files lie beside the canary", [path.name for path in place.iterdir()] == [self.canary.name]),
            ("files were written elsewhere", not any(map(os.path.exists, (*_FORBIDDEN, "harm")))),
            ("a TCP connection was made", not _was_called(self.tcp)),
            ("a Unix connection was made", not _was_called(self.unix)),
            ("a datagram was sent", not _has_heard(self.udp)),
            ("temporary files are left", not os.listdir(tempfile.gettempdir())),
        ]
        return [said for said, well in found if not well]


def _was_called(listener: socket.socket) -> bool:
    try:
        listener.accept()[0].close()
    except BlockingIOError:
        return False
    return True


def _has_heard(receiver: socket.socket) -> bool:
    try:
        receiver.recv(9)
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def surroundings(directory: Path) -> Iterator[Surroundings]:
    """Sets them up below an empty directory, which temporary files are below too meanwhile.

    Args:
        directory: Of this test.
    """
    place = directory / "open to all"
    place.mkdir()
    canary = place / "canary"
    canary.write_text("alive")
    canary.chmod(0o666)
    place.chmod(0o777)
    temporary = directory / "temporary"
    temporary.mkdir()
    with (
        mock.patch.dict(os.environ, {SECRET: "secret"}),
        mock.patch.object(tempfile, "tempdir", str(temporary)),
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp,
        socket.socket(socket.AF_UNIX) as unix,
    ):
        udp.bind(tcp.getsockname())
        name = f"m3jax-test-{os.getpid()}"
        unix.bind("\0" + name)
        unix.listen()
        for listener in (tcp, udp, unix):
            listener.setblocking(False)
        yield Surroundings(canary, tcp, udp, unix, name)


def children() -> set[int]:
    """The processes that this one would have to wait for, adopted ones too."""
    found = set()
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):
                fields = Path(f"/proc/{name}/stat").read_text(errors="replace").rpartition(")")[2].split()
                if int(fields[1]) == os.getpid():
                    found.add(int(name))
    return found


def attempt(
    program: str, around: Surroundings, limits: Limits, allow_unsandboxed: bool = False
) -> tuple[Outcome, list[str]]:
    """Runs a hostile program; returns what became of it, and all that it should not have been able to do.

    This process adopts orphans (`kernel.become_subreaper`), so that what outlives a sandbox is seen.

    Args:
        program: With its marks.
        around: What it could harm.
        limits: What it may use.
        allow_unsandboxed: Go on without walls where there can be none.
    """
    before, begun = children(), time.monotonic()
    outcome = run_program(around.fill_in(program), TESTS, limits=limits, allow_unsandboxed=allow_unsandboxed)
    found = [
        ("it passed", not outcome.passed),
        (f"it ended as {outcome.reason!r}", outcome.reason in REASONS),
        ("it got through", "HARM" not in outcome.output),
        ("its output is longer than allowed", len(outcome.output) <= limits.output_bytes),
        ("it ran for too long", time.monotonic() - begun < limits.wall_seconds + _PATIENCE),
        ("processes are left", children() <= before),
    ]
    return outcome, [said for said, well in found if not well] + around.harm()
