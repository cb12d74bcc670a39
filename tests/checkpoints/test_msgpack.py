"""The msgpack files of Flax: what Flax writes is read, what we write Flax restores, and nothing else is trusted."""

import json
import os
import re
import struct
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import flax
import jax.numpy as jnp
import msgpack
import numpy as np
import pytest
from flax import serialization
from flax.training import checkpoints as legacy
from flax.traverse_util import flatten_dict, unflatten_dict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.checkpoint_suite import arrays_of_every_dtype, assert_holds, random_array, read, write_file

from m3jax.checkpoints import (
    DTYPES,
    Checkpoint,
    copying,
    msgpack_tree,
    msgpack_writer,
    open_msgpack,
    open_safetensors,
    write_msgpack,
    write_safetensors,
)
from m3jax.checkpoints.trust import remarks
from m3jax.errors import M3Error

SINGLE, INDEX = "flax_model.msgpack", "flax_model.msgpack.index.json"


def safetensors(directory: Path, arrays: dict[str, np.ndarray]) -> Checkpoint:
    """The arrays as a checkpoint to write from."""
    return open_safetensors(write_file(directory / "source.safetensors", arrays))


def saved(directory: Path, tree: Any, name: str = SINGLE) -> Path:
    path = directory / name
    path.write_bytes(tree if isinstance(tree, bytes) else serialization.msgpack_serialize(tree))
    return path


def refused(path: Path, *words: str) -> None:
    """Opening fails with one sentence that has these words."""
    with pytest.raises(M3Error) as caught:
        open_msgpack(path)
    sentence = str(caught.value)
    assert all(word in sentence for word in words), sentence
    assert sentence.endswith(".")
    assert "\n" not in sentence


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrays of more than 16 bytes are chunked, here and in Flax."""
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 16)
    monkeypatch.setattr(msgpack_writer, "_CHUNK", 16)


# --- The same bytes as Flax ------------------------------------------------------------------------------


def test_reads_what_flax_writes(tmp_path: Path) -> None:
    arrays = arrays_of_every_dtype()
    with open_msgpack(saved(tmp_path, unflatten_dict(arrays, sep="."))) as checkpoint:
        assert_holds(checkpoint, arrays)
        assert checkpoint.metadata == {}
        assert checkpoint.files() == (tmp_path / SINGLE,)


def test_flax_reads_what_we_write(tmp_path: Path) -> None:
    arrays = arrays_of_every_dtype()
    with safetensors(tmp_path, arrays) as source:
        write_msgpack(tmp_path, source, 10**9)
    restored = flatten_dict(serialization.msgpack_restore((tmp_path / SINGLE).read_bytes()), sep=".")
    assert restored.keys() == arrays.keys()
    for name, array in arrays.items():
        assert (restored[name].dtype, restored[name].shape) == (array.dtype, array.shape)
        assert restored[name].tobytes() == array.tobytes()
    assert not list(tmp_path.glob("*.tmp"))


def test_chunks_are_of_the_size_of_flax() -> None:
    assert msgpack_writer._CHUNK == serialization.MAX_CHUNK_SIZE


@pytest.mark.usefixtures("small_chunks")
def test_chunked_arrays(tmp_path: Path) -> None:
    arrays = arrays_of_every_dtype()
    path = saved(tmp_path, unflatten_dict(arrays, sep="."))
    theirs = path.read_bytes()
    assert msgpack_tree.CHUNKED.encode() in theirs
    with open_msgpack(path) as checkpoint:
        assert_holds(checkpoint, arrays)
    with safetensors(tmp_path, arrays) as source:
        write_msgpack(tmp_path, source, 10**9)
    assert path.read_bytes() == theirs


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_bytes_are_those_of_flax(tmp_path: Path, data: st.DataObject) -> None:
    key = st.text(st.characters(exclude_characters=".", codec="utf-8"), max_size=40).filter(
        lambda key: key != "__metadata__"
    )
    leaf = st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 20), max_size=3).map(tuple))
    tree = data.draw(st.dictionaries(key, leaf | st.dictionaries(key, leaf, min_size=1), min_size=1, max_size=5))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    arrays = {}
    for name, (dtype, shape) in flatten_dict(tree, sep=".").items():
        arrays[name] = random_array(dtype, shape, rng)
    with safetensors(tmp_path, arrays) as source:
        write_msgpack(tmp_path, source, 10**9)
    assert (tmp_path / SINGLE).read_bytes() == serialization.msgpack_serialize(unflatten_dict(arrays, sep="."))
    with open_msgpack(tmp_path) as checkpoint:
        assert_holds(checkpoint, arrays)


@pytest.mark.parametrize("count", [0, 1, 15, 16, 300])
def test_every_width_of_a_header(tmp_path: Path, count: int) -> None:
    arrays = {f"{'n' * index}.w": np.full(index, 7, np.uint8) for index in range(1, count + 1)}
    with safetensors(tmp_path, arrays) as source:
        write_msgpack(tmp_path, source, 10**9)
    assert (tmp_path / SINGLE).read_bytes() == serialization.msgpack_serialize(unflatten_dict(arrays, sep="."))


def test_every_head_is_as_the_library_packs_it() -> None:
    packer = msgpack.Packer()
    for count in {edge + step for edge in (0, 16, 32, 2**7, 2**8, 2**16) for step in (-1, 0, 1)} - {-1}:
        assert msgpack_writer._map(count) == packer.pack_map_header(count)
        assert msgpack_writer._number(count) == packer.pack(count)
        assert msgpack_writer._text("a" * count) == packer.pack("a" * count)
        assert msgpack_writer._extension_head(count) + b"\1" == packer.pack_ext_type(1, b"x" * count)[: -count or None]
        if count <= 64:
            assert msgpack_writer._array_head(count) == packer.pack_array_header(count)
    for size in (2**32 - 1, 2**32, 2**63 - 1):
        assert msgpack_writer._number(size) == packer.pack(size)
    assert msgpack_writer._extension_head(2**31) == b"\xc9\x80\0\0\0"


# --- What else stands among arrays -----------------------------------------------------------------------


def test_leaves_that_are_no_arrays(tmp_path: Path) -> None:
    tree = {
        "step": 7,
        "loss": -0.5,
        "flags": [True, None, 2**40, -3, -(2**40)],
        "note": "λ",
        "novel": "x" * 2000,
        "raw": b"\x00",
        "z": 1j,
        "scalar": np.float16(2),
        "list": [np.ones(2, np.float32), {"w": np.zeros(1, np.int8)}],
        "empty": {},
    }
    with open_msgpack(saved(tmp_path, serialization.to_bytes(tree))) as checkpoint:
        assert {name: info.shape for name, info in checkpoint.tensors.items()} == {
            "list.0": (2,),
            "list.1.w": (1,),
            "scalar": (),
        }
        assert read(checkpoint, "scalar") == 2
        assert checkpoint.metadata == {
            "step": "7",
            "loss": "-0.5",
            "flags.0": "true",
            "flags.2": str(2**40),
            "flags.3": "-3",
            "flags.4": str(-(2**40)),
            "note": "λ",
        }
    with open_msgpack(saved(tmp_path, serialization.msgpack_serialize([np.ones(2, np.int8)]))) as checkpoint:
        assert list(checkpoint.tensors) == ["0"]


@pytest.mark.filterwarnings("ignore:Flax Checkpointing will soon be deprecated")
def test_files_of_flax_training_checkpoints(tmp_path: Path) -> None:
    with flax.config.temp_flip_flag("use_orbax_checkpointing", False):
        for step in (5, 20, 100):
            tree = {"params": {"w": jnp.full((2, 2), step, jnp.bfloat16)}, "step": step}
            legacy.save_checkpoint(tmp_path, tree, step, keep=9)
    (tmp_path / "checkpoint_300").mkdir()  # Orbax's are directories
    with open_msgpack(tmp_path) as checkpoint:
        assert checkpoint.metadata == {"step": "100"}
        assert read(checkpoint, "params.w").tolist() == [[100, 100]] * 2
    with open_msgpack(tmp_path / "checkpoint_5") as checkpoint:
        assert checkpoint.metadata == {"step": "5"}


def test_arrays_kept_elsewhere_are_not_left_out(tmp_path: Path) -> None:
    refused(saved(tmp_path, {"params": {"w": f"{legacy.MP_ARRAY_PH}params/w"}}), "'params.w'", "several hosts")


# --- Reading ---------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_chunks")
def test_any_range_over_chunks_from_many_threads(tmp_path: Path) -> None:
    array = np.arange(50, dtype=np.uint16)
    whole = array.tobytes()
    with open_msgpack(saved(tmp_path, {"w": array})) as checkpoint:

        def check(limits: tuple[int, int]) -> None:
            start, stop = limits
            out = bytearray(stop - start)
            checkpoint.read_into("w", start, memoryview(out))
            assert out == whole[start:stop]

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(check, [(a, b) for a in range(0, 101, 3) for b in range(a, 101)]))


def test_opening_reads_no_payloads(tmp_path: Path) -> None:
    path = tmp_path / "sparse.msgpack"
    hole = 2**33
    arrays = 4
    with open(path, "wb") as file:
        file.write(bytes([0x80 | arrays]))
        for index in range(arrays):
            size = 2**31
            inner = b"\x93" + msgpack.packb([size // 8]) + msgpack.packb("float64") + b"\xc6" + struct.pack(">I", size)
            file.write(msgpack.packb(f"w{index}") + b"\xc9" + struct.pack(">IB", len(inner) + size, 1) + inner)
            file.seek(size, os.SEEK_CUR)
        file.truncate(file.tell())
    tracemalloc.start()
    try:
        with open_msgpack(path) as checkpoint:
            assert sum(info.nbytes for info in checkpoint.tensors.values()) == hole
            checkpoint.fingerprint()
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_fingerprint(tmp_path: Path) -> None:
    path = saved(tmp_path, {"w": np.zeros(4, np.float32), "step": 1})
    with open_msgpack(path) as checkpoint:
        first = checkpoint.fingerprint()
        assert first[SINGLE]["size"] == path.stat().st_size
        assert first == checkpoint.fingerprint()
        saved(tmp_path, {"w": np.zeros(4, np.float32), "step": 2})
        assert checkpoint.fingerprint()[SINGLE]["header_blake3"] != first[SINGLE]["header_blake3"]
        with pytest.raises(M3Error, match="has changed since its header was read"):
            read(checkpoint, "w")
        path.unlink()
        with pytest.raises(M3Error, match="does not exist"):
            checkpoint.fingerprint()


# --- Several files ---------------------------------------------------------------------------------------


def transformers_loads(directory: Path) -> dict[str, np.ndarray]:
    """What transformers 4 does with an index."""
    index = json.loads((directory / INDEX).read_text())
    state: dict[str, np.ndarray] = {}
    for file in sorted(set(index["weight_map"].values())):
        shard = flatten_dict(serialization.from_bytes(None, (directory / file).read_bytes()), sep="/")
        assert all(index["weight_map"][name] == file for name in shard)
        state.update(shard)
    assert state.keys() == index["weight_map"].keys()
    return flatten_dict(unflatten_dict(state, sep="/"), sep=".")


def test_shards(tmp_path: Path) -> None:
    arrays = {f"model.layers.{k}.{part}": np.full(4, k, np.float32) for k in range(11) for part in ("a", "b")}
    with safetensors(tmp_path, arrays) as source:
        write_msgpack(tmp_path, source, 100)
    assert len(list(tmp_path.glob("flax_model-000??-of-00004.msgpack"))) == 4
    assert json.loads((tmp_path / INDEX).read_text())["metadata"] == {"total_size": 22 * 16}
    restored = transformers_loads(tmp_path)
    assert all(np.array_equal(restored[name], array) for name, array in arrays.items())
    for path in (tmp_path, tmp_path / INDEX):
        with open_msgpack(path) as checkpoint:
            assert_holds(checkpoint, arrays)
            assert list(checkpoint.tensors)[-1] == "model.layers.10.b"
            assert len(checkpoint.files()) == len(checkpoint.fingerprint()) == 4


def indexed(directory: Path, weight_map: dict[str, str], **files: Any) -> Path:
    for name, tree in files.items():
        saved(directory, tree, f"{name}.msgpack")
    (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return directory


ONE, TWO = np.ones(1, np.float32), np.ones(2, np.float32)


def test_the_index_decides_what_is_read_and_the_single_file_beside_it_is_left(tmp_path: Path) -> None:
    indexed(tmp_path, {"b": "y.msgpack"}, y={"b": TWO})
    saved(tmp_path, {"stray": ONE}, SINGLE)
    with open_msgpack(tmp_path) as checkpoint:
        assert list(checkpoint.tensors) == ["b"]
        assert f"{SINGLE} is not read, as {INDEX} beside it" in remarks("mine", tmp_path, checkpoint)[0]


@pytest.mark.parametrize(
    ("weight_map", "words"),
    [
        ({"a/w": "x.msgpack", "b": "z.msgpack"}, ("names 'z.msgpack', which is not there",)),
        ({"a/w": "x.msgpack", "c": "y.msgpack"}, ("'b' in 'no file'", "it is in 'y.msgpack'")),
        ({"a/w": "y.msgpack", "b": "y.msgpack"}, ("'a/w' in 'y.msgpack'", "in 'no file'")),
        ({"a/w": "../x.msgpack"}, ("outside the model",)),
        ({}, ("no weight_map",)),
    ],
)
def test_indexes_that_do_not_agree(tmp_path: Path, weight_map: dict[str, str], words: tuple[str, ...]) -> None:
    refused(indexed(tmp_path, weight_map, x={"a": {"w": ONE}}, y={"b": TWO}), *words)


def test_where_weights_are_looked_for(tmp_path: Path) -> None:
    refused(tmp_path, "holds no flax_model.msgpack")
    refused(tmp_path / "absent", "does not exist")
    saved(tmp_path, {"w": ONE}, "params.msgpack")
    saved(tmp_path, {"w": ONE}, "checkpoint_1")
    assert open_msgpack(tmp_path).files() == (tmp_path / "params.msgpack",)
    saved(tmp_path, {"w": ONE}, "more.msgpack")
    refused(tmp_path, "2 .msgpack files", "give one file's path")
    saved(tmp_path, {"w": ONE})
    assert open_msgpack(tmp_path).files() == (tmp_path / SINGLE,)


def test_one_name_twice(tmp_path: Path) -> None:
    refused(saved(tmp_path, {"a": {"b.c": ONE}, "a.b": {"c": ONE}}), "second tensor of the name 'a.b.c'")


# --- Damage ----------------------------------------------------------------------------------------------


def array(shape: Any, dtype: Any, raw: Any, code: int = 1, extra: bytes = b"") -> bytes:
    inner = msgpack.packb((shape, dtype, raw), use_bin_type=True) + extra
    return msgpack.packb({"w": msgpack.ExtType(code, inner)})


def chunked(shape: Any, chunks: Any, **more: Any) -> bytes:
    return serialization.msgpack_serialize(
        {"w": {msgpack_tree.CHUNKED: True, "shape": shape, "chunks": chunks, **more}}
    )


DAMAGED = [
    (b"", "is empty"),
    (b"\x07", "does not begin with a map"),
    (b"\x80\x80", "1 bytes after its end"),
    (b"\x81\xa1w\xc1", "0xc1, which means nothing"),
    (b"\x81\x01\xc0", "a key that is no text"),
    (b"\x81\xa1\xff\xc0", "not UTF-8"),
    (b"\x82\xa1w\xc0\xa1w\xc0", "names 'w' twice"),
    (b"\xdf\xff\xff\xff\xff\xa1w\xc0", "is cut short"),
    (b"\x81\xdb\xff\xff\xff\xff", "a name of over"),
    (b"\x81\xa1w" * 200 + b"\xc0", "more than 100 maps inside each other"),
    (b"\x81\xa1w" + b"\x91" * 200 + b"\xc0", "more than 100 maps inside each other"),
    (b"\x81" + msgpack.packb("n" * 1025) + b"\xc0", "a name of over 1,024"),
    (msgpack.packb({"w": msgpack.ExtType(7, b"x")}), "extension type 7"),
    (msgpack.packb({"w": msgpack.Timestamp(1)}), "extension type 255"),
    (msgpack.packb({"w": msgpack.ExtType(1, b"x")}), "not described as Flax"),
    (array((2,), "float32", b"\0" * 7), "has 7 bytes where float32 of shape [2] needs 8"),
    (array((2,), "float32", "\0" * 8), "has 8 bytes where"),
    (array((2,), "object", b"\0" * 16), "Python objects"),
    (array((1,), "complex128", b"\0" * 16), "unknown dtype 'complex128'"),
    (array((1,), ">f4", b"\0" * 4), "unknown dtype '>f4'"),
    (array((1,), "f" * 5000, b"\0" * 4), "not described as Flax"),
    (array((1,), 4, b"\0" * 4), "not described as Flax"),
    (array((-1,), "float32", b""), "an impossible shape"),
    (array((1.0,), "float32", b"\0" * 4), "an impossible shape"),
    (array((True,), "float32", b"\0" * 4), "an impossible shape"),
    (array((2**63, 0), "float32", b""), "an impossible shape"),
    (array((2**62, 2**62, 0), "float32", b""), "the impossible shape"),
    (array((1,) * 65, "float32", b"\0" * 4), "not described as Flax"),
    (array({}, "float32", b"\0" * 4), "not described as Flax"),
    (array((1,), "float32", b"\0" * 4, extra=b"\xc0"), "does not end where it says"),
    (array((1,), "float32", b"\0" * 4, code=3), "a scalar with the shape [1]"),
    (chunked({"0": 4}, {"0": ONE, "1": TWO}), "chunks that do not make F32 of shape [4]"),
    (chunked({"0": 2}, {"0": ONE, "1": ONE.astype(np.int32)}), "chunks that do not make"),
    (chunked({"0": -1, "1": -1}, {"0": ONE}), "not chunked as Flax"),
    (chunked({"0": 2}, {"0": ONE, "2": ONE}), "not chunked as Flax"),
    (chunked({"0": 1}, {"0": ONE.reshape(1, 1)}), "not chunked as Flax"),
    (chunked({"0": 0}, {}), "not chunked as Flax"),
    (chunked({"0": "1"}, {"0": ONE}), "not chunked as Flax"),
    (chunked(1, {"0": ONE}), "not chunked as Flax"),
    (chunked({"0": 1}, {"0": ONE}, more=ONE), "not chunked as Flax"),
    (
        serialization.msgpack_serialize({msgpack_tree.CHUNKED: True, "shape": {}, "chunks": {"0": ONE}}),
        "without a name",
    ),
    (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
]


@pytest.mark.parametrize(("content", "words"), DAMAGED, ids=[words for _, words in DAMAGED])
def test_damaged_files(tmp_path: Path, content: bytes, words: str) -> None:
    refused(saved(tmp_path, content), words)


def test_entries_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(msgpack_tree, "_MAX_ENTRIES", 1000)
    refused(saved(tmp_path, {"w": [None] * 1000}), "over 1,000 entries, more than any model")


def test_something_else_than_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.msgpack")
    refused(tmp_path / "pipe.msgpack", "not a regular file")


def sample() -> bytes:
    tree = {
        "a": {"w": np.ones((2, 3), np.float32), "s": np.float16(1)},
        "c": {msgpack_tree.CHUNKED: True, "shape": {"0": 2}, "chunks": {"0": ONE, "1": ONE}},
        "step": 300,
        "rate": 0.5,
        "z": 1j,
        "list": ["text", None],
    }
    return serialization.msgpack_serialize(tree)


def test_cut_at_every_byte(tmp_path: Path) -> None:
    content = sample()
    for length in range(len(content)):
        refused(saved(tmp_path, content[:length]))


def opens_or_explains(path: Path) -> None:
    try:
        checkpoint = open_msgpack(path)
    except M3Error:
        return
    with checkpoint:
        for name in checkpoint.tensors:
            read(checkpoint, name)
        checkpoint.fingerprint()


def test_flipped_bits(tmp_path: Path) -> None:
    content = sample()
    for at in range(len(content)):
        for bit in (1, 4, 16, 128):
            opens_or_explains(saved(tmp_path, content[:at] + bytes([content[at] ^ bit]) + content[at + 1 :]))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200), st.integers(0, 400), st.integers(0, 20))
def test_any_bytes(tmp_path: Path, junk: bytes, at: int, removed: int) -> None:
    content = sample()
    opens_or_explains(saved(tmp_path, junk))
    opens_or_explains(saved(tmp_path, content[:at] + junk + content[at + removed :]))


# --- Writing ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("a", "a.b"), "'a' is a tensor and also a part of 'a.b'"),
        (("a.b.c", "a.b"), "'a.b' is a tensor and also a part of"),
        (("a.b.c", "a.b", "z"), "'a.b' is a tensor and also a part of"),
        ((f"a.{msgpack_tree.CHUNKED}",), "by which Flax marks something else"),
        ((".".join("a" * 101),), "too long"),
        (("a" * 1025,), "too long"),
        (("a/b.c", "a.b.c"), "which are one in an index"),
    ],
)
def test_names_that_make_no_tree(tmp_path: Path, names: tuple[str, ...], words: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with safetensors(tmp_path, dict.fromkeys(names, ONE)) as source, pytest.raises(M3Error, match=re.escape(words)):
        write_msgpack(out, source, 1)
    assert not list(out.iterdir())


def test_odd_names_come_back(tmp_path: Path) -> None:
    names = ["", "a..b", ".", "a/b.c", "λ.½", "x" * 1024, ".".join("y" * 100)]
    arrays = {name: np.full(2, k, np.int16) for k, name in enumerate(names)}
    del arrays[""]  # the first key of "." is empty too
    for size in (10**9, 1):
        with safetensors(tmp_path, arrays) as source:
            out = tmp_path / str(size)
            out.mkdir()
            write_msgpack(out, source, size)
        with open_msgpack(out) as checkpoint:
            assert_holds(checkpoint, arrays)


def test_memory_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "_PIECE", 2**16)
    arrays = {"w": np.zeros(2**23, np.uint8)}
    with safetensors(tmp_path, arrays) as source:
        tracemalloc.start()
        try:
            write_msgpack(tmp_path, source, 10**9)
            write_safetensors(tmp_path, source, 10**9)
            assert tracemalloc.get_traced_memory()[1] < 2**20
        finally:
            tracemalloc.stop()


def test_a_disk_that_fails_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / SINGLE).mkdir()
    with safetensors(tmp_path, {"w": ONE}) as source, pytest.raises(M3Error, match=r"cannot be written: .*check"):
        write_msgpack(tmp_path, source, 10**9)
    assert not list(tmp_path.glob("*.tmp"))


def test_a_source_that_fails_leaves_nothing(tmp_path: Path) -> None:
    source = safetensors(tmp_path, {"w": ONE})
    source.close()
    for write in (write_msgpack, write_safetensors):
        with pytest.raises(ValueError, match="closed"):
            write(tmp_path, source, 10**9)
    assert [path.name for path in tmp_path.iterdir()] == ["source.safetensors"]


def test_safetensors_has_a_name_of_its_own(tmp_path: Path) -> None:
    source = open_msgpack(saved(tmp_path, {"__metadata__": ONE}))
    with source, pytest.raises(M3Error, match="'__metadata__'"):
        write_safetensors(tmp_path, source, 10**9)
    assert [path.name for path in tmp_path.iterdir()] == [SINGLE]


def test_safetensors_from_any_checkpoint(tmp_path: Path) -> None:
    arrays = arrays_of_every_dtype()
    saved(tmp_path, unflatten_dict(arrays, sep=".") | {"step": 3})
    for size in (10**9, 200):
        out = tmp_path / str(size)
        out.mkdir()
        with open_msgpack(tmp_path) as source:
            write_safetensors(out, source, size)
        with open_safetensors(out) as checkpoint:
            assert_holds(checkpoint, arrays)
            assert checkpoint.metadata == {"format": "pt", "step": "3"}
            assert (len(checkpoint.files()) > 1) == (size == 200)
