"""The commands. Each one reads its arguments, calls a function and shows what it returns.

What a command needs is imported inside it, so that `--help` and `inspect` start without JAX.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from m3jax import console, options, shell
from m3jax.errors import M3Error
from m3jax.supervision import Rendezvous

if TYPE_CHECKING:
    from m3jax.streaming import MergeResult

app = typer.Typer(
    name="m3jax",
    help="Merge language models exactly: the same recipe and seed give the same bytes, anywhere.",
    no_args_is_help=True,
    add_completion=False,
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


@app.command()
def merge(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file.", show_default=False)],
    out: options.Out,
    seed: options.Seed = None,
    overrides: options.Overrides = None,
    max_shard_size: options.MaxShardSize = "5GB",
    overwrite: options.Overwrite = False,
    allow_nonfinite: Annotated[
        bool, typer.Option("--allow-nonfinite", help="Go on where weights are NaN or infinite.")
    ] = False,
    chunk_entries: Annotated[int | None, typer.Option(hidden=True)] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Say what the merge would read, write and take; read no weights.")
    ] = False,
    mesh: options.MergeMesh = None,
    distributed: options.Distributed = False,
    coordinator: options.Coordinator = None,
    num_processes: options.NumProcesses = None,
    process_id: options.ProcessId = None,
    heartbeat_timeout: options.Heartbeat = options.HEARTBEAT_SECONDS,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Merge models as a recipe says.

    An interrupted merge keeps its finished files; the same command resumes it.
    """
    if plan:
        from m3jax.estimating import estimate_lines, estimate_recipe

        estimate = estimate_recipe(recipe, out, overrides or (), seed, overwrite, max_shard_size, num_processes or 1)
        shell.print_result(estimate.to_json, lambda: estimate_lines(estimate, console.terminal_width()), as_json)
        return
    where = Rendezvous.of(distributed, coordinator, num_processes, process_id, heartbeat_timeout)

    def work(speaks: bool) -> None:
        still = quiet or not speaks
        with shell.resumable(out):
            from m3jax.recipe import load_recipe

            loaded = load_recipe(recipe, overrides or (), seed)
            shell.print_notes(loaded.notes(), still)
            shell.silence_downloads(still)
            from m3jax.meshes import local_mesh  # after the recipe: a mistake in it shows before JAX starts
            from m3jax.streaming import merge_checkpoint

            with console.progress_reporter(still) as progress:
                result = merge_checkpoint(
                    loaded,
                    out,
                    overwrite=overwrite,
                    max_shard_size=max_shard_size,
                    allow_nonfinite=allow_nonfinite,
                    chunk_entries=chunk_entries,
                    mesh=local_mesh(mesh),
                    distributed=distributed,
                    progress=progress,
                )
        shell.print_notes((note for note in result.notes if note not in loaded.notes()), still)
        _print_merge(result, as_json and speaks, still)

    shell.perform(work, where, debug)


@app.command()
def replay(
    manifest: Annotated[
        str, typer.Argument(metavar="MANIFEST", help="An m3jax.json, or the directory it is in.", show_default=False)
    ],
    out: options.Out,
    inputs: options.Inputs = None,
    max_shard_size: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Largest weight file.  [default: as recorded]", show_default=False),
    ] = None,
    overwrite: options.Overwrite = False,
    mesh: options.MergeMesh = None,
    distributed: options.Distributed = False,
    coordinator: options.Coordinator = None,
    num_processes: options.NumProcesses = None,
    process_id: options.ProcessId = None,
    heartbeat_timeout: options.Heartbeat = options.HEARTBEAT_SECONDS,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Do a merge again from its manifest, bit for bit."""
    where = Rendezvous.of(distributed, coordinator, num_processes, process_id, heartbeat_timeout)

    def work(speaks: bool) -> None:
        still = quiet or not speaks
        with shell.resumable(out):
            sources = options.read_sources(inputs or ())
            shell.silence_downloads(still)
            from m3jax.meshes import local_mesh
            from m3jax.streaming import replay as replay_manifest

            with console.progress_reporter(still) as progress:
                result = replay_manifest(
                    manifest,
                    out,
                    sources=sources,
                    overwrite=overwrite,
                    max_shard_size=max_shard_size,
                    mesh=local_mesh(mesh),
                    distributed=distributed,
                    progress=progress,
                )
        shell.print_notes(result.notes, still)
        _print_merge(result, as_json and speaks, still)

    shell.perform(work, where, debug)


@app.command()
def verify(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="A directory that m3jax made.", show_default=False)],
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Check a model directory against its manifest.

    The exit code is 2 if they differ.
    """
    from m3jax.manifest import verify as verify_directory

    with console.progress_reporter(quiet) as progress:
        found = verify_directory(directory, progress=progress)
    if as_json:
        shell.print_json(console.verification_json(found))
    elif found.differences or not quiet:
        shell.print_lines(console.verification_lines(found))
    if found.differences:
        raise typer.Exit(shell.BAD_INPUT)


@app.command()
def inspect(
    path: Annotated[
        str, typer.Argument(metavar="PATH", help="A model directory, weight file or hub id.", show_default=False)
    ],
    other: Annotated[
        str | None, typer.Argument(metavar="OTHER", help="A second one to compare it with.", show_default=False)
    ] = None,
    pattern: Annotated[
        str | None, typer.Option("--filter", metavar="REGEX", help="Only tensors in whose names this is found.")
    ] = None,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Show what a checkpoint holds, or how two of them differ."""
    from m3jax import inspection

    if other is None:
        overview = inspection.look_at(path, pattern)
        shell.print_result(
            overview.to_json, lambda: console.overview_lines(overview, console.terminal_width()), as_json
        )
        return
    with console.progress_reporter() as progress:
        comparison = inspection.compare(path, other, pattern, progress)
    shell.print_result(
        comparison.to_json, lambda: console.comparison_lines(comparison, console.terminal_width()), as_json
    )


@app.command()
def convert(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="A model directory, weight file or hub id.", show_default=False)
    ],
    out: Annotated[str, typer.Argument(metavar="DST", help="The directory to make.", show_default=False)],
    to: Annotated[
        str, typer.Option("--to", metavar="safetensors|orbax|msgpack", help="The format to write.")
    ] = "safetensors",
    max_shard_size: options.MaxShardSize = "5GB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace DST if it exists.")] = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Write a checkpoint in another format, bit for bit."""
    shell.silence_downloads(quiet)
    from m3jax import conversion

    with console.progress_reporter(quiet) as progress:
        result = conversion.convert(
            source, out, conversion.as_format(to), max_shard_size=max_shard_size, overwrite=overwrite, progress=progress
        )
    if as_json or not quiet:
        shell.print_result(lambda: console.convert_json(result), lambda: console.convert_lines(result), as_json)


@app.command()
def evaluate(
    model: options.Model,
    task: Annotated[
        str | None, typer.Option("--task", metavar="NAME", help="gsm8k, math, humaneval, mbpp, sst2, ….")
    ] = None,
    data: options.Data = None,
    harness: Annotated[
        str | None, typer.Option("--harness", metavar="TASKS", help="Tasks of lm-evaluation-harness, by comma.")
    ] = None,
    include_path: Annotated[
        str | None, typer.Option(metavar="DIR", help="Further task files for the harness.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Where records and the summary go.", show_default=False)
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    limit: Annotated[int | None, typer.Option(metavar="N", help="Do the first N examples only.")] = None,
    batch_size: options.BatchSize = 8,
    max_tokens: options.MaxTokens = None,
    template: options.Template = None,
    grader: options.Grader = "m3jax",
    overflow: options.Overflow = "error",
    dtype: options.Dtype = None,
    mesh: options.DecoderMesh = None,
    run_code: options.RunCode = False,
    allow_unsandboxed: options.AllowUnsandboxed = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Score a model on a task."""
    from m3jax.evaluation import command
    from m3jax.evaluation.options import Evaluation
    from m3jax.evaluation.telling import outcome_lines

    wanted = command.Wanted(
        task=task,
        data=data,
        harness=harness,
        include_path=include_path,
        out=out,
        resume=resume,
        how=Evaluation(limit, batch_size, max_tokens, template, overflow, run_code, allow_unsandboxed, grader),
        dtype=dtype,
        mesh=mesh,
    )
    command.check(wanted)
    shell.silence_downloads(quiet)
    outcome = command.run(model, wanted, None if quiet else shell.print_progress)
    if as_json or not quiet:
        shell.print_result(lambda: outcome, lambda: outcome_lines(outcome), as_json)


@app.command()
def attack(
    model: options.Model,
    task: Annotated[str, typer.Option("--task", metavar="NAME", help="sst2, cola, gsm8k, ….", show_default=False)],
    data: options.Data = None,
    attacks: options.Attacks = None,
    shifts: options.Shifts = None,
    profile: options.Profile = "promptbench",
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Of every random choice.")] = 0,
    limit: Annotated[int | None, typer.Option(metavar="N", help="Use the first N examples only.")] = None,
    search_examples: options.SearchExamples = None,
    budget: options.Budget = None,
    prompt: options.Prompt = None,
    protect: options.Protect = None,
    masked_lm: options.MaskedLm = None,
    embeddings: options.Embeddings = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Where attack.json goes.", show_default=False)
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an attack.json that is there.")] = False,
    batch_size: options.BatchSize = 64,
    max_tokens: options.MaxTokens = None,
    template: options.Template = None,
    overflow: options.AttackOverflow = "error",
    dtype: options.Dtype = None,
    mesh: options.DecoderMesh = None,
    run_code: options.RunCode = False,
    allow_unsandboxed: options.AllowUnsandboxed = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Attack the prompt of a model, and shift its inputs."""
    shell.silence_downloads(quiet)
    from m3jax.evaluation import robustness
    from m3jax.evaluation.options import Evaluation

    wanted = robustness.Wanted(
        task=task,
        data=data,
        attacks=robustness.DEFAULT_ATTACKS if attacks is None else options.names(attacks),
        shifts=options.names(shifts),
        profile=profile,
        seed=seed,
        search_examples=search_examples,
        budget=budget,
        prompt=prompt,
        protect=options.names(protect),
        masked_lm=masked_lm,
        embeddings=embeddings,
        out=out,
        overwrite=overwrite,
        how=Evaluation(limit, batch_size, max_tokens, template, overflow, run_code, allow_unsandboxed),
        dtype=dtype,
        mesh=mesh,
    )
    outcome = robustness.run(model, wanted, None if quiet else shell.print_progress)
    if as_json or not quiet:
        shell.print_result(lambda: outcome, lambda: robustness.outcome_lines(outcome), as_json)


@app.command()
def report(
    directories: Annotated[
        list[Path],
        typer.Argument(metavar="DIR…", help="Output directories of evaluate and attack.", show_default=False),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Where report.md, .json and .png go.", show_default=False),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a report that is there.")] = False,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Put evaluations and attacks of several models in one table and one picture."""
    from m3jax import report as reporting

    found = reporting.collect(directories)
    if out is not None:
        reporting.write(found, out, overwrite)
    shell.print_result(found.to_json, lambda: reporting.table_lines(found), as_json)


@app.command()
def explore(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file with mixup.", show_default=False)],
    out: options.Out,
    tasks: options.Tasks,
    samples: options.Samples = 32,
    select: options.Select = "mean",
    strategy: options.Strategy = "draw",
    optimize: options.Optimize = None,
    granularity: options.Granularity = None,
    steps: options.Steps = 100,
    learning_rate: options.LearningRate = 0.05,
    journal: options.Journal = None,
    seed: options.Seed = None,
    overrides: options.Overrides = None,
    limit: Annotated[int | None, typer.Option(metavar="N", help="Use the first N examples of each task only.")] = None,
    batch_size: options.BatchSize = 8,
    max_tokens: options.MaxTokens = None,
    template: options.Template = None,
    overflow: options.Overflow = "error",
    mesh: options.DecoderMesh = None,
    run_code: options.RunCode = False,
    allow_unsandboxed: options.AllowUnsandboxed = False,
    max_shard_size: options.MaxShardSize = "5GB",
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Try many merging ratios and write the best merge.

    The experts stay in memory. An interrupted exploration keeps its samples; the same command goes on.
    """
    from m3jax.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or (), seed)
    wanted = options.read_tasks(tasks)
    if granularity is not None and optimize is None:
        raise M3Error("--granularity is for --optimize: add it, or write mixup.granularity into the recipe")
    shell.print_notes(loaded.notes(), quiet)
    shell.silence_downloads(quiet)
    from m3jax import exploration
    from m3jax.evaluation.models import make_mesh
    from m3jax.exploration import telling

    how = exploration.Evaluation(limit, batch_size, max_tokens, template, overflow, run_code, allow_unsandboxed)
    learned = exploration.Optimization(optimize, steps, learning_rate, granularity, batch_size) if optimize else None
    kept = "finished samples are kept, and the same command goes on"
    with shell.resumable(out, kept), telling.reporter(samples, quiet) as (watch, tell):
        found = exploration.explore(
            loaded,
            out,
            tasks=wanted,
            samples=samples,
            select=select,
            strategy=strategy,
            evaluation=how,
            optimize=learned,
            mesh=make_mesh(mesh) if mesh else None,
            journal=journal,
            overwrite=overwrite,
            max_shard_size=max_shard_size,
            watch=watch,
            tell=tell,
        )
    if as_json or not quiet:
        width = console.terminal_width()
        shell.print_result(
            lambda: telling.exploration_json(found), lambda: telling.exploration_lines(found, width), as_json
        )


@app.command()
def demo(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where to work.")] = Path("m3jax-demo"),
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Train two small experts, merge their skills and show what came of it."""
    from m3jax.demo import main as run_demo

    def echo(line: str) -> None:
        if not quiet:
            print(line, file=sys.stderr if as_json else sys.stdout, flush=True)

    outcome = run_demo(directory, echo)
    if as_json:
        shell.print_json(outcome)


def _print_merge(result: "MergeResult", as_json: bool, quiet: bool) -> None:
    if as_json or not quiet:
        shell.print_result(lambda: console.merge_json(result), lambda: console.merge_lines(result), as_json)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; see `m3jax.shell.main`.

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
