import errno
import json
import os
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import safetensors
from huggingface_hub import split_state_dict_into_shards_factory
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.checkpoint_suite import SHAPES, arrays_of_every_dtype, info_of, read
from support.checkpoint_suite import write_file as write

from m3jax.checkpoints import (
    DTYPES,
    ShardWriter,
    TensorInfo,
    open_safetensors,
    parse_size,
    plan_shards,
    write_index,
)
from m3jax.checkpoints.trust import remarks
from m3jax.errors import M3Error


def small(*names: str) -> dict[str, np.ndarray]:
    return {name: np.full(4, k, np.float32) for k, name in enumerate(names, start=1)}


def raw_file(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(begin: int, end: int, shape: object, dtype: object = "U8") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def sharded(directory: Path, *shards: tuple[str, dict[str, np.ndarray]], **weight_map: str) -> Path:
    for file, arrays in shards:
        (directory / file).parent.mkdir(exist_ok=True)
        write(directory / file, arrays)
    listed = {name: file for file, arrays in shards for name in arrays} | weight_map
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))
    return directory


def refused(path: Path, *words: str) -> M3Error:
    """Opening fails with one sentence that has these words."""
    with pytest.raises(M3Error) as caught:
        open_safetensors(path)
    sentence = str(caught.value)
    assert all(word in sentence for word in words), sentence
    assert sentence.endswith(".")
    assert "\n" not in sentence
    return caught.value


# --- The same bytes as the reference implementation ------------------------------------------------------


def test_reads_what_the_library_writes(tmp_path) -> None:
    arrays = arrays_of_every_dtype()
    specs = {
        name: safetensors.TensorSpec(
            dtype=array.dtype.name, shape=list(array.shape), data_ptr=array.ctypes.data, data_len=array.nbytes
        )
        for name, array in arrays.items()
    }
    safetensors.serialize_file(specs, tmp_path / "model.safetensors", metadata={"format": "pt", "λ": "½"})
    with open_safetensors(tmp_path) as checkpoint:
        assert checkpoint.metadata == {"format": "pt", "λ": "½"}
        assert checkpoint.tensors.keys() == arrays.keys()
        for name, array in arrays.items():
            assert checkpoint.tensors[name] == info_of(name, array)
            assert read(checkpoint, name).tobytes() == array.tobytes()


def test_the_library_reads_what_we_write(tmp_path) -> None:
    arrays = arrays_of_every_dtype() | {'λ "quoted"\n': np.float32(1)}
    arrays = {name: np.asarray(array) for name, array in arrays.items()}
    path = tmp_path / "model.safetensors"
    write(path, arrays, metadata={"format": "pt", "note": "α"})
    loaded = dict(safetensors.deserialize(path.read_bytes()))
    assert loaded.keys() == arrays.keys()
    for name, array in arrays.items():
        assert (loaded[name]["dtype"], tuple(loaded[name]["shape"])) == (info_of(name, array).dtype, array.shape)
        assert bytes(loaded[name]["data"]) == array.tobytes()
    with safetensors.safe_open(path, "np") as file:
        assert file.metadata() == {"format": "pt", "note": "α"}
        assert np.array_equal(file.get_tensor("F32.x3x7"), arrays["F32.x3x7"], equal_nan=True)


def test_every_tensor_is_aligned(tmp_path) -> None:
    arrays = {"a": np.ones(3, np.uint8), "b": np.ones(1, np.float64), "c": np.ones(5, np.float16)}
    write(tmp_path / "model.safetensors", arrays)
    content = (tmp_path / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header.pop("__metadata__")
    assert length % 8 == 0
    assert list(header) == ["b", "c", "a"]
    for name, described in header.items():
        assert (8 + length + described["data_offsets"][0]) % arrays[name].itemsize == 0


def test_no_tensors_at_all(tmp_path) -> None:
    write(tmp_path / "model.safetensors", {})
    with open_safetensors(tmp_path) as checkpoint:
        assert not checkpoint.tensors
    assert safetensors.deserialize((tmp_path / "model.safetensors").read_bytes()) == []


# --- Where the weights are -------------------------------------------------------------------------------


def test_file_index_and_directory_are_one_checkpoint(tmp_path) -> None:
    shards = [("a-1.safetensors", small("layers.10.w", "layers.2.w")), ("sub/b.safetensors", small("layers.9.w"))]
    sharded(tmp_path, *shards)
    for path in (tmp_path, tmp_path / "model.safetensors.index.json", str(tmp_path)):
        with open_safetensors(path) as checkpoint:
            assert checkpoint.location == str(path)
            assert list(checkpoint.tensors) == ["layers.2.w", "layers.9.w", "layers.10.w"]
            assert checkpoint.files() == (tmp_path / "a-1.safetensors", tmp_path / "sub/b.safetensors")
            assert read(checkpoint, "layers.2.w").tolist() == [2] * 4
            assert read(checkpoint, "layers.9.w").tolist() == [1] * 4
    with open_safetensors(tmp_path / "a-1.safetensors") as checkpoint:
        assert list(checkpoint.tensors) == ["layers.2.w", "layers.10.w"]


def test_files_that_the_index_does_not_list_are_not_read(tmp_path) -> None:
    sharded(tmp_path, ("a.safetensors", small("w")))
    (tmp_path / "consolidated.safetensors").write_bytes(b"junk")
    with open_safetensors(tmp_path) as checkpoint:
        assert checkpoint.files() == (tmp_path / "a.safetensors",)


def test_the_index_decides_what_is_read_and_the_single_file_beside_it_is_left(tmp_path) -> None:
    sharded(tmp_path, ("a.safetensors", small("w")))
    write(tmp_path / "model.safetensors", small("v"))
    with open_safetensors(tmp_path) as checkpoint:
        assert list(checkpoint.tensors) == ["w"]
        (note,) = remarks("mine", tmp_path, checkpoint)
    assert note.startswith("mine: model.safetensors is not read, as model.safetensors.index.json beside it says where")
    (tmp_path / "model.safetensors").unlink()
    with open_safetensors(tmp_path) as checkpoint:
        assert remarks("mine", tmp_path, checkpoint) == ()
    (tmp_path / "a.safetensors").rename(tmp_path / "model.safetensors")
    sharded(tmp_path, w="model.safetensors")
    with open_safetensors(tmp_path) as checkpoint:  # the index names it, so it is no stray
        assert remarks("mine", tmp_path, checkpoint) == ()


def test_the_single_file_is_taken_before_others_where_there_is_no_index(tmp_path) -> None:
    write(tmp_path / "a.safetensors", small("w"))
    write(tmp_path / "model.safetensors", small("v"))
    with open_safetensors(tmp_path) as checkpoint:
        assert list(checkpoint.tensors) == ["v"]
        assert remarks("mine", tmp_path, checkpoint) == ()


def test_files_without_an_index(tmp_path) -> None:
    write(tmp_path / "x.safetensors", small("a"), metadata={"format": "pt", "only": "x"})
    write(tmp_path / "y.safetensors", small("b"), metadata={"format": "np"})
    (tmp_path / "._y.safetensors").write_bytes(b"side file")
    with open_safetensors(tmp_path) as checkpoint:
        assert list(checkpoint.tensors) == ["a", "b"]
        assert checkpoint.metadata == {"format": "pt", "only": "x"}
    write(tmp_path / "z.safetensors", small("a"))
    refused(tmp_path, "'a' both in 'x.safetensors' and in 'z.safetensors'", "one file's path")


def test_links_as_in_the_hub_cache(tmp_path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    write(tmp_path / "blobs" / "abc", small("w"))
    (tmp_path / "snapshot" / "model.safetensors").symlink_to("../blobs/abc")
    with open_safetensors(tmp_path / "snapshot") as checkpoint:
        assert read(checkpoint, "w").tolist() == [1] * 4


def test_numbered_files_without_an_index_must_be_complete(tmp_path) -> None:
    write(tmp_path / "model-00001-of-00003.safetensors", small("a"))
    write(tmp_path / "model-00003-of-00003.safetensors", small("c"))
    refused(tmp_path, "lacks model-00002-of-00003.safetensors, one of 3 files", "download")
    write(tmp_path / "model-00002-of-00003.safetensors", small("b"))
    with open_safetensors(tmp_path) as checkpoint:
        assert list(checkpoint.tensors) == ["a", "b", "c"]


@pytest.mark.parametrize("name", ["absent", "absent/model.safetensors", "absent.index.json", "nul\0", "x" * 300])
def test_absent(tmp_path, name) -> None:
    refused(tmp_path / name, "check the path")


def test_no_weights(tmp_path) -> None:
    (tmp_path / "config.json").write_text("{}")
    refused(tmp_path, "holds no .safetensors files", "give the directory")


def test_things_that_are_no_files(tmp_path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    refused(tmp_path / "pipe.safetensors", "not a regular file")
    (tmp_path / "x.index.json").mkdir()
    refused(tmp_path / "x.index.json", "not a regular file")


# --- Indexes that do not agree ---------------------------------------------------------------------------


def test_index_is_not_json(tmp_path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {')
    refused(tmp_path, "index.json is not valid JSON")


@pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": None}])
def test_index_without_a_map(tmp_path, index) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(tmp_path, "index.json has no weight_map")


def test_index_names_a_tensor_twice(tmp_path) -> None:
    text = '{"weight_map": {"w": "a.safetensors", "w": "b.safetensors"}}'
    (tmp_path / "model.safetensors.index.json").write_text(text)
    refused(tmp_path, "names 'w' twice")


@pytest.mark.parametrize(
    "file", ["../x.safetensors", "a/../../x.safetensors", "/etc/passwd", "..", "", ".", "a\0", 3, None, [[[1]]]]
)
def test_index_leads_out_of_the_directory(tmp_path, file) -> None:
    model = tmp_path / "model"
    model.mkdir()
    write(tmp_path / "x.safetensors", small("w"))
    refused(sharded(model, w=file), "places 'w' in", "outside the model")


def test_index_names_an_absent_file(tmp_path) -> None:
    sharded(tmp_path, ("a.safetensors", small("w")), v="b.safetensors")
    refused(tmp_path, "names 'b.safetensors', which is not there", "download the model again.")
    write(tmp_path / "model.safetensors", small("w", "v"))
    refused(tmp_path, "download the model again, or remove the index if model.safetensors has all weights")


def test_index_names_a_tensor_that_no_file_holds(tmp_path) -> None:
    sharded(tmp_path, ("a.safetensors", small("w")), v="a.safetensors")
    refused(tmp_path, "places tensor 'v' in 'a.safetensors', but none of its files holds it")


def test_index_names_a_tensor_that_another_file_holds(tmp_path) -> None:
    shards = ("a.safetensors", small("w", "u")), ("b.safetensors", small("v"))
    refused(sharded(tmp_path, *shards, w="b.safetensors"), "'w' in 'b.safetensors', but 'a.safetensors' holds it")


def test_a_tensor_that_two_files_hold(tmp_path) -> None:
    sharded(tmp_path, ("a.safetensors", small("w")), ("b.safetensors", small("v", "w")), w="a.safetensors")
    refused(tmp_path, "places tensor 'w' in 'a.safetensors', but 'b.safetensors' holds it too", "download")


def test_index_leaves_out_a_tensor(tmp_path) -> None:
    sharded(tmp_path, ("a.safetensors", small("w", "v")))
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"w": "a.safetensors"}}')
    refused(tmp_path, "does not place tensor 'v' in 'a.safetensors', which holds it")


# --- Files that are damaged or made to mislead -----------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"\x02\0\0", b"\xff" * 8, b"\x03\0\0\0\0\0\0\0{}", b"PK\x03\x04" * 9])
def test_no_room_for_the_header(tmp_path, content) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    refused(tmp_path, "cut short or no safetensors file", f"has {len(content)}")


def test_header_over_the_limit(tmp_path) -> None:
    path = raw_file(tmp_path / "model.safetensors", {}, length=100_000_001)
    os.truncate(path, 200_000_000)  # sparse: it takes no disk
    refused(path, "header of 100,000,001 bytes", "100,000,000")


def test_git_lfs_pointer(tmp_path) -> None:
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
    refused(tmp_path, "Git LFS pointer", "git lfs pull")


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (b"{", "not valid JSON"),
        (b"\xff{}", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"a":' + b"9" * 5000 + b"}", "not valid JSON"),
        (b'{"\\ud800":{"dtype":"U8","shape":[],"data_offsets":[0,1]}}', "not valid JSON"),
        (b'{"__metadata__":NaN}', "not valid JSON"),
        (b"[]", "not a JSON object"),
        (b'{"a":{},"a":{}}', "names 'a' twice"),
        (b'{"a":{"dtype":"U8","dtype":"I8"}}', "names 'dtype' twice"),
        ({"__metadata__": {"a": 1}}, "__metadata__"),
        ({"__metadata__": []}, "__metadata__"),
        ({"a": 3}, "no JSON object"),
        ({"a": {}}, "unknown dtype None"),
        ({"a": entry(0, 1, [1], "U7")}, "unknown dtype 'U7'"),
        ({"a": entry(0, 1, [1], ["U8"])}, "unknown dtype ['U8']"),
        ({"a": entry(0, 1, [2], "F4")}, "dequantize"),
        ({"a": entry(0, 1, None)}, "impossible shape None"),
        ({"a": entry(0, 1, [-1])}, "impossible shape [-1]"),
        ({"a": entry(0, 1, [1.0])}, "impossible shape [1.0]"),
        ({"a": entry(0, 1, [True])}, "impossible shape [True]"),
        ({"a": entry(0, 1, ["1"])}, "impossible shape ['1']"),
        ({"a": entry(0, 0, [2**62, 2**62, 0])}, "impossible shape"),
        ({"a": entry(0, 1, [2**64])}, "impossible shape"),
        ({"a": entry(0, 1, [1] * 65)}, "impossible shape"),
        (b'{"a":{"dtype":"U8","shape":' + b"[" * 60 + b"]" * 60 + b"}}", "impossible shape [["),
        ({"a": {"dtype": "U8", "shape": [1]}}, "impossible offsets None"),
        ({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0]}}, "impossible offsets [0]"),
        ({"a": entry(1, 0, [1])}, "impossible offsets [1, 0]"),
        ({"a": entry(-1, 0, [1])}, "impossible offsets [-1, 0]"),
        ({"a": entry(0, 10**299, [1])}, "impossible offsets"),
        ({"a": entry(0, 10**300, [1])}, "a number of 301 digits"),
        ({"a": entry(0, 8, [3], "F32")}, "has 8 bytes where F32 of shape [3] needs 12"),
        ({"a": entry(0, 4, [4]), "b": entry(2, 8, [6])}, "'b' in"),
        ({"a": entry(0, 4, [4]), "b": entry(2, 8, [6])}, "overlaps"),
        ({"a": entry(0, 8, [8]), "b": entry(4, 4, [0])}, "overlaps"),
        ({"a": entry(0, 2, [2]), "b": entry(4, 8, [4])}, "follows a hole"),
        ({"a": entry(2, 8, [6])}, "follows a hole"),
        ({"a": entry(0, 9, [9])}, "cut short: its tensors need 9 bytes and 8 are there"),
        ({"a": entry(0, 7, [7])}, "has 1 bytes after its last tensor"),
        ({}, "has 8 bytes after its last tensor"),
    ],
)
def test_bad_headers(tmp_path, header, words) -> None:
    path = raw_file(tmp_path / "model.safetensors", header, bytes(8))
    refused(path, words, str(path))


def test_order_in_the_header_is_free(tmp_path) -> None:
    header = {"b": entry(2, 3, []), "c": entry(0, 0, [0]), "a": entry(0, 2, [2])}
    with open_safetensors(raw_file(tmp_path / "m.safetensors", header, b"xyz")) as checkpoint:
        assert [read(checkpoint, name).tobytes() for name in "abc"] == [b"xy", b"z", b""]


VALID = json.dumps({"__metadata__": {"k": "v"}, "a": entry(0, 4, [2, 2]), "b": entry(4, 8, [1], "F32")}).encode()
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["U8", "F4"]),
    lambda values: st.lists(values, max_size=4) | st.dictionaries(st.text(max_size=5), values, max_size=3),
    max_leaves=6,
)
TENSORS = st.fixed_dictionaries(
    {"dtype": st.sampled_from([*DTYPES, "F4"]) | JSON_VALUES},
    optional={
        "shape": st.lists(st.integers(-1, 9) | st.integers(), max_size=3) | JSON_VALUES,
        "data_offsets": st.lists(st.integers(-1, 9) | st.integers(), min_size=2, max_size=2) | JSON_VALUES,
    },
)


@st.composite
def mutated(draw) -> bytes:
    text = bytearray(VALID)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(text)))
        end = min(len(text), start + draw(st.integers(0, 3)))
        text[start:end] = draw(st.binary(max_size=3) | st.sampled_from([b"0", b"9", b"]", b"}", b",", b'"', b"-"]))
    return bytes(text)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    header=mutated() | st.dictionaries(st.text(max_size=3), TENSORS | JSON_VALUES, max_size=3),
    data=st.binary(min_size=8, max_size=8) | st.binary(max_size=12),
    length=st.none() | st.none() | st.integers(0, 2**64 - 1),
)
def test_a_header_parses_or_is_refused(tmp_path, header, data, length) -> None:
    path = raw_file(tmp_path / "fuzzed.safetensors", header, data, length)
    try:
        checkpoint = open_safetensors(path)
    except M3Error:
        return
    with checkpoint:
        for name in checkpoint.tensors:
            assert read(checkpoint, name).nbytes == checkpoint.tensors[name].nbytes
    content = path.read_bytes()
    # What we take, the reference implementation takes: all but -0, which it reads as a float.
    assert b"-0" in content or {name for name, _ in safetensors.deserialize(content)} == set(checkpoint.tensors)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.dictionaries(st.text(max_size=6), st.tuples(st.sampled_from([*DTYPES]), st.sampled_from(SHAPES))))
def test_any_names_survive(tmp_path, described) -> None:
    described.pop("__metadata__", None)
    path = tmp_path / "any.safetensors"
    write(path, {name: np.zeros(shape, DTYPES[dtype]) for name, (dtype, shape) in described.items()})
    with open_safetensors(path) as checkpoint:
        assert {name: (info.dtype, info.shape) for name, info in checkpoint.tensors.items()} == described


# --- Reading ---------------------------------------------------------------------------------------------


def test_short_reads_are_continued(tmp_path, monkeypatch) -> None:
    write(tmp_path / "model.safetensors", small("w"))
    whole = os.preadv
    with open_safetensors(tmp_path) as checkpoint:
        monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: whole(fd, [buffers[0][:3]], offset))
        assert read(checkpoint, "w").tolist() == [1] * 4


def test_a_file_cut_while_it_is_open(tmp_path) -> None:
    path = tmp_path / "model.safetensors"
    write(path, small("w"))
    with open_safetensors(path) as checkpoint:
        read(checkpoint, "w")
        os.truncate(path, path.stat().st_size - 6)
        with pytest.raises(M3Error, match=r"model.safetensors ends inside tensor 'w', 6 bytes early"):
            read(checkpoint, "w")


def test_a_file_replaced_before_its_first_read(tmp_path) -> None:
    path = tmp_path / "model.safetensors"
    write(path, small("w"))
    with open_safetensors(path) as checkpoint:
        write(path, small("w"))
        with pytest.raises(M3Error, match="has changed since"):
            read(checkpoint, "w")


def test_a_failing_disk(tmp_path, monkeypatch) -> None:
    def fail(*args):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    write(tmp_path / "model.safetensors", small("w"))
    with open_safetensors(tmp_path) as checkpoint:
        monkeypatch.setattr(os, "preadv", fail)
        with pytest.raises(M3Error, match=r"tensor 'w' in .* cannot be read: Input/output error"):
            read(checkpoint, "w")
        refused(tmp_path, "cannot be read: Input/output error")


def test_too_many_open_files(tmp_path, monkeypatch) -> None:
    def fail(*args):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    write(tmp_path / "model.safetensors", small("w"))
    monkeypatch.setattr(os, "open", fail)
    refused(tmp_path, "ulimit -n")


def test_descriptors_are_opened_late_kept_and_closed(tmp_path) -> None:
    def count() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = count()
    with open_safetensors(sharded(tmp_path, *((f"{k}.safetensors", small(f"w{k}")) for k in range(5)))) as checkpoint:
        assert count() == before
        for _ in range(3):
            read(checkpoint, "w1")
            read(checkpoint, "w3")
        assert count() == before + 2
    assert count() == before


def test_a_fingerprint_notices_a_change(tmp_path) -> None:
    path = tmp_path / "model.safetensors"
    write(path, small("w"))
    checkpoint = open_safetensors(tmp_path)
    before = checkpoint.fingerprint()
    assert before.keys() == {"model.safetensors"}
    assert before == open_safetensors(path).fingerprint()
    os.utime(path, ns=(0, 0))
    touched = checkpoint.fingerprint()["model.safetensors"]
    assert touched == before["model.safetensors"] | {"mtime_ns": 0, "ctime_ns": touched["ctime_ns"]}
    time.sleep(0.02)  # longer than the file system's clock stands still
    os.utime(path, ns=(0, before["model.safetensors"]["mtime_ns"]))
    assert checkpoint.fingerprint() != before
    write(path, small("v"))
    assert (
        checkpoint.fingerprint()["model.safetensors"]["header_blake3"] != (before["model.safetensors"]["header_blake3"])
    )
    path.unlink()
    with pytest.raises(M3Error, match="does not exist"):
        checkpoint.fingerprint()


# --- Writing ---------------------------------------------------------------------------------------------


def test_pieces_in_any_order_from_many_threads(tmp_path) -> None:
    values = {name: np.random.default_rng(0).standard_normal(1000).astype(np.float32) for name in "ab"}
    pieces = [(name, start) for start in range(960, -1, -40) for name in "ab"]
    with ShardWriter(tmp_path / "m.safetensors", [info_of(*item) for item in values.items()]) as shard:
        with ThreadPoolExecutor(8) as pool:
            writes = [
                pool.submit(shard.write, name, 4 * start, values[name][start : start + 40]) for name, start in pieces
            ]
        assert all(done.exception() is None for done in writes)
        shard.finish()
    with open_safetensors(tmp_path) as checkpoint:
        assert all(np.array_equal(read(checkpoint, name), values[name]) for name in "ab")


def test_short_writes_are_continued(tmp_path, monkeypatch) -> None:
    whole = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: whole(fd, data[:3], offset))
    write(tmp_path / "model.safetensors", small("w"))
    with open_safetensors(tmp_path) as checkpoint:
        assert read(checkpoint, "w").tolist() == [1] * 4


def test_arrays_of_any_layout(tmp_path) -> None:
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    write(tmp_path / "model.safetensors", {"w": values.T})
    with open_safetensors(tmp_path) as checkpoint:
        assert np.array_equal(read(checkpoint, "w"), values.T)


def test_the_file_appears_only_when_finished(tmp_path) -> None:
    path, temporary = tmp_path / "model.safetensors", tmp_path / "model.safetensors.tmp"
    temporary.write_bytes(b"left by an earlier run" * 100)
    with ShardWriter(path, [TensorInfo("w", (4,), "U8")]) as shard:
        size = temporary.stat().st_size
        shard.write("w", 0, b"abcd")
        assert (path.exists(), temporary.stat().st_size) == (False, size)
        shard.finish()
        assert (path.stat().st_size, temporary.exists()) == (size, False)
        shard.abort()
    assert path.exists()
    for use in (shard.finish, lambda: shard.write("w", 0, b"a")):
        with pytest.raises(ValueError, match="finished"):
            use()


def test_the_mode_follows_the_umask(tmp_path) -> None:
    for mask, mode in ((0o022, 0o644), (0o077, 0o600)):
        before = os.umask(mask)
        try:
            write(tmp_path / "model.safetensors", small("w"))
        finally:
            os.umask(before)
        assert stat.S_IMODE((tmp_path / "model.safetensors").stat().st_mode) == mode


def test_leaving_without_finishing_leaves_nothing(tmp_path) -> None:
    with ShardWriter(tmp_path / "m.safetensors", [TensorInfo("w", (4,), "U8")]):
        pass
    with pytest.raises(RuntimeError), ShardWriter(tmp_path / "m.safetensors", [TensorInfo("w", (4,), "U8")]):
        raise RuntimeError
    assert os.listdir(tmp_path) == []


def test_misuse_of_the_writer(tmp_path) -> None:
    info = TensorInfo("w", (4,), "U8")
    with pytest.raises(ValueError, match="one name"):
        ShardWriter(tmp_path / "m.safetensors", [info, info])
    with ShardWriter(tmp_path / "m.safetensors", [info]) as shard:
        for start, data in ((-1, b"a"), (0, b"abcde"), (4, b"a")):
            with pytest.raises(ValueError, match="not all inside"):
                shard.write("w", start, data)
        shard.write("w", 0, b"abc")
        with pytest.raises(ValueError, match=r"'w' of .* lacks 1 bytes"):
            shard.finish()


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "fsync", "replace"])
@pytest.mark.parametrize(("code", "mend"), [(errno.ENOSPC, "free space"), (errno.EIO, "check the place")])
def test_a_disk_that_is_full_or_fails(tmp_path, monkeypatch, call, code, mend) -> None:
    def fail(*args):
        raise OSError(code, os.strerror(code))

    path = tmp_path / "model.safetensors"
    write(path, small("w"))
    size = path.stat().st_size
    path.unlink()
    monkeypatch.setattr(os, call, fail)
    with pytest.raises(M3Error) as caught:
        write(path, small("w"))
    assert str(caught.value).startswith(f"{path} cannot be written, {size:,} bytes: {os.strerror(code)}; {mend}")
    assert caught.value.__cause__.errno == code
    assert os.listdir(tmp_path) == []


def test_a_full_disk_shows_before_any_work(tmp_path) -> None:
    huge = TensorInfo("w", (2**60,), "U8")
    with pytest.raises(M3Error, match=r"cannot be written, 1,152,921,504,606,8\d\d,\d\d\d bytes"):
        ShardWriter(tmp_path / "m.safetensors", [huge])
    assert os.listdir(tmp_path) == []


def test_a_place_that_is_not_there(tmp_path) -> None:
    with pytest.raises(M3Error, match="No such file or directory"):
        ShardWriter(tmp_path / "absent" / "m.safetensors", [])


def test_file_systems_that_cannot_reserve(tmp_path, monkeypatch) -> None:
    def unsupported(*args):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    write(tmp_path / "a.safetensors", small("a"))
    monkeypatch.delattr(os, "posix_fallocate")
    write(tmp_path / "b.safetensors", small("b"))
    with open_safetensors(tmp_path) as checkpoint:
        assert len(checkpoint.tensors) == 2


# --- Shards, index, sizes --------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 9), max_size=12), st.integers(9, 20))
def test_shards_are_those_of_hugging_face(sizes, limit) -> None:
    tensors = {f"t{k}": TensorInfo(f"t{k}", (size,), "U8") for k, size in enumerate(sizes)}
    theirs = split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda info: info.nbytes,
        get_storage_id=lambda info: None,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=limit,
    ).filename_to_tensors
    ours = {name: [info.name for info in infos] for name, infos in plan_shards([*tensors.values()], limit)}
    assert ours == (theirs or {"model.safetensors": []})


def test_a_tensor_over_the_limit_has_a_file_of_its_own() -> None:
    tensors = [TensorInfo(name, (size,), "U8") for name, size in (("a", 1), ("b", 9), ("c", 1), ("d", 1))]
    assert [[info.name for info in shard] for _, shard in plan_shards(tensors, 4)] == [["a"], ["b"], ["c", "d"]]
    with pytest.raises(M3Error, match="not positive"):
        plan_shards(tensors, 0)


def test_planned_shards_and_their_index_make_a_checkpoint(tmp_path) -> None:
    arrays = small("layers.10", "layers.2", "layers.1")
    shards = plan_shards([info_of(*item) for item in arrays.items()], max_shard_size=32)
    for file, infos in shards:
        write(tmp_path / file, {info.name: arrays[info.name] for info in infos})
    write_index(tmp_path, shards, total_size=48)
    text = (tmp_path / "model.safetensors.index.json").read_text()
    assert json.loads(text)["metadata"] == {"total_size": 48}
    assert text == json.dumps(json.loads(text), indent=2, sort_keys=True) + "\n"
    with open_safetensors(tmp_path) as checkpoint:
        assert all(np.array_equal(read(checkpoint, name), array) for name, array in arrays.items())
        assert len(checkpoint.files()) == 2


def test_an_index_is_written_whole_or_not_at_all(tmp_path, monkeypatch) -> None:
    def fail(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write_index(tmp_path, [("a", [TensorInfo("w", (), "U8")])], 1)
    before = (tmp_path / "model.safetensors.index.json").read_text()
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(M3Error, match="No space left"):
        write_index(tmp_path, [("b", [TensorInfo("w", (), "U8")])], 1)
    assert (tmp_path / "model.safetensors.index.json").read_text() == before
    assert len(os.listdir(tmp_path)) == 1


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5 * 10**9),
        ("5GiB", 5 * 2**30),
        ("500MB", 5 * 10**8),
        ("500 mb", 5 * 10**8),
        ("1.5KB", 1500),
        ("0.1TB", 10**11),
        ("2PiB", 2**51),
        (" 7B ", 7),
        ("123456789", 123456789),
        (42, 42),
    ],
)
def test_sizes(text, size) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "5 G", "5XB", "-5GB", "0", "0.5", "1e9", "5GB5", "٣GB", "nan", True, 0])
def test_no_sizes(text) -> None:
    with pytest.raises(M3Error, match="is no size"):
        parse_size(text)
