"""The commands. Each one reads its arguments, calls a function and shows what it returns.

What a command needs is imported inside it, so that `--help` and `inspect` start without JAX.
"""

import errno
import json
import os
import re
import socket
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, NoReturn, TextIO

import typer

from m3jax import console
from m3jax.errors import M3Error

if TYPE_CHECKING:
    import jax

    from m3jax.streaming import MergeResult

_BAD_INPUT, _FAILURE, _INTERRUPTED, _PIPE_CLOSED = 2, 1, 130, 141
_CANNOT_PRINT = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
_HEARTBEAT_SECONDS = 30  # of silence after which a process counts as dead

app = typer.Typer(
    name="m3jax",
    help="Merge language models exactly: the same recipe and seed give the same bytes, anywhere.",
    no_args_is_help=True,
    add_completion=False,
    # Help as plain text: rich would take longer to import than the rest together.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors (and --json's result).")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error. Also: M3JAX_DEBUG=1.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")]
MeshAxes = Annotated[
    str | None,
    typer.Option(
        "--mesh", metavar="AXES", help="Devices to use, as in fsdp=4,tp=2.  [default: all here]", show_default=False
    ),
]
Distributed = Annotated[
    bool, typer.Option("--distributed", help="Share the work with other processes that run the same command.")
]
Coordinator = Annotated[
    str | None,
    typer.Option(metavar="HOST:PORT", help="Where process 0 listens.  [default: the cluster's]", show_default=False),
]
NumProcesses = Annotated[
    int | None, typer.Option(metavar="N", min=1, help="[default: the cluster's]", show_default=False)
]
ProcessId = Annotated[
    int | None, typer.Option(metavar="I", min=0, help="From 0 on.  [default: the cluster's]", show_default=False)
]
Heartbeat = Annotated[int, typer.Option("--heartbeat-timeout", hidden=True, min=1)]
Out = Annotated[
    str,
    typer.Argument(metavar="OUT", help="The directory to make, or an s3:// or gs:// URL.", show_default=False),
]


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
    debug: Debug = False,
) -> None:
    # `main` looks for --debug itself: an error may come before there are options.
    pass


@app.command()
def merge(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file.", show_default=False)],
    out: Out,
    seed: Annotated[int | None, typer.Option("--seed", metavar="N", help="Use this seed, not the recipe's.")] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change the recipe, as in mixup.alpha=0.5; may be repeated."),
    ] = None,
    max_shard_size: Annotated[str, typer.Option(metavar="SIZE", help="Largest weight file.")] = "5GB",
    overwrite: Overwrite = False,
    allow_nonfinite: Annotated[
        bool, typer.Option("--allow-nonfinite", help="Go on where weights are NaN or infinite.")
    ] = False,
    chunk_entries: Annotated[int | None, typer.Option(hidden=True)] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Say what the merge would read, write and take; read no weights.")
    ] = False,
    mesh: MeshAxes = None,
    distributed: Distributed = False,
    coordinator: Coordinator = None,
    num_processes: NumProcesses = None,
    process_id: ProcessId = None,
    heartbeat_timeout: Heartbeat = _HEARTBEAT_SECONDS,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Merge models as a recipe says.

    An interrupted merge keeps its finished files; the same command resumes it.
    """
    if plan:
        from m3jax.estimating import estimate_lines, estimate_recipe

        estimate = estimate_recipe(recipe, out, overrides or (), seed, overwrite, max_shard_size, num_processes or 1)
        _print_result(estimate.to_json, lambda: estimate_lines(estimate, console.terminal_width()), as_json)
        return
    cluster = _Cluster.of(distributed, coordinator, num_processes, process_id, heartbeat_timeout)

    def work(speaks: bool) -> None:
        still = quiet or not speaks
        with _resumable(out):
            from m3jax.recipe import load_recipe

            loaded = load_recipe(recipe, overrides or (), seed)
            _print_notes(loaded.notes(), still)
            _silence_downloads(still)
            from m3jax.streaming import merge_checkpoint  # after the recipe: a mistake in it shows before JAX starts

            with console.progress_reporter(still) as progress:
                result = merge_checkpoint(
                    loaded,
                    out,
                    overwrite=overwrite,
                    max_shard_size=max_shard_size,
                    allow_nonfinite=allow_nonfinite,
                    chunk_entries=chunk_entries,
                    mesh=_local_mesh(mesh),
                    distributed=distributed,
                    progress=progress,
                )
        _print_notes((note for note in result.notes if note not in loaded.notes()), still)
        _print_merge(result, as_json and speaks, still)

    _work(work, cluster, debug)


@app.command()
def replay(
    manifest: Annotated[
        str, typer.Argument(metavar="MANIFEST", help="An m3jax.json, or the directory it is in.", show_default=False)
    ],
    out: Out,
    inputs: Annotated[
        list[str] | None,
        typer.Option("--input", metavar="RECORDED=HERE", help="Where a recorded input is now; may be repeated."),
    ] = None,
    max_shard_size: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Largest weight file.  [default: as recorded]", show_default=False),
    ] = None,
    overwrite: Overwrite = False,
    mesh: MeshAxes = None,
    distributed: Distributed = False,
    coordinator: Coordinator = None,
    num_processes: NumProcesses = None,
    process_id: ProcessId = None,
    heartbeat_timeout: Heartbeat = _HEARTBEAT_SECONDS,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Do a merge again from its manifest, bit for bit."""
    cluster = _Cluster.of(distributed, coordinator, num_processes, process_id, heartbeat_timeout)

    def work(speaks: bool) -> None:
        still = quiet or not speaks
        with _resumable(out):
            sources = dict(map(_read_source, inputs or ()))
            _silence_downloads(still)
            from m3jax.streaming import replay as replay_manifest

            with console.progress_reporter(still) as progress:
                result = replay_manifest(
                    manifest,
                    out,
                    sources=sources,
                    overwrite=overwrite,
                    max_shard_size=max_shard_size,
                    mesh=_local_mesh(mesh),
                    distributed=distributed,
                    progress=progress,
                )
        _print_notes(result.notes, still)
        _print_merge(result, as_json and speaks, still)

    _work(work, cluster, debug)


@app.command()
def verify(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="A directory that m3jax made.", show_default=False)],
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Check a model directory against its manifest.

    The exit code is 2 if they differ.
    """
    from m3jax.manifest import verify as verify_directory

    with console.progress_reporter(quiet) as progress:
        found = verify_directory(directory, progress=progress)
    if as_json:
        _print_json(console.verification_json(found))
    elif found.differences or not quiet:
        _print_lines(console.verification_lines(found))
    if found.differences:
        raise typer.Exit(_BAD_INPUT)


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
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what a checkpoint holds, or how two of them differ."""
    from m3jax import inspection

    if other is None:
        overview = inspection.look_at(path, pattern)
        _print_result(overview.to_json, lambda: console.overview_lines(overview, console.terminal_width()), as_json)
        return
    with console.progress_reporter() as progress:
        comparison = inspection.compare(path, other, pattern, progress)
    _print_result(comparison.to_json, lambda: console.comparison_lines(comparison, console.terminal_width()), as_json)


@app.command()
def convert(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="A model directory, weight file or hub id.", show_default=False)
    ],
    out: Annotated[str, typer.Argument(metavar="DST", help="The directory to make.", show_default=False)],
    to: Annotated[
        str, typer.Option("--to", metavar="safetensors|orbax|msgpack", help="The format to write.")
    ] = "safetensors",
    max_shard_size: Annotated[str, typer.Option(metavar="SIZE", help="Largest weight file.")] = "5GB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace DST if it exists.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write a checkpoint in another format, bit for bit."""
    _silence_downloads(quiet)
    from m3jax import conversion

    with console.progress_reporter(quiet) as progress:
        result = conversion.convert(
            source, out, conversion.as_format(to), max_shard_size=max_shard_size, overwrite=overwrite, progress=progress
        )
    if as_json or not quiet:
        _print_result(lambda: console.convert_json(result), lambda: console.convert_lines(result), as_json)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model directory or hub id.", show_default=False)],
    task: Annotated[
        str | None, typer.Option("--task", metavar="NAME", help="gsm8k, math, humaneval, mbpp, sst2, ….")
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", metavar="FILE", help="JSONL, TSV, Parquet …, or a hub data set.")
    ] = None,
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
    batch_size: Annotated[int, typer.Option(metavar="N", help="Prompts that run together.")] = 8,
    max_tokens: Annotated[int | None, typer.Option(metavar="N", help="Most tokens of an answer.")] = None,
    template: Annotated[
        str | None, typer.Option(metavar="NAME", help="Prompt template.  [default: the task's]")
    ] = None,
    overflow: Annotated[
        str, typer.Option(metavar="error|truncate|skip", help="What becomes of prompts that leave an answer no room.")
    ] = "error",
    dtype: Annotated[str | None, typer.Option(metavar="NAME", help="Of the weights.  [default: their own]")] = None,
    mesh: Annotated[
        str | None, typer.Option(metavar="AXES", help="As in fsdp=4,tp=2.  [default: one device]", show_default=False)
    ] = None,
    run_code: Annotated[bool, typer.Option("--run-code", help="Run programs that the model wrote, sandboxed.")] = False,
    allow_unsandboxed: Annotated[
        bool, typer.Option("--allow-unsandboxed", help="Run them with limits only where no sandbox is possible.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Score a model on a task."""
    from m3jax.evaluation import command
    from m3jax.evaluation.telling import outcome_lines

    wanted = command.Wanted(
        task=task,
        data=data,
        harness=harness,
        include_path=include_path,
        out=out,
        resume=resume,
        limit=limit,
        batch_size=batch_size,
        max_tokens=max_tokens,
        template=template,
        overflow=overflow,
        dtype=dtype,
        mesh=mesh,
        run_code=run_code,
        allow_unsandboxed=allow_unsandboxed,
    )
    command.check(wanted)
    _silence_downloads(quiet)
    outcome = command.run(model, wanted, None if quiet else _print_progress)
    if as_json or not quiet:
        _print_result(lambda: outcome, lambda: outcome_lines(outcome), as_json)


@app.command()
def attack(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model directory or hub id.", show_default=False)],
    task: Annotated[str, typer.Option("--task", metavar="NAME", help="sst2, cola, gsm8k, ….", show_default=False)],
    data: Annotated[
        str | None, typer.Option("--data", metavar="FILE", help="JSONL, TSV, Parquet …, or a hub data set.")
    ] = None,
    attacks: Annotated[
        str | None,
        typer.Option(
            "--attack",
            metavar="NAMES",
            help="By comma: deepwordbug, textbugger, bertattack, textfooler, stresstest, checklist; '' is none."
            "  [default: those that need no further files]",
            show_default=False,
        ),
    ] = None,
    shifts: Annotated[
        str | None,
        typer.Option(
            "--shift",
            metavar="NAMES",
            help="By comma: typos[=RATE], whitespace[=RATE], lowercase, uppercase, mixed-case, number-format,"
            " paraphrase.",
        ),
    ] = None,
    profile: Annotated[str, typer.Option(metavar="promptbench|m3-paper", help="How hard attacks try.")] = "promptbench",
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Of every random choice.")] = 0,
    limit: Annotated[int | None, typer.Option(metavar="N", help="Use the first N examples only.")] = None,
    search_examples: Annotated[
        int | None, typer.Option(metavar="N", help="Search on the first N examples, measure on the others.")
    ] = None,
    budget: Annotated[int | None, typer.Option(metavar="N", help="Most prompts that an attack may score.")] = None,
    prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Attack this, {content} in it, not the task's own prompt.")
    ] = None,
    protect: Annotated[
        str | None, typer.Option(metavar="WORDS", help="Never touch these, by comma, nor the labels.")
    ] = None,
    masked_lm: Annotated[str | None, typer.Option("--masked-lm", metavar="BERT", help="For bertattack.")] = None,
    embeddings: Annotated[
        str | None, typer.Option(metavar="FILE", help="Word vectors as text, for textfooler and textbugger.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Where attack.json goes.", show_default=False)
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an attack.json that is there.")] = False,
    batch_size: Annotated[int, typer.Option(metavar="N", help="Prompts that run together.")] = 64,
    max_tokens: Annotated[int | None, typer.Option(metavar="N", help="Most tokens of an answer.")] = None,
    template: Annotated[
        str | None, typer.Option(metavar="NAME", help="Prompt template.  [default: the task's]")
    ] = None,
    overflow: Annotated[
        str, typer.Option(metavar="error|truncate", help="What becomes of prompts that leave an answer no room.")
    ] = "error",
    dtype: Annotated[str | None, typer.Option(metavar="NAME", help="Of the weights.  [default: their own]")] = None,
    mesh: Annotated[
        str | None, typer.Option(metavar="AXES", help="As in fsdp=4,tp=2.  [default: one device]", show_default=False)
    ] = None,
    run_code: Annotated[bool, typer.Option("--run-code", help="Run programs that the model wrote, sandboxed.")] = False,
    allow_unsandboxed: Annotated[
        bool, typer.Option("--allow-unsandboxed", help="Run them with limits only where no sandbox is possible.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Attack the prompt of a model, and shift its inputs."""
    _silence_downloads(quiet)
    from m3jax.evaluation import robustness

    wanted = robustness.Wanted(
        task=task,
        data=data,
        attacks=robustness.DEFAULT_ATTACKS if attacks is None else robustness.names(attacks),
        shifts=robustness.names(shifts),
        profile=profile,
        seed=seed,
        limit=limit,
        search_examples=search_examples,
        budget=budget,
        prompt=prompt,
        protect=robustness.names(protect),
        masked_lm=masked_lm,
        embeddings=embeddings,
        out=out,
        overwrite=overwrite,
        batch_size=batch_size,
        max_tokens=max_tokens,
        template=template,
        overflow=overflow,
        dtype=dtype,
        mesh=mesh,
        run_code=run_code,
        allow_unsandboxed=allow_unsandboxed,
    )
    outcome = robustness.run(model, wanted, None if quiet else _print_progress)
    if as_json or not quiet:
        _print_result(lambda: outcome, lambda: robustness.outcome_lines(outcome), as_json)


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
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Put evaluations and attacks of several models in one table and one picture."""
    from m3jax import report as reporting

    found = reporting.collect(directories)
    if out is not None:
        reporting.write(found, out, overwrite)
    _print_result(found.to_json, lambda: reporting.table_lines(found), as_json)


@app.command()
def explore(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file with mixup.", show_default=False)],
    out: Out,
    tasks: Annotated[
        list[str],
        typer.Option("--task", metavar="NAME=FILE", help="A task, its dev data; may be repeated.", show_default=False),
    ],
    samples: Annotated[int, typer.Option(metavar="N", help="The budget, in evaluations on all dev data.")] = 32,
    select: Annotated[
        str, typer.Option(metavar="mean|TASK|pareto|NUMBER", help="What the best sample is; or the sample to take.")
    ] = "mean",
    strategy: Annotated[
        str, typer.Option(metavar="draw|sobol|grid|halving|cma", help="Which ratios are tried.")
    ] = "draw",
    optimize: Annotated[
        str | None,
        typer.Option(metavar="loss|entropy", help="Refine the best sample by gradients.", show_default=False),
    ] = None,
    granularity: Annotated[
        str | None,
        typer.Option(
            metavar="model|layer|tensor", help="Of refined weights.  [default: the recipe's]", show_default=False
        ),
    ] = None,
    steps: Annotated[int, typer.Option(metavar="N", help="Of refining.")] = 100,
    learning_rate: Annotated[float, typer.Option(metavar="X", help="Of refining.")] = 0.05,
    journal: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Where samples are kept.  [default: OUT.exploration]", show_default=False),
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", metavar="N", help="Use this seed, not the recipe's.")] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change the recipe, as in mixup.alpha=0.5; may be repeated."),
    ] = None,
    limit: Annotated[int | None, typer.Option(metavar="N", help="Use the first N examples of each task only.")] = None,
    batch_size: Annotated[int, typer.Option(metavar="N", help="Prompts that run together.")] = 8,
    max_tokens: Annotated[int | None, typer.Option(metavar="N", help="Most tokens of an answer.")] = None,
    template: Annotated[
        str | None, typer.Option(metavar="NAME", help="Prompt template.  [default: the task's]")
    ] = None,
    overflow: Annotated[
        str, typer.Option(metavar="error|truncate|skip", help="What becomes of prompts that leave an answer no room.")
    ] = "error",
    mesh: Annotated[
        str | None, typer.Option(metavar="AXES", help="As in fsdp=4,tp=2.  [default: one device]", show_default=False)
    ] = None,
    run_code: Annotated[bool, typer.Option("--run-code", help="Run programs that the model wrote, sandboxed.")] = False,
    allow_unsandboxed: Annotated[
        bool, typer.Option("--allow-unsandboxed", help="Run them with limits only where no sandbox is possible.")
    ] = False,
    max_shard_size: Annotated[str, typer.Option(metavar="SIZE", help="Largest weight file.")] = "5GB",
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Try many merging ratios and write the best merge.

    The experts stay in memory. An interrupted exploration keeps its samples; the same command goes on.
    """
    from m3jax.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or (), seed)
    wanted = dict(map(_read_task, tasks))
    if len(wanted) < len(tasks):
        raise M3Error("--task: names a task twice: give each task one file")
    if granularity is not None and optimize is None:
        raise M3Error("--granularity is for --optimize: add it, or write mixup.granularity into the recipe")
    _print_notes(loaded.notes(), quiet)
    _silence_downloads(quiet)
    from m3jax import exploration
    from m3jax.evaluation.models import make_mesh
    from m3jax.exploration import telling

    how = exploration.Evaluation(limit, batch_size, max_tokens, template, overflow, run_code, allow_unsandboxed)
    learned = exploration.Optimization(optimize, steps, learning_rate, granularity, batch_size) if optimize else None
    kept = "finished samples are kept, and the same command goes on"
    with _resumable(out, kept), telling.reporter(samples, quiet) as (watch, tell):
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
        _print_result(lambda: telling.exploration_json(found), lambda: telling.exploration_lines(found, width), as_json)


@app.command()
def demo(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where to work.")] = Path("m3jax-demo"),
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Make two tiny models, merge them and show what came of it."""
    from m3jax.demo import main as run_demo

    def echo(line: str) -> None:
        if not quiet:
            print(line, file=sys.stderr if as_json else sys.stdout, flush=True)

    outcome = run_demo(directory, echo)
    if as_json:
        _print_json(outcome)


# --- What the commands share -----------------------------------------------------------------------------


class _Cluster(NamedTuple):
    """How the processes of a distributed command find each other."""

    coordinator: str | None
    num_processes: int | None
    process_id: int | None
    heartbeat_timeout: int

    @classmethod
    def of(
        cls, distributed: bool, coordinator: str | None, num_processes: int | None, process_id: int | None, timeout: int
    ) -> "_Cluster | None":
        """What the options say, checked."""
        told = {"--coordinator": coordinator, "--num-processes": num_processes, "--process-id": process_id}
        given = [name for name, value in told.items() if value is not None]
        missing = [name for name, value in told.items() if value is None]
        if given and not distributed:
            raise M3Error(f"{given[0]}: is for --distributed: add it, or leave this out")
        if given and missing:
            raise M3Error(f"{' and '.join(missing)}: missing beside {given[0]}: give all three, or none in a cluster")
        if coordinator is not None:
            _check_address(coordinator)
        if process_id is not None and num_processes is not None and process_id >= num_processes:
            raise M3Error(f"--process-id {process_id}: {num_processes} processes are numbered 0 to {num_processes - 1}")
        return cls(coordinator, num_processes, process_id, timeout) if distributed else None


def _check_address(coordinator: str) -> None:
    host, _, port = coordinator.rpartition(":")
    if not host or not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) < 2**16:
        raise M3Error(f"--coordinator {coordinator!r}: write HOST:PORT, as in 10.0.0.1:8476")
    try:
        socket.getaddrinfo(host.strip("[]"), int(port))
    except OSError:
        raise M3Error(f"--coordinator {coordinator}: there is no host {host}: check the name") from None


def _work(work: Callable[[bool], None], cluster: _Cluster | None, debug: bool) -> None:
    """Do the work of a command here, or with other processes, of which process 0 speaks."""
    if cluster is None:
        work(True)
        return
    from m3jax.supervision import supervised

    def shared_work() -> int:
        import jax

        from m3jax.processes import join

        join(cluster.coordinator, cluster.num_processes, cluster.process_id, cluster.heartbeat_timeout)
        speaks = jax.process_index() == 0
        return _reported(lambda: work(speaks), debug, silent=not speaks)

    def leave() -> None:
        from m3jax.processes import leave

        leave()

    status = supervised(lambda: _reported(shared_work, debug), leave, cluster.coordinator, cluster.process_id)
    if status:
        raise typer.Exit(status)


def _local_mesh(axes: str | None) -> "jax.sharding.Mesh | None":
    if axes is None:
        return None
    import jax

    from m3jax.meshes import parse_mesh

    return parse_mesh(axes, jax.local_devices())


def _read_source(text: str) -> tuple[str, str]:
    recorded, equals, here = text.partition("=")
    if not (recorded and equals and here):
        raise M3Error(
            f"--input {text!r} is no pair: write RECORDED=HERE, the name in the manifest and a path or hub id."
        )
    return recorded, here


def _read_task(text: str) -> tuple[str, str | None]:
    name, equals, data = text.partition("=")
    if not name or (equals and not data):
        raise M3Error(f"--task {text!r} is no task: write NAME=FILE, or NAME alone for its own data on the hub")
    return name, data or None


def _silence_downloads(quiet: bool) -> None:
    """Keeps the hub client's own progress bars away; it reads this when it is imported."""
    if quiet:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"


@contextmanager
def _resumable(out: str, known: str | None = None) -> Iterator[None]:
    """Says, when a merge is interrupted, what of its work is kept: what is known, or what there is."""
    try:
        yield
    except KeyboardInterrupt:
        if known is not None:
            raise KeyboardInterrupt(known) from None
        from m3jax.checkpoints.remote import is_url
        from m3jax.publishing import partial_directory

        if is_url(out):
            kept = f"what has been sent to {out} is kept, and the same command resumes"
        elif (partial := partial_directory(Path(out))).exists():
            kept = f"what is finished is in {partial}, and the same command resumes"
        else:
            kept = "nothing is kept"
        raise KeyboardInterrupt(kept) from None


def _print_notes(notes: Iterable[str], quiet: bool) -> None:
    for note in () if quiet else notes:
        print(f"note: {note}", file=sys.stderr)


def _print_progress(line: str) -> None:
    # In one piece: an interruption comes before a line or after it.
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def _print_merge(result: "MergeResult", as_json: bool, quiet: bool) -> None:
    if as_json or not quiet:
        _print_result(lambda: console.merge_json(result), lambda: console.merge_lines(result), as_json)


def _print_result(data: Callable[[], dict[str, Any]], lines: Callable[[], Iterable[str]], as_json: bool) -> None:
    if as_json:
        _print_json(data())
    else:
        _print_lines(lines())


def _print_lines(lines: Iterable[str]) -> None:
    for line in lines:
        print(line)


def _print_json(data: dict[str, Any]) -> None:
    print(json.dumps(data, indent=2, allow_nan=False))


# --- From the shell and back -----------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: What follows `m3jax`; `None` takes it from the shell.

    Returns:
        The exit code: 0 done, 1 a failure of ours, 2 bad input or a difference found, 130 interrupted, 141 when
        whoever read the output has gone.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given or os.environ.get("M3JAX_DEBUG", "0") not in ("", "0")
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started us
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
        _print_anything(getattr(sys, name))
    return _reported(lambda: _run(given), debug)


def _reported(work: Callable[[], int | None], debug: bool, silent: bool = False) -> int:
    """The exit code of some work, of which an error is said in a sentence, unless another process says it."""
    try:
        code = work() or 0
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        _abandon(sys.stdout)
        return _PIPE_CLOSED
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            traceback.print_exception(error)
        sentence, code = _explain(error)
        if not silent:
            print(sentence, file=sys.stderr)
        return code


def _run(arguments: list[str]) -> int:
    """Runs a command without Typer's own ways of reporting errors."""
    command = typer.main.get_command(app)
    try:
        with command.make_context("m3jax", arguments) as context:
            command.invoke(context)
    except typer.Exit as error:
        return error.exit_code
    return 0


def _explain(error: BaseException) -> tuple[str, int]:
    """What to say of an error, and the exit code."""
    match error:
        case M3Error():
            return f"m3jax: {error}", _BAD_INPUT
        case KeyboardInterrupt():
            return f"m3jax: interrupted{f': {error}' if error.args else ''}.", _INTERRUPTED
        case MemoryError():
            return "m3jax: out of memory; run with --debug to see where.", _FAILURE
        case OSError() if error.filename is None and error.errno in _CANNOT_PRINT:
            return f"m3jax: standard output: {error.strerror}: send it elsewhere; the work itself is done.", _BAD_INPUT
    # Typer hides its usage errors; their methods and exit code are the same in all its versions.
    if hasattr(error, "format_message"):
        return _usage(error), _BAD_INPUT
    words = " ".join(str(error).split())
    return f"m3jax: unexpected {type(error).__name__}{f': {words}' if words else ''}; run with --debug.", _FAILURE


def _usage(error: Any) -> str:
    """The sentence for a command line that cannot be read; all of the help where nothing was asked."""
    message: str = error.format_message()
    if type(error).__name__ == "NoArgsIsHelpError":
        return message
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "m3jax"
    return f"m3jax: {' '.join(message.split()).rstrip('.')}; see `{command} --help`."


def _print_anything(stream: TextIO) -> None:
    """Lets file names that are no text, or letters that the terminal lacks, be printed escaped."""
    with suppress(AttributeError):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[attr-defined]


def _abandon(stream: TextIO) -> None:
    """Points a stream whose reader has gone to nowhere, so that Python does not complain at exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def run() -> NoReturn:
    """The command as the shell calls it."""
    code = main()
    if code == _INTERRUPTED:  # what JAX still computes would crash the interpreter as it is taken down
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    run()
