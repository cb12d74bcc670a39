"""Layers stacked from slices, and models whose trees differ by a wrapper: views, used by merges."""

import json

import numpy as np
import pytest
from support import oracle
from support.directories import read, write
from support.matrix import same

import m3jax
from m3jax import M3Error

EMBED, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
LAYER = "model.layers.{}.mlp.weight"


def model(seed, layers=2, width=8):
    rng = np.random.default_rng(seed)
    shapes = {EMBED: (5, width), NORM: (width,), HEAD: (5, width)} | {
        LAYER.format(i): (width, width) for i in range(layers)
    }
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture
def place(tmp_path):
    for seed, name in enumerate(("base", "a", "b")):
        config = {"model_type": "llama", "num_hidden_layers": 2, "layer_types": [f"first of {name}", "second"]}
        write(tmp_path / name, model(seed), config)
    return tmp_path


def slices(place, *runs):
    """One slice for each list of (model, first, end)."""
    return [{"sources": [{"model": str(place / m), "layer_range": [f, e]} for m, f, e in run]} for run in runs]


FRANKENMERGE = ([("a", 0, 2)], [("b", 1, 2)], [("b", 0, 2)])


def test_passthrough_stacks_layers_bit_for_bit(place):
    asked = {"merge_method": "passthrough", "slices": slices(place, *FRANKENMERGE)}
    m3jax.merge_checkpoint(asked, place / "out")
    a, b = model(1), model(2)
    layers = [a[LAYER.format(0)], a[LAYER.format(1)], b[LAYER.format(1)], b[LAYER.format(0)], b[LAYER.format(1)]]
    want = {EMBED: a[EMBED], NORM: b[NORM], HEAD: b[HEAD]} | {LAYER.format(i): x for i, x in enumerate(layers)}
    assert read(place / "out").keys() == want.keys()
    assert same(read(place / "out"), want) == (True, [])
    config = json.loads((place / "out" / "config.json").read_text())
    assert config["num_hidden_layers"] == 5
    assert config["layer_types"] == ["first of a", "second", "second", "first of a", "second"]
    again = m3jax.replay(place / "out", place / "again")
    assert again.digest == m3jax.verify(place / "out").digest
    manifest = json.loads((place / "out" / "m3jax.json").read_text())
    stored = {record["name"].rsplit("/", 1)[1]: set(record["tensors"]) for record in manifest["inputs"]}
    assert stored == {"a": {EMBED, LAYER.format(0), LAYER.format(1)}, "b": {NORM, HEAD, *map(LAYER.format, range(2))}}


def test_a_replay_refuses_a_changed_source_of_a_stack(place):
    m3jax.merge_checkpoint({"merge_method": "passthrough", "slices": slices(place, *FRANKENMERGE)}, place / "out")
    changed = model(2)
    changed[LAYER.format(1)] = changed[LAYER.format(1)] + np.float32(1)
    (place / "b" / "model.safetensors").unlink()
    write(place / "other", changed)
    (place / "other" / "model.safetensors").rename(place / "b" / "model.safetensors")
    with pytest.raises(M3Error, match=r"b: model\.layers\.1\.mlp\.weight is not what was merged"):
        m3jax.replay(place / "out", place / "again")


def test_scales_of_a_source(place):
    asked = {"merge_method": "passthrough", "slices": slices(place, *FRANKENMERGE)}
    asked["slices"][1]["sources"][0]["parameters"] = {"scale": [{"filter": "mlp", "value": 0.5}, {"value": 1.0}]}
    m3jax.merge_checkpoint(asked, place / "out")
    got, b = read(place / "out"), model(2)
    assert np.array_equal(got[LAYER.format(2)], b[LAYER.format(1)] * np.float32(0.5))
    assert np.array_equal(got[LAYER.format(3)], b[LAYER.format(0)])


def test_stacked_layers_are_merged_by_any_method(place):
    """Layers 0 and 1 of a with 1 and 1 of b, over the base's: an oracle that is told the pairs."""
    runs = ([("base", 0, 1), ("a", 0, 1), ("b", 1, 2)], [("base", 1, 2), ("a", 1, 2), ("b", 1, 2)])
    asked = {
        "merge_method": "ties",
        "base_model": str(place / "base"),
        "slices": slices(place, *runs),
        "parameters": {"density": 0.5},
    }
    m3jax.merge_checkpoint(asked, place / "out")
    base, a, b = model(0), model(1), model(2)
    b[LAYER.format(0)] = b[LAYER.format(1)]
    assert same(read(place / "out"), oracle.merge([a, b], base, method="ties", density=0.5)) == (True, [])


def test_slerp_over_stacked_layers(place):
    runs = ([("a", 1, 2), ("b", 0, 1)], [("a", 0, 2), ("b", 0, 2)])
    asked = {"merge_method": "slerp", "slices": slices(place, *runs), "parameters": {"t": 0.25}}
    m3jax.merge_checkpoint(asked, place / "out")
    a, b = model(1), model(2)
    for tree, picked in ((a, (1, 0, 1)), (b, (0, 0, 1))):
        layers = [tree.pop(LAYER.format(i)) for i in range(2)]
        tree |= {LAYER.format(i): layers[k] for i, k in enumerate(picked)}
    assert same(read(place / "out"), oracle.merge([a, b], method="slerp", weights=0.25)) == (True, [])
    assert json.loads((place / "out" / "config.json").read_text())["num_hidden_layers"] == 3


def test_the_first_layers_of_a_model(place):
    m3jax.merge_checkpoint({"merge_method": "passthrough", "slices": slices(place, [("a", 0, 1)])}, place / "out")
    a = model(1)
    del a[LAYER.format(1)]
    assert same(read(place / "out"), a) == (True, [])
    assert json.loads((place / "out" / "config.json").read_text())["num_hidden_layers"] == 1


def test_slices_with_bases_and_numbers_of_sources_of_their_own(place):
    """One expert over the base below, two over another base above; a filter sees names as the models have them."""
    one, two = slices(place, [("a", 0, 2)], [("b", 1, 2), ("a", 1, 2)])
    two["base_model"] = str(place / "b")
    two["sources"].append({"model": str(place / "base"), "layer_range": [0, 1]})
    two["sources"][2]["parameters"] = {"weight": [{"filter": "layers.0.mlp", "value": 2.0}, {"value": 0.25}]}
    asked = {
        "merge_method": "task_arithmetic",
        "base_model": str(place / "base"),
        "slices": [one, two],
        "parameters": {"weight": 0.5},
    }
    result = m3jax.merge_checkpoint(asked, place / "out")
    got, (base, a, b) = read(place / "out"), (model(0), model(1), model(2))
    for name in (EMBED, LAYER.format(0), LAYER.format(1)):
        want = oracle.merge([{"w": a[name]}], {"w": base[name]}, method="task_arithmetic", weights=(0.5,))["w"]
        assert np.array_equal(got[name], want)
    for name, own, other, weight in (
        (LAYER.format(2), a[LAYER.format(1)], base[LAYER.format(0)], 2.0),
        (NORM, a[NORM], base[NORM], 0.25),
    ):
        below = b[LAYER.format(1)] if name == LAYER.format(2) else b[name]
        experts = [{"w": own}, {"w": other}]
        want = oracle.merge(experts, {"w": below}, method="task_arithmetic", weights=(0.5, weight))["w"]
        assert np.array_equal(got[name], want)
    assert m3jax.replay(place / "out", place / "again").digest == result.digest
    scoped = {**asked, "merge_method": "ties", "parameters": {"trim_scope": "model", "density": 0.5}}
    two["sources"][2].pop("parameters")
    with pytest.raises(M3Error, match="parts of it have 1 and 2 experts"):
        m3jax.merge_checkpoint(scoped, place / "no")


def test_a_tied_model_beside_an_untied_one_has_its_embedding_as_head(place):
    """The head of an output is the last model's, and its configuration says whether it is the embedding."""
    tied, untied = model(3), model(2)
    del tied[HEAD]
    for name, told in (("tied", tied), ("untied", untied)):
        config = {"model_type": "llama", "num_hidden_layers": 2, "tie_word_embeddings": name == "tied"}
        write(place / name, told, config)
    copied = place / "copied"  # with a copy that nobody uses
    write(copied, {**tied, HEAD: untied[HEAD]}, json.loads((place / "tied" / "config.json").read_text()))
    heads = {"tied": tied[EMBED], "copied": tied[EMBED], "untied": untied[HEAD]}

    def merged(out, **asked):
        result = m3jax.merge_checkpoint({"merge_method": "passthrough", **asked}, place / out)
        told = json.loads((place / out / "config.json").read_text())
        return read(place / out), told["tie_word_embeddings"], result.digest

    for first, last in (("untied", "tied"), ("tied", "untied"), ("copied", "untied"), ("untied", "copied")):
        stack = slices(place, [(first, 0, 1)], [(last, 1, 2)])
        got, ties, digest = merged(f"{first}-{last}", slices=stack)
        assert np.array_equal(got[EMBED], (untied if first == "untied" else tied)[EMBED])
        assert np.array_equal(got[HEAD], heads[last])
        assert ties is False
    assert m3jax.replay(place / "untied-copied", place / "again").digest == digest
    apart = {name: {"models": [str(place / own)]} for name, own in (("lm_head", "tied"), ("default", "untied"))}
    got, ties, _ = merged("apart", modules=apart)
    assert np.array_equal(got[HEAD], tied[EMBED])
    assert ties is False
    both = {"default": {"models": [str(place / name) for name in ("tied", "untied")]}}
    got, ties, _ = merged("both", merge_method="linear", modules=both)
    want = oracle.merge([{HEAD: tied[EMBED]}, {HEAD: untied[HEAD]}], method="linear")
    assert np.array_equal(got[HEAD], want[HEAD])
    assert ties is False
    within = slices(place, [("tied", 0, 1)], [("untied", 1, 2)], [("tied", 1, 2)])
    got, ties, _ = merged("within", slices=within)
    assert HEAD not in got
    assert ties is True
    (place / "tied" / "config.json").write_text(json.dumps({"model_type": "llama", "tie_word_embeddings": False}))
    with pytest.raises(M3Error, match=r"lm_head\.weight: is in .*untied but not in .*tied, which would lose"):
        merged("lost", slices=slices(place, [("untied", 0, 1)], [("tied", 1, 2)]))


def test_a_model_that_is_there_twice_and_one_that_only_gives_layers_are_told_apart(place):
    for name in ("base", "a", "b"):
        (place / name / "tokenizer.json").write_text(json.dumps({"of": name}))
    twice = {"merge_method": "task_arithmetic", "base_model": str(place / "base"), "models": [str(place / "a")] * 2}
    m3jax.merge_checkpoint(twice, place / "twice")
    assert json.loads((place / "twice" / "tokenizer.json").read_text()) == {"of": "base"}
    runs = slices(place, [("a", 0, 2)], [("b", 1, 2)])
    stacked = {"merge_method": "passthrough", "slices": runs, "tokenizer_source": str(place / "b")}
    m3jax.merge_checkpoint(stacked, place / "stacked")
    assert json.loads((place / "stacked" / "tokenizer.json").read_text()) == {"of": "b"}


def test_slices_that_only_give_parameters_hold_for_layers_however_they_are_called(tmp_path):
    rng = np.random.default_rng(0)
    trees = [{f"layers_{i}.kernel": rng.standard_normal((4, 4)).astype(np.float32) for i in range(3)} for _ in "ab"]
    for tree, name in zip(trees, "ab", strict=True):
        write(tmp_path / name, tree)
    runs = slices(tmp_path, [("a", 0, 2), ("b", 0, 2)], [("a", 2, 3), ("b", 2, 3)])
    runs[0]["sources"][0]["parameters"], runs[1]["parameters"] = {"weight": [0, 3]}, {"weight": 4.0}
    asked = {"merge_method": "linear", "slices": runs, "parameters": {"normalize": False, "weight": 2.0}}
    m3jax.merge_checkpoint(asked, tmp_path / "out")
    for name, weights in (("layers_0", (0, 2)), ("layers_1", (3, 2)), ("layers_2", (4, 4))):
        pair = [{"w": tree[f"{name}.kernel"]} for tree in trees]
        want = oracle.merge(pair, method="linear", normalize=False, weights=weights)["w"]
        assert np.array_equal(read(tmp_path / "out")[f"{name}.kernel"], want)


TEXT, SIGHT = "language_model.model.layers.{}.mlp.weight", "vision_tower.encoder.layers.{}.mlp.weight"
PROJECTOR = "multi_modal_projector.linear.weight"
SEEING = {
    "language_model.model.embed_tokens.weight": (5, 8),
    "language_model.model.norm.weight": (8,),
    PROJECTOR: (8, 6),
}


def seeing(seed):
    """A language model with a vision tower."""
    rng = np.random.default_rng(seed)
    shapes = SEEING | {TEXT.format(i): (8, 8) for i in range(2)} | {SIGHT.format(i): (6, 6) for i in range(3)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def test_modules_are_merged_by_themselves(tmp_path):
    config = {
        "model_type": "llava",
        "text_config": {"model_type": "llama", "num_hidden_layers": 2},
        "vision_config": {"num_hidden_layers": 3},
    }
    for seed, name in enumerate("abc"):
        write(tmp_path / name, seeing(seed), config)
    place = {name: str(tmp_path / name) for name in "abc"}
    sliced = [
        {"sources": [{"model": place["b"], "layer_range": [0, 3]}]},
        {"sources": [{"model": place["c"], "layer_range": [2, 3], "parameters": {"weight": 3.0}}]},
    ]
    asked = {
        "merge_method": "linear",
        "modules": {
            "text_decoder": {
                "models": [
                    place["a"],
                    {"model": place["b"], "parameters": {"weight": [{"filter": "norm", "value": 0}]}},
                ],
                "parameters": {"weight": [0.25, 0.75]},
            },
            "vision_tower": {"slices": sliced},
            "multi_modal_projector": {"models": [place["c"]]},
        },
        "parameters": {"weight": 7.0, "normalize": False},
    }
    result = m3jax.merge_checkpoint(asked, tmp_path / "out")
    got, (a, b, c) = read(tmp_path / "out"), map(seeing, range(3))
    assert len(got) == len(a) + 1

    def linear(*pairs):
        return oracle.merge(
            [{"w": x} for x, _ in pairs], method="linear", normalize=False, weights=[w for _, w in pairs]
        )

    weights = {
        TEXT.format(0): (0.25, 0.25),
        TEXT.format(1): (0.75, 0.75),
        "language_model.model.norm.weight": (0.75, 0),
    }
    for name, (left, right) in weights.items():
        assert np.array_equal(got[name], linear((a[name], left), (b[name], right))["w"])
    for name, x, weight in (
        (SIGHT.format(2), b[SIGHT.format(2)], 7.0),
        (SIGHT.format(3), c[SIGHT.format(2)], 3.0),
        (PROJECTOR, c[PROJECTOR], 7.0),
    ):
        assert np.array_equal(got[name], linear((x, weight))["w"])
    told = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (told["text_config"]["num_hidden_layers"], told["vision_config"]["num_hidden_layers"]) == (2, 4)
    assert m3jax.replay(tmp_path / "out", tmp_path / "again").digest == result.digest
    apart = [{"sources": [{"model": place[m], "layer_range": [f, e]} for m in "ab"]} for f, e in ((0, 1), (1, 3))]
    with pytest.raises(M3Error, match=r"slices: .* has several stacks of layers \(text, vision\): give each its own"):
        m3jax.merge_checkpoint({"merge_method": "linear", "slices": apart}, tmp_path / "no")
    del asked["modules"]["multi_modal_projector"]
    with pytest.raises(
        M3Error, match=r"multi_modal_projector\.linear\.weight of .*a is in none of text_decoder, vision_t"
    ):
        m3jax.merge_checkpoint(asked, tmp_path / "no")


@pytest.mark.parametrize(
    ("runs", "sentence"),
    [
        (([("a", 0, 3)],), "leave the model, which has 2"),
        (([("a", 1, 1)],), r"slices\.0\.sources\.0\.layer_range: \[1, 1\] holds no layers"),
        (([("a", -1, 1)],), "holds no layers"),
        (([("a", 0, 2), ("b", 0, 1)],), "runs of different lengths"),
        (([("a", 0, 2)], [("a", 0, 1), ("b", 0, 1)]), r"slices\.1: passthrough merges 1 model, not 2"),
        (([("a", 0, 2)], [("wide", 0, 1)]), "wide"),
    ],
)
def test_slices_that_cannot_be_are_refused(place, runs, sentence):
    write(place / "wide", model(3, width=12))
    with pytest.raises(M3Error, match=sentence):
        m3jax.merge_checkpoint({"merge_method": "passthrough", "slices": slices(place, *runs)}, place / "out")
    assert not (place / "out").exists()


@pytest.mark.parametrize("wrapped", ["a", "base"])
def test_a_wrapper_around_the_tree_is_left_out(place, wrapped):
    asked = {"merge_method": "ties", "base_model": str(place / "base"), "sparsify": {"method": "dare", "density": 0.5}}
    want = m3jax.merge_checkpoint({**asked, "models": [str(place / "a"), str(place / "b")]}, place / "plain").digest
    seed = {"base": 0, "a": 1}[wrapped]
    (place / wrapped / "model.safetensors").unlink()
    write(place / "flax", {f"params.{name}": value for name, value in model(seed).items()})
    (place / "flax" / "model.safetensors").rename(place / wrapped / "model.safetensors")
    result = m3jax.merge_checkpoint({**asked, "models": [str(place / "a"), str(place / "b")]}, place / "out")
    assert result.digest == want
    assert set(read(place / "out")) == set(model(0))
    recorded = {record["name"].rsplit("/", 1)[1]: record["tensors"] for record in result.manifest["inputs"]}
    assert all(name.startswith("params.") for name in recorded[wrapped])  # digests are of what is stored
    assert m3jax.replay(place / "out", place / "again").digest == want


def test_without_a_base_the_output_has_the_first_models_names(tmp_path):
    names = {"a": "layers_0.w.kernel", "b": "layers.0.w.kernel"}
    for model, name in names.items():
        write(tmp_path / model, {name: np.ones((4, 3), np.float32)})
    for models in ("ab", "ba"):
        m3jax.merge_checkpoint(
            {"merge_method": "linear", "models": [str(tmp_path / m) for m in models]}, tmp_path / models
        )
        assert read(tmp_path / models).keys() == {names[models[0]]}
