"""What is said of one checkpoint, and of two."""

from typing import Any

from m3jax.checkpoints import TensorInfo
from m3jax.checkpoints.inspection import (
    Comparison,
    Difference,
    DtypeTotal,
    Mismatch,
    Overview,
    TensorDifference,
    WeightFile,
)
from m3jax.cli.displays.checkpoints import comparison_lines, overview_lines


def test_overview_ends_with_totals() -> None:
    overview = Overview(
        location="org/model",
        revision="abc",
        format="msgpack",
        model=None,
        metadata={"format": "pt\x07"},
        files=(WeightFile("model.safetensors", 1500),),
        tensors=(TensorInfo("w\x1b", (2, 3), "F32"), TensorInfo("s", (), "I64")),
        hidden=1,
        dtypes=(DtypeTotal("F32", 1, 6, 24), DtypeTotal("I64", 1, 1, 8)),
    )
    lines = list(overview_lines(overview))
    assert lines[0] == "org/model at abc"
    assert all(line.isprintable() for line in lines)
    assert lines[-6:] == [
        "dtype  tensors  parameters  bytes",
        "F32          1           6   24 B",
        "I64          1           1    8 B",
        "all          2           7   32 B",
        "1 msgpack file, 1.5 kB",
        "1 more tensor not matched by the filter",
    ]


def compared(**changes: Any) -> Comparison:
    same = Difference(entries=4, equal=4, finite=4, squares_a=4.0, squares_b=4.0, products=4.0, signed=4, same_sign=4)
    return Comparison("x", "y", (TensorDifference("w", same),), same, (), (), (), ())._replace(**changes)


def test_comparison_of_equals() -> None:
    lines = list(comparison_lines(compared()))
    assert lines[-1] == "the same: 4 entries, all equal"
    assert lines[4].split() == ["w", "2", "2", "0", "1.000000", "0", "100", "%", "100", "%"]


def test_comparison_says_what_is_left_out() -> None:
    odd = Difference(entries=4, nonfinite_a=4)
    lines = list(
        comparison_lines(
            compared(
                tensors=(TensorDifference("w", odd),),
                total=odd,
                only_a=("u",),
                only_b=("v",),
                shapes=(Mismatch("s", "2 × 3", "3"),),
                dtypes=(Mismatch("d", "F32", "BF16"),),
            )
        )
    )
    for expected in (
        "  w: 4 in a, 0 in b",
        "only in a (1):",
        "  v",
        "  s: 2 × 3 in a, 3 in b",
        "  d: F32 in a, BF16 in b",
    ):
        assert expected in lines
    assert lines[-1] == "different: 4 of the 4 entries compared"


def test_comparison_of_nothing() -> None:
    lines = list(comparison_lines(compared(tensors=(), total=Difference(), only_a=("u",))))
    assert lines[-1] == "different: no tensor can be compared"
