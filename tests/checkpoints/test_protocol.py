import ml_dtypes
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from m3jax.checkpoints import DTYPES, TensorInfo, as_bytes, natural_key


def test_sizes_of_scalars_and_of_nothing() -> None:
    assert (TensorInfo("a", (), "F32").size, TensorInfo("a", (), "F32").nbytes) == (1, 4)
    assert (TensorInfo("a", (3, 0), "BF16").size, TensorInfo("a", (3, 0), "BF16").nbytes) == (0, 0)


def test_dtype_widths_are_their_names() -> None:
    digits = {name: int("".join(c for c in name.split("_")[0] if c.isdigit()) or 8) for name in DTYPES}
    assert {name: dtype.itemsize * 8 for name, dtype in DTYPES.items()} == digits


def test_natural_order_counts() -> None:
    names = ["layers.10.w", "layers.9.w", "layers.9.b", "a2b10", "a2b9", "", "2"]
    assert sorted(names, key=natural_key) == [
        "",
        "2",
        "a2b9",
        "a2b10",
        "layers.9.b",
        "layers.9.w",
        "layers.10.w",
    ]


def test_natural_order_of_very_long_numbers() -> None:
    longer, shorter = "x" + "9" * 5000, "x" + "8" * 4999
    assert sorted([longer, shorter], key=natural_key) == [shorter, longer]


@given(st.lists(st.text(alphabet="a.0123²٣"), unique=True), st.randoms())
def test_natural_order_does_not_depend_on_where_it_starts(names: list[str], random: object) -> None:
    ordered = sorted(names, key=natural_key)
    random.shuffle(names)  # type: ignore[attr-defined]
    assert sorted(names, key=natural_key) == ordered


def test_bytes_of_every_kind_of_array() -> None:
    square = np.arange(6, dtype=np.uint16).reshape(2, 3)
    assert bytes(as_bytes(square.T)) == square.T.tobytes()
    assert bytes(as_bytes(square.astype(">u2"))) == square.tobytes()
    assert bytes(as_bytes(square[:, ::2])) == square[:, ::2].tobytes()
    assert bytes(as_bytes(np.ones((), ml_dtypes.bfloat16))) == b"\x80\x3f"
    assert bytes(as_bytes(np.ones((0, 3), ml_dtypes.float8_e5m2))) == b""
    assert bytes(as_bytes(memoryview(square))) == square.tobytes()
    assert bytes(as_bytes(memoryview(np.ones((0, 3))))) == b""


def test_bytes_are_not_copied_without_need() -> None:
    array = np.zeros(4, np.float32)
    as_bytes(array)[0] = 1
    assert array[0] != 0
