"""What leaves are: kinds, canonical names, what the caller says; and whole states of training."""

import logging

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import freeze
from flax.training.train_state import TrainState
from support import oracle
from support.matrix import same

import m3jax
from m3jax import M3Error
from m3jax.anatomy import Overrides
from m3jax.trees.matching import leaves_of, named_leaves
from m3jax.trees.parts import canonical_leaves, tree_of

SHAPES = {
    "embed.embedding": (10, 4),
    "layers_0.up.kernel": (4, 4),
    "layers_1.up.kernel": (4, 4),
    "head.kernel": (4, 10),
}
CANONICAL = ["embed.embedding", "head.kernel", "layers.0.up.kernel", "layers.1.up.kernel"]
DARE = {"weights": [0.3, 0.7], "sparsify": m3jax.dare(0.5, target="weights"), "key": 3}


def params(seed):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in SHAPES.items()}


def nested(flat, box=lambda x: x):
    tree = {}
    for name, leaf in flat.items():
        *path, last = name.split(".")
        node = tree
        for key in path:
            node = node.setdefault(key, {})
        node[last] = box(leaf)
    return tree


def partitioned(leaf):
    return nn.Partitioned(leaf, names=(None,) * leaf.ndim)


def train_state(flat, wrap=nested, step=0):
    state = TrainState.create(apply_fn=None, params=wrap(flat), tx=optax.adam(1e-3))
    return state.replace(step=step, opt_state=jax.tree.map(lambda x: jnp.full_like(x, step + 1), state.opt_state))


WRAPPED = {
    "flat": dict,
    "nested": nested,
    "params": lambda flat: {"params": nested(flat)},
    "frozen": lambda flat: freeze({"params": nested(flat)}),
    "boxed": lambda flat: {"params": nested(flat, partitioned)},
    "state": lambda flat: nnx.State(nested(flat, nnx.Param)),
    "state of a model": lambda flat: nnx.State({"model": nested(flat, nnx.Param)}),
    "lists": lambda flat: {
        "params": {
            "embed": {"embedding": flat["embed.embedding"]},
            "layers": [{"up": {"kernel": flat[f"layers_{i}.up.kernel"]}} for i in (0, 1)],
            "head": {"kernel": flat["head.kernel"]},
        }
    },
    "train state": train_state,
    "train state of an nnx.State": lambda flat: train_state(flat, lambda f: nnx.State(nested(f, nnx.Param))),
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_boxes_wrappers_and_spellings_change_no_name_and_no_bit(kind):
    trees = [params(0), params(1)]
    made = [WRAPPED[kind](tree) for tree in trees]
    names = canonical_leaves(made[0])
    assert [name for name in sorted(names) if name in CANONICAL] == CANONICAL
    merged = canonical_leaves(m3jax.merge(made, **DARE))
    renamed = [{n.replace("layers_", "layers."): leaf for n, leaf in tree.items()} for tree in trees]
    want = oracle.merge(renamed, weights=DARE["weights"], sparsify="dare", keep=0.5, target="weights", seed=3)
    assert same({name: merged[name] for name in CANONICAL}, want) == (True, [])


def test_trees_that_are_wrapped_differently_are_merged():
    trees = [params(i) for i in range(3)]
    base, *experts = (WRAPPED[kind](tree) for kind, tree in zip(("state", "boxed", "lists"), trees, strict=True))
    merged = m3jax.merge(experts, m3jax.task_arithmetic(), base=base)
    assert isinstance(merged, nnx.State)
    assert same(named_leaves(merged), oracle.merge(trees[1:], trees[0], "task_arithmetic")) == (True, [])


# --- kinds --------------------------------------------------------------------------------------------------------


def test_a_whole_train_state_merges_its_parameters_only_and_says_so(caplog):
    flat = [params(i) for i in range(3)]
    base, a, b = (train_state(tree, step=i) for i, tree in enumerate(flat))
    with caplog.at_level(logging.INFO, logger="m3jax"):
        merged = m3jax.merge([a, b], m3jax.ties(0.5, trim_scope="model"), base=base, weights=[1.5, -0.5])
    assert "9 of kind optimizer, 1 of kind step" in caplog.text
    want = m3jax.merge(flat[1:], m3jax.ties(0.5, trim_scope="model"), base=flat[0], weights=[1.5, -0.5])
    assert same(named_leaves(merged.params), want) == (True, [])
    assert merged.step == 0
    assert all(x is y for x, y in zip(jax.tree.leaves(merged.opt_state), jax.tree.leaves(base.opt_state), strict=True))
    assert all((np.asarray(leaf) >= 0).all() for leaf in jax.tree.leaves(merged.opt_state[0].nu))


class Model(nnx.Module):
    def __init__(self, seed):
        rngs = nnx.Rngs(seed)
        self.up = nnx.Linear(4, 3, rngs=rngs)
        self.bn = nnx.BatchNorm(3, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.bn.mean[...] = jnp.full(3, seed, jnp.float32)
        self.cache = nnx.Cache(jnp.zeros(2))


@pytest.mark.parametrize("whole", [nnx.state, lambda model: model])
def test_modules_with_dropout_and_statistics_merge(whole):
    a, b = Model(1), Model(3)
    merged = nnx.state(m3jax.merge([whole(a), whole(b)], weights=[0.25, 0.75])) if whole is not nnx.state else None
    merged = named_leaves(merged or m3jax.merge([nnx.state(a), nnx.state(b)], weights=[0.25, 0.75]))
    assert merged["bn.mean"].tolist() == [2.5] * 3
    assert same(
        {"k": merged["up.kernel"]}, oracle.merge([{"k": m.up.kernel[...]} for m in (a, b)], weights=[0.25, 0.75])
    )[0]
    assert merged["drop.rngs.key"] is named_leaves(nnx.state(a))["drop.rngs.key"]


def test_an_optimizer_of_nnx_beside_its_model_keeps_its_moments():
    def made(seed):
        model = nnx.Linear(3, 2, rngs=nnx.Rngs(seed))
        optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
        moments = jax.tree.map(lambda x: jnp.full_like(x, seed), nnx.state(optimizer))
        return nnx.State({"model": nnx.state(model), "optimizer": moments})

    a, b = made(1), made(2)
    merged, first = named_leaves(m3jax.merge([a, b])), named_leaves(a)
    kept = [name for name in merged if name.startswith("optimizer")]
    assert len(kept) >= 6
    assert all(merged[name] is first[name] for name in kept)
    want = oracle.merge([{"k": np.asarray(named_leaves(t)["model.kernel"])} for t in (a, b)])["k"]
    assert np.asarray(merged["model.kernel"]).tobytes() == want.tobytes()


@pytest.mark.parametrize(
    ("method", "weights", "mean"),
    [
        (m3jax.linear(), [1.0, 3.0], 2.5),
        (m3jax.task_arithmetic(), None, 2.0),
        (m3jax.task_arithmetic(), [1.0, 3.0], 2.5),
        (m3jax.ties(0.5), [1.0, -1.0], 2.0),
        (m3jax.slerp(), 0.25, 2.0),
        (m3jax.model_stock(), None, 2.0),
    ],
)
def test_running_statistics_get_their_mean_whatever_the_method(method, weights, mean):
    def variables(value):
        kernel = np.random.default_rng(value).standard_normal((3, 2)).astype(np.float32)
        return {"params": {"kernel": kernel}, "batch_stats": {"bn": {"mean": np.full(2, value, np.float32)}}}

    base, a, b = (variables(i) for i in (0, 1, 3))
    sparse = m3jax.dare(0.5) if method.sparsifies else None
    merged = m3jax.merge([a, b], method, base=base, weights=weights, sparsify=sparse, key=1)
    assert np.asarray(merged["batch_stats"]["bn"]["mean"]).tolist() == [mean] * 2


def test_float_buffers_are_copied_and_must_be_equal():
    def tree(value, frequency):
        return {"w.kernel": np.full((2, 2), value, np.float32), "rotary.inv_freq": np.full(3, frequency, np.float32)}

    a, b, other = tree(1, 0.1), tree(2, 0.1), tree(2, 0.2)
    assert m3jax.merge([a, b])["rotary.inv_freq"] is a["rotary.inv_freq"]
    with pytest.raises(M3Error, match=r"what is copied must be equal.*differ: rotary\.inv_freq \(float32\)"):
        m3jax.merge([a, other])
    merged = m3jax.merge([a, other], anatomy={"kinds": {"inv_freq": "parameter"}})
    assert np.allclose(merged["rotary.inv_freq"], 0.15)


def test_factors_of_adapters_are_refused_unless_one_insists():
    def tree(seed):
        return nnx.state(nnx.LoRALinear(4, 3, lora_rank=2, rngs=nnx.Rngs(seed)))

    a, b = tree(1), tree(2)
    with pytest.raises(M3Error, match=r"lora\.lora_a: is a factor of an adapter.*merge these by lora=SCALE"):
        m3jax.merge([a, b])
    merged = named_leaves(m3jax.merge([a, b], only=lambda name: "lora" not in name))
    assert merged["lora.lora_a"] is named_leaves(a)["lora.lora_a"]
    merged = named_leaves(m3jax.merge([a, b], anatomy=Overrides(kinds={"lora": "parameter"})))
    want = oracle.merge([{"k": np.asarray(named_leaves(t)["lora.lora_a"])} for t in (a, b)])["k"]
    assert np.asarray(merged["lora.lora_a"]).tobytes() == want.tobytes()


def test_quantised_weights_are_refused():
    tree = {"up": {"kernel": {"qvalue": np.ones((2, 2), np.int8), "scale": np.ones(2, np.float32)}}}
    with pytest.raises(M3Error, match=r"up\.kernel\.qvalue: is of a quantised weight.*dequantise it first"):
        m3jax.merge([tree, tree])


def test_a_selection_of_training_state_alone_is_refused():
    with pytest.raises(M3Error, match=r"all that it selects is of kind optimizer, which is never merged"):
        m3jax.merge([train_state(params(0)), train_state(params(1))], only="opt_state")


def test_what_the_caller_says_outranks_types():
    tree = nnx.State({"a": nnx.Param(jnp.ones(2)), "b": nnx.BatchStat(jnp.ones(2))})
    said = {"kinds": {"^a$": "buffer", "^b$": "parameter"}}
    found = tree_of(leaves_of(tree), said)
    assert {name: part.kind for name, part in found.parts.items()} == {"a": "buffer", "b": "parameter"}
    for wrong, sentence in (
        ({"stack": {}}, "no key 'stack'"),
        ({"kinds": {"nowhere": "buffer"}}, "'nowhere' is found in no tensor's name"),
        ({"kinds": {"a": "weight"}}, "'weight' is no kind"),
        ({"blocks": 3}, "blocks: 3 is of type int"),
        ("layers", "is of type str"),
    ):
        with pytest.raises(M3Error, match=sentence):
            m3jax.merge([tree, tree], anatomy=wrong)


def test_tied_leaves_are_merged_once():
    """The copy has a mask of its own by its name, which would untie it."""
    shapes = {"embed.embedding": (10, 4), "layers.0.kernel": (4, 4), "head.kernel": (10, 4)}
    rng = np.random.default_rng(0)
    trees = [{name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()} for _ in range(2)]
    for tree in trees:
        tree["lm_head.kernel"] = tree.pop("head.kernel")
    untied = m3jax.merge(trees, **DARE, anatomy={"tied": True})  # its values say that it is none
    assert not np.array_equal(untied["lm_head.kernel"], untied["embed.embedding"])
    for tree in trees:
        tree["lm_head.kernel"] = tree["embed.embedding"].copy()
    tied = m3jax.merge(trees, **DARE, anatomy={"tied": True})
    assert np.array_equal(tied["lm_head.kernel"], tied["embed.embedding"])
    assert np.array_equal(tied["embed.embedding"], untied["embed.embedding"])


# --- calls gone wrong ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda a, b: m3jax.merge(a, b), r"takes its trees as one list: call m3jax\.merge\(\[a, b\]"),
        (lambda a, b: m3jax.merge([a], b), r"method: is of type dict: trees go into one list"),
        (
            lambda a, b: m3jax.merge([a, b], "ties"),
            r"method: is the text 'ties': call its function instead.*m3jax\.ties",
        ),
        (lambda a, b: m3jax.merge([a, b], m3jax.ties), r"method: is the function ties itself: call it, m3jax\.ties\("),
        (lambda a, b: m3jax.merge([a, b], sparsify=m3jax.dare), r"sparsify: is the function dare itself"),
        (lambda a, b: m3jax.merge([a, b], m3jax.dare(0.5)), r"method: dare is a sparsifier: pass sparsify=dare"),
        (lambda a, b: m3jax.merge([a, b], sparsify=0.5), r"sparsify: is of type float"),
    ],
)
def test_slips_of_the_hand_get_a_sentence(call, sentence):
    with pytest.raises(M3Error, match=sentence):
        call({"w": np.ones(2, np.float32)}, {"w": np.ones(2, np.float32)})
