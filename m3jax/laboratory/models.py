"""The laboratory's models: a base that has seen a little of every skill, and experts in one each."""

import json
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import save

from m3jax import decoder
from m3jax.decoder import DecoderConfig
from m3jax.errors import M3Error, saying_what_failed
from m3jax.evaluation.ownership import PART
from m3jax.evaluation.records import write_whole
from m3jax.laboratory.skills import Manner, Skill
from m3jax.laboratory.training import Course, Size, Text, encode, make_config, make_tokenizer, train
from m3jax.progress import Progress, Tell, Watch

BASE = "base"
TRAINING = "training.json"
_FEWEST = 1000  # lessons of which anything can be learned
_PRIMER = 20_000  # texts of each skill that the tokenizer learns from


class Curriculum(NamedTuple):
    """How base and experts are made.

    Attributes:
        size: How large they are.
        lessons: Lessons of each skill, at most.
        base: How the base is trained, on all skills.
        expert: How an expert is trained from there, on one.
        seed: Of lessons, first weights and orders.
    """

    size: Size
    lessons: int
    base: Course
    expert: Course
    seed: int = 0


def make_models(
    directory: Path, skills: Sequence[Skill], how: Curriculum, tell: Tell, watch: Watch | None = None
) -> dict[str, Path]:
    """Trains a base and an expert in each skill, as Hugging Face directories; those that are there are kept.

    Args:
        directory: Where they go, each under its name; made if it is not there.
        skills: What is learned.
        how: How.
        tell: Told in lines how far it is.
        watch: Told of every step of every model's training.

    Returns:
        The directories: "base", and the experts by their skills.

    Raises:
        M3Error: The directory holds models that were made otherwise, or cannot be used; a skill has too few lessons.
    """
    places = {name: directory / name for name in (BASE, *(skill.name for skill in skills))}
    taught = {skill.name: skill.identity() for skill in skills}
    take_place(directory, {"skills": taught, **json.loads(json.dumps(how._asdict()))})
    if all(map(is_whole, places.values())):
        return places
    lessons: dict[str, list[tuple[str, str]]] = {}
    for number, skill in enumerate(skills):
        if watch is not None:
            watch(Progress("making lessons", number, len(skills), "skill"))
        lessons[skill.name] = lessons_of(skill, how.lessons, how.seed)
    if watch is not None:
        watch(Progress("making lessons", len(skills), len(skills), "skill"))
    tokenizer = make_tokenizer([p + a for all_ in lessons.values() for p, a in all_[:_PRIMER]], how.size.vocabulary)
    texts = {name: encode(tokenizer, all_) for name, all_ in lessons.items()}
    entries = make_config(how.size._replace(vocabulary=len(tokenizer)))
    config = DecoderConfig.from_dict(entries)

    def teach(name: str, start: Any, about: list[Any], course: Course) -> Any:
        if not is_whole(places[name]):
            tell(f"training {name}: {course.steps} steps of {course.batch} texts")
            begun = time.perf_counter()
            learned = train(start, config, about, course._replace(seed=how.seed), tell, _steps(name, watch))
            spent = {**course._asdict(), "seconds": time.perf_counter() - begun}
            save_model(places[name], learned, config, entries, tokenizer, {TRAINING: spent})
        return decoder.load_params(places[name], config)

    def shown(skill: Skill) -> Sequence[Text]:
        """What the base learns of a skill."""
        if skill.primer is None:
            return _part(texts[skill.name], skill.seen)
        return encode(tokenizer, skill.lessons(skill.primer(how.lessons, how.seed)))

    seen = [text for skill in skills for text in shown(skill)]
    base = teach(BASE, decoder.random_params(config, how.seed), seen, how.base)
    for skill in skills:
        teach(skill.name, base, texts[skill.name], how.expert)
    return places


def _steps(name: str, watch: Watch | None) -> Callable[[int, int], None] | None:
    """What is told of a training's steps."""
    return None if watch is None else lambda done, total: watch(Progress(f"training {name}", done, total, "step"))


def lessons_of(skill: Skill, count: int, seed: int, manner: Manner | None = None) -> list[tuple[str, str]]:
    """Lessons of a skill.

    Args:
        skill: The skill.
        count: How many, at most.
        seed: Which.
        manner: How models are asked.

    Raises:
        M3Error: There are too few that are not held out.
    """
    lessons = skill.lessons(skill.rows("train", count, seed), manner)
    needed = min(count, _FEWEST)
    if len(lessons) < needed:
        raise M3Error(
            f"{skill.name}: has {len(lessons)} lessons that are not held out, but {needed:,} are needed: give more"
        )
    return lessons


def _part(texts: Sequence[Text], share: float) -> Sequence[Text]:
    return texts[: math.ceil(share * len(texts))]


def take_place(directory: Path, made: Mapping[str, Any]) -> None:
    """Notes how models are made.

    Args:
        directory: Of the models; made if it is not there.
        made: How, as plain data.

    Raises:
        M3Error: Its models were made otherwise, or it holds something else.
    """
    note = directory / "curriculum.json"
    with saying_what_failed(directory):
        directory.mkdir(parents=True, exist_ok=True)
        known = note.read_text(encoding="utf-8") if note.exists() else None
        text = json.dumps(made, indent=2) + "\n"
        other = any(path.suffix != PART for path in directory.iterdir())  # what a kill leaves is nobody's
        if (known is None and other) or known not in (None, text):
            raise M3Error(f"{directory}: holds models that were made otherwise, or something else: give another place")
        if known is None:
            write_whole(note, text)


def is_whole(place: Path) -> bool:
    """Whether a model is there, which appears whole.

    Args:
        place: Its directory.
    """
    return (place / "config.json").is_file()


def save_model(
    place: Path,
    params: Any,
    config: DecoderConfig,
    entries: Mapping[str, Any],
    tokenizer: Any,
    notes: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Writes a model directory, which appears whole.

    Args:
        place: The directory.
        params: The decoder's parameters.
        config: The decoder.
        entries: The content of config.json.
        tokenizer: A transformers tokenizer.
        notes: Further JSON files, by name.

    Raises:
        M3Error: It cannot be written.
    """
    told = {"generation_config.json": {"eos_token_id": entries["eos_token_id"]}, **notes}
    save_tensors(place, stored(params, config), entries, tokenizer, told)


def save_tensors(
    place: Path,
    tensors: Mapping[str, np.ndarray],
    entries: Mapping[str, Any],
    tokenizer: Any,
    notes: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Writes a model directory from tensors under Hugging Face's names; it appears whole.

    Args:
        place: The directory.
        tensors: The weights.
        entries: The content of config.json.
        tokenizer: A transformers tokenizer.
        notes: Further JSON files, by name.

    Raises:
        M3Error: It cannot be written.
    """
    partial = place.with_name(f"{place.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with saying_what_failed(place):
        partial.mkdir(parents=True)
        tokenizer.save_pretrained(partial)
        whole = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
        (partial / "model.safetensors").write_bytes(save(whole, metadata={"format": "pt"}))
        for name, content in {"config.json": entries, **notes}.items():
            (partial / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        partial.rename(place)


def stored(params: Any, config: DecoderConfig) -> dict[str, np.ndarray]:
    """A Llama's parameters under Hugging Face's names.

    Args:
        params: The decoder's parameters; input and output embeddings are the same.
        config: The decoder.
    """
    width = config.hidden_size
    tensors = {
        "model.embed_tokens.weight": params["embedding"]["weight"],
        "model.norm.weight": params["norm"]["weight"],
    }
    for number, block in params["layers"].items():
        at = f"model.layers.{number}"
        attention, feed = block["attention"], block["feed_forward"]
        for part in ("query", "key", "value"):
            tensors[f"{at}.self_attn.{part[0]}_proj.weight"] = attention[part]["weight"].reshape(-1, width)
        tensors[f"{at}.self_attn.o_proj.weight"] = attention["output"]["weight"].reshape(width, -1)
        for part in ("gate", "up", "down"):
            tensors[f"{at}.mlp.{part}_proj.weight"] = feed[part]["weight"]
        tensors[f"{at}.input_layernorm.weight"] = block["attention_norm"]["weight"]
        tensors[f"{at}.post_attention_layernorm.weight"] = block["feed_forward_norm"]["weight"]
    return {name: np.asarray(tensor) for name, tensor in tensors.items()}
