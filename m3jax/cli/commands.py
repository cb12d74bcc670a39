"""The commands. Each one reads its arguments, calls a function and shows what it returns.

What a command needs is imported inside it, so that `--help` and `inspect` start without JAX.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeAlias

import typer

from m3jax.checkpoints import formats
from m3jax.cli import options, shell, terminal
from m3jax.cli.displays.anatomy import anatomy_lines
from m3jax.cli.displays.checkpoints import comparison_lines, overview_lines
from m3jax.cli.displays.evaluation import attack_lines, evaluation_lines
from m3jax.cli.displays.exploration import exploration_json, exploration_lines, reporter
from m3jax.cli.displays.machine import examination_lines
from m3jax.cli.displays.merges import (
    convert_json,
    convert_lines,
    estimate_lines,
    extraction_lines,
    merge_json,
    merge_lines,
    verification_json,
    verification_lines,
)
from m3jax.cli.displays.methods import merged_by_line, method_json, method_lines, methods_json, methods_lines
from m3jax.cli.displays.recipes import check_json, check_lines, explanation_lines
from m3jax.errors import M3Error

if TYPE_CHECKING:
    from m3jax.streaming.merging import MergeResult

_Start: TypeAlias = "tuple[Sequence[str], Callable[..., MergeResult]]"
"""Notes on what was read, and the function that does it."""

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


recipes = typer.Typer(help="Check recipes, start new ones, and teach editors what they hold.", no_args_is_help=True)
app.add_typer(recipes, name="recipe", rich_help_panel=None)


def _command(work: Callable[..., None]) -> Callable[..., None]:
    return app.command()(options.grouped(work))


def _recipe_command(work: Callable[..., None]) -> Callable[..., None]:
    name = work.__name__.partition("_")[0]
    return recipes.command(name)(options.grouped(work))


# --- Merges ------------------------------------------------------------------------------------------------------


@_command
def merge(
    *,
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file.", show_default=False)],
    out: options.Out,
    changes: options.Changes,
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
    if explain:
        from m3jax.checkpoints.remote import as_path
        from m3jax.outputs.orbax import step_directory
        from m3jax.streaming.explaining import explain_recipe

        if plan:
            raise M3Error("--explain and --plan say different things: give one of them")
        with step_directory(as_path(out), step) as place:
            explained = explain_recipe(recipe, place, changes.all(), changes.seed, overwrite, format)
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
            estimate = estimate_recipe(recipe, place, given, changes.seed, overwrite, max_shard_size, processes, format)
        width = terminal.width()
        shell.print_result(estimate.to_json, lambda: estimate_lines(estimate, width), speech.as_json)
        return

    def prepare() -> _Start:
        from m3jax.recipe import load_recipe

        loaded = load_recipe(recipe, changes.all(), changes.seed)

        def start(**how: Any) -> "MergeResult":
            from m3jax.streaming.merging import merge_checkpoint

            how |= {"format": format, "step": step}
            return merge_checkpoint(loaded, out, allow_nonfinite=allow_nonfinite, chunk_entries=chunk_entries, **how)

        return loaded.notes(), start

    _merge(prepare, out, machines, speech, overwrite=overwrite, max_shard_size=max_shard_size)


@_command
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


def _merge(
    prepare: Callable[[], _Start], out: str, machines: options.Machines, speech: options.Speech, **where: Any
) -> None:
    """What merging and replaying share.

    Args:
        prepare: Reads what is asked for, before JAX starts, so that a mistake in it shows at once.
        out: Where the merge goes.
        machines: What it runs on.
        speech: What is said of it.
        **where: What both functions take for the output.
    """

    def work(speaks: bool) -> None:
        still = speech.quiet or not speaks
        with shell.resumable(out):
            notes, start = prepare()
            shell.print_notes(notes, still)
            shell.silence_downloads(still)
            from m3jax.cluster.meshes import local_mesh

            with terminal.progress_reporter(still) as progress:
                mesh = local_mesh(machines.mesh)
                result = start(mesh=mesh, distributed=machines.distributed, progress=progress, **where)
        shell.print_notes((note for note in result.notes if note not in notes), still)
        as_json = speech.as_json and speaks
        shell.print_result(lambda: merge_json(result), lambda: merge_lines(result), as_json, still)

    shell.perform(work, machines.rendezvous(), speech.debug)


@_command
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

    The exit code is 2 if they differ.
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


# --- Recipes -----------------------------------------------------------------------------------------------------


@_recipe_command
def check_recipe(
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


@_recipe_command
def schema_of_recipes(*, debug: options.Debug = False) -> None:
    """Print the JSON schema of recipes, for editors that complete and check YAML."""
    from m3jax.recipe.editors import recipe_schema

    shell.print_json(recipe_schema())


@_recipe_command
def new_recipe(
    *,
    method: Annotated[str, typer.Argument(metavar="METHOD", help="As `m3jax methods` lists them.", show_default=False)],
    debug: options.Debug = False,
) -> None:
    """Print a recipe of a method to start from, with a comment to each line."""
    from m3jax.recipe.starting import new_recipe as written

    shell.print_result(dict, lambda: written(method).splitlines(), False)


# --- Checkpoints -------------------------------------------------------------------------------------------------


@_command
def inspect(
    *,
    path: Annotated[
        str,
        typer.Argument(
            metavar="PATH", help="A model directory, weight file or hub id; or MODEL+ADAPTER.", show_default=False
        ),
    ],
    other: Annotated[
        str | None, typer.Argument(metavar="OTHER", help="A second one to compare it with.", show_default=False)
    ] = None,
    pattern: Annotated[
        str | None, typer.Option("--filter", metavar="REGEX", help="Only tensors in whose names this is found.")
    ] = None,
    anatomy: Annotated[
        bool, typer.Option("--anatomy", help="Show what the tensors are: towers, blocks, kinds, tied ones.")
    ] = False,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Show what a checkpoint holds, or how two of them differ."""
    from m3jax.checkpoints import inspection

    width = terminal.width()
    if anatomy:
        if other is not None or pattern is not None:
            raise M3Error("--anatomy is of one whole model: leave out OTHER and --filter")
        from m3jax.anatomy import summarise
        from m3jax.anatomy.stored import inspect_anatomy

        found = summarise(*inspect_anatomy(path))
        shell.print_result(found.to_json, lambda: anatomy_lines(found, width), as_json)
        return
    if other is None:
        from m3jax.outputs.provenance import method_of

        overview, merged_by = inspection.look_at(path, pattern), method_of(path)
        shell.print_result(
            lambda: {**overview.to_json(), "merged_by": merged_by},
            lambda: (*overview_lines(overview, width), *merged_by_line(merged_by)),
            as_json,
        )
        return
    with terminal.progress_reporter() as progress:
        comparison = inspection.compare(path, other, pattern, progress)
    shell.print_result(comparison.to_json, lambda: comparison_lines(comparison, width), as_json)


@_command
def doctor(
    *,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Check that this machine makes the bits that all make."""
    from m3jax.trees import reference

    found = reference.examine(lambda line: print(line, file=sys.stderr))
    shell.print_result(found.to_json, lambda: examination_lines(found, terminal.width()), as_json)
    if not found.right:
        raise typer.Exit(shell.BAD_INPUT)


@_command
def methods(
    *,
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="The one to explain.", show_default=False)] = None,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """List merge methods and sparsifiers, or explain one."""
    width = terminal.width()
    if name is None:
        shell.print_result(methods_json, lambda: methods_lines(width), as_json)
        return
    shell.print_result(lambda: method_json(name), lambda: method_lines(name, width), as_json)


@_command
def convert(
    *,
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC", help="A model directory, weight file or hub id; or MODEL+ADAPTER.", show_default=False
        ),
    ],
    out: Annotated[str, typer.Argument(metavar="DST", help="The directory to make.", show_default=False)],
    to: Annotated[
        str, typer.Option("--to", metavar="|".join(formats.WRITTEN), help="The format to write.")
    ] = formats.SAFETENSORS.name,
    max_shard_size: options.MaxShardSize = "5GB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace DST if m3jax has made it.")] = False,
    dequantize: Annotated[
        bool, typer.Option("--dequantize", help="Write float8 weights as numbers, without their scales.")
    ] = False,
    speech: options.Speech,
) -> None:
    """Write a checkpoint in another format, bit for bit."""
    shell.silence_downloads(speech.quiet)
    from m3jax.outputs import conversion

    with terminal.progress_reporter(speech.quiet) as progress:
        result = conversion.convert(
            source,
            out,
            to,
            max_shard_size=max_shard_size,
            overwrite=overwrite,
            dequantize=dequantize,
            progress=progress,
        )
    shell.print_notes(result.notes, speech.quiet)
    shell.print_result(lambda: convert_json(result), lambda: convert_lines(result), speech.as_json, speech.quiet)


@_command
def extract_lora(
    *,
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A fine-tuned model directory or hub id.", show_default=False)
    ],
    out: Annotated[str, typer.Argument(metavar="OUT", help="The adapter's directory to make.", show_default=False)],
    base: Annotated[str, typer.Option("--base", metavar="BASE", help="What it was tuned from.", show_default=False)],
    rank: Annotated[int, typer.Option("--rank", metavar="R", min=1, help="Of the factors.", show_default=False)],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if m3jax has made it.")] = False,
    speech: options.Speech,
) -> None:
    """Write what a model has learned beyond its base as a LoRA adapter of PEFT."""
    shell.silence_downloads(speech.quiet)
    from m3jax.outputs import extraction

    with terminal.progress_reporter(speech.quiet) as progress:
        result = extraction.extract_lora(model, base, out, rank, overwrite=overwrite, progress=progress)
    shell.print_notes(result.notes, speech.quiet)
    shell.print_result(lambda: convert_json(result), lambda: extraction_lines(result), speech.as_json, speech.quiet)


# --- Evaluation --------------------------------------------------------------------------------------------------


@_command
def evaluate(
    *,
    model: options.Model,
    task: Annotated[
        str | None, typer.Option("--task", metavar="NAME", help="gsm8k, math, humaneval, mbpp, sst2, ….")
    ] = None,
    data: options.Data = None,
    profile: options.Protocol = "m3jax",
    harness: Annotated[
        str | None,
        typer.Option("--harness", metavar="TASKS", help="Tasks of lm-evaluation-harness or task files, by comma."),
    ] = None,
    showing: options.Harness,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Where records and the summary go.", show_default=False)
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    limit: Annotated[int | None, typer.Option(metavar="N", help="Do the first N examples only.")] = None,
    batch_size: options.BatchSize = 8,
    answers: options.Answers,
    grader: options.Grader = None,
    overflow: options.Overflow = "error",
    weights: options.Weights,
    programs: options.Programs,
    speech: options.Speech,
) -> None:
    """Score a model on a task."""
    from m3jax.evaluation import stored
    from m3jax.evaluation.harness import Showing
    from m3jax.evaluation.options import Evaluation

    wanted = stored.EvaluateOptions(
        task=task,
        data=data,
        harness=harness,
        include_path=showing.include_path,
        showing=Showing(
            showing.num_fewshot,
            showing.apply_chat_template,
            showing.system_instruction,
            not showing.fewshot_in_one_turn,
        ),
        allow_task_code=showing.allow_task_code,
        profile=profile,
        out=out,
        resume=resume,
        how=Evaluation(limit, batch_size, *answers, overflow, *programs, grader),
        dtype=weights.dtype,
        mesh=weights.mesh,
    )
    stored.check(wanted)
    shell.silence_downloads(speech.quiet)
    outcome = stored.run(model, wanted, shell.teller(speech.quiet))
    shell.print_result(lambda: outcome, lambda: evaluation_lines(outcome), speech.as_json, speech.quiet)


@_command
def attack(
    *,
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
    answers: options.Answers,
    grader: options.Grader = None,
    overflow: options.AttackOverflow = "error",
    weights: options.Weights,
    programs: options.Programs,
    speech: options.Speech,
) -> None:
    """Attack the prompt of a model, and shift its inputs."""
    shell.silence_downloads(speech.quiet)
    from m3jax.evaluation import robustness
    from m3jax.evaluation.options import Evaluation

    wanted = robustness.AttackOptions(
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
        how=Evaluation(limit, batch_size, *answers, overflow, *programs, grader),
        dtype=weights.dtype,
        mesh=weights.mesh,
    )
    outcome = robustness.run(model, wanted, shell.teller(speech.quiet))
    shell.print_result(lambda: outcome, lambda: attack_lines(outcome), speech.as_json, speech.quiet)


@_command
def report(
    *,
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
    from m3jax.evaluation import report as reporting

    found = reporting.collect(directories)
    if out is not None:
        reporting.write(found, out, overwrite)
    shell.print_result(found.to_json, lambda: reporting.table_lines(found), as_json)


# --- Exploration -------------------------------------------------------------------------------------------------


@_command
def explore(
    *,
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
    changes: options.Changes,
    limit: Annotated[int | None, typer.Option(metavar="N", help="Use the first N examples of each task only.")] = None,
    batch_size: options.BatchSize = 8,
    answers: options.Answers,
    grader: options.Grader = None,
    overflow: options.Overflow = "error",
    mesh: options.DecoderMesh = None,
    programs: options.Programs,
    max_shard_size: options.MaxShardSize = "5GB",
    overwrite: options.Overwrite = False,
    speech: options.Speech,
) -> None:
    """Try many merging ratios and write the best merge.

    The experts stay in memory. An interrupted exploration keeps its samples; the same command goes on.
    """
    from m3jax.recipe import load_recipe

    loaded = load_recipe(recipe, changes.all(), changes.seed)
    wanted = options.read_tasks(tasks)
    if granularity is not None and optimize is None:
        raise M3Error("--granularity is for --optimize: add it, or write mixup.granularity into the recipe")
    shell.print_notes(loaded.notes(), speech.quiet)
    shell.silence_downloads(speech.quiet)
    from m3jax import exploration
    from m3jax.evaluation.models import make_mesh

    how = exploration.Evaluation(limit, batch_size, *answers, overflow, *programs, grader)
    learned = exploration.Optimization(optimize, steps, learning_rate, granularity, batch_size) if optimize else None
    kept = "finished samples are kept, and the same command goes on"
    with shell.resumable(out, kept), reporter(samples, speech.quiet) as (watch, tell):
        found = exploration.explore(
            loaded,
            out,
            tasks=wanted,
            samples=samples,
            select=select,
            strategy=strategy,
            evaluation=how,
            optimize=learned,
            mesh=make_mesh(mesh),
            journal=journal,
            overwrite=overwrite,
            max_shard_size=max_shard_size,
            watch=watch,
            tell=tell,
        )
    width = terminal.width()
    shell.print_result(
        lambda: exploration_json(found), lambda: exploration_lines(found, width), speech.as_json, speech.quiet
    )


@_command
def demo(
    *,
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where to work.")] = Path("m3jax-demo"),
    speech: options.Speech,
) -> None:
    """Train two small experts, merge their skills and show what came of it."""
    from m3jax.laboratory.demo import main as run_demo

    def echo(line: str) -> None:
        if not speech.quiet:
            print(line, file=sys.stderr if speech.as_json else sys.stdout, flush=True)

    outcome = run_demo(directory, echo)
    if speech.as_json:
        shell.print_json(outcome)


# --- The program -------------------------------------------------------------------------------------------------


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
