"""The commands that make merges, make them again, and compare them with what is recorded.

What a command needs is imported inside it, so that `--help` and `inspect` start without JAX.
"""

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from m3jax.cli import options, shell, terminal
from m3jax.cli.displays.merges import (
    estimate_lines,
    hint_lines,
    merge_json,
    merge_lines,
    push_json,
    push_lines,
    verification_json,
    verification_lines,
)
from m3jax.cli.displays.recipes import explanation_lines
from m3jax.cli.displays.seeds import seeds_estimate_lines, seeds_explanation_lines, seeds_json, seeds_lines
from m3jax.errors import M3Error

if TYPE_CHECKING:
    from m3jax.recipe import Recipe
    from m3jax.streaming.merging import MergeResult

_Start: TypeAlias = "tuple[Sequence[str], Callable[..., MergeResult]]"
"""Notes on what was read, and the function that does it."""


def merge(
    *,
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file.", show_default=False)],
    out: options.Out,
    changes: options.Changes,
    seeds: options.Seeds = None,
    max_shard_size: options.MaxShardSize = "5GB",
    overwrite: options.Overwrite = False,
    allow_nonfinite: Annotated[
        bool, typer.Option("--allow-nonfinite", help="Go on where weights are NaN or infinite.")
    ] = False,
    format: options.Format = None,
    step: options.Step = None,
    chunk_entries: Annotated[int | None, typer.Option(hidden=True)] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Say what the merge would read, write and take; read no weights.")
    ] = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="Say what would happen to each tensor, and why; read no weights.")
    ] = False,
    machines: options.Machines,
    speech: options.Speech,
) -> None:
    """Merge models as a recipe says.

    An interrupted merge keeps its finished files; the same command resumes it.
    """
    if explain and plan:
        raise M3Error("--explain and --plan say different things: give one of them")
    from m3jax.recipe import load_seeds

    if not (plan or explain):  # which ask nobody, and a plan may count processes that are not there
        machines.rendezvous()  # which refuses what is no place to meet before anything is read
    many: dict[int, Recipe] = {}
    mistake = None
    try:
        many = load_seeds(recipe, changes.all(), changes.seed, seeds)
    except M3Error as error:
        if plan or explain or not machines.distributed:
            raise
        mistake = error  # which process 0 alone says, once all have met
    if many:
        if step is not None:
            raise M3Error("--step: writes one step of a run, and each seed's merge a directory: leave one of them out")
        if explain or plan:
            _tell_of_seeds(many, out, explain, max_shard_size, machines, format, speech)
        else:
            how: dict[str, Any] = {"allow_nonfinite": allow_nonfinite, "chunk_entries": chunk_entries, "format": format}
            how |= {"overwrite": overwrite, "max_shard_size": max_shard_size}
            _merge_seeds(many, out, machines, speech, **how)
        return
    if explain:
        from m3jax.checkpoints.remote import as_path
        from m3jax.outputs.orbax import step_directory
        from m3jax.streaming.explaining import explain_recipe

        with step_directory(as_path(out), step) as place:
            explained = explain_recipe(recipe, place, changes.all(), changes.seed, format)
        width = terminal.width()
        shell.print_notes(explained.notes, speech.quiet)
        shell.print_result(explained.to_json, lambda: explanation_lines(explained, width), speech.as_json)
        return
    if plan:
        from m3jax.checkpoints.remote import as_path
        from m3jax.outputs.orbax import step_directory
        from m3jax.streaming.estimate import estimate_recipe

        processes = machines.num_processes or 1
        given = changes.all()
        with step_directory(as_path(out), step) as place:
            size, lanes = max_shard_size, machines.lanes
            estimate = estimate_recipe(recipe, place, given, changes.seed, size, processes, format, lanes)
        width = terminal.width()
        shell.print_result(estimate.to_json, lambda: estimate_lines(estimate, width), speech.as_json)
        return

    def prepare() -> _Start:
        from m3jax.recipe import load_recipe

        if mistake is not None:
            raise mistake
        loaded = load_recipe(recipe, changes.all(), changes.seed)

        def start(**how: Any) -> "MergeResult":
            from m3jax.streaming.merging import merge_checkpoint

            how |= {"format": format, "step": step}
            return merge_checkpoint(loaded, out, allow_nonfinite=allow_nonfinite, chunk_entries=chunk_entries, **how)

        return loaded.notes(), start

    where = {"overwrite": overwrite, "max_shard_size": max_shard_size}
    _merge(prepare, out, machines, speech, step, hint_lines, **where)


def replay(
    *,
    manifest: Annotated[
        str, typer.Argument(metavar="MANIFEST", help="An m3jax.json, or the directory it is in.", show_default=False)
    ],
    out: options.Out,
    inputs: options.Inputs = None,
    allow_other_files: Annotated[
        bool, typer.Option("--allow-other-files", help="Go on where config or tokenizer are others than then.")
    ] = False,
    max_shard_size: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Largest weight file.  [default: as recorded]", show_default=False),
    ] = None,
    overwrite: options.Overwrite = False,
    machines: options.Machines,
    speech: options.Speech,
) -> None:
    """Do a merge again from its manifest, bit for bit."""

    def prepare() -> _Start:
        sources = options.read_sources(inputs or ())

        def start(**how: Any) -> "MergeResult":
            from m3jax.streaming.merging import replay as replay_manifest

            return replay_manifest(manifest, out, sources=sources, allow_other_files=allow_other_files, **how)

        return (), start

    _merge(prepare, out, machines, speech, overwrite=overwrite, max_shard_size=max_shard_size)


def _tell_of_seeds(
    recipes: "dict[int, Recipe]",
    out: str,
    explain: bool,
    max_shard_size: str,
    machines: options.Machines,
    format: str | None,
    speech: options.Speech,
) -> None:
    """What merges of several seeds would do, or take."""
    from m3jax.streaming.seeds import estimate_seeds, explain_seeds

    width = terminal.width()
    if explain:
        explained = explain_seeds(recipes, out, format)
        shell.print_notes(explained.first.notes, speech.quiet)
        shell.print_result(explained.to_json, lambda: seeds_explanation_lines(explained, width), speech.as_json)
        return
    found = estimate_seeds(recipes, out, max_shard_size, machines.num_processes or 1, format, machines.lanes)
    shell.print_result(found.to_json, lambda: seeds_estimate_lines(found, width), speech.as_json)


def _merge_seeds(
    recipes: "dict[int, Recipe]", out: str, machines: options.Machines, speech: options.Speech, **how: Any
) -> None:
    """Makes a merge for each seed."""

    def work(speaks: bool) -> None:
        still = speech.quiet or not speaks
        notes = next(iter(recipes.values())).notes()
        shell.print_notes(notes, still)
        shell.silence_downloads(still)
        from m3jax.cluster.meshes import local_mesh
        from m3jax.streaming.seeds import merge_seeds

        def tell(line: str) -> None:
            shell.print_notes([line], still)

        kept = "finished merges and files are kept, and the same command resumes"
        with shell.resumable(out, kept), terminal.progress_reporter(still) as progress:
            where: dict[str, Any] = {
                "mesh": local_mesh(machines.mesh),
                "lanes": machines.lanes,
                "distributed": machines.distributed,
            }
            made = merge_seeds(recipes, out, progress=progress, tell=tell, **where, **how)
        said = dict.fromkeys(note for one in made if one.result is not None for note in one.result.notes)
        shell.print_notes((note for note in said if note not in notes), still)
        shell.print_result(
            lambda: seeds_json(made), lambda: seeds_lines(made, terminal.width()), speech.as_json and speaks, still
        )

    shell.perform(work, machines.rendezvous(), speech.debug)


def _merge(
    prepare: Callable[[], _Start],
    out: str,
    machines: options.Machines,
    speech: options.Speech,
    step: int | None = None,
    hints: "Callable[[MergeResult], Iterable[str]]" = lambda result: (),
    **where: Any,
) -> None:
    """What merging and replaying share.

    Args:
        prepare: Reads what is asked for, before JAX starts, so that a mistake in it shows at once.
        out: Where the merge goes.
        machines: What it runs on.
        speech: What is said of it.
        step: Which step of `out` it is to be, if any.
        hints: What is said last, on standard error, to people.
        **where: What both functions take for the output.
    """

    def work(speaks: bool) -> None:
        still = speech.quiet or not speaks
        with shell.resumable(out, step=step):
            notes, start = prepare()
            shell.print_notes(notes, still)
            shell.silence_downloads(still)
            from m3jax.cluster.meshes import local_mesh

            with terminal.progress_reporter(still) as progress:
                mesh = local_mesh(machines.mesh)
                how: dict[str, Any] = {"mesh": mesh, "lanes": machines.lanes, "distributed": machines.distributed}
                result = start(**how, progress=progress, **where)
        shell.print_notes((note for note in result.notes if note not in notes), still)
        as_json = speech.as_json and speaks
        shell.print_result(lambda: merge_json(result), lambda: merge_lines(result), as_json, still)
        for line in () if still or as_json else hints(result):
            shell.say(line, sys.stderr)

    shell.perform(work, machines.rendezvous(), speech.debug)


def verify(
    *,
    directory: Annotated[
        str, typer.Argument(metavar="DIR", help="What merge, replay or convert made.", show_default=False)
    ],
    all_inputs: Annotated[bool, typer.Option("--inputs", help="Compare the models that were read, too.")] = False,
    replay: Annotated[
        bool, typer.Option("--replay", help="In place of all bytes, compute a sample again from the inputs.")
    ] = False,
    sample: Annotated[
        int | None,
        typer.Option(
            "--sample", metavar="N", min=1, help="Tensors to compute again.  [default: 32]", show_default=False
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", metavar="S", help="Which of them.  [default: 0]", show_default=False)
    ] = None,
    inputs: options.Inputs = None,
    speech: options.Speech,
) -> None:
    """Check a model directory against its manifest.

    The exit code is 2 if they differ, or if something could not be compared.
    """
    sources = options.read_sources(inputs or ())
    if not replay and (sample is not None or seed is not None):
        raise M3Error("--sample and --seed are for --replay: add it")
    if sources and not (replay or all_inputs):
        raise M3Error("--input is for --inputs and --replay, which read the models: add one of them")
    from m3jax.outputs.verification import verify as verify_directory

    with terminal.progress_reporter(speech.quiet) as progress:
        if replay:
            from m3jax.streaming.sampling import DEFAULT_SAMPLE, verify_sample

            size = DEFAULT_SAMPLE if sample is None else sample
            found = verify_sample(
                directory, inputs=all_inputs, sources=sources, sample=size, seed=seed or 0, progress=progress
            )
        else:
            found = verify_directory(directory, inputs=all_inputs, sources=sources, progress=progress)
    still = speech.quiet and not found.differences
    shell.print_result(lambda: verification_json(found), lambda: verification_lines(found), speech.as_json, still)
    if found.differences:
        raise typer.Exit(shell.BAD_INPUT)


def push(
    *,
    directory: Annotated[
        str, typer.Argument(metavar="DIR", help="What merge, replay or convert made.", show_default=False)
    ],
    repository: Annotated[str, typer.Argument(metavar="ORG/NAME", help="Where to on the hub.", show_default=False)],
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Verify, list what would be sent, and send nothing.")
    ] = False,
    speech: options.Speech,
) -> None:
    """Send a model that m3jax made to the hub, if it is as its manifest tells.

    What the manifest lists is sent, in one commit; nothing else that is in the directory.
    """
    shell.silence_downloads(speech.quiet)
    from m3jax.outputs.publishing import push as send

    with terminal.progress_reporter(speech.quiet) as progress:
        result = send(directory, repository, private=private, dry_run=dry_run, progress=progress)
    shell.print_notes(result.notes, speech.quiet)
    shell.print_result(lambda: push_json(result), lambda: push_lines(result), speech.as_json, speech.quiet)
