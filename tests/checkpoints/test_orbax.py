import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts
from flax import nnx
from flax.training import checkpoints as flax_checkpoints
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from support.checkpoint_suite import arrays_of_every_dtype, read, write_file

from m3jax.checkpoints import open_orbax, open_safetensors, write_orbax
from m3jax.checkpoints.orbax import boxes
from m3jax.checkpoints.orbax_template import read_template
from m3jax.checkpoints.orbax_writer import _chunk_shape, fill_with_orbax
from m3jax.errors import M3Error
from m3jax.outputs.conversion import convert

FIXTURES = Path(__file__).parent / "fixtures" / "orbax"
TREE = {
    "dense": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3), "bias": np.ones(3, ml_dtypes.bfloat16)},
    "layers": [np.float16([-0.0, np.nan]), (np.int32([[1, 2]]), np.bool_([True, False]))],
    "step": 7,
    "none": None,
    "empty": {},
}
NAMES = ["dense.bias", "dense.kernel", "layers.0", "layers.1.0", "layers.1.1", "step"]


def standard(path: Path, tree) -> None:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)


def by_handler(path: Path, tree, **options) -> None:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**options)) as checkpointer:
        checkpointer.save(path, tree)


def managed(path: Path, *steps: int, **items) -> None:
    with ocp.CheckpointManager(path) as manager:
        for step in steps:
            manager.save(step, args=ocp.args.Composite(**items) if items else ocp.args.StandardSave(TREE))
        manager.wait_until_finished()


def by_version_1(path: Path, tree) -> None:
    v1 = pytest.importorskip("orbax.checkpoint.experimental.v1")
    getattr(v1, "save", v1.save_pytree)(path, tree)


def by_flax(path: Path, tree) -> None:
    flax_checkpoints.save_checkpoint(path, tree, step=3, orbax_checkpointer=ocp.PyTreeCheckpointer())


WRITERS = {
    "standard": standard,
    "zarr": partial(by_handler, use_ocdbt=False),
    "zarr3": partial(by_handler, use_ocdbt=False, use_zarr3=True),
    "ocdbt-zarr3": partial(by_handler, use_zarr3=True),
    "manager": lambda path, tree: managed(path, 10, default=ocp.args.StandardSave(tree)),
    "manager-item": lambda path, tree: managed(
        path, 10, state=ocp.args.PyTreeSave(tree), told=ocp.args.JsonSave({"a": 1})
    ),
    "v1": by_version_1,
    "flax": by_flax,
}


def flat(tree) -> dict[str, np.ndarray]:
    paths = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {".".join(str(getattr(k, "key", getattr(k, "idx", k))) for k in path): np.asarray(x) for path, x in paths}


def assert_holds(path: Path, tree) -> None:
    expected = flat(tree)
    with open_orbax(path) as checkpoint:
        assert checkpoint.tensors.keys() == expected.keys()
        for name, array in expected.items():
            found = read(checkpoint, name)
            assert (found.dtype, found.shape) == (array.dtype, array.shape), name
            assert found.tobytes() == array.tobytes(), name


def refused(path: Path, *words: str) -> None:
    with pytest.raises(M3Error) as caught:
        open_orbax(path)
    sentence = str(caught.value)
    assert all(word in sentence for word in words), sentence
    assert sentence.endswith(".")
    assert "\n" not in sentence


@pytest.fixture
def saved(tmp_path):
    standard(tmp_path / "saved", TREE)
    return tmp_path / "saved"


# --- What Orbax writes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("writer", WRITERS)
def test_every_layout(tmp_path, writer) -> None:
    WRITERS[writer](tmp_path / "saved", TREE)
    assert_holds(tmp_path / "saved", TREE)


@pytest.mark.parametrize("version", ["0.2.3/stored", "0.2.3/mixed", "0.4.4/stored", "0.4.4/mixed", "0.6.4/stored"])
def test_earlier_versions(version) -> None:
    half, seven = np.float16([0.5, 0.5]), np.int64(7)
    dense = {
        "kernel": np.arange(6, dtype=np.float32).reshape(2, 3),
        "bias": np.array([-0.0, 1.5, np.nan], ml_dtypes.bfloat16),
    }
    tree = {"dense": dense, "layers": [np.arange(4, dtype=np.int32), half], "step": seven}
    assert_holds(FIXTURES / version, tree)


def test_arrays_without_any_tree(tmp_path) -> None:
    shutil.copytree(FIXTURES / "0.2.3" / "stored", tmp_path / "saved")
    (tmp_path / "saved" / "checkpoint").unlink()
    with open_orbax(tmp_path / "saved") as checkpoint:
        assert list(checkpoint.tensors) == ["dense.bias", "dense.kernel", "layers.0", "layers.1", "step"]


def test_sharded_arrays_and_keys(tmp_path) -> None:
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"))
    w = np.random.default_rng(0).standard_normal((8, 6)).astype(np.float32)
    place = NamedSharding(mesh, PartitionSpec("x", "y"))
    standard(tmp_path / "saved", {"w": jax.device_put(w, place), "key": jax.random.key(3)})
    assert_holds(tmp_path / "saved", {"w": w, "key": np.uint32([0, 3])})


def test_names_of_nnx_are_the_trees(tmp_path) -> None:
    state = nnx.state(nnx.Linear(3, 4, rngs=nnx.Rngs(0)))
    standard(tmp_path / "saved", state)
    with open_orbax(tmp_path / "saved") as checkpoint:
        tree = ocp.StandardCheckpointer().metadata(tmp_path / "saved").item_metadata.tree
        assert set(checkpoint.tensors) == set(flat(jax.tree.map(lambda leaf: np.zeros(leaf.shape), tree)))


def test_texts_are_left_out(tmp_path) -> None:
    by_handler(tmp_path / "saved", {"w": np.ones(2, np.float32), "told": "text"})
    assert_holds(tmp_path / "saved", {"w": np.ones(2, np.float32)})


def test_opening_imports_neither_jax_nor_orbax(saved) -> None:
    code = (
        "import sys, pathlib; from m3jax.checkpoints import open_orbax\n"
        f"c = open_orbax(pathlib.Path({str(saved)!r})); out = bytearray(4)\n"
        "c.read_into('dense.kernel', 4, memoryview(out))\n"
        "assert out == b'\\0\\0\\x80\\x3f'; print(sorted({'jax', 'orbax.checkpoint', 'flax'} & sys.modules.keys()))"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert told.stdout == "[]\n", told.stderr


# --- Byte ranges -----------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 5), max_size=4), st.data())
def test_boxes_follow_each_other_and_are_few(shape, data) -> None:
    array = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    start = data.draw(st.integers(0, array.size))
    stop = data.draw(st.integers(start, array.size))
    found = list(boxes(tuple(shape), start, stop))
    assert [e for box in found for e in array[box].reshape(-1)] == list(range(start, stop))
    assert len(found) <= max(1, 2 * len(shape) - 1)


@pytest.fixture(scope="module")
def chunked(tmp_path_factory):
    """An array of 5 × 6 × 7 in chunks of 2 × 3 × 4, and what it holds."""
    path = tmp_path_factory.mktemp("orbax") / "saved"
    values = np.random.default_rng(0).integers(0, 1 << 16, (5, 6, 7), np.uint16)
    standard(path, {"w": values, "s": np.float32(1.5)})
    shutil.rmtree(path)
    by_handler(path, {"w": values, "s": np.float32(1.5)}, use_ocdbt=False)
    shutil.rmtree(path / "w")
    spec = {"driver": "zarr", "kvstore": f"file://{path}/w/", "metadata": {"chunks": [2, 3, 4], "order": "F"}}
    spec["store_data_equal_to_fill_value"] = True
    ts.open(spec, create=True, dtype=ts.uint16, shape=values.shape).result().write(values).result()
    with open_orbax(path) as checkpoint:
        yield checkpoint, values


@pytest.fixture(scope="module")
def spilled(chunked):
    """The same array, of which decoded chunks wait on the disk."""
    with pytest.MonkeyPatch.context() as patch, open_orbax(Path(chunked[0].location)) as checkpoint:
        patch.setattr("m3jax.checkpoints.orbax._BANDS", 0)
        assert read(checkpoint, "s").tobytes() == np.float32(1.5).tobytes()
        yield checkpoint


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50)
@given(data=st.data())
def test_any_range_of_bytes(chunked, spilled, data) -> None:
    checkpoint, values = (spilled if data.draw(st.booleans()) else chunked[0]), chunked[1]
    start = data.draw(st.integers(0, values.nbytes))
    stop = data.draw(st.integers(start, values.nbytes))
    out = np.full(stop - start, 99, np.uint8)
    checkpoint.read_into("w", start, out if data.draw(st.booleans()) else out.data)
    assert out.tobytes() == values.tobytes()[start:stop]


@pytest.mark.parametrize("bands", [0, 1 << 20])
@pytest.mark.parametrize("chunk", [[64, 4096], [16, 1024], [1, 4096], [64, 64]])
def test_a_chunk_is_decoded_once(tmp_path, monkeypatch, chunk, bands) -> None:
    monkeypatch.setattr("m3jax.checkpoints.orbax._CACHE", 1 << 16)
    monkeypatch.setattr("m3jax.checkpoints.orbax._BANDS", bands)  # of memory: beyond, decoded chunks wait on the disk
    values = np.random.default_rng(0).standard_normal((64, 4096)).astype(np.float32)
    by_handler(tmp_path / "saved", {"w": np.zeros(1)}, use_ocdbt=False)
    shutil.rmtree(tmp_path / "saved" / "w")
    spec = {"driver": "zarr", "kvstore": f"file://{tmp_path}/saved/w/", "metadata": {"chunks": chunk}}
    ts.open(spec, create=True, dtype=ts.float32, shape=values.shape).result().write(values).result()
    with open_orbax(tmp_path / "saved") as checkpoint:
        before = bytes_read_by_tensorstore()
        out = np.empty(1 << 14, np.uint8)
        for start in range(0, values.nbytes, out.size):
            checkpoint.read_into("w", start, out)
            assert out.tobytes() == values.tobytes()[start : start + out.size]
        assert bytes_read_by_tensorstore() - before < 1.1 * values.nbytes


def test_a_long_range_comes_in_pieces(chunked, monkeypatch) -> None:
    checkpoint, values = chunked
    monkeypatch.setattr("m3jax.checkpoints.orbax._PIECE", 22)
    assert read(checkpoint, "w").tobytes() == values.tobytes()
    sizes = [len(raw) for raw in checkpoint._pieces(checkpoint.tensors["w"], 1, 30)]
    assert max(sizes) <= 22
    assert sum(sizes) == 58


def bytes_read_by_tensorstore() -> int:
    (metric,) = ts.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
    return sum(value["value"] for value in metric["values"])


# --- Which files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("writer", ["standard", "zarr"])
def test_files_of_others_are_no_weights(tmp_path, writer) -> None:
    WRITERS[writer](tmp_path / "saved", TREE)
    with open_orbax(tmp_path / "saved") as checkpoint:
        files = checkpoint.files()
        (tmp_path / "saved" / "config.json").write_text("{}")
        (tmp_path / "saved" / "cache").mkdir()
        (tmp_path / "saved" / "cache" / "file").touch()
        assert checkpoint.files() == files
        told = {path.relative_to(tmp_path / "saved").parts[0] for path in files}
        assert told >= ({"_METADATA", *NAMES} if writer == "zarr" else {"_METADATA", "manifest.ocdbt", "d"})


def test_a_fingerprint_tells_of_any_change(saved) -> None:
    with open_orbax(saved) as checkpoint:
        before = checkpoint.fingerprint()
        assert before == checkpoint.fingerprint()
        assert {saved / name for name in before} == set(checkpoint.files())
        assert {"_METADATA", "manifest.ocdbt"} < before.keys()
        assert not {"_sharding", "commit_success.txt", "_CHECKPOINT_METADATA"} & before.keys()
        (saved / "manifest.ocdbt").touch()
        assert checkpoint.fingerprint() != before
        shutil.rmtree(saved)
        with pytest.raises(M3Error, match="has gone"):
            checkpoint.fingerprint()


# --- What is refused -------------------------------------------------------------------------------------


def test_no_directory(tmp_path) -> None:
    refused(tmp_path / "absent", "is no directory of an Orbax checkpoint")
    refused(tmp_path, "holds no arrays of Orbax")


def test_several_steps(tmp_path) -> None:
    managed(tmp_path / "run", 1, 2, 30)
    with open_orbax(tmp_path / "run") as checkpoint:
        assert checkpoint.item == tmp_path / "run" / "30" / "default"
    assert_holds(tmp_path / "run" / "30", TREE)
    assert_holds(tmp_path / "run" / "30" / "default", TREE)


def test_several_trees(tmp_path) -> None:
    tree = {"w": np.ones(2, np.float32)}
    managed(tmp_path / "run", 1, a=ocp.args.StandardSave(tree), b=ocp.args.StandardSave(tree))
    refused(tmp_path / "run", "holds several trees (a, b)", f"such as {tmp_path / 'run' / '1' / 'a'}")
    assert_holds(tmp_path / "run" / "1" / "b", tree)


def test_the_one_tree_that_has_arrays(tmp_path) -> None:
    tree = {"w": np.ones(2, np.float32)}
    managed(tmp_path / "run", 1, a=ocp.args.PyTreeSave({"told": None}), b=ocp.args.StandardSave(tree))
    assert_holds(tmp_path / "run", tree)


def test_an_unfinished_save(saved, tmp_path) -> None:
    temporary = tmp_path / "run" / "5.orbax-checkpoint-tmp-1"
    shutil.copytree(saved, temporary)
    shutil.copytree(saved, temporary / "default")
    refused(temporary, "was not saved to its end")
    refused(temporary / "default", "was not saved to its end")
    refused(tmp_path / "run", "did not come to their end")
    shutil.copytree(saved, tmp_path / "run" / "4")
    assert_holds(tmp_path / "run", TREE)


def test_a_save_without_its_commit(saved) -> None:
    (saved / "commit_success.txt").unlink(missing_ok=True)
    step = saved / "_CHECKPOINT_METADATA"
    assert_holds(saved, TREE)
    step.write_text(json.dumps(json.loads(step.read_text()) | {"commit_timestamp_nsecs": None}))
    refused(saved, "was not saved to its end")


def test_metrics_may_be_nan(saved) -> None:
    (saved / "commit_success.txt").unlink(missing_ok=True)
    step = saved / "_CHECKPOINT_METADATA"
    step.write_text(json.dumps(json.loads(step.read_text()) | {"metrics": {"loss": float("nan")}}))
    assert_holds(saved, TREE)
    for damage in "", "[]":
        step.write_text(damage)
        refused(saved, "was not saved to its end")


def test_processes_that_were_not_joined(saved) -> None:
    (saved / "manifest.ocdbt").unlink()
    refused(saved, "was not saved to its end")


@pytest.mark.parametrize("file", ["manifest.ocdbt", "d/pipe", "pipe"])
def test_what_tensorstore_would_wait_for(saved, file) -> None:
    (saved / file).unlink(missing_ok=True)
    os.mkfifo(saved / file)
    refused(saved, f"{file} is not a regular file: get the checkpoint again")


@pytest.mark.parametrize("file", ["manifest.ocdbt", "_METADATA"])
def test_descriptions_that_memory_does_not_hold(saved, file) -> None:
    os.truncate(saved / file, 2**43)
    refused(saved, f"{file} has 8,796,093,022,208 bytes")


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("_strings.json", b"\xff\xfe{"),
        ("array_metadatas/process_0", b'{"array_metadatas": [{}]}'),
        ("array_metadatas/process_0", b'{"array_metadatas": 5}'),
        ("array_metadatas/process_0", b"{"),
        ("_sharding", b"{"),
    ],
)
def test_small_files_of_a_template_that_are_damaged(saved, tmp_path, file, damage) -> None:
    (saved / file).parent.mkdir(exist_ok=True)
    (saved / file).write_bytes(damage)
    with pytest.raises(M3Error, match=rf"{file} is damaged: get the checkpoint again from its source"):
        convert(saved, tmp_path / "out", "orbax")


def test_an_array_that_is_missing(tmp_path) -> None:
    by_handler(tmp_path / "saved", TREE, use_ocdbt=False)
    shutil.rmtree(tmp_path / "saved" / "dense.bias")
    refused(tmp_path / "saved", "array 'dense.bias'", "is damaged or missing (NOT_FOUND)", "get the checkpoint again")


def test_a_packed_array_that_is_missing(tmp_path) -> None:
    shutil.copytree(FIXTURES / "0.4.4" / "mixed", tmp_path / "saved")
    (tmp_path / "saved" / "checkpoint").write_bytes(b"\x80")
    refused(tmp_path / "saved", "is not in", "where _METADATA places it")


@pytest.mark.parametrize("damage", ["cut", "remove"])
def test_a_chunk_that_is_damaged_or_missing(tmp_path, damage) -> None:
    by_handler(tmp_path / "saved", TREE, use_ocdbt=False)
    chunk = tmp_path / "saved" / "dense.kernel" / "0.0"
    chunk.write_bytes(chunk.read_bytes()[:9]) if damage == "cut" else chunk.unlink()
    with open_orbax(tmp_path / "saved") as checkpoint:
        with pytest.raises(M3Error, match=r"array 'dense.kernel' in .* is damaged or missing"):
            read(checkpoint, "dense.kernel")
        assert read(checkpoint, "step") == 7


@pytest.mark.parametrize("file", ["manifest.ocdbt", "d"])
def test_a_damaged_database(saved, file) -> None:
    for path in [saved / file] if file != "d" else [p for p in saved.rglob("*") if p.parent.name == "d"]:
        path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(M3Error, match="is damaged or missing"), open_orbax(saved) as checkpoint:
        read(checkpoint, "dense.kernel")


def test_a_damaged_database_without_a_list(saved) -> None:
    (saved / "_METADATA").unlink()
    with open_orbax(saved) as checkpoint:
        assert list(checkpoint.tensors) == NAMES
    (saved / "manifest.ocdbt").write_bytes(b"no")
    refused(saved, "the list of arrays in", "is damaged or missing")


@pytest.mark.parametrize(
    "told", [{}, {"tree_metadata": 1}, {"tree_metadata": {"a": 1}}, {"tree_metadata": {"a": {"key_metadata": [1]}}}]
)
def test_another_version(saved, told) -> None:
    (saved / "_METADATA").write_text(json.dumps(told))
    refused(saved, "_METADATA", "a version of Orbax that is not known here")


def test_a_damaged_list(saved) -> None:
    (saved / "_METADATA").write_text('{"tree_metadata": ')
    refused(saved, "_METADATA", "is not valid JSON")


def test_an_array_outside(tmp_path) -> None:
    by_handler(tmp_path / "saved", {"w": np.ones(2)}, use_ocdbt=False)
    text = (tmp_path / "saved" / "_METADATA").read_text()
    (tmp_path / "saved" / "_METADATA").write_text(text.replace('"key": "w"', '"key": "../saved/w"'))
    refused(tmp_path / "saved", "'../saved/w' outside of the checkpoint", "do not trust it")


def test_two_leaves_of_one_name(saved) -> None:
    told = json.loads((saved / "_METADATA").read_text())
    entries = told["tree_metadata"]
    again = {**entries["('dense', 'bias')"], "key_metadata": [{"key": "dense.bias", "key_type": 2}]}
    entries["('dense.bias',)"] = again
    (saved / "_METADATA").write_text(json.dumps(told))
    refused(saved, "two leaves of the name 'dense.bias'", "rename one")


def test_entries_of_less_than_a_byte(tmp_path) -> None:
    standard(tmp_path / "saved", {"w": jnp.ones(4, jnp.int4)})
    refused(tmp_path / "saved", "array 'w'", "dtype 'int4'")


# --- Writing ---------------------------------------------------------------------------------------------


def source_of(directory: Path, arrays: dict[str, np.ndarray], **metadata: str) -> Path:
    directory.mkdir(exist_ok=True)
    write_file(directory / "model.safetensors", arrays, metadata=metadata)
    return directory


@pytest.fixture(scope="module")
def every_dtype():
    """Random bits, so that every NaN has to survive."""
    return {"F32.zeros": np.zeros((2, 3), np.float32), **arrays_of_every_dtype()}


def restore_standard(path: Path):
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path)


def restore_pytree(path: Path):
    with ocp.PyTreeCheckpointer() as checkpointer:
        return checkpointer.restore(path)


def restore_version_1(path: Path):
    v1 = pytest.importorskip("orbax.checkpoint.experimental.v1")
    return getattr(v1, "load", v1.load_pytree)(path)


def restore_here(path: Path):
    with open_orbax(path) as checkpoint:
        assert checkpoint.metadata == {"format": "pt"}
        tree: dict[str, dict[str, np.ndarray]] = {}
        for name in checkpoint.tensors:
            above, below = name.split(".")
            tree.setdefault(above, {})[below] = read(checkpoint, name)
        return tree


@pytest.fixture(scope="module")
def written(every_dtype, tmp_path_factory):
    directory = tmp_path_factory.mktemp("orbax")
    with open_safetensors(source_of(directory / "source", every_dtype, format="pt")) as source:
        write_orbax(directory / "saved", source)
    assert sorted(path.name for path in directory.iterdir()) == ["saved", "source"]
    return directory / "saved"


@pytest.mark.parametrize("restore", [restore_here, restore_standard, restore_pytree, restore_version_1])
def test_every_bit_comes_back(every_dtype, written, restore) -> None:
    restored = flat(restore(written))
    assert restored.keys() == every_dtype.keys()
    for name, array in every_dtype.items():
        assert (restored[name].dtype, restored[name].shape) == (array.dtype, array.shape), name
        assert restored[name].tobytes() == array.tobytes(), name


def test_orbax_describes_what_we_wrote(every_dtype, written) -> None:
    assert ocp.utils.is_checkpoint_finalized(written)
    with ocp.StandardCheckpointer() as checkpointer:
        told = checkpointer.metadata(written)
    leaves = jax.tree_util.tree_flatten_with_path(told.item_metadata.tree)[0]
    described = {".".join(key.key for key in path): (leaf.shape, leaf.dtype) for path, leaf in leaves}
    assert described == {name: (array.shape, array.dtype) for name, array in every_dtype.items()}
    assert told.custom_metadata == {}
    assert told.init_timestamp_nsecs <= told.commit_timestamp_nsecs


def test_restored_into_shardings(tmp_path) -> None:
    w = np.arange(64, dtype=np.float32).reshape(8, 8)
    with open_safetensors(source_of(tmp_path / "source", {"a.w": w})) as source:
        write_orbax(tmp_path / "saved", source)
    place = NamedSharding(Mesh(np.array(jax.devices()), "x"), PartitionSpec("x"))
    abstract = {"a": {"w": jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=place)}}
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "saved", abstract)["a"]["w"]
    assert restored.sharding == place
    np.testing.assert_array_equal(restored, w)


def test_tensors_larger_than_a_chunk(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("m3jax.checkpoints.orbax_writer._CHUNK", 64)
    rng = np.random.default_rng(0)
    arrays = {
        f"w{k}": rng.standard_normal(shape).astype(np.float32) for k, shape in enumerate([(50,), (9, 7), (3, 5, 40)])
    }
    with open_safetensors(source_of(tmp_path / "source", arrays)) as source:
        write_orbax(tmp_path / "saved", source)
    assert_holds(tmp_path / "saved", arrays)
    for name, array in restore_standard(tmp_path / "saved").items():
        np.testing.assert_array_equal(array, arrays[name])


def test_many_small_tensors_are_committed_together(tmp_path) -> None:
    arrays = {f"layers.{k}": np.ones(2, np.float32) for k in range(300)}
    with open_safetensors(source_of(tmp_path / "source", arrays)) as source:
        write_orbax(tmp_path / "saved", source)
    assert sum(1 for path in (tmp_path / "saved").rglob("*")) < 100


@given(st.lists(st.integers(0, 2**16), max_size=4), st.sampled_from([1, 2, 8]))
def test_chunks_are_small_and_contiguous(shape, width) -> None:
    chunk = _chunk_shape(shape, width)
    assert all(1 <= step <= max(size, 1) for step, size in zip(chunk, shape, strict=True))
    assert np.prod(chunk, dtype=object) * width <= 1 << 24
    divided = next((axis for axis, step in enumerate(chunk) if step > 1), len(chunk))
    assert chunk[divided + 1 :] == [max(size, 1) for size in shape[divided + 1 :]]


def test_an_orbax_checkpoint_is_a_source(saved, tmp_path) -> None:
    with open_orbax(saved) as source:
        write_orbax(tmp_path / "again", source)
    assert_holds(tmp_path / "again", dict(flat(TREE)))


@pytest.mark.parametrize("names", [("a", "a.b"), ("a.b", "a.b.c.d"), ("a.b-c", "a.b", "a.b.c")])
def test_a_name_inside_another(tmp_path, names) -> None:
    arrays = {name: np.ones(1, np.float32) for name in names}
    with (
        open_safetensors(source_of(tmp_path / "source", arrays)) as source,
        pytest.raises(M3Error, match="in a tree a name holds either a tensor or others"),
    ):
        write_orbax(tmp_path / "saved", source)
    assert not (tmp_path / "saved").exists()


def test_a_place_that_is_taken(saved, tmp_path) -> None:
    with open_orbax(saved) as source:
        with pytest.raises(M3Error, match="is there already"):
            write_orbax(saved, source)
        (tmp_path / "empty").mkdir()
        write_orbax(tmp_path / "empty", source)
        with pytest.raises(M3Error, match=r"absent/saved cannot be written: No such file.*; check the place"):
            write_orbax(tmp_path / "absent" / "saved", source)


def test_a_source_that_fails_leaves_nothing(saved, tmp_path) -> None:
    with open_orbax(saved) as source:
        source.close()
        with pytest.raises(ValueError, match="is closed"):
            write_orbax(tmp_path / "again", source)
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(tmp_path) -> None:
    layer = np.random.default_rng(0).standard_normal((1024, 4096)).astype(np.float32)
    code = """
import pathlib, sys, threading
from m3jax.checkpoints import open_orbax, open_safetensors, write_orbax
from m3jax.checkpoints.copying import pieces
def anonymous():
    return next(int(line.split()[1]) >> 10 for line in open("/proc/self/status") if line.startswith("RssAnon"))
peak, done = anonymous(), threading.Event()
def watch():
    global peak
    while not done.wait(0.005):
        peak = max(peak, anonymous())
watcher = threading.Thread(target=watch); watcher.start()
place = pathlib.Path(sys.argv[1])
with open_safetensors(place) as source:
    write_orbax(place / "orbax", source)
with open_orbax(place / "orbax") as checkpoint:
    for name, info in checkpoint.tensors.items():
        for _ in pieces(checkpoint, name, 0, info.nbytes): pass
done.set(); watcher.join(); print(peak)
"""
    source_of(tmp_path / "source", {f"layers.{k}": layer for k in range(60)})  # 1 GB
    told = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "source")], capture_output=True, text=True, timeout=300, check=True
    )
    assert int(told.stdout) < 600


# --- Writing as a template -------------------------------------------------------------------------------


RICH = {
    "params": {"w": jnp.ones((8, 6)), "l": [jnp.ones(2), jnp.zeros(3)], "a.b": jnp.ones(2)},
    "opt": optax.adam(1e-3).init({"w": jnp.ones(2)}),
    "none": None,
    "empty": {},
    "step": 7,
    "told": "text",
    "key": jax.random.key(0),
}


def assert_same(found, tree) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(tree)
    for pair in zip(jax.tree.leaves(found), jax.tree.leaves(tree), strict=True):
        a, b = pair
        assert type(a) is type(b)
        if isinstance(a, jax.Array):
            assert (a.dtype, a.sharding) == (b.dtype, b.sharding)
            pair = (jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x for x in pair)
        np.testing.assert_array_equal(*pair)


@pytest.fixture(scope="module")
def rich_run(tmp_path_factory):
    """Step 5 of a manager: a tree with all kinds of leaves, sharded over devices, beside a tree and a text."""
    place = tmp_path_factory.mktemp("rich") / "run"
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"))
    tree = {
        **RICH,
        "sharded": jax.device_put(jnp.arange(48.0).reshape(8, 6), NamedSharding(mesh, PartitionSpec("x", "y"))),
    }
    with ocp.CheckpointManager(place) as manager:
        items = {"params": ocp.args.PyTreeSave(tree), "other": ocp.args.StandardSave({"m": jnp.ones(2)})}
        told = ocp.args.JsonSave({"a": 1})
        manager.save(5, args=ocp.args.Composite(**items, told=told), custom_metadata={"scan_layers": True})
        manager.wait_until_finished()
    return place


@pytest.mark.filterwarnings("ignore:Sharding info not provided")  # as the original says too
def test_a_step_is_written_as_its_template(rich_run, tmp_path) -> None:
    (tmp_path / "run" / "9").mkdir(parents=True)
    with open_orbax(rich_run) as source:
        fill_with_orbax(tmp_path / "run" / "9", source, template=read_template(rich_run))
    restored = []
    for place, step in ((rich_run, 5), (tmp_path / "run", 9)):
        with ocp.CheckpointManager(place) as manager:
            restored.append(manager.restore(step))
            assert manager.metadata(step).custom_metadata == {"scan_layers": True}
    assert_same(dict(restored[1].items()), dict(restored[0].items()))
    with ocp.PyTreeCheckpointer() as checkpointer:
        told = [
            checkpointer.metadata(p).item_metadata.tree
            for p in (rich_run / "5" / "params", tmp_path / "run" / "9" / "params")
        ]
        assert jax.tree.structure(told[0]) == jax.tree.structure(told[1])
        assert told[0]["sharded"].storage == told[1]["sharded"].storage  # divided alike
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, {k: v for k, v in RICH.items() if k != "told"})
        args = ocp.args.PyTreeRestore(abstract | {"told": ""}, partial_restore=True)
        assert_same(
            {
                k: v
                for k, v in checkpointer.restore(tmp_path / "run" / "9" / "params", args).items()
                if k in ("params", "opt")
            },
            {k: v for k, v in RICH.items() if k in ("params", "opt")},
        )


@pytest.mark.filterwarnings("ignore:Sharding info not provided")  # as the original says too
def test_a_part_of_a_template(rich_run, tmp_path) -> None:
    template = read_template(rich_run / "5" / "params")
    with open_orbax(rich_run) as source:
        names = [name for name in source.tensors if name.startswith("params.")]
        part = {name: read(source, name) for name in names if name != "params.l.0"}
        lacking = source_of(tmp_path / "lacking", part)
        whole = source_of(tmp_path / "whole", part | {"params.l.0": np.float16([1, 2])})
        other = source_of(tmp_path / "other", {"params.z": np.ones(1, np.float32)})
    with open_safetensors(whole) as source:
        write_orbax(tmp_path / "saved", source, template)
    found = restore_pytree(tmp_path / "saved")
    assert found.keys() == {"params", "none", "empty", "told"}  # nothing that only held the training's state
    assert found["params"]["l"][0].dtype == np.float16
    assert isinstance(found["params"]["l"], list)
    for place, sentence in (
        (lacking, "would lose some of its elements"),
        (other, "'params.z' has no place in the tree"),
    ):
        with open_safetensors(place) as source, pytest.raises(M3Error, match=sentence):
            write_orbax(tmp_path / "again", source, template)


@pytest.mark.filterwarnings("ignore:Sharding info not provided")  # as the original says too
def test_checkpoints_of_trainers_come_back_alike(jax_data, tmp_path) -> None:
    for name in ("maxtext_scanned/a", "tunix_full/a", "gemma_nested/a", "nnx_loop_mgr/a"):
        template = read_template(jax_data / name)
        with open_orbax(jax_data / name) as source:
            write_orbax(tmp_path / name.replace("/", "-"), source, template._replace(name=""))
        assert_same(restore_pytree(tmp_path / name.replace("/", "-")), restore_pytree(template.item))
