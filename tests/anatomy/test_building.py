"""Kinds, quantised weights, ties, depths, what a recipe says, and groups, by names and shapes alone."""

import subprocess
import sys

import pytest
from anatomy.trees import infos

from m3jax.anatomy import (
    Overrides,
    anatomy_of,
    block_name,
    block_position,
    group_of,
    position,
    summarise,
)
from m3jax.checkpoints import TensorInfo
from m3jax.errors import M3Error

LLAMA = {
    "model.embed_tokens.weight": (40, 8),
    **{f"model.layers.{i}.mlp.up_proj.weight": (12, 8) for i in range(4)},
    "model.norm.weight": (8,),
}


def kinds(tensors, **more):
    return {name: part.kind for name, part in anatomy_of(tensors, **more).parts.items()}


def of(name, shape=(4, 4), dtype="F32"):
    return {name: TensorInfo(name, shape, dtype)}


# --- Kinds ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "kind"),
    [
        ("model.layers.0.self_attn.rotary_emb.inv_freq", (4,), "F32", "buffer"),
        ("bert.embeddings.position_ids", (1, 8), "I64", "buffer"),
        ("transformer.h.0.attn.masked_bias", (), "F32", "buffer"),
        ("transformer.h.0.attn.bias", (1, 1, 8, 8), "F32", "buffer"),
        ("transformer.h.0.attn.bias", (1, 1, 8, 8), "BOOL", "buffer"),
        ("gpt_neox.layers.0.attention.bias", (1, 1, 8, 8), "U8", "buffer"),
        ("transformer.h.0.attn.attention.bias", (1, 1, 8, 8), "BOOL", "buffer"),
        ("transformer.h.0.attn.c_attn.bias", (12,), "F32", "parameter"),
        ("swin.encoder.layers.0.blocks.0.attention.self.relative_position_index", (9, 9), "I64", "buffer"),
        ("resnet.bn.num_batches_tracked", (), "I64", "buffer"),
        ("resnet.bn.running_var", (4,), "F32", "statistics"),
        ("batch_stats.bn.mean", (4,), "F32", "statistics"),
        ("model.layers.3.mlp.gate.e_score_correction_bias", (4,), "F32", "parameter"),
        ("final_logits_bias", (1, 40), "F32", "parameter"),
        ("visual.mean.kernel", (4, 4), "F32", "parameter"),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", (2, 8), "F32", "adapter"),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_B.default.weight", (8, 2), "F32", "adapter"),
        ("base_model.model.model.embed_tokens.lora_embedding_A", (2, 8), "F32", "adapter"),
        ("base_model.model.model.layers.0.q_proj.lora_magnitude_vector", (8,), "F32", "adapter"),
        ("layers.0.attn.q_proj.w_lora_a.value", (8, 2), "F32", "adapter"),
        ("layers.0.mlp.kernel_lora_b", (2, 8), "F32", "adapter"),
        ("layers_0.attn.lora_a.kernel", (8, 2), "F32", "adapter"),
        ("opt_state.0.mu.params.dense.kernel", (4, 4), "F32", "optimizer"),
        ("opt_state.1.0.nu.dense.kernel.value", (4, 4), "F32", "optimizer"),
        ("opt_state.0.count", (), "I32", "optimizer"),
        ("state.opt_state.0.trace.dense.kernel", (4, 4), "F32", "optimizer"),
        ("0.mu.dense.kernel", (4, 4), "F32", "optimizer"),
        ("optimizer.state.0.exp_avg", (4, 4), "F32", "optimizer"),
        ("optimizer.target.dense.kernel", (4, 4), "F32", "parameter"),
        ("ema_params.dense.kernel", (4, 4), "F32", "optimizer"),
        ("step", (), "I32", "step"),
        ("state.step.value", (), "I64", "step"),
        ("dropout_rng", (2,), "U32", "random"),
        ("layers.0.drop.rngs.key.value", (2,), "U32", "random"),
        ("nnx_aux.model.decoder.rngs.dropout.count", (), "U32", "random"),
        ("time_step.dense.kernel", (4, 4), "F32", "parameter"),
        ("model.layers.0.mixer.dt_bias", (4,), "F32", "parameter"),
    ],
)
def test_kind_of_one_tensor(name, shape, dtype, kind):
    assert kinds(of(name, shape, dtype)) == {name: kind}


def test_mean_beside_var_are_statistics_only_together():
    both = infos({"bn.mean": (4,), "bn.var": (4,), "bn.scale": (4,)})
    assert kinds(both) == {"bn.mean": "statistics", "bn.var": "statistics", "bn.scale": "parameter"}
    assert kinds(infos({"head.mean": (4,), "bn.scale": (4,)}))["head.mean"] == "parameter"


P = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("scheme", "tensors"),
    [
        ("gptq", {f"{P}.qweight": "I32", f"{P}.qzeros": "I32", f"{P}.scales": "F16", f"{P}.g_idx": "I32"}),
        ("awq", {f"{P}.qweight": "I32", f"{P}.qzeros": "I32", f"{P}.scales": "F16"}),
        ("fp8", {f"{P}.weight": "F8_E4M3", f"{P}.weight_scale_inv": "F32"}),
        ("fp8", {f"{P}.weight": "F8_E4M3", f"{P}.weight_scale": "BF16", f"{P}.input_scale": "BF16"}),
        (
            "fp8",
            {"model.layers.0.experts.gate_up_proj": "F8_E4M3", "model.layers.0.experts.gate_up_proj_scale_inv": "F32"},
        ),
        (
            "bitsandbytes",
            {
                f"{P}.weight": "U8",
                f"{P}.weight.absmax": "U8",
                f"{P}.weight.quant_map": "F32",
                f"{P}.weight.nested_absmax": "F32",
                f"{P}.weight.quant_state.bitsandbytes__nf4": "U8",
            },
        ),
        ("bitsandbytes", {f"{P}.weight": "I8", f"{P}.SCB": "F32", f"{P}.weight_format": "U8"}),
        (
            "nvfp4",
            {
                f"{P}.weight": "U8",
                f"{P}.weight_scale": "F8_E4M3",
                f"{P}.weight_scale_2": "F32",
                f"{P}.input_scale": "F32",
            },
        ),
        ("mxfp4", {f"{P}_blocks": "U8", f"{P}_scales": "U8"}),
        ("compressed-tensors", {f"{P}.weight_packed": "I32", f"{P}.weight_scale": "BF16", f"{P}.weight_shape": "I64"}),
        ("int8", {f"{P}.weight": "I8", f"{P}.weight_scale": "F32"}),
        ("qwix", {"layers.0.mlp.kernel.array.qvalue": "I8", "layers.0.mlp.kernel.array.scale": "F32"}),
        ("qwix", {"layers.0.mlp.kernel.qvalue.value": "I8", "layers.0.mlp.kernel.scale.value": "F32"}),
    ],
)
def test_quantised_weights_are_known_by_scheme(scheme, tensors):
    beside = {"model.norm.weight": "F32"} if "model" in next(iter(tensors)) else {"norm.scale": "F32"}
    found = anatomy_of({name: TensorInfo(name, (4, 4), dtype) for name, dtype in {**tensors, **beside}.items()})
    assert found.quantisation == scheme
    assert {name: part.kind for name, part in found.parts.items()} == {
        **dict.fromkeys(tensors, "quantised"),
        **dict.fromkeys(beside, "parameter"),
    }
    assert {part.block for name, part in found.parts.items() if name in tensors} == {0}


def test_no_scales_no_scheme():
    found = anatomy_of(of(f"{P}.weight", dtype="F8_E4M3"))
    assert found.quantisation is None
    assert anatomy_of(infos(LLAMA)).quantisation is None
    assert anatomy_of(infos(LLAMA), {"quantization_config": {"quant_method": "hqq"}}).quantisation == "hqq"


# --- Blocks, towers, depths ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("index", "count", "where"), [(0, 5, 0.0), (3, 5, 0.75), (4, 5, 1.0), (0, 1, 1.0), (9, 5, 1.0)]
)
def test_position(index, count, where):
    assert position(index, count) == where


def test_blocks_of_another_head_do_not_count_and_keep_their_group():
    tensors = infos({f"model.layers.{i}.mlp.up_proj.weight": (4, 4) for i in range(4)})
    found = anatomy_of(tensors, {"model_type": "deepseek_v3", "num_hidden_layers": 3, "num_nextn_predict_layers": 1})
    assert found.towers["model"].depth == 3
    assert found.parts["model.layers.2.mlp.up_proj.weight"].position == 1.0
    assert found.parts["model.layers.3.mlp.up_proj.weight"].position == 1.0
    assert group_of(found, "model.layers.3.mlp.up_proj.weight", "layer") == "model.layers.3"
    assert found.notes == ()


@pytest.mark.parametrize("told", [3, 5])
def test_a_depth_that_is_not_what_is_stored_is_said(told):
    tensors = infos({f"model.layers.{i}.mlp.up_proj.weight": (4, 4) for i in range(4)})
    found = anatomy_of(tensors, {"model_type": "llama", "num_hidden_layers": told})
    assert found.towers["model"].depth == 4
    assert found.notes == (f"model.layers has 4 blocks, not the {told} of config.json: those stored count",)


def test_adapters_on_some_blocks_stand_where_the_configuration_says():
    name = "base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight"
    found = anatomy_of(infos({name: (2, 8)}), {"model_type": "llama", "num_hidden_layers": 5})
    assert found.towers["model"].depth == 5
    assert found.parts[name].position == 0.5


def test_a_stage_without_blocks_stands_where_the_stage_before_it_ends():
    shapes = {f"encoder.stages.{s}.layers.{b}.weight": (4, 4) for s in (0, 2) for b in range(2)}
    found = anatomy_of(infos({**shapes, "encoder.stages.1.weight": (4, 4), "encoder.stages.3.weight": (4, 4)}))
    assert [found.parts[f"encoder.stages.{stage}.weight"].position for stage in (1, 3)] == [1 / 3, 1.0]


def test_a_small_tower_does_not_move_the_language_model():
    tensors = infos(
        {f"language_model.model.layers.{i}.mlp.up_proj.weight": (4, 4) for i in range(2)}
        | {f"vision_tower.vision_model.encoder.layers.{i}.mlp.fc1.weight": (4, 4) for i in range(4)}
    )
    found = anatomy_of(tensors)
    assert found.parts["language_model.model.layers.1.mlp.up_proj.weight"].position == 1.0
    assert found.parts["vision_tower.vision_model.encoder.layers.1.mlp.fc1.weight"].position == 1 / 3


@pytest.mark.parametrize(
    "paths",
    [
        {"language_model.model.layers": "text", "vision_tower.vision_model.encoder.layers": "vision"},
        {"model.language_model.layers": "text", "model.vision_tower.vision_model.encoder.layers": "vision"},
        {"model.language_model.layers": "text", "model.visual.blocks": "vision"},
        {"model.layers": "text", "visual.blocks": "vision"},
        {"model.layers": "text", "model.vision_tower.vision_tower.vision_model.encoder.layers": "vision"},
        {"thinker.model.layers": "text", "thinker.visual.blocks": "vision", "thinker.audio_tower.layers": "audio"},
        {"model.layers": "text", "mtp.layers": "mtp"},
        {"encoder.block": "encoder", "decoder.block": "decoder"},
        {"encoder.encoder.layer": "encoder", "decoder.transformer.h": "decoder"},
        {"encoder.vit.encoder.layer": "vision", "decoder.bert.encoder.layer": "text"},
        {"model.backbone.layers": "backbone", "model.encoder.layers": "encoder", "model.decoder.layers": "decoder"},
        {"language_model.model.layers": "text", "encoder.layers": "encoder"},
        {"model.encoder.layers": "encoder", "model.decoder.layers": "decoder"},
        {
            "language_model.encoder.block": "encoder",
            "language_model.decoder.block": "decoder",
            "qformer.encoder.layer": "qformer",
            "vision_model.encoder.layers": "vision",
        },
        {
            "model.vision_model.transformer.layers": "vision transformer",
            "model.vision_model.global.layers": "vision global",
        },
    ],
)
def test_names_of_towers(paths):
    tensors = infos({f"{path}.{i}.mlp.weight": (4, 4) for path in paths for i in range(3)})
    found = anatomy_of(tensors)
    assert {found.parts[f"{path}.2.mlp.weight"].tower: path for path in paths} == {n: p for p, n in paths.items()}
    assert all(tower.depth == 3 for tower in found.towers.values())


def test_stages_are_one_tower_and_what_joins_them_is_in_no_block():
    names = [f"swin.encoder.layers.{s}.blocks.{b}.attn.weight" for s, n in enumerate((2, 3)) for b in range(n)]
    joint = "swin.encoder.layers.0.downsample.reduction.weight"
    found = anatomy_of(infos(dict.fromkeys([*names, joint], (4, 4))))
    assert [found.parts[name].block for name in names] == [0, 1, 2, 3, 4]
    assert group_of(found, names[3], "layer") == "swin.encoder.layers.1.blocks.1"
    assert (found.parts[joint].block, found.parts[joint].tower, found.parts[joint].position) == (None, "model", 0.25)
    assert group_of(found, joint, "layer") == "outside blocks"


def test_layers_of_a_projector_are_no_tower():
    tensors = infos(LLAMA | {f"aligner.layers.{i}.weight": (8, 8) for i in range(2)})
    found = anatomy_of(tensors)
    assert list(found.towers) == ["model"]
    assert found.parts["aligner.layers.0.weight"].block is None


# --- What a recipe says ----------------------------------------------------------------------------------------


def test_a_recipes_pattern_of_blocks_outranks_names():
    tensors = infos({f"net.stage{i}.unit.weight": (4, 4) for i in range(3)} | {"net.layers.7.weight": (4, 4)})
    found = anatomy_of(tensors, overrides=Overrides(blocks=r"stage(\d+)\."))
    assert [part.block for part in found.parts.values()] == [0, 1, 2, None]
    assert group_of(found, "net.stage1.unit.weight", "layer") == "net.stage1"
    assert found.parts["net.stage1.unit.weight"].position == 0.5


def test_a_recipe_stacks_leaves_of_any_tree():
    tensors = infos({"net.w.weight": (8, 3, 4), "net.out.weight": (4, 4)})
    found = anatomy_of(tensors, overrides=Overrides(stacked={r"net\.w": 1}))
    part = found.parts["net.w.weight"]
    assert (part.stack_axis, part.blocks) == (1, (0, 1, 2))
    assert block_name("net.w.weight", part, 2) == "net.w.2.weight"
    assert found.parts["net.out.weight"].stack_axis is None


def test_a_recipes_kinds_and_ties_outrank_all():
    tensors = infos({**LLAMA, "lm_head.weight": (40, 8)})
    config = {"model_type": "llama", "tie_word_embeddings": False}
    found = anatomy_of(tensors, config, overrides=Overrides(tied=True, kinds={r"norm": "buffer"}))
    assert found.parts["model.norm.weight"].kind == "buffer"
    assert found.ties_embeddings is True
    assert found.parts["lm_head.weight"].alias_of == "model.embed_tokens.weight"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (Overrides(blocks=r"nothing(\d)"), "blocks: 'nothing"),
        (Overrides(blocks="layers"), "put the block's number in parentheses"),
        (Overrides(blocks="("), "is no regular expression"),
        (Overrides(stacked={"nothing": 0}), "stacked: 'nothing' is found in no tensor's name"),
        (Overrides(stacked={"norm": 1}), "but model.norm.weight has 1 axes"),
        (Overrides(kinds={"nothing": "buffer"}), "kinds: 'nothing' is found in no tensor's name"),
        (Overrides(kinds={"norm": "bufer"}), "'bufer' is no kind"),
    ],
)
def test_an_override_that_says_nothing_is_refused(overrides, said):
    with pytest.raises(M3Error) as caught:
        anatomy_of(infos(LLAMA), overrides=overrides)
    assert said in str(caught.value)


# --- Ties --------------------------------------------------------------------------------------------------------

HEADED = {**LLAMA, "lm_head.weight": (40, 8)}


@pytest.mark.parametrize(
    ("config", "tied"),
    [
        (None, None),
        ({"model_type": "llama"}, False),
        ({"model_type": "gemma"}, True),
        ({"model_type": "gemma", "tie_word_embeddings": False}, False),
        ({"model_type": "unheard-of"}, None),
        ({"model_type": "unheard-of", "tie_word_embeddings": True}, True),
        ({"model_type": "unheard-of", "text_config": {"tie_word_embeddings": True}}, True),
        ({"model_type": "unheard-of", "text_config": {"model_type": "gemma2"}}, True),
        ({"model_type": "llava", "text_config": {"tie_word_embeddings": True}}, True),
    ],
)
def test_evidence_of_ties_is_ranked(config, tied):
    found = anatomy_of(infos(HEADED), config)
    assert found.ties_embeddings is tied
    assert found.parts["lm_head.weight"].alias_of == ("model.embed_tokens.weight" if tied else None)
    assert found.tied_candidates == (() if tied is False else (("lm_head.weight", "model.embed_tokens.weight"),))
    assert any("anatomy: {tied: true}" in note for note in found.notes) == (tied is None)


def test_parts_of_a_configuration_that_disagree_are_said():
    config = {
        "model_type": "llava_onevision",
        "tie_word_embeddings": False,
        "text_config": {"tie_word_embeddings": True},
    }
    stored = anatomy_of(infos(HEADED), config)
    assert (stored.ties_embeddings, len(stored.notes)) == (False, 1)
    absent = anatomy_of(infos(LLAMA), config)
    assert (absent.ties_embeddings, len(absent.notes)) == (True, 1)


def test_t5_stores_its_embedding_up_to_four_times():
    names = ["shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"]
    tensors = infos(dict.fromkeys(names, (40, 8)))
    tied = anatomy_of(tensors, {"model_type": "t5"})
    assert [tied.parts[name].alias_of for name in names] == [None, *["shared.weight"] * 3]
    # Version 1.1 has a head of its own; encoder and decoder still share.
    own = anatomy_of(tensors, {"model_type": "t5", "tie_word_embeddings": False})
    assert [own.parts[name].alias_of for name in names] == [None, "shared.weight", "shared.weight", None]
    assert own.head == "lm_head.weight"


def test_a_copy_of_another_shape_is_no_alias():
    found = anatomy_of(infos({**LLAMA, "lm_head.weight": (48, 8)}), {"model_type": "gemma", "vocab_size": 40})
    assert found.parts["lm_head.weight"].alias_of is None
    assert found.notes == (
        "lm_head.weight and model.embed_tokens.weight are to be tied but differ in shape: they count as two tensors",
    )


def test_biases_of_berts_head_are_one():
    tensors = infos(
        {
            "bert.embeddings.word_embeddings.weight": (40, 8),
            "cls.predictions.bias": (40,),
            "cls.predictions.decoder.weight": (40, 8),
            "cls.predictions.decoder.bias": (40,),
        }
    )
    found = anatomy_of(tensors, {"model_type": "bert"})
    assert found.parts["cls.predictions.decoder.bias"].alias_of == "cls.predictions.bias"
    assert found.parts["cls.predictions.decoder.weight"].alias_of == "bert.embeddings.word_embeddings.weight"
    assert {part.vocabulary_axis for part in found.parts.values()} == {0}


@pytest.mark.parametrize(
    "name",
    [
        "wpe.weight",
        "embeddings.token_type_embeddings.weight",
        "embeddings.position_embeddings.weight",
        "visual.embed.weight",
    ],
)
def test_other_embeddings_have_no_axis_of_tokens(name):
    assert anatomy_of(infos({name: (40, 8), "wte.weight": (40, 8)})).parts[name].vocabulary_axis is None


# --- Groups and summary ------------------------------------------------------------------------------------------


def test_groups():
    found = anatomy_of(infos(LLAMA))
    assert group_of(found, "model.layers.3.mlp.up_proj.weight", "layer") == "model.layers.3"
    assert group_of(found, "model.layers.3.mlp.up_proj.weight", "tensor") == "model.layers.3.mlp.up_proj.weight"
    assert group_of(found, "model.norm.weight", "layer") == "outside blocks"


def test_a_stacked_leaf_has_no_group_without_a_block():
    tensors = infos({"layers.w.kernel": (3, 4, 5), "layers.v.kernel": (3, 5, 4), "layers.s.scale": (3, 4)})
    found = anatomy_of(tensors)
    with pytest.raises(ValueError, match="stacks 3 blocks"):
        group_of(found, "layers.w.kernel", "layer")
    with pytest.raises(ValueError, match="does not stack block 3"):
        group_of(found, "layers.w.kernel", "layer", 3)
    assert block_position(found, "layers.w.kernel", 1) == 0.5


def test_summary_adds_up():
    tensors = infos({**HEADED, "step": ()}) | of("opt_state.0.mu.x", (5,))
    found = summarise(anatomy_of(tensors, {"model_type": "gemma"}), tensors)
    rows = {row.name: row for row in found.towers}
    assert rows["model"].entries == {"parameter": 40 * 8 * 2 + 4 * 12 * 8 + 8}
    assert rows["model"].depth == 4
    assert rows[None].tensors == 2
    assert found.kinds["optimizer"] == (1, 5)
    assert found.aliases == {"lm_head.weight": "model.embed_tokens.weight"}
    assert found.vocabulary == {"model.embed_tokens.weight": 0, "lm_head.weight": 0}
    plain = found.to_json()
    assert plain["towers"][0]["name"] == "model"
    assert plain["kinds"]["step"] == {"tensors": 1, "entries": 1}


def test_anatomy_needs_no_jax():
    code = "import sys, m3jax.anatomy; sys.exit('jax' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_nothing_is_something():
    found = anatomy_of({})
    assert (dict(found.parts), dict(found.towers), found.notes) == ({}, {}, ())
