"""However the harness ends, or is interrupted, nothing that it ran goes on and nothing is left of it."""

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from m3jax.evaluation import sandbox
from m3jax.evaluation.sandbox import confine, kernel, launching
from m3jax.evaluation.sandbox.view import machine_view

_PACKAGE = Path(sandbox.__file__).resolve().parents[2]
_PATIENCE = 40.0  # seconds: the machine may be busy, and what runs here would go on for ten minutes
_NAPS = 5  # processes of a program that naps, keeper and examiner among them
_WAYS = ("server", "no server", "no walls")

# A harness. What it is told: the way that programs run, what it does, and where temporary files go.
_HARNESS = """
import os, signal, sys, tempfile, time, types
for name, place in (("m3jax", sys.argv.pop(1)), ("m3jax.evaluation", sys.argv.pop(1))):
    sys.modules[name] = types.ModuleType(name)  # for it starts sooner without the rest
    sys.modules[name].__path__ = [place]
from m3jax.evaluation import sandbox
from m3jax.evaluation.sandbox import Limits, Program, launching, run_program, run_programs
way, task, tempfile.tempdir = sys.argv[1:]
sandbox.why_no_sandbox()
if way == "no server":
    launching._end_server()
    del os.pidfd_open
if way == "no walls":
    sandbox.why_no_sandbox = lambda: "for a test"
long = dict(limits=Limits(wall_seconds=600.0), allow_unsandboxed=way == "no walls")
napping = Program(
    "import os, time\\nopen('file', 'w').close()\\nfor _ in range(2):\\n    if os.fork() == 0: time.sleep(600)\\n"
    "def f(): time.sleep(600)", "f()"
)
fine = Program("def f(x): return x", "assert f(3) == 3")
def forks(*_):
    if os.fork() == 0: time.sleep(600)
signal.signal(signal.SIGUSR1, forks)
print("ready", flush=True)
try:
    if task == "one":
        said = [run_program(*napping, **long)]
    elif task == "many":
        said = run_programs([napping] * 9, workers=2, **long)
    while task == "endless":
        run_programs([fine] * 4, workers=2, **long)
    print(*[one.reason for one in said])
except KeyboardInterrupt:
    print("interrupted", os.listdir(tempfile.tempdir), flush=True)
    sys.stdin.read(1)
    print(run_program(*fine, **long).passed)
"""

pytestmark = pytest.mark.skipif(
    sandbox.why_no_sandbox() is not None, reason=f"no sandbox here: {sandbox.why_no_sandbox()}"
)


@pytest.fixture(scope="module", autouse=True)
def _adopt_orphans() -> None:
    kernel.become_subreaper()  # whatever outlives a harness becomes a child of this process and is seen


def _below(process: int) -> dict[int, int]:
    """The parents of all processes below one that have not ended."""
    parents, dead = {}, {process}  # those that have ended are links: one read a moment ago may have been theirs
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{name}/stat").read_text(errors="replace").rpartition(")")[2].split()
            parents[int(name)] = int(fields[1])
            if fields[0] in "ZX":
                dead.add(int(name))
    found = {process}
    while more := {one for one, parent in parents.items() if parent in found} - found:
        found |= more
    return {one: parents[one] for one in found - dead}


def _until(true: Callable[[], bool], what: str) -> None:
    give_up = time.monotonic() + _PATIENCE
    while not true():
        assert time.monotonic() < give_up, f"not so after {_PATIENCE} s: {what}"
        time.sleep(0.01)


@contextlib.contextmanager
def _harness(way: str, task: str, place: Path) -> Iterator[subprocess.Popen[str]]:
    """One that is ready; all that is below this process and was not before is killed at the end."""
    before = set(_below(os.getpid()))
    with subprocess.Popen(
        [sys.executable, "-c", _HARNESS, str(_PACKAGE), str(_PACKAGE / "evaluation"), way, task, str(place)],
        env={},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        text=True,
    ) as harness:
        try:
            assert harness.stdout is not None
            assert harness.stdout.readline() == "ready\n"
            yield harness
        finally:
            while left := set(_below(os.getpid())) - before:
                for process in left:
                    with contextlib.suppress(OSError):
                        os.kill(process, signal.SIGKILL)
                time.sleep(0.01)


def _run(harness: subprocess.Popen[str], programs: int) -> None:
    """Wait until so many programs nap."""
    least = programs * (1 + _NAPS)  # and their launchers
    _until(lambda: len(_below(harness.pid)) >= least, "all programs run")


def _nothing_left(before: set[int], place: Path) -> None:
    _until(lambda: not set(_below(os.getpid())) - before, "all that the harness started has ended")
    assert not os.listdir(place)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("way", _WAYS)
def test_nothing_outlives_a_harness_that_is_killed(way: str, number: signal.Signals, tmp_path: Path) -> None:
    before = set(_below(os.getpid()))
    with _harness(way, "many", tmp_path) as harness:
        _run(harness, 2)
        harness.send_signal(number)
        assert harness.wait(_PATIENCE) == -number
        _nothing_left(before, tmp_path)


@pytest.mark.parametrize("way", _WAYS)
def test_nothing_outlives_a_harness_that_is_killed_with_all_it_started(way: str, tmp_path: Path) -> None:
    before = set(_below(os.getpid()))
    with _harness(way, "many", tmp_path) as harness:
        _run(harness, 2)
        for process in (harness.pid, *_below(harness.pid)):  # as a supervisor does
            with contextlib.suppress(OSError):
                os.kill(process, signal.SIGTERM)
        _nothing_left(before, tmp_path)


@pytest.mark.parametrize("way", _WAYS)
def test_a_fork_of_the_harness_keeps_nothing_alive(way: str, tmp_path: Path) -> None:
    with _harness(way, "many", tmp_path) as harness:
        _run(harness, 2)
        known = set(_below(harness.pid))
        harness.send_signal(signal.SIGUSR1)
        _until(lambda: bool(set(_below(harness.pid)) - known), "the harness has forked")
        before = set(_below(os.getpid())) - known - {harness.pid}
        harness.kill()
        _nothing_left(before, tmp_path)


@pytest.mark.parametrize("way", _WAYS)
def test_nothing_outlives_a_harness_that_is_killed_while_programs_begin_and_end(way: str, tmp_path: Path) -> None:
    before = set(_below(os.getpid()))
    for tries in range(4):
        with _harness(way, "endless", tmp_path) as harness:
            time.sleep(0.017 * tries)
            harness.kill()
            _nothing_left(before, tmp_path)


@pytest.mark.parametrize(
    ("task", "programs", "reached"), [("one", 1, "all"), ("many", 2, "the harness"), ("many", 2, "all")]
)
@pytest.mark.parametrize("way", _WAYS)
def test_an_interrupt_ends_what_runs_at_once(way: str, task: str, programs: int, reached: str, tmp_path: Path) -> None:
    before = set(_below(os.getpid()))
    with _harness(way, task, tmp_path) as harness:
        assert harness.stdout is not None
        _run(harness, programs)
        for process in (harness.pid, *(_below(harness.pid) if reached == "all" else ())):
            with contextlib.suppress(OSError):
                os.kill(process, signal.SIGINT)
        heard = select.poll()
        heard.register(harness.stdout)
        assert heard.poll(1000 * _PATIENCE), "it goes on"
        assert harness.stdout.readline() == "interrupted []\n"
        _until(lambda: len(_below(harness.pid)) <= (way != "no server"), "only the server goes on")
        said, complaints = harness.communicate("x", _PATIENCE)
        assert (said, complaints, harness.returncode) == ("True\n", "", 0)
        _nothing_left(before, tmp_path)


@pytest.mark.parametrize("depth", ["launcher", "keeper"])
@pytest.mark.parametrize("way", _WAYS)
def test_launcher_and_keeper_end_what_the_other_leaves(way: str, depth: str, tmp_path: Path) -> None:
    before = set(_below(os.getpid()))
    with _harness(way, "one", tmp_path) as harness:
        _run(harness, 1)
        children: dict[int, list[int]] = {}
        for process, parent in _below(harness.pid).items():
            children.setdefault(parent, []).append(process)
        at = max(children[harness.pid])  # the launcher, or the server that has it
        path = [at]
        while at in children:
            at = max(children[at], key=lambda one: len(children.get(one, [])))
            path.append(at)
        launcher = path[1] if way == "server" else path[0]
        os.kill(launcher if depth == "launcher" else children[launcher][0], signal.SIGKILL)
        said, complaints = harness.communicate(timeout=_PATIENCE)
        assert (said, complaints) == ("died\n", "")
        _nothing_left(before, tmp_path)


def test_walls_are_built_upon_what_every_system_has(monkeypatch: pytest.MonkeyPatch) -> None:
    assert confine._foundation(machine_view()["shown"]) == os.path.realpath("/tmp")
    assert confine._foundation(["/opt/python", "/tmp/a/python"]) == "/proc"
    build = "from m3jax.evaluation.sandbox import confine\nconfine._FOUNDATIONS = ('/proc',)\n"
    launching._end_server()
    with monkeypatch.context() as patch:
        patch.setattr(launching, "_SERVE", build + launching._SERVE)
        source = "import os\ndef f(): return sorted(os.listdir('/proc')), os.listdir('/tmp')"
        assert sandbox.run_program(source, "assert f() == ([], [])").passed
    launching._end_server()
