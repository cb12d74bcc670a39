"""The commands under `m3jax recipe`, for those who write recipes.

What a command needs is imported inside it, so that `--help` and `inspect` start without JAX.
"""

from typing import Annotated

import typer

from m3jax.cli import options, shell
from m3jax.cli.displays.recipes import check_json, check_lines


def check(
    *,
    recipe: Annotated[str, typer.Argument(metavar="FILE", help="A YAML file.", show_default=False)],
    changes: options.Changes,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Read a recipe and say what is wrong with it; no model is looked for.

    The exit code is 2 if it cannot be read. `m3jax merge FILE OUT --explain` holds it against its models too.
    """
    from m3jax.recipe import load_recipe

    loaded = load_recipe(recipe, changes.all(), changes.seed)
    shell.print_notes(loaded.notes(), as_json)
    shell.print_result(lambda: check_json(loaded), lambda: check_lines(loaded), as_json)


def schema(*, debug: options.Debug = False) -> None:
    """Print the JSON schema of recipes, for editors that complete and check YAML."""
    from m3jax.recipe.editors import recipe_schema

    shell.print_json(recipe_schema())


def new(
    *,
    method: Annotated[str, typer.Argument(metavar="METHOD", help="As `m3jax methods` lists them.", show_default=False)],
    debug: options.Debug = False,
) -> None:
    """Print a recipe of a method to start from, with a comment to each line."""
    from m3jax.recipe.starting import new_recipe

    shell.print_result(dict, lambda: new_recipe(method).splitlines(), False)
