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


@pytest.mark.parametrize(
    ("runs", "sentence"),
    [
        (([("a", 0, 3)],), "leave the model, which has 2"),
        (([("a", 1, 1)],), r"slices\.0\.sources\.0\.layer_range: \[1, 1\] holds no layers"),
        (([("a", -1, 1)],), "holds no layers"),
        (([("a", 0, 2), ("b", 0, 1)],), "runs of different lengths"),
        (([("a", 0, 2)], [("a", 0, 1), ("b", 0, 1)]), "has 2 sources where the first slice has 1"),
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
