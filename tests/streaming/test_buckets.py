"""Checkpoints of Orbax in buckets: runs that trainers left there, and merges that become steps of them."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from support.object_store import google, store

from m3jax import M3Error, merge_checkpoint, replay, verify
from m3jax.checkpoints import locate_model, open_checkpoint
from m3jax.checkpoints import remote as remote_paths
from m3jax.checkpoints.runs import chosen_steps, find_run, place_of

pytestmark = pytest.mark.filterwarnings("ignore:Sharding info not provided", "ignore:Sending a large body")

STEPS = (10, 20)
WIDE = (512, 1024)


def params_of(seed: int):
    rng = np.random.default_rng(seed)
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"))
    wide = jax.device_put(rng.standard_normal(WIDE).astype(np.float32), NamedSharding(mesh, PartitionSpec("x", "y")))
    return {"embed": {"w": wide}, "layers": [{"k": jnp.asarray(rng.standard_normal((3, 4)), jnp.bfloat16)}] * 2}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A run `a` of two steps whose state is one tree beside a text, and a run `b` without a database, in zarr."""
    place = tmp_path_factory.mktemp("runs")
    with ocp.CheckpointManager(place / "a") as manager:
        for step in STEPS:
            items = ocp.args.Composite(model=ocp.args.PyTreeSave(params_of(step)), told=ocp.args.JsonSave({"at": step}))
            manager.save(step, args=items)
        manager.wait_until_finished()
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as checkpointer:
        checkpointer.save(place / "b" / "7", ocp.args.PyTreeSave(params_of(7)))
    return place


def recipe(a: str, b: str, **keys):
    return {
        "merge_method": "task_arithmetic",
        "base_model": f"{a}@10",
        "models": [f"{a}@20", b],
        "parameters": {"weight": 0.5},
        **keys,
    }


@pytest.fixture(scope="module")
def local(runs, tmp_path_factory):
    """The merge on this disk."""
    return merge_checkpoint(recipe(str(runs / "a"), str(runs / "b")), tmp_path_factory.mktemp("local") / "out")


def as_a_trainer_restores(run: str, step: int):
    """The parameters of a step, by a template with shardings of the trainer's own."""
    mesh = Mesh(np.array(jax.devices()), ("x",))
    sharding = {"embed": {"w": NamedSharding(mesh, PartitionSpec(None, "x"))}, "layers": None}
    wide = jax.ShapeDtypeStruct(WIDE, jnp.float32, sharding=sharding["embed"]["w"])
    small = jax.ShapeDtypeStruct((3, 4), jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec()))
    template = {"embed": {"w": wide}, "layers": [{"k": small}] * 2}
    restore_args = ocp.checkpoint_utils.construct_restore_args(template)
    args = ocp.args.Composite(model=ocp.args.PyTreeRestore(template, restore_args=restore_args))
    with ocp.CheckpointManager(run) as manager:
        assert manager.latest_step() == step
        found = manager.restore(step, args=args)["model"]
    assert found["embed"]["w"].sharding == sharding["embed"]["w"]
    return found


@pytest.mark.slow
def test_a_step_made_in_a_bucket_of_s3(runs, local, monkeypatch) -> None:
    with store(monkeypatch) as s3:
        a, b = s3.put(runs / "a", "runs/a"), s3.put(runs / "b", "runs/b")
        before = {name: s3.driver.info(f"{s3.bucket}/runs/a/{name}")["ETag"] for name in s3.names("runs/a")}
        result = merge_checkpoint(recipe(a, b), a, step=30, max_shard_size=2**20)
        assert result.digest == local.digest
        after = {name: s3.driver.info(f"{s3.bucket}/runs/a/{name}")["ETag"] for name in s3.names("runs/a")}
        assert before.items() < after.items()
        assert {name.split("/")[0] for name in after} == {"10", "20", "30"}
        seen = verify(f"{a}/30")
        assert (seen.digest, seen.differences) == (result.digest, ())
        again = replay(f"{a}/30", f"{s3.url}/again", max_shard_size=2**23)
        assert again.digest == result.digest
        with pytest.raises(M3Error, match=rf"{a} has no step 31: the nearest is {a}@30"):
            locate_model(f"{a}@31")


def test_a_step_in_a_bucket_of_google_and_the_bytes_that_it_takes(runs, local, monkeypatch) -> None:
    with google(monkeypatch) as gcs:
        a, b = gcs.put_all(runs / "a", "runs/a"), gcs.put_all(runs / "b", "runs/b")
        result = merge_checkpoint(recipe(a, b), a, step=30, max_shard_size=2**20)
        assert result.digest == local.digest
        size = sum(info.nbytes for info in open_checkpoint(local.directory).tensors.values())
        assert gcs.received <= 1.05 * 3 * size
        assert gcs.sent <= 1.05 * size
        found = as_a_trainer_restores(a, 30)
        with ocp.PyTreeCheckpointer() as checkpointer:
            jax.tree.map(np.testing.assert_array_equal, found, checkpointer.restore(local.directory / "model"))


def test_a_merge_in_a_bucket_is_no_step_until_it_is_whole(runs, local, monkeypatch) -> None:
    with google(monkeypatch) as gcs:
        a, b = gcs.put_all(runs / "a", "runs/a"), gcs.put_all(runs / "b", "runs/b")
        before = dict(gcs.objects)
        driver = remote_paths.file_system("gs")
        for name, calls in (("put_file", 5), ("cp_file", 2)):  # while a part is sent, and while parts are copied
            plain, left = getattr(driver, name), [None] * calls

            def cut(*args, plain=plain, left=left, **options):
                if not left:
                    raise KeyboardInterrupt
                left.pop()
                return plain(*args, **options)

            monkeypatch.setattr(driver, name, cut)
            with pytest.raises(KeyboardInterrupt):
                merge_checkpoint(recipe(a, b), a, step=30, max_shard_size=2**20)
            monkeypatch.setattr(driver, name, plain)
            assert before.items() <= gcs.objects.items()
            assert not gcs.names("runs/a/30")
            assert find_run(place_of(a)).last == 20
        result = merge_checkpoint(recipe(a, b), a, step=30, max_shard_size=2**20)
        assert (result.digest, result.resumed_shards) == (local.digest, 2)
        assert find_run(place_of(a)).last == 30
        assert {name.partition("/")[0] for name in gcs.names("runs/a")} == {"10", "20", "30"}


def test_steps_of_a_bucket_that_cannot_be_read(runs, monkeypatch, tmp_path) -> None:
    with google(monkeypatch) as gcs:
        a, b = gcs.put_all(runs / "a", "runs/a"), gcs.put_all(runs / "b", "runs/b")
        for name in [name for name in gcs.objects if name.startswith("runs/a/20/") and name.endswith("success.txt")]:
            del gcs.objects[name]  # by which Orbax ends a save in this storage
        assert locate_model(a).path.name == "10"
        assert chosen_steps(a, "last:1") == chosen_steps(a, "0:90") == [10]
        for place, words in (
            (f"{a}@20", rf"step 20 of {a} was not saved to its end: the nearest is {a}@10"),
            (f"{a}/20/model", "was not saved to its end or has lost files"),
            ("gs://bucket/runs/c@20", "gs://bucket/runs/c@20 does not exist: check the path"),
        ):
            with pytest.raises(M3Error, match=words):
                open_checkpoint(locate_model(place).path)
        values = max((n for n in gcs.objects if n.startswith("runs/a/10/")), key=lambda n: len(gcs.objects[n][1]))
        del gcs.objects[values]
        before = dict(gcs.objects)
        told = {"merge_method": "linear", "models": [a, b]}
        for out, step in ((a, 30), ("gs://bucket/out", None), (str(tmp_path / "out"), None)):
            with pytest.raises(M3Error, match=r"array '.*' in gs://bucket/runs/a/10/model is damaged or missing"):
                merge_checkpoint(told, out, step=step)
        assert gcs.objects == before
        assert not list(tmp_path.iterdir())


def test_every_object_of_a_step_in_a_bucket_is_seen(runs, local, monkeypatch) -> None:
    with google(monkeypatch) as gcs:
        a, b = gcs.put_all(runs / "a", "runs/a"), gcs.put_all(runs / "b", "runs/b")
        driver = remote_paths.file_system("gs")
        plain, sent = driver.put_file, []

        def cut(*args, **options):
            sent.append(args)
            if len(sent) > 5:
                raise KeyboardInterrupt
            return plain(*args, **options)

        monkeypatch.setattr(driver, "put_file", cut)
        with pytest.raises(KeyboardInterrupt):
            merge_checkpoint(recipe(a, b), a, step=30, max_shard_size=2**20)
        monkeypatch.setattr(driver, "put_file", plain)
        for name in ("model/modeling.py", "model/ocdbt.process_0/d/evil.py", "told/evil.py"):
            gcs.put(f"runs/a/30.partial/{name}", b"mine")
            with pytest.raises(
                M3Error, match=rf"30\.partial/{name} is where the merge would be made, but is not of one"
            ):
                merge_checkpoint(recipe(a, b), a, step=30, max_shard_size=2**20)
            assert gcs.objects.pop(f"runs/a/30.partial/{name}")[1] == b"mine"
        assert merge_checkpoint(recipe(a, b), a, step=30, max_shard_size=2**20).digest == local.digest
        assert verify(f"{a}/30").differences == ()
        for name in ("model/modeling.py", "model/d/evil.py", "model/embed.w/evil.py", "told/evil.py"):
            gcs.put(f"runs/a/30/{name}", b"")
            assert verify(f"{a}/30").differences == (f"{name}: is not in the manifest",)
            del gcs.objects[f"runs/a/30/{name}"]
        for name in ("_CHECKPOINT_METADATA", "commit_success.txt", "model/commit_success.txt", "told/metadata"):
            kept = gcs.objects[f"runs/a/30/{name}"]
            gcs.put(f"runs/a/30/{name}", b"{}")
            assert verify(f"{a}/30").differences == (f"{name}: has changed",)
            gcs.objects[f"runs/a/30/{name}"] = kept
        del gcs.objects["runs/a/30/_CHECKPOINT_METADATA"]
        assert verify(f"{a}/30").differences == ("_CHECKPOINT_METADATA: is missing",)


@pytest.mark.slow
def test_what_others_put_beside_a_merge(runs, local, monkeypatch) -> None:
    with google(monkeypatch) as gcs:
        a, b = gcs.put_all(runs / "a", "runs/a"), gcs.put_all(runs / "b", "runs/b")
        folders = [f"runs/a/{name}" for name in ("", "10/", "30/", "30/model/", "30.partial/")]
        for name in folders:  # as consoles and mounts make them
            gcs.put(name, b"")
        driver, sent, removed = remote_paths.file_system("gs"), [], []
        put, remove = driver.put_file, driver.rm_file

        def beside(*args, **options):
            if not sent:
                gcs.put("runs/a/30.partial/notes.txt", b"mine")
            sent.append(args)
            return put(*args, **options)

        monkeypatch.setattr(driver, "put_file", beside)
        with pytest.raises(M3Error, match=r"30.partial/notes.txt: is no part of the merge"):
            merge_checkpoint(recipe(a, b), a, step=30, max_shard_size=2**20)
        assert gcs.objects.pop("runs/a/30.partial/notes.txt")[1] == b"mine"
        # what is left of it goes before the journal that tells whose it is, whatever is made there instead
        monkeypatch.setattr(driver, "rm_file", lambda key: removed.append(key) or remove(key))
        result = merge_checkpoint(recipe(a, b), f"{a}/30", format="safetensors")
        aside = [key.rpartition("/")[2] for key in removed if "/30.partial/" in key]
        assert result.digest == local.digest
        assert len(aside) > 9
        assert aside[-1] == "m3jax-journal-0.json"
        assert verify(f"{a}/30").differences == ()
        assert gcs.objects.keys() >= set(folders)
