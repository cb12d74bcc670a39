"""At every call that changes the place of an output: the old one or the new one is whole, and the command goes on."""

import errno
import os
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from unittest import mock

import pytest
from support import faults
from support.faults import (
    STARTS,
    Faults,
    Killed,
    Run,
    contents,
    explored,
    is_of,
    make_inputs,
    prepare,
    runs,
    step_through,
    step_through_run,
)
from support.read_faults import ReadFaults

import m3jax
from m3jax.errors import saying_what_failed
from m3jax.outputs.companions import link_weights
from m3jax.outputs.conversion import convert


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    place = tmp_path_factory.mktemp("inputs")
    make_inputs(place)
    return place


def check(inputs, tmp_path, kind, start, fault, stride=1):
    before = contents(inputs)
    outcomes, calls, wrong = step_through(prepare(inputs, tmp_path, kind, start), fault, stride)
    assert wrong == []
    assert contents(inputs) == before
    assert calls >= 20
    return outcomes


@pytest.mark.parametrize("start", ["fresh", "overwriting", "without exchange"])
@pytest.mark.parametrize("fault", ["kill", "EIO"])
def test_calls_of_a_conversion(inputs, tmp_path, start, fault):
    outcomes = check(
        inputs, tmp_path, "convert", start, fault, stride=1 if (fault, start) == ("kill", "without exchange") else 3
    )
    assert {key.split(", ")[1] for key in outcomes} == {
        "fresh": {"none output", "new output"},
        "overwriting": {"old output", "new output"},  # never none
        "without exchange": {"old output", "none output", "new output"}
        - ({"none output"} if fault == "EIO" else set()),
    }[start]


@pytest.mark.parametrize("start", STARTS)
def test_some_calls_of_a_merge(inputs, tmp_path, start):
    check(inputs, tmp_path, "merge", start, "kill", stride=9)


@pytest.mark.parametrize("start", ["fresh", "overwriting", "without exchange"])
def test_some_calls_of_a_merge_of_several_documents(inputs, tmp_path, start):
    check(inputs, tmp_path, "documents", start, "kill", stride=11)


@pytest.mark.parametrize("start", ["fresh", "resumed"])
@pytest.mark.parametrize("name", ["explore", "evaluate", "attack"])
def test_calls_of_runs_that_go_on(inputs, tmp_path, name, start):
    """`scripts/faults` takes every call and every fault."""
    often = 12 if name == "explore" else 1
    for fault, stride in (("kill", often), ("ENOSPC", 7 * often), ("torn", 4 * often)):
        outcomes, calls, wrong = step_through_run(runs(inputs)[name], tmp_path, fault, stride, start=start)
        assert wrong == []
        assert calls >= 5
        assert outcomes.total() >= calls // stride


def test_every_kind_of_call_is_counted(inputs, tmp_path):
    """In a merge for which no room can be promised, a conversion, an evaluation whose last line was cut, and copies."""
    seen = set()
    for kind, start, fault in (("merge", "overwriting", "EOPNOTSUPP"), ("convert", "fresh", "kill")):
        (tmp_path / kind).mkdir()
        scenario = prepare(inputs, tmp_path / kind, kind, start)
        shutil.copytree(scenario.start, scenario.place)
        with Faults(scenario.place, kind=fault).until(lambda call: call.startswith("posix_fallocate")) as counted:
            scenario.command(scenario.place / "out")
        seen |= {call.split()[0] for call in counted.calls}
    place = tmp_path / "runs"
    place.mkdir()
    with suppress(Killed), Faults(place).until(lambda call: call.startswith("fsync /out/records")):
        runs(inputs)["evaluate"].command(place)
    records = place / "out" / "records.jsonl"
    records.write_bytes(records.read_bytes() + b"{")
    with Faults(place) as counted:
        runs(inputs)["evaluate"].command(place)
        os.link(records, place / "linked")
        shutil.copyfile(records, place / "copied")
    seen |= {call.split()[0] for call in counted.calls}
    assert seen >= {"open", "mkdir", "rename", "replace", "exchange", "unlink", "rmdir", "chmod", "link"}
    assert seen >= {"pwrite", "write", "sendfile", "posix_fallocate", "ftruncate", "truncate"}
    assert seen >= {"flock", "fsync", "close"}


@pytest.mark.parametrize("linked", [True, False])
def test_weights_that_stand_beside_several_tokenizers(tmp_path, monkeypatch, linked):
    """As links or, where there are none, as copies: whatever an attempt left, the next one makes them."""

    def refuse(*_):
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    def command(place):
        with saying_what_failed(place):
            (place / "a").write_bytes(bytes(9))
            link_weights(place, {"also/a": "a"})

    def result(place):
        made = place / "also" / "a"
        return made.read_bytes() if made.exists() else None

    if not linked:
        monkeypatch.setattr(Path, "hardlink_to", refuse)
    run = Run(command, result, lambda found, whole: True)
    for fault in ("kill", "torn", "short", "EIO", *(["EOPNOTSUPP"] if linked else [])):
        outcomes, calls, wrong = step_through_run(run, tmp_path, fault)
        assert wrong == []
        assert outcomes.total() == calls or (fault in ("short", "EOPNOTSUPP") and outcomes)


@pytest.mark.parametrize("fault", ["short", "ENOLCK", "EDQUOT"])
def test_faults_of_some_calls(inputs, tmp_path, fault):
    """A write that writes half is finished, locks may be missing, and what only `close` says is said."""
    scenario = prepare(inputs, tmp_path, "merge", "overwriting")
    shutil.copytree(scenario.start, scenario.place)
    with Faults(scenario.place) as every:
        scenario.command(scenario.place / "out")
    stride = 1 if fault == "ENOLCK" else 12
    outcomes, calls, wrong = step_through(scenario, fault, stride)
    assert wrong == []
    assert calls == len(every.calls)
    assert 1 <= outcomes.total() <= sum(is_of(fault, call) for call in every.calls)
    assert {key.split(",")[0] for key in outcomes} == {"refused" if fault == "EDQUOT" else "finished"}


@pytest.mark.slow
def test_an_exploration_goes_on_wherever_it_was_killed(inputs, tmp_path):
    """By the very same command, also once its merge has appeared."""
    outcomes, calls, wrong = step_through_run(explored(inputs, overwrite=False), tmp_path, "kill", stride=3)
    assert wrong == []
    assert outcomes.total() == -(-calls // 3) >= 13


@pytest.mark.parametrize(("kind", "start"), [("merge", "fresh"), ("convert", "overwriting"), ("replay", "fresh")])
def test_some_calls_that_read(inputs, tmp_path, kind, start):
    """`scripts/faults --reads` takes every call and every fault."""
    before, scenario = contents(inputs), prepare(inputs, tmp_path, kind, start)
    for fault, stride in (("EIO", 97), ("EMFILE", 53), ("short", 37)):
        outcomes, calls, wrong = step_through(scenario, fault, stride, lambda *at: ReadFaults((at[0], inputs), *at[1:]))
        assert wrong == []
        assert outcomes.total() == -(-calls // stride) >= 1
    assert contents(inputs) == before


def test_what_cannot_be_looked_at_is_not_taken_for_absent(inputs, tmp_path):
    """A model's directory of which the disk does not say whether it is one has its companions all the same."""
    scenario = prepare(inputs, tmp_path, "convert", "fresh")

    def failing(path, *args, **keys):
        if str(path) == str(inputs / "expert-0"):
            raise OSError(errno.EIO, "Input/output error", str(path))
        return plain(path, *args, **keys)

    plain = os.stat
    scenario.place.mkdir()
    with mock.patch.object(os, "stat", failing), pytest.raises(m3jax.M3Error, match="expert-0 cannot be read"):
        scenario.command(scenario.place / "out")
    assert not (scenario.place / "out").exists()


ENDING = """
import sys
from support.faults import Faults
from m3jax.outputs.conversion import convert
source, place, last = sys.argv[1:]
with Faults(place, kind="exit").until(lambda call: call.startswith(last)):
    convert(source, f"{place}/out", "msgpack", overwrite=True)
"""


@pytest.mark.parametrize("last", ["replace /out.partial/m3jax-journal", "exchange", "unlink /out.partial"])
def test_processes_that_really_end(inputs, tmp_path, last):
    convert(inputs / "expert-0", tmp_path / "whole", "msgpack")
    place = tmp_path / "place"
    place.mkdir()
    convert(inputs / "expert-1", place / "out", "safetensors")
    old = contents(place / "out")
    paths = [str(Path(faults.__file__).parents[1]), str(Path(m3jax.__file__).parents[1])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    ended = subprocess.run([sys.executable, "-c", ENDING, inputs / "expert-0", place, last], env=environment)
    assert ended.returncode == 9
    assert contents(place / "out") == (contents(tmp_path / "whole") if last.startswith("unlink") else old)
    convert(inputs / "expert-0", place / "out", "msgpack", overwrite=True)
    assert contents(place / "out") == contents(tmp_path / "whole")
    assert [path.name for path in place.iterdir()] == ["out"]


@pytest.mark.slow
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize(("fault", "stride"), [("kill", 2), ("EIO", 3), ("torn", 5), ("ENOSPC", 5)])
def test_calls_of_a_merge(inputs, tmp_path, start, fault, stride):
    """`scripts/faults` takes every call."""
    check(inputs, tmp_path, "merge", start, fault, stride)
