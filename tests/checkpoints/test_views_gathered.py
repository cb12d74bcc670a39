"""Views that gather rows, along any axis, own and lent, read in any pieces."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from m3jax.checkpoints import Checkpoint, digest_tensor, open_safetensors, views_gathered
from m3jax.checkpoints.views import renamed, stored_digests
from m3jax.checkpoints.views_gathered import Gathering, Lent, RowsOf, gathered
from m3jax.errors import M3Error

ROWS = 30
BF16 = np.dtype(ml_dtypes.bfloat16)
Stored = Callable[[np.ndarray], Checkpoint]


@pytest.fixture
def stored(tmp_path: Path) -> Stored:
    def store(values: np.ndarray) -> Checkpoint:
        file = tmp_path / f"{len(list(tmp_path.iterdir()))}.safetensors"
        save_file({"w": values}, file)
        return open_safetensors(file)

    return store


def rows_of(checkpoint: Checkpoint, axis: int, *rows: int) -> RowsOf:
    return RowsOf(checkpoint, "w", axis, np.array(rows))


@pytest.mark.parametrize("dtype", [np.dtype(np.float32), BF16, np.dtype(np.float16)], ids=str)
@pytest.mark.parametrize(
    ("axis", "shape"), [(0, (ROWS, 7)), (1, (7, ROWS)), (0, (ROWS, 300)), (0, (ROWS,)), (1, (3, ROWS, 5))], ids=str
)
def test_rows_are_gathered_and_lent(
    monkeypatch: pytest.MonkeyPatch, stored: Stored, dtype: np.dtype[Any], axis: int, shape: tuple[int, ...]
) -> None:
    monkeypatch.setattr(views_gathered, "_AT_ONCE", 64)
    rng = np.random.default_rng(0)
    values = [rng.standard_normal(shape).astype(np.float32) for _ in range(3)]
    own, wide, other = (array.astype(kind) for array, kind in zip(values, (dtype, np.float32, BF16), strict=True))
    one, two, three = stored(own), renamed(stored(wide), {"w": "w"}), stored(other)  # a view lends as a file does
    rows = rng.integers(0, ROWS, 40)
    rows[[1, 2, 5, 9, 20, 21, 33, 39]] = -1
    lent = (
        Lent(np.array([1, 39]), ()),
        Lent(np.array([2, 33]), (rows_of(two, axis, 29, 0),)),
        Lent(np.array([5, 9]), (rows_of(two, axis, 3, 4), rows_of(three, axis, 8, 4))),
        Lent(np.array([20, 21]), (RowsOf(one, "w", axis, None),)),
    )
    first, second, third = (np.moveaxis(array, axis, 0) for array in (own, wide, other))
    want = first[rows]
    want[[1, 39]], want[[2, 33]] = 0, second[[29, 0]].astype(dtype)
    pair = second[[3, 4]].astype(np.float64) + third[[8, 4]].astype(np.float64)  # which is exact
    want[[5, 9]] = (pair / 2).astype(np.float32).astype(dtype)
    want[[20, 21]] = (first.astype(np.float64).sum(0) / ROWS).astype(np.float32).astype(dtype)
    want = np.ascontiguousarray(np.moveaxis(want, 0, axis))
    view = gathered(one, {"w": Gathering(axis, rows, lent)})
    assert view.tensors["w"].shape == want.shape
    for step in (want.nbytes, 13, 100):  # in one piece, and in pieces that begin and end inside numbers
        got = np.empty(want.nbytes, np.uint8)
        for start in range(0, want.nbytes, step):
            view.read_into("w", start, got[start : start + step])
        assert got.tobytes() == want.tobytes()
    assert stored_digests(view, "w", "of the view") == {"w": digest_tensor(one, "w")}
    assert {checkpoint.location for checkpoint, _ in view.lenders("w")} == {c.location for c in (one, two, three)}


def test_what_cannot_be_gathered_is_refused(stored: Stored) -> None:
    one, short = stored(np.ones((4, 3), np.float32)), stored(np.ones((4, 2), np.float32))
    rows, at = np.array([0, -1]), np.array([1])
    with pytest.raises(M3Error, match=r"w: is \[4, 3\] in .* but \[4, 2\] in .*: take models of one width"):
        gathered(one, {"w": Gathering(0, rows, (Lent(at, (rows_of(short, 0, 0),)),))})
    with pytest.raises(M3Error, match="w has no row 4"):
        gathered(one, {"w": Gathering(0, rows, (Lent(at, (rows_of(one, 0, 4),)),))})
    with pytest.raises(ValueError, match="not each lent once"):
        gathered(one, {"w": Gathering(0, rows)})
    whole = stored(np.ones((4, 3), np.int32))
    with pytest.raises(M3Error, match="w is I32, to which no row can be added"):
        gathered(whole, {"w": Gathering(0, rows, (Lent(at, ()),))})
    broken = stored(np.full((4, 3), np.nan, np.float32))
    view = gathered(broken, {"w": Gathering(0, rows, (Lent(at, (RowsOf(broken, "w", 0, None),)),))})
    with pytest.raises(M3Error, match="w holds NaN or infinite entries, so that a token which no model has"):
        view.read_into("w", 0, np.empty(24, np.uint8))
