"""The command line: which commands there are, and in which order help lists them.

Each command reads its arguments, calls a function and shows what it returns.
"""

from collections.abc import Callable, Sequence
from typing import Annotated, NoReturn

import typer

from m3jax.cli import checkpoints, evaluations, merges, options, recipes, shell

app = typer.Typer(
    name="m3jax",
    help="Merge language models exactly: the same recipe and seed give the same bytes, anywhere.",
    no_args_is_help=True,
    # Help as plain text: rich would take longer to import than the rest together.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        from m3jax import __version__

        print(f"m3jax {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_version)
    ] = False,
    debug: options.Debug = False,
) -> None:
    # `main` looks for --debug itself: an error may come before there are options.
    pass


_recipes = typer.Typer(help="Check recipes, start new ones, and teach editors what they hold.", no_args_is_help=True)
app.add_typer(_recipes, name="recipe", rich_help_panel=None)

_COMMANDS: tuple[Callable[..., None], ...] = (
    *(merges.merge, merges.replay, merges.verify, merges.push),
    *(checkpoints.inspect, checkpoints.diff, checkpoints.doctor, checkpoints.methods),
    *(checkpoints.convert, checkpoints.extract_lora),
    *(evaluations.evaluate, evaluations.attack, evaluations.report, evaluations.explore, evaluations.statistics),
    evaluations.demo,
)
for _work in _COMMANDS:
    app.command()(options.grouped(_work))

_RECIPE_COMMANDS: dict[str, Callable[..., None]] = {
    "check": recipes.check,
    "schema": recipes.schema,
    "new": recipes.new,
}
for _name, _work in _RECIPE_COMMANDS.items():
    _recipes.command(_name)(options.grouped(_work))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; see `m3jax.cli.shell.main`.

    Args:
        arguments: What follows `m3jax`; `None` takes it from the shell.

    Returns:
        The exit code.
    """
    return shell.main(app, arguments)


def run() -> NoReturn:
    """The command as the shell calls it."""
    shell.run(app)


if __name__ == "__main__":
    run()
