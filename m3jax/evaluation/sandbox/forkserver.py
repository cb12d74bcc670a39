"""Launchers forked from an interpreter that is ready, a third of the time of starting one for each program.

The server knows nothing of programs: order, tests and secret travel as descriptors that only the launcher forked for
them reads. It has no threads and ends when the harness closes its link.
"""

import functools
import os
import signal
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NamedTuple, NoReturn

from m3jax.evaluation.sandbox import kernel

_REQUEST, _STARTED = b"r", b"s"
_SEEN = 7  # descriptors of a launcher: standard input, output and error, tests, secret, lifeline, its exit code's way
TESTS, SECRET, LINE, _STATUS = 3, 4, 5, 6
_DESCRIPTORS = 1024  # more than the server ever has
SECONDS_TO_END = 5.0  # for a launcher whose lifeline is cut; it takes milliseconds


def serve() -> NoReturn:
    """Forks launchers for whoever holds the other end of standard input, a socket, until that is closed."""
    from m3jax.evaluation.sandbox.launcher import guarded, outlast_signals, read_order, run_order

    outlast_signals()
    kernel.set_dumpable(False)  # or programs that run without walls, as this user, could get into what outlives them
    link = socket.socket(fileno=os.dup(0))
    os.close(0)
    os.open(os.devnull, os.O_RDWR)

    def launch(given: Sequence[int]) -> None:
        os.setsid()
        kernel.set_dumpable(True)  # for now, or its own files in /proc belonged to root
        for number, descriptor in enumerate(given):  # each was given a higher number than it gets, in this order
            os.dup2(descriptor, number)
        os.closerange(_SEEN, _DESCRIPTORS)
        status = socket.socket(fileno=_STATUS)
        process = os.pidfd_open(os.getpid())
        socket.send_fds(status, [_STARTED], [process])  # from here, as from the server it might come after the code
        os.close(process)
        code = run_order(read_order())
        status.send(bytes([code]))
        os._exit(code)

    while True:
        message, given, _, _ = socket.recv_fds(link, 1, _SEEN)
        if not message:
            os._exit(0)
        if os.fork() == 0:
            guarded(functools.partial(launch, given))
        for descriptor in given:
            os.close(descriptor)
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


class Launched(NamedTuple):
    """A launcher at work.

    Attributes:
        process: A descriptor of its process.
        status: Gives its exit code, or ends.
    """

    process: int
    status: socket.socket


def launch(link: socket.socket, order: int, output: int, errors: int, tests: int, secret: int, line: int) -> Launched:
    """Has a launcher forked.

    Args:
        link: To the server.
        order: What it reads as its standard input.
        output: Where its outcome goes.
        errors: Where its complaints go.
        tests: What it finds as descriptor `TESTS`.
        secret: What it finds as descriptor `SECRET`.
        line: What it finds as descriptor `LINE`.

    Raises:
        OSError: The server is gone, or the launcher could not begin.
    """
    mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        with theirs:
            socket.send_fds(link, [_REQUEST], [order, output, errors, tests, secret, line, theirs.fileno()])
        _, found, _, _ = socket.recv_fds(mine, 1, 1)
        if not found:
            raise ConnectionResetError("no launcher has begun")
    except BaseException:
        mine.close()
        raise
    return Launched(found[0], mine)


def exit_code(launched: Launched, seconds: float, cut: Callable[[], None]) -> int | None:
    """Waits for a launcher to end; one that takes longer is killed, and all that it started with it.

    Args:
        launched: The launcher.
        seconds: How long it may take.
        cut: Cuts its lifeline; called where waiting is interrupted, which is passed on when it has ended.

    Returns:
        Its exit code; -9 if something killed it; None if that was done here.
    """
    with launched.status as status:
        status.settimeout(seconds)
        try:
            found = status.recv(1)
        except TimeoutError:
            with suppress(ProcessLookupError):  # it has just ended
                signal.pidfd_send_signal(launched.process, signal.SIGKILL)
            status.settimeout(None)
            status.recv(1)  # until all of its processes have ended
            return None
        except BaseException:
            cut()
            status.settimeout(SECONDS_TO_END)
            with suppress(TimeoutError):
                status.recv(1)
            raise
        finally:
            os.close(launched.process)
    return found[0] if found else -signal.SIGKILL
