"""Runs of training: which step is read, and what is said of one that is not there."""

import os
import shutil
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest
from support.checkpoint_suite import read, write_file

from m3jax.checkpoints import locate_model, open_checkpoint
from m3jax.checkpoints.inspection import look_at
from m3jax.checkpoints.orbax_tree import is_orbax
from m3jax.checkpoints.runs import chosen_steps, find_run, step_name
from m3jax.checkpoints.trust import remarks
from m3jax.errors import M3Error

CUT = "40.orbax-checkpoint-tmp-7"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Steps 10, 20, 30 of a manager, as MaxText places them, and one that was interrupted."""
    place = tmp_path_factory.mktemp("runs") / "run"
    with ocp.CheckpointManager(place / "checkpoints") as manager:
        for step in (10, 20, 30):
            items = {
                "params": ocp.args.StandardSave({"w": np.full(2, step, np.float32)}),
                "opt": ocp.args.StandardSave({"m": np.ones(2)}),
            }
            manager.save(step, args=ocp.args.Composite(**items))
        manager.wait_until_finished()
    (place / "logs").mkdir()
    shutil.copytree(place / "checkpoints" / "30", place / "checkpoints" / CUT)
    return place


@pytest.mark.parametrize(
    ("said", "value"), [("", 30), ("/checkpoints", 30), ("@last", 30), ("@20", 20), ("/checkpoints@10", 10)]
)
def test_the_step_that_is_meant(run, said, value) -> None:
    place = locate_model(f"{run}{said}").path
    with open_checkpoint(place) as checkpoint:
        assert (read(checkpoint, "w") == value).all()
        assert checkpoint.files()[0].parent.name == "params"
        (note,) = remarks("it", place, checkpoint)
        assert note == "it: params is read, not opt beside it."


def test_a_merge_among_the_steps_is_averaged_no_more(run, tmp_path) -> None:
    """`RUN@last:2` after an average was written into the run are the steps that it was made of, not the average."""
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "30" / "m3jax.json").write_text("{}")
    found = [chosen_steps(str(tmp_path / "run"), said) for said in ("last:2", "10:40", "last", "10:30:10")]
    assert found == [[10, 20], [10, 20], [30], [10, 20, 30]]  # where it is named, it is meant
    for step in ("10", "20"):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / step)
    with pytest.raises(M3Error, match="the run has 0 steps of training"):
        chosen_steps(str(tmp_path / "run"), "last:1")


def test_a_run_is_opened_without_its_name(run) -> None:
    assert is_orbax(run)
    with open_checkpoint(run) as checkpoint:
        assert (read(checkpoint, "w") == 30).all()


@pytest.mark.parametrize(
    ("said", "steps"),
    [("last:2", [20, 30]), ("10:30:10", [10, 20, 30]), ("10:25", [10, 20]), ("last", [30]), ("10:30:20", [10, 30])],
)
def test_several_steps(run, said, steps) -> None:
    assert chosen_steps(str(run), said) == steps


def test_a_name_says_its_step(run) -> None:
    assert step_name(str(run)) == step_name(f"{run}@last") == f"{run}@30"
    assert step_name(f"{run}@10") == f"{run}@10"
    assert step_name("org/name@main") == "org/name@main"
    assert look_at(str(run)).location == f"{run}@30"


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        ("@21", "has no step 21: the nearest is {run}@20."),
        ("@40", "step 40 of {run} was not saved to its end: the nearest is {run}@30."),
        ("@last:2", "is 2 steps, which only models and sources of a recipe take, without an adapter: name one of"),
        ("@last:9", "the run has 3 steps of training that were saved to their end: ask for 1 to 3."),
        ("@10:40:15", "has no step 25: the nearest is {run}@30."),
        ("@1:5", "names no step: the run has 30 as its last; write FIRST:LAST."),
        ("@10:30:0", "0 is no distance between steps: write FIRST:LAST:DISTANCE."),
        ("/logs@3", "holds no steps of a run"),
    ],
)
def test_steps_that_are_not_there(run, said, sentence) -> None:
    with pytest.raises(M3Error) as caught:
        locate_model(f"{run}{said}")
    assert sentence.format(run=run) in str(caught.value)


def test_a_run_without_finished_steps(run, tmp_path) -> None:
    shutil.copytree(run / "checkpoints" / CUT, tmp_path / "run" / CUT)
    with pytest.raises(M3Error, match=f"has no step that was saved to its end \\({CUT} was not\\)"):
        locate_model(str(tmp_path / "run"))
    shutil.copytree(run / "checkpoints" / "10", tmp_path / "run" / "10")
    shutil.copytree(run / "checkpoints" / "20", tmp_path / "run" / "20")
    item = tmp_path / "run" / "20" / "params"
    (item / "ocdbt.process_0").mkdir(exist_ok=True)
    os.remove(item / "manifest.ocdbt")
    with open_checkpoint(locate_model(str(tmp_path / "run")).path) as checkpoint:
        assert (read(checkpoint, "w") == 10).all()


def test_steps_of_other_formats_and_what_is_no_run(tmp_path) -> None:
    for step in (2, 10):
        (tmp_path / "run" / f"checkpoint-{step}").mkdir(parents=True)
        write_file(tmp_path / "run" / f"checkpoint-{step}" / "model.safetensors", {"w": np.ones(step, np.float32)})
    assert locate_model(str(tmp_path / "run")).path == tmp_path / "run" / "checkpoint-10"
    write_file(tmp_path / "run" / "model.safetensors", {"w": np.ones(1, np.float32)})
    assert locate_model(str(tmp_path / "run")).path == tmp_path / "run"  # which has weights of its own
    assert locate_model(f"{tmp_path / 'run'}@2").path == tmp_path / "run" / "checkpoint-2"
    for name in ("llama_7", "qwen_3"):
        shutil.copytree(tmp_path / "run" / "checkpoint-2", tmp_path / "zoo" / name)
    assert find_run(tmp_path / "zoo") is None


def test_runs_of_real_trainers(jax_data) -> None:
    steps = {"maxtext_scanned/b": 3, "tunix_full/a": 3, "tunix_lora/a": 3, "linen_scan_composite/a": 2}
    for name, step in {**steps, "nnx_loop_mgr/a": 3}.items():
        place = locate_model(str(jax_data / name)).path
        with open_checkpoint(place) as checkpoint:
            assert place.name == str(step)
            assert checkpoint.files()[0].parent.name in ("items", "model_params", "params", "model")
