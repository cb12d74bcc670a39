"""Float8 weights seen as numbers: every bit as numpy makes it, at every range."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from support.checkpoint_suite import read, write_file
from support.float8 import E4M3, E5M2, numbers_of, quantised

from m3jax.checkpoints import Checkpoint, TensorInfo, digest_tensor, open_safetensors
from m3jax.checkpoints.views import renamed, stored_at, stored_digests
from m3jax.checkpoints.views_dequantized import Scaling, dequantized
from m3jax.errors import M3Error


def opened(place: Path, **arrays: np.ndarray) -> Checkpoint:
    write_file(place / "model.safetensors", arrays)
    return open_safetensors(place)


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_blocks_are_cut_by_ranges_and_by_ends(tmp_path: Path, dtype: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("m3jax.checkpoints.views_dequantized._AT_ONCE", 77)
    rng = np.random.default_rng(0)
    block = (4, 16)
    weight, scales = quantised(rng.standard_normal((11, 37)).astype(np.float32), block, dtype)
    weight.reshape(-1)[:256] = np.arange(256, dtype=np.uint8).view(dtype)  # every number there is
    weight = np.where(np.isfinite(weight.astype(np.float32)), weight, np.zeros_like(weight))
    want = numbers_of(weight, scales, block)
    checkpoint = opened(tmp_path, w=weight, s=scales, kept=np.float32([1, 2]))
    with dequantized(checkpoint, {"w": Scaling("s", (3, 3), block)}) as view:
        assert view.tensors == {"kept": TensorInfo("kept", (2,), "F32"), "w": TensorInfo("w", (11, 37), "F32")}
        assert read(view, "w").tobytes() == want.tobytes()
        assert read(view, "kept").tolist() == [1, 2]
        raw = want.tobytes()
        for _ in range(200):
            start, stop = sorted(rng.integers(0, len(raw) + 1, 2))
            out = np.full(stop - start, 255, np.uint8)
            view.read_into("w", int(start), out)
            assert out.tobytes() == raw[start:stop]
    for name, rounded in (("BF16", ml_dtypes.bfloat16), ("F16", np.float16)):
        with dequantized(open_safetensors(tmp_path), {"w": Scaling("s", (3, 3), block)}, dtype=name) as view:
            assert view.tensors["w"].dtype == name
            assert read(view, "w").tobytes() == want.astype(rounded).tobytes()


def test_scales_of_tensors_rows_stacks_and_exponents(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    weight = rng.standard_normal((2, 6, 8)).astype(E4M3)
    scales = {
        "tensor": (np.float32(3).reshape(()), (1, 1, 1), (2, 6, 8)),
        "matrix": (np.float32([0.1, 7]), (2, 1, 1), (1, 6, 8)),
        "row": (rng.random((2, 6, 1)).astype(ml_dtypes.bfloat16), (2, 6, 1), (1, 1, 8)),
        "column": (rng.random((2, 1, 8)).astype(np.float16), (2, 1, 8), (1, 6, 1)),
        "blocks": (rng.random((2, 2, 3)).astype(np.float32), (2, 2, 3), (1, 4, 3)),
        "exponents": (rng.integers(100, 140, (2, 6, 2)).astype(np.uint8), (2, 6, 2), (1, 1, 4)),
    }
    for how, (stored, shape, block) in scales.items():
        (tmp_path / how).mkdir()
        powers = 2.0 ** (stored.astype(np.float32) - 127)
        factors = (powers if how == "exponents" else stored.astype(np.float32)).reshape(shape)
        for axis, size in enumerate(block):
            factors = np.repeat(factors, size, axis).take(range(weight.shape[axis]), axis)
        with dequantized(opened(tmp_path / how, w=weight, s=stored), {"w": Scaling("s", shape, block)}) as view:
            assert read(view, "w").tobytes() == (weight.astype(np.float32) * factors).tobytes(), how


def test_digests_are_of_what_is_stored(tmp_path: Path) -> None:
    weight, scales = quantised(np.random.default_rng(2).standard_normal((40, 50)).astype(np.float32), (16, 16))
    view = renamed(dequantized(opened(tmp_path, w=weight, s=scales), {"w": Scaling("s", (3, 4), (16, 16))}), {"v": "w"})
    with view, open_safetensors(tmp_path) as stored:
        want = {name: digest_tensor(stored, name) for name in ("w", "s")}
        assert stored_digests(view, "v", "of float32") == want  # nothing has been read yet
        read(view, "v")
        assert stored_digests(view, "v", "of float32") == want
        assert stored_at(view, "v") == (str(tmp_path), "w")
        assert view.fingerprint() == stored.fingerprint()
        assert view.files() == stored.files()
    in_order = dequantized(open_safetensors(tmp_path), {"w": Scaling("s", (3, 4), (16, 16))})
    with in_order:
        for start in range(0, 8000, 1000):
            in_order.read_into("w", start, np.empty(1000, np.uint8))
        in_order.read_into("w", 0, np.empty(4, np.uint8))
        (tmp_path / "model.safetensors").unlink()  # so that nothing can be read again
        assert stored_digests(in_order, "w", "of float32") == want


def test_what_is_no_number_is_said(tmp_path: Path) -> None:
    weight = np.array([[448, 1]], E4M3)
    for name, scale, words in (
        ("nan", np.float32([np.nan]), r"s holds scales that are no numbers"),
        ("exponent", np.uint8([255]), r"s holds scales that are no numbers"),
        ("wide", np.float32([3e38]), r"w times its scales is beyond float32"),
    ):
        (tmp_path / name).mkdir()
        with dequantized(opened(tmp_path / name, w=weight, s=scale), {"w": Scaling("s", (1, 1), (1, 2))}) as view:
            with pytest.raises(M3Error, match=words):
                read(view, "w")
            with pytest.raises(M3Error, match="has no tensor 's'"):
                stored_at(view, "s")
    (tmp_path / "inf").mkdir()
    own = np.array([[np.inf, np.nan]], E5M2)  # is what the model holds: a merge says so itself
    with dequantized(opened(tmp_path / "inf", w=own, s=np.float32([1])), {"w": Scaling("s", (1, 1), (1, 2))}) as view:
        assert read(view, "w").tobytes() == own.astype(np.float32).tobytes()
    half = dequantized(open_safetensors(tmp_path / "wide"), {"w": Scaling("s", (1, 1), (1, 2))}, dtype="F16")
    with half as view, pytest.raises(M3Error, match="is beyond float16: take a wider dtype"):
        read(view, "w")
