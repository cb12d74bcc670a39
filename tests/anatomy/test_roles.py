"""What tensors do in their models, by the names that architectures give them."""

from m3jax.anatomy import anatomy_of
from m3jax.anatomy.roles import ROLES, role_of
from m3jax.checkpoints import TensorInfo

# By letter: e(mbedding), a(ttention), m(lp), n(orm), h(ead), o(ther).
MODELS = (
    {
        "model.embed_tokens.weight": "e",
        "model.layers.0.self_attn.q_proj.weight": "a",
        "model.layers.0.self_attn.q_norm.weight": "n",
        "model.layers.0.post_attention_layernorm.weight": "n",
        "model.layers.0.block_sparse_moe.experts.0.w1.weight": "m",
        "model.layers.0.block_sparse_moe.gate.weight": "m",
        "model.norm.weight": "n",
        "lm_head.weight": "h",
    },
    {
        "wte.weight": "e",
        "h.0.attn.c_attn.weight": "a",
        "h.0.mlp.c_fc.bias": "m",
        "h.0.ln_1.weight": "n",
        "ln_f.weight": "n",
    },
    {
        "bert.embeddings.word_embeddings.weight": "e",
        "bert.encoder.layer.0.attention.self.query.weight": "a",
        "bert.encoder.layer.0.attention.output.dense.weight": "a",
        "bert.encoder.layer.0.attention.output.LayerNorm.weight": "n",
        "bert.encoder.layer.0.intermediate.dense.weight": "m",
        "bert.encoder.layer.0.output.dense.weight": "m",
        "bert.pooler.dense.weight": "o",
        "cls.predictions.decoder.weight": "h",
    },
    {
        "shared.weight": "e",
        "encoder.block.0.layer.0.SelfAttention.q.weight": "a",
        "encoder.block.0.layer.0.layer_norm.weight": "n",
        "encoder.block.0.layer.1.DenseReluDense.wi.weight": "m",
    },
    {
        "params.token_embedder.embedding": "e",
        "params.decoder.layers_0.pre_self_attention_layer_norm.scale": "n",
        "params.decoder.layers_0.self_attention.query.kernel": "a",
        "params.decoder.layers_0.mlp.wi_0.kernel": "m",
        "params.decoder.logits_dense.kernel": "h",
    },
    {
        "layers.0.attn.value.kernel.value": "a",
        "layers.0.mlp.down_proj.kernel.value": "m",
        "layers.0.up.bias.value": "m",
        "layers.0.bn.scale.value": "n",
        "layers.0.drop.rate.value": "o",
    },
    {"backbone.embeddings.weight": "e", "backbone.layers.0.mixer.in_proj.weight": "o", "backbone.norm_f.weight": "n"},
)


def test_roles_are_told_by_names():
    for model in MODELS:
        anatomy = anatomy_of({name: TensorInfo(name, (8, 8), "F32") for name in model})
        assert {name: role_of(anatomy, name)[0] for name in model} == model
    assert len({role[0] for role in ROLES}) == len(ROLES)


def test_blocks_of_a_stacked_leaf_have_its_role():
    names = ["decoder.layers.mlp.wi_0.kernel", "decoder.layers.self_attention.out.kernel", "decoder.decoder_norm.scale"]
    shapes = dict(zip(names, ((3, 4, 5), (3, 4, 5), (4,)), strict=True))
    anatomy = anatomy_of({n: TensorInfo(n, shape, "F32") for n, shape in shapes.items()}, {"num_hidden_layers": 3})
    assert anatomy.parts[names[0]].blocks == (0, 1, 2)
    assert [role_of(anatomy, name, anatomy.parts[name].block_names[1]) for name in names[:2]] == ["mlp", "attention"]
