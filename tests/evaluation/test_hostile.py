"""No program may harm the run, and none of these may pass."""

import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.hostile import FORGER, HELD_WITHOUT_NAMESPACES, LIMITS, PROGRAMS
from support.surroundings import TESTS, Surroundings, attempt, surroundings

from m3jax.evaluation import sandbox
from m3jax.evaluation.sandbox import kernel

needs_sandbox = pytest.mark.skipif(
    sandbox.why_no_sandbox() is not None, reason=f"no sandbox here: {sandbox.why_no_sandbox()}"
)


@pytest.fixture
def around(tmp_path: Path) -> Iterator[Surroundings]:
    with surroundings(tmp_path) as found:
        yield found


@pytest.fixture(scope="module", autouse=True)
def _adopt_orphans() -> None:
    # Whatever outlives its sandbox becomes a child of this process and is seen.
    kernel.become_subreaper()


def test_there_are_at_least_forty() -> None:
    assert len(PROGRAMS) >= 40


def test_harm_is_seen(around: Surroundings) -> None:
    assert not around.harm()
    around.canary.write_text("dead")
    (around.canary.parent / "another").touch()
    with socket.create_connection(around.tcp.getsockname()):
        assert around.harm() == ["the canary is changed", "files lie beside the canary", "a TCP connection was made"]


@needs_sandbox
def test_a_program_that_passes_is_no_hostile_one(around: Surroundings) -> None:
    _, harm = attempt("def f(x):\n    print('HARM')\n    return x + 1", around, LIMITS._replace(wall_seconds=30.0))
    assert harm == ["it passed", "it ended as 'passed'", "it got through"]


@needs_sandbox
@pytest.mark.parametrize("name", PROGRAMS)
def test_hostile_program_fails_and_does_no_harm(name: str, around: Surroundings) -> None:
    _, harm = attempt(PROGRAMS[name], around, LIMITS)
    assert not harm


@needs_sandbox
def test_the_run_goes_on_among_hostile_programs(around: Surroundings) -> None:
    good = sandbox.Program("def f(x): return x + 1", TESTS)
    names = ("fork bomb", "memory bomb", "endless output", "signal to everything", "daemon", "stops the examiner")
    bad = [sandbox.Program(around.fill_in(PROGRAMS[name]), TESTS) for name in names]
    mixed = [program for pair in zip(bad, [good] * len(bad), strict=True) for program in pair]
    outcomes = sandbox.run_programs(mixed, limits=LIMITS._replace(wall_seconds=3.0), workers=3)
    assert [outcome.passed for outcome in outcomes] == [False, True] * len(bad)
    assert not around.harm()


@pytest.mark.parametrize("name", HELD_WITHOUT_NAMESPACES)
def test_without_namespaces_programs_are_limited_and_swept(
    name: str, around: Surroundings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox, "why_no_sandbox", lambda: "for a test")
    _, harm = attempt(PROGRAMS[name], around, LIMITS, allow_unsandboxed=True)
    assert not harm


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
