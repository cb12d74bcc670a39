import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file
from support.decoders import BFLOAT16, CONFIGS, weights
from support.matrix import few

import m3jax
from m3jax import M3Error
from m3jax.checkpoints import open_safetensors
from m3jax.decoder import DecoderConfig, abstract_params, load_params, params_from_tree, random_params


def nested(flat):
    tree = {}
    for name, leaf in flat.items():
        *branches, last = name.split(".")
        branch = tree
        for key in branches:
            branch = branch.setdefault(key, {})
        branch[last] = leaf
    return tree


@pytest.mark.parametrize("name", few([*CONFIGS], "llama-tied-biased", "gemma2", "gpt-oss"))
def test_files_and_trees_give_the_same_parameters(name, tmp_path):
    config = DecoderConfig.from_dict(CONFIGS[name])
    flat = weights(CONFIGS[name])
    save_file(flat, tmp_path / "model.safetensors")
    read = load_params(tmp_path, config)
    for tree in (flat, nested(flat)):
        chex.assert_trees_all_equal(read, params_from_tree(tree, config))
    with open_safetensors(tmp_path) as checkpoint:
        chex.assert_trees_all_equal(read, load_params(checkpoint, config))
    chex.assert_trees_all_equal_shapes(read, abstract_params(config), random_params(config))


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16"])
def test_dtypes_are_kept_or_converted(dtype, tmp_path):
    config = DecoderConfig.from_dict(CONFIGS["llama"])
    flat = weights(CONFIGS["llama"], BFLOAT16)
    save_file(flat, tmp_path / "model.safetensors")
    for params in (load_params(tmp_path, config, dtype), params_from_tree(flat, config, dtype)):
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(dtype or "bfloat16")}


def test_a_merge_in_memory_runs_as_its_file_would(tmp_path):
    config = DecoderConfig.from_dict(CONFIGS["qwen3"])
    experts = [weights(CONFIGS["qwen3"], seed=seed) for seed in (1, 2)]
    merged = m3jax.merge([{k: jnp.asarray(v) for k, v in expert.items()} for expert in experts], m3jax.linear())
    save_file({name: np.asarray(leaf) for name, leaf in merged.items()}, tmp_path / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, params_from_tree(merged, config), load_params(tmp_path, config))


def test_all_faults_are_named_at_once(tmp_path):
    config = DecoderConfig.from_dict(CONFIGS["llama"])
    flat = weights(CONFIGS["llama"])
    del flat["model.norm.weight"]
    flat["model.layers.7.mlp.up_proj.weight"] = np.zeros((48, 32), np.float32)
    flat["extra"] = np.zeros(1, np.float32)
    flat["layers.0.mlp.up_proj.weight"] = flat["model.layers.0.mlp.up_proj.weight"].copy()
    flat["lm_head.weight"] = np.zeros((65, 32), np.float32)
    flat["model.layers.0.mlp.down_proj.weight"] = np.zeros((32, 48), np.int8)
    save_file(flat, tmp_path / "model.safetensors")
    for load in (lambda: load_params(tmp_path, config), lambda: params_from_tree(flat, config)):
        with pytest.raises(M3Error) as error:
            load()
        text = str(error.value)
        for part in (
            "lacks norm.weight;",
            "has left over",
            "extra",
            "model.layers.7.mlp.up_proj.weight",
            "has twice",
            "lm_head.weight [65, 32] for [64, 32]",
            "has in no floating-point dtype model.layers.0.mlp.down_proj.weight",
        ):
            assert part in text
        assert "\n" not in text


def test_fused_tensors_are_taken_apart():
    """By the shapes and words of each family's own documentation, written out."""
    for name, fused in (("phi3", "model.layers.1.self_attn.qkv_proj.weight"), ("gpt2", "h.1.attn.c_attn.weight")):
        flat, config = weights(CONFIGS[name]), DecoderConfig.from_dict(CONFIGS[name])
        attention = params_from_tree(flat, config)["layers"][1]["attention"]
        tensor = flat[fused] if name == "phi3" else flat[fused].T
        counts = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        ends = np.cumsum(counts)[:-1] * config.head_dim
        for part, rows in zip(("query", "key", "value"), np.split(tensor, ends), strict=True):
            np.testing.assert_array_equal(attention[part]["weight"], rows.reshape(-1, config.head_dim, 32))
    flat, config = weights(CONFIGS["gpt-neox"]), DecoderConfig.from_dict(CONFIGS["gpt-neox"])
    attention = params_from_tree(flat, config)["layers"][0]["attention"]
    for head in range(4):
        for i, part in enumerate(("query", "key", "value")):
            rows = slice((3 * head + i) * 8, (3 * head + i + 1) * 8)
            for kind in ("weight", "bias"):
                stored = flat[f"gpt_neox.layers.0.attention.query_key_value.{kind}"]
                np.testing.assert_array_equal(attention[part][kind][head], stored[rows])
    flat, config = weights(CONFIGS["gpt-oss"]), DecoderConfig.from_dict(CONFIGS["gpt-oss"])
    layer = params_from_tree(flat, config)["layers"][0]["feed_forward"]
    stored = flat["model.layers.0.mlp.experts.gate_up_proj"]
    np.testing.assert_array_equal(layer["gate"]["weight"][2], stored[2, :, ::2].T)
    np.testing.assert_array_equal(layer["up"]["weight"][2], stored[2, :, 1::2].T)
    np.testing.assert_array_equal(layer["down"]["weight"][1], flat["model.layers.0.mlp.experts.down_proj"][1].T)


def stacked(flat):
    """Experts all in one tensor, as transformers 5 has them in memory."""
    tree = {name: leaf for name, leaf in flat.items() if ".experts." not in name}
    for block in (0, 1):
        prefix = f"model.layers.{block}.block_sparse_moe.experts"
        one = [{w: flat[f"{prefix}.{i}.{w}.weight"] for w in ("w1", "w2", "w3")} for i in range(3)]
        both = [np.concatenate([expert["w1"], expert["w3"]]) for expert in one]
        tree[f"model.layers.{block}.mlp.experts.gate_up_proj"] = np.stack(both)
        tree[f"model.layers.{block}.mlp.experts.down_proj"] = np.stack([expert["w2"] for expert in one])
    return {name.replace("block_sparse_moe", "mlp"): leaf for name, leaf in tree.items()}


def test_experts_may_be_apart_or_stacked():
    config = DecoderConfig.from_dict(CONFIGS["mixtral"])
    flat = weights(CONFIGS["mixtral"])
    apart, together = params_from_tree(flat, config), params_from_tree(stacked(flat), config)
    jax.tree.map(np.testing.assert_array_equal, apart, together)


def test_faults_of_experts_are_named():
    config = DecoderConfig.from_dict(CONFIGS["mixtral"])
    flat = weights(CONFIGS["mixtral"])
    del flat["model.layers.1.block_sparse_moe.experts.2.w3.weight"]
    extra = "model.layers.0.block_sparse_moe.experts.3.w1.weight"
    dense = "model.layers.0.mlp.up_proj.weight"
    flat |= {extra: np.zeros((48, 32), np.float32), dense: np.zeros((48, 32), np.float32)}
    with pytest.raises(M3Error) as error:
        params_from_tree(flat, config)
    assert "lacks layers.1.feed_forward.up.weight of expert 2;" in str(error.value)
    assert f"has left over {extra}, {dense};" in str(error.value)
    both = weights(CONFIGS["mixtral"])
    both |= {name: leaf for name, leaf in stacked(both).items() if name.endswith("0.mlp.experts.down_proj")}
    with pytest.raises(M3Error, match=r"has twice model.layers.0.mlp.experts.down_proj and .*experts.0.w2.weight"):
        params_from_tree(both, config)


def test_a_fused_tensor_of_another_model_is_misshapen():
    config = DecoderConfig.from_dict(CONFIGS["phi3"] | {"num_key_value_heads": 4})
    said = r"has misshapen model.layers.0.self_attn.qkv_proj.weight \[64, 32\] for \[96, 32\], model.layers.1"
    with pytest.raises(M3Error, match=said):
        params_from_tree(weights(CONFIGS["phi3"]), config)


def test_blocks_may_be_a_list():
    config = DecoderConfig.from_dict(CONFIGS["qwen3"])
    flat = weights(CONFIGS["qwen3"])
    tree = nested(flat)
    tree["model"]["layers"] = [tree["model"]["layers"][str(i)] for i in range(config.num_layers)]
    jax.tree.map(np.testing.assert_array_equal, params_from_tree(tree, config), params_from_tree(flat, config))


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({"model": {"norm": {"weight": [1.0, 2.0]}}}, r"has no array at model.norm.weight.0 \(float\), model.norm"),
        ([np.zeros(1)], "lacks .*; has left over 0;"),
        (1.0, r"has no array at its root \(float\)"),
    ],
)
def test_what_is_no_tree_of_arrays_is_said_in_one_sentence(tree, said):
    with pytest.raises(M3Error, match=f"the tree of parameters .*{said}") as error:
        params_from_tree(tree, DecoderConfig.from_dict(CONFIGS["llama"]))
    assert "\n" not in str(error.value)


def test_long_lists_are_cut():
    config = DecoderConfig.from_dict(CONFIGS["llama"])
    with pytest.raises(M3Error, match="and 13 more"):
        params_from_tree({}, config)


def test_what_is_no_weight_is_ignored():
    entries = CONFIGS["llama-tied-biased"]
    flat = weights(entries)
    flat["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float32)
    flat["lm_head.weight"] = flat["model.embed_tokens.weight"]
    params_from_tree(flat, DecoderConfig.from_dict(entries))
    flat = weights(CONFIGS["gpt2"]) | {"h.0.attn.bias": np.ones((1, 1, 128, 128), bool)}
    params_from_tree(flat | {"lm_head.weight": flat["wte.weight"]}, DecoderConfig.from_dict(CONFIGS["gpt2"]))
    flat = weights(CONFIGS["gpt-neox"]) | {"gpt_neox.layers.1.attention.masked_bias": np.float32(-1e9)}
    params_from_tree(flat, DecoderConfig.from_dict(CONFIGS["gpt-neox"]))
