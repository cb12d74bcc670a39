"""No program may harm the run, and none of these may pass."""

import contextlib
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from support.hostile import FORGER, PROGRAMS

from m3jax.evaluation import sandbox
from m3jax.evaluation.sandbox import Limits, kernel, run_program

WALL_SECONDS = 0.6
LIMITS = Limits(wall_seconds=WALL_SECONDS, memory_bytes=256 << 20)
TESTS = "assert f(3) == 4"

needs_sandbox = pytest.mark.skipif(
    sandbox.why_no_sandbox() is not None, reason=f"no sandbox here: {sandbox.why_no_sandbox()}"
)


class Surroundings(NamedTuple):
    """What a program could harm."""

    canary: Path
    tcp: socket.socket
    udp: socket.socket
    unix: socket.socket
    name: str

    def fill_in(self, program: str) -> str:
        for mark, value in (
            ("@CANARY@", str(self.canary)),
            ("@DIRECTORY@", str(self.canary.parent)),
            ("@PORT@", str(self.tcp.getsockname()[1])),
            ("@UNIX@", self.name),
            ("@PARENT@", str(os.getpid())),
            ("@SECRET@", "M3JAX_TEST_SECRET"),
        ):
            program = program.replace(mark, value)
        return program

    def assert_unharmed(self) -> None:
        assert self.canary.read_text() == "alive"
        assert os.stat(self.canary).st_mode & 0o777 == 0o666
        assert sorted(path.name for path in self.canary.parent.iterdir()) == ["canary"]
        assert not [path for path in ("/harm", "/etc/harm", "/usr/harm", "/dev/shm/harm") if os.path.exists(path)]
        assert not (Path.cwd() / "harm").exists()
        for listener in (self.tcp, self.unix):
            with pytest.raises(BlockingIOError):
                listener.accept()
        with pytest.raises(BlockingIOError):
            self.udp.recv(9)
        assert os.listdir(tempfile.gettempdir()) == []


@pytest.fixture
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Surroundings]:
    monkeypatch.setenv("M3JAX_TEST_SECRET", "secret")
    place = tmp_path / "open to all"
    place.mkdir()
    canary = place / "canary"
    canary.write_text("alive")
    canary.chmod(0o666)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    place.chmod(0o777)
    with (
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


@pytest.fixture(scope="module", autouse=True)
def _adopt_orphans() -> None:
    # Whatever outlives its sandbox becomes a child of this process and is seen.
    kernel.become_subreaper()


def children() -> list[int]:
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):
                fields = Path(f"/proc/{name}/stat").read_text(errors="replace").rpartition(")")[2].split()
                if int(fields[1]) == os.getpid():
                    found.append(int(name))
    return found


def run_hostile(program: str, surroundings: Surroundings, allow_unsandboxed: bool = False) -> sandbox.Outcome:
    before = set(children())
    started = time.monotonic()
    outcome = run_program(surroundings.fill_in(program), TESTS, limits=LIMITS, allow_unsandboxed=allow_unsandboxed)
    assert not outcome.passed
    assert outcome.reason in ("failed", "error", "timeout", "memory", "died", "untested")
    assert "HARM" not in outcome.output
    assert len(outcome.output) <= LIMITS.output_bytes
    assert time.monotonic() - started < WALL_SECONDS + 60  # the machine may be busy; nothing here ends by itself
    assert set(children()) <= before
    surroundings.assert_unharmed()
    return outcome


def test_there_are_at_least_forty() -> None:
    assert len(PROGRAMS) >= 40


@needs_sandbox
@pytest.mark.parametrize("name", PROGRAMS)
def test_hostile_program_fails_and_does_no_harm(name: str, surroundings: Surroundings) -> None:
    run_hostile(PROGRAMS[name], surroundings)


@needs_sandbox
def test_the_run_goes_on_among_hostile_programs(surroundings: Surroundings) -> None:
    good = sandbox.Program("def f(x): return x + 1", TESTS)
    names = ("fork bomb", "memory bomb", "endless output", "signal to everything", "daemon", "stops the examiner")
    bad = [sandbox.Program(surroundings.fill_in(PROGRAMS[name]), TESTS) for name in names]
    mixed = [program for pair in zip(bad, [good] * len(bad), strict=True) for program in pair]
    outcomes = sandbox.run_programs(mixed, limits=LIMITS._replace(wall_seconds=3.0), workers=3)
    assert [outcome.passed for outcome in outcomes] == [False, True] * len(bad)
    surroundings.assert_unharmed()


# Those that a system without namespaces can hold, and that a developer's own processes survive there.
_HELD_WITHOUT_NAMESPACES = (
    "memory bomb", "endless output", "deep recursion", "orphans", "daemon", "threads that go on",
    "stops itself", "crash", "leaves at once", "exits", "prints success everywhere",
    "answers for itself", "patches builtins", "equals everything", "deep directories", "directories without permission",
    "large file", "traces its parents", "becomes root", "searches descriptors for the tests", "closes everything",
)  # fmt: skip


@pytest.mark.parametrize("name", _HELD_WITHOUT_NAMESPACES)
def test_without_namespaces_programs_are_limited_and_swept(
    name: str, surroundings: Surroundings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox, "why_no_sandbox", lambda: "for a test")
    run_hostile(PROGRAMS[name], surroundings, allow_unsandboxed=True)


# --- As an ordinary user, and where the system lacks what walls are made of ---------------------------------------

_PACKAGE = Path(sandbox.__file__).resolve().parents[2]
_AS_NOBODY = """
import json, os, sys
from m3jax.evaluation.sandbox import Program, kernel, run_program, why_no_sandbox
from m3jax.errors import M3Error
order = json.load(sys.stdin)
one = {
    "namespaces": kernel.Refusal(tuple(order["unshare"])),
    "filters": kernel.Refusal(tuple(order["prctl"]), argument=0, unless=tuple(order["allowed"])),
}
kernel.forbid_new_privileges()
kernel.filter_system_calls([one[name] for name in order["without"]])
said = {"why": why_no_sandbox()}
try:
    said["strict"] = run_program(order["source"], order["tests"])
except M3Error as error:
    said["strict"] = str(error)
said["allowed"] = run_program(order["source"], order["tests"], allow_unsandboxed=True)
print(json.dumps(said))
"""
_NUMBERS = {"x86_64": {"unshare": [272], "prctl": [157]}, "aarch64": {"unshare": [97], "prctl": [167]}}


def _works_for_nobody(python: str) -> bool:
    program = [python, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"]
    try:
        return subprocess.run(program, user=65534, group=65534, extra_groups=[], cwd="/").returncode == 0
    except OSError:
        return False


def without(what: list[str], source: str) -> dict[str, Any]:
    """What becomes of a program that an ordinary user runs where the kernel refuses something."""
    if os.geteuid() != 0 or platform.machine() not in _NUMBERS:
        pytest.skip("needs root, to become an ordinary user")
    python = next(filter(_works_for_nobody, (os.path.realpath(sys.executable), "/usr/bin/python3")), None)
    if python is None:
        pytest.skip("an ordinary user can run no Python here")
    order = {"without": what, "source": source, "tests": TESTS, **_NUMBERS[platform.machine()]}
    order["allowed"] = [option for option in range(100) if option != 22]  # of prctl, PR_SET_SECCOMP being refused
    with tempfile.TemporaryDirectory() as place:  # this checkout may lie where only root reads
        os.chmod(place, 0o755)
        for part in ("__init__.py", "errors.py", "evaluation/sandbox"):
            source_of, target = _PACKAGE / part, Path(place, "m3jax", part)
            target.parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if source_of.is_dir() else shutil.copyfile)(source_of, target)
        Path(place, "m3jax", "evaluation", "__init__.py").touch()
        done = subprocess.run(
            [python, "-B", "-c", _AS_NOBODY],
            input=json.dumps(order),
            capture_output=True,
            text=True,
            cwd="/",
            user=65534,
            group=65534,
            extra_groups=[],
            env={"PYTHONPATH": place, "M3JAX_TEST_SECRET": "secret"},
        )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def test_without_namespaces_nothing_runs_unless_allowed() -> None:
    said = without(["namespaces"], "def f(x): return x + 1")
    assert "Operation not permitted" in said["why"]
    assert said["strict"].startswith("cannot run generated code safely: this system does not allow a sandbox")
    assert said["allowed"][0] is True


def test_without_filters_of_system_calls_nothing_runs_unless_allowed() -> None:
    said = without(["filters"], "def f(x): return x + 1")
    assert "seccomp" in said["why"] or "Operation not permitted" in said["why"]
    assert "pass --allow-unsandboxed" in said["strict"]
    assert said["allowed"][0] is True


def test_without_namespaces_no_program_reaches_its_launcher() -> None:
    passed, reason, detail, output, _ = without(["namespaces"], FORGER)["allowed"]
    assert (passed, reason, detail, output) == (False, "died", "the program ended before the tests did", "")
