"""Learned ratios: constructed cases whose optimum is known."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file
from support.tiny_models import TINY, build_models

import m3jax
from m3jax.errors import M3Error
from m3jax.evaluation import tokens
from m3jax.exploration import Evaluation, Optimization, learn, load_resident
from m3jax.recipe import load_recipe
from m3jax.streaming.jobs import prepared

NAMES = ("model.layers.0.w", "model.layers.1.w")
ONE_BLOCK = TINY._replace(layers=1)


def save(directory, tensors):
    directory.mkdir(exist_ok=True)
    save_file(tensors, directory / "model.safetensors")


@pytest.fixture
def recipe(tmp_path):
    """Two experts that differ in every entry of two layers."""
    rng = np.random.default_rng(0)
    for name in ("base", "a", "b"):
        save(tmp_path / name, {k: rng.standard_normal(64).astype(np.float32) for k in NAMES})
    return {
        "merge_method": "task_arithmetic",
        "base_model": str(tmp_path / "base"),
        "models": [str(tmp_path / e) for e in ("a", "b")],
        "mixup": {"alpha": 1},
    }


@pytest.mark.parametrize(
    "granularity", ["layer", *(pytest.param(name, marks=pytest.mark.slow) for name in ("model", "tensor"))]
)
def test_a_known_optimum_is_found(recipe, tmp_path, granularity):
    """The loss is the distance to the merge with weights that are known, 0.3 and 0.7, or 0.9 and 0.1, by layer."""
    goals = dict.fromkeys(NAMES, 0.3) if granularity == "model" else dict(zip(NAMES, (0.3, 0.9), strict=True))
    with prepared(load_recipe(recipe), tmp_path / "out") as ready:
        resident = load_resident(ready, 0)
    target = resident.merge({name: (goal, 1 - goal) for name, goal in goals.items()})

    def loss(params, batch):
        return sum(jnp.mean((params[name] - target[name]) ** 2) for name in NAMES) + batch

    learned = learn(resident, {"model": (0.9, 0.1)}, granularity, loss, [jnp.float32(0)], steps=120, learning_rate=0.1)
    assert len(learned.weights) == {"model": 1, "layer": 2, "tensor": 2}[granularity]
    for name, goal in goals.items():
        group = {"model": "model", "layer": name[: -len(".w")], "tensor": name}[granularity]
        assert abs(learned.weights[group][0] - goal) < 1e-2
        assert abs(sum(learned.weights[group]) - 1) < 1e-6
        assert all(float(np.float32(w)) == w >= 0 for w in learned.weights[group])
    assert learned.losses[-1] < learned.losses[0] / 100


def test_weights_that_enter_measures_are_learned(recipe, tmp_path):
    """Of a Karcher mean, whose coefficients are concluded from inner products."""
    with prepared(load_recipe(recipe | {"merge_method": "karcher"}), tmp_path / "out") as ready:
        resident = load_resident(ready, 0)
    target = resident.merge({"model": (0.3, 0.7)})

    def loss(params, batch):
        return sum(jnp.mean((params[name] - target[name]) ** 2) for name in NAMES) + batch

    learned = learn(resident, {"model": (0.9, 0.1)}, "model", loss, [jnp.float32(0)], steps=150, learning_rate=0.2)
    assert abs(learned.weights["model"][0] - 0.3) < 1e-2


def test_a_loss_that_is_not_finite_is_said(recipe, tmp_path):
    with prepared(load_recipe(recipe), tmp_path / "out") as ready:
        resident = load_resident(ready, 0)
    with pytest.raises(M3Error, match="the loss is nan at step 0"):
        learn(resident, {"model": (0.5, 0.5)}, "model", lambda p, b: jnp.sum(p[NAMES[0]]) * b, [jnp.float32(np.nan)])


@pytest.fixture(scope="module")
def speakers(tmp_path_factory):
    """Two "models" that are the logits of one next token, whatever the prompt, and dev data of sst2."""
    directory = tmp_path_factory.mktemp("speakers")
    build_models(directory / "models", ONE_BLOCK)
    source = directory / "models" / "expert-a"
    tokenizer = tokens.load_tokenizer("x", source)
    for name, sign in (("a", 1.0), ("b", -1.0)):
        logits = np.full(TINY.vocabulary, -9.0, np.float32)
        logits[first_token(tokenizer, "positive")], logits[first_token(tokenizer, "negative")] = 4 * sign, -4 * sign
        save(directory / name, {"logits": logits})
        for file in source.glob("*.json"):
            if "safetensors" not in file.name:
                (directory / name / file.name).write_bytes(file.read_bytes())
    labels = [1, 1, 1, 0]
    rows = [json.dumps({"sentence": f"a film {i}", "label": label}) for i, label in enumerate(labels)]
    (directory / "dev.jsonl").write_text("\n".join(rows))
    models = [str(directory / name) for name in ("a", "b")]
    return {"merge_method": "linear", "models": models, "mixup": {"alpha": 1}}, directory / "dev.jsonl"


def first_token(tokenizer, label):
    return tokens.split(tokenizer, "x:", f" {label}")[1][0]


def speak(params, texts, lengths):
    return jnp.broadcast_to(params["logits"], (*texts.shape, TINY.vocabulary))


def best_ratio(tokenizer):
    """Of λ, where the answers' tokens are counted as the loss counts them: a search by brute force."""
    answers = [tokens.split(tokenizer, "x:", f" {label}")[1] for label in ("positive",) * 3 + ("negative",)]
    grid = np.linspace(0, 1, 4001)

    def loss(ratio):
        logits = np.full(TINY.vocabulary, -9.0)
        logits[first_token(tokenizer, "positive")] = 4 * (2 * ratio - 1)
        logits[first_token(tokenizer, "negative")] = -4 * (2 * ratio - 1)
        log_probs = logits - np.log(np.exp(logits).sum())
        return -np.mean([np.mean(log_probs[answer]) for answer in answers])

    return grid[np.argmin([loss(ratio) for ratio in grid])]


def test_cross_entropy_of_answers_finds_the_ratio_of_the_labels(speakers, tmp_path):
    recipe, data = speakers
    found = m3jax.explore(
        recipe,
        tmp_path / "out",
        tasks={"sst2": data},
        samples=2,
        evaluation=Evaluation(max_tokens=1, batch_size=4, template="none"),
        apply_fn=speak,
        optimize=Optimization("loss", steps=60, learning_rate=0.2, batch_size=4),
        select="2",
    )
    learned = found.results[-1]
    assert learned.optimized in (0, 1)
    goal = best_ratio(tokens.load_tokenizer("x", data.parent / "a"))
    assert 0.5 < goal < 0.8
    assert abs(learned.weights["model"][0] - goal) < 1e-2
    assert found.choice == learned
    assert m3jax.replay(tmp_path / "out", tmp_path / "again").digest == found.merge.digest
    assert found.losses[-1] < found.losses[0]
    again = m3jax.explore(
        recipe,
        tmp_path / "other",
        tasks={"sst2": data},
        samples=2,
        evaluation=Evaluation(max_tokens=1, batch_size=4, template="none"),
        apply_fn=speak,
        optimize=Optimization("loss", steps=60, learning_rate=0.2, batch_size=4),
        select="2",
        journal=found.journal,
    )
    assert again.losses == ()  # an earlier run learned it
    assert again.choice == learned


def test_entropy_needs_no_answers_and_prefers_the_certain(speakers, tmp_path):
    """Entropy is smallest at either end; from the best draw it runs to the nearer one."""
    recipe, data = speakers
    found = m3jax.explore(
        recipe,
        tmp_path / "out",
        tasks={"sst2": data},
        samples=2,
        evaluation=Evaluation(max_tokens=1, batch_size=4, template="none"),
        apply_fn=speak,
        optimize=Optimization("entropy", steps=40, learning_rate=0.3, batch_size=3),
        select="2",
    )
    start = found.results[found.results[-1].optimized]
    learned = found.choice.weights["model"][0]
    assert abs(learned - round(start.weights["model"][0])) < 0.1
    assert found.losses[-1] < found.losses[0]


def test_what_cannot_be_learned_is_said(recipe, speakers, tmp_path):
    slerp = {**recipe, "merge_method": "slerp", "base_model": recipe["models"][0]}
    layered = {**recipe, "mixup": {"alpha": 1, "granularity": "layer"}}
    for given, how, sentence in [
        (slerp, Optimization(), "slerp has none"),
        (recipe, Optimization("accuracy"), "--optimize is 'accuracy', but must be one of loss, entropy"),
        (recipe, Optimization(granularity="word"), "--granularity is 'word'"),
        (recipe, Optimization(steps=0), "--steps is 0"),
        (layered, Optimization(granularity="model"), "coarser than the recipe's layer"),
        (recipe, Optimization(), "needs dev examples of tasks"),
    ]:
        with pytest.raises(M3Error, match=sentence):
            m3jax.explore(given, tmp_path / "out", score=lambda p, s: {"s": 1.0}, samples=1, optimize=how)
    assert not (tmp_path / "out.exploration").exists()
