"""What stands beside the weights: config, tokenizer, chat template, and the model card."""

import errno
import json
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from m3jax.anatomy.float8 import without_quantisation
from m3jax.checkpoints import ModelDirectory, digest_file
from m3jax.checkpoints.formats import SAFETENSORS
from m3jax.checkpoints.locate import named_companions, scratch, split_adapter
from m3jax.checkpoints.storage import is_file
from m3jax.errors import M3Error
from m3jax.methods import catalogue
from m3jax.methods.mixup import draw_weights
from m3jax.outputs import provenance
from m3jax.outputs.copies import CHAT_TEMPLATE_JSON, check_documents, read_entries, write_copy
from m3jax.outputs.layers import untied, with_module_layers
from m3jax.outputs.manifest import README
from m3jax.outputs.modes import copy_mode
from m3jax.recipe import Recipe
from m3jax.recipe.chat_templates import AUTO, BUILT_IN
from m3jax.vocabulary import United, is_vocabulary, misnumbered, united_files, with_ids

_CONFIG = "config.json"
_GENERATION = "generation_config.json"
_GENERAL = (_CONFIG, _GENERATION)
_PROCESSORS = ("preprocessor_config.json", "processor_config.json")
_TOKENIZER_CONFIG = "tokenizer_config.json"
_CHAT_TEMPLATE = "chat_template.jinja"

ALSO_FOR = "also_for"
"""The directory of an output in which its weights stand beside the tokenizers of other models."""

_NO_LINKS = frozenset({errno.EPERM, errno.EXDEV, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})


def _is_tokenizer(name: str) -> bool:
    return name not in _GENERAL and not name.endswith(_PROCESSORS)


def gather(
    recipe: Recipe,
    models: Sequence[ModelDirectory],
    template: int,
    united: United | None = None,
    size: int | None = None,
) -> dict[str, Path]:
    """The files to carry over, by name: the template's, with the tokenizer and chat template that the recipe asks for.

    Args:
        recipe: The recipe.
        models: The inputs of the plan.
        template: Which of them gives the configuration.
        united: The vocabulary of the output; None where it is the template's.
        size: How many rows it has; None where the models keep theirs.

    Raises:
        M3Error: A tokenizer cannot be added to, or a file is damaged or none of the model's own.
    """
    files = named_companions(models[template].path)
    check_documents(files)
    others: dict[str, Path] = {}
    if united is not None:
        position = next((i for i, each in enumerate(united.speakers) if each.name == models[template].name), 0)
        own = files
        files = _with_tokenizer(own, united, position, size)
        for name, directory in _places(recipe.also_for).items():
            beside = _beside(own, united, position, name, size)
            others |= {f"{directory}/{file}": path for file, path in beside.items()}
    return {**_with_template(recipe, models, template, files), **others}


def models_used(
    recipe: Recipe, models: Sequence[ModelDirectory], template: int, united: United | None = None
) -> Sequence[ModelDirectory]:
    """The models whose files `gather`, which has the same arguments, copies or makes others of."""
    return models if united is not None or recipe.chat_template == AUTO else [models[template]]


def _with_template(
    recipe: Recipe, models: Sequence[ModelDirectory], template: int, files: dict[str, Path]
) -> dict[str, Path]:
    """The files with the chat template that most models have, where a recipe asks for it."""
    if recipe.chat_template != AUTO:
        return files
    # The template's own comes first among equals.
    order = [models[template], *(model for model in models if model is not models[template])]
    told = [found for model in order if (found := _chat_template(named_companions(model.path))) is not None]
    if not told:
        return files
    commonest = Counter(found.text for found in told).most_common(1)[0][0]
    if (own := _chat_template(files)) is not None and own.text == commonest:
        return files
    copy = Path(tempfile.mkdtemp(dir=scratch())) / _CHAT_TEMPLATE
    copy.write_text(commonest, encoding="utf-8")
    copy_mode(next(found.file for found in told if found.text == commonest), copy)
    return files | {_CHAT_TEMPLATE: copy}


def _with_tokenizer(files: dict[str, Path], united: United, template: int, size: int | None) -> dict[str, Path]:
    """The template's files with the tokenizer of a united vocabulary, whose ids its configurations use."""
    files = _with_tokenizer_of(files, united, template, united.leader, size)
    place = Path(tempfile.mkdtemp(dir=scratch()))
    for name, content in united_files(united).items():
        files = {other: path for other, path in files.items() if other != name}
        if content is None:
            continue
        (place / name).write_bytes(content)
        # What is made of several models' files is as closed as all of them.
        for each in united.speakers:
            for source in (path for other, path in each.files.items() if is_vocabulary(other) or other == name):
                copy_mode(source, place / name)
        files[name] = place / name
    return files


def _with_tokenizer_of(
    files: dict[str, Path], united: United, template: int, leader: int, size: int | None
) -> dict[str, Path]:
    """The template's files with the tokenizer of one of the models, whose ids its configurations use."""
    theirs = united.speakers[leader].files
    if template != leader:
        files = {name: path for name, path in files.items() if not _is_tokenizer(name)}
        files |= {name: path for name, path in theirs.items() if _is_tokenizer(name) or name == _GENERATION}
    place = Path(tempfile.mkdtemp(dir=scratch()))
    for name in _GENERAL:
        told = read_entries(files[name]) if name in files else None
        if not isinstance(told, dict):
            continue
        of_leader = read_entries(theirs[name]) if name in theirs else None
        ids = of_leader if isinstance(of_leader, dict) else {}
        found = with_ids(told, united, (template, leader), ids, size if name == _CONFIG else None)
        if found != told:
            (place / name).write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            copy_mode(files[name], place / name)
            files = {**files, name: place / name}
    return files


# --- Beside the tokenizers of others -------------------------------------------------------------------------


def _places(names: Sequence[str]) -> dict[str, str]:
    """Where in an output the same weights stand beside the tokenizers of models, by their names."""
    last = {name: Path(name.partition("@")[0]).name for name in names}
    counts = Counter(last.values())
    return {
        name: f"{ALSO_FOR}/{short if counts[short] == 1 else re.sub(r'[^0-9A-Za-z._-]+', '-', name).strip('-')}"
        for name, short in last.items()
    }


def _beside(files: dict[str, Path], united: United, template: int, name: str, size: int | None) -> dict[str, Path]:
    """The files of a directory with the output's weights and the tokenizer of one of the models.

    Raises:
        M3Error: That tokenizer numbers a token otherwise than the output does.
    """
    position = next(i for i, speaker in enumerate(united.speakers) if speaker.name == name)
    said = misnumbered(united, position)
    if said is not None:
        raise M3Error(
            f"also_for: {said}, so the same weights cannot stand beside its tokenizer: take {name} out, or write"
            f" tokenizer_source: {name}"
        )
    return _with_tokenizer_of(files, united._replace(roles={}), template, position, size)


def linked_weights(files: Mapping[str, Path], weights: Sequence[str]) -> dict[str, str]:
    """The weight files that stand in an output once more, beside the tokenizers of others: each with what it is.

    Args:
        files: What `gather` chose.
        weights: The weight files.
    """
    directories = dict.fromkeys(name.rpartition("/")[0] for name in files if name.startswith(f"{ALSO_FOR}/"))
    return {f"{directory}/{file}": file for directory in directories for file in weights}


def link_weights(directory: Path, links: Mapping[str, str]) -> None:
    """Has weight files in an output once more: as hard links, which take no room, or else as copies.

    Args:
        directory: The output as it is made.
        links: What `linked_weights` tells.

    Raises:
        OSError: The operating system fails.
    """
    for name, file in links.items():
        place = directory / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.unlink(missing_ok=True)  # of an earlier attempt
        try:
            place.hardlink_to(directory / file)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            shutil.copyfile(directory / file, place)


class _Template(NamedTuple):
    """A chat template and the file that has it."""

    text: str
    file: Path


def _chat_template(files: Mapping[str, Path]) -> _Template | None:
    """A model's chat template, from where transformers looks for it first; None where it has none."""
    if _CHAT_TEMPLATE in files:
        return _Template(_text(files[_CHAT_TEMPLATE]), files[_CHAT_TEMPLATE])
    for name in (CHAT_TEMPLATE_JSON, _TOKENIZER_CONFIG):
        told = read_entries(files[name]) if name in files else None
        found = told.get("chat_template") if isinstance(told, dict) else None
        if isinstance(found, list):  # several, by name
            named = {each.get("name"): each.get("template") for each in found if isinstance(each, dict)}
            found = named.get("default")
        if isinstance(found, str):
            return _Template(found, files[name])
    return None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise M3Error(f"{path}: is not UTF-8 text: restore the file") from None


def _chosen_template(recipe: Recipe, files: Mapping[str, Path]) -> str | None:
    """The text of the chat template that a recipe asks for; None where the template's files stay as they are."""
    if recipe.chat_template is None:
        return None
    if recipe.chat_template == AUTO:
        found = _chat_template(files)
        return None if found is None else found.text
    return BUILT_IN.get(recipe.chat_template, recipe.chat_template)


def _merged_config(
    config: dict[str, Any], dtype: str | None, picked: Mapping[str | None, Sequence[int]] | None, unties: bool
) -> dict[str, Any]:
    """The template's config with the dtype and the layers that were written, under the keys that it uses."""
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
    written = config if dtype is None else config | dict.fromkeys(keys, dtype)
    if picked is not None:
        written = with_module_layers(written, picked)
    return untied(written) if unties else written


def possible_names(files: Mapping[str, Path]) -> set[str]:
    """All that `write_companions` could make of some files, whatever the recipe."""
    return {*files, _CHAT_TEMPLATE, README, *_indices(files)}


def _indices(files: Mapping[str, Path]) -> list[str]:
    """Where the index of weight files stands, if there is one: also beside the tokenizers of others."""
    return [SAFETENSORS.index_file, *linked_weights(files, [SAFETENSORS.index_file])]


def write_companions(
    directory: Path,
    files: Mapping[str, Path],
    digests: Mapping[Path, str],
    recipe: Recipe,
    weights: Mapping[str, Sequence[float]],
    published: Sequence[str] = (),
    picked: Mapping[str | None, Sequence[int]] | None = None,
    unties: bool = False,
) -> dict[str, str]:
    """Write everything but weights and manifest.

    Args:
        directory: Where to.
        files: What `gather` chose.
        digests: Of the bytes that these had when the output was planned, by their paths.
        recipe: The recipe, for dtype, chat template and card.
        weights: Of the experts, by group, for the card.
        published: The models that are on the hub, as the recipe names them, for the card.
        picked: See `layers.with_module_layers`; None where layers are as they were.
        unties: Say that the output embedding is a tensor of its own.

    Returns:
        The digest of each file written, by name.

    Raises:
        M3Error: A file is not as it was when the output was planned.
    """
    template = _chosen_template(recipe, files)

    def edited(name: str, entries: dict[str, Any]) -> dict[str, Any]:
        if name.rpartition("/")[2] == _CONFIG:
            told = without_quantisation(entries) if recipe.dequantize else entries
            return _merged_config(told, recipe.output_dtype, picked, unties)
        if template is None or "chat_template" not in entries or name.startswith(f"{ALSO_FOR}/"):
            return entries
        return entries | {"chat_template": template}

    written = []
    for name, path in files.items():
        write_copy(path, directory, name, digests[path], edited)
        written.append(name)
    if template is not None and recipe.chat_template != AUTO:
        (directory / _CHAT_TEMPLATE).write_text(template, encoding="utf-8")
        written.append(_CHAT_TEMPLATE)
    (directory / README).write_text(card(recipe, weights, published), encoding="utf-8")
    written.append(README)
    if is_file(index := directory / SAFETENSORS.index_file):
        link_weights(directory, linked_weights(files, [index.name]))
        written += _indices(files)
    return {name: digest_file(directory / name) for name in sorted(set(written))}


def _yaml(data: Any) -> str:
    return str(yaml.safe_dump(data, sort_keys=False, allow_unicode=True)).rstrip("\n")


def card(recipe: Recipe, weights: Mapping[str, Sequence[float]], published: Sequence[str] = ()) -> str:
    """The model card: what was merged, how, with which weights, and how to make it again.

    Its front matter is read by the hub, which knows models by their ids there and nothing of paths elsewhere.
    """
    sections = recipe.every_section
    names = list(dict.fromkeys(entry.model for section in sections for entry in section.experts))
    parts = [part for name in recipe.named_models for part in _parts(name)]
    known = list(dict.fromkeys(part.partition("@")[0] for part in parts if part in published))
    front = {"base_model": known} if known else {}
    head = _yaml({**front, "library_name": "transformers", "tags": ["merge", "m3jax", recipe.merge_method]})
    title = recipe.name or " + ".join("+".join(Path(part).name for part in _parts(name)) for name in names)
    lines = ["---", head, "---", "", f"# {title}", ""]
    method = provenance.said(recipe.merge_method, catalogue.origin_of(recipe.merge_method))
    lines.append(f"A merge of {', '.join(f'`{name}`' for name in names)} made with m3jax ({method}).")
    if recipe.mixup is not None:
        is_draw = recipe.mixup.weights is None and all(_is_draw(recipe, *group) for group in weights.items())
        lines += ["", _weights(recipe, weights, is_draw)]
        if not is_draw:
            outcome = {group: tuple(values) for group, values in weights.items()}
            recipe = recipe.model_copy(update={"mixup": recipe.mixup.model_copy(update={"weights": outcome})})
    lines += ["", "```yaml", _yaml(recipe.resolved()), "```", ""]
    lines.append("`m3jax.json` records every input and output digest; `m3jax replay` makes the same bytes again and")
    lines.append("`m3jax verify` checks them.")
    return "\n".join(lines) + "\n"


def _parts(name: str) -> tuple[str, ...]:
    """A model's name, or those of it and its adapter."""
    return split_adapter(name) or (name,)


def _weights(recipe: Recipe, weights: Mapping[str, Sequence[float]], is_draw: bool) -> str:
    """A sentence, and a table if there is more than one group, on the weights of the experts."""
    alpha = recipe.mixup.alpha if recipe.mixup is not None else 0
    smooth = recipe.mixup.smooth if recipe.mixup is not None else 0
    walk = f", neighbouring layers by a walk of correlation {smooth}" if smooth else ""
    law = f"Beta/Dirichlet with α = {alpha}{walk}, seed {recipe.seed} (Mixup Model Merge, arXiv 2502.15434)"
    said = f"Weights drawn from {law}" if is_draw else f"Weights chosen in place of a draw from {law}"
    if len(weights) == 1:
        (values,) = weights.values()
        return f"{said}: {', '.join(f'{v:.6f}' for v in values)}."
    rows = [f"| `{group}` | {', '.join(f'{v:.6f}' for v in values)} |" for group, values in weights.items()]
    return "\n".join([said + ":", "", "| group | weights |", "|---|---|", *rows])


def _is_draw(recipe: Recipe, group: str, values: Sequence[float]) -> bool:
    """Whether these are the weights that the recipe draws for a group; of slerp there is one."""
    assert recipe.mixup is not None
    if recipe.mixup.smooth:
        return True  # for which no others can be given
    named = None if recipe.mixup.granularity == "model" else group
    drawn = draw_weights(recipe.seed, recipe.mixup.alpha, len(recipe.experts), named)
    return tuple(values) == drawn[: len(values)]
