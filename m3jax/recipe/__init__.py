"""The recipe: what to merge and how, in a superset of mergekit's YAML."""

from m3jax.recipe.entries import MixupSettings, ModelEntry, Slice, Source, Sparsify
from m3jax.recipe.loading import load_recipe, load_seeds
from m3jax.recipe.matching import unmatched
from m3jax.recipe.schema import Recipe
from m3jax.recipe.settings import Filtered, Setting

__all__ = [
    "Filtered",
    "MixupSettings",
    "ModelEntry",
    "Recipe",
    "Setting",
    "Slice",
    "Source",
    "Sparsify",
    "load_recipe",
    "load_seeds",
    "unmatched",
]
