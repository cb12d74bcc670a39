"""PyTorch's files: what torch writes is read as torch reads it, nothing is run, and what is at fault is said."""

import io
import json
import os
import pickle
import struct
import tarfile
import tracemalloc
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support import torch_files as files
from support.checkpoint_suite import arrays_of_every_dtype, assert_holds, read

from m3jax.anatomy.stored import inspect_anatomy
from m3jax.checkpoints import open_checkpoint, open_pytorch, open_safetensors, pytorch_archive, pytorch_pickle, strided
from m3jax.checkpoints.inspection import compare, look_at
from m3jax.checkpoints.trust import remarks
from m3jax.errors import M3Error
from m3jax.outputs.conversion import convert

SINGLE = "pytorch_model.bin"
INDEX = "pytorch_model.bin.index.json"
ONE = np.arange(1, 4, dtype=np.float32)
RAW = ONE.tobytes()
FLOATS = files.storage("0", "torch.FloatStorage", 3)
W = files.tensor(FLOATS, 0, [3], [1])


def refused(path: Path, *words: str) -> None:
    with pytest.raises(M3Error) as caught, open_pytorch(path):
        pass
    said = str(caught.value)
    assert "\n" not in said
    assert said.endswith(".")
    assert str(path) in said
    for each in words:
        assert each in said, said


# --- What is read ----------------------------------------------------------------------------------------


def test_a_model_is_opened_looked_at_compared_and_converted(tmp_path: Path) -> None:
    arrays = arrays_of_every_dtype()
    model = tmp_path / "model"
    model.mkdir()
    files.write_arrays(model / SINGLE, arrays, strided=True)
    (model / "config.json").write_text('{"model_type": "llama"}')
    for trainers in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (model / trainers).write_bytes(b"junk")
    assert look_at(str(model)).format == "pytorch"
    assert len(inspect_anatomy(str(model))[1]) == len(arrays)
    convert(model, tmp_path / "out")
    with open_safetensors(tmp_path / "out") as checkpoint:
        assert_holds(checkpoint, arrays)
    assert compare(str(model), str(tmp_path / "out")).identical
    with open_pytorch(model) as checkpoint:
        assert remarks("mine", model, checkpoint) == ()
    (model / SINGLE).rename(model / "weights-of-any-name")
    with open_checkpoint(model / "weights-of-any-name") as checkpoint:
        assert_holds(checkpoint, arrays)


def test_one_storage_may_have_several_tensors(tmp_path: Path) -> None:
    told = {
        "embed": W,
        "head": files.parameter(W),
        "tail": files.tensor(FLOATS, 1, [2], [1]),
        "turned": files.tensor(FLOATS, 2, [], []),
        "kept": files.called("torch._tensor._rebuild_from_type_v2", *_from_type("torch.Tensor")),
    }
    with open_pytorch(files.write_pickle(tmp_path / SINGLE, files.mapping(told), [RAW])) as checkpoint:
        expected = {"embed": ONE, "head": ONE, "tail": ONE[1:], "turned": ONE[2], "kept": ONE}
        assert_holds(checkpoint, {name: np.asarray(array) for name, array in expected.items()})


def _from_type(kind: str, function: str = "torch._utils._rebuild_tensor") -> tuple[bytes, ...]:
    inside = files.several(FLOATS, files.number(0), files.numbers([3]), files.numbers([1]))
    return files.name(function), files.name(kind), inside, b"}"


@pytest.mark.parametrize("key", ["state_dict", "model", "module", "model_state_dict"])
def test_a_model_among_other_things(tmp_path: Path, key: str) -> None:
    optimizer = files.mapping({"state": files.mapping({"exp_avg": W}), "lr": b"G" + struct.pack(">d", 0.5)}, b"}")
    told = {key: files.mapping({"w": W, "_extra": b"N"}), "optimizer": optimizer, "epoch": files.number(7)}
    with open_pytorch(files.write_pickle(tmp_path / SINGLE, files.mapping(told, b"}"), [RAW])) as checkpoint:
        assert_holds(checkpoint, {"w": ONE})
        assert checkpoint.metadata == {"epoch": "7"}


def test_attributes_of_a_state_dict_are_left_out(tmp_path: Path) -> None:
    told = files.mapping({"w": W}) + files.mapping({"_metadata": files.mapping({"": b"}"})}, b"}") + b"b"
    with open_pytorch(files.write_pickle(tmp_path / SINGLE, told, [RAW])) as checkpoint:
        assert_holds(checkpoint, {"w": ONE})


def test_shards_and_where_weights_are_looked_for(tmp_path: Path) -> None:
    refused(tmp_path, "holds no weights of PyTorch")
    arrays = {f"layers.{layer}.w": np.full(3, layer, np.float16) for layer in range(11)}
    files.write_shards(tmp_path, arrays, 3)
    for path in (tmp_path, tmp_path / INDEX):
        with open_pytorch(path) as checkpoint:
            assert_holds(checkpoint, arrays)
            assert len(checkpoint.files()) == len(checkpoint.fingerprint()) == 3
    files.write_arrays(tmp_path / SINGLE, {"w": ONE})
    with open_pytorch(tmp_path) as checkpoint:
        assert_holds(checkpoint, arrays)
        assert f"{SINGLE} is not read, as {INDEX} beside it" in remarks("mine", tmp_path, checkpoint)[0]
    (tmp_path / SINGLE).unlink()
    weight_map = json.loads((tmp_path / INDEX).read_text())["weight_map"]
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map | {"layers.9.w": min(weight_map.values())}}))
    refused(tmp_path, "places tensor 'layers.9.w' in 'pytorch_model-00001-of-00003.bin', but")
    (tmp_path / INDEX).unlink()
    with open_pytorch(tmp_path) as checkpoint:
        assert_holds(checkpoint, arrays)
    (tmp_path / "pytorch_model-00002-of-00003.bin").unlink()
    refused(tmp_path, "lacks pytorch_model-00002-of-00003.bin")
    files.write_arrays(tmp_path / "pytorch_model-00002-of-00003.bin", {"layers.0.w": ONE})
    refused(tmp_path, "has tensor 'layers.0.w' both in", INDEX)


def test_the_only_other_file_of_a_directory(tmp_path: Path) -> None:
    files.write_arrays(tmp_path / "model.pt", {"w": ONE})
    (tmp_path / "optimizer.pt").touch()
    with open_pytorch(tmp_path) as checkpoint:
        assert checkpoint.files() == (tmp_path / "model.pt",)
    (tmp_path / "model.ckpt").touch()
    refused(tmp_path, "holds 2 files that may be PyTorch's weights and no pytorch_model.bin: give one file's path")


def test_64_bit_archives_and_holes(tmp_path: Path) -> None:
    files.write_arrays(tmp_path / SINGLE, {"w": ONE, "v": ONE[1:]}, wide=True)
    with open_pytorch(tmp_path) as checkpoint:
        assert_holds(checkpoint, {"w": ONE, "v": ONE[1:]})
    entries = 2**30 + 5
    large = files.tensor(files.storage("0", "torch.FloatStorage", entries), 0, [entries], [1])
    after = files.tensor(files.storage("1", "torch.FloatStorage", 3), 0, [3], [1])
    files.write_pickle(tmp_path / SINGLE, files.mapping({"large": large, "w": after}), [4 * entries, RAW])
    with open_pytorch(tmp_path) as checkpoint:
        assert read(checkpoint, "w").tolist() == ONE.tolist()
        last = np.ones(8, np.uint8)
        checkpoint.read_into("large", 4 * entries - 8, last)
        assert not last.any()


def test_views_of_any_strides() -> None:
    rng = np.random.default_rng(0)
    whole = rng.integers(0, 2**16, (30, 41, 9), np.uint16)
    memory = whole.tobytes()
    views = [whole.T, whole[:, ::7], whole[3:20, 5:, 2:3], whole.transpose(1, 0, 2)[::5], whole[:, :1, :1], whole[:1]]
    reads: list[int] = []
    for view in views:
        offset = view.__array_interface__["data"][0] - whole.__array_interface__["data"][0]
        strides = tuple(step // 2 for step in view.strides)

        def reader(piece: memoryview, at: int, offset: int = offset) -> None:
            piece[:] = memory[offset + at : offset + at + len(piece)]
            reads.append(len(piece))

        content = view.tobytes()
        for start, stop in [(0, len(content)), *np.sort(rng.integers(0, len(content) + 1, (20, 2))).tolist()]:
            out = bytearray(stop - start)
            strided.read_strided(reader, view.shape, strides, 2, start, memoryview(out))
            assert out == content[start:stop]
    assert max(reads) <= len(memory)


def test_memory_does_not_grow_with_a_transposed_tensor(tmp_path: Path) -> None:
    held = files.storage("0", "torch.HalfStorage", 2**23)
    told = files.mapping({"w": files.tensor(held, 0, [2**11, 2**12], [1, 2**11])})
    values = np.arange(2**23, dtype=np.uint64).astype(np.uint16)
    files.write_pickle(tmp_path / SINGLE, told, [values.tobytes()])
    expected = values.reshape(2**12, 2**11).T
    with open_pytorch(tmp_path) as checkpoint:
        out = np.empty(2**20, np.uint16)
        tracemalloc.start()
        try:
            checkpoint.read_into("w", 2 * 2**12 * 100, out.view(np.uint8))
            assert tracemalloc.get_traced_memory()[1] < 2**22
        finally:
            tracemalloc.stop()
    assert np.array_equal(out.reshape(-1, 2**12), expected[100 : 100 + 2**8])


# --- What is never done ----------------------------------------------------------------------------------


class Harm:
    """What runs a function when it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, (os.fspath(self.place),)


@pytest.mark.parametrize("protocol", [2, 4])
def test_nothing_is_run(tmp_path: Path, protocol: int) -> None:
    harm = Harm(tmp_path / "harm")
    told = {"w": harm, "v": OrderedDict(a=harm)}
    files.write_archive(tmp_path / SINGLE, [files.Entry("data.pkl", pickle.dumps(told, protocol=protocol))])
    refused(tmp_path / SINGLE, f"names the Python object '{os.mkdir.__module__}.mkdir'", "never looked up")
    assert not (tmp_path / "harm").exists()


NAMES = ["builtins.eval", "torch.load", "torch._utils._rebuild_qtensor", "io.BytesIO", "torch.QInt8Storage"]


@pytest.mark.parametrize("name", NAMES)
def test_names_that_are_not_on_the_list(tmp_path: Path, name: str) -> None:
    refused(files.write_pickle(tmp_path / SINGLE, files.mapping({"w": files.name(name)})), f"Python object '{name}'")


def _held(value: bytes) -> bytes:
    return files.mapping({"w": value})


def _of_storage(key: str, count: int) -> bytes:
    return files.tensor(files.storage(key, "torch.FloatStorage", count), 0, [3], [1])


PICKLES = {
    "damaged": [
        (b"", "is cut short"),
        (b"\x80\x09", "protocol 9"),
        (b"\x80\2}", "is cut short"),
        (b"\x80\2}}.", "ends with more than one value"),
        (b"\x80\2}.}", "1 bytes after its end"),
        (b"\x80\2(.", "takes a value where there is none"),
        (b"\x80\2t.", "back to a mark that is not there"),
        (b"\x80\2q\0.", "keeps a value where there is none"),
        (b"\x80\4\x94.", "keeps a value where there is none"),
        (b"\x80\2h\0.", "recalls what was not kept"),
        (b"\x80\2Nb.", "fills what is no dict"),
        (b"\x80\2NNa.", "fills what is no list"),
        (b"\x80\2](NNu.", "fills what is no dict"),
        (b"\x80\2}(Nu.", "a key without a value"),
        (b"\x80\2}(X\1\0\0\0aNX\1\0\0\0aNu.", "names 'a' twice"),
        (b"\x80\2X\1\0\0\0\xff.", "not UTF-8"),
        (b"\x80\2X\xff\xff\xff\xffa.", "is cut short"),
        (b"\x80\2ctorch\nFloat", "a name without an end"),
        (b"\x80\2\x8a\x20" + b"\1" * 32 + b".", "an integer of 32 bytes"),
        (b"\x80\2NQ.", "refers to what is no storage"),
        (files.pickle(files.storage("0", "torch.float32", 1)), "refers to what is no storage"),
        (files.pickle(files.storage("0", "torch.FloatStorage", -1)), "refers to what is no storage"),
        (files.pickle(b"N"), "holds no dictionary of tensors"),
        (files.pickle(W), "holds no dictionary of tensors"),
        (files.pickle(_held(files.tensor(FLOATS, -1, [1], [1]))), "no place in its storage"),
        (files.pickle(_held(files.tensor(FLOATS, 0, [-1], [1]))), "no place in its storage"),
        (files.pickle(_held(files.tensor(FLOATS, 0, [1], []))), "impossible shape (1,) and strides ()"),
        (files.pickle(_held(files.tensor(FLOATS, 0, [2**62, 2**62], [0, 0]))), "impossible shape"),
        (files.pickle(_held(files.tensor(FLOATS, 0, [4], [1]))), "needs 4 entries of storage '0', which has 3"),
        (files.pickle(_held(files.tensor(FLOATS, 3, [1], [1]))), "needs 4 entries"),
        (files.pickle(_held(files.tensor(FLOATS, 0, [2], [2**62]))), "needs 4,611,686,018,427,387,905 entries"),
        (
            files.pickle(_held(files.tensor(files.storage("7", "torch.FloatStorage", 1), 0, [1], [1]))),
            "lacks the storage",
        ),
        (files.pickle(_held(_of_storage("0", 4))), "a storage of 16 bytes, and it has 12"),
    ],
    "refused": [
        (b"\x80\2cos\nsystem\n.", "'os.system'"),
        (b"\x80\4X\2\0\0\0osX\6\0\0\0system\x93.", "'os.system'"),
        (b"\x80\4NN\x93.", "'of no name'"),
        (b"\x80\2NN\x81.", "the opcode 0x81"),
        (b"\x80\2}(NNu.", "a key that is neither text nor integer"),
        (b"\x80\2NNR.", "calls what is no function"),
        (files.pickle(files.parameter(b"N")), "calls torch._utils._rebuild_parameter in a way that"),
        (files.pickle(files.called("torch.Tensor", W)), "calls torch.Tensor"),
        (files.pickle(files.called("collections.OrderedDict", b"]")), "calls collections.OrderedDict"),
        (
            files.pickle(files.called("torch._tensor._rebuild_from_type_v2", *_from_type("torch.FloatStorage"))),
            "calls torch._tensor._rebuild_from_type_v2",
        ),
        (
            files.pickle(_held(files.tensor(FLOATS, 0, [3], [1], files.mapping({"conj": b"\x88"}, b"}")))),
            "to be conjugated or negated",
        ),
        (files.pickle(_held(files.tensor(FLOATS, 0, [4], [0]))), "4 entries that repeats the 3 of storage '0'"),
        (files.pickle(_held(b"](" + W + b"e")), "tensors inside of 'w'"),
        (files.pickle(b"}" + files.number(1) + W + b"s"), "calls a tensor 1, which is no text"),
        (files.pickle(files.mapping({"model": _held(W), "module": _held(W)})), "in several places, 'model', 'module':"),
        (files.pickle(files.mapping({"model": _held(W), "w": W})), "in several places, 'model', its front:"),
    ],
}


@pytest.mark.parametrize(("raw", "words"), [case for cases in PICKLES.values() for case in cases])
def test_pickles_that_are_not_of_tensors(tmp_path: Path, raw: bytes, words: str) -> None:
    path = tmp_path / SINGLE
    files.write_archive(path, [files.Entry("data.pkl", raw), files.Entry("data/0", RAW)])
    again = (raw, words) in PICKLES["damaged"]
    refused(path, words, *(["get the file again from its source"] if again else []))


def test_what_repeats_and_holds_itself_takes_no_time(tmp_path: Path) -> None:
    doubled = b")" + b"q\0h\0\x86" * 200  # each a pair of what was before it, twice
    itself = b"]q\1h\1a"
    often = {"list": b"](" + b"K\1" * 3000 + b"eq\2"} | {f"again {number}": b"h\2" for number in range(3000)}
    told = files.mapping({"w": W, "pairs": doubled, "itself": itself} | often)
    with open_pytorch(files.write_pickle(tmp_path / SINGLE, told, [RAW])) as checkpoint:
        assert list(checkpoint.tensors) == ["w"]
    sizes = b"](" + b"K\1" * 100 + b"eq\2"
    path = files.write_pickle(tmp_path / SINGLE, files.mapping({"w": sizes, "v": files.called("torch.Size", b"h\2")}))
    refused(path, "calls torch.Size")


def test_steps_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pytorch_pickle, "_MOST_STEPS", 1000)
    files.write_pickle(tmp_path / SINGLE, b"]" * 1000)
    refused(tmp_path / SINGLE, "takes over 1,000 steps, more than any model")


# --- Archives --------------------------------------------------------------------------------------------


def test_other_formats_are_named(tmp_path: Path) -> None:
    path = tmp_path / SINGLE
    tarfile.open(path, "w").close()
    with tarfile.open(path, "w") as tar:
        tar.addfile(tarfile.TarInfo("pickle"), io.BytesIO())
    refused(path, "the format that PyTorch wrote before version 1.6")
    for content, words in (
        (b"\x80\2\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\2M\xe9\3.", "the format that PyTorch wrote before version 1.6"),
        (b"\x80\4}.", "is a bare pickle"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"", "is no zip archive of PyTorch"),
        (b"PK\3\4" + bytes(90), "is cut short"),
    ):
        path.write_bytes(content)
        refused(path, words)
    files.write_pickle(path, _held(W), [RAW], files.Entry("constants.pkl", b""))
    refused(path, "is TorchScript, a program")
    for order in (b"big", b"\xff"):
        files.write_pickle(path, _held(W), [RAW], files.Entry("byteorder", order))
        refused(path, "has its bytes in the order", "not little")
    os.mkfifo(tmp_path / "pipe.bin")
    refused(tmp_path / "pipe.bin", "not a regular file")


def test_archives_that_are_not_as_torch_writes_them(tmp_path: Path) -> None:
    path, entry = tmp_path / SINGLE, files.Entry
    good = entry("data.pkl", files.pickle(_held(W)))
    for entries, words in (
        ([], "with 0 pickles of PyTorch"),
        ([entry("x", b"")], "with 0 pickles of PyTorch"),
        ([good, entry("inner/data.pkl", b"")], "with 2 pickles of PyTorch"),
        ([good, good], "two entries of one name"),
        ([good, entry("data/0", RAW, method=8)], "is compressed, so it cannot be read by range"),
        ([good, entry("data/0", RAW, flags=1)], "is encrypted"),
        ([good, entry("data/0", RAW, flags=0)], "is another one by its own header"),
    ):
        files.write_archive(path, entries)
        refused(path, words)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(100))
    refused(path, "is compressed")


def edited(path: Path, old: bytes, new: bytes, times: int = 1) -> Path:
    files.write_pickle(path, _held(W), [RAW])
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new, times) if times > 0 else new.join(content.rsplit(old, -times)))
    return path


def test_archives_whose_parts_disagree(tmp_path: Path) -> None:
    path = tmp_path / SINGLE
    refused(edited(path, b"archive/data/0", b"archive/data/1"), "has another name by its own header")
    refused(edited(path, b"archive/data/0", b"archive/data/1", -1), "has another name by its own header")
    refused(edited(path, b"PK\3\4", b"PK\3\5"), "does not begin where the directory says")
    refused(edited(path, b"PK\1\2", b"PK\1\3"), "a damaged directory")
    refused(edited(path, b"PK\5\6\0\0", b"PK\5\6\1\0"), "one of several parts")
    size, larger = struct.pack("<II", 12, 12), struct.pack("<II", 500, 500)
    refused(edited(path, size, larger, -1), "reaches into what comes after it")
    count = struct.pack("<HH", 3, 3)
    refused(edited(path, count, struct.pack("<HH", 2, 2), -1), "bytes after the last entry of its directory")
    refused(edited(path, count, struct.pack("<HH", 4, 4), -1), "a damaged directory")


def test_texts_that_are_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pytorch_archive, "_LARGEST_TEXT", 10)
    refused(files.write_pickle(tmp_path / SINGLE, _held(W), [RAW]), "entry 'data.pkl' in", "over 10")


def opens_or_explains(path: Path) -> None:
    try:
        checkpoint = open_pytorch(path)
    except M3Error:
        return
    with checkpoint:
        for name in checkpoint.tensors:
            read(checkpoint, name)


def test_cut_and_flipped_bits(tmp_path: Path) -> None:
    path = files.write_arrays(tmp_path / SINGLE, {"w": ONE, "t": np.ones((2, 3), np.float16)}, strided=True)
    content = path.read_bytes()
    for length in range(0, len(content), 7):
        path.write_bytes(content[:length])
        refused(path)
    for at in range(0, len(content), 5):
        path.write_bytes(content[:at] + bytes([content[at] ^ (1 << at % 8)]) + content[at + 1 :])
        opens_or_explains(path)


# --- As torch does it ------------------------------------------------------------------------------------


@pytest.mark.torch
@pytest.mark.parametrize("protocol", [2, 4])
def test_torch_writes_what_is_read(tmp_path: Path, protocol: int) -> None:
    import torch

    base = torch.arange(4200, dtype=torch.float32).reshape(60, 70)
    tagged = torch.nn.Parameter(torch.ones(2))
    tagged.sharded = True
    state = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).state_dict()
    state |= {"turned": base.T, "part": base[3:50:4, 10:], "whole": base, "tagged": tagged, "scalar": torch.tensor(3)}
    state |= {"parameter": torch.nn.Parameter(base[1]), "none": torch.empty(0, 3), "one": torch.ones(1, 5).expand(1, 5)}
    kinds = "bool uint8 int8 int16 int32 int64 float16 bfloat16 float64 complex64 uint16 uint32 uint64 "
    kinds += "float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu"
    state |= {kind: torch.arange(1, 4).to(getattr(torch, kind)) for kind in kinds.split()}
    torch.save(state, tmp_path / SINGLE, pickle_protocol=protocol)
    with open_pytorch(tmp_path) as checkpoint:
        assert checkpoint.tensors.keys() == state.keys()
        for name, value in state.items():
            expected = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            assert read(checkpoint, name).tobytes() == expected, name
            assert checkpoint.tensors[name].shape == tuple(value.shape)


@pytest.mark.torch
def test_torch_reads_what_the_tests_write(tmp_path: Path) -> None:
    import torch

    arrays = arrays_of_every_dtype()
    for strided_too in (False, True):
        files.write_arrays(tmp_path / SINGLE, arrays, strided=strided_too)
        state = torch.load(tmp_path / SINGLE, weights_only=True)
        for name, array in arrays.items():
            found = state[name].detach()
            value = found.new_empty(found.shape).copy_(found).reshape(-1).view(torch.uint8).numpy()
            assert value.tobytes() == array.tobytes(), name
            assert tuple(state[name].shape) == array.shape


@pytest.mark.torch
def test_what_torch_writes_and_is_refused(tmp_path: Path) -> None:
    import torch

    path = tmp_path / SINGLE
    for value, words in (
        (torch.ones(2, dtype=torch.complex64).conj(), "to be conjugated"),
        (torch.ones(2).to_sparse(), "names the Python object 'torch._utils._rebuild_sparse_tensor'"),
        (torch.ones(2, dtype=torch.complex128), "names the Python object 'torch.ComplexDoubleStorage'"),
        (torch.ones(1).expand(9), "9 entries that repeats the 1"),
        (torch.ones(2, device="meta"), "names the Python object 'torch._utils._rebuild_meta_tensor_no_storage'"),
    ):
        torch.save({"w": value}, path)
        refused(path, words)
    torch.save({"w": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    refused(path, "the format that PyTorch wrote before version 1.6")
