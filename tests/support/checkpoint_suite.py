"""What every checkpoint promises, whatever its format: one suite that each format, and each view, passes.

A new format adds a `Case` to `CASES`.
"""

import json
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax.traverse_util import unflatten_dict

from m3jax.checkpoints import (
    DTYPES,
    Checkpoint,
    ShardWriter,
    TensorInfo,
    natural_key,
    open_checkpoint,
    open_safetensors,
)
from m3jax.checkpoints.formats import FORMATS, Format
from m3jax.checkpoints.protocol import DTYPE_NAMES
from m3jax.checkpoints.views import renamed, selected
from m3jax.errors import M3Error
from support import torch_files

Arrays = Mapping[str, np.ndarray]
SHAPES = [(), (0,), (3, 0, 2), (1,), (5,), (3, 7)]
LAYERS = 12


# --- Values and files ------------------------------------------------------------------------------------


def random_array(dtype: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Random bytes, so that every bit pattern (NaNs too) has to survive."""
    raw = rng.integers(0, 2 if dtype == "BOOL" else 256, (*shape, DTYPES[dtype].itemsize), np.uint8)
    return raw.reshape(-1).view(DTYPES[dtype]).reshape(shape)


def arrays_of_every_dtype() -> dict[str, np.ndarray]:
    """Every dtype in every kind of shape: no dimension, no entries, one, some."""
    rng = np.random.default_rng(0)
    return {
        f"{dtype}.x{'x'.join(map(str, shape))}": random_array(dtype, shape, rng) for dtype in DTYPES for shape in SHAPES
    }


def info_of(name: str, array: np.ndarray) -> TensorInfo:
    return TensorInfo(name, array.shape, DTYPE_NAMES[array.dtype.name])


def write_file(path: Path, arrays: Arrays, **options: Any) -> Path:
    """A safetensors file."""
    with ShardWriter(path, [info_of(*item) for item in arrays.items()], **options) as shard:
        for name, array in arrays.items():
            shard.write(name, 0, array)
        shard.finish()
    return path


def read(checkpoint: Checkpoint, name: str) -> np.ndarray:
    """A whole tensor."""
    info = checkpoint.tensors[name]
    out = np.empty(info.nbytes, np.uint8)
    checkpoint.read_into(name, 0, out)
    return out.view(DTYPES[info.dtype]).reshape(info.shape)


def assert_holds(checkpoint: Checkpoint, arrays: Arrays) -> None:
    """The same names, dtypes, shapes and bits, and no others."""
    assert checkpoint.tensors.keys() == arrays.keys()
    for name, array in arrays.items():
        assert checkpoint.tensors[name] == info_of(name, array)
        assert read(checkpoint, name).tobytes() == array.tobytes(), name


# --- Cases -----------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """A way to make a checkpoint of arrays, and to open it.

    Attributes:
        save: Writes arrays into a directory that exists.
        open: Opens what was written there.
        empty: Whether arrays without entries can be saved in this way.
    """

    save: Callable[[Path, Arrays], object]
    open: Callable[[Path], Checkpoint]
    empty: bool = True


def _by_us(format: Format, max_shard_size: int) -> Case:
    """What our writer of a format makes."""

    def save(place: Path, arrays: Arrays) -> None:
        assert format.write is not None
        with open_safetensors(write_file(place / "source", arrays)) as source:
            format.write(place, source, max_shard_size)
        (place / "source").unlink()

    return Case(save, open_checkpoint)


def _by_orbax(place: Path, arrays: Arrays) -> None:
    """What Orbax itself makes without a database."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as checkpointer:
        checkpointer.save(place / "orbax", unflatten_dict(dict(arrays), sep="."))


def _wrapped(case: Case) -> Case:
    """A view that leaves out the beginning of all names."""
    return case._replace(
        save=lambda place, arrays: case.save(place, {f"params.{name}": array for name, array in arrays.items()}),
        open=lambda place: renamed(case.open(place), lambda name: name.removeprefix("params.")),
    )


def _turned(case: Case) -> Case:
    """A view that turns round the order of the layers."""

    def turned(name: str) -> str:
        if not name.startswith("layers."):
            return name
        layers, number, *rest = name.split(".")
        return ".".join([layers, str(LAYERS - 1 - int(number)), *rest])

    runs = [(layer, layer + 1) for layer in reversed(range(LAYERS))]
    return case._replace(
        save=lambda place, arrays: case.save(place, {turned(name): array for name, array in arrays.items()}),
        open=lambda place: selected(case.open(place), *runs),
    )


WRITTEN = {format.name: _by_us(format, 10**9) for format in FORMATS if format.write is not None}
DIVIDED = {f"{format.name}-divided": _by_us(format, 100) for format in FORMATS if format.divides}
FOREIGN = {
    "orbax-directories": Case(_by_orbax, open_checkpoint, empty=False),
    "pytorch-strided": Case(
        lambda place, arrays: torch_files.write_arrays(place / "pytorch_model.bin", arrays, strided=True),
        open_checkpoint,
    ),
    "pytorch-divided": Case(lambda place, arrays: torch_files.write_shards(place, arrays, 3), open_checkpoint),
}
STORED = WRITTEN | DIVIDED | FOREIGN
VIEWS = {
    "safetensors-wrapped": _wrapped(STORED["safetensors-divided"]),
    "orbax-wrapped": _wrapped(STORED["orbax"]),
    "msgpack-turned": _turned(STORED["msgpack-divided"]),
    "orbax-turned": _turned(STORED["orbax-directories"]),
    "safetensors-turned-wrapped": _turned(_wrapped(STORED["safetensors"])),
}
CASES = STORED | VIEWS


# --- The suite -------------------------------------------------------------------------------------------


class Opened(NamedTuple):
    """A checkpoint, what it holds, and how it was made."""

    checkpoint: Checkpoint
    arrays: Arrays
    case: Case
    place: Path


def _expected(case: Case) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    layers = {f"layers.{layer}.w": random_array("F32", (3, 5), rng) for layer in range(LAYERS)}
    arrays = layers | arrays_of_every_dtype() | {"large": random_array("BF16", (70, 300), rng)}
    return {name: array for name, array in arrays.items() if array.size or case.empty}


class CheckpointSuite:
    """The promises; a test class derives from it and is parametrised with a fixture `case`."""

    @pytest.fixture
    def opened(self, case: Case, tmp_path: Path) -> Opened:
        arrays = _expected(case)
        case.save(tmp_path, arrays)
        return Opened(case.open(tmp_path), arrays, case, tmp_path)

    def test_every_bit(self, opened: Opened) -> None:
        with opened.checkpoint as checkpoint:
            assert isinstance(checkpoint, Checkpoint)
            assert_holds(checkpoint, opened.arrays)
            assert all(info.name == name for name, info in checkpoint.tensors.items())

    def test_natural_order(self, opened: Opened) -> None:
        with opened.checkpoint as checkpoint:
            assert list(checkpoint.tensors) == sorted(opened.arrays, key=natural_key)
            for told in (checkpoint.tensors, checkpoint.metadata):
                with pytest.raises(TypeError):
                    told["new"] = None  # type: ignore[index]

    def test_ranges_out_of_order(self, opened: Opened) -> None:
        whole = opened.arrays["large"].tobytes()
        edges = sorted({0, 1, len(whole), *np.random.default_rng(2).integers(0, len(whole), 60).tolist()})
        found = bytearray(len(whole))
        ranges = list(pairwise(edges))
        with opened.checkpoint as checkpoint:
            for number, (start, stop) in enumerate(ranges[::2] + ranges[::-1][::2] + ranges[1::2]):
                piece = memoryview(found)[start:stop]
                checkpoint.read_into("large", start, piece if number % 2 else np.frombuffer(piece, np.uint8))
        assert found == whole

    def test_ranges_from_many_threads(self, opened: Opened) -> None:
        contents = {name: array.tobytes() for name, array in opened.arrays.items()}
        rng = np.random.default_rng(3)
        names = [*contents, *["large"] * 200]

        def check(name: str, share: float, length: float) -> None:
            start = int(share * len(contents[name]))
            out = bytearray(int(length * (len(contents[name]) - start)))
            opened.checkpoint.read_into(name, start, memoryview(out))
            assert out == contents[name][start : start + len(out)], name

        with opened.checkpoint, ThreadPoolExecutor(8) as pool:
            list(pool.map(check, names, rng.random(len(names)), rng.random(len(names))))

    def test_typed_memory(self, opened: Opened) -> None:
        out = np.zeros((5, 3), np.float32)
        with opened.checkpoint as checkpoint:
            checkpoint.read_into("layers.10.w", 0, memoryview(out))
        assert out.tobytes() == opened.arrays["layers.10.w"].tobytes()

    def test_what_is_outside(self, opened: Opened) -> None:
        size = opened.arrays["large"].nbytes
        with opened.checkpoint as checkpoint:
            for start, count in ((-1, 1), (0, size + 1), (size - 1, 2), (size + 1, 0)):
                with pytest.raises(ValueError, match="not all inside"):
                    checkpoint.read_into("large", start, np.empty(count, np.uint8))
            checkpoint.read_into("large", size, np.empty(0, np.uint8))
            with pytest.raises(M3Error, match="has no tensor 'absent'") as caught:
                checkpoint.read_into("absent", 0, np.empty(1, np.uint8))
            assert checkpoint.location in str(caught.value)

    def test_closed(self, opened: Opened) -> None:
        with opened.checkpoint as checkpoint:
            read(checkpoint, "layers.2.w")
        checkpoint.close()
        for name in ("layers.2.w", "large"):
            with pytest.raises(ValueError, match="is closed"):
                checkpoint.read_into(name, 0, np.empty(1, np.uint8))

    def test_fingerprint(self, opened: Opened) -> None:
        with opened.checkpoint as checkpoint, opened.case.open(opened.place) as again:
            before = checkpoint.fingerprint()
            assert before == checkpoint.fingerprint() == again.fingerprint()
            assert len(before) == len(checkpoint.files()) == len(set(checkpoint.files()))
            assert json.loads(json.dumps(before)) == before
            for file in checkpoint.files()[:8]:
                now = checkpoint.fingerprint()
                os.utime(file, ns=(0, 7))
                assert checkpoint.fingerprint() != now

    @pytest.mark.parametrize("left", [0.0, 0.5])
    def test_a_file_that_is_cut(self, opened: Opened, left: float) -> None:
        largest = max(opened.checkpoint.files(), key=lambda file: file.stat().st_size)
        os.truncate(largest, int(left * largest.stat().st_size))
        with opened.checkpoint as checkpoint, pytest.raises(M3Error) as caught:
            assert_holds(checkpoint, opened.arrays)  # never other bits
        _assert_sentence(caught.value, opened.place)
        with pytest.raises(M3Error) as caught, opened.case.open(opened.place) as again:
            assert_holds(again, opened.arrays)
        _assert_sentence(caught.value, opened.place)

    def test_files_whose_end_is_lost(self, opened: Opened) -> None:
        for file in opened.checkpoint.files():
            os.truncate(file, max(0, file.stat().st_size - 3))
        with opened.checkpoint as checkpoint, pytest.raises(M3Error) as caught:
            assert_holds(checkpoint, opened.arrays)
        _assert_sentence(caught.value, opened.place)
        with pytest.raises(M3Error), opened.case.open(opened.place) as again:
            assert_holds(again, opened.arrays)

    def test_files_that_are_gone(self, opened: Opened) -> None:
        for file in opened.checkpoint.files():
            file.unlink()
        with opened.checkpoint as checkpoint:
            for fail in (checkpoint.fingerprint, lambda: read(checkpoint, "large")):
                with pytest.raises(M3Error) as caught:
                    fail()
                _assert_sentence(caught.value, opened.place)
        with pytest.raises(M3Error):
            opened.case.open(opened.place)


def _assert_sentence(error: M3Error, place: Path) -> None:
    """One line that says where and ends as a sentence does."""
    assert str(place) in str(error)
    assert "\n" not in str(error)
    assert str(error).endswith(".")
