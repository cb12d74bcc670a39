"""Filters and patterns that no tensor answers to are refused with the nearest name."""

import pytest

from m3jax.recipe import load_recipe, unmatched

NAMES = [
    "model.embed_tokens.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.0.mlp.up_proj.weight",
    "model.layers.0.self_attn.rotary_emb.inv_freq",
    "lm_head.weight",
]


def merge(**keys):
    return load_recipe({"merge_method": "ties", "base_model": "base", "models": ["a", "b"], **keys})


def filtered(*filters):
    return [*({"filter": text, "value": 0.5} for text in filters), {"value": 0.25}]


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        (
            {"parameters": {"density": filtered("mlp", "self_atn")}},
            "parameters.density.1.filter: 'self_atn' matches no tensor; did you mean 'self_attn', as in"
            " 'model.layers.0.self_attn.q_proj.weight'?",
        ),
        (
            {"models": ["a", {"model": "b", "parameters": {"weight": filtered("mlp.up_prj")}}]},
            "models.1.parameters.weight.0.filter: 'mlp.up_prj' matches no tensor; did you mean 'mlp.up_proj', as in"
            " 'model.layers.0.mlp.up_proj.weight'?",
        ),
        (
            {"parameters": {"weight": [{"filter": "mlp", "value": filtered("gate")}, {"value": 1}]}},
            "parameters.weight.0.value.0.filter: 'gate' matches no tensor; names look like 'model.embed_tokens.weight'",
        ),
        (
            {"exclude": ["lm_head", r"\.rotery_emb\."]},
            "exclude.1: '\\\\.rotery_emb\\\\.' matches no tensor; did you mean 'rotary_emb', as in"
            " 'model.layers.0.self_attn.rotary_emb.inv_freq'?",
        ),
        (
            {"exclude": [r"layers\.[0-9]+\.mpl\..*"]},
            "exclude.0: 'layers\\\\.[0-9]+\\\\.mpl\\\\..*' matches no tensor; did you mean 'mlp', as in"
            " 'model.layers.0.mlp.up_proj.weight'?",
        ),
    ],
)
def test_what_matches_nothing_is_refused_with_the_nearest_name(keys, sentence):
    assert unmatched(merge(**keys), NAMES) == sentence


def test_filters_of_slices_and_of_sparsify():
    sources = [{"model": m, "layer_range": [0, 1], "parameters": {"density": filtered("norm")}} for m in ("a", "b")]
    sliced = load_recipe({"merge_method": "ties", "base_model": "base", "slices": [{"sources": sources}]})
    assert unmatched(sliced, NAMES).startswith("slices.0.sources.0.parameters.density.0.filter: 'norm' matches no")
    sparse = load_recipe(
        {"merge_method": "linear", "models": ["a", "b"]}
        | {"base_model": "base", "sparsify": {"method": "dare", "density": filtered("embd_tokens")}}
    )
    assert "sparsify.density.0.filter" in unmatched(sparse, NAMES)
    assert "did you mean 'embed_tokens'" in unmatched(sparse, NAMES)


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"parameters": {"density": filtered("mlp", "self_attn", "*", "layers.0.mlp")}},
        {"exclude": ["^lm_head", "rotary|nothing"]},
        {"parameters": {"t": filtered("nothing")}},  # a parameter that the method does not use
    ],
)
def test_what_matches_is_left_alone(keys):
    assert unmatched(merge(**keys), NAMES) is None


def test_patterns_that_are_all_code_or_models_without_tensors():
    assert unmatched(merge(exclude=[r"^\d+$"]), NAMES).endswith("names look like 'model.embed_tokens.weight'")
    assert unmatched(merge(exclude=["x"]), []).endswith("the models have none")


def test_filters_see_the_blocks_of_stacked_tensors_and_exclude_does_not():
    names, blocks = ["layers.kernel"], ["layers.0.kernel", "layers.1.kernel"]
    assert unmatched(merge(parameters={"weight": filtered("layers.1")}), names, blocks) is None
    assert "'layers.7' matches no" in unmatched(merge(parameters={"weight": filtered("layers.7")}), names, blocks)
    assert "matches no tensor" in unmatched(merge(exclude=[r"layers\.1"]), names, blocks)
