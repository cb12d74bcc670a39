"""Groups of options: a command is written with groups, and read by Typer with their options."""

import inspect

import typer

from m3jax.cli import options, shell


def test_options_of_a_group_stand_in_its_place() -> None:
    def command(*, out: options.Out, changes: options.Changes, limit: int = 3, speech: options.Speech) -> None:
        """Does something."""

    flat = options.grouped(command)
    changes = ["seed", "overrides", "only"]
    assert [*inspect.signature(flat).parameters] == ["out", *changes, "limit", "as_json", "quiet", "debug"]
    assert inspect.signature(flat).parameters["quiet"].default is False
    assert (flat.__name__, flat.__doc__) == ("command", "Does something.")


def test_a_command_is_given_its_groups() -> None:
    app, given = typer.Typer(), []

    def command(*, out: options.Out, changes: options.Changes, speech: options.Speech) -> None:
        given.append((out, changes, speech))

    app.command()(options.grouped(command))
    assert shell.main(app, ["place", "--seed", "4", "--set", "a=1", "--set", "b=2", "-q"]) == 0
    assert shell.main(app, ["place"]) == 0
    assert given == [
        ("place", options.Changes(4, ["a=1", "b=2"]), options.Speech(quiet=True)),
        ("place", options.Changes(), options.Speech()),
    ]
    assert options.Changes(None, ["a=1"], ["params"]).all() == ["a=1", "only=[params]"]
