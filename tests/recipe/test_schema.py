"""Recipes: what they mean, what they refuse, and the sentence they refuse it with."""

import doctest
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import m3jax.recipe.formulas as recipe_formulas
import m3jax.recipe.settings as recipe_settings
from m3jax import naming, recipe
from m3jax.errors import M3Error
from m3jax.methods.mixup import draw_weights
from m3jax.naming import block_of, layer_position
from m3jax.recipe import ModelEntry, Recipe, dialect, load_recipe, starting

CONFIGS = Path(__file__).parents[2] / "configs"
UP = "model.layers.{}.mlp.up_proj.weight"
QUERY = "model.layers.{}.self_attn.q_proj.weight"


def merge(method: str = "linear", **keys: Any) -> dict[str, Any]:
    """A small recipe that is right for its method."""
    base = {} if method in ("linear", "slerp") else {"base_model": "base"}
    ratio = {"parameters": {"t": 0.5}} if method == "slerp" else {}
    return {"merge_method": method, "models": ["a", "b"], **base, **ratio, **keys}


def source(model: str, first: int, end: int, **parameters: Any) -> dict[str, Any]:
    return {"model": model, "layer_range": [first, end], "parameters": parameters}


DARE = {"method": "dare", "density": 0.5}
SLICE = {"sources": [source("a", 0, 2), source("b", 0, 2)]}


def names(entries: tuple[ModelEntry, ...]) -> list[str]:
    return [entry.model for entry in entries]


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.stem)
def test_configs_load_and_survive_resolution(path: Path):
    loaded = load_recipe(path)
    written = loaded.resolved()
    assert Recipe.model_validate(written) == loaded
    assert Recipe.model_validate(json.loads(json.dumps(written))) == loaded
    assert Recipe.model_validate(yaml.safe_load(yaml.safe_dump(written))).resolved() == written


def test_every_kind_of_config_is_there():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} >= {
        "m3_linear",
        "m3_task_arithmetic",
        "m3_ties",
        "m3_dare_ties",
        "three_experts",
        "layerwise",
        "depth",
        "m3_smooth",
    }
    methods = {load_recipe(path).merge_method for path in CONFIGS.glob("mergekit/*.yaml")}
    assert methods == {"linear", "task_arithmetic", "ties", "dare_ties", "slerp", "passthrough"}


@pytest.mark.parametrize(
    "path", sorted([*CONFIGS.glob("*.yaml"), *CONFIGS.glob("paper/*.yaml")]), ids=lambda path: path.stem
)
def test_what_configs_draw_is_a_merge_of_all_their_models(path: Path):
    """And not nearly one of them, as many draws at α = 0.5 are."""
    made = load_recipe(path)
    if made.mixup is not None and made.mixup.granularity == "model":
        weights = draw_weights(made.seed, made.mixup.alpha, len(made.experts))
        assert max(weights) < 0.7
        assert f"{weights[0]:.3f}" in path.read_text()


@pytest.mark.parametrize("module", [naming, recipe, recipe_settings, recipe_formulas, dialect, starting])
def test_docstrings_are_true(module):
    assert doctest.testmod(module).failed == 0


# --- meaning --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "normalize", "rescale", "uses_base"),
    [
        ("linear", True, False, False),
        ("task_arithmetic", False, False, True),
        ("ties", True, False, True),
        ("dare_linear", False, True, True),
        ("dare_ties", False, True, True),
        ("slerp", False, False, False),
    ],
)
def test_defaults_of_each_method(method, normalize, rescale, uses_base):
    made = load_recipe(merge(method))
    assert made.flag("normalize") is normalize
    assert made.flag("rescale") is rescale
    assert made.uses_base is uses_base
    assert made.parameter("weight", "x", 0, 0.0) == (None if method == "slerp" else 1.0)
    assert made.parameter("lambda", "x", None, 0.0) == (None if method in ("linear", "slerp") else 1.0)


def test_defaults_are_mergekits():
    made = load_recipe(merge("dare_ties"))
    settings = {name: made.parameter(name, "x", None, 0.0) for name in made.parameters}
    assert settings["trim_density"] == 1.0
    assert settings["trim_scope"] == "tensor"
    assert settings["sign_election"] == "weighted"
    assert load_recipe(merge("ties")).parameter("density", "x", 1, 0.0) == 1.0


def test_flag_of_a_method_that_lacks_it_is_the_callers_default():
    assert load_recipe(merge("slerp")).flag("normalize", True) is True


def test_flags_accept_the_numbers_that_mergekit_writes():
    assert load_recipe(merge("ties", parameters={"normalize": 0.0})).flag("normalize") is False
    assert load_recipe(merge("task_arithmetic", parameters={"normalize": 1})).flag("normalize") is True


def test_linear_needs_the_base_only_for_sparse_deltas():
    sparse = {"method": "dare", "density": 0.5}
    assert load_recipe(merge(base_model="base", sparsify=sparse)).uses_base
    assert not load_recipe(merge(sparsify={**sparse, "target": "weights"})).uses_base


def test_models_that_mergekit_has_written_out():
    written = {"model": {"path": "org/a", "revision": "main"}, "lora": None, "override_architecture": None}
    adapted = {"model": {"path": "b"}, "lora": {"path": "c", "revision": "v1"}}
    made = load_recipe(merge(models=[{"model": written, "parameters": {"weight": 2}}, {"model": adapted}]))
    assert made.named_models == ("org/a@main", "b+c@v1")
    other = {**written, "override_architecture": "X"}
    for wrong, said in (({"path": "a"}, r"models\.0\.model: is no model"), (other, "m3jax goes by the names of ten")):
        with pytest.raises(M3Error, match=said):
            load_recipe(merge(models=[{"model": wrong}, "b"]))


def test_base_among_the_models():
    listed = ["a", "base", "b"]
    keys = {"base_model": "base", "models": listed}
    assert names(load_recipe(merge("linear", **keys)).experts) == listed
    assert names(load_recipe(merge("ties", **keys)).experts) == ["a", "b"]
    assert names(load_recipe(merge("dare_linear", **keys)).experts) == ["a", "b"]


@pytest.mark.parametrize("models", [["a", "base"], ["base", "a"], ["a"]])
def test_slerp_starts_at_the_base(models):
    assert names(load_recipe(merge("slerp", base_model="base", models=models)).experts) == ["base", "a"]


def test_slerp_without_a_base_takes_the_models_in_order():
    assert names(load_recipe(merge("slerp")).experts) == ["a", "b"]


def test_nearer_settings_win_and_unmatched_filters_fall_through():
    weight = [{"filter": "mlp", "value": 0.25}]
    models = ["a", {"model": "b", "parameters": {"weight": weight}}]
    made = load_recipe(merge(models=models, parameters={"weight": [{"filter": "attn", "value": 2}]}))
    assert made.parameter("weight", UP.format(0), 1, 0.0) == 0.25
    assert made.parameter("weight", QUERY.format(0), 1, 0.0) == 2.0
    assert made.parameter("weight", UP.format(0), 0, 0.0) is None
    assert made.parameter("weight", UP.format(0), None, 0.0) is None


def test_first_matching_filter_wins():
    weight = [{"filter": "q_proj", "value": [0, 1]}, {"filter": "*", "value": 3}, {"value": 4}]
    made = load_recipe(merge(parameters={"weight": weight}))
    assert made.parameter("weight", QUERY.format(1), 0, 0.5) == 0.5
    assert made.parameter("weight", UP.format(1), 0, 0.5) == 3.0


def test_one_filter_needs_no_list():
    made = load_recipe(merge(parameters={"weight": {"filter": "mlp", "value": ["1e-1", 0.3]}}))
    assert made.parameter("weight", UP.format(0), 0, 0.5) == pytest.approx(0.2)
    assert made.parameter("weight", QUERY.format(0), 0, 0.5) is None
    assert made == load_recipe(merge(parameters={"weight": [{"filter": "mlp", "value": [0.1, 0.3]}]}))


def test_filters_nest():
    inner = [{"filter": "up", "value": 7}]
    weight = [{"filter": "mlp", "value": inner}, {"value": 1}]
    models = [{"model": "a", "parameters": {"weight": weight}}, "b"]
    made = load_recipe(merge(models=models, parameters={"weight": 9}))
    assert made.parameter("weight", UP.format(0), 0, 0.0) == 7.0
    assert made.parameter("weight", "layers.0.mlp.down", 0, 0.0) == 9.0


@pytest.mark.parametrize(
    ("t", "value"), [(0.0, 0.0), (0.125, 0.25), (0.25, 0.5), (0.375, 0.4), (1.0, 1.0), (2.0, 1.0), (-1.0, 0.0)]
)
def test_gradients_are_piecewise_linear(t, value):
    made = load_recipe(merge("slerp", parameters={"t": [0, 0.5, 0.3, 0.7, 1]}))
    assert made.parameter("t", "x", None, t) == pytest.approx(value, abs=1e-15)


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=6))
def test_gradients_pass_through_their_points(points):
    made = load_recipe(merge(parameters={"weight": points, "normalize": False}))
    last = max(1, len(points) - 1)
    for i, point in enumerate(points):
        assert made.parameter("weight", "x", 0, i / last) == pytest.approx(point, abs=1e-9)


def test_formulas_of_depth():
    weight = [{"filter": "mlp", "value": "cosine(0, 1)"}, {"value": "linear(1e-1, -.5)"}]
    made = load_recipe(merge(parameters={"weight": weight}))
    for i in range(9):
        t = i / 8
        cosine = (1 - math.cos(math.pi * t)) / 2
        assert made.parameter("weight", UP.format(0), 0, t) == pytest.approx(cosine, abs=1e-15)
        assert made.parameter("weight", QUERY.format(0), 0, t) == (1 - t) * 0.1 - t * 0.5
    assert made.has_gradients()
    assert made.resolved()["parameters"]["weight"][1]["value"] == "linear(0.1, -0.5)"
    assert Recipe.model_validate(json.loads(json.dumps(made.resolved()))) == made
    assert load_recipe(merge(sparsify=DARE | {"density": "cosine(1, 0.5)"}, base_model="c")).has_gradients()


def test_numbers_may_be_text():
    made = load_recipe(merge(mixup={"alpha": "1e-3"}, seed="12"))
    assert made.mixup is not None
    assert made.mixup.alpha == 0.001
    assert made.seed == 12


@pytest.mark.parametrize(
    ("spelling", "dtype"),
    [
        ("bf16", "bfloat16"),
        ("half", "float16"),
        ("fp32", "float32"),
        ("float", "float32"),
        ("torch.float16", "float16"),
    ],
)
def test_dtype_spellings(spelling, dtype):
    assert load_recipe(merge(dtype=spelling)).output_dtype == dtype


def test_out_dtype_wins():
    assert load_recipe(merge(dtype="float32", out_dtype="bf16")).output_dtype == "bfloat16"
    assert load_recipe(merge()).output_dtype is None


def test_tokenizer_spellings():
    assert load_recipe(merge(tokenizer={"source": "union"})).tokenizer_source == "union"
    assert load_recipe(merge(tokenizer_source="a")).tokenizer_source == "a"
    asked = {"tokens": {"x": {"source": {"kind": "model_token", "model": "b", "token_id": 3}, "force": True}}}
    told = load_recipe(merge(tokenizer={**asked, "pad_to_multiple_of": 64}, also_for="a"))
    assert told.tokenizer_source == "union"
    assert told.resolved()["tokenizer"] == {**asked, "pad_to_multiple_of": 64}
    assert load_recipe(told.resolved()) == told


def test_sparsify_defaults_and_filters():
    density = [{"filter": "mlp", "value": [0.2, 0.4]}]
    made = load_recipe(merge("ties", sparsify={"method": "dare", "density": density}))
    assert made.sparsify is not None
    assert made.sparsify.parameters["rescale"] is True
    assert made.sparsify.numbers(UP.format(1), 0.5, 2) == {"density": (pytest.approx(0.3),) * 2}
    assert made.sparsify.numbers(QUERY.format(1), 0.5, 2) == {"density": (1.0, 1.0)}
    magnitude = load_recipe(merge("ties", sparsify={"method": "magnitude", "density": 0.1})).sparsify
    assert magnitude is not None
    assert magnitude.parameters["rescale"] is False


def test_manifests_that_name_a_scope_where_there_is_none_still_load():
    written = {"method": "dare", "density": 0.5, "target": "delta", "rescale": True, "scope": "tensor"}
    assert load_recipe(merge("ties", sparsify=written)) == load_recipe(merge("ties", sparsify=DARE))


def test_excluded_tensors():
    made = load_recipe(merge(exclude=["rotary", "^lm_head"]))
    assert made.excludes("model.layers.0.rotary_emb.inv_freq")
    assert made.excludes("lm_head.weight")
    assert not made.excludes("model.lm_head.weight")


def test_notes():
    assert load_recipe(merge()).notes() == ()
    assert [note.split()[0] for note in load_recipe(merge("dare_ties", parameters={"int8_mask": True})).notes()] == [
        "int8_mask",
        "rescale",
    ]


def test_notes_of_what_mergekit_does_otherwise():
    averaged = load_recipe(merge(base_model="c", parameters={"weight": 0.5}))
    assert [note.split(",")[0] for note in averaged.notes()] == [
        "base_model gives linear configuration and tokenizer only"
    ]
    assert load_recipe(merge(base_model="a", parameters={"weight": 0.5})).notes() == ()
    stood = load_recipe(merge(parameters={"weight": [{"filter": "mlp", "value": [0, 1]}]})).notes()
    assert [note.split(",")[0] for note in stood] == ["gradients stand at their last value after the layers"]
    assert load_recipe(merge(parameters={"weight": "linear(0, 1)"})).notes() == ()


def test_slices_keep_their_parameters():
    made = load_recipe(
        {
            "merge_method": "linear",
            "slices": [
                {"sources": [source("a", 0, 2), source("b", 0, 2, weight=[2, 4])], "parameters": {"weight": 5}},
                {"sources": [source("b", 2, 5), source("a", 2, 5)], "parameters": {"weight": [0, 1]}},
                {"sources": [source("a", 5, 6), source("b", 5, 6)]},
            ],
            "parameters": {"weight": [10, 20]},
        }
    )
    assert names(made.experts) == ["a", "b"]
    assert made.declared_layers() == 6

    def weights(name: str) -> tuple[Any, ...]:
        return tuple(made.parameter("weight", name, i, layer_position(name, 6)) for i in (0, 1))

    assert weights("model.embed_tokens.weight") == (5.0, 2.0)
    assert weights(UP.format(0)) == (5.0, 2.0)
    assert weights(UP.format(1)) == (5.0, 4.0)
    assert weights(UP.format(3)) == (0.5, 0.5)  # gradients run over each slice anew
    assert weights(UP.format(5)) == (20.0, 20.0)  # a slice of one layer stands at t = 1
    assert weights("lm_head.weight") == (20.0, 20.0)
    assert Recipe.model_validate(made.resolved()) == made


def test_slices_slerp_example():
    made = load_recipe(CONFIGS / "mergekit" / "slices_slerp.yaml")
    t = [made.parameter("t", QUERY.format(i), None, layer_position(QUERY.format(i), 32)) for i in (0, 15, 16)]
    assert t == pytest.approx([0.0, 0.4, 0.6])
    assert made.parameter("t", UP.format(3), None, 0.1) == 0.25


# --- where a tensor is ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("model.layers.3.mlp.up_proj.weight", ("model.layers.3", 3)),
        ("transformer.h.10.ln_1.bias", ("transformer.h.10", 10)),
        ("h.0", ("h.0", 0)),
        ("encoder.block.1.layer.0.k.weight", ("encoder.block.1", 1)),
        ("model.layers.2.blocks.7.w", ("model.layers.2", 2)),
        ("model.my_layers.3.w", None),
        ("model.layers.3b.w", None),
        ("lm_head.weight", None),
    ],
)
def test_block_of(name, block):
    assert block_of(name) == block


@pytest.mark.parametrize(
    ("name", "layers", "t"),
    [
        ("model.embed_tokens.weight", 4, 0.0),
        ("transformer.wte.weight", 4, 0.0),
        ("wpe.weight", 4, 0.0),
        ("model.layers.0.mlp.w", 4, 0.0),
        ("model.layers.1.mlp.w", 3, 0.5),
        ("model.layers.3.embed.w", 4, 1.0),
        ("model.layers.9.mlp.w", 4, 1.0),
        ("model.layers.0.mlp.w", 1, 1.0),
        ("model.norm.weight", 4, 1.0),
        ("lm_head.weight", 4, 1.0),
        ("embed_out.weight", 4, 1.0),
    ],
)
def test_layer_position(name, layers, t):
    assert layer_position(name, layers) == t


# --- the command line's overrides -----------------------------------------------------------------------------


def test_overrides():
    raw = merge("ties", parameters={"density": 0.9})
    made = load_recipe(
        raw,
        ["parameters.density=0.3", "models.0.parameters.weight=[0, 1]", "sparsify.method=dare", "sparsify.density=.5"],
        seed=2**64 - 1,
    )
    assert made.parameters["density"] == 0.3
    assert made.models[0].parameters == {"weight": (0.0, 1.0)}
    assert made.sparsify is not None
    assert made.sparsify.parameters["density"] == 0.5
    assert made.seed == 2**64 - 1
    assert raw == merge("ties", parameters={"density": 0.9})


def test_an_override_can_take_away():
    assert load_recipe(merge(mixup={"alpha": 1}), ["mixup=null"]).mixup is None


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("mixup.alpha", "--set mixup.alpha: not of the form key=value"),
        ("=3", "--set =3: not of the form key=value"),
        ("mixup..alpha=3", "not of the form key=value"),
        ("seed=[", "--set seed=[: line 1: not valid YAML"),
        ("models.7.model=c", "models has no entry '7'; write a number from 0 to 1"),
        ("models.first.model=c", "models has no entry 'first'"),
        ("seed.x=1", "seed is 3 and has no 'x' inside; set seed itself"),
        ("mixup.aplha=0.5", "mixup.aplha: unknown key; did you mean 'alpha'?"),
        ("sede=1", "sede: unknown key; did you mean 'seed'?"),
    ],
)
def test_wrong_overrides(override, sentence):
    with pytest.raises(M3Error, match=re.escape(sentence)):
        load_recipe(merge(seed=3), [override])


# --- sentences ------------------------------------------------------------------------------------------------


WRONG = [
    # keys
    ({"models": ["a", "b"]}, "merge_method: missing; add it"),
    ({"merge_method": "linear"}, "models: missing; add it"),
    ({"merge_methd": "ties", "models": ["a"]}, "merge_methd: unknown key; did you mean 'merge_method'?"),
    (merge(random_seed=1), "random_seed: unknown key; did you mean 'seed'?"),
    (merge(zzz=1), "zzz: unknown key; known are name, merge_method"),
    (
        merge(models=["a", {"model": "b", "paramters": {}}]),
        "models.1.paramters: unknown key; did you mean 'parameters'?",
    ),
    (merge(mixup={"alpha": 1, "granularty": "layer"}), "mixup.granularty: unknown key; did you mean 'granularity'?"),
    (merge("ties", sparsify={**DARE, "densty": 1}), "sparsify.densty: unknown key; did you mean 'density'?"),
    (merge(parameters={"wieght": 1}), "parameters.wieght: unknown parameter; did you mean 'weight'?"),
    (
        merge(models=["a", {"model": "b", "parameters": {"denisty": 1}}]),
        "models.1.parameters.denisty: unknown parameter; did you mean 'density', which is for ties, dare_linear",
    ),
    (
        merge(parameters={"weight": [{"filtr": "x", "value": 1}]}),
        "parameters.weight.0.filtr: unknown key; did you mean",
    ),
    (
        merge("ties", models=["a", {"model": "b", "parameters": {"normalize": True}}]),
        "models.1.parameters.normalize: it is set for the whole merge; move it",
    ),
    (merge(tokenizer={"source": "union"}, tokenizer_source="a"), "tokenizer.source: given together with tokenizer_"),
    (merge(tokenizer="union"), "tokenizer: 'union' is not a mapping; write 'key: value' lines"),
    (merge(tokenizer={"sauce": "union"}), "tokenizer.sauce: unknown key; did you mean 'source'?"),
    (merge(tokenizer={"pad_to_multiple_of": 0}), "tokenizer.pad_to_multiple_of: 0 is no whole number above 0"),
    (merge(tokenizer={"tokens": {"x": {"force": True}}}), "tokenizer.tokens.x.source: missing; write a model"),
    (merge(tokenizer={"tokens": {"x": {"source": "c"}}}), "tokenizer.tokens.x.source: c is not one of the models"),
    (merge(tokenizer={"tokens": {"x": {"source": {"kind": "zer"}}}}), "tokenizer.tokens.x.source.kind: 'zer' is no"),
    (
        merge(tokenizer={"tokens": {"x": {"source": {"kind": "model_token", "model": "a"}}}}),
        "tokenizer.tokens.x.source: write either token or token_id",
    ),
    (merge(also_for="c", tokenizer_source="union"), "also_for.0: c is not one of the models; known are a, b"),
    (merge(also_for="b"), "also_for: needs one vocabulary for all; write tokenizer_source: union"),
    (merge(modules={"text": {}}), "modules: given together with models"),
    ({"merge_method": "linear", "modules": {}}, "modules: names no part of the models"),
    ({"merge_method": "linear", "modules": {"text": {"slices": None}}}, "modules.text: has neither models nor slices"),
    (
        {"merge_method": "linear", "modules": {"text": {"models": ["a"], "slices": [SLICE]}}},
        "modules.text.slices: given together with models",
    ),
    (
        {"merge_method": "linear", "modules": {"text": {"models": ["a", "b"], "paramters": {}}}},
        "modules.text.paramters: unknown key; did you mean 'parameters'?",
    ),
    (
        {"merge_method": "linear", "modules": {"text": {"slices": [{**SLICE, "base": "a"}]}}},
        "modules.text.slices.0.base: unknown key; did you mean 'base_model'?",
    ),
    (
        {"merge_method": "linear", "modules": {"text": {"models": ["a"], "parameters": {"normalize": 1}}}},
        "modules.text.parameters.normalize: it is set for the whole merge",
    ),
    (
        {"merge_method": "ties", "modules": {"text": {"models": ["a"], "parameters": {"desnity": 1}}}},
        "modules.text.parameters.desnity: unknown parameter; did you mean 'density'?",
    ),
    ({"gate_mode": "hidden", "experts": []}, "m3jax builds no mixtures of experts"),
    ({"genome": {}, "tasks": []}, "this is a file for mergekit-evolve"),
    (merge(tokenizer_source="base"), "tokenizer_source: 'base' needs a base_model"),
    # methods
    (merge("tise"), "merge_method: 'tise' is not here; did you mean 'ties'? available are linear, task_arithmetic"),
    (merge("passtrough"), "merge_method: 'passtrough' is not here; did you mean 'passthrough'?"),
    (merge("passthrough"), "models: passthrough merges 1 model, not 2"),
    # models
    (merge(models="a"), "models: 'a' does not fit here; write a list"),
    (merge(name=3), "name: 3 does not fit here; write text"),
    ({**merge(), True: 1}, "True does not fit here; write keys that are text"),
    (merge(models=["a", 7]), "models.1: 7 is not a model; write its path"),
    (merge(models=["a", " "]), "models.1.model: ' ' does not fit here; write a name that is not empty"),
    (merge(models=[]), "models: no expert"),
    (merge("ties", models=["base"]), "models: no expert, and ties needs one or more"),
    (merge(models=["a"], mixup={"alpha": 1}), "mixup: draws how experts share, and there is one only"),
    ({"merge_method": "ties", "models": ["a", "b"]}, "base_model: missing, and ties works on differences"),
    (merge(sparsify=DARE), "base_model: missing, and linear works on differences"),
    # numbers
    (merge("ties", parameters={"density": 1.5}), "parameters.density: 1.5 is outside [0, 1]; write a number inside"),
    (merge("ties", parameters={"density": [1, -0.1]}), "parameters.density.1: -0.1 is outside [0, 1]"),
    (
        merge("ties", models=["a", {"model": "b", "parameters": {"density": [{"filter": "mlp", "value": [0, 2]}]}}]),
        "models.1.parameters.density.0.value.1: 2 is outside [0, 1]",
    ),
    (merge("ties", sparsify={**DARE, "density": 7}), "sparsify.density: 7 is outside [0, 1]"),
    (merge("ties", sparsify={"method": "dare"}), "sparsify.density: missing; add it"),
    (merge("slerp", parameters={"t": [0, 1.01]}), "parameters.t.1: 1.01 is outside [0, 1]"),
    (merge(parameters={"weight": True}), "parameters.weight: True is not a number"),
    (merge(parameters={"weight": "much"}), "parameters.weight: 'much' is not a number"),
    (merge(parameters={"weight": [1, "x"]}), "parameters.weight.1: 'x' is not a number"),
    (merge(parameters={"weight": "cosin(0, 1)"}), "parameters.weight: cosin is no formula; did you mean 'cosine'?"),
    (merge(parameters={"weight": "linear(0)"}), "parameters.weight: linear(0) has not two numbers; write such as lin"),
    (merge("slerp", parameters={"t": "linear(0, 2)"}), "parameters.t: 2 is outside [0, 1]"),
    (merge("ties", parameters={"normalize": "linear(0, 1)"}), "parameters.normalize: 'linear(0, 1)' is not true or"),
    (
        merge("ties", parameters={"trim_scope": "model", "density": "linear(0, 1)"}),
        "parameters.density: trim_scope: model needs one number",
    ),
    (merge(mixup={"alpha": 1, "smooth": 0.5}), "mixup.smooth: is of neighbouring layers; write granularity: layer"),
    (merge(mixup={"alpha": 1, "granularity": "layer", "smooth": 1}), "mixup.smooth: 1 is one draw for all layers"),
    (merge(mixup={"alpha": 1, "granularity": "layer", "smooth": -1}), "mixup.smooth: -1 is outside [0, 1]"),
    (merge(parameters={"weight": []}), "parameters.weight: the list is empty"),
    (merge(parameters={"weight": {"filtr": "mlp", "value": 1}}), "parameters.weight.filtr: unknown key; did you mean"),
    (merge(parameters={"weight": [{"value": 1}, 2]}), "parameters.weight.1: 2 stands among filters"),
    (merge(parameters={"weight": [{"filter": "mlp"}]}), "parameters.weight.0: the filter has no value"),
    (merge(parameters={"weight": [{"filter": 3, "value": 1}]}), "parameters.weight.0.filter: 3 is not text"),
    (merge(parameters={"weight": float("nan")}), "parameters.weight: nan is not finite"),
    (merge(parameters={"weight": [0, float("inf")]}), "parameters.weight.1: inf is not finite"),
    (merge(parameters={"weight": "inf"}), "parameters.weight: inf is not finite"),
    (merge(parameters={"weight": 10**400}), "parameters.weight: "),
    (merge("ties", parameters={"lambda": float("-inf")}), "parameters.lambda: -inf is not finite"),
    (merge(parameters=[1]), "parameters: [1] is not a mapping"),
    (merge("ties", parameters={"normalize": 2}), "parameters.normalize: 2 is not true or false"),
    (merge("ties", parameters={"normalize": [True]}), "parameters.normalize: [True] is not true or false"),
    (merge("ties", parameters={"trim_scope": "layer"}), "parameters.trim_scope: 'layer' is not one of tensor, model"),
    (merge("ties", parameters={"rescale": True}), "parameters.rescale: ties trims without rescaling; use sparsify"),
    (
        merge("ties", parameters={"trim_scope": "model", "density": [0, 1]}),
        "parameters.density: trim_scope: model needs one number",
    ),
    (merge(models=[{"model": "a", "parameters": {"weight": -1}}, "b"]), "parameters.normalize: the weights sum to 0"),
    (merge("ties", parameters={"weight": 0}), "parameters.normalize: the weights sum to 0"),
    # mixup
    (merge(mixup={"alpha": 0}), "mixup.alpha: 0 is not above 0"),
    (merge(mixup={"alpha": -1.5}), "mixup.alpha: -1.5 is not above 0"),
    (merge(mixup={"alpha": float("inf")}), "mixup.alpha: inf is not finite"),
    (merge(mixup={"alpha": float("nan")}), "mixup.alpha: nan is not finite"),
    (merge(mixup={"alpha": True}), "mixup.alpha: True is not a number"),
    (merge(mixup={"alpha": [1, 0]}), "mixup.alpha.1: 0 is not above 0"),
    (merge(mixup={"alpha": [1, 2, 3]}), "mixup.alpha: 3 shape parameters; write one number or a pair"),
    (merge(mixup={"alpha": [1, 2]}, models=["a", "b", "c"]), "mixup.alpha: a pair is for two experts, not 3"),
    (merge(mixup={}), "mixup.alpha: missing; add it"),
    (merge(mixup=0.5), "mixup: 0.5 does not fit here; write 'key: value' lines"),
    (merge(mixup={"alpha": 1, "granularity": "layers"}), "mixup.granularity: 'layers' is not one of 'model', 'layer'"),
    (merge(mixup={"alpha": 1}, parameters={"weight": 1}), "parameters.weight: given, but mixup draws it"),
    (
        merge(mixup={"alpha": 1}, models=["a", {"model": "b", "parameters": {"weight": 1}}]),
        "models.1.parameters.weight: given, but mixup draws it",
    ),
    (merge("slerp", mixup={"alpha": 1}), "parameters.t: given, but mixup draws it"),
    # slerp
    (merge("slerp", models=["a", "b", "c"]), "models: slerp merges 2 models"),
    (merge("slerp", base_model="c"), "models: slerp merges 2 models, and base_model is one if given, not 3"),
    (merge("slerp", parameters={}), "parameters.t: slerp needs it for every tensor"),
    (
        merge("slerp", parameters={"t": [{"filter": "mlp", "value": 1}]}),
        "parameters.t: slerp needs it for every tensor",
    ),
    (merge("slerp", sparsify=DARE), "sparsify: slerp cannot be combined with one; remove this"),
    # sparsify
    (merge("dare_ties", sparsify=DARE), "sparsify: dare_ties sparsifies already; remove this or use merge_method ties"),
    (merge("ties", sparsify={**DARE, "scope": "model"}), "sparsify.scope: dare has no scope, which is for magnitude"),
    (
        merge("ties", sparsify={"method": "magnitude", "density": [0, 1], "scope": "model"}),
        "sparsify.density: one threshold for the whole model needs one density",
    ),
    (merge("ties", sparsify={**DARE, "method": "random"}), "sparsify.method: 'random' is not here; available are dare"),
    (merge("ties", sparsify={**DARE, "rescale": 2}), "sparsify.rescale: 2 is not true or false"),
    # the rest
    (merge(seed=-1), "seed: -1 is outside [0, 2^64)"),
    (merge(seed=2**64), "seed: 18446744073709551616 is outside [0, 2^64)"),
    (merge(seed=True), "seed: True is not a whole number"),
    (merge(seed=0.5), "seed: 0.5 is not a whole number"),
    (merge(mixup={"alpha": 1}, seed=1, seeds="0..3"), "seeds: given together with seed; keep one of the two"),
    (merge(mixup={"alpha": 1}, seeds=[]), "seeds: is empty; write such as 0..31"),
    (merge(mixup={"alpha": 1}, seeds="5..3"), "seeds: 5..3 runs backwards; write 3..5"),
    (merge(mixup={"alpha": 1}, seeds=7), "seeds: 7 is no list of seeds; write such as 0..31, or seed for one"),
    (merge(mixup={"alpha": 1}, seeds=[1, "0..2"]), "seeds: 1 is there twice; name each seed once"),
    (merge(mixup={"alpha": 1}, seeds="0..1000000000"), "seeds: 1,000,000,001 seeds are more than 1,000"),
    (merge(mixup={"alpha": 1}, seeds=["a..3"]), "seeds: 'a' is not a whole number"),
    (merge("ties", seeds="0..3"), "seeds: nothing of this ties is drawn (mixup, dare, della), so that all merges"),
    (
        merge(mixup={"alpha": 1}, intermediates=[{**merge(mixup={"alpha": 1}, seeds="0..3"), "name": "x"}]),
        "intermediates.0.seeds: are for the output, and this is made on the way to it; write seed",
    ),
    (merge(dtype="float64"), "dtype: 'float64' is no output dtype; write bfloat16, float16 or float32"),
    (merge(out_dtype=16), "out_dtype: 16 is no output dtype"),
    (merge(exclude=["fine", "(a"]), "exclude.1: '(a' is no regular expression"),
    (merge(exclude="rotary"), "exclude: 'rotary' does not fit here"),
    # slices
    (merge(slices=[SLICE]), "slices: given together with models"),
    ({"merge_method": "linear", "slices": []}, "slices: not a list of slices with sources"),
    (
        {"merge_method": "linear", "slices": [{"sources": []}]},
        "slices.0.sources: [] does not fit here; write a longer list",
    ),
    (
        {"merge_method": "linear", "slices": [{"sources": [{"model": "a", "layer_rnage": [0, 2]}]}]},
        "slices.0.sources.0.layer_rnage: unknown key; did you mean 'layer_range'?",
    ),
    (
        {"merge_method": "linear", "slices": [{**SLICE, "residual_weight": 1}]},
        "slices.0.residual_weight: mergekit reads",
    ),
    (
        {"merge_method": "linear", "slices": [{"sources": [{"model": 7, "layer_range": [0, 2]}]}]},
        "slices.0.sources.0.model: 7 does not fit here; write text",
    ),
    (
        {"merge_method": "linear", "slices": [{**SLICE, "parameters": {"normalize": True}}]},
        "slices.0.parameters.normalize: it is set for the whole merge",
    ),
]


@pytest.mark.parametrize(("raw", "sentence"), WRONG, ids=[sentence[:60] for _, sentence in WRONG])
def test_wrong_recipes_are_refused_in_one_sentence(raw, sentence):
    with pytest.raises(M3Error) as refusal:
        load_recipe(raw)
    assert str(refusal.value).startswith("recipe: ")
    assert sentence in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert "pydantic" not in str(refusal.value)


STACKED = [
    ([source("a", 3, 4), source("b", 3, 4)], None),  # a gap
    ([source("a", 1, 4), source("b", 1, 4)], None),  # an overlap
    ([source("a", 2, 4), source("b", 3, 5)], None),  # different layers
    ([source("a", 2, 4), source("c", 2, 4)], None),  # another model
    ([source("a", 2, 4)], None),  # fewer sources
    ([source("a", 2, 2), source("b", 2, 2)], r"layer_range: \[2, 2\] holds no layers"),
    ([source("a", 2, 4), source("b", 2, 3)], r"runs of different lengths \(a \[2, 4\], b \[2, 3\]\)"),
]


@pytest.mark.parametrize(("sources", "sentence"), STACKED)
def test_slices_that_stack_layers(sources, sentence):
    raw = {"merge_method": "linear", "slices": [SLICE, {"sources": sources}]}
    if sentence is not None:
        with pytest.raises(M3Error, match=rf"recipe: slices\.1.*{sentence}"):
            load_recipe(raw)
        return
    made = load_recipe(raw)
    assert made.stacks
    assert made.declared_layers() == 2 + sources[0]["layer_range"][1] - sources[0]["layer_range"][0]


@pytest.mark.parametrize("raw", [None, 3, "linear", ["linear"]])
def test_a_recipe_is_a_mapping(raw):
    with pytest.raises(M3Error, match="is not a mapping of keys to values"):
        Recipe.model_validate(raw)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (b"", "None is not a mapping"),
        (b"- a\n- b\n", "['a', 'b'] is not a mapping"),
        (b"models: [a\nmerge_method: linear\n", "line 2: not valid YAML"),
        (b"seed: 1\nmodels: [a, b]\nseed: 2\n", "line 3: not valid YAML: the key 'seed' is written twice"),
        (b"name: !!python/object:os.system x\n", "line 1: not valid YAML"),
        (b"models: [a, b]\nseed: 1:30:00\n", "line 2: not valid YAML: 1:30:00 would be read as minutes and seconds"),
        (b"normalize: -1:30.5\n", "line 1: not valid YAML: -1:30.5 would be read as minutes and seconds"),
        (b"seed: 1\n---\nseed: 2\n", "documents 1 and 2 have no name; name all but the one"),
        (b"name: a\n---\n- b\n", "document 2 is ['b'], not a mapping"),
        (
            b"name: a\nmodels: [b]\n---\nmerge_method: linear\nmodels: [a]\n",
            "intermediates.a: merge_method: missing; add it",
        ),
        (b"name: 2024-99-99\n", "not valid YAML: month must be in 1..12"),
        (b"name: \xff\n", "cannot be read (it is not UTF-8 text)"),
    ],
)
def test_wrong_files(tmp_path, text, sentence):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text)
    with pytest.raises(M3Error, match=re.escape(f"{path}: ")) as refusal:
        load_recipe(path)
    assert sentence in str(refusal.value)


def test_missing_files(tmp_path):
    with pytest.raises(M3Error, match=r"none\.yaml: no such recipe file; check the path"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(M3Error, match="cannot be read"):
        load_recipe(tmp_path)


# --- several documents ----------------------------------------------------------------------------------------


def documents(*recipes: dict[str, Any]) -> str:
    return "\n---\n".join(map(yaml.safe_dump, recipes))


def linear(name: str | None, *models: str, **keys: Any) -> dict[str, Any]:
    named = {} if name is None else {"name": name}
    return {**named, "merge_method": "linear", "models": list(models), **keys}


def test_documents_are_in_the_order_in_which_they_can_be_made(tmp_path):
    path = tmp_path / "recipe.yaml"
    last = {**merge("ties", models=["second", "b"]), "base_model": "first"}
    path.write_text(documents(last, linear("second", "first", "c"), linear("idle", "a"), linear("first", "a", "b")))
    made = load_recipe(path, ["dtype=float32"], seed=3)
    assert made.name is None
    assert [recipe.name for recipe in made.intermediates] == ["first", "second", "idle"]
    assert [recipe.name for recipe in made.needed] == ["first", "second"]
    assert [recipe.seed for recipe in (made, *made.intermediates)] == [3] * 4
    assert any(note.startswith("idle: the output does not need it") for note in made.notes())
    assert Recipe.model_validate(json.loads(json.dumps(made.resolved()))) == made
    path.write_text(documents(linear("first", "a"), linear("last", "first", "b")))
    assert load_recipe(path).name == "last"


@pytest.mark.parametrize(
    ("recipes", "sentence"),
    [
        ([linear("a", "b"), linear("b", "a")], "the documents need each other in a circle (a -> b -> a); break it"),
        ([linear("a", "a"), linear(None, "a")], "the documents need each other in a circle (a -> a); break it"),
        ([linear("a", "x"), linear("a", "y"), linear(None, "a")], "intermediates.1.name: 'a' is the name of two doc"),
        ([linear("a", "x"), linear(None, "a@main")], "a@main: a is a document here, of which there is nothing but"),
        ([linear("a", "x", sede=1), linear(None, "a")], "intermediates.a: sede: unknown key; did you mean 'seed'?"),
        ([linear(None, "a", intermediates=[]), linear("b", "x")], "document 1 has intermediates"),
    ],
)
def test_documents_that_cannot_be(tmp_path, recipes, sentence):
    (tmp_path / "recipe.yaml").write_text(documents(*recipes))
    with pytest.raises(M3Error, match=re.escape(sentence)):
        load_recipe(tmp_path / "recipe.yaml")


# --- resolution -----------------------------------------------------------------------------------------------

NUMBER = st.floats(0.0, 1.0) | st.integers(0, 1)
PLAIN = NUMBER | st.lists(NUMBER, min_size=1, max_size=4)
FILTERS = st.lists(
    st.fixed_dictionaries({"value": PLAIN}, optional={"filter": st.none() | st.text(max_size=4)}),
    min_size=1,
    max_size=3,
)
SETTING = PLAIN | FILTERS
EXPERT = st.fixed_dictionaries(
    {"model": st.sampled_from("abc"), "parameters": st.dictionaries(st.sampled_from(["density", "weight"]), SETTING)}
)
RECIPE = st.fixed_dictionaries(
    {
        "merge_method": st.sampled_from(["ties", "dare_linear", "dare_ties"]),
        "base_model": st.just("base"),
        "models": st.lists(EXPERT, min_size=2, max_size=3),
        "parameters": st.fixed_dictionaries(
            {"normalize": st.just(False)}, optional={"lambda": SETTING, "weight": SETTING, "int8_mask": st.booleans()}
        ),
    },
    optional={
        "seed": st.integers(0, 2**64 - 1),
        "dtype": st.sampled_from(["bf16", "float32", None]),
        "exclude": st.lists(st.sampled_from([".*rotary.*", "^a$"])),
        "name": st.text(),
    },
)


@settings(max_examples=100, deadline=None)
@given(RECIPE)
def test_resolved_recipes_are_the_same_recipe(raw):
    made = load_recipe(raw)
    written = made.resolved()
    again = Recipe.model_validate(json.loads(json.dumps(written)))
    assert again == made
    assert list(again.resolved()) == list(written)


def test_resolved_writes_every_default():
    written = load_recipe(merge("task_arithmetic", mixup={"alpha": 0.5})).resolved()
    assert list(written) == [
        "name",
        "merge_method",
        "base_model",
        "models",
        "sparsify",
        "mixup",
        "parameters",
        "seed",
        "dtype",
        "out_dtype",
        "tokenizer_source",
        "chat_template",
        "exclude",
    ]
    assert written["parameters"] == {"normalize": False, "lambda": 1.0}
    assert written["mixup"] == {"alpha": 0.5, "granularity": "model"}


def test_recipes_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        load_recipe(merge()).seed = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("method", "parameters", "unused"),
    [
        ("linear", {"density": 0.5, "lambda": 0.1}, "density, lambda"),
        ("ties", {"t": 0.5}, "t"),
        ("slerp", {"t": 0.5, "weight": 1, "normalize": True}, "normalize, weight"),
    ],
)
def test_mergekits_idle_parameters_are_ignored_with_a_note(method, parameters, unused):
    made = load_recipe(merge(method, parameters=parameters))
    assert any(f"does not use {unused}, which is ignored" in note for note in made.notes())
    for name in unused.split(", "):
        assert made.parameter(name, UP.format(0), None, 0.5) is None


# --- Texts that mean harm -------------------------------------------------------------------------------------------

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "\n".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("models: &a [*a]", "line 1: an alias stands inside what it repeats"),
        ("a: &a {b: *a}", "line 1: an alias stands inside what it repeats"),
        (BOMB, "aliases make more than 100,000 entries"),
        (BOMB.replace("[", "[").replace("i: &i [", "i: {<<: [") + "}", "not valid YAML|aliases make more"),
        ("[" * 200 + "]" * 200, "brackets inside brackets without end"),
        ("seed: " + ":".join(["59"] * 400) + ".5", "not valid YAML"),
        ("seed: !!bool maybe", "not valid YAML"),
        ("seed: !!timestamp soon", "not valid YAML"),
        ("seed: !!float ''", "not valid YAML"),
        ("seed: !!int ''", "not valid YAML"),
        ("? [a, b]\n: c", "not valid YAML"),
        (
            "merge_method: no\nmodels:\n- model: a\n  parameters:\n",
            "merge_method: 'no' is not here|merge_method: False",
        ),
        ("seed: 2001-99-99", "not valid YAML"),
        ("merge_method: linear\nmodels: [a, b]\nseed: 0b", "seed: '0b' is not a whole number"),
    ],
)
def test_yaml_that_means_harm(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "recipe.yml").write_text(text)
    with pytest.raises(M3Error, match=said):
        load_recipe(tmp_path / "recipe.yml")


def test_aliases_are_used_as_they_are_meant(tmp_path: Path) -> None:
    text = "merge_method: linear\nmodels:\n- model: a\n  parameters: &p {weight: 0.5}\n- model: b\n  parameters: *p\n"
    (tmp_path / "recipe.yml").write_text(text)
    assert [entry.parameters for entry in load_recipe(tmp_path / "recipe.yml").models] == [{"weight": 0.5}] * 2


def test_a_recipe_without_end_is_not_read() -> None:
    with pytest.raises(M3Error, match=r"/dev/zero: cannot be read \(it has more than 1,048,576 bytes\)"):
        load_recipe("/dev/zero")


@pytest.mark.parametrize("pattern", ["a{9999999}", "(" * 3000 + ")" * 3000, "((a{1000}){1000}){1000}"])
def test_patterns_that_mean_harm(pattern: str) -> None:
    with pytest.raises(M3Error, match=r"exclude\.0: .* is no regular expression \(.*; mend it"):
        load_recipe({"merge_method": "linear", "models": ["a", "b"], "exclude": [pattern]})
