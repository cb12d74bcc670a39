"""Trees of every kind that Flax users have: names, types, what is merged, how trees differ."""

import dataclasses

import chex
import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import FrozenDict, freeze
from flax.training.train_state import TrainState
from support import oracle
from support.matrix import same

import m3jax
from m3jax import M3Error
from m3jax.trees.merging import leaf_name, named_leaves

ARRAYS = {"w": (6, 4), "block.bias": (4,), "block.inner.kernel": (4, 3)}
DARE = {"weights": [0.3, 0.7], "sparsify": m3jax.dare(0.5, target="weights"), "key": 3}


def params(seed):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in ARRAYS.items()}


def nested(flat):
    tree = {}
    for name, leaf in flat.items():
        *path, last = name.split(".")
        inner = tree
        for key in path:
            inner = inner.setdefault(key, {})
        inner[last] = leaf
    return tree


@chex.dataclass
class Chex:
    w: jax.Array
    block: dict


@flax.struct.dataclass
class Struct:
    w: jax.Array
    block: dict
    heads: int = flax.struct.field(pytree_node=False, default=3)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Plain:
    w: jax.Array
    block: dict


def state_of(flat):
    return nnx.State(jax.tree.map(nnx.Param, nested(flat)))


def boxed(flat):
    return jax.tree.map(lambda x: nn.Partitioned(x, names=(None,) * x.ndim), nested(flat))


KINDS = {
    "nested": nested,
    "flat": dict,
    "frozen": lambda flat: freeze(nested(flat)),
    "state": state_of,
    "partitioned": boxed,
    "chex": lambda flat: Chex(**nested(flat)),
    "struct": lambda flat: Struct(**nested(flat)),
    "dataclass": lambda flat: Plain(**nested(flat)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_tree_has_the_dicts_names_and_bits_and_keeps_its_type(kind):
    trees = [params(0), params(1)]
    made = [KINDS[kind](tree) for tree in trees]
    assert set(named_leaves(made[0])) == set(ARRAYS)
    merged = m3jax.merge(made, **DARE)
    chex.assert_trees_all_equal_shapes_and_dtypes(merged, made[0])
    want = oracle.merge(trees, weights=DARE["weights"], sparsify="dare", keep=0.5, target="weights", seed=3)
    assert same(named_leaves(merged), want) == (True, [])
    under_jit = jax.jit(lambda trees: m3jax.merge(trees, **DARE))(made)
    chex.assert_trees_all_equal_shapes_and_dtypes(under_jit, made[0])
    assert same(named_leaves(under_jit), want) == (True, [])


def test_kinds_may_be_mixed_and_the_base_is_the_template():
    trees = [params(i) for i in range(3)]
    merged = m3jax.merge([trees[1], freeze(nested(trees[2]))], m3jax.task_arithmetic(), base=state_of(trees[0]))
    assert isinstance(merged, nnx.State)
    assert isinstance(merged["block"]["bias"], nnx.Param)
    assert same(named_leaves(merged), oracle.merge(trees[1:], trees[0], "task_arithmetic")) == (True, [])


def test_an_attribute_called_value_stays_in_its_name():
    @flax.struct.dataclass
    class Scale:
        value: jax.Array

    assert list(named_leaves({"scale": Scale(jnp.ones(1)), "p": nnx.Param(jnp.ones(1))})) == ["p", "scale.value"]
    path = jax.tree_util.tree_flatten_with_path({"a": [Scale(1.0)]})[0][0][0]
    assert leaf_name(path) == "a.0.value"


def test_modules_and_their_states_have_the_same_names():
    module = nnx.Sequential(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), nnx.Linear(3, 2, rngs=nnx.Rngs(1)))
    other = nnx.Sequential(nnx.Linear(4, 3, rngs=nnx.Rngs(2)), nnx.Linear(3, 2, rngs=nnx.Rngs(3)))
    names = ["layers.0.bias", "layers.0.kernel", "layers.1.bias", "layers.1.kernel"]
    assert sorted(named_leaves(module)) == sorted(named_leaves(nnx.state(module))) == names
    merged = m3jax.merge([module, other], weights=[0.25, 0.75])
    want = m3jax.merge([nnx.state(module), nnx.state(other)], weights=[0.25, 0.75])
    assert isinstance(merged, nnx.Sequential)
    assert same(named_leaves(nnx.state(merged)), named_leaves(want)) == (True, [])
    assert merged(jnp.ones((1, 4))).shape == (1, 2)


def variables(seed):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.BatchNorm(use_running_average=True)(nn.Dense(3)(x))

    made = Model().init(jax.random.key(seed), jnp.ones((1, 4)))
    return {"params": made["params"], "batch_stats": jax.tree.map(lambda s: s + seed, made["batch_stats"])}


@pytest.mark.parametrize("wrap", [dict, freeze])
def test_linen_collections_that_are_not_merged_come_from_the_template(wrap):
    a, b, base = (variables(i) for i in range(3))
    merged = m3jax.merge([wrap(a), wrap(b)], weights=[0.25, 0.75], only="params")
    assert isinstance(merged, FrozenDict if wrap is freeze else dict)
    assert merged["batch_stats"]["BatchNorm_0"]["mean"] is a["batch_stats"]["BatchNorm_0"]["mean"]
    inner = m3jax.merge([{"params": t["params"]} for t in (a, b)], weights=[0.25, 0.75])
    assert same(named_leaves(merged["params"]), named_leaves(inner["params"])) == (True, [])
    of_base = m3jax.merge([wrap(a), wrap(b)], m3jax.task_arithmetic(), base=wrap(base), only=["params"])
    assert of_base["batch_stats"]["BatchNorm_0"]["var"] is base["batch_stats"]["BatchNorm_0"]["var"]
    everything = m3jax.merge([wrap(a), wrap(b)], weights=[0.25, 0.75])
    assert np.asarray(everything["batch_stats"]["BatchNorm_0"]["mean"]).tolist() == [0.75] * 3


def test_what_is_not_merged_need_not_be_there_in_the_other_trees():
    a, b = variables(0), variables(1)
    merged = m3jax.merge([a, {"params": b["params"], "cache": {"x": jnp.ones(2)}}], only="params")
    assert set(merged) == {"params", "batch_stats"}


@pytest.mark.parametrize("only", ["params", nnx.Param, lambda name: "mean" not in name and "var" not in name])
def test_variables_of_nnx_are_selected_by_collection_type_or_name(only):
    def made(seed):
        model = nnx.Sequential(
            nnx.Linear(4, 3, rngs=nnx.Rngs(seed)),
            nnx.BatchNorm(3, rngs=nnx.Rngs(seed)),
            nnx.Dropout(0.5, rngs=nnx.Rngs(7)),
        )
        model.layers[1].mean[...] = jnp.full(3, seed, jnp.float32)
        return nnx.state(model)

    a, b = made(1), made(2)
    merged = m3jax.merge([a, b], only=only)
    assert named_leaves(merged)["layers.1.mean"] is named_leaves(a)["layers.1.mean"]
    kernels = [np.asarray(named_leaves(s)["layers.0.kernel"]) for s in (a, b)]
    want = oracle.merge([{"k": k} for k in kernels])["k"]
    assert np.asarray(named_leaves(merged)["layers.0.kernel"]).tobytes() == want.tobytes()


def test_random_states_are_the_templates():
    def made(seed):
        dropout = nnx.state(nnx.Dropout(0.5, rngs=nnx.Rngs(seed)))
        return dropout, {"w": jnp.full(2, seed, jnp.float32), "salt": jax.random.key(seed)}

    first = made(1)
    merged, template = named_leaves(m3jax.merge([first, made(3)])), named_leaves(first)
    for name in ("0.rngs.key", "0.rngs.count", "1.salt"):
        assert merged[name] is template[name]
    assert merged["1.w"].tolist() == [2.0, 2.0]


def test_a_train_state_keeps_its_step_and_optimizer():
    def made(seed, step):
        state = TrainState.create(apply_fn=None, params=state_of(params(seed)), tx=optax.adam(1e-3))
        return state.replace(step=step)

    a, b = made(0, 5), made(1, 9)
    merged = m3jax.merge([a, b], weights=[0.25, 0.75], only="params")
    assert isinstance(merged, TrainState)
    assert merged.step == 5
    assert all(x is y for x, y in zip(jax.tree.leaves(merged.opt_state), jax.tree.leaves(a.opt_state), strict=True))
    want = m3jax.merge([{"params": a.params}, {"params": b.params}], weights=[0.25, 0.75])
    assert same(named_leaves(merged.params), named_leaves(want["params"])) == (True, [])


def test_a_selection_of_nothing_names_the_collections():
    with pytest.raises(M3Error, match="its collections are batch_stats, params"):
        m3jax.merge([variables(0), variables(1)], only="param")
    with pytest.raises(M3Error, match="its collections are block, params, w"):
        m3jax.merge([state_of(params(0)), state_of(params(1))], only="batch_stats")


def test_every_difference_is_listed_once():
    one = {"a": np.ones(2, np.float32), "b": np.ones(3, np.float32), "c": np.ones(1, np.float32), "i": np.arange(3)}
    other = {"b": np.ones((3, 1), np.float32), "c": np.ones(1, np.int32), "d": np.ones(2), "i": np.arange(3) + 1}
    with pytest.raises(M3Error) as caught:
        m3jax.merge([one, other, one])
    assert str(caught.value) == (
        "the trees to merge differ: missing in expert 1: a; in expert 1 but not in expert 0: d; "
        "shapes in expert 0 and expert 1 differ: b ([3] and [3, 1]); "
        "dtypes in expert 0 and expert 1 cannot be merged: c (float32 and int32); "
        "only parameters of float32, bfloat16, float16 are merged; what is copied must be equal, "
        "but in expert 0 and expert 1 differ: i (int64)"
    )


def test_many_differences_are_counted():
    one = {f"w{i:02}": np.ones(1, np.float32) for i in range(40)}
    with pytest.raises(M3Error, match=r"missing in expert 1: w01, w02, .*, w10 and 29 more$"):
        m3jax.merge([one, {"w00": one["w00"]}])


def test_float_dtypes_may_differ_and_each_is_widened():
    experts = [{"w": jnp.full(5, 1 / 3, d)} for d in (jnp.float32, jnp.bfloat16, jnp.float16)]
    got = m3jax.merge(experts)
    assert got["w"].dtype == jnp.float32
    assert same(got, oracle.merge([{"w": np.asarray(t["w"])} for t in experts])) == (True, [])
