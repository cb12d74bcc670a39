"""Flax trees: every layout tells its blocks, and one model gives the same tensors of blocks in each of them."""

import pytest
from anatomy.flax_layouts import (
    DEPTH,
    LAYOUTS,
    gemma,
    kauldron,
    linen_variables,
    maxtext,
    maxtext_cycle,
    nnx_tensors,
    nnx_with_optimizer,
    renamed,
    train_state,
    two_towers,
)
from anatomy.trees import by_block, infos, of_tree

from m3jax.anatomy import Overrides, anatomy_of, block_name, block_position, canonical_names, group_of
from m3jax.checkpoints import open_checkpoint
from m3jax.errors import M3Error


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
    assert statistics == {
        f"batch_stats.layers.{i}.bn.{name}": ((12,), f"layers.{i}", i) for i in range(DEPTH) for name in ("mean", "var")
    }
    assert list(found.towers) == ["model"]
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
    tensors = train_state(axis)
    found = anatomy_of(tensors, DEPTH_CONFIG)
    assert by_block(found, tensors) == EXPECTED
    assert found.parts["step"].kind == "step"
    assert {part.kind for name, part in found.parts.items() if name.startswith("opt_state")} == {"optimizer"}


def test_optimizer_of_nnx():
    tensors = nnx_with_optimizer()
    found = anatomy_of(tensors)
    assert parameters(by_block(found, tensors)) == EXPECTED
    kinds = {name: part.kind for name, part in found.parts.items() if name.startswith("optimizer")}
    assert len(kinds) > 20
    assert kinds.pop("optimizer.step.value") == "step"
    assert set(kinds.values()) == {"optimizer"}


def test_train_state_of_kauldron():
    tensors = kauldron()
    found = anatomy_of(tensors)
    assert parameters(by_block(found, tensors)) == EXPECTED
    assert {part.kind for n, part in found.parts.items() if n.startswith("opt_state")} == {"optimizer"}
    assert [found.parts[name].kind for name in ("step", "training_time_hours")] == ["step", "step"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_told_without_doubt(layout):
    tensors = LAYOUTS[layout]()
    found = anatomy_of(tensors)
    assert told(tensors)
    assert found.notes == ()
    assert found.embedding is not None
    assert list(found.towers) == (["text", "vision"] if "two" in layout else ["model"])


# --- MaxText -----------------------------------------------------------------------------------------------


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
    cycle = maxtext_cycle(axis, container, left)
    unscanned = told(maxtext([(f"layers_{i}", None, 0) for i in range(12 + left)]))
    assert told(cycle) == unscanned
    assert told(cycle, config={"num_hidden_layers": 12 + left}) == unscanned
    found = anatomy_of(cycle)
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


@pytest.mark.parametrize("axis", [0, 1])
def test_half_stacked_is_unstacked(axis):
    unscanned = maxtext([(f"layers_{i}", None, 0) for i in range(5)])
    leaf = "mlp.wi_0.kernel"
    half = {name: info for name, info in unscanned.items() if not name.endswith(leaf)}
    half |= infos({f"params.decoder.layers.{leaf}": (5, 8, 12) if axis == 0 else (8, 5, 12)})
    assert told(half) == told(unscanned)


def test_lists_in_lists_that_do_not_stack():
    found = told(maxtext([(f"layers.layers_{i}", None, 0) for i in range(4)]))
    assert found["decoder.layers.layers.2.mlp.wo.kernel"] == ((12, 8), "decoder.layers.layers.2", 2)


# --- Gemma and other towers -----------------------------------------------------------------------------------


def test_gemma_nested_flat_and_stacked_agree():
    nested = told(gemma([f"layer_{i}" for i in range(12)]))
    assert nested["layers.7.mlp.linear"] == ((12, 8), "layers.7", 7)
    assert told(gemma([f"layer_{i}" for i in range(12)], join="/")) == nested
    assert told(gemma([f"stacked_layers.attention_type_{j}" for j in range(6)], stacked=2)) == nested
    bare = renamed(gemma([f"layer_{i}" for i in range(12)]), lambda name: name.removeprefix("transformer."))
    assert told(bare) == nested
    assert anatomy_of(gemma(["layer_0"])).family == "gemma"


def test_two_towers_each_stacked_to_its_own_depth():
    found = anatomy_of(two_towers())
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


def test_an_axis_that_contradicts_the_depth() -> None:
    shapes = {"decoder.layers.a.kernel": (6, 5, 7), "decoder.layers.b.scale": (6, 5)}
    found = anatomy_of(infos(shapes), {"num_layers": 5}, {"param_scan_axis": "0"})
    (doubt,) = {part.doubt for part in found.parts.values() if part.doubt}
    assert "metadata says that decoder.layers stacks blocks along axis 0, which has 6" in doubt
    assert "and that there are 5 blocks" in doubt


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


@pytest.mark.parametrize("axis", ["-1", "one", "", "10000"])
def test_an_axis_that_is_none_is_refused(axis) -> None:
    with pytest.raises(M3Error, match="of the checkpoint's metadata is"):
        told(maxtext([("layers", 5, 1)]), metadata={"scan_layers": "true", "param_scan_axis": axis})


def test_axes_of_a_recipe_that_contradict_each_other_are_refused():
    overrides = Overrides(stacked={r"^layers\.a": 0, r"^layers\.b": 1})
    with pytest.raises(M3Error, match=r"layers\.a\.scale stacks 5 blocks but layers\.b\.scale 4"):
        anatomy_of(infos(AMBIGUOUS), overrides=overrides)


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


def test_a_norm_that_calls_its_scale_weight_does_not_make_a_tree_torchs():
    memory = {"layers_0.up.kernel": (4, 8), "layers_0.down.kernel": (8, 4), "layers_0.norm.weight": (4,)}
    disk = {f"params.{name}.value": shape for name, shape in memory.items()}
    assert told(infos(memory)) == told(infos(disk)) == told(infos({f"params.{n}": s for n, s in memory.items()}))
    only = {"layers.0.up.weight": (4, 8)}
    assert told(infos(only)) == told(infos({f"{name}.value": shape for name, shape in only.items()}))


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
