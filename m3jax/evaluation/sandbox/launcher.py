"""The process between the harness and a program: builds the walls, watches, and ends everything.

Started or forked afresh for each program, without threads, so forking here is safe. Four processes: the launcher stays
in the harness's PID namespace; its child, the keeper, is the first process of the new one and outlives nothing: when it
ends the kernel kills all the rest. The keeper's children are the candidate (the program) and the examiner (the tests).

However the harness ends, the launcher's end of its lifeline shows it, and the launcher ends the keeper. Where there are
no namespaces, launcher and keeper each end what the other leaves.
"""

import contextlib
import json
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, NoReturn

from m3jax.evaluation.sandbox import confine, kernel
from m3jax.evaluation.sandbox.candidate import serve
from m3jax.evaluation.sandbox.examiner import examine
from m3jax.evaluation.sandbox.wire import Channel

CANNOT_CONFINE, OUT_OF_TIME = 3, 4
_SLACK_SECONDS = 5.0  # for walls to be built and a keeper to be done after its time
_FROM_OUTSIDE = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
_TICK_SECONDS = 0.05
_DESCRIPTORS = 1024  # more than this process ever has
_LONGEST_VERDICT = 1 << 16
_PAGE = os.sysconf("SC_PAGE_SIZE")
_TICKS = os.sysconf("SC_CLK_TCK")


class _Death(NamedTuple):
    """A process's status, and the processor time that it took itself, without its children, where that is known."""

    status: int
    seconds: float = 0.0


class _Ends(NamedTuple):
    """What the keeper reads: the program's output, the examiner's verdict, and nothing until the launcher ends."""

    output: int
    verdict: int
    launcher: int


def main() -> NoReturn:
    """Read the order from standard input, run it, write the outcome to standard output."""
    outlast_signals()
    os._exit(run_order(read_order()))


def outlast_signals() -> None:
    """Go on when a terminal or a supervisor ends the harness with all that is near it: its end is seen otherwise."""
    for number in _FROM_OUTSIDE:
        signal.signal(number, signal.SIG_IGN)


def read_order() -> dict[str, Any]:
    """What is to be run, from standard input."""
    with open(0, "rb", closefd=False) as file:  # a pipe, or a file
        order: dict[str, Any] = json.loads(file.read())
    for name in ("tests", "secret", "line"):
        given = order[name]
        order[name] = os.dup(given)  # the lowest free number, so that all descriptors here are small
        os.close(given)
    return order


def run_order(order: dict[str, Any]) -> int:
    """Run an order and write the outcome to standard output; returns the exit code."""
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # should memory run out all the same, the kernel takes the program first
    user, directory = confine.own_user(), order["directory"]
    try:
        if order["confined"]:
            confine.separate(user)
        else:
            kernel.become_subreaper()
            os.mkdir(directory)
            os.chmod(directory, 0o777)  # it runs as another user where it can; the parent directory is sticky
    except OSError as error:
        _complain(error)
        return CANNOT_CONFINE
    try:
        return _run_keeper(order, user)
    finally:
        if not order["confined"]:
            _sweep([])  # what a keeper that was killed has left
            remove(directory)


def _run_keeper(order: dict[str, Any], user: int) -> int:
    """Have a keeper run the order, and end it when the harness ends or it takes too long."""
    kernel.set_dumpable(False)  # or a program of the same user could write to where the outcome goes
    mine, its = socket.socketpair()  # each of the two sees by it that the other has ended
    keeper = os.fork()
    if keeper == 0:
        mine.close()
        guarded(lambda: _keep(order, user, its.fileno()))
    its.close()
    ends = select.poll()
    ends.register(mine, select.POLLIN)
    ends.register(order["line"], select.POLLIN)
    ready = [number for number, _ in ends.poll(1000 * (order["walls"]["wall_seconds"] + _SLACK_SECONDS))]
    if mine.fileno() not in ready:
        os.kill(keeper, signal.SIGKILL)
    _, status = os.waitpid(keeper, 0)
    return os.waitstatus_to_exitcode(status) & 0xFF if ready else OUT_OF_TIME


def remove(directory: str) -> None:
    """Remove a directory whatever a program put there: modes that forbid it, or depths that no path can name.

    Args:
        directory: Which; it may be gone already.
    """
    token, count = os.urandom(8).hex(), 0
    with contextlib.suppress(OSError):
        while entries := list(os.scandir(directory)):
            for entry in entries:
                if not entry.is_dir(follow_symlinks=False):
                    os.unlink(entry.path)
                    continue
                os.chmod(entry.path, 0o700)
                for name in os.listdir(entry.path):  # its contents move up, so that depth never grows
                    child = os.path.join(entry.path, name)
                    if os.path.isdir(child) and not os.path.islink(child):
                        os.chmod(child, 0o700)
                    os.rename(child, os.path.join(directory, f"{token}-{count}"))
                    count += 1
                os.rmdir(entry.path)
        os.rmdir(directory)


def _content(file: int) -> bytes:
    """All of a file, wherever others who hold it have read to."""
    return os.pread(file, os.fstat(file).st_size, 0)


def _complain(error: OSError) -> None:
    os.write(2, f"{error.strerror or error}".encode())


def guarded(body: Callable[[], None]) -> NoReturn:
    """Run the body of a forked process, which must never return into the code of its parent.

    Args:
        body: What it does.
    """
    try:
        body()
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.write(2, f"{type(error).__name__}: {error}".encode(errors="replace")[:4000])
        os._exit(1)
    os._exit(0)


def _keep(order: dict[str, Any], user: int, launcher: int) -> None:
    walls: confine.Walls = order["walls"]
    for number in _FROM_OUTSIDE:  # programs begin as ever
        signal.signal(number, signal.SIG_DFL)  # with default actions, the first process ignores its namespace
    processes = None
    try:
        if order["confined"]:
            processes = confine.build_root(walls, order["seen"])
        else:
            kernel.become_subreaper()
            os.chdir(order["directory"])
        alone = order["confined"] or os.geteuid() == 0
        confine.drop_privileges(user, order["confined"])
    except OSError as error:
        _complain(error)
        os._exit(CANNOT_CONFINE)
    if select.select([launcher], [], [], 0)[0]:
        os._exit(1)  # the launcher ended before there was a signal for it
    inside, outside = socket.socketpair()
    output, output_end = os.pipe()
    verdict, verdict_end = os.pipe()

    def run_candidate() -> None:
        _settle((outside.fileno(),), output_end)
        confine.limit(walls, alone)
        sys.setrecursionlimit(sys.getrecursionlimit() + _depth())  # the program's own, however it came to be launched
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")  # type: ignore[union-attr]
        serve(order["source"], Channel(outside))

    def run_examiner() -> None:
        _settle((inside.fileno(), verdict_end, order["tests"]), None)
        confine.limit(walls, alone)
        found = examine(_content(order["tests"]).decode("utf-8", "surrogatepass"), Channel(inside))
        os.write(verdict_end, json.dumps(found).encode())

    started = time.monotonic()
    children = [_fork(run_examiner), _fork(run_candidate)]
    for end in (output_end, verdict_end, inside.fileno(), outside.fileno()):
        os.close(end)
    secret = _content(order["secret"])  # only now, so that no child has it in its memory
    ends = _Ends(output, verdict, launcher)
    found, printed = _watch(walls, order["output_bytes"], processes, children, ends)
    found |= {"output": printed.decode(errors="replace"), "seconds": time.monotonic() - started}
    if processes is None:
        _sweep(children)
    os.write(1, secret + json.dumps(found).encode())


def _depth() -> int:
    """How many calls led here."""
    frame, count = sys._getframe(), 0
    while frame.f_back is not None:
        frame, count = frame.f_back, count + 1
    return count


def _fork(body: Callable[[], None]) -> int:
    child = os.fork()
    if child == 0:
        os.setsid()
        guarded(body)
    return child


def _settle(kept: tuple[int, ...], output: int | None) -> None:
    """Leave a new process no descriptors but these, an empty standard input, and its output where it belongs."""
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 0)
    for number in (1, 2):
        os.dup2(null if output is None else output, number)
    last = 2
    for number in sorted(kept):
        os.closerange(last + 1, number)
        last = number
    os.closerange(last + 1, _DESCRIPTORS)


def _watch(
    walls: confine.Walls, output_bytes: int, processes: int | None, children: list[int], ends: _Ends
) -> tuple[dict[str, Any], bytes]:
    """Collect output and verdict until the examiner has spoken, the launcher has ended, time is up, or memory is."""
    output, verdict, launcher = ends
    printed, spoken = bytearray(), bytearray()
    ended: dict[int, _Death] = {}
    deadline = time.monotonic() + walls["wall_seconds"]
    waiting = set(ends)
    while True:
        for ready in select.select(list(waiting), [], [], _TICK_SECONDS)[0]:
            piece = os.read(ready, 1 << 16)
            if ready == launcher:
                return {"reason": "died", "detail": "the sandbox was killed"}, b""
            if not piece:
                waiting.discard(ready)
            elif ready == output:
                printed += piece[: output_bytes - len(printed)]
            else:
                spoken += piece
        ended |= _reap(children, processes)
        if verdict not in waiting or len(spoken) > _LONGEST_VERDICT:
            while len(printed) < output_bytes and select.select([output], [], [], 0)[0]:
                piece = os.read(output, output_bytes - len(printed))
                if not piece:
                    break
                printed += piece
            found = _verdict(bytes(spoken))
            if found["reason"] == "died" and _out_of_time(confine.processor_seconds(walls), children, processes, ended):
                found = {"reason": "timeout", "detail": f"used {walls['cpu_seconds']:g} s of processor time"}
            return found, bytes(printed)
        if time.monotonic() > deadline:
            return {"reason": "timeout", "detail": f"not done after {walls['wall_seconds']:g} s"}, bytes(printed)
        if processes is not None and _resident(processes) > walls["memory_bytes"]:
            return {"reason": "memory", "detail": f"more than {walls['memory_bytes']} bytes"}, bytes(printed)


def _verdict(spoken: bytes) -> dict[str, Any]:
    try:
        found = json.loads(spoken)
        return {"reason": str(found["reason"]), "detail": str(found["detail"])}
    except (ValueError, KeyError, TypeError):
        return {"reason": "died", "detail": "the tests were killed before they ended"}


def _reap(children: Sequence[int] = (), processes: int | None = None) -> dict[int, _Death]:
    """Bury the dead: what became of them, by process; of the children with the time that they took."""
    ended = {}
    with contextlib.suppress(ChildProcessError):
        while (found := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None:
            process = found.si_pid
            seconds = _processor_seconds(process, processes) if process in children else 0.0
            ended[process] = _Death(os.waitpid(process, 0)[1], seconds)
    return ended


def _processor_seconds(process: int, processes: int | None) -> float:
    """What a process that is not buried took itself; what `os.wait4` tells has its children's too."""
    try:
        place = "/proc/" if processes is None else ""
        file = os.open(f"{place}{process}/stat", os.O_RDONLY, dir_fd=processes)
    except OSError:
        return 0.0
    try:
        fields = os.read(file, 4096).rpartition(b")")[2].split()
    finally:
        os.close(file)
    return (int(fields[11]) + int(fields[12])) / _TICKS


def _out_of_time(seconds: float, children: Sequence[int], processes: int | None, ended: dict[int, _Death]) -> bool:
    """Whether examiner or candidate, which may be dying still, had used its processor time up when it ended.

    One that does not heed the first signal is killed as by anyone, and only its time tells why.
    """
    give_up = time.monotonic() + 1.0
    while not ended.keys() >= set(children) and time.monotonic() < give_up:
        time.sleep(0.01)
        ended |= _reap(children, processes)
    deaths = [ended[child] for child in children if child in ended]
    return any(
        (os.WIFSIGNALED(death.status) and os.WTERMSIG(death.status) == signal.SIGXCPU) or death.seconds >= seconds
        for death in deaths
    )


def _resident(processes: int) -> int:
    """Bytes of memory that all processes of the namespace hold."""
    total = 0
    for name in os.listdir(processes):
        if name.isdigit():
            with contextlib.suppress(OSError):
                file = os.open(f"{name}/statm", os.O_RDONLY, dir_fd=processes)
                try:
                    fields = os.read(file, 256).split()
                finally:
                    os.close(file)
                total += int(fields[1]) * _PAGE
    return total


def _descendants() -> Iterator[int]:
    """Processes below this one; as a subreaper it is the parent of every orphan."""
    parents: dict[int, int] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:
                parents[int(name)] = int(file.read().rpartition(b")")[2].split()[1])
    for process in parents:
        above = process
        while (above := parents.get(above, 0)) > 1:
            if above == os.getpid():
                yield process
                break


def _sweep(children: list[int]) -> None:
    """Without a PID namespace: stop, then kill, whatever descends from here until nothing does."""
    for child in children:
        with contextlib.suppress(OSError):
            os.killpg(child, signal.SIGKILL)
    give_up = time.monotonic() + 5.0
    while time.monotonic() < give_up:
        found = list(_descendants())
        for wanted in (signal.SIGSTOP, signal.SIGKILL):  # stopped first, none can fork while the others are killed
            for process in found:
                with contextlib.suppress(OSError):
                    os.kill(process, wanted)
        _reap()
        if not found:
            return
