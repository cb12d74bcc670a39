"""Every call that changes an output's place fails or is the last: what is there then, and what the same command does.

A kill is an exception that no handler outlives: from then on every call raises it and changes nothing, so that the
place stays as a process that is gone has left it; what that process had open is closed, as the system does.
`exit` ends the process instead.
"""

import builtins
import errno
import fcntl
import io
import json
import os
import shutil
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

import m3jax
from m3jax.errors import M3Error
from m3jax.evaluation import Completion, attack_journal, evaluate_task, get_task, robustness
from m3jax.evaluation.attacks.trial import attack_task
from m3jax.evaluation.models import deferred
from m3jax.evaluation.runner import read_examples, read_rows
from m3jax.outputs import directories
from m3jax.outputs.conversion import convert
from support.directories import recipe, write

ERRORS = ("EIO", "ENOSPC", "EDQUOT", "EINTR", "ESTALE", "EMFILE", "EROFS", "ENOLCK", "EOPNOTSUPP")
KINDS = {"kill": None, "torn": None, "exit": None, "short": None} | {name: getattr(errno, name) for name in ERRORS}
NAMES = ("rename", "replace", "unlink", "remove", "rmdir", "mkdir", "chmod", "link")
SIZES = ("posix_fallocate", "ftruncate", "truncate")
WRITES = ("pwrite", "write", "sendfile")
CALLS = (*NAMES, *SIZES, "pwrite", "sendfile", "fsync", "close")
"""Functions of `os`; files that are opened for writing, locks and exchanges are counted too."""
ONLY = {
    "short": WRITES,
    "ENOLCK": ("flock",),
    "EOPNOTSUPP": ("flock", "link", "posix_fallocate"),
    "EDQUOT": ("open", "mkdir", "link", *SIZES, *WRITES, "fsync", "close"),
}
"""Of a fault the calls that it is of, where it is not of all."""

_readlink = os.readlink  # which is a call itself
_close = os.close


class Killed(BaseException):
    """The process is gone."""


class Faults:
    """Counts the calls that change what is below a directory; the one of a number fails, or is where it all ends."""

    def __init__(self, root, at=0, kind="kill"):
        self.root, self.at, self.kind = str(root), at, kind
        self.calls = []
        self.is_dead = False
        self._is_last = lambda call: False
        self._lock = threading.RLock()
        self._stack = ExitStack()

    def __enter__(self):
        told = {"link": self._linked, "close": self._closed}
        for name in CALLS:
            if hasattr(os, name):
                self._patch(os, name, told.get(name, self._named))
        self._patch(os, "open", self._opened)
        self._patch(fcntl, "flock", self._named)
        for module in (builtins, io):
            self._stack.enter_context(mock.patch.object(module, "open", self._opening(module.open)))
        self._patch(directories, "exchange", lambda plain, one, other: (str(other), plain, (one, other), {}))
        return self

    def __exit__(self, *_):
        self._stack.close()

    def until(self, is_last):
        """Let it all end at the first call of which something is true."""
        self._is_last = is_last
        return self

    def has(self, call):
        """Whether a call of those counted is one that the fault is of."""
        return is_of(self.kind, call)

    def _patch(self, module, name, told):
        plain = getattr(module, name)

        def patched(*args, **keys):
            place, call, args, keys = told(plain, *args, **keys)
            if place is None or not place.startswith(self.root):
                return call(*args, **keys)
            if name == "close":
                return self._closing(name, place, lambda: call(*args))
            if self.hit(name, place, lambda: call(*args, **keys), half_of(call, name, args), isinstance(args[0], int)):
                return half_of(call, name, args)()  # of what is to be written, half is, and that is said
            if name == "fsync":  # no power is cut here, and it is what takes the time
                return None
            return call(*args, **keys)

        self._stack.enter_context(mock.patch.object(module, name, patched))

    def _named(self, plain, target, *args, **keys):
        descriptor = target.fileno() if hasattr(target, "fileno") else target
        return place_of(descriptor, keys.get("dir_fd")), plain, (descriptor, *args), keys

    def _linked(self, plain, source, target, **keys):
        return place_of(target, keys.get("dst_dir_fd")), plain, (source, target), keys

    def _closed(self, plain, descriptor):
        try:
            is_read = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
            place = None if is_read else place_of(descriptor, None)
        except OSError:  # of a descriptor that is none
            place = None
        return place, plain, (descriptor,), {}

    def _opened(self, plain, path, flags, *args, **keys):
        changes = flags & (os.O_CREAT | os.O_WRONLY | os.O_RDWR)
        return (place_of(path, keys.get("dir_fd")) if changes else None), plain, (path, flags, *args), keys

    def _opening(self, plain):
        """`open`, whose files count as they are written, cut and closed."""

        def opened(file, mode="r", buffering=-1, *args, **keys):
            if isinstance(file, int) or not set(mode) & set("wax+") or "opener" in keys:
                return plain(file, mode, buffering, *args, **keys)
            place = place_of(file, None)
            if not place.startswith(self.root):
                return plain(file, mode, buffering, *args, **keys)
            self.hit("open", place, lambda: plain(file, mode, buffering, *args, **keys))
            raw = _Raw(file, mode.replace("b", "").replace("t", ""), self, place)
            if buffering == 0:
                return raw
            buffered = (io.BufferedRandom if "+" in mode else io.BufferedWriter)(raw)
            return buffered if "b" in mode else io.TextIOWrapper(buffered, *args, **keys)

        return opened

    def hit(self, name, place, call, half=None, is_open=False):
        """Counts a call; raises if it is to fail, or where it all ends.

        Args:
            name: The function.
            place: What it is about.
            call: Does it.
            half: Does half of it, if it writes.
            is_open: Whether it is told a descriptor, so that the system's error names no file.

        Returns:
            Whether half is to be done.
        """
        with self._lock:
            if self.is_dead:
                raise Killed
            self.calls.append(f"{name} {place.removeprefix(self.root)}")
            if len(self.calls) != self.at and not self._is_last(self.calls[-1]):
                return False
            if self.kind == "short":
                return name in WRITES
            if self.kind in ("kill", "torn"):
                if self.kind == "torn" and name == "open":  # there, and nothing in it
                    made = call()
                    _close(made) if isinstance(made, int) else made.close()
                if self.kind == "torn" and name in WRITES:
                    half()
                self.is_dead = True
                raise Killed
            if self.kind == "exit":
                os._exit(9)
            if not self.has(name):
                return False
            named = () if is_open else (place,)
            raise OSError(KINDS[self.kind], os.strerror(KINDS[self.kind]), *named)

    def _closing(self, name, place, close):
        """Closes, whatever is said of it: a descriptor is gone even where the system has an error to tell."""
        try:
            self.hit(name, place, close, is_open=True)
        finally:
            close()


class _Raw(io.FileIO):
    """A file whose writes, cuts and end count."""

    def __init__(self, file, mode, faults, place):
        super().__init__(file, mode)
        self._faults, self._place = faults, place

    def write(self, data):
        half = memoryview(data).cast("B")
        half = half[: -(-len(half) // 2)]
        if self._faults.hit("write", self._place, None, lambda: super(_Raw, self).write(half), is_open=True):
            return super().write(half)
        return super().write(data)

    def truncate(self, size=None):
        self._faults.hit("truncate", self._place, None, is_open=True)
        return super().truncate(size)

    def close(self):
        if not self.closed:
            self._faults._closing("close", self._place, super().close)


def half_of(call, name, args):
    """What does half of a write."""
    if name == "sendfile":
        return lambda: call(*args[:-1], -(-args[-1] // 2))
    return lambda: call(args[0], memoryview(args[1])[: -(-len(args[1]) // 2)], *args[2:])


def is_of(kind, call):
    """Whether a call is one that a fault is of."""
    return call.partition(" ")[0] in ONLY.get(kind, (call.partition(" ")[0],))


def place_of(target, directory):
    """The path that a call is about."""
    if isinstance(target, int):
        return _readlink(f"/proc/self/fd/{target}")
    path = os.fspath(target)
    path = path.decode() if isinstance(path, bytes) else path
    return path if directory is None else f"{_readlink(f'/proc/self/fd/{directory}')}/{path}"


def contents(directory):
    """The bytes of every file, journals aside; None where there is no directory."""
    if not directory.exists():
        return None
    files = [path for path in directory.rglob("*") if path.is_file() and not path.name.startswith("m3jax-journal")]
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


SHAPES = {"a": (40, 30), "b": (50, 30), "c": (30, 30)}
STARTS = ("fresh", "resumed", "overwriting", "without exchange")


def make_inputs(place):
    """Three small models, and a merge of them."""
    for seed, name in enumerate(("base", "expert-0", "expert-1")):
        rng = np.random.default_rng(seed)
        write(place / name, {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()})
    commands(place, "merge", False)[0](place / "merged")


def commands(inputs, kind, overwrite):
    """The command, and one that makes another output of the kind."""
    if kind == "convert":
        return (
            lambda out: convert(inputs / "expert-0", out, "msgpack", max_shard_size=5000, overwrite=overwrite),
            lambda out: convert(inputs / "expert-1", out, "safetensors"),
        )
    asked = recipe(inputs, merge_method="ties", parameters={"density": 0.5, "trim_scope": "model"})
    other = recipe(inputs, merge_method="task_arithmetic")
    if kind == "documents":
        first = {"name": "first", "merge_method": "linear", "models": asked["models"]}
        last = {"merge_method": "linear", "models": ["first", asked["base_model"]], "intermediates": [first]}
        return (
            lambda out: m3jax.merge_checkpoint(last, out, overwrite=overwrite),
            lambda out: m3jax.merge_checkpoint(other, out),
        )
    if kind == "replay":
        return (
            lambda out: m3jax.replay(inputs / "merged", out, overwrite=overwrite),
            lambda out: m3jax.merge_checkpoint(other, out),
        )
    return (
        lambda out: m3jax.merge_checkpoint(asked, out, max_shard_size=5000, overwrite=overwrite),
        lambda out: m3jax.merge_checkpoint(other, out),
    )


class Scenario(NamedTuple):
    """A command, in all that it needs to be stepped through.

    Attributes:
        command: Makes the output that it is given; raises M3Error.
        start: A directory with what is there before, copied for every run.
        place: Where to; it is removed.
        reference: The contents of the output.
        exchanges: Whether the system has a call that exchanges two names.
    """

    command: Callable[[Path], Any]
    start: Path
    place: Path
    reference: dict[str, bytes]
    exchanges: bool


def prepare(inputs, tmp_path, kind, start):
    """A merge, a replay or a conversion that begins at one of `STARTS`."""
    command, other = commands(inputs, kind, start in STARTS[2:])
    for name in ("start", "whole"):
        (tmp_path / name).mkdir(exist_ok=True)
    command(tmp_path / "whole" / "out")
    if start in STARTS[2:]:
        other(tmp_path / "start" / "out")
    if start == "resumed":
        last = Faults(tmp_path / "start").until(lambda call: call.startswith("fsync") and "model-00003" in call)
        with suppress(Killed), last:
            command(tmp_path / "start" / "out")
    reference = contents(tmp_path / "whole" / "out")
    return Scenario(command, tmp_path / "start", tmp_path / "place", reference, start != STARTS[3])


def step_through(scenario, kind, stride=1, faulty=Faults):
    """Run a command with a fault at each call in turn, and then again without one.

    Args:
        scenario: The command.
        kind: Of `KINDS`, or as `faulty` knows it.
        stride: Take every so many calls, or else the next one that the fault is of.
        faulty: Makes what counts the calls, of the place, the number of the one that fails, and the kind.

    Returns:
        How often each outcome was there after the fault, the number of calls, and what is wrong.
    """
    if not scenario.exchanges:
        with mock.patch.object(directories, "_renameat2", return_value=None):
            return step_through(scenario._replace(exchanges=True), kind, stride, faulty)
    command, start, place, reference, _ = scenario
    old = contents(start / "out")
    outcomes, wrong = Counter(), []
    at, calls = 1, 10**6
    while at <= calls:
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(start, place)
        with faulty(place, at, kind) as faults:
            ended = _ended(lambda: command(place / "out"))
        if len(faults.calls) < at:
            calls = len(faults.calls)
            break
        if not faults.has(faults.calls[at - 1]):
            at = _next(faults, at)
            continue
        there = contents(place / "out")
        state = "new" if there == reference else "old" if there == old and old else "none" if there is None else "OTHER"
        said = f"{kind} at {at} ({faults.calls[at - 1]}), {ended}, then {state}"
        if state == "OTHER" or (ended == "finished" and state != "new") or ended.startswith("raised"):
            wrong.append(said)
        outcomes[f"{ended}, {state} output"] += 1
        try:
            command(place / "out")
        except M3Error as error:
            # The very last call but one: nothing is left that would tell that this command was not through.
            if not (state == "new" and "exists already" in str(error)):
                wrong.append(f"{said}; again: {error}")
        left = [path.name for path in place.iterdir() if path.name != "out"]
        journals = [path.name for path in (place / "out").glob("m3jax-journal*")]
        if contents(place / "out") != reference or left or journals:
            wrong.append(f"{said}; left {left + journals}")
        at = _next(faults, at + stride)
    shutil.rmtree(place, ignore_errors=True)
    return outcomes, calls, wrong


def _ended(work):
    """How some work ends: an error of the system that names its file is a sentence too, as the command line says it."""
    try:
        work()
    except Killed:
        return "killed"
    except M3Error:
        return "refused"
    except OSError as error:
        return "refused" if error.filename is not None else f"raised {error!r}"
    except Exception as error:
        return f"raised {error!r}"
    return "finished"


def _next(faults, at):
    """The number of the first call from one on that the fault is of; of calls that were not reached nobody knows."""
    known = range(at, len(faults.calls) + 1)
    return next((n for n in known if faults.has(faults.calls[n - 1])), max(at, len(faults.calls) + 1))


# --- Runs, which fill their place as they go ---------------------------------------------------------------------


class Run(NamedTuple):
    """A command that keeps what is finished and goes on from it when it is given again.

    Attributes:
        command: Works in the directory that it is given; raises M3Error.
        result: What has come out there; None while it is not through.
        allowed: Whether a result may be there before the command is through: a part of the whole one.
    """

    command: Callable[[Path], Any]
    result: Callable[[Path], Any]
    allowed: Callable[[Any, Any], bool] = lambda found, whole: found is None or found == whole


def _rows(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def _weights(inputs):
    """What a model's weights are told by, read anew."""
    return str(np.asarray(m3jax.load(inputs / "base")["a"]).sum())


def _evaluated(inputs):
    task = get_task("gsm8k")
    rows = [{"question": f"Question {n}" + n * "?", "answer": f"#### {n}"} for n in range(6)]  # half is no whole line
    data = _rows(inputs / "gsm8k.jsonl", rows)

    def answer(prompts, settings):
        return [Completion(f"The answer is: {len(prompt)}", 4, finished=True) for prompt in prompts]

    def command(place):
        examples = read_examples(task, data)
        told = {"fingerprint": lambda: _weights(inputs), "resume": True, "batch_size": 2}
        evaluate_task(task, examples, answer, out_dir=place / "out", model="toy", **told)

    def result(place):
        summary = place / "out" / "summary.json"
        return (summary.read_text(), (place / "out" / "records.jsonl").read_text()) if summary.is_file() else None

    return Run(command, result)


def _attacked(inputs):
    task = get_task("sst2")
    rows = [{"sentence": f"a {word} film", "label": label} for word, label in (("bad", 0), ("good", 1), ("fine", 1))]
    data = _rows(inputs / "sst2.jsonl", rows)
    plan = robustness.make_plan(attacks=("stresstest", "checklist"), budget=20, task="sst2")

    def answer(prompts, settings):
        return [Completion("negative" if "bad" in prompt else "positive", 1, finished=True) for prompt in prompts]

    def load():
        return answer if _weights(inputs) else None

    def command(place):
        rows = read_rows(task, data)
        identity, done = attack_journal.read_run(place / "out", {"model": "toy"}, lambda: "weights", resume=True)
        with robustness._keeping(place / "out", identity) as keep:
            attack_task(task, rows, deferred(load), plan, keep=keep, model="toy", done=done)

    def result(place):
        file = place / "out" / robustness.FILE
        return json.loads(file.read_text()) if file.is_file() else None

    def part(found, whole):
        return found is None or all(each in whole["attacks"] for each in found["attacks"])

    return Run(command, result, part)


def explored(inputs, overwrite):
    """An exploration."""
    asked = recipe(inputs, merge_method="task_arithmetic", mixup={"alpha": 0.5}, seed=3)
    asked = {key: value for key, value in asked.items() if key != "weights"}

    def score(params, share):
        return {"near": -float(np.abs(np.asarray(params["a"]) - 0.1).mean())}

    def command(place):
        m3jax.explore(asked, place / "out", score=score, samples=3, select="near", overwrite=overwrite)

    return Run(command, lambda place: contents(place / "out"))


def runs(inputs):
    """Explorations, evaluations and attacks, by name."""
    return {"explore": explored(inputs, overwrite=True), "evaluate": _evaluated(inputs), "attack": _attacked(inputs)}


def step_through_run(run, scratch, kind, stride=1, faulty=Faults, start="fresh"):
    """Do some work with a fault at each call in turn, and then again without one.

    Args:
        run: The work.
        scratch: A directory that exists, for the places of it.
        kind: As for `step_through`.
        stride: As for `step_through`.
        faulty: As for `step_through`.
        start: "fresh", or "resumed": a run is there that ended halfway, in the middle of a write.

    Returns:
        As `step_through`.
    """
    place, begun = scratch / "place", scratch / "begun"
    for directory in (place, begun):
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
    with Faults(place) as every:
        run.command(place)
    whole, beside = run.result(place), _names(place)
    if start == "resumed":
        half = every.calls[: -(-len(every.calls) // 2)]
        last = max(n for n, call in enumerate(half, 1) if is_of("short", call))
        with suppress(Killed), Faults(begun, last, "torn"):
            run.command(begun)
    outcomes, wrong = Counter(), []
    at = 1
    while True:
        shutil.rmtree(place)
        shutil.copytree(begun, place)
        with faulty(place, at, kind) as faults:
            ended = _ended(lambda: run.command(place))
        if len(faults.calls) < at:
            break
        if not faults.has(faults.calls[at - 1]):
            at = _next(faults, at)
            continue
        found = run.result(place)
        state = "none" if found is None else "new" if found == whole else "part"
        said = f"{kind} at {at} ({faults.calls[at - 1]}), {ended}, then {state}"
        if not run.allowed(found, whole) or (ended == "finished" and state != "new") or ended.startswith("raised"):
            wrong.append(said)
        outcomes[f"{ended}, {state} output"] += 1
        try:
            run.command(place)
        except M3Error as error:
            wrong.append(f"{said}; again: {error}")
        if run.result(place) != whole or _names(place) != beside:
            wrong.append(f"{said}; left {sorted(_names(place) ^ beside)}")
        at = _next(faults, at + stride)
    for directory in (place, begun):
        shutil.rmtree(directory)
    return outcomes, len(faults.calls), wrong


def _names(place):
    return {path.relative_to(place).as_posix() for path in place.rglob("*")}
