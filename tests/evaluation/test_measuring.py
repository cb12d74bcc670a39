"""Fisher information measured: the definition by finite differences, what is recorded, and a merge by it."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file
from support.tiny_models import TINY, build_models

import m3jax
from m3jax import M3Error, decoder
from m3jax.decoder import DecoderConfig
from m3jax.decoder.modeling import abstract_decoder
from m3jax.decoder.params import match_tensors
from m3jax.evaluation import grams, measuring, tokens
from m3jax.evaluation.models import open_model

ROWS = [
    {"prompt": "Merging asks whether", "completion": " positive"},
    {"prompt": "the skills of several experts", "completion": " negative positive"},
    {"text": " negative positive negative"},
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base and two experts, and data."""
    directory = tmp_path_factory.mktemp("measured")
    build_models(directory, TINY._replace(layers=1))
    (directory / "data.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    return directory


@pytest.fixture(scope="module")
def measured(place):
    """What was measured of each expert, in float32."""
    data = str(place / "data.jsonl")
    return [
        m3jax.measure_statistics(
            str(place / f"expert-{name}"), place / f"fisher-{name}", data=data, dtype="float32", examples=count
        )
        for name, count in (("a", None), ("b", 2))
    ]


def test_it_is_the_mean_of_squared_slopes_of_log_probabilities(place, measured):
    stored = open_model(str(place / "expert-a"))
    weights = {n: np.asarray(v, np.float32) for n, v in load_file(place / "expert-a" / "model.safetensors").items()}
    found = load_file(place / "fisher-a" / "model.safetensors")
    pairs = [
        tokens.split(stored.tokenizer, row.get("prompt", ""), row.get("completion", row.get("text"))) for row in ROWS
    ]
    assert found.keys() == weights.keys()
    assert {n: v.shape for n, v in found.items()} == {n: v.shape for n, v in weights.items()}

    def log_probs(name, at, step):
        moved = weights[name].copy()
        moved[at] += step
        params = decoder.params_from_tree(weights | {name: moved}, stored.config)
        scores = decoder.log_likelihoods(params, stored.config, pairs, batch_size=4)
        return np.array([each.log_prob for each in scores])

    step = 2.0**-12  # entries of the embedding are small
    for name in ("model.embed_tokens.weight", "model.layers.0.mlp.down_proj.weight", "model.norm.weight"):
        at = np.unravel_index(found[name].argmax(), found[name].shape)
        slopes = (log_probs(name, at, step) - log_probs(name, at, -step)) / (2 * step)
        assert found[name][at] == pytest.approx(np.mean(slopes**2), rel=0.03), name


def test_it_is_recorded_reused_and_merged_by(place, measured, tmp_path):
    assert [(each.examples, each.skipped, each.reused) for each in measured] == [(3, 0, False), (2, 0, False)]
    told = json.loads((place / "fisher-b" / "m3jax-conversion.json").read_text())
    assert told["statistics"] == {
        "kind": "fisher",
        "data": {"source": str(place / "data.jsonl"), "digest": told["statistics"]["data"]["digest"]},
        "task": None,
        "template": None,
        "examples": 2,
        "skipped": 0,
        "dtype": "float32",
    }
    again = {"data": str(place / "data.jsonl"), "dtype": "float32"}
    reused = m3jax.measure_statistics(str(place / "expert-a"), place / "fisher-a", **again)
    assert (reused.reused, reused.digest, reused.bytes) == (True, measured[0].digest, measured[0].bytes)
    with pytest.raises(M3Error, match="fisher-a: exists already"):
        m3jax.measure_statistics(str(place / "expert-b"), place / "fisher-a", **again)
    models = [{"model": str(place / f"expert-{n}"), "statistics": str(place / f"fisher-{n}")} for n in "ab"]
    made = m3jax.merge_checkpoint({"merge_method": "fisher", "models": models}, tmp_path / "out")
    assert m3jax.verify(tmp_path / "out", inputs=True).differences == ()
    assert m3jax.verify_sample(tmp_path / "out").differences == ()
    assert m3jax.replay(tmp_path / "out", tmp_path / "again").digest == made.digest
    name = "model.layers.0.mlp.down_proj.weight"
    x = [load_file(place / f"expert-{n}" / "model.safetensors")[name].astype(np.float64) for n in "ab"]
    f = [load_file(place / f"fisher-{n}" / "model.safetensors")[name].astype(np.float64) for n in "ab"]
    total = f[0] + f[1]
    want = np.where(total > 0, (f[0] * x[0] + f[1] * x[1]) / np.where(total > 0, total, 1), (x[0] + x[1]) / 2)
    got = load_file(tmp_path / "out" / "model.safetensors")[name].astype(np.float64)
    np.testing.assert_allclose(got, want, rtol=2.0**-8, atol=1e-6)


def test_gram_matrices_are_of_what_comes_into_each_layer(place, tmp_path):
    """Of one token that is read, so that attention gives back its value."""
    (tmp_path / "data.jsonl").write_text(json.dumps({"text": " positive"}))
    out, keys = tmp_path / "gram", {"data": str(tmp_path / "data.jsonl"), "dtype": "float32", "kind": "gram"}
    made = m3jax.measure_statistics(str(place / "expert-a"), out, **keys)
    assert (made.kind, made.tensors) == ("gram", 4)
    assert m3jax.measure_statistics(str(place / "expert-a"), out, **keys).reused
    stored = open_model(str(place / "expert-a"))
    first, _ = [token for part in tokens.split(stored.tokenizer, "", " positive") for token in part]
    weights = {n: np.float64(v) for n, v in load_file(place / "expert-a" / "model.safetensors").items()}
    layer = {n.removeprefix("model.layers.0."): v for n, v in weights.items()}

    def normed(x, name):
        return x / np.sqrt(np.mean(x * x) + stored.config.norm_eps) * layer[f"{name}.weight"]

    x = weights["model.embed_tokens.weight"][first]
    inputs = {"self_attn.k_proj": normed(x, "input_layernorm")}
    inputs["self_attn.o_proj"] = layer["self_attn.v_proj.weight"] @ inputs["self_attn.k_proj"]
    x = x + layer["self_attn.o_proj.weight"] @ inputs["self_attn.o_proj"]
    inputs["mlp.gate_proj"] = normed(x, "post_attention_layernorm")
    gate, up = (layer[f"mlp.{name}_proj.weight"] @ inputs["mlp.gate_proj"] for name in ("gate", "up"))
    inputs["mlp.down_proj"] = gate / (1 + np.exp(-gate)) * up
    found = load_file(out / "model.safetensors")
    assert found.keys() == {f"model.layers.0.{name}.weight" for name in inputs}
    for name, own in inputs.items():
        want = np.outer(own, own)
        np.testing.assert_allclose(found[f"model.layers.0.{name}.weight"], want, atol=1e-4 * want.max(), err_msg=name)
    told = json.loads((out / "m3jax-conversion.json").read_text())["statistics"]
    shared = {"self_attn.q": "self_attn.k", "self_attn.v": "self_attn.k", "mlp.up": "mlp.gate"}
    assert told["shared"] == {
        f"model.layers.0.{n}_proj.weight": f"model.layers.0.{o}_proj.weight" for n, o in shared.items()
    }
    models = [{"model": str(place / f"expert-{n}"), "statistics": str(out)} for n in "ab"]
    with pytest.raises(M3Error, match="was measured of another model than"):
        m3jax.merge_checkpoint({"merge_method": "regmean", "models": models}, tmp_path / "out")


def test_which_weights_read_the_same_in_models_that_are_laid_out_otherwise():
    sizes = {"vocab_size": 8, "n_embd": 4, "n_layer": 1, "n_head": 2, "n_positions": 8}
    config = DecoderConfig.from_dict({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], **sizes})
    shapes = {"attn.c_attn": (4, 12), "attn.c_proj": (4, 4), "mlp.c_fc": (4, 16), "mlp.c_proj": (16, 4)}
    there = {f"h.0.{name}.weight": (shape, True) for name, shape in shapes.items()}
    there |= {f"h.0.{name}.bias": (shape[1:], True) for name, shape in shapes.items()}
    norms = ("h.0.ln_1", "h.0.ln_2", "ln_f")
    there |= {f"{name}.{kind}": ((4,), True) for name in norms for kind in ("weight", "bias")}
    there |= {f"{name}.weight": ((8, 4), True) for name in ("wte", "wpe")}
    found = grams.inputs_of(match_tensors(there, config, "it"), abstract_decoder(config))
    assert {each.name for each in found.values()} == {f"h.0.{name}.weight" for name in shapes}
    assert all(each.names == (each.name,) and each.first == {each.name} for each in found.values())


def test_a_task_gives_prompts_and_right_answers(place):
    (place / "dev.tsv").write_text("sentence\tlabel\na fine film\t1\na dull one\t0\n")
    texts = measuring.read_texts("sst2", str(place / "dev.tsv"), 1)
    assert texts.pairs == [(texts.pairs[0][0], " positive")]
    assert "a fine film" in texts.pairs[0][0]


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({}, "give --data FILE"),
        ({"data": "nowhere.jsonl"}, "there is no data file nowhere.jsonl"),
        ({"data": "odd.jsonl"}, "row 0 has neither `text` nor `prompt` and `completion`"),
        ({"data": "long.jsonl"}, "example 0 has [0-9,]+ tokens, but .* sees 512: shorten it"),
        ({"data": "long.jsonl", "overflow": "skip"}, "no example is as short as"),
        ({"data": "data.jsonl", "overflow": "truncate"}, "--overflow is 'truncate', but must be one of error, skip"),
        ({"data": "data.jsonl", "examples": 0}, "--examples is 0, but must be at least 1"),
        ({"data": "data.jsonl", "dtype": "int8"}, "--dtype is 'int8'"),
        ({"data": "data.jsonl", "kind": "hessian"}, "--kind is 'hessian', but must be one of fisher, gram"),
        ({"data": "data.jsonl", "out": "expert-a/out"}, "expert-a/out: would be made inside expert-a"),
        ({"data": "data.jsonl", "out": "expert-a"}, "expert-a: is one of the models, or holds"),
    ],
)
def test_misuse_is_said_before_anything_is_measured(place, monkeypatch, keys, sentence):
    monkeypatch.chdir(place)
    (place / "odd.jsonl").write_text('{"question": "?"}')
    (place / "long.jsonl").write_text(json.dumps({"text": " positive" * 600}))
    monkeypatch.setattr(measuring, "measured_of", lambda *_: pytest.fail("read all weights"))
    with pytest.raises(M3Error, match=sentence):
        m3jax.measure_statistics(**{"model": "expert-a", "out": "new", **keys})


@pytest.mark.parametrize("kind", ["fisher", "gram"])
def test_a_full_disk_is_said_before_anything_is_measured(place, tmp_path, monkeypatch, kind):
    keys = {"data": str(place / "data.jsonl"), "dtype": "float32", "kind": kind, "examples": 1}
    asked = []
    monkeypatch.setattr(measuring, "check_space", lambda _, needed: asked.append(needed))
    made = m3jax.measure_statistics(str(place / "expert-a"), tmp_path / "made", **keys)
    assert asked == [made.bytes]
    monkeypatch.undo()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=made.bytes))
    monkeypatch.setattr(measuring, "_load", lambda *_: pytest.fail("loaded the weights"))
    with pytest.raises(M3Error, match=r"the disk has .* bytes free"):
        m3jax.measure_statistics(str(place / "expert-a"), tmp_path / "more", **keys)
    assert not (tmp_path / "more").exists()
