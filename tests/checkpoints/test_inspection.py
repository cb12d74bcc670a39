"""Looking at checkpoints and comparing them, against numpy over whole arrays."""

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from m3jax.checkpoints import DTYPES, ShardWriter, TensorInfo, inspection, plan_shards, write_index
from m3jax.checkpoints.inspection import Difference, compare, look_at
from m3jax.checkpoints.msgpack import MsgpackCheckpoint
from m3jax.errors import M3Error
from m3jax.outputs.conversion import convert
from m3jax.progress import Progress

Array = npt.NDArray[Any]
BF16 = ml_dtypes.bfloat16


def save(directory: Path, arrays: Mapping[str, Array], max_shard_size: int = 10**9) -> str:
    """Writes a model directory."""
    directory.mkdir()
    names = {dtype: name for name, dtype in DTYPES.items()}
    infos = [TensorInfo(name, array.shape, names[array.dtype]) for name, array in arrays.items()]
    shards = plan_shards(infos, max_shard_size)
    for file, tensors in shards:
        with ShardWriter(directory / file, tensors) as shard:
            for info in tensors:
                shard.write(info.name, 0, arrays[info.name])
            shard.finish()
    if len(shards) > 1:
        write_index(directory, shards, sum(info.nbytes for info in infos))
    return str(directory)


@pytest.fixture
def model(tmp_path: Path) -> str:
    arrays = {
        "layers.10.weight": np.ones((4, 8), BF16),
        "layers.2.weight": np.ones((4, 8), BF16),
        "ids": np.arange(3, dtype=np.int64),
        "scale": np.float32(2).reshape(()),
    }
    directory = save(tmp_path / "model", arrays, max_shard_size=70)
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": 11,
        "max_position_embeddings": 4096,
        "vocab_size": 32000,
    }
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    return directory


# --- One checkpoint --------------------------------------------------------------------------------------


def test_overview(model: str) -> None:
    overview = look_at(model)
    assert [info.name for info in overview.tensors] == ["ids", "layers.2.weight", "layers.10.weight", "scale"]
    assert overview.dtypes == (("BF16", 2, 64, 128), ("I64", 1, 3, 24), ("F32", 1, 1, 4))
    assert (overview.entries, overview.bytes, overview.hidden) == (68, 156, 0)
    assert overview.model == ("llama", ("LlamaForCausalLM",), 11, 4096, 32000)
    assert overview.metadata == {"format": "pt"}
    assert [file.bytes for file in overview.files] == [
        (Path(model) / file.name).stat().st_size for file in overview.files
    ]
    assert len(overview.files) == 3


def test_overview_as_json(model: str) -> None:
    data = json.loads(json.dumps(look_at(model, "scale").to_json(), allow_nan=False))
    assert data["tensors"] == [{"name": "scale", "shape": [], "dtype": "F32", "entries": 1, "bytes": 4}]
    assert (data["entries"], data["bytes"], data["hidden"]) == (1, 4, 3)


def test_filter_narrows_totals(model: str) -> None:
    overview = look_at(model, r"layers\.10\.")
    assert [info.name for info in overview.tensors] == ["layers.10.weight"]
    assert overview.dtypes == (("BF16", 1, 32, 64),)
    assert overview.hidden == 3


def test_single_file_finds_its_config(model: str) -> None:
    file = next(Path(model).glob("*.safetensors"))
    overview = look_at(str(file))
    assert overview.model is not None
    assert overview.files == ((file.name, file.stat().st_size),)


def test_text_part_of_a_config(model: str) -> None:
    config = {"model_type": "gemma3", "text_config": {"vocab_size": 7, "num_hidden_layers": True}}
    (Path(model) / "config.json").write_text(json.dumps(config))
    assert look_at(model).model == ("gemma3", (), None, None, 7)


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff", '{"architectures": 3, "vocab_size": "x", "model_type": []}'])
def test_strange_config_does_not_hide_the_weights(model: str, text: str) -> None:
    (Path(model) / "config.json").write_bytes(text.encode("latin-1"))
    overview = look_at(model)
    assert overview.model in (None, (None, (), None, None, None))
    assert bool(overview.notes) == (overview.model is None)
    assert overview.entries == 68


def test_a_text_is_no_checkpoint_and_is_told_so(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("merge_method: linear")
    with pytest.raises(M3Error, match=r"recipe.yaml holds no weights: give a model's directory"):
        look_at(str(tmp_path / "recipe.yaml"))


def test_checkpoint_without_tensors(tmp_path: Path) -> None:
    assert look_at(save(tmp_path / "empty", {})).entries == 0


@pytest.mark.parametrize(
    ("pattern", "sentence"), [("q_prj", "found in no tensor's name"), ("(", "is no regular expression")]
)
def test_bad_filters(model: str, pattern: str, sentence: str) -> None:
    with pytest.raises(M3Error, match=sentence):
        look_at(model, pattern)
    with pytest.raises(M3Error, match=sentence):
        compare(model, model, pattern)


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(M3Error, match="holds no weights"):
        look_at(str(tmp_path))


@pytest.mark.parametrize("to", ["safetensors", "msgpack", "orbax"])
def test_every_format_is_shown_without_jax(model: str, tmp_path: Path, to: Any) -> None:
    expected = look_at(model)
    out = str(convert(model, tmp_path / "out", to).directory)
    program = (
        f"import sys; from m3jax.cli.commands import main; main(['inspect', {out!r}]); sys.exit('jax' in sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert re.search(rf"^\d+ {to} files?, [\d.]+ k?B$", shown, re.MULTILINE)
    overview = look_at(out)
    assert overview.format == overview.to_json()["format"] == to
    assert (overview.tensors, overview.dtypes, overview.model) == (expected.tensors, expected.dtypes, expected.model)
    assert sum(file.bytes for file in overview.files) >= overview.bytes
    assert compare(model, out).identical


def test_no_weight_is_read(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = str(convert(model, tmp_path / "out", "msgpack").directory)

    def fail(*_: Any) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(MsgpackCheckpoint, "read_into", fail)
    assert look_at(out).entries == 68


# --- Two checkpoints -------------------------------------------------------------------------------------


def measured(tmp_path: Path, a: Array, b: Array) -> Difference:
    first, second = save(tmp_path / "a", {"w": a}), save(tmp_path / "b", {"w": b})
    return compare(first, second).total


@pytest.mark.parametrize("dtype", [BF16, np.float16, np.float32, np.float64])
@pytest.mark.parametrize("size", [1, 1000, inspection._PIECE + inspection._BLOCK + 5])
def test_measures(tmp_path: Path, dtype: Any, size: int) -> None:
    generator = np.random.default_rng(0)
    a = generator.standard_normal(size).astype(dtype)
    b = np.where(generator.random(size) < 0.5, a, -a + generator.standard_normal(size)).astype(dtype)
    a[::7] = 0
    found = measured(tmp_path, a, b)
    x, y = a.astype(np.float64), b.astype(np.float64)
    nonzero = (x != 0) & (y != 0)
    assert found.entries == found.finite == size
    assert found.equal == np.count_nonzero(x == y)
    assert found.norm_a == pytest.approx(np.linalg.norm(x), rel=1e-12)
    assert found.norm_b == pytest.approx(np.linalg.norm(y), rel=1e-12)
    assert found.distance == pytest.approx(np.linalg.norm(x - y), rel=1e-12)
    assert found.max_difference == np.abs(x - y).max()
    assert (found.signed, found.same_sign) == (nonzero.sum(), (np.sign(x) == np.sign(y))[nonzero].sum())
    if size > 1:
        assert found.cosine == pytest.approx(x @ y / np.linalg.norm(x) / np.linalg.norm(y), rel=1e-9)
    else:
        assert found.cosine is None


def test_identical(tmp_path: Path) -> None:
    a = np.random.default_rng(1).standard_normal((30, 40)).astype(np.float32)
    first, second = save(tmp_path / "a", {"w": a, "v": a}, 5000), save(tmp_path / "b", {"v": a, "w": a})
    comparison = compare(first, second)
    assert comparison.identical
    assert comparison.total.cosine == 1.0
    assert comparison.total.distance == 0.0
    assert comparison.total.equal_share == comparison.total.sign_agreement == 1.0


def test_nonfinite_values_are_counted_and_left_out(tmp_path: Path) -> None:
    nan, inf = np.nan, np.inf
    found = measured(tmp_path, np.float32([nan, nan, inf, inf, 3, 0]), np.float32([nan, 1, inf, -inf, 4, nan]))
    assert (found.entries, found.equal, found.finite) == (6, 2, 1)
    assert (found.nonfinite_a, found.nonfinite_b) == (4, 4)
    assert (found.norm_a, found.norm_b, found.distance, found.cosine) == (3.0, 4.0, 1.0, 1.0)


def test_nothing_finite(tmp_path: Path) -> None:
    found = measured(tmp_path, np.full(3, np.nan, BF16), np.ones(3, BF16))
    assert (found.norm_a, found.distance, found.cosine, found.max_difference) == (None, None, None, None)
    assert found.sign_agreement is None
    json.dumps(found.to_json(), allow_nan=False)


def test_overflow_is_said(tmp_path: Path) -> None:
    found = measured(tmp_path, np.array([1e300, 1.0]), np.array([-1e300, 1.0]))
    assert found.norm_a is None
    assert found.cosine is None
    assert (found.nonfinite_a, found.finite, found.equal) == (0, 2, 1)
    json.dumps(found.to_json(), allow_nan=False)


def test_tiny_float32_values_keep_their_signs(tmp_path: Path) -> None:
    found = measured(tmp_path, np.float32([1e-45, 1e-45]), np.float32([1e-45, -1e-45]))
    assert (found.signed, found.same_sign) == (2, 1)


@pytest.mark.parametrize("name", [name for name in DTYPES if name.startswith("F8")])
def test_eight_bit_floats(tmp_path: Path, name: str) -> None:
    a, b = np.float32([1, 2, 4]).astype(DTYPES[name]), np.float32([1, 1, 4]).astype(DTYPES[name])
    found = measured(tmp_path, a, b)
    assert (found.equal, found.max_difference, found.norm_b) == (2, 1.0, pytest.approx(np.sqrt(18)))


@pytest.mark.parametrize("dtype", [np.int64, np.uint8, np.bool_, np.complex64])
def test_others_are_equal_or_not(tmp_path: Path, dtype: Any) -> None:
    found = measured(tmp_path, np.array([0, 1, 1]).astype(dtype), np.array([0, 1, 0]).astype(dtype))
    assert (found.entries, found.equal, found.finite) == (3, 2, 0)
    assert found.norm_a is None


def test_what_cannot_be_compared(tmp_path: Path) -> None:
    ones = np.ones((2, 3), np.float32)
    a = {"a": ones, "both": ones, "shape": ones, "dtype": ones, "kind": np.ones(2, np.int32)}
    b = {"b": ones, "both": ones, "shape": ones.T, "dtype": ones.astype(BF16), "kind": np.ones(2, np.float32)}
    comparison = compare(save(tmp_path / "x", a), save(tmp_path / "y", b))
    assert [name for name, _ in comparison.tensors] == ["both", "dtype"]
    assert comparison.total.equal == 12
    assert (comparison.only_a, comparison.only_b) == (("a",), ("b",))
    assert comparison.shapes == (("shape", "2 × 3", "3 × 2"),)
    assert comparison.dtypes == (("dtype", "F32", "BF16"), ("kind", "I32", "F32"))
    assert not comparison.identical


def test_filter_that_matches_one_side_only(tmp_path: Path) -> None:
    one = np.ones(1, np.float32)
    a, b = save(tmp_path / "x", {"w": one}), save(tmp_path / "y", {"v": one})
    comparison = compare(a, b, "v")
    assert (comparison.tensors, comparison.only_a, comparison.only_b) == ((), (), ("v",))


def test_empty_tensors(tmp_path: Path) -> None:
    found = measured(tmp_path, np.ones((0, 3), np.float32), np.ones((0, 3), np.float32))
    assert found == Difference()
    assert (found.equal_share, found.norm_a) == (None, None)


def test_progress_reaches_all_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspection, "_PIECE", 10)
    a, b = {"u": np.ones(25, np.float32), "v": np.ones(3, BF16)}, {"u": np.ones(25, BF16), "v": np.ones(3, BF16)}
    reports: list[Progress] = []
    compare(save(tmp_path / "a", a), save(tmp_path / "b", b), progress=reports.append)
    assert [report.done for report in reports] == [60, 120, 150, 162]
    assert {(report.stage, report.total) for report in reports} == {("comparing", 162)}


def test_pieces_do_not_change_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(2)
    a, b = (generator.standard_normal((17, 13)).astype(BF16) for _ in range(2))
    whole = measured(tmp_path, a, b)
    monkeypatch.setattr(inspection, "_PIECE", 50)
    monkeypatch.setattr(inspection, "_BLOCK", 7)
    pieces = compare(str(tmp_path / "a"), str(tmp_path / "b")).total
    assert pieces == pytest.approx(whole, rel=1e-13)
