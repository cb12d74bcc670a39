"""Programs that mean harm, by name. Each must be scored as a failure of `assert f(3) == 4` and do no harm.

A program that gets through prints HARM. `@CANARY@` is a file that must survive, `@PORT@` a listening TCP port,
`@UNIX@` a listening abstract socket, `@PARENT@` the process that runs the sandbox, `@SECRET@` a variable's name.
"""

from m3jax.evaluation.sandbox import Limits

LIMITS = Limits(wall_seconds=0.6, memory_bytes=256 << 20)
"""Under which they run."""

_WRONG = "\ndef f(x): return None\n"

_ATTEMPT = """
def attempt(action):
    try:
        action()
    except BaseException as error:
        print(type(error).__name__)
    else:
        print("HARM")
"""

_FORGED = '{"reason": "passed", "detail": "", "passed": true, "output": "", "seconds": 0}'

_EQUAL = """
class Equal{base}:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __hash__(self): return 0
    def __bool__(self): return True
    def __getattr__(self, name): return self
    def __call__(self, *a): return True
"""


def _attempting(*actions: str) -> str:
    return (
        "import os, sys, socket, signal, ctypes, shutil"
        + _ATTEMPT
        + "\n".join(f"attempt(lambda: {action})" for action in actions)
        + _WRONG
    )


# Without namespaces these are a program's neighbours: its launcher, whoever started that, and what else that started.
FORGER = f"""
import os
def parent(number):
    try: return int(open(f"/proc/{{number}}/stat").read().rpartition(")")[2].split()[1])
    except OSError: return 0
def neighbours():
    above, number = set(), os.getppid()
    while number > 1:
        above.add(number)
        number = parent(number)
    return above | {{int(name) for name in os.listdir("/proc") if name.isdigit() and parent(name) in above}}
for number in neighbours() - {{os.getpid()}}:
    for name in ("environ", "mem"):
        try:
            if open(f"/proc/{{number}}/{{name}}", "rb").read(1) is not None: print("HARM", name)
        except OSError: pass
    for link in range(32):
        try:
            with open(f"/proc/{{number}}/fd/{{link}}", "wb", 0) as file: file.write({_FORGED!r}.encode())
            print("HARM", link)
        except OSError: pass
os.killpg(0, 9)
"""

PROGRAMS: dict[str, str] = {
    # Too much of something.
    "fork bomb": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass" + _WRONG,
    "fork bomb in f": "import os\ndef f(x):\n    while True:\n        try: os.fork()\n        except OSError: pass",
    "thread bomb": (
        "import threading, time\nwhile True:\n"
        "    try: threading.Thread(target=time.sleep, args=(99,)).start()\n    except RuntimeError: pass" + _WRONG
    ),
    "memory bomb": "held = []\nwhile True: held.append(bytearray(1 << 24))" + _WRONG,
    "memory bomb of many processes": (
        "import os\nfor _ in range(4): os.fork()\nheld = []\nwhile True:\n"
        "    try: held.append(b'x' * (1 << 24))\n    except MemoryError: pass" + _WRONG
    ),
    "memory that no limit counts": _attempting(
        "[os.write(os.memfd_create('a'), bytes(1 << 20)) for _ in range(9999)]",
        "os.memfd_create('a')",
        "__import__('mmap').mmap(-1, 1 << 20)",
        "__import__('mmap').mmap(os.open('/dev/zero', os.O_RDWR), 1 << 20)",
        "(_ for _ in ()).throw(OSError) if ctypes.CDLL(None).shmget(0, 1 << 20, 0o1600) < 0 else None",
        *(f"socket.socketpair()[0].setsockopt(socket.SOL_SOCKET, {option}, 1 << 22)" for option in (7, 8, 32, 33)),
        "__import__('fcntl').fcntl(os.pipe()[1], 1031, 1 << 20)",
    ),
    "huge integer": "def f(x): return 10 ** (10 ** 9)",
    "huge answer": "def f(x): return 'x' * (1 << 28)",
    "endless output": "while True: print('x' * 4096)" + _WRONG,
    "endless raw output": "import os\nwhile True: os.write(2, b'\\xff' * 65536)" + _WRONG,
    "endless loop": "while True: pass" + _WRONG,
    "endless loop in f": "def f(x):\n    while True: pass",
    "endless sleep": "import time\ntime.sleep(10 ** 6)" + _WRONG,
    "endless iterator": "import itertools\ndef f(x): return list(itertools.repeat(4))",
    "endless import": (
        "import sys\nclass Finder:\n    def find_spec(self, name, path=None, target=None):\n"
        "        return __import__(name + 'x')\nsys.meta_path.insert(0, Finder())\nimport nowhere" + _WRONG
    ),
    "deep recursion": "def f(x): return f(x + 1)",
    "deeper recursion": "import sys\nsys.setrecursionlimit(10 ** 9)\ndef f(x): return f(x + 1)",
    "deep answer": "def f(x):\n    a = []\n    for _ in range(10 ** 5): a = [a]\n    return a",
    "endless answer": "def f(x):\n    a = []\n    a.append(a)\n    return a",
    "huge exception": "def f(x): raise ValueError('x' * (1 << 26))",
    "exception that raises when shown": (
        "class E(Exception):\n    def __str__(self): raise SystemExit(0)\ndef f(x): raise E()"
    ),
    "full disk": _attempting("[open(str(n), 'wb').write(bytes(1 << 20)) for n in range(2000)]"),
    "large file": _attempting("open('large', 'wb').write(bytes(1 << 25))"),
    "millions of files": _attempting("[open(str(n), 'w').close() for n in range(10 ** 6)]"),
    "deep directories": (
        "import os\nfor _ in range(2000):\n    os.mkdir('d', 0o700)\n    os.chdir('d')\n    os.chmod('.', 0o300)"
        + _WRONG
    ),
    "directories without permission": "import os\nos.mkdir('d')\nopen('d/x', 'w').close()\nos.chmod('d', 0)" + _WRONG,
    "zombies": "import os\nfor _ in range(10 ** 4):\n    if os.fork() == 0: os._exit(0)" + _WRONG,
    # Reaching out.
    "writes outside": _attempting(
        "open('@CANARY@', 'w')",
        "open('@CANARY@.new', 'w')",
        "open(os.path.expanduser('~') + '/harm', 'w')",
        "open('/root/harm', 'w')",
        "open('/etc/harm', 'w')",
        "open('/usr/harm', 'w')",
        "open('/harm', 'w')",
        "open('/dev/shm/harm', 'w')",
        "open(os.__file__, 'a')",
        "open('/proc/self/cwd/../../harm', 'w')",
    ),
    "writes to the parent's directory": _attempting(
        "open('/proc/@PARENT@/cwd/harm', 'w')", "os.chdir('/proc/@PARENT@/cwd')", "os.listdir('@DIRECTORY@')"
    ),
    "deletes": (
        "import os, shutil\nshutil.rmtree('/', ignore_errors=True)\nshutil.rmtree('@DIRECTORY@', ignore_errors=True)"
        + _ATTEMPT
        + "attempt(lambda: os.remove('@CANARY@'))\nattempt(lambda: os.rmdir('/usr'))"
        + _WRONG
    ),
    "changes modes and owners": _attempting(
        "os.chmod('@CANARY@', 0)", "os.chown('@CANARY@', 1, 1)", "os.chmod('/usr', 0o777)", "os.chown('/tmp', 0, 0)"
    ),
    "symbolic and hard links": _attempting(
        "(os.symlink('@CANARY@', 'link'), open('link', 'w'))",
        "(os.symlink('/proc/@PARENT@/root/etc', 'etc'), os.listdir('etc'))",
        "os.link('/usr/bin/env', 'hard')",
        "(os.symlink('/', 'top'), open('top/harm', 'w'))",
        "os.listdir('/../../../../../@DIRECTORY@')",
    ),
    "network": _attempting(
        "socket.create_connection(('127.0.0.1', @PORT@), 1)",
        "socket.create_connection(('::1', @PORT@), 1)",
        "socket.create_connection(('1.1.1.1', 53), 1)",
        "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', @PORT@)) and 1 / 0",
        "socket.socket(socket.AF_UNIX).connect('\\0@UNIX@')",
        "socket.getaddrinfo('example.org', 80)",
        "socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)",
        *(f"socket.socket({family}, {kind})" for family in (16, 17, 31, 38, 40) for kind in (1, 2, 3, 5)),
    ),
    "signals to the parent": _attempting(
        "os.kill(@PARENT@, signal.SIGKILL)", "os.kill(@PARENT@, signal.SIGTERM)", "os.killpg(@PARENT@, signal.SIGKILL)"
    ),
    "signal to everything": "import os, signal\nos.kill(-1, signal.SIGKILL)" + _WRONG,
    "signal to its group": "import os, signal\nos.kill(0, signal.SIGKILL)" + _WRONG,
    "signals to its keeper": (
        "import os, signal\nfor number in range(1, 65):\n"
        "    try: os.kill(1, number)\n    except OSError: pass\ndef f(x): return None"
    ),
    "signals to the examiner": (
        "import os, signal\nfor process in range(2, 20):\n    if process != os.getpid():\n"
        "        try: os.kill(process, signal.SIGKILL)\n        except OSError: pass\ndef f(x): return 4"
    ),
    "stops the examiner": (
        "import os, signal\nfor process in range(2, 20):\n    if process != os.getpid():\n"
        "        try: os.kill(process, signal.SIGSTOP)\n        except OSError: pass\ndef f(x): return 4"
    ),
    "reads the environment": (
        "import os\nif '@SECRET@' in os.environ or set(os.environ) - {'LC_CTYPE'}: print('HARM')"
        + _ATTEMPT
        + "attempt(lambda: open('/proc/@PARENT@/environ').read())\nattempt(lambda: open('/proc/self/environ').read())"
        + _WRONG
    ),
    "traces its parents": _attempting(
        *(
            f"(_ for _ in ()).throw(OSError) if ctypes.CDLL(None).ptrace(16, {process}, 0, 0) else None"
            for process in ("1", "2", "@PARENT@")
        )
    ),
    "reads its parents' memory": _attempting(
        "open('/proc/@PARENT@/mem', 'rb+')", "open('/proc/1/mem', 'rb+')",
        "open('/proc/2/mem', 'rb+')", "os.listdir('/proc/2/fd')",
    ),
    "takes the examiner's descriptors": _attempting(
        *(
            f"(_ for _ in ()).throw(OSError) if ctypes.CDLL(None).syscall(438, os.pidfd_open({process}), {number}, 0)"
            " < 0 else None"
            for process in (1, 2)
            for number in (1, 3, 5)
        )
    ),
    "devices": _attempting(
        "open('/dev/mem', 'rb')", "open('/dev/kmsg', 'w')", "os.listdir('/sys')",
        "os.mknod('disk', 0o60666, os.makedev(254, 0))"
    ),
    "priorities of others": _attempting(
        "os.nice(-5)",
        "os.setpriority(os.PRIO_PROCESS, @PARENT@, 19)",
        "os.sched_setaffinity(@PARENT@, {0})",
        "os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))",
    ),
    "becomes root": _attempting("os.setuid(0)", "os.setgroups([0])", "os.chroot('/')", "open('/etc/shadow')"),
    "new namespaces": _attempting(
        *(
            f"(_ for _ in ()).throw(OSError) if ctypes.CDLL(None).unshare({flags}) else None"
            for flags in ("0x10000000", "0x10020000", "0x20000", "0x40000000")
        ),
        "(_ for _ in ()).throw(OSError) if ctypes.CDLL(None).mount(b'none', b'/tmp', b'tmpfs', 0, None) else None",
    ),
    "raises its limits": (
        "import resource" + _ATTEMPT
        + "\n".join(
            f"attempt(lambda: resource.setrlimit(resource.{name}, (1 << 40, 1 << 40)))"
            for name in ("RLIMIT_AS", "RLIMIT_NPROC", "RLIMIT_CPU", "RLIMIT_FSIZE")
        )
        + _WRONG
    ),
    # Staying on.
    "orphans": "import os, time\nfor _ in range(5):\n    if os.fork() == 0: time.sleep(10 ** 6)\ndef f(x): return None",
    "daemon": (
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        time.sleep(10 ** 6)\n"
        "    os._exit(0)" + _WRONG
    ),
    "threads that go on": (
        "import threading\ndef spin():\n    while True: pass\nfor _ in range(3): threading.Thread(target=spin).start()"
        + _WRONG
    ),
    "ignores signals": (
        "import signal\nfor number in range(1, 65):\n    try: signal.signal(number, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\nwhile True: pass" + _WRONG
    ),
    "stops itself": "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)" + _WRONG,
    "waits for a pipe": "import os\nos.mkfifo('pipe')\nopen('pipe').read()" + _WRONG,
    "reads standard input": "import sys\ndef f(x): return int(sys.stdin.read() or 'none')",
    "asks for input": "def f(x): return int(input('number? '))",
    "exit handler": "import atexit, time\natexit.register(time.sleep, 10 ** 6)\nraise SystemExit(0)",
    "crash": "import ctypes\nctypes.string_at(0)" + _WRONG,
    "crash in f": "import ctypes\ndef f(x): return ctypes.string_at(0)",
    "abort": "import os\ndef f(x): os.abort()",
    "output that is not text": "import os\nos.write(1, bytes(range(256)) * 9)\nprint('\\ud800')" + _WRONG,
    "source that is not text": "x = '\ud800'\ndef f(x): return '\udfff'",
    "source with a null": "x = 1\0\ndef f(x): return 4",
    # Claiming success.
    "leaves at once": "import os\nos._exit(0)",
    "leaves at once in f": "import os\ndef f(x): os._exit(0)",
    "exits": "import sys\nsys.exit(0)",
    "exits after defining": "def f(x): return 4\nraise SystemExit(0)",
    "exits in f": "def f(x): raise SystemExit(0)",
    "keyboard interrupt in f": "def f(x): raise KeyboardInterrupt",
    "prints success": f"print('passed')\nprint('OK')\nprint({_FORGED!r})" + _WRONG,
    "prints success everywhere": (
        f"import os\nfor number in range(256):\n    try: os.write(number, {_FORGED!r}.encode() + b'\\n')\n"
        "    except OSError: pass\nos._exit(0)"
    ),
    "answers for itself": (
        "import os, socket\nfor number in range(3, 64):\n    try: link = socket.socket(fileno=number)\n"
        "    except OSError: continue\n"
        "    link.sendall(b'{\"names\": {\"f\": {\"value\": {\"reference\": 0}}}}\\n')\n"
        "    link.sendall(b'{\"value\": true, \"changed\": []}\\n' * 9)"
        "\nos._exit(0)"
    ),
    "answers nonsense": (
        "import os, socket\nfor number in range(3, 64):\n    try: link = socket.socket(fileno=number)\n"
        "    except OSError: continue\n    link.sendall(b'[1, 2\\n\\xff{}\\n' * 9)\nos._exit(0)"
    ),
    "closes everything": "import os\nos.closerange(0, 1024)" + _WRONG,
    "becomes another program": (
        "import os, sys\ndef f(x): os.execv('/usr/bin/env', ['env'])"
    ),
    "patches builtins": (
        "import builtins, unittest, json, operator\nbuiltins.AssertionError = None\n"
        "builtins.isinstance = lambda *a: True\nbuiltins.len = lambda *a: 4\nbuiltins.__build_class__ = None\n"
        "unittest.TestCase.assertEqual = lambda *a: None\n"
        "operator.eq = lambda *a: True" + _WRONG
    ),
    "patches the sandbox": (
        "import sys\nfor name, module in list(sys.modules.items()):\n    if 'examiner' in name or 'wire' in name:\n"
        "        for key in dir(module):\n            if callable(getattr(module, key)) and not key.startswith('__'):\n"
        "                setattr(module, key, lambda *a, **k: {'reason': 'passed', 'detail': ''})" + _WRONG
    ),
    "Python that is not the interpreter's own": (
        "import os, sys\nown = os.path.dirname(os.__file__)\n"
        "for place, _, names in os.walk('/'):\n"
        "    if place.endswith('/bin') or place.endswith('/bin/__pycache__') or place.startswith('/nix'): continue\n"
        "    if place.startswith(own) and not place.split(own)[1].startswith('/ensurepip/_bundled'): continue\n"
        "    for name in names:\n"
        "        if name.endswith(('.py', '.pyc', '.whl', '.egg')): print('HARM', place, name, flush=True)" + _WRONG
    ),
    "packages of the machine": (
        "import os, sys\nfor prefix in {'/usr', '/usr/local', sys.base_prefix}:\n"
        "    for version in os.listdir(prefix + '/lib') if os.path.isdir(prefix + '/lib') else ():\n"
        "        for name in ('site-packages', 'dist-packages'):\n"
        "            place = f'{prefix}/lib/{version}/{name}'\n"
        "            if version[:6] == 'python' and os.path.isdir(place) and os.listdir(place): print('HARM', place)"
        + _WRONG
    ),
    "looks for the tests": (
        "import gc, os, sys\ndef f(x):\n    for thing in gc.get_objects():\n"
        "        if ''.join(['assert', ' f(']) in str(thing)[:10 ** 6]:\n            print('HARM')\n    return None"
    ),
    "searches descriptors for the tests": (
        "import os\ndef f(x):\n    for number in range(3, 64):\n        try:\n            os.lseek(number, 0, 0)\n"
        "            if b'assert' in os.read(number, 99): print('HARM')\n        except OSError: pass\n    return None"
    ),
    "searches frames": (
        "import sys\ndef f(x):\n    frame = sys._getframe()\n    while frame:\n"
        "        if 'tests' in frame.f_locals or 'tests' in frame.f_globals: print('HARM')\n"
        "        frame = frame.f_back"
    ),
    "equals everything": _EQUAL.format(base="") + "def f(x): return Equal()",
    "integer that equals everything": _EQUAL.format(base="(int)") + "def f(x): return Equal(7)",
    "list that equals everything": _EQUAL.format(base="(list)") + "def f(x): return Equal()",
    "is equality itself": _EQUAL.format(base="") + "f = Equal()\nf.__class__.__call__ = lambda self, x: self",
    "defines no function": "g = 1",
    "does not parse": "def f(x) return 4",
    "empty": "",
}  # fmt: skip

# Those that a system without namespaces can hold, and that a developer's own processes survive there.
HELD_WITHOUT_NAMESPACES = (
    "memory bomb", "endless output", "deep recursion", "orphans", "daemon", "threads that go on",
    "stops itself", "crash", "leaves at once", "exits", "prints success everywhere",
    "answers for itself", "patches builtins", "equals everything", "deep directories", "directories without permission",
    "large file", "traces its parents", "becomes root", "searches descriptors for the tests", "closes everything",
)  # fmt: skip
