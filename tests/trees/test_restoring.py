"""load(path, like=…): the caller's own type, dtypes and shardings."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from flax import linen, nnx
from flax.training.train_state import TrainState
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from support.directories import write

import m3jax
from m3jax import M3Error

ROWS = NamedSharding(Mesh(np.array(jax.devices()), ("x",)), PartitionSpec("x"))
KERNEL, BIAS = np.arange(32, dtype=np.float32).reshape(8, 4) / 3, np.ones(4, np.float32)


class Model(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(8, 4, rngs=rngs)])
        self.dropout = nnx.Dropout(0.1, rngs=rngs)


@pytest.fixture
def saved(tmp_path):
    return write(tmp_path / "saved", {"layers.0.kernel": KERNEL, "layers.0.bias": BIAS})


def test_plain_dicts_have_the_dtypes_and_shardings_of_like(saved):
    like = {
        "params": {
            "layers": [
                {
                    "kernel": jax.ShapeDtypeStruct((8, 4), jnp.bfloat16, sharding=ROWS),
                    "bias": np.zeros(4, np.float16),
                }
            ]
        }
    }
    layer = m3jax.load(saved, like=like)["params"]["layers"][0]
    assert layer["kernel"].sharding == ROWS
    assert np.asarray(layer["kernel"]).tobytes() == KERNEL.astype(ml_dtypes.bfloat16).tobytes()
    assert (type(layer["bias"]), layer["bias"].dtype) == (np.ndarray, np.float16)
    whole = m3jax.load(saved, like=like, dtype="float32")["params"]["layers"][0]["kernel"]
    assert (np.asarray(whole).tolist(), whole.sharding) == (KERNEL.tolist(), ROWS)


def test_states_and_modules_of_nnx(saved):
    model = Model(nnx.Rngs(0))
    loaded = m3jax.load(saved, like=model)
    assert isinstance(loaded, Model)
    assert np.asarray(loaded.layers[0].kernel[...]).tolist() == KERNEL.tolist()
    assert loaded.dropout.rngs is not None
    state = m3jax.load(saved, like=nnx.state(model, nnx.Param))
    assert isinstance(state, nnx.State)
    assert isinstance(state["layers"][0]["kernel"], nnx.Param)
    shapes = nnx.state(nnx.eval_shape(lambda: Model(nnx.Rngs(0))), nnx.Param)
    assert m3jax.digest(m3jax.load(saved, like=shapes)) == m3jax.digest(state)
    with pytest.raises(M3Error, match=r"is of kind random, which .* does not have, and like has its shape alone"):
        m3jax.load(saved, like=nnx.eval_shape(lambda: Model(nnx.Rngs(0))))


def test_blocks_are_stacked_as_in_like(tmp_path):
    kernels, biases = np.arange(96, dtype=np.float32).reshape(3, 8, 4), np.arange(12, dtype=np.float32).reshape(3, 4)
    each = {f"layers_{i}.kernel": kernels[i] for i in range(3)} | {f"layers_{i}.bias": biases[i] for i in range(3)}
    apart = write(tmp_path / "apart", each)
    second = {"layers.kernel": np.stack(kernels, 1), "layers.bias": np.stack(biases, 1)}
    stacked = write(tmp_path / "stacked", second)
    wanted = {"layers": {"kernel": kernels, "bias": biases}}
    like = {"params": jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), wanted)}
    for path in (apart, stacked):
        loaded = m3jax.load(path, like=like, anatomy={"stacked": {"layers": 0}})["params"]
        assert jax.tree.map(lambda x: x.tolist(), loaded) == jax.tree.map(lambda x: x.tolist(), wanted)
    ones = {"layers": [{"kernel": kernels[0] * 0, "bias": biases[0] * 0} for _ in range(3)]}
    loaded = m3jax.load(stacked, like=ones)["layers"]
    assert [layer["kernel"].tolist() for layer in loaded] == kernels.tolist()
    assert [layer["bias"].tolist() for layer in loaded] == biases.tolist()


def test_train_states_keep_what_the_checkpoint_lacks(tmp_path):
    module = linen.Dense(4)
    params = module.init(jax.random.key(0), jnp.ones((1, 8)))["params"]
    like = TrainState.create(apply_fn=module.apply, params=params, tx=optax.adam(0.1))
    weights = write(tmp_path / "weights", {"params.kernel": KERNEL, "params.bias": BIAS})
    loaded = m3jax.load(weights, like=like)
    assert isinstance(loaded, TrainState)
    assert np.asarray(loaded.params["kernel"]).tolist() == KERNEL.tolist()
    assert loaded.step == like.step
    assert loaded.opt_state[0].mu["kernel"] is like.opt_state[0].mu["kernel"]
    moments = {f"opt_state.0.{m}.kernel": KERNEL for m in ("mu", "nu")} | {
        f"opt_state.0.{m}.bias": BIAS for m in ("mu", "nu")
    }
    whole = {"params.kernel": KERNEL, "params.bias": BIAS, "step": np.int32(7), "opt_state.0.count": np.int32(7)}
    loaded = m3jax.load(write(tmp_path / "whole", whole | moments), like=like.replace(step=0))
    assert (type(loaded.step), loaded.step, int(loaded.opt_state[0].count)) == (int, 7, 7)
    assert np.asarray(loaded.opt_state[0].nu["kernel"]).tolist() == KERNEL.tolist()
    with pytest.raises(M3Error, match=r"of like's optimizer state but not opt_state\.0\.mu\.bias"):
        m3jax.load(write(tmp_path / "part", whole), like=like)


def test_what_differs_is_named_on_both_sides(saved, tmp_path):
    kernel = jax.ShapeDtypeStruct((8, 4), np.float32)
    for like, said in (
        ({"layers.0.kernel": kernel}, r"layers\.0\.bias of it is not in like \(1 tensors in all\)"),
        (
            {"layers.0.kernel": kernel, "layers.0.scale": kernel},
            r"layers\.0\.scale of like is not in it .*, and layers\.0\.bias of",
        ),
        (
            {"layers.0.kernel": kernel, "layers.0.bias": kernel},
            r"bias: has shape \[8, 4\] in like, but \[4\] as layers",
        ),
        (
            {"layers.0.kernel": kernel, "layers.0.bias": np.zeros(4, np.int32)},
            r"bias: is of dtype int32 in like, but float32 as layers\.0\.bias: only floats are cast",
        ),
    ):
        with pytest.raises(M3Error, match=said):
            m3jax.load(saved, like=like)
    with pytest.raises(M3Error, match="give one"):
        m3jax.load(saved, ROWS, like={"layers.0.kernel": kernel})
