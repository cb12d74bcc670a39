"""A recipe from its file, or from what a program says."""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from m3jax.errors import M3Error
from m3jax.recipe.dialect import read_yaml, with_override
from m3jax.recipe.schema import Recipe


def load_recipe(
    source: str | os.PathLike[str] | Mapping[str, Any], overrides: Sequence[str] = (), seed: int | None = None
) -> Recipe:
    """Reads a recipe.

    Args:
      source: a YAML file's path, or a mapping such as a manifest holds.
      overrides: what `--set` says: "key=value" with a dotted key and a YAML value, the last one winning.
      seed: a seed that wins over the recipe's, in all of its documents.

    Returns:
      The recipe, checked.

    Raises:
      M3Error: the file cannot be read, or the recipe or an override is wrong.

    Example:
      >>> load_recipe({"merge_method": "linear", "models": ["a", "b"]}, ["mixup.alpha=0.5"], seed=7).seed
      7
    """
    origin = "recipe" if isinstance(source, Mapping) else os.fspath(source)
    if overrides or seed is not None:
        origin += " with the given changes"
    raw: object = source if isinstance(source, Mapping) else read_yaml(source)
    for override in overrides:
        raw = with_override(raw, override)
    if seed is not None and isinstance(raw, Mapping):
        raw = _with_seed(raw, seed)
    try:
        recipe = Recipe.model_validate(raw)
        json.dumps(recipe.resolved(), ensure_ascii=False).encode()
    except M3Error as error:
        raise M3Error(f"{origin}: {error}") from None
    except UnicodeEncodeError:
        raise M3Error(f"{origin}: holds half a character (a lone surrogate such as \\ud800): remove it") from None
    return recipe


def _with_seed(raw: Mapping[str, Any], seed: int) -> dict[str, Any]:
    others = raw.get("intermediates")
    found = {**raw, "seed": seed}
    if isinstance(others, list | tuple):
        found["intermediates"] = [{**each, "seed": seed} if isinstance(each, Mapping) else each for each in others]
    return found
