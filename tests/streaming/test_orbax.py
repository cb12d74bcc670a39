"""Merges of runs of training, written as the trainers' own checkpoints."""

import json
import shutil
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from m3jax import M3Error, load_recipe, merge_checkpoint, replay, soup, verify
from m3jax.checkpoints import open_checkpoint
from m3jax.outputs import manifest
from m3jax.outputs import orbax as orbax_output
from m3jax.outputs.local import Staging
from m3jax.streaming.sampling import verify_sample
from m3jax.streaming.steps import with_steps

pytestmark = pytest.mark.filterwarnings("ignore:Sharding info not provided")  # as for the original

STEPS = (10, 20, 30)


def params_of(seed: int):
    rng = np.random.default_rng(seed)
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"))
    w = jax.device_put(rng.standard_normal((8, 6)).astype(np.float32), NamedSharding(mesh, PartitionSpec("x", "y")))
    return {"embed": {"w": w}, "layers": [{"k": jnp.asarray(rng.standard_normal((3, 4)), jnp.bfloat16)}] * 2}


def save(place: Path, seeds, steps=STEPS) -> None:
    """A run whose steps have a train state, a tree beside it and a text, with `custom_metadata`."""
    with ocp.CheckpointManager(place) as manager:
        for seed, step in zip(seeds, steps, strict=True):
            params = params_of(seed)
            state = {"params": params, "opt_state": optax.adam(1e-3).init(params), "step": step, "empty": None}
            items = {"model": ocp.args.PyTreeSave(state), "ema": ocp.args.StandardSave({"m": jnp.ones(2)})}
            told = ocp.args.JsonSave({"seed": seed})
            manager.save(step, args=ocp.args.Composite(**items, told=told), custom_metadata={"scan_layers": False})
        manager.wait_until_finished()


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Runs `a` and `b`, and `base`, of one step."""
    place = tmp_path_factory.mktemp("runs")
    save(place / "a", (1, 2, 3))
    save(place / "b", (4, 5, 6))
    save(place / "base", (0,), (1,))
    return place


def recipe(runs: Path, **keys):
    return {
        "merge_method": "ties",
        "base_model": str(runs / "base"),
        "models": [str(runs / "a"), str(runs / "b@20")],
        "parameters": {"density": 0.6},
        **keys,
    }


@pytest.fixture(scope="module")
def merged(runs, tmp_path_factory):
    """The recipe's merge, added as step 40 to a run that has others."""
    out = tmp_path_factory.mktemp("merged") / "run"
    shutil.copytree(runs / "a", out)
    return merge_checkpoint(recipe(runs, keep_state="first"), out, step=40), out


def restored(run: Path, step: int):
    with ocp.CheckpointManager(run) as manager:
        return dict(manager.restore(step).items())


def test_a_new_step_is_what_a_trainer_restores(runs, merged, tmp_path) -> None:
    result, run = merged
    with ocp.CheckpointManager(run) as manager:
        assert manager.all_steps() == [*STEPS, 40]
        assert manager.metadata(40).custom_metadata == {"scan_layers": False}
        assert manager.metadata(40).metrics == {}
        template = jax.tree.map(ocp.utils.to_shape_dtype_struct, manager.restore(10)["model"])
        args = ocp.args.Composite(model=ocp.args.PyTreeRestore(template))
        with_template = manager.restore(40, args=args)["model"]
    found, first = restored(run, 40), restored(runs / "a", 30)
    assert jax.tree.structure(found) == jax.tree.structure(first)
    for value, told in zip(*map(jax.tree.leaves, (found["model"]["params"], with_template["params"])), strict=True):
        assert (value.dtype, value.sharding) == (told.dtype, told.sharding)
        np.testing.assert_array_equal(value, told)
    assert found["model"]["params"]["embed"]["w"].sharding == first["model"]["params"]["embed"]["w"].sharding
    for name in ("opt_state", "step"):  # those of the first model, by which it would go on
        pairs = zip(jax.tree.leaves(found["model"][name]), jax.tree.leaves(first["model"][name]), strict=True)
        assert all(np.array_equal(x, y) for x, y in pairs)
    assert found["told"] == first["told"]
    np.testing.assert_array_equal(found["ema"]["m"], first["ema"]["m"])
    inputs = [entry["name"] for entry in result.manifest["inputs"]]
    assert inputs == [f"{runs / 'a'}@30", f"{runs / 'b@20'}", f"{runs / 'base'}@1"]
    assert f"ema beside model: copied from {runs / 'a'}@30 as it is, its parameters not merged" in result.notes
    assert f"{runs / 'a'}: {runs / 'a'}@30 is read, the last step that was saved to its end" in result.notes


def test_one_digest_whatever_the_format(runs, merged, tmp_path) -> None:
    told = recipe(runs, keep_state="first")
    plain = merge_checkpoint(told, tmp_path / "plain", format="safetensors")
    again = merge_checkpoint(told | {"format": "orbax"}, tmp_path / "again", max_shard_size=100)
    assert plain.digest == again.digest == merged[0].digest
    assert plain.manifest["output"]["tensors"] == again.manifest["output"]["tensors"]
    assert sorted(path.name for path in (tmp_path / "plain").iterdir())[-1] == "model.safetensors"
    third = replay(tmp_path / "again", tmp_path / "third")
    assert third.digest == plain.digest
    assert third.manifest == {**again.manifest}
    with open_checkpoint(tmp_path / "third") as checkpoint:
        assert checkpoint.files()[0].parent.name == "model"


def test_what_verify_sees(merged) -> None:
    result, run = merged
    place = run / "40"
    found = verify(place, inputs=True)
    assert (found.digest, found.differences) == (result.digest, ())
    sampled = verify_sample(place, inputs=True)
    assert (sampled.tensors, sampled.differences) == (11, ())
    (place / "model" / "added").touch()
    (place / "told" / "metadata").write_text("{}")
    tree = place / "model" / "_METADATA"
    kept = tree.read_text()
    tree.write_text(kept + " ")
    differences = " ".join(verify(place).differences)
    assert all(name in differences for name in ("model/added", "told/metadata", "model/_METADATA"))
    (place / "model" / "added").unlink()
    database = place / "model" / "manifest.ocdbt"
    database.rename(run / "kept")
    found = verify(place)
    assert "11 tensors cannot be compared without it: " in " ".join(found.differences)
    assert (found.digest, found.tensors) == (None, 0)
    (run / "kept").rename(database)
    tree.write_text(kept)
    (place / "told" / "metadata").write_text('{"seed": 3}')
    assert verify(place).differences == ()


def test_training_state_is_left_out_unless_it_is_asked_for(runs, tmp_path) -> None:
    result = merge_checkpoint(recipe(runs), tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md", "_CHECKPOINT_METADATA", "commit_success.txt", "m3jax.json", "model", "told"
    ]  # fmt: skip
    with ocp.PyTreeCheckpointer() as checkpointer:
        assert checkpointer.restore(tmp_path / "out" / "model").keys() == {"params", "empty"}
    assert verify(tmp_path / "out").differences == ()
    again = merge_checkpoint(recipe(runs), tmp_path / "out", overwrite=True)
    assert again.digest == result.digest


def test_an_interrupted_merge_goes_on(runs, tmp_path, monkeypatch) -> None:
    class Killed(BaseException):
        pass

    told, out = recipe(runs), tmp_path / "run"
    resumed = []
    for name, calls in (("_differing", 1), ("finish_item", 0)):  # at the second part, and where they are put together
        plain, left = getattr(orbax_output, name), [None] * calls

        def killed(*args, plain=plain, left=left):
            if not left:
                raise Killed
            left.pop()
            return plain(*args)

        monkeypatch.setattr(orbax_output, name, killed)
        with pytest.raises(Killed):
            merge_checkpoint(told, out, step=2, max_shard_size=100)
        monkeypatch.undo()
        assert [path.name for path in out.iterdir()] == ["2.partial"]  # nothing a manager takes for a step
        with ocp.CheckpointManager(out) as manager:
            assert manager.all_steps() == []
        resumed += [len(list((out / "2.partial" / "model").glob("ocdbt.process_*/manifest.ocdbt")))]
    assert resumed == [2, 2]

    def cut(*args, **keys):
        raise Killed

    monkeypatch.setattr(Staging, "publish", cut)  # when everything is there, but under another name
    with pytest.raises(Killed):
        merge_checkpoint(told, out, step=2, max_shard_size=100)
    monkeypatch.undo()
    result = merge_checkpoint(told, out, step=2, max_shard_size=100)
    assert result.resumed_shards == 2
    assert verify(out / "2").differences == ()
    assert not {"m3jax.json", "README.md"} & result.manifest["output"]["weight_files"].keys()
    assert [path.name for path in out.iterdir()] == ["2"]
    assert verify(out / "2").differences == ()
    assert result.digest == merge_checkpoint(told, tmp_path / "whole").digest


def test_safetensors_become_a_tree_and_back(runs, tmp_path) -> None:
    merge_checkpoint(recipe(runs), tmp_path / "plain", format="safetensors")
    one = {"merge_method": "linear", "models": [str(tmp_path / "plain")] * 2}
    result = merge_checkpoint(one, tmp_path / "tree", format="orbax")
    assert result.manifest["output"]["item"] == ""
    with ocp.StandardCheckpointer() as checkpointer:
        assert checkpointer.restore(tmp_path / "tree")["params"]["layers"].keys() == {"0", "1"}
    assert result.digest == merge_checkpoint(one, tmp_path / "same").digest
    merge_checkpoint(one, tmp_path / "run", format="orbax", step=3)
    again = merge_checkpoint(
        {"merge_method": "linear", "models": [str(tmp_path / "run")] * 2}, tmp_path / "run", step=5
    )
    assert again.digest == result.digest
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        assert manager.all_steps() == [3, 5]
        assert manager.restore(5)["params"].keys() == {"embed", "layers"}


@pytest.mark.parametrize("schedule", [None, "uniform", {"method": "ema", "decay": 0.5}, {"method": "wsm"}])
def test_an_average_along_a_run(runs, tmp_path, schedule) -> None:
    told = {"merge_method": "linear", "models": [f"{runs / 'a'}@last:3"]}
    result = merge_checkpoint(told | ({"schedule": schedule} if schedule else {}), tmp_path / "out")
    trees = [restored(runs / "a", step)["model"]["params"] for step in STEPS]
    with ocp.PyTreeCheckpointer() as checkpointer:
        found = checkpointer.restore(tmp_path / "out" / "model")["params"]
    for x, y in zip(*map(jax.tree.leaves, (found, soup(trees, schedule or "uniform"))), strict=True):
        np.testing.assert_array_equal(x, y)
    named = [entry["model"] for entry in result.manifest["recipe"]["models"]]
    assert named == [f"{runs / 'a'}@{step}" for step in STEPS]
    assert replay(tmp_path / "out", tmp_path / "again").digest == result.digest


def test_steps_beside_another_model(runs, tmp_path) -> None:
    entry = {"model": f"{runs / 'a'}@10:30:10", "parameters": {"weight": 0.6}}
    told = {"merge_method": "linear", "models": [entry, {"model": str(runs / "b"), "parameters": {"weight": 0.4}}]}
    result = merge_checkpoint(told | {"schedule": "uniform"}, tmp_path / "out")
    weights = [entry["parameters"]["weight"] for entry in result.manifest["recipe"]["models"]]
    assert weights == pytest.approx([0.2, 0.2, 0.2, 0.4])


def refused(told, out, sentence, **how) -> None:
    with pytest.raises(M3Error, match=sentence):
        merge_checkpoint(told, out, **how)
    assert not out.exists()


def test_what_is_refused(runs, tmp_path) -> None:
    one, out = recipe(runs), tmp_path / "out"
    average = {"merge_method": "linear", "models": [f"{runs / 'a'}@last:3"]}
    refused(recipe(runs, models=[f"{runs / 'a'}@19"]), out, "has no step 19: the nearest is .*@20")
    refused(average | {"models": [f"{runs / 'a'}@last:4"]}, out, "the run has 3 steps")
    refused(average | {"models": [str(runs / "a")], "schedule": "uniform"}, out, "no model is several steps of a run")
    refused(average | {"mixup": {"alpha": 1.0}, "schedule": "uniform"}, out, "mixup draws them; remove one")
    refused(average | {"schedule": {"method": "ema"}}, out, "schedule: the decay of ema is None")
    refused(recipe(runs, format="msgpack"), out, "format: 'msgpack' is not one of")
    with ocp.StandardCheckpointer() as checkpointer:
        other = {"params": {"embed": {"w": params_of(1)["embed"]["w"]}, "layers": {"0": {"q": jnp.ones(2)}}}}
        checkpointer.save(tmp_path / "other", other)
    both = {"merge_method": "linear", "models": [str(runs / "a"), str(tmp_path / "other")]}
    differ = r"params.layers.0.k \(and 1 more\): in .*a@30 but not in .*other, which has params.layers.0.q instead"
    refused(both, out, differ)
    refused(one, out, "'zarr' is not written by a merge: choose safetensors, orbax, same", format="zarr")
    refused(one, out, "-1 is no number of a step", step=-1)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(M3Error, match="holds no steps of a run, to which 3 could be added"):
        merge_checkpoint(one, tmp_path / "full", step=3)
    with pytest.raises(M3Error, match="20: exists already"):
        merge_checkpoint(one, runs / "a", step=20)
    assert json.loads((runs / "a" / "20" / "told" / "metadata").read_text()) == {"seed": 2}


def test_checkpoints_of_trainers_are_merged_into_their_own_layout(jax_data, tmp_path) -> None:
    for name, item in (("maxtext_scanned", "items"), ("tunix_full", "model_params"), ("gemma_nested", "")):
        models = [str(jax_data / name / which) for which in ("a", "b")]
        told = {"merge_method": "task_arithmetic", "base_model": str(jax_data / name / "base"), "models": models}
        merge_checkpoint(told | {"keep_state": "first"}, tmp_path / name)
        with ocp.PyTreeCheckpointer() as checkpointer:
            place = jax_data / name / "a"
            last = place if not item else max(place.glob(f"**/[0-9]*/{item}"), key=lambda path: int(path.parent.name))
            trees = [checkpointer.restore(tmp_path / name / item), checkpointer.restore(last)]
        assert jax.tree.structure(trees[0]) == jax.tree.structure(trees[1])
        for x, y in zip(*map(jax.tree.leaves, trees), strict=True):
            assert (x.shape, x.dtype, x.sharding) == (y.shape, y.dtype, y.sharding)


def test_a_tokenizer_is_that_of_the_step_that_is_read(runs) -> None:
    told = {"merge_method": "linear", "models": [str(runs / "a"), str(runs / "b")], "tokenizer_source": str(runs / "a")}
    recipe, _ = with_steps(load_recipe(told))
    assert recipe.tokenizer_source == recipe.models[0].model == f"{runs / 'a'}@30"


# --- Files that are not the merge's ------------------------------------------------------------------------------


class Killed(BaseException):
    """What ends a merge without a chance to tidy up."""


def killed_at(monkeypatch, name: str, calls: int):
    """Ends a merge at a call of a function of its output, with all that stands there then."""
    plain, left = getattr(orbax_output, name), [None] * calls

    def killed(*args):
        if not left:
            raise Killed
        left.pop()
        return plain(*args)

    monkeypatch.setattr(orbax_output, name, killed)


@pytest.fixture(scope="module")
def layouts(tmp_path_factory) -> Path:
    """A checkpoint in a database, and two with a directory for each array, in zarr and in zarr3."""
    place = tmp_path_factory.mktemp("layouts")
    tree = params_of(1) | {"scalar": jnp.float32(3), "line": jnp.ones(5)}
    for name, options in (
        ("database", {}),
        ("zarr", {"use_ocdbt": False}),
        ("zarr3", {"use_ocdbt": False, "use_zarr3": True}),
    ):
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**options)) as checkpointer:
            checkpointer.save(place / name, ocp.args.PyTreeSave(tree))
    return place


FOREIGN = (
    "modeling_evil.py",
    "d/evil.py",
    "d/0123456789abcdef0123456789abcdef.py",
    "d/mywork/thesis.txt",
    "ocdbt.process_EVIL.py",
    "ocdbt.process_0/evil",
    "ocdbt.process_0/d/evil.py",
    "ocdbt.process_0/ocdbt_meta/evil.py",
    "embed.w/modeling.py",
    "embed.w/0.0.py",
    "array_metadatas/evil.py",
    "array_metadatas/process_0.py",
    "_METADATA.py",
)


@contextmanager
def placed(directory: Path, name: str):
    """A file that its user has put into an output, and that is as it was in the end."""
    made = [place for place in (directory / name).parents if not place.exists()]
    (directory / name).parent.mkdir(parents=True, exist_ok=True)
    (directory / name).write_text("mine")
    yield
    assert (directory / name).read_text() == "mine"
    (directory / name).unlink()
    for place in made:
        place.rmdir()


@pytest.mark.parametrize("layout", ["database", "zarr", "zarr3"])
def test_a_foreign_file_is_not_published(layouts, layout, tmp_path, monkeypatch) -> None:
    told = {"merge_method": "linear", "models": [str(layouts / layout)] * 2}
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    killed_at(monkeypatch, "_differing", 1)
    with pytest.raises(Killed):
        merge_checkpoint(told, out, max_shard_size=100)
    monkeypatch.undo()
    for name in FOREIGN:
        sentence = rf"{name}: is no part of the merge that is made there: move it away"
        with placed(partial, name), pytest.raises(M3Error, match=sentence):
            merge_checkpoint(told, out, max_shard_size=100)
    half = {"database": "ocdbt.process_1/d/" + "0" * 32, "zarr": "scalar/.zarray", "zarr3": "scalar/zarr.json"}[layout]
    (partial / half).parent.mkdir(parents=True, exist_ok=True)
    (partial / f"{half}.__lock").touch()  # as TensorStore calls it while it is written
    (partial / "manifest.ocdbt.__lock").touch() if layout == "database" else None
    killed_at(monkeypatch, "finish_item", 0)
    with pytest.raises(Killed):
        merge_checkpoint(told, out, max_shard_size=100)
    monkeypatch.undo()
    result = merge_checkpoint(told, out, max_shard_size=100)
    assert result.resumed_shards > 1
    assert verify(out).differences == ()
    assert not list(out.rglob("*__lock"))


def test_what_comes_as_an_output_is_finished_is_not_published(layouts, tmp_path, monkeypatch) -> None:
    told = {"merge_method": "linear", "models": [str(layouts / "database")] * 2}
    plain = orbax_output.finish_item

    def beside(item, *args):
        plain(item, *args)
        (item / "d" / "evil.py").write_text("mine")

    monkeypatch.setattr(orbax_output, "finish_item", beside)
    with pytest.raises(M3Error, match=r"d/evil\.py: is no part of the merge"):
        merge_checkpoint(told, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.partial" / "d" / "evil.py").read_text() == "mine"


@pytest.mark.parametrize("layout", ["database", "zarr", "zarr3"])
def test_verify_names_every_foreign_file_and_none_is_overwritten(layouts, layout, tmp_path) -> None:
    told, out = {"merge_method": "linear", "models": [str(layouts / layout)] * 2}, tmp_path / "out"
    result = merge_checkpoint(told, out, max_shard_size=100)
    for seen in (verify, verify_sample):
        assert seen(out).differences == ()
    for name in FOREIGN:
        with placed(out, name):
            for seen in (verify, verify_sample):
                assert f"{name}: is not in the manifest" in seen(out).differences
            with pytest.raises(M3Error, match=rf"holds {name}, which is not of the output .*: move it away"):
                merge_checkpoint(told, out, overwrite=True)
    assert merge_checkpoint(told, out, overwrite=True).digest == result.digest


def changed(file: Path) -> dict[str, str | None]:
    """What a file that tells of a save could hold instead, by how it differs."""
    kept = file.read_text()
    told = json.loads(kept)
    return {
        "removed": None,
        "empty": "",
        "no object": "[]",
        "another trainer's": json.dumps(told | {"custom_metadata": {"scan_layers": True}}),
        "other handlers": json.dumps(told | {"item_handlers": {"model": "evil.Handler"}}),
        "more": json.dumps(told | {"more": 1}),
        "another form": kept + " ",
        "twice": kept.replace("{", '{"item_handlers": "evil.Handler", ', 1),
        "no time": json.dumps(told | {"commit_timestamp_nsecs": None}),
    }


def test_what_tells_of_a_save_is_verified(runs, tmp_path) -> None:
    out = tmp_path / "out"
    merge_checkpoint(recipe(runs), out)
    save = out / "_CHECKPOINT_METADATA"
    kept = save.read_text()
    for how, text in changed(save).items():
        save.unlink() if text is None else save.write_text(text)
        fault = "is missing" if text is None else "has changed"
        for seen in (verify, verify_sample):
            assert f"_CHECKPOINT_METADATA: {fault}" in seen(out).differences, how
        save.write_text(kept)
    for name in ("commit_success.txt", "model/commit_success.txt"):
        (out / name).write_text("changed")
        assert verify(out).differences == (f"{name}: has changed",)
        (out / name).unlink()
        assert verify(out).differences == (f"{name}: is missing",)
        (out / name).write_text("Checkpoint commit was successful\n")
    (out / "told" / "modeling.py").touch()
    assert verify(out).differences == ("told/modeling.py: is not in the manifest",)
    (out / "told" / "modeling.py").unlink()
    assert verify(out).differences == ()


def test_the_same_merge_gives_the_same_manifest_whenever_and_wherever_it_is_made(runs, tmp_path) -> None:
    first, second = (merge_checkpoint(recipe(runs), tmp_path / name) for name in ("a", "b"))
    assert first.manifest == second.manifest
    assert (tmp_path / "a" / "_CHECKPOINT_METADATA").read_text() != (
        tmp_path / "b" / "_CHECKPOINT_METADATA"
    ).read_text()


def test_a_replay_refuses_other_files_beside_the_item(runs, tmp_path) -> None:
    save(tmp_path / "run", (1,), (3,))
    step = tmp_path / "run" / "3"
    told = {"merge_method": "linear", "models": [str(step)] * 2}
    (step / "model" / "_strings.json").write_text("{}")
    result = merge_checkpoint(told, tmp_path / "out")
    handlers = json.loads((step / "_CHECKPOINT_METADATA").read_text())
    for number, (name, text) in enumerate(
        (
            ("told/metadata", '{"seed": 9}'),
            ("told/added", ""),
            ("model/_strings.json", '{"a": "b"}'),
            ("_CHECKPOINT_METADATA", json.dumps(handlers | {"custom_metadata": {"scan_layers": True}})),
        )
    ):
        kept = (step / name).read_bytes() if (step / name).exists() else None
        (step / name).write_text(text)
        with pytest.raises(M3Error, match=rf"{name} would not be as then.*--allow-other-files"):
            replay(tmp_path / "out", tmp_path / "again")
        assert not (tmp_path / "again").exists()
        again = replay(tmp_path / "out", tmp_path / f"allowed-{number}", allow_other_files=True)
        assert any(f"{name} would not be as then" in note for note in again.notes)
        assert any(f"{name} would not be as then" in told for told in verify_sample(tmp_path / "out").differences)
        (step / name).unlink() if kept is None else (step / name).write_bytes(kept)
    again = replay(tmp_path / "out", tmp_path / "again")
    assert again.manifest == result.manifest


def test_manifests_that_told_nothing_of_saves_are_read_as_before(runs, tmp_path) -> None:
    out = tmp_path / "out"
    result = merge_checkpoint(recipe(runs), out)
    told = json.loads((out / "m3jax.json").read_text())
    del told["output"]["saves"]
    for name in ("commit_success.txt", "model/commit_success.txt"):
        del told["output"]["weight_files"][name]
        (out / name).write_text("Checkpoint commit was successful to out.partial\n")
    (out / "m3jax.json").write_text(json.dumps(manifest.sealed(told)))
    (out / "_CHECKPOINT_METADATA").write_text("{}")
    for seen in (verify, verify_sample):
        found = seen(out)
        assert found.differences == ()
        assert any("told nothing of _CHECKPOINT_METADATA" in note for note in found.notes)
    assert replay(out, tmp_path / "again").manifest == result.manifest
    (out / "model" / "d" / "evil.py").touch()
    assert verify(out).differences == ("model/d/evil.py: is not in the manifest",)
    (out / "model" / "d" / "evil.py").unlink()
    assert merge_checkpoint(recipe(runs), out, overwrite=True).manifest == result.manifest
