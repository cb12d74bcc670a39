"""Training: tokenizer, batches, the loss, and model directories that other programs load."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from m3jax import decoder
from m3jax.decoder import DecoderConfig
from m3jax.errors import M3Error
from m3jax.evaluation.tokens import load_tokenizer
from m3jax.laboratory.models import BASE, Curriculum, make_models
from m3jax.laboratory.skills import programs, word_problems
from m3jax.laboratory.training import (
    Course,
    Size,
    Text,
    batches,
    cross_entropy,
    encode,
    make_config,
    make_tokenizer,
    train,
)

SKILLS = [word_problems(), programs()]
TINY = Curriculum(Size(16, 1, 2, 300), 200, Course(6, 8, 1e-3, whole=True), Course(4, 8, 1e-3))


def test_the_tokenizer_loses_nothing_and_takes_digits_apart() -> None:
    tokenizer = make_tokenizer([a + b for skill in SKILLS for a, b in skill.lessons(skill.rows("train", 50, 0))], 320)
    text = "Grüße, x = 1234\n  ☃"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    assert tokenizer.tokenize("1234") == list("1234")
    assert len(tokenizer) == 320


def test_batches_hold_every_text_and_are_the_same_again() -> None:
    texts = [Text(list(range(1, 3 + i % 60)), 1) for i in range(100)]
    course = Course(steps=40, batch=8, rate=1.0, seed=3)
    made = list(batches(texts, course))
    assert len(made) == 40
    assert {batch.tokens.shape for batch in made} == {(8, 32), (8, 48), (8, 64)}
    assert all((batch.tokens[np.arange(8), batch.lengths - 1] > 0).all() for batch in made)
    assert {tuple(row[:n]) for batch in made for row, n in zip(batch.tokens, batch.lengths, strict=True)} == {
        tuple(text.tokens) for text in texts
    }
    again = list(batches(texts, course))
    assert all((a.tokens == b.tokens).all() for a, b in zip(made, again, strict=True))
    other = next(batches(texts, course._replace(seed=4)))
    assert other.tokens.shape != made[0].tokens.shape or (other.tokens != made[0].tokens).any()


def test_too_long_lessons_are_left_out() -> None:
    tokenizer = make_tokenizer(["a"], 260)
    assert len(encode(tokenizer, [("a", "b"), ("a" * 200, "b")])) == 1


@pytest.mark.parametrize("whole", [False, True])
def test_the_loss_is_the_mean_over_what_counts(whole: bool) -> None:
    config = DecoderConfig.from_dict(make_config(Size(16, 1, 2, 50)))
    params = decoder.random_params(config, 0)
    texts = [[5, 6, 7, 8, 1], [9, 10, 1]]
    tokens = np.zeros((2, 8), np.int32)
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = text
    loss = cross_entropy(params, tokens, np.array([5, 3]), np.array([3, 1]), np.bool_(whole), config=config)
    parts = (
        [(text[:1], text[1:]) for text in texts]
        if whole
        else [(texts[0][:3], texts[0][3:]), (texts[1][:1], texts[1][1:])]
    )
    scores = decoder.log_likelihoods(params, config, parts, batch_size=2)
    count = sum(len(after) for _, after in parts)
    assert float(loss) == pytest.approx(-sum(score.log_prob for score in scores) / count, rel=1e-5)


@pytest.mark.slow
def test_training_learns_and_models_are_kept(tmp_path: Path) -> None:
    lines: list[str] = []
    places = make_models(tmp_path / "models", SKILLS, TINY, lines.append)
    assert list(places) == [BASE, "arithmetic", "programs"]
    losses = [float(line.split("loss ")[1].split(",")[0]) for line in lines if "loss" in line]
    assert losses[4] < losses[0]  # of the base: the first and the last line but one
    config = DecoderConfig.from_directory(places[BASE])
    loaded = {name: decoder.load_params(place, config) for name, place in places.items()}
    moved = jax.tree.map(lambda a, b: float(abs(a - b).max()), loaded[BASE], loaded["programs"])
    assert all(value > 0 for value in jax.tree.leaves(moved))
    assert json.loads((places[BASE] / "training.json").read_text())["steps"] == 6

    # Pulled toward the base, an expert stays nearer to it; whoever watches is told of every step.
    tokenizer = load_tokenizer(str(places[BASE]), places[BASE])
    texts = encode(tokenizer, SKILLS[1].lessons(SKILLS[1].rows("train", TINY.lessons, TINY.seed)))
    steps: list[tuple[int, int]] = []
    pulled, free = (
        train(loaded[BASE], config, texts, TINY.expert._replace(pull=p), lambda _: None, lambda *at: steps.append(at))
        for p in (300.0, 0.0)
    )
    far, near = (
        sum(jax.tree.leaves(jax.tree.map(lambda a, b: float(((a - b) ** 2).sum()), one, loaded[BASE])))
        for one in (free, pulled)
    )
    assert 0 < near < 0.8 * far
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), free, loaded["programs"]))
    assert steps == [(step, 4) for step in range(1, 5)] * 2

    (places["programs"] / "config.json").unlink()  # as if training had been interrupted
    places["programs"].rename(tmp_path / "models" / "programs.partial")
    told: list[str] = []
    make_models(tmp_path / "models", SKILLS, TINY, told.append)
    assert [line for line in told if line.startswith("training")] == ["training programs: 4 steps of 8 texts"]
    again = decoder.load_params(places["programs"], config)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), again, loaded["programs"]))
    with pytest.raises(M3Error, match="made otherwise"):
        make_models(tmp_path / "models", SKILLS, TINY._replace(seed=1), told.append)
    few = SKILLS[0]._replace(rows=lambda split, count, seed: SKILLS[0].rows(split, min(count, 50), seed))
    with pytest.raises(M3Error, match="arithmetic: has 50 lessons that are not held out, but 200 are needed"):
        make_models(tmp_path / "few", [few], TINY, told.append)
    with pytest.raises(M3Error, match="something else"):
        make_models(tmp_path, SKILLS, TINY, told.append)


@pytest.mark.torch
def test_transformers_loads_them(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    places = make_models(tmp_path / "models", SKILLS[:1], TINY, lambda _: None)
    tokenizer = AutoTokenizer.from_pretrained(places[BASE])
    model = AutoModelForCausalLM.from_pretrained(places[BASE])
    ids = tokenizer("Anna has 2 pens.")["input_ids"]
    config = DecoderConfig.from_directory(places[BASE])
    (score,) = decoder.log_likelihoods(decoder.load_params(places[BASE], config), config, [(ids[:1], ids[1:])])
    with torch.no_grad():
        log_probs = model(torch.tensor([ids])).logits.log_softmax(-1)[0]
    expected = sum(float(log_probs[i, token]) for i, token in enumerate(ids[1:]))
    assert score.log_prob == pytest.approx(expected, rel=1e-4)
