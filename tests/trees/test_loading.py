import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.serialization import to_bytes
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

import m3jax.trees.loading
from m3jax.checkpoints import DTYPES, ShardWriter, TensorInfo, locate_model, open_safetensors, write_orbax
from m3jax.errors import M3Error
from m3jax.trees.loading import load

MESH = Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"))
SPECS = [(), ("x",), ("y",), (None, "y"), ("x", "y"), ("y", "x"), (("x", "y"),), (None, None, "x"), ("y", None, "x")]
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def place(*spec) -> NamedSharding:
    return NamedSharding(MESH, PartitionSpec(*spec))


def save(directory, arrays):
    infos = [TensorInfo(name, array.shape, _NAMES[array.dtype]) for name, array in arrays.items()]
    with ShardWriter(directory / "model.safetensors", infos) as shard:
        for name, array in arrays.items():
            shard.write(name, 0, array)
        shard.finish()
    return directory


def numbers(*shape: int, dtype=np.float32) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(dtype)


@pytest.fixture
def arrays():
    return {
        "dense.kernel": numbers(8, 16),
        "dense.bias": numbers(8, dtype=ml_dtypes.bfloat16),
        "layers.0.w": numbers(8, 8, 8, dtype=np.float16),
        "step": np.asarray(np.int32(7)),
        "none": numbers(0, 8),
    }


@pytest.fixture
def spans(monkeypatch):
    """What is read of each tensor: (start, bytes)."""
    found: dict[str, list[tuple[int, int]]] = {}
    opener = m3jax.trees.loading.open_model

    def watched(place):
        checkpoint = opener(place)
        read = checkpoint.read_into

        def read_into(name, start, out):
            found.setdefault(name, []).append((start, out.nbytes))
            read(name, start, out)

        checkpoint.read_into = read_into
        return checkpoint

    monkeypatch.setattr(m3jax.trees.loading, "open_model", watched)
    return found


def bytes_of(spans: list[tuple[int, int]]) -> int:
    """The bytes read, none of them twice."""
    reached = 0
    for start, size in sorted(spans):
        assert start >= reached
        reached = start + size
    return sum(size for _, size in spans)


def assert_same(found: jax.Array, expected: np.ndarray) -> None:
    assert isinstance(found, jax.Array)
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert np.asarray(found).tobytes() == expected.tobytes()


# --- Formats ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("written", ["safetensors", "msgpack", "orbax"])
def test_every_format(tmp_path, arrays, written) -> None:
    save(tmp_path, arrays)
    if written == "orbax":
        with open_safetensors(tmp_path) as source:
            write_orbax(tmp_path / "saved", source)
    elif written == "msgpack":
        (tmp_path / "saved.msgpack").write_bytes(to_bytes(arrays))
    path = {"safetensors": tmp_path, "orbax": tmp_path / "saved", "msgpack": tmp_path / "saved.msgpack"}[written]
    loaded = load(path, lambda name, shape: place("x") if shape and shape[0] else place(), flat=True)
    assert loaded.keys() == arrays.keys()
    for name, array in arrays.items():
        assert_same(loaded[name], array)


def test_names_make_a_tree(tmp_path, arrays) -> None:
    tree = load(save(tmp_path, arrays))
    assert set(tree) == {"dense", "layers", "step", "none"}
    assert_same(tree["layers"]["0"]["w"], arrays["layers.0.w"])


def test_names_that_make_no_tree(tmp_path) -> None:
    save(tmp_path, {"a": numbers(2), "a.b": numbers(3)})
    with pytest.raises(M3Error, match=r"flat=True loads, has tensors 'a' and 'a\.b'"):
        load(tmp_path)
    assert set(load(tmp_path, flat=True)) == {"a", "a.b"}


# --- Places ----------------------------------------------------------------------------------------------


def test_the_default_device(tmp_path, arrays) -> None:
    array = load(save(tmp_path, arrays), flat=True)["dense.kernel"]
    assert array.devices() == {jax.devices()[0]}
    with jax.default_device(jax.devices()[3]):
        assert load(tmp_path, flat=True)["dense.kernel"].devices() == {jax.devices()[3]}


def test_one_sharding_for_all(tmp_path, arrays) -> None:
    device = SingleDeviceSharding(jax.devices()[5])
    assert all(array.sharding == device for array in load(save(tmp_path, arrays), device, flat=True).values())


def test_shardings_by_name_and_by_tree(tmp_path) -> None:
    w = numbers(8, 8)
    save(tmp_path, {"a.w": w, "b": w})
    like = jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=place(None, "x"))
    for given_ in ({"a.w": place("x"), "b": like}, {"a": {"w": place("x")}, "b": like}):
        loaded = load(tmp_path, given_, flat=True)
        assert loaded["a.w"].sharding == place("x")
        assert loaded["b"].sharding == place(None, "x")
        assert_same(loaded["b"], w)
    with pytest.raises(M3Error, match="the shardings have none for 'b'"):
        load(tmp_path, {"a": {"w": place()}})


def test_a_sharding_that_does_not_divide(tmp_path) -> None:
    save(tmp_path, {"w": numbers(6, 2)})
    with pytest.raises(M3Error, match=r"w of shape \[6, 2\] cannot be divided by NamedSharding"):
        load(tmp_path, place("x"))


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(("block", "run"), [(1 << 24, 1 << 16), (100, 1), (100, 1 << 16), (1 << 24, 1)])
def test_every_sharding(tmp_path, spans, monkeypatch, spec, block, run) -> None:
    monkeypatch.setattr(m3jax.trees.loading, "_BLOCK", block)
    monkeypatch.setattr(m3jax.trees.loading, "_RUN", run)
    w = numbers(8, 16, 4)
    loaded = load(save(tmp_path, {"w": w}), place(*spec))["w"]
    assert loaded.sharding == place(*spec)
    assert_same(loaded, w)
    assert bytes_of(spans["w"]) == w.nbytes
    if spec == (None, None, "x") and block == 100:
        assert max(size for _, size in spans["w"]) <= block
    if not spec or spec[0] == ("x", "y"):
        assert len(spans["w"]) == (8 if spec else 1)


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_boxes_are_read_once_and_rightly(tmp_path_factory, data) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=4)))
    w = np.arange(np.prod(shape), dtype=np.uint16).reshape(shape)
    cuts = [data.draw(st.sampled_from([k for k in range(1, size + 1) if size % k == 0])) for size in shape]
    grid = [
        tuple((i * n // c, (i + 1) * n // c) for i, n, c in zip(index, shape, cuts, strict=True))
        for index in np.ndindex(*cuts)
    ]
    boxes = data.draw(st.lists(st.sampled_from(grid), unique=True, min_size=1))
    block, run = data.draw(st.sampled_from([(1, 1), (20, 8), (20, 1 << 9), (1 << 20, 4), (1 << 20, 1 << 20)]))
    read: list[tuple[int, int]] = []

    class Source:
        def read_into(self, name, start, out):
            read.append((start, out.nbytes))
            out[:] = np.frombuffer(w.tobytes()[start : start + out.nbytes], np.uint8)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(m3jax.trees.loading, "_BLOCK", block)
        patch.setattr(m3jax.trees.loading, "_RUN", run)
        for band in m3jax.trees.loading._bands(set(boxes)):
            values = m3jax.trees.loading._read(Source(), TensorInfo("w", shape, "U16"), band)
            for box, found in zip(band, values, strict=True):
                assert np.array_equal(found, w[tuple(slice(*bounds) for bounds in box)])
    assert bytes_of(read) >= sum(np.prod([b - a for a, b in box]) * 2 for box in boxes)


def test_long_parts_of_rows_are_read_without_the_rest(spans, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(m3jax.trees.loading, "_RUN", 16)
    w = numbers(4, 16)
    with m3jax.trees.loading.open_model(locate_model(str(save(tmp_path, {"w": w})))) as checkpoint:
        info = checkpoint.tensors["w"]
        (found,) = m3jax.trees.loading._read(checkpoint, info, [((0, 4), (8, 16))])
    np.testing.assert_array_equal(found, w[:, 8:])
    assert spans["w"] == [(64 * row + 32, 32) for row in range(4)]


@pytest.mark.parametrize(("spec", "together"), [(("x",), 1), ((("x", "y"),), 1), (("x", "y"), 2), ((None, "y"), 2)])
def test_only_shards_of_the_same_rows_are_held_together(tmp_path, monkeypatch, spec, together) -> None:
    held = []
    read = m3jax.trees.loading._read
    monkeypatch.setattr(
        m3jax.trees.loading, "_read", lambda c, info, boxes: held.append(len(boxes)) or read(c, info, boxes)
    )
    load(save(tmp_path, {"w": numbers(8, 8)}), place(*spec))
    assert set(held) == {together}


def test_memory_kinds(tmp_path) -> None:
    kind = jax.devices()[0].default_memory().kind
    sharding = NamedSharding(MESH, PartitionSpec("x"), memory_kind=kind)
    assert load(save(tmp_path, {"w": numbers(8)}), sharding)["w"].sharding == sharding


# --- Dtypes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sharding", [None, place("x")])
def test_floats_are_rounded_to_nearest_even(tmp_path, sharding) -> None:
    arrays = {"w": np.float32([1 + 2**-8, 1 + 3 * 2**-8, np.nan, 3.4e38]), "i": np.int32([1, 2, 3, 4])}
    loaded = load(save(tmp_path, arrays), sharding, dtype=jnp.bfloat16)
    assert_same(loaded["w"], arrays["w"].astype(ml_dtypes.bfloat16))
    assert_same(loaded["i"], arrays["i"])


def test_a_cast_that_overflows(tmp_path) -> None:
    loaded = load(save(tmp_path, {"w": np.float32([1e30])}), dtype="float16")
    assert_same(loaded["w"], np.float16([np.inf]))


def test_only_floats_are_cast(tmp_path) -> None:
    with pytest.raises(M3Error, match="dtype is int8, but only floats are cast"):
        load(save(tmp_path, {"w": numbers(2)}), dtype="int8")


def test_64_bits(tmp_path) -> None:
    arrays = {"ids": np.int64([1, -2]), "x": np.float64([0.5, np.nan])}
    loaded = load(save(tmp_path, arrays))
    assert_same(loaded["ids"], arrays["ids"].astype(np.int32))
    assert_same(loaded["x"], arrays["x"].astype(np.float32))
    with jax.enable_x64(True):
        for name, array in load(tmp_path).items():
            assert_same(array, arrays[name])


@pytest.mark.parametrize("array", [np.int64([2**40]), np.uint64([2**63]), np.float64([0.1])])
def test_64_bits_that_32_do_not_hold(tmp_path, array) -> None:
    with pytest.raises(M3Error, match=r"w has .64 values that .*32 does not hold: set jax_enable_x64"):
        load(save(tmp_path, {"w": array}))
    if array.dtype == np.float64:
        assert_same(load(tmp_path, dtype="float32")["w"], array.astype(np.float32))
    with jax.enable_x64(True):
        assert_same(load(tmp_path)["w"], array)


def test_a_dtype_that_jax_does_not_have_now(tmp_path) -> None:
    with pytest.raises(M3Error, match="dtype is float64, which needs jax_enable_x64"):
        load(save(tmp_path, {"w": numbers(2)}), dtype="float64")
