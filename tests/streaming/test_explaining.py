"""What `m3jax merge --explain` says of a recipe."""

import json

import numpy as np
import pytest
import yaml
from support import oracle
from support.directories import read, write

import m3jax
from m3jax import M3Error
from m3jax.cli.commands import app
from m3jax.cli.displays.recipes import explanation_lines
from m3jax.cli.shell import main
from m3jax.methods.mixup import draw_walk
from m3jax.streaming.explaining import explain_recipe

LAYER, NORM = "model.layers.{}.mlp.weight", "model.norm.weight"


def model(seed):
    rng = np.random.default_rng(seed)
    shapes = {"model.embed_tokens.weight": (5, 4), NORM: (4,)} | {LAYER.format(i): (4, 4) for i in range(4)}
    tensors = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    rotary = {f"model.layers.{i}.rotary.inv_freq": np.ones(2, np.float32) for i in range(4)}
    return tensors | rotary | {"opt_state.count": np.int32(3)}


@pytest.fixture
def place(tmp_path):
    for seed, name in enumerate(("base", "a", "b")):
        write(tmp_path / name, model(seed), {"model_type": "llama", "num_hidden_layers": 4})
    return tmp_path


def asked(place, **keys):
    models = [str(place / "a"), {"model": str(place / "b"), "parameters": {"weight": [1, 0]}}]
    return {
        "merge_method": "dare_ties",
        "base_model": str(place / "base"),
        "models": models,
        "parameters": {"density": [{"filter": "mlp", "value": 0.5}, {"value": 1.0}]},
        "exclude": ["norm"],
        **keys,
    }


def test_every_group_of_tensors_is_told(place, capsys):
    found = explain_recipe(asked(place), place / "out")
    by_name = {(name, runs): group for group in found.groups for name, runs in group.names}
    names = [str(place / name) for name in ("a", "b", "base")]
    rows = {runs: by_name["model.layers.*.mlp.weight", runs].treatment for runs in (((i, i),) for i in range(4))}
    assert [[source.model for source in told.sources] for told in rows.values()] == [names] * 4
    numbers = [dict(told.numbers) for told in rows.values()]
    assert [told["weight"][0] for told in numbers] == [1.0] * 4
    assert [told["weight"][1] for told in numbers] == pytest.approx([1, 2 / 3, 1 / 3, 0])
    assert all(told["density"] == (0.5, 0.5) and told["lambda"] == (1.0,) for told in numbers)
    assert all(told.masks and not told.why and told.what == "merged" for told in rows.values())
    norm = by_name[NORM, ()].treatment
    assert norm[:3] == ("copied", "excluded", (found.models[2]._replace(role="expert"),))
    assert [name for name, _ in found.left_out] == ["opt_state.count"]
    rotary = by_name["model.layers.*.rotary.inv_freq", ((0, 3),)].treatment
    assert (rotary.what, rotary.why) == ("copied", "a buffer, no parameter")
    assert not (place / "out").exists()
    (place / "recipe.yaml").write_text(yaml.safe_dump(asked(place)))
    assert main(app, ["merge", str(place / "recipe.yaml"), str(place / "out"), "--explain", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(found.to_json()))
    text = "\n".join(explanation_lines(found, 100))
    assert "4 tensors merged: written as F32\n  model.layers.*.mlp.weight\n" in text
    assert "\n    1: weight 1, 0.666667; lambda 1; density 0.5" in text
    assert "masks are drawn from the seed and each tensor's own name" in text


def test_tensors_that_are_one_and_statistics_are_told(tmp_path):
    rng = np.random.default_rng(0)
    config = {"model_type": "llama", "tie_word_embeddings": True, "num_hidden_layers": 1}
    for name in "ab":
        table, kernel, mean = (rng.standard_normal(shape).astype(np.float32) for shape in ((5, 4), (4, 4), (4,)))
        tensors = {"model.embed_tokens.weight": table, "lm_head.weight": table, LAYER.format(0): kernel}
        write(tmp_path / name, tensors | {"batch_stats.bn.mean": mean, "batch_stats.bn.var": mean**2}, config)
    asked = {"merge_method": "slerp", "models": [str(tmp_path / "a"), str(tmp_path / "b")], "parameters": {"t": 0.25}}
    found = explain_recipe(asked, tmp_path / "out")
    told = {name: group.treatment for group in found.groups for name, _ in group.names}
    assert told["lm_head.weight"].why == "one tensor with model.embed_tokens.weight"
    assert told["lm_head.weight"].what == told[LAYER.format(0).replace("0", "*")].what == "merged"
    assert dict(told["lm_head.weight"].numbers) == {"t": (0.25,)}
    statistics = told["batch_stats.bn.mean"]
    assert (statistics.what, statistics.numbers) == ("averaged", (("weight", (1.0, 1.0)),))


def test_slices_drawn_weights_and_documents_are_told(place):
    first = {"name": "first", "merge_method": "passthrough"}
    first["slices"] = [{"sources": [{"model": str(place / "a"), "layer_range": [2, 4]}]}]
    second = [{"sources": [{"model": m, "layer_range": [0, 2]} for m in ("first", str(place / "b"))]}]
    recipe = {"merge_method": "linear", "slices": second, "mixup": {"alpha": 1}, "seed": 5, "intermediates": [first]}
    found = explain_recipe(recipe, place / "out")
    (name, within), *none = found.intermediates.items()
    assert (name, none) == ("first", [])
    shifted = next(group for group in within.groups if group.names[0][0] == "model.layers.*.mlp.weight")
    assert shifted.treatment.sources[0].shift == 2
    assert shifted.names == (("model.layers.*.mlp.weight", ((0, 1),)),)
    assert shifted.treatment.why == "the one model's, unchanged"
    merged = next(group for group in found.groups if group.treatment.what == "merged")
    assert dict(merged.treatment.numbers)["weight"] == found.drawn["model"]
    assert [source.model for source in merged.treatment.sources] == ["first", str(place / "b")]
    text = "\n".join(explanation_lines(found, 100))
    assert "first, from which others start" in text
    assert "(its layers 2 further on)" in text
    with pytest.raises(M3Error, match="does not exist here"):
        explain_recipe(asked(place, base_model=str(place / "none")), place / "out")


def test_layers_that_share_a_walk_are_merged_recorded_and_replayed(place):
    mixup = {"alpha": 0.5, "granularity": "layer", "smooth": 0.9}
    models = [str(place / "a"), str(place / "b")]
    recipe = {"merge_method": "linear", "models": models, "mixup": mixup, "seed": 4}
    result = m3jax.merge_checkpoint(recipe, place / "out")
    blocks = {i: f"model.layers.{i}" for i in range(4)}
    want = draw_walk(4, 0.5, 2, blocks, 0.9) | {"outside blocks": m3jax.draw_weights(4, 0.5, 2, "outside blocks")}
    assert {group: tuple(told["decimal"]) for group, told in result.manifest["weights"].items()} == want
    a, b, got = model(1), model(2), read(place / "out")
    for i, block in blocks.items():
        pair = [{"w": tree[LAYER.format(i)]} for tree in (a, b)]
        assert np.array_equal(got[LAYER.format(i)], oracle.merge(pair, method="linear", weights=want[block])["w"])
    assert m3jax.replay(place / "out", place / "again").digest == result.digest
    assert "neighbouring layers by a walk of correlation 0.9" in (place / "out" / "README.md").read_text()
    with pytest.raises(M3Error, match=r"mixup\.smooth: exploration draws each layer by itself"):
        m3jax.explore(recipe, place / "best", score=lambda arrays, share: {"score": 0.0})
    with pytest.raises(M3Error, match=r"which mixup\.smooth is about"):
        m3jax.merge_checkpoint(recipe, place / "no", weights=want)
