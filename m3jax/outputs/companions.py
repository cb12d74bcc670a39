"""What stands beside the weights: config, tokenizer, chat template, and the model card."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from m3jax.checkpoints import ModelDirectory, digest_file
from m3jax.checkpoints.formats import SAFETENSORS
from m3jax.checkpoints.locate import named_companions
from m3jax.errors import M3Error
from m3jax.methods import catalogue
from m3jax.methods.mixup import draw_weights
from m3jax.outputs import provenance
from m3jax.outputs.layers import untied, with_layers
from m3jax.recipe import Recipe

_CONFIG = "config.json"
_GENERAL = ("config.json", "generation_config.json")
_PROCESSORS = ("preprocessor_config.json", "processor_config.json")
_CHAT_TEMPLATE = "chat_template.jinja"


def read_config(model: Path) -> dict[str, Any] | None:
    """A model's config.json; None where there is none.

    Raises:
        M3Error: It is not a JSON object.
    """
    path = model / _CONFIG
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise M3Error(f"{path}: is not JSON ({error}): restore the file") from None
    except OSError as error:
        raise M3Error(f"{path}: cannot be read: {error.strerror}: check the file") from error
    if not isinstance(config, dict):
        raise M3Error(f"{path}: is not a JSON object: restore the file")
    return config


def _is_tokenizer(name: str) -> bool:
    return name not in _GENERAL and not name.endswith(_PROCESSORS)


def gather(recipe: Recipe, models: Sequence[ModelDirectory], template: int) -> dict[str, Path]:
    """The files to carry over, by name: the template's, with the tokenizer that the recipe asks for.

    Raises:
        M3Error: `tokenizer_source` cannot be followed.
    """
    files = named_companions(models[template].path)
    source = recipe.tokenizer_source
    if source is None or source == "base":
        return files
    if source == "union":
        _check_same_tokenizers(models)
        return files
    chosen = next((model for model in models if model.name == source), None)
    if chosen is None:
        raise M3Error(f"tokenizer_source: {source} is not one of the models: write union, base or one of them")
    general = {name: path for name, path in files.items() if not _is_tokenizer(name)}
    return general | {name: path for name, path in named_companions(chosen.path).items() if _is_tokenizer(name)}


def _vocabulary(model: ModelDirectory) -> dict[str, str]:
    """The digests of the files that hold a model's vocabulary, by name."""
    files = named_companions(model.path)
    return {name: digest_file(path) for name, path in files.items() if name.startswith(("tokenizer.", "vocab"))}


def _check_same_tokenizers(models: Sequence[ModelDirectory]) -> None:
    """Raise M3Error unless all vocabularies are the same, so that their union is each of them."""
    vocabularies = list(map(_vocabulary, models))
    for model, vocabulary in zip(models[1:], vocabularies[1:], strict=True):
        if vocabulary != vocabularies[0]:
            raise M3Error(
                f"tokenizer_source: union of different vocabularies ({models[0].name}, {model.name}) is not "
                "available: write base or one of the models"
            )


def _merged_config(path: Path, dtype: str | None, picked: Sequence[int] | None, unties: bool) -> str:
    """The template's config with the dtype and the layers that were written, under the keys that it uses."""
    text = path.read_text(encoding="utf-8")
    config = json.loads(text)
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
    written = config if dtype is None else {**config, **dict.fromkeys(keys, dtype)}
    if picked is not None:
        written = with_layers(written, picked)
    if unties:
        written = untied(written)
    if written == config:
        return text
    config = written
    return json.dumps(config, indent=2, ensure_ascii=False) + "\n"


def write_companions(
    directory: Path,
    files: Mapping[str, Path],
    recipe: Recipe,
    weights: Mapping[str, Sequence[float]],
    picked: Sequence[int] | None = None,
    unties: bool = False,
) -> dict[str, str]:
    """Write everything but weights and manifest.

    Args:
        directory: Where to.
        files: What `gather` chose.
        recipe: The recipe, for dtype, chat template and card.
        weights: Of the experts, by group, for the card.
        picked: See `layers.with_layers`; None where layers are as they were.
        unties: Say that the output embedding is a tensor of its own.

    Returns:
        The digest of each file written, by name.
    """
    written = []
    for name, path in files.items():
        target = directory / name
        target.parent.mkdir(exist_ok=True)
        if name == _CONFIG:
            target.write_text(_merged_config(path, recipe.output_dtype, picked, unties), encoding="utf-8")
        else:
            target.write_bytes(path.read_bytes())
        written.append(name)
    if recipe.chat_template not in (None, "auto"):
        (directory / _CHAT_TEMPLATE).write_text(str(recipe.chat_template), encoding="utf-8")
        written.append(_CHAT_TEMPLATE)
    (directory / "README.md").write_text(card(recipe, weights), encoding="utf-8")
    written.append("README.md")
    if (index := directory / SAFETENSORS.index_file).is_file():
        written.append(index.name)
    return {name: digest_file(directory / name) for name in sorted(set(written))}


def _yaml(data: Any) -> str:
    return str(yaml.safe_dump(data, sort_keys=False, allow_unicode=True)).rstrip("\n")


def card(recipe: Recipe, weights: Mapping[str, Sequence[float]]) -> str:
    """The model card: what was merged, how, with which weights, and how to make it again."""
    names = [entry.model for entry in recipe.experts]
    everyone = list(dict.fromkeys([*([recipe.base_model] if recipe.base_model else []), *names]))
    head = _yaml(
        {"base_model": everyone, "library_name": "transformers", "tags": ["merge", "m3jax", recipe.merge_method]}
    )
    title = recipe.name or " + ".join(Path(name).name for name in names)
    lines = ["---", head, "---", "", f"# {title}", ""]
    method = provenance.said(recipe.merge_method, catalogue.origin_of(recipe.merge_method))
    lines.append(f"A merge of {', '.join(f'`{name}`' for name in names)} made with m3jax ({method}).")
    if recipe.mixup is not None:
        lines += ["", _weights(recipe, weights)]
    lines += ["", "```yaml", _yaml(recipe.resolved()), "```", ""]
    lines.append("`m3jax.json` records every input and output digest; `m3jax replay` makes the same bytes again and")
    lines.append("`m3jax verify` checks them.")
    return "\n".join(lines) + "\n"


def _weights(recipe: Recipe, weights: Mapping[str, Sequence[float]]) -> str:
    """A sentence, and a table if there is more than one group, on the weights of the experts."""
    alpha = recipe.mixup.alpha if recipe.mixup is not None else 0
    law = f"Beta/Dirichlet with α = {alpha}, seed {recipe.seed} (Mixup Model Merge, arXiv 2502.15434)"
    is_draw = all(_is_draw(recipe, group, values) for group, values in weights.items())
    said = f"Weights drawn from {law}" if is_draw else f"Weights chosen in place of a draw from {law}"
    if len(weights) == 1:
        (values,) = weights.values()
        return f"{said}: {', '.join(f'{v:.6f}' for v in values)}."
    rows = [f"| `{group}` | {', '.join(f'{v:.6f}' for v in values)} |" for group, values in weights.items()]
    return "\n".join([said + ":", "", "| group | weights |", "|---|---|", *rows])


def _is_draw(recipe: Recipe, group: str, values: Sequence[float]) -> bool:
    """Whether these are the weights that the recipe draws for a group; of slerp there is one."""
    assert recipe.mixup is not None
    named = None if recipe.mixup.granularity == "model" else group
    drawn = draw_weights(recipe.seed, recipe.mixup.alpha, len(recipe.experts), named)
    return tuple(values) == drawn[: len(values)]
