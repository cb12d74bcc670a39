"""The sandbox does right by honest programs, and says so where it cannot be."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from m3jax.errors import M3Error
from m3jax.evaluation import sandbox
from m3jax.evaluation.sandbox import Limits, Program, launcher, launching, run_program, run_programs, view

PACKAGE = Path(sandbox.__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(
    sandbox.why_no_sandbox() is not None, reason=f"no sandbox here: {sandbox.why_no_sandbox()}"
)

HONEST = {
    "number": ("def f(x): return x + 1", "assert f(3) == 4"),
    "big number": ("def f(x): return 7 ** x", "assert f(999) == 7 ** 999"),
    "floats": ("def f(x): return [x / 3, float('inf'), -0.0]", "assert f(1.0) == [1 / 3, float('inf'), 0]"),
    "not a number": ("def f(): return float('nan')", "import math\nassert math.isnan(f()) and f() != f()"),
    "tuples are not lists": ("def f(): return (1, [2])", "assert f() == (1, [2]) and f() != [1, [2]]"),
    "sets and dicts": ("def f(): return {(1, 2): {3}, None: True}", "assert f() == {(1, 2): {3}, None: True}"),
    "types are kept": (
        "def f(): return True, 1.0, b'x', 1j",
        "assert [type(v) for v in f()] == [bool, float, bytes, complex]",
    ),
    "text": ("def f(): return 'é\\ud800\\x00'", "assert f() == 'é\\ud800\\x00'"),
    "identity of constants": ("def f(x): return None if x else True", "assert f(1) is None\nassert f(0) is True"),
    "counter": (
        "from collections import Counter\ndef f(s): return Counter(s)",
        "assert f('aab') == {'a': 2, 'b': 1}\nassert f('a')['z'] == 0",
    ),
    "ordered dict, deque, range": (
        "import collections\ndef f(): return collections.OrderedDict(a=1), collections.deque([1]), range(3)",
        "import collections\nassert f() == (collections.OrderedDict(a=1), collections.deque([1]), range(3))",
    ),
    "dates and decimals": (
        "import datetime as d, decimal, fractions\ndef f():\n"
        "    return [d.date(2020, 1, 2), d.datetime(2020, 1, 2, 3), d.timedelta(1, 2), decimal.Decimal('1.5'),"
        "            fractions.Fraction(1, 3)]",
        "import datetime as d, decimal, fractions\nassert f() == "
        "[d.date(2020, 1, 2), d.datetime(2020, 1, 2, 3), d.timedelta(1, 2), decimal.Decimal('1.5'),"
        "fractions.Fraction(1, 3)]",
    ),
    "dict views": ("def f(): return {1: 2}.keys()", "assert f() == {1} and set(f()) == {1}"),
    "generator": ("def f(n):\n    yield from range(n)", "assert list(f(3)) == [0, 1, 2]\nassert sum(f(4)) == 6"),
    "map and zip": ("def f(): return map(str, [1, 2])", "assert list(f()) == ['1', '2']"),
    "named tuple": (
        "import collections\nP = collections.namedtuple('P', 'a b')\ndef f(): return P(1, 2)",
        "assert f() == (1, 2)\nassert P(3, 4) == (3, 4)",
    ),
    "class": (
        "class Node:\n    def __init__(self, v): self.v, self.next = v, None\n    def __len__(self): return 9\n"
        "def total(n): return 0 if n is None else n.v + total(n.next)",
        "a = Node(1)\na.next = Node(2)\nassert total(a) == 3\nassert a.next.v == 2 and len(a) == 9 and bool(a)",
    ),
    "equal instances": (
        "from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int\ndef f(x): return P(x)",
        "assert f(1) == P(1) and f(1) != P(2)",
    ),
    "changes its argument": (
        "def f(a, d, s):\n    a.sort(); d['k'] = 1; s.clear()",
        "a, d, s = [2, 1], {}, {3}\nf(a, d, s)\nassert a == [1, 2] and d == {'k': 1} and not s",
    ),
    "keywords and defaults": ("def f(a, *, b=2): return a * b", "assert f(3) == 6 and f(3, b=5) == 15"),
    "expected error": (
        "def f(x):\n    if x < 0: raise ValueError('negative')\n    return x",
        "try:\n    f(-1)\nexcept ValueError as error:\n    assert 'negative' in str(error)\n"
        "else:\n    raise AssertionError",
    ),
    "own error": (
        "class Bad(Exception): pass\ndef f(): raise Bad('x')",
        "try:\n    f()\nexcept Exception as error:\n    assert 'Bad' in str(error)\nelse:\n    raise AssertionError",
    ),
    "named like a builtin": ("def sum(a, b): return a * b", "assert sum(3, 4) == 12"),
    "prints": ("print('loading')\ndef f(x):\n    print('é', x)\n    return x", "assert f(1) == 1"),
    "main block is not run": ("def f(): return 1\nif __name__ == '__main__':\n    input()", "assert f() == 1"),
    "writes in its directory": (
        "def f(x):\n    open('a', 'w').write(x)\n    return open('a').read()", "assert f('hi') == 'hi'"
    ),
    "threads and processes": (
        "import subprocess, concurrent.futures as c\ndef f():\n    with c.ThreadPoolExecutor(4) as pool:\n"
        "        return sum(pool.map(int, '123')) + int(subprocess.check_output(['/usr/bin/env', 'printf', '4']))",
        "assert f() == 10",
    ),
    "the interpreter's library": (
        "import json, re, math, random, itertools, hashlib, sqlite3, decimal, heapq, bisect, typing, zlib\n"
        "def f(): return hashlib.md5(b'').hexdigest()",
        "assert f() == 'd41d8cd98f00b204e9800998ecf8427e'",
    ),
    "what the interpreter's library reads": (
        "import bz2, ctypes, lzma, ssl, zoneinfo\nimport subprocess, sys\n"
        "def f(): return subprocess.check_output([sys.executable, '-I', '-S', '-c', 'print(6 * 7)'], text=True)",
        "assert f() == '42\\n'",
    ),
    "many calls": ("def f(x): return x", "for i in range(3000): assert f(i) == i"),
    "large values": ("def f(n): return list(range(n))", "assert f(200000) == list(range(200000))"),
}  # fmt: skip


@pytest.mark.parametrize("name", HONEST)
def test_honest_program_passes(name: str) -> None:
    outcome = run_program(*HONEST[name])
    assert outcome.passed, outcome


def test_output_is_kept_up_to_the_limit() -> None:
    source, tests = HONEST["prints"]
    assert run_program(source, tests).output == "loading\né 1\n"
    outcome = run_program("print('x' * 10 ** 6)\ndef f(x): return x", tests, limits=Limits(output_bytes=1000))
    assert outcome.passed
    assert outcome.output == "x" * 1000
    outcome = run_program(
        "import sys\nsys.stdout.buffer.write(b'\\xff' * 900000)\ndef f(x): return x",
        tests,
        limits=Limits(output_bytes=1 << 20),
    )
    assert outcome.passed
    assert len(outcome.output) == 900000  # six times as long on its way


@pytest.mark.parametrize(
    ("source", "tests", "reason", "detail"),
    [
        ("def f(x): return x", "assert f(3) == 4", "failed", "AssertionError at: assert f(3) == 4"),
        ("def f(x): return x / 0", "\nassert f(3) == 4", "failed", "ZeroDivisionError: "),
        ("def f(x) return x", "assert f(3) == 4", "error", "SyntaxError: "),
        ("import numpy_of_my_own", "assert f(3) == 4", "error", "ModuleNotFoundError: "),
        ("def g(x): return x", "assert f(3) == 4", "failed", "NameError: "),
        ("def f(x): return x", "assert 3 == 3", "untested", "never used"),
        ("def f(x): return x", "", "untested", "never used"),
        ("def f(x): return x", "assert f(3) =", "failed", "SyntaxError: "),
        ("def f(x):\n    while True: pass", "assert f(3) == 4", "timeout", "used 1 s of processor time"),
        ("import time\ndef f(x): time.sleep(99)", "assert f(3) == 4", "timeout", "not done after 2 s"),
        ("import os\ndef f(x): os._exit(0)", "assert f(3) == 4", "died", "ended before the tests did"),
        ("def f(x): return lambda: x", "assert f(3) == 4", "failed", "AssertionError"),
        ("def f(x): return 1", "try:\n    f(3)()\nexcept Exception: pass\nassert 0", "failed", "AssertionError"),
    ],
)
def test_failure_says_why(source: str, tests: str, reason: str, detail: str) -> None:
    limits = Limits(wall_seconds=2) if "not done after" in detail else Limits(cpu_seconds=1)
    outcome = run_program(source, tests, limits=limits)
    assert outcome.reason == reason
    assert not outcome.passed
    assert detail in f"{outcome.detail}"


_DEAF = "import signal\nfor n in set(signal.Signals) - {9, 19}: signal.signal(n, signal.SIG_IGN)\n"


@pytest.mark.parametrize("walls", [True, False])
@pytest.mark.parametrize(
    ("source", "tests"),
    [
        (_DEAF + "def f():\n    while True: pass", "f()"),  # killed as by anyone, a second after the signal
        ("def f(): pass", "f()\nwhile True: pass"),  # it is the tests' process whose time is up
    ],
)
def test_processor_time_that_is_used_up_is_told(
    source: str, tests: str, walls: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not walls:
        monkeypatch.setattr(sandbox, "why_no_sandbox", lambda: "for a test")
    outcome = run_program(source, tests, limits=Limits(cpu_seconds=1), allow_unsandboxed=not walls)
    assert (outcome.reason, outcome.detail) == ("timeout", "used 1 s of processor time")


def test_processor_time_of_other_processes_is_not_taken_for_the_programs() -> None:
    source = (
        "import os, time\ndef f():\n    for _ in range(3):\n        if os.fork() == 0:\n"
        "            while time.process_time() < 0.5: pass\n            os._exit(0)\n        os.wait()\n"
        "    os.kill(os.getpid(), 9)"
    )
    outcome = run_program(source, "f()", limits=Limits(cpu_seconds=1))
    assert (outcome.reason, outcome.detail) == ("died", "the program ended before the tests did")


def test_a_harness_with_many_open_files_shows_none_of_them() -> None:
    source = (
        "import os\ndef f():\n    found = []\n    for number in range(3, 3000):\n"
        "        try: found.append(os.fstat(number).st_mode)\n        except OSError: pass\n    return len(found)"
    )
    with contextlib.ExitStack() as stack:
        for _ in range(1500):
            stack.enter_context(open(os.devnull))
        assert run_program(source, "assert f() == 1").passed  # the link to the tests and nothing else


def test_death_cannot_be_swallowed_by_the_tests() -> None:
    tests = "for _ in range(3):\n    try: f()\n    except: pass\n"
    outcome = run_program("import os\ndef f(): os._exit(0)", tests)
    assert outcome.reason == "died"


def test_a_patched_module_does_not_reach_the_tests() -> None:
    source = "import math\nmath.isclose = lambda *a: True\ndef f(x): return 0.0"
    assert run_program(source, "assert math.isclose(f(1), 1.0)").reason == "failed"


def test_a_shadowed_builtin_does_not_reach_the_tests() -> None:
    source = "def abs(x): return 0\ndef all(x): return True\ndef f(x): return 7"
    assert run_program(source, "assert abs(f(3) - 4) < 1e-6 and all([f(3) == 4])").reason == "failed"


def test_memory_of_all_processes_is_counted_together() -> None:
    source = (
        "import os, time\ndef f(x):\n    for _ in range(3): os.fork()\n    held = bytearray(os.urandom(1 << 20)) * 60\n"
        "    time.sleep(5)\n    return 4"
    )
    outcome = run_program(source, "assert f(3) == 4", limits=Limits(memory_bytes=200 << 20))
    assert outcome.reason == "memory"


def test_programs_run_side_by_side_and_in_order() -> None:
    programs = [Program(f"def f(x): return x + {number}", "assert f(1) == 3") for number in range(6)]
    outcomes = run_programs(programs, workers=3)
    assert [outcome.passed for outcome in outcomes] == [number == 2 for number in range(6)]


def test_programs_of_one_server_do_not_meet() -> None:
    first = "import builtins, math, sys\nbuiltins.sum = math.sqrt = None\nsys.seen = 1\ndef f(): return sum is None"
    second = "import math, sys\ndef f(): return sum([1, 2]), math.sqrt(9), hasattr(sys, 'seen')"
    assert run_program(first, "assert f()").passed
    server = launching._server
    assert server is not None
    assert run_program(second, "assert f() == (3, 3, False)").passed
    assert launching._server is server  # and no launcher was started for it
    numbers = "import random, os\ndef f(): return [random.random(), os.urandom(8)]"
    said = [run_program(numbers + "\nprint(f())", "f()").output for _ in range(2)]
    assert said[0] != said[1]


def test_a_server_that_was_ended_is_started_anew() -> None:
    assert run_program(*HONEST["number"]).passed
    server = launching._server
    assert server is not None
    server.process.kill()
    server.process.wait()
    assert run_program(*HONEST["number"]).passed
    assert launching._server is not None
    assert launching._server is not server


def test_a_busy_server_is_taken_for_no_dead_one(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = "import os, time\nreal = os.pidfd_open\nos.pidfd_open = lambda number: (time.sleep(0.2), real(number))[1]\n"
    launching._end_server()
    monkeypatch.setattr(launching, "_SERVE", slow + launching._SERVE)
    assert run_program(*HONEST["number"]).passed  # the launcher would be done before the server tells of it
    server = launching._server
    assert server is not None
    assert run_program(*HONEST["number"]).passed
    assert launching._server is server
    launching._end_server()


def test_a_second_launcher_finds_its_order_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    real = socket.recv_fds

    def lost(link: socket.socket, size: int, most: int) -> tuple[bytes, list[int], int, str]:
        message, found, flags, address = real(link, size, most)
        monkeypatch.undo()
        for process in found:
            os.close(process)
        return message, [], flags, address  # as where this process has no descriptor left for it

    monkeypatch.setattr(socket, "recv_fds", lost)
    assert run_program("import time\ntime.sleep(0.3)\ndef f(x): return x + 1", "assert f(3) == 4").passed


def test_a_program_calls_as_deep_whatever_launched_it(monkeypatch: pytest.MonkeyPatch) -> None:
    source = (
        "def deep(n=1):\n    try: return deep(n + 1)\n    except RecursionError: return n\nprint(deep())\n"
        "def f(x): return x"
    )
    forked = run_program(source, "f(1)").output
    monkeypatch.setattr(launching, "forked", lambda *_: None)
    assert run_program(source, "f(1)").output == forked
    assert int(forked) > 900


_FORKS = """
import os, signal
from m3jax.evaluation.sandbox import launching, run_program, why_no_sandbox
print(why_no_sandbox())
def judged(): return run_program("def f(x): return x", "assert f(3) == 3").passed
with launching._lock:  # as another thread does that starts a server
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        launching._link()
        own = launching._server.process.pid
        os._exit(judged() + 2 * (launching._server.process.pid == own))
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
server, (ours, theirs) = launching._server, os.pipe()
if os.fork() == 0:
    os.close(theirs)
    os.read(ours, 1)  # lives as long as its parent
    os._exit(0)
print(judged(), launching._server is server)
"""


def test_a_forked_process_has_a_server_of_its_own_and_holds_none() -> None:
    found = subprocess.run(
        [sys.executable, "-c", _FORKS], env={"PYTHONPATH": str(PACKAGE.parent)}, capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip
    assert found.stdout.split() == ["None", "3", "True", "True"], found


def test_where_there_is_no_server_each_program_gets_a_launcher_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "pidfd_open")
    monkeypatch.setattr(launching, "_server", None)
    for name in ("number", "changes its argument", "writes in its directory", "prints"):
        assert run_program(*HONEST[name]).passed
    assert launching._server is None


def test_where_python_has_no_files_in_memory_they_are_on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create")
    assert run_program(*HONEST["changes its argument"]).passed


def test_a_launcher_that_hangs_is_ended_with_all_that_it_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "_GRACE_SECONDS", -2.5)  # as if its own watch had failed
    outcome = run_program("while True: pass", "", limits=Limits(wall_seconds=3))
    assert (outcome.reason, outcome.detail) == ("timeout", "the sandbox itself did not end in time")
    monkeypatch.undo()
    assert run_program(*HONEST["number"]).passed


def test_without_a_sandbox_it_must_be_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "why_no_sandbox", lambda: "unshare: Operation not permitted")
    with pytest.raises(M3Error, match=r"unshare: Operation not permitted.*--allow-unsandboxed"):
        run_program("def f(): return 1", "assert f() == 1")
    for name in ("number", "changes its argument", "writes in its directory", "prints"):
        assert run_program(*HONEST[name], allow_unsandboxed=True).passed


def test_a_directory_is_removed_whatever_is_in_it() -> None:
    place = tempfile.mkdtemp(prefix="m3jax-")
    os.makedirs(place + "/a/b/c")
    os.symlink("/usr", place + "/a/link")
    os.symlink("/usr", place + "/link")
    Path(place, "a", "file").touch(0)
    os.chmod(place + "/a/b", 0)
    launcher.remove(place)
    assert not os.path.exists(place)
    assert os.listdir("/usr")


_ORDINARY = """
import sys, types
package = types.ModuleType("m3jax"); package.__path__ = [sys.argv[1]]; sys.modules["m3jax"] = package
outer = types.ModuleType("m3jax.evaluation"); outer.__path__ = [sys.argv[1] + "/evaluation"]
sys.modules["m3jax.evaluation"] = outer
from m3jax.evaluation.sandbox import Limits, run_program, why_no_sandbox
print(why_no_sandbox())
small = Limits(memory_bytes=1 << 28)
print(run_program("import os\\ndef f(x): return os.getuid()", "assert f(3) == 1000").passed)
for harm in ("import os\\nwhile True: os.fork()", "import os\\nos.kill(-1, 9)",
             "open('/tmp/x', 'wb').write(bytes(1 << 27))", "open(%r, 'w')" % sys.argv[2],
             "import os\\nos.kill(%d, 9)" % __import__("os").getpid()):
    print(run_program(harm + "\\ndef f(x): return 4", "assert f(3) == 4", limits=small).reason)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="an ordinary user already: the other tests show it")
def test_ordinary_user_has_the_same_sandbox() -> None:
    python = shutil.which("python3", path="/usr/bin:/usr/local/bin")
    version = "import sys; sys.exit(sys.version_info < (3, 11))"
    if python is None or subprocess.run([python, "-c", version], check=False).returncode:
        pytest.skip("no Python of 3.11 or later that every user may run")
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o755)
        shutil.copytree(PACKAGE, place + "/m3jax", ignore=shutil.ignore_patterns("__pycache__"))
        mine = Path(place, "mine")
        mine.write_text("alive")
        os.chown(mine, 54321, 54321)
        found = subprocess.run(
            [python, "-c", _ORDINARY, place + "/m3jax", str(mine)],
            user=54321, group=54321, extra_groups=[], capture_output=True, text=True, cwd="/", env={}, check=False,
        )  # fmt: skip
        assert found.stdout.split() == ["None", "True", "error", "died", "error", "error", "error"], found
        assert mine.read_text() == "alive"


def test_importing_evaluation_brings_no_jax_code_of_its_own() -> None:
    code = (
        "import sys, types, pathlib\npackage = types.ModuleType('m3jax'); package.__path__ = [sys.argv[1]]\n"
        "sys.modules['m3jax'] = package\nimport m3jax.evaluation\n"
        "print([name for name in ('jax', 'lm_eval', 'datasets', 'transformers', 'pyarrow') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code, str(PACKAGE)], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_of_directories_of_libraries_only_what_holds_no_python_is_seen(tmp_path: Path) -> None:
    """But for the interpreter's own library, wherever it lies; nor is what is too large to be looked through."""
    usr, own = tmp_path / "usr", tmp_path / "usr" / "lib64" / "python3.11"
    for file in (
        *("lib/libc.so", "lib/locale/C/words", "lib/sdk/lib/third_party/six.py", "lib/tool/six.whl", "lib/loose.py"),
        *("lib/x86_64-linux-gnu/libm.so", "lib/x86_64-linux-gnu/gir/pack/a.cpython-311.so", "lib/python3.11/a.py"),
        *("lib64/python3.11/os.py", "lib64/python3.11/site-packages/a.py", "lib64/python3.11/dist-packages/a.py"),
        *("lib64/python3.11/ensurepip/_bundled/pip.whl", "lib64/python3.9/words", "libexec/a.py", "share/a.py"),
        *(f"lib/large/{number}" for number in range(view._MOST_LOOKED_AT + 1)),
    ):
        (usr / file).parent.mkdir(parents=True, exist_ok=True)
        (usr / file).touch()
    (usr / "lib32").symlink_to("lib64")
    (usr / "lib" / "linked").symlink_to("sdk")
    seen = view.view_of([str(usr), str(tmp_path / "none")], [str(own)], [str(usr / "bin")])
    assert [place for place in seen["shown"] if place.startswith(str(tmp_path))] == [
        str(usr / name) for name in ("lib", "lib32", "lib64", "bin")
    ]
    assert {str(Path(place).relative_to(usr)) for place in seen["hidden"] if place.startswith(str(usr))} == {
        *("lib/sdk", "lib/tool", "lib/loose.py", "lib/x86_64-linux-gnu/gir", "lib/python3.11", "lib/large"),
        *("lib64/python3.11/site-packages", "lib64/python3.11/dist-packages", "lib64/python3.11/ensurepip/_bundled"),
        "lib64/python3.9",
    }
    elsewhere = view.view_of([str(usr)], [str(tmp_path / "own" / "python3.11")], [])
    assert str(tmp_path / "own" / "python3.11") in elsewhere["shown"]
