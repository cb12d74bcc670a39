"""Flax trees: every layout tells its blocks, and one model gives the same tensors of blocks in each of them."""

import jax
import jax.numpy as jnp
import optax
import pytest
from anatomy.trees import by_block, infos, of_tree
from flax import linen, nnx
from flax.training.train_state import TrainState

from m3jax.anatomy import Overrides, anatomy_of, block_name, block_position, canonical_names, group_of
from m3jax.checkpoints import open_checkpoint

WIDTH, DEPTH, WORDS = 8, 3, 40


# --- Models ------------------------------------------------------------------------------------------------


class Block(linen.Module):
    boxed: bool = False

    @linen.compact
    def __call__(self, x, _):
        init = linen.initializers.lecun_normal()
        init = linen.with_partitioning(init, (None, None)) if self.boxed else init
        x = linen.LayerNorm(name="norm")(x)
        x = linen.Dense(12, kernel_init=init, name="up")(x)
        x = linen.BatchNorm(use_running_average=True, name="bn")(x)
        return linen.Dense(WIDTH, name="down")(x), None


class Model(linen.Module):
    axis: int | None = None
    boxed: bool = False

    @linen.compact
    def __call__(self, tokens):
        x = linen.Embed(WORDS, WIDTH, name="embed")(tokens)
        if self.axis is None:
            for i in range(DEPTH):
                x, _ = Block(self.boxed, name=f"layers_{i}")(x, None)
        else:
            scanned = linen.scan(
                Block,
                variable_axes={"params": self.axis, "batch_stats": 0},
                split_rngs={"params": True},
                length=DEPTH,
                metadata_params={linen.PARTITION_NAME: "layers"},
            )
            x, _ = scanned(self.boxed, name="layers")(x, None)
        return linen.Dense(WORDS, name="head")(linen.LayerNorm(name="final")(x))


def linen_variables(axis=None, boxed=False):
    model = Model(axis, boxed)
    return jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32)))


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 12, rngs=rngs)
        self.bn = nnx.BatchNorm(12, rngs=rngs)
        self.drop = nnx.Dropout(0.1, rngs=rngs)
        self.down = nnx.Linear(12, WIDTH, rngs=rngs)


class NnxModel(nnx.Module):
    def __init__(self, rngs, stacked):
        self.embed = nnx.Embed(WORDS, WIDTH, rngs=rngs)
        if stacked:
            create = nnx.split_rngs(splits=DEPTH)(nnx.vmap(NnxBlock, in_axes=0, out_axes=0))
            self.layers = create(rngs)
        else:
            self.layers = nnx.List([NnxBlock(rngs) for _ in range(DEPTH)])
        self.final = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, WORDS, rngs=rngs)


def nnx_tensors(stacked, box=True):
    state = nnx.state(NnxModel(nnx.Rngs(0), stacked))
    flat = {".".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}
    found = {}
    for name, leaf in flat.items():
        found |= of_tree({name: {"value": leaf} if box else leaf})
    return found


def told(tensors, **more):
    found = anatomy_of(tensors, **more)
    assert not [part.doubt for part in found.parts.values() if part.doubt]
    return by_block(found, tensors)


EXPECTED = {
    **{
        f"layers.{i}.{name}": (shape, f"layers.{i}", i)
        for i in range(DEPTH)
        for name, shape in {
            "norm.scale": (8,),
            "norm.bias": (8,),
            "up.kernel": (8, 12),
            "up.bias": (12,),
            "bn.scale": (12,),
            "bn.bias": (12,),
            "down.kernel": (12, 8),
            "down.bias": (8,),
        }.items()
    },
    "embed.embedding": ((40, 8), "outside blocks", None),
    "final.scale": ((8,), "outside blocks", None),
    "final.bias": ((8,), "outside blocks", None),
    "head.kernel": ((8, 40), "outside blocks", None),
    "head.bias": ((40,), "outside blocks", None),
}
DEPTH_CONFIG = {"num_layers": DEPTH}


def parameters(found):
    return {name: value for name, value in found.items() if not name.endswith((".mean", ".var"))}


# --- linen and NNX -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize("boxed", [False, True])
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("config", [None, DEPTH_CONFIG])
def test_linen(axis, boxed, wrapped, config):
    variables = linen_variables(axis, boxed)
    tensors = of_tree({"params": variables["params"]} if wrapped else variables["params"])
    assert told(tensors, config=config) == EXPECTED


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_linens_statistics_go_with_their_block(axis):
    tensors = of_tree(linen_variables(axis))
    found = anatomy_of(tensors, DEPTH_CONFIG)
    blocks = by_block(found, tensors)
    assert parameters(blocks) == EXPECTED
    statistics = {name: value for name, value in blocks.items() if name not in EXPECTED}
    assert {(shape, block) for shape, _, block in statistics.values()} == {((12,), i) for i in range(DEPTH)}
    assert {part.kind for name, part in found.parts.items() if "batch_stats" in name} == {"statistics"}


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("box", [False, True])
def test_nnx(stacked, box):
    tensors = nnx_tensors(stacked, box)
    found = anatomy_of(tensors, DEPTH_CONFIG)
    blocks = by_block(found, tensors)
    assert parameters(blocks) == EXPECTED
    assert {n for n in blocks if n not in EXPECTED} == {
        f"layers.{i}.bn.{s}" for i in range(DEPTH) for s in ("mean", "var")
    }
    assert {part.kind for name, part in found.parts.items() if "rngs" in name} == {"random"}
    assert found.towers["model"] == ("model", DEPTH, stacked)
    assert (found.embedding, found.head, found.ties_embeddings) == (
        *((f"{name}.value" if box else name) for name in ("embed.embedding", "head.kernel")),
        False,
    )
    assert found.parts[found.embedding].vocabulary_axis == 0
    assert found.parts[found.head].vocabulary_axis == 1


# --- Train states ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_train_state_of_flax(axis):
    def create():
        variables = Model(axis).init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
        return TrainState.create(apply_fn=None, params=variables["params"], tx=optax.adamw(1e-3))

    state = jax.eval_shape(create)
    tensors = of_tree({"params": state.params, "opt_state": state.opt_state, "step": jnp.zeros((), jnp.int32)})
    found = anatomy_of(tensors, DEPTH_CONFIG)
    assert by_block(found, tensors) == EXPECTED
    assert found.parts["step"].kind == "step"
    assert {part.kind for name, part in found.parts.items() if name.startswith("opt_state")} == {"optimizer"}


def test_optimizer_of_nnx():
    model = NnxModel(nnx.Rngs(0), stacked=False)
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
    flat = {".".join(map(str, p)): leaf.get_value() for p, leaf in nnx.to_flat_state(nnx.state(optimizer))}
    tensors = {}
    for name, info in nnx_tensors(stacked=False, box=True).items():
        tensors[f"model.{name}"] = info._replace(name=f"model.{name}")
    for name, leaf in flat.items():
        tensors |= of_tree({"optimizer": {name: {"value": leaf}}})
    found = anatomy_of(tensors)
    assert parameters(by_block(found, tensors)) == EXPECTED
    kinds = {name: part.kind for name, part in found.parts.items() if name.startswith("optimizer")}
    assert len(kinds) > 20
    assert kinds.pop("optimizer.step.value") == "step"
    assert set(kinds.values()) == {"optimizer"}


def test_train_state_of_kauldron():
    variables = of_tree(linen_variables())
    tensors = {}
    for name, info in variables.items():
        stored = name if name.startswith("params.") else f"collections.{name}"
        tensors[stored] = info._replace(name=stored)
        for moment in ("mu", "nu"):
            tensors[f"opt_state.0.{moment}.{name}"] = info._replace(name=f"opt_state.0.{moment}.{name}")
    tensors |= infos({"step": (), "opt_state.0.count": ()}, "I32") | infos({"training_time_hours": ()})
    found = anatomy_of(tensors)
    assert parameters(by_block(found, tensors)) == EXPECTED
    assert {part.kind for n, part in found.parts.items() if n.startswith("opt_state")} == {"optimizer"}
    assert [found.parts[name].kind for name in ("step", "training_time_hours")] == ["step", "step"]


# --- MaxText -----------------------------------------------------------------------------------------------

LEAVES = {
    "mlp.wi_0.kernel": (8, 12),
    "mlp.wo.kernel": (12, 8),
    "pre_self_attention_layer_norm.scale": (8,),
    "self_attention.query.kernel": (8, 2, 4),
    "self_attention.out.kernel": (2, 4, 8),
}
OUTER = {
    "decoder.decoder_norm.scale": (8,),
    "token_embedder.embedding": (40, 8),
    "decoder.logits_dense.kernel": (8, 40),
}


def maxtext(lists, prefix="params."):
    """A tree with the leaves of a block below each path; `(path, count, axis)` stacks them, `(path, None, 0)` not."""
    shapes = dict(OUTER)
    for path, count, axis in lists:
        for leaf, shape in LEAVES.items():
            stacked = shape if count is None else (*shape[:axis], count, *shape[axis:])
            shapes[f"decoder.{path}.{leaf}"] = stacked
    return infos({f"{prefix}{name}": shape for name, shape in shapes.items()})


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("more", [{}, {"config": {"num_hidden_layers": 5}}, {"config": {"base_num_decoder_layers": 5}}])
def test_maxtext_scanned_is_maxtext_unscanned(axis, more):
    unscanned = told(maxtext([(f"layers_{i}", None, 0) for i in range(5)]))
    assert unscanned["decoder.layers.3.mlp.wi_0.kernel"] == ((8, 12), "decoder.layers.3", 3)
    assert told(maxtext([("layers", 5, axis)]), **more) == unscanned
    assert told(maxtext([("layers", 5, axis)], prefix="params.params."), **more) == unscanned
    assert (
        told(maxtext([("layers", 5, axis)]), metadata={"scan_layers": "true", "param_scan_axis": str(axis)})
        == unscanned
    )


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("container", ["layers", "scanned_blocks"])
@pytest.mark.parametrize("left", [0, 2])
def test_maxtext_repeats_a_cycle_of_unlike_blocks(axis, container, left):
    cycle = [(f"{container}.layers_{j}", 4, axis) for j in range(3)]
    cycle += [(f"layers_remainder.layers_{j}", None, 0) for j in range(left)]
    unscanned = told(maxtext([(f"layers_{i}", None, 0) for i in range(12 + left)]))
    assert told(maxtext(cycle)) == unscanned
    assert told(maxtext(cycle), config={"num_hidden_layers": 12 + left}) == unscanned
    tensors = maxtext(cycle)
    found = anatomy_of(tensors)
    name = f"params.decoder.{container}.layers_2.mlp.wo.kernel"
    assert found.parts[name].blocks == (2, 5, 8, 11)
    assert block_name(name, found.parts[name], 8) == "decoder.layers.8.mlp.wo.kernel"
    assert block_position(found, name, 8) == 8 / (11 + left)


def test_maxtext_dense_blocks_come_before_moe_blocks():
    unscanned = maxtext(
        [(f"dense_layers_{i}", None, 0) for i in range(2)] + [(f"moe_layers_{i}", None, 0) for i in range(3)]
    )
    expected = told(unscanned)
    assert expected["decoder.moe_layers.1.mlp.wo.kernel"] == ((12, 8), "decoder.moe_layers.1", 3)
    assert told(maxtext([("dense_layers", 2, 1), ("moe_layers", 3, 1)])) == expected
    assert told(maxtext([("dense_layers", 2, 1), ("moe_layers", 3, 1)]), config={"num_hidden_layers": 5}) == expected


def test_lists_in_lists_that_do_not_stack():
    found = told(maxtext([(f"layers.layers_{i}", None, 0) for i in range(4)]))
    assert found["decoder.layers.layers.2.mlp.wo.kernel"] == ((12, 8), "decoder.layers.layers.2", 2)


# --- Gemma and other towers -----------------------------------------------------------------------------------

GEMMA = {
    "attn.attn_vec_einsum.w": (2, 4, 8),
    "attn.q_einsum.w": (2, 8, 4),
    "mlp.gating_einsum": (2, 8, 12),
    "mlp.linear": (12, 8),
    "pre_attention_norm.scale": (8,),
}


def gemma(spelled, stacked=None, join="."):
    shapes = {"transformer.embedder.input_embedding": (40, 8), "transformer.final_norm.scale": (8,)}
    for path in spelled:
        for leaf, shape in GEMMA.items():
            shapes[f"transformer.{path}.{leaf}"] = shape if stacked is None else (stacked, *shape)
    if join == "/":
        return infos({"/".join(name.split(".")[:-1]) + "." + name.split(".")[-1]: s for name, s in shapes.items()})
    return infos(shapes)


def test_gemma_nested_flat_and_stacked_agree():
    nested = told(gemma([f"layer_{i}" for i in range(12)]))
    assert nested["layers.7.mlp.linear"] == ((12, 8), "layers.7", 7)
    assert told(gemma([f"layer_{i}" for i in range(12)], join="/")) == nested
    assert told(gemma([f"stacked_layers.attention_type_{j}" for j in range(6)], stacked=2)) == nested
    bare = {n.removeprefix("transformer."): i for n, i in gemma([f"layer_{i}" for i in range(12)]).items()}
    assert told({name: info._replace(name=name) for name, info in bare.items()}) == nested
    assert anatomy_of(gemma(["layer_0"])).family == "gemma"


def test_two_towers_each_stacked_to_its_own_depth():
    tensors = {}
    for tower, depth in (("llm.layers", 4), ("img.Transformer.encoderblock", 5)):
        tensors |= infos({f"params.{tower}.{leaf}": (depth, *shape) for leaf, shape in GEMMA.items()})
    tensors |= infos({"params.llm.embedder.input_embedding": (40, 8), "params.img.embedding.kernel": (4, 4, 3, 8)})
    found = anatomy_of(tensors)
    assert {tower.name: tower.depth for tower in found.towers.values()} == {"text": 4, "vision": 5}
    assert (
        group_of(found, "params.img.Transformer.encoderblock.mlp.linear", "layer", 4)
        == "img.Transformer.encoderblock.4"
    )
    assert found.parts["params.img.embedding.kernel"].tower == "vision"
    assert block_position(found, "params.llm.layers.mlp.linear", 1) == 1 / 3
    assert block_position(found, "params.img.Transformer.encoderblock.mlp.linear", 1) == 1 / 4


@pytest.mark.parametrize(
    ("spelling", "group"),
    [
        ("encoderblock_3", "encoderblock.3"),
        ("block_3", "blocks.3"),
        ("blocks.3", "blocks.3"),
        ("h_3", "h.3"),
        ("h.3", "h.3"),
        ("layer_3", "layers.3"),
        ("layers.3", "layers.3"),
        ("TransformerBlock_3", "TransformerBlock_3"),
        ("encoder.layer.3", "encoder.layers.3"),
        ("transformer.layer_3", "transformer.layers.3"),
    ],
)
def test_spellings(spelling, group):
    names = [f"params.{spelling.replace('3', str(i))}.dense.kernel" for i in range(4)]
    found = anatomy_of(infos(dict.fromkeys(names, (4, 4))))
    assert [part.block for part in found.parts.values()] == [0, 1, 2, 3]
    assert group_of(found, names[3], "layer") == group
    assert found.towers["model"].depth == 4


# --- What cannot be told, and who tells it -------------------------------------------------------------------


AMBIGUOUS = {"layers.a.scale": (5, 4), "layers.b.scale": (5, 4), "embed.embedding": (40, 8)}


def test_an_ambiguous_axis_is_a_doubt():
    found = anatomy_of(infos(AMBIGUOUS))
    part = found.parts["layers.a.scale"]
    assert part.stack_axis is None
    assert part.blocks == ()
    assert "anatomy: {stacked: {'layers': AXIS}}" in part.doubt
    assert part.doubt in found.notes


def test_two_axes_of_one_size_are_a_doubt_even_where_the_depth_is_known():
    found = anatomy_of(infos({"layers.w.kernel": (4, 4, 6), "layers.s.scale": (4, 4)}), {"num_layers": 4})
    assert "4 along axis 0 or 4 along axis 1" in found.parts["layers.w.kernel"].doubt


def test_no_common_axis_is_a_doubt():
    found = anatomy_of(infos({"layers.w.kernel": (4, 5, 6), "layers.v.kernel": (3, 7, 8)}))
    assert "no axis is common" in found.parts["layers.w.kernel"].doubt


def test_a_depth_that_no_axis_has_is_a_doubt():
    found = anatomy_of(infos({"layers.w.kernel": (4, 5, 6), "layers.v.scale": (4, 7)}), {"num_layers": 9})
    assert "of 9 blocks" in found.parts["layers.w.kernel"].doubt


@pytest.mark.parametrize(
    ("config", "metadata"), [({"num_layers": 5}, {}), ({}, {"num_layers": "5"}), ({}, {"param_scan_axis": "0"})]
)
def test_the_depth_or_metadata_settles_an_ambiguous_axis(config, metadata):
    found = anatomy_of(infos(AMBIGUOUS), config, metadata)
    assert found.parts["layers.a.scale"].stack_axis == 0
    assert found.parts["layers.a.scale"].blocks == (0, 1, 2, 3, 4)
    assert found.notes == ()


def test_the_recipe_outranks_metadata_and_config():
    overrides = Overrides(stacked={r"^layers\.": 1})
    found = anatomy_of(infos(AMBIGUOUS), {"num_layers": 5}, {"param_scan_axis": "0"}, overrides)
    assert found.parts["layers.a.scale"].stack_axis == 1
    assert found.parts["layers.a.scale"].block_names == tuple(f"layers.{i}.a.scale" for i in range(4))
    none = anatomy_of(infos(AMBIGUOUS), overrides=Overrides(stacked={r"^layers\.": -1}))
    assert none.parts["layers.a.scale"].stack_axis is None
    assert none.notes == ()


def test_metadata_that_says_unscanned_is_believed():
    found = anatomy_of(
        infos({"layers.w.kernel": (4, 5, 6), "layers.s.scale": (4, 5)}), metadata={"scan_layers": "False"}
    )
    assert found.parts["layers.w.kernel"].stack_axis is None
    assert found.notes == ()


@pytest.mark.parametrize("module", ["block", "layer", "h"])
def test_a_lone_module_is_not_taken_for_a_stack(module):
    tensors = infos({f"{module}.attn.kernel": (4, 2, 3), f"{module}.mlp.kernel": (4, 9)})
    assert not any(part.stack_axis is not None or part.doubt for part in anatomy_of(tensors).parts.values())
    assert all(part.blocks == (0, 1, 2, 3) for part in anatomy_of(tensors, {"num_layers": 4}).parts.values())


def test_canonical_names_are_injective_and_keep_what_is_no_wrapper():
    names = ["params.model.dense.kernel", "params.head.kernel", "ema.model.dense.kernel", "step"]
    assert canonical_names(names) == {
        "params.model.dense.kernel": "model.dense.kernel",
        "params.head.kernel": "head.kernel",
        "ema.model.dense.kernel": "ema.model.dense.kernel",
        "step": "step",
    }
    met = canonical_names(["layers_0.kernel", "layers.0.kernel"])
    assert met == {"layers_0.kernel": "layers_0.kernel", "layers.0.kernel": "layers.0.kernel"}
    attention = ["attn.query", "attn.key", "attn.value", "attn.value_norm.scale"]
    assert canonical_names(attention) == {name: name for name in attention}
    torch = ["params.layers_0.weight", "model.value"]
    assert canonical_names(torch) == {name: name for name in torch}


# --- Checkpoints that trainers wrote ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "family", "stacked", "axis"),
    [
        ("maxtext_scanned/base/checkpoints/0/items", "maxtext", True, 1),
        ("tunix_full/base/1/model_params", "tunix", False, None),
        ("tunix_lora/base/1/model_params", "tunix", False, None),
        ("gemma_nested/base", "gemma", False, None),
        ("linen_scan_composite/base/2/params", None, True, 0),
        ("linen_scan_composite/base/2/state", None, True, 0),
        ("nnx_loop_mgr/base/3/model", None, False, None),
    ],
)
def test_checkpoints_of_trainers(data, place, family, stacked, axis):
    if not (data / "jax" / place).is_dir():
        pytest.skip(f"{data} has no jax/{place}")
    with open_checkpoint(data / "jax" / place) as checkpoint:
        tensors = dict(checkpoint.tensors)
    found = anatomy_of(tensors)
    assert found.family == family
    assert found.towers == {"model": ("model", 4, stacked)}
    assert found.notes == ()
    assert {part.stack_axis for part in found.parts.values()} - {None} == ({axis} - {None})
    kinds = {part.kind for part in found.parts.values()}
    if "lora" in place:
        assert kinds == {"adapter"}
    groups = {group for part in found.parts.values() for group in part.groups}
    assert len(groups) == 4
    for name, part in found.parts.items():
        if "opt_state" in name:
            assert part.kind == "optimizer"
        if "rngs" in name:
            assert part.kind == "random"
        assert not part.canonical.startswith("params.")
        assert part.kind in {"optimizer", "random", "step"} or not part.canonical.endswith(".value")
