"""Fine-tuning a given model: the loss, its pieces and factors, going on after a kill, and experts as directories."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from m3jax import decoder
from m3jax.decoder import DecoderConfig
from m3jax.errors import M3Error
from m3jax.laboratory import tuning
from m3jax.laboratory.experts import Apprenticeship, make_experts, manner_of, notes_of, texts_of
from m3jax.laboratory.models import BASE, save_model
from m3jax.laboratory.skills import brief_word_problems
from m3jax.laboratory.training import Course, LessonBatch, Size, Text, make_config, make_tokenizer
from m3jax.laboratory.tuning import Tuning, answer_losses, tune
from m3jax.trees.loading import load

CHATS = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}<s>"
SKILLS = [brief_word_problems(), brief_word_problems()._replace(name="other")]
HOW = Tuning(Course(4, 4, 1e-2), every=2)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("given") / "model"
    tokenizer = make_tokenizer([a + b for a, b in SKILLS[0].lessons(SKILLS[0].rows("train", 50, 0))], 300)
    tokenizer.chat_template = CHATS
    entries = {**make_config(Size(16, 2, 2, len(tokenizer))), "num_key_value_heads": 1}
    config = DecoderConfig.from_dict(entries)
    save_model(place, decoder.random_params(config, 0), config, entries, tokenizer)
    return place


@pytest.fixture
def lessons(base: Path) -> tuple[dict[str, Any], DecoderConfig, list[Text]]:
    model = tuning_model(base)
    skill = SKILLS[0]
    told = skill.lessons(skill.rows("train", 12, 0), manner_of(model.tokenizer))
    return load(base, flat=True), model.config, texts_of(model.tokenizer, model.config, told)


def tuning_model(base: Path) -> Any:
    from m3jax.evaluation.models import open_model

    return open_model(str(base))


def test_the_loss_is_that_of_answers_alone(lessons: tuple[dict[str, Any], DecoderConfig, list[Text]]) -> None:
    arrays, config, texts = lessons
    shared = decoder.common_prefix([text.tokens[: text.prompt] for text in texts])
    assert len(shared) > 10  # the instruction
    batch = next(tuning.batches([Text(t.tokens[len(shared) :], t.prompt - len(shared)) for t in texts], HOW.course))
    whole = [[*shared, *row[:n].tolist()] for row, n in zip(batch.tokens, batch.lengths, strict=True)]
    cuts = [len(shared) + int(prompt) for prompt in batch.prompts]
    parts = [(text[:cut], text[cut:]) for text, cut in zip(whole, cuts, strict=True)]
    params = decoder.params_from_tree(arrays, config)
    expected = -sum(score.log_prob for score in decoder.log_likelihoods(params, config, parts, batch_size=4))

    def loss(arrays: Any, prefix: decoder.Prefix, batch: LessonBatch) -> Any:
        return answer_losses(arrays, prefix, batch, config=config, most=3)

    value, slopes = jax.jit(jax.value_and_grad(loss))(arrays, decoder.make_prefix(shared), batch)
    assert float(value) == pytest.approx(expected, rel=1e-5)
    # The same without sharing: slopes flow through what is read once, too.
    rest = batch._replace(
        tokens=np.array([text + [0] * (len(shared) + batch.tokens.shape[1] - len(text)) for text in whole], np.int32),
        lengths=batch.lengths + len(shared),
        prompts=batch.prompts + len(shared),
    )
    plain = jax.jit(jax.grad(loss))(arrays, decoder.make_prefix([]), rest)
    for name, slope in slopes.items():
        np.testing.assert_allclose(slope, plain[name], rtol=2e-3, atol=2e-5, err_msg=name)


class KilledError(Exception):
    """Stands for the end of the process."""


def test_a_training_that_was_killed_gives_the_same_bits(
    lessons: tuple[dict[str, Any], DecoderConfig, list[Text]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays, config, texts = lessons
    record = tmp_path / "record"
    whole = tune(arrays, config, texts, HOW, record, lambda _: None)
    assert len(whole.losses) == 4
    assert record.exists()  # of step 2; who makes the model removes it
    record.unlink()
    made = tuning.batches

    def killing(*given: Any) -> Iterator[LessonBatch]:
        for number, batch in enumerate(made(*given)):
            if number == 3:
                raise KilledError
            yield batch

    monkeypatch.setattr(tuning, "batches", killing)
    with pytest.raises(KilledError):
        tune(arrays, config, texts, HOW, record, lambda _: None)
    monkeypatch.setattr(tuning, "batches", made)
    told: list[str] = []
    again = tune(arrays, config, texts, HOW, record, told.append)
    assert told[0] == "going on behind step 2"
    assert again.losses == whole.losses
    assert all((again.arrays[name] == x).all() for name, x in whole.arrays.items())
    with pytest.raises(M3Error, match="of another training"):
        tune(arrays, config, texts, HOW._replace(course=Course(4, 4, 2e-2)), record, told.append)
    record.write_bytes(b"half")
    with pytest.raises(M3Error, match="is no state of a training"):
        tune(arrays, config, texts, HOW, record, told.append)


def test_pieces_of_a_batch_add_up_and_factors_learn(
    lessons: tuple[dict[str, Any], DecoderConfig, list[Text]], tmp_path: Path
) -> None:
    arrays, config, texts = lessons
    how = HOW._replace(course=Course(2, 4, 1e-3))
    whole = tune(arrays, config, texts, how, tmp_path / "a", lambda _: None)
    cut = tune(arrays, config, texts, how._replace(parts=2), tmp_path / "b", lambda _: None)
    assert cut.losses == pytest.approx(whole.losses, rel=1e-5)
    low = tune(arrays, config, texts, how._replace(rank=2), tmp_path / "c", lambda _: None)
    moved = {name for name, x in low.arrays.items() if (x != arrays[name]).any()}
    assert moved == {name for name in arrays if "proj" in name}
    change = np.asarray(low.arrays["model.layers.0.mlp.up_proj.weight"] - arrays["model.layers.0.mlp.up_proj.weight"])
    assert np.linalg.matrix_rank(change, tol=1e-6) <= 2
    for wrong, sentence in (
        ({"parts": 3}, "does not divide"), ({"rank": -1}, "rank: is -1"), ({"every": 0}, "every: is 0")
    ):  # fmt: skip
        with pytest.raises(M3Error, match=sentence):
            tune(arrays, config, texts, how._replace(**wrong), tmp_path / "d", lambda _: None)


def test_experts_are_directories_of_their_own(base: Path, tmp_path: Path) -> None:
    how = Apprenticeship(20, HOW)
    told: list[str] = []
    places = make_experts(tmp_path / "models", str(base), SKILLS, how, told.append)
    assert list(places) == [BASE, "arithmetic", "other"]
    loaded = {name: load(place, flat=True) for name, place in places.items()}
    assert all((x == load(base, flat=True)[name]).all() for name, x in loaded[BASE].items())
    assert all((x == loaded["other"][name]).all() for name, x in loaded["arithmetic"].items())  # the same lessons
    notes = notes_of(places["arithmetic"])
    assert len(notes["losses"]) == 4
    assert notes["losses"][-1] < notes["losses"][0]
    assert notes["drift"]["all"] > 0
    assert set(notes["drift"]) == {"all", "embeddings", "attention", "feed-forward", "norms"}
    assert json.loads((places["other"] / "config.json").read_text())["num_key_value_heads"] == 1
    assert not list((tmp_path / "models").glob("*.safetensors*"))  # no record is left
    told.clear()
    make_experts(tmp_path / "models", str(base), SKILLS, how, told.append)
    assert not told
    with pytest.raises(M3Error, match="made otherwise"):
        make_experts(tmp_path / "models", str(base), SKILLS, how._replace(seed=1), told.append)
