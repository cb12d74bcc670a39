"""Merges that a recipe starts from: its other documents, in the order in which they can be made."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from m3jax.errors import M3Error
from m3jax.recipe.settings import RecipeError

if TYPE_CHECKING:
    from m3jax.recipe.schema import Recipe


def in_order(recipes: "Sequence[Recipe]", output: "Recipe") -> "tuple[Recipe, ...]":
    """Recipes in an order in which each comes after those that it names as models.

    Args:
      recipes: each with a name.
      output: the one that they are for.

    Raises:
      RecipeError: a name is missing or there twice, or recipes need each other in a circle.
    """
    named: dict[str, Recipe] = {}
    for number, recipe in enumerate(recipes):
        if recipe.name is None:
            raise RecipeError("has no name by which others could take it; add it", number, "name")
        if recipe.intermediates:
            raise RecipeError("has intermediates of its own; list all in the one recipe", number, "intermediates")
        if recipe.seeds is not None:
            raise RecipeError("are for the output, and this is made on the way to it; write seed", number, "seeds")
        if recipe.format not in (None, "safetensors"):
            raise RecipeError("is for the output, and this is made on the way to it; remove it", number, "format")
        if recipe.name in named or recipe.name == output.name:
            raise RecipeError(f"{recipe.name!r} is the name of two documents; rename one", number, "name")
        named[recipe.name] = recipe
    every = {**named, output.name or "": output}
    ordered: list[Recipe] = []
    open_: list[str] = []

    def visit(name: str) -> None:
        if name in open_:
            circle = " -> ".join([*open_[open_.index(name) :], name])
            raise RecipeError(f"the documents need each other in a circle ({circle}); break it")
        if every[name] in ordered:
            return
        open_.append(name)
        for needed in names_in(every[name], every):
            visit(needed)
        open_.pop()
        ordered.append(every[name])

    for name in every:
        visit(name)
    return tuple(recipe for recipe in ordered if recipe is not output)


def names_in(recipe: "Recipe", named: "dict[str, Recipe]") -> list[str]:
    """The documents that a recipe names as models.

    Raises:
      RecipeError: it wants another revision of one, or an adapter on it.
    """
    for model in recipe.named_models:
        name = model.partition("+")[0].partition("@")[0]
        if name and name in named and model not in named:
            raise RecipeError(
                f"{model}: {name} is a document here, of which there is nothing but itself; name it alone"
            )
    return [model for model in recipe.named_models if model in named]


def needed_for(output: "Recipe") -> "tuple[Recipe, ...]":
    """Those of a recipe's intermediates that it needs, itself or for another, in order."""
    named = {recipe.name or "": recipe for recipe in output.intermediates}
    wanted, waiting = set(), [output]
    while waiting:
        for name in names_in(waiting.pop(), named):
            if name not in wanted:
                wanted.add(name)
                waiting.append(named[name])
    return tuple(recipe for recipe in output.intermediates if recipe.name in wanted)


def read_intermediates(raw: object, read: "type[Recipe]") -> "tuple[Recipe, ...]":
    """Reads the other documents of a recipe.

    Raises:
      RecipeError: they are no list, or one of them is no recipe.
    """
    if not isinstance(raw, list | tuple):
        raise RecipeError("not a list of recipes; write '- name: ...' for each")
    found = []
    for number, each in enumerate(raw):
        try:
            found.append(read.model_validate(each))
        except M3Error as error:
            name = each.get("name") if isinstance(each, dict) else None
            said = number if name is None else str(name)
            raise RecipeError(str(error), said) from None
    return tuple(found)
