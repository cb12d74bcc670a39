"""Experts of a pretrained base: any Hugging Face model that the decoder knows, fine-tuned on one skill each."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from m3jax import decoder
from m3jax.checkpoints import open_checkpoint
from m3jax.cluster.meshes import spread
from m3jax.decoder import DecoderConfig
from m3jax.decoder.params import match_tensors
from m3jax.documents import FAULTS
from m3jax.errors import M3Error, saying_what_failed
from m3jax.evaluation.models import StoredModel, make_mesh, open_model
from m3jax.evaluation.prompts import CHAT, has_chat_template
from m3jax.evaluation.tokens import stop_tokens
from m3jax.laboratory.models import BASE, TRAINING, is_whole, lessons_of, save_tensors, take_place
from m3jax.laboratory.skills import TEMPLATE, Manner, Skill
from m3jax.laboratory.training import Text
from m3jax.laboratory.tuning import Tuning, check_tuning, told, tune
from m3jax.progress import Tell
from m3jax.trees.loading import load_checkpoint

_FLOATS = ("BF16", "F16", "F32", "F64")
_LONGEST = 512  # tokens of a lesson


class Apprenticeship(NamedTuple):
    """How experts are made of a base.

    Attributes:
        lessons: Lessons of each skill, at most.
        tuning: How each expert is fine-tuned.
        seed: Of lessons and orders.
    """

    lessons: int
    tuning: Tuning
    seed: int = 0


def manner_of(tokenizer: Any) -> Manner:
    """How a pretrained model is asked: in its own chat template where it has one.

    Args:
        tokenizer: A transformers tokenizer.
    """
    return Manner(CHAT, tokenizer) if has_chat_template(tokenizer) else Manner(TEMPLATE, tokenizer)


def make_experts(
    directory: Path, base: str, skills: Sequence[Skill], how: Apprenticeship, tell: Tell
) -> dict[str, Path]:
    """Fine-tunes an expert in each skill, as Hugging Face directories of float32; those that are there are kept.

    A training that was killed goes on from its last record. Where there are several devices, parameters and batches
    are cut over all of them.

    Args:
        directory: Where they go, each under its name, and the base widened to float32; made if it is not there.
        base: The base: a model directory or hub id.
        skills: What is learned.
        how: How.
        tell: Told in lines how far it is.

    Returns:
        The directories: "base", and the experts by their skills.

    Raises:
        M3Error: The base cannot be used; the directory holds models that were made otherwise, or cannot be used; a
            skill has too few lessons.
    """
    check_tuning(how.tuning)
    model = open_model(base)
    places = {name: directory / name for name in (BASE, *(skill.name for skill in skills))}
    taught = {skill.name: skill.identity() for skill in skills}
    made = {
        "base": model.fingerprint("truncate"),
        "skills": taught,
        **how._asdict(),
        "tuning": list(told(how.tuning).values()),
    }
    take_place(directory, made)
    manner = manner_of(model.tokenizer)
    left = [skill for skill in skills if not is_whole(places[skill.name])]
    tokenizer, config = model.tokenizer, model.config
    texts = {
        skill.name: texts_of(tokenizer, config, lessons_of(skill, how.lessons, how.seed, manner)) for skill in left
    }
    if not is_whole(places[BASE]):
        tell("widening the base to float32")
        _save(places[BASE], model, _widened(model.place.path, None), {"steps": 0, "seconds": 0.0})
    for skill in left:
        _teach(places, skill.name, model, texts[skill.name], how, tell)
    return places


def texts_of(tokenizer: Any, config: DecoderConfig, lessons: Sequence[tuple[str, str]]) -> list[Text]:
    """Lessons in tokens, each closed by the token that ends a turn; those that are too long are left out.

    Args:
        tokenizer: A transformers tokenizer.
        config: The decoder.
        lessons: Prompts and answers.

    Raises:
        M3Error: No token ends a text.
    """
    ends = stop_tokens(tokenizer, config, ())
    if not ends:
        raise M3Error("neither the tokenizer nor config.json names a token that ends a text: add eos_token_id to it")
    end = tokenizer.eos_token_id if tokenizer.eos_token_id in ends else ends[0]
    longest = min(_LONGEST, config.context_length)
    texts = []
    for prompt, answer in lessons:
        before = decoder.encode(tokenizer, prompt)
        after = [*tokenizer.encode(answer, add_special_tokens=False), end]
        texts.append(Text(before + after, len(before)))
    return [text for text in texts if len(text.tokens) <= longest]


def _teach(
    places: Mapping[str, Path], name: str, model: StoredModel, texts: Sequence[Text], how: Apprenticeship, tell: Tell
) -> None:
    """Makes one expert."""
    course = how.tuning.course
    tell(f"fine-tuning {name}: {course.steps} steps of {course.batch} texts, of {len(texts):,}")
    mesh = None if jax.device_count() == 1 else make_mesh(f"fsdp={jax.device_count()}")
    arrays = _widened(places[BASE], mesh)
    trained = {part for part in _learnable(arrays, model.config) if part in arrays}
    tuning = how.tuning._replace(course=course._replace(seed=how.seed))
    record = places[name].with_name(f"{name}.training.safetensors")
    own = {part: x for part, x in arrays.items() if part in trained}
    found = tune(own, model.config, texts, tuning, record, tell, mesh)
    notes = {
        **{part: value for part, value in tuning._asdict().items() if part != "course"},
        **course._asdict(),
        "seconds": found.seconds,
        "losses": list(found.losses),
        "drift": drift_of(own, found.arrays),
    }
    _save(places[name], model, {**arrays, **found.arrays}, notes)
    record.unlink(missing_ok=True)


def _widened(place: Path, mesh: Any) -> dict[str, Any]:
    """All tensors of a model, floats as float32, cut over a mesh where there is one."""
    with open_checkpoint(place) as checkpoint:
        names = list(checkpoint.tensors)
        arrays = load_checkpoint(checkpoint, names, lambda name, shape: spread(mesh, shape))
        floats = {name for name, info in checkpoint.tensors.items() if info.dtype in _FLOATS}
    return {name: x.astype(jnp.float32) if name in floats else x for name, x in arrays.items()}


def _learnable(arrays: Mapping[str, Any], config: DecoderConfig) -> set[str]:
    """The tensors that the decoder reads."""
    stored = {name: (tuple(x.shape), jnp.issubdtype(x.dtype, jnp.floating)) for name, x in arrays.items()}
    matched = match_tensors(stored, config, "the base")
    return {part.name for parameter in matched.values() for part in parameter.parts}


def _save(place: Path, model: StoredModel, arrays: Mapping[str, Any], notes: Mapping[str, Any]) -> None:
    entries = dict(model.home.config or {})
    entries.pop("dtype", None)
    generation = {"eos_token_id": list(stop_tokens(model.tokenizer, model.config, ()))}
    others = {"generation_config.json": generation, TRAINING: notes}
    tensors = {name: np.asarray(x) for name, x in arrays.items()}
    save_tensors(place, tensors, {**entries, "torch_dtype": "float32"}, model.tokenizer, others)


def drift_of(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, float]:
    """How far tensors have moved: ‖after − before‖ / ‖before‖, of all and by what they are.

    Args:
        before: By name.
        after: Likewise.
    """
    sums: dict[str, list[float]] = {}
    for name, old in before.items():
        moved = float(jnp.sum(jnp.square(after[name] - old)))
        size = float(jnp.sum(jnp.square(old)))
        for kind in ("all", _kind(name)):
            total = sums.setdefault(kind, [0.0, 0.0])
            total[0] += moved
            total[1] += size
    return {kind: math.sqrt(moved / size) if size else 0.0 for kind, (moved, size) in sums.items()}


_KINDS = {"embed": "embeddings", "norm": "norms", "attn": "attention", "attention": "attention", "mlp": "feed-forward"}


def _kind(name: str) -> str:
    return next((kind for part, kind in _KINDS.items() if part in name), "others")


def notes_of(place: Path) -> dict[str, Any]:
    """What is noted of a model's training.

    Args:
        place: Its directory.

    Raises:
        M3Error: It cannot be read.
    """
    with saying_what_failed(place / TRAINING):
        try:
            return dict(json.loads((place / TRAINING).read_text(encoding="utf-8")))
        except FAULTS as error:
            raise M3Error(f"{place / TRAINING}: is no note of a training ({error}): make the model anew") from None
