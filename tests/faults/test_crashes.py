"""At every call that changes the place of an output: the old one or the new one is whole, and the command goes on."""

import errno
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
from support import faults
from support.faults import STARTS, contents, make_inputs, prepare, runs, step_through, step_through_run
from support.read_faults import ReadFaults

import m3jax
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
def test_every_call_of_a_conversion(inputs, tmp_path, start, fault):
    outcomes = check(inputs, tmp_path, "convert", start, fault)
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


@pytest.mark.parametrize("name", ["explore", "evaluate", "attack"])
def test_calls_of_runs_that_go_on(inputs, tmp_path, name):
    """`scripts/faults` takes every call and every fault."""
    for fault, stride in (("kill", 3 if name == "explore" else 1), ("ENOSPC", 7)):
        outcomes, calls, wrong = step_through_run(runs(inputs)[name], tmp_path, fault, stride)
        assert wrong == []
        assert calls >= 5
        assert outcomes.total() >= calls // stride


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
