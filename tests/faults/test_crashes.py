"""At every call that changes the place of an output: the old one or the new one is whole, and the command goes on."""

import numpy as np
import pytest
from support.directories import recipe, write
from support.faults import Faults, Killed, contents, step_through

import m3jax
from m3jax.outputs import local
from m3jax.outputs.conversion import convert

SHAPES = {"a": (40, 30), "b": (50, 30), "c": (30, 30)}
STARTS = ("fresh", "resumed", "overwriting", "without exchange")


def model(place, seed):
    rng = np.random.default_rng(seed)
    return write(place, {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()})


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    place = tmp_path_factory.mktemp("inputs")
    for seed, name in enumerate(("base", "expert-0", "expert-1")):
        model(place / name, seed)
    return place


def commands(inputs, kind, overwrite):
    """The command, and one that makes another output of the kind."""
    if kind == "convert":
        return (
            lambda out: convert(inputs / "expert-0", out, "msgpack", max_shard_size=5000, overwrite=overwrite),
            lambda out: convert(inputs / "expert-1", out, "safetensors"),
        )
    asked = recipe(inputs, merge_method="ties", parameters={"density": 0.5, "trim_scope": "model"})
    other = recipe(inputs, merge_method="task_arithmetic")
    return (
        lambda out: m3jax.merge_checkpoint(asked, out, max_shard_size=5000, overwrite=overwrite),
        lambda out: m3jax.merge_checkpoint(other, out),
    )


def prepare(inputs, tmp_path, kind, start):
    """The command, what is there before it, and what it makes."""
    command, other = commands(inputs, kind, start in STARTS[2:])
    for name in ("start", "whole"):
        (tmp_path / name).mkdir(exist_ok=True)
    command(tmp_path / "whole" / "out")
    if start in STARTS[2:]:
        other(tmp_path / "start" / "out")
    if start == "resumed":
        last = Faults(tmp_path / "start").until(lambda call: call.startswith("fsync") and "model-00003" in call)
        with pytest.raises(Killed), last:
            command(tmp_path / "start" / "out")
    return command, tmp_path / "start", contents(tmp_path / "whole" / "out")


def check(inputs, tmp_path, monkeypatch, kind, start, fault, stride=1, first=1):
    if start == "without exchange":
        monkeypatch.setattr(local, "_renameat2", lambda: None)
    command, begun, reference = prepare(inputs, tmp_path, kind, start)
    before = {path: path.read_bytes() for path in inputs.rglob("*") if path.is_file()}
    outcomes, calls, wrong = step_through(command, begun, tmp_path / "place", reference, fault, stride, first)
    assert wrong == []
    assert before == {path: path.read_bytes() for path in inputs.rglob("*") if path.is_file()}
    assert calls >= 20
    return outcomes


@pytest.mark.parametrize("start", ["fresh", "overwriting", "without exchange"])
@pytest.mark.parametrize("fault", ["kill", "EIO"])
def test_every_call_of_a_conversion(inputs, tmp_path, monkeypatch, start, fault):
    outcomes = check(inputs, tmp_path, monkeypatch, "convert", start, fault)
    assert {key.split(", ")[1] for key in outcomes} == {
        "fresh": {"none output", "new output"},
        "overwriting": {"old output", "new output"},  # never none
        "without exchange": {"old output", "none output", "new output"}
        - ({"none output"} if fault == "EIO" else set()),
    }[start]


@pytest.mark.parametrize("start", STARTS)
def test_some_calls_of_a_merge(inputs, tmp_path, monkeypatch, start):
    check(inputs, tmp_path, monkeypatch, "merge", start, "kill", stride=9)


@pytest.mark.slow
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("fault", ["kill", "torn", "EIO", "ENOSPC"])
def test_every_call_of_a_merge(inputs, tmp_path, monkeypatch, start, fault):
    check(inputs, tmp_path, monkeypatch, "merge", start, fault, stride=2, first=1 + (fault in ("torn", "ENOSPC")))
