"""The commands that evaluate, attack and explore models, and the demo.

What a command needs is imported inside it, so that `--help` and `inspect` start without JAX.
"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from m3jax.cli import options, shell, terminal
from m3jax.cli.displays.evaluation import attack_lines, evaluation_lines, statistics_lines
from m3jax.cli.displays.exploration import exploration_lines, reporter
from m3jax.errors import M3Error


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
        config=weights.config,
    )
    stored.check(wanted)
    shell.silence_downloads(speech.quiet)
    outcome = stored.run(model, wanted, shell.teller(speech.quiet))
    shell.print_result(lambda: outcome, lambda: evaluation_lines(outcome), speech.as_json, speech.quiet)


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
    encoder: options.Encoder = None,
    tagger: options.Tagger = None,
    least_similarity: options.LeastSimilarity = None,
    floor: options.Floor = 0.05,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Where attack.json goes.", show_default=False)
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the attack in --out.")] = False,
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
        encoder=encoder,
        tagger=tagger,
        least_similarity=least_similarity,
        floor=floor,
        out=out,
        overwrite=overwrite,
        how=Evaluation(limit, batch_size, *answers, overflow, *programs, grader),
        dtype=weights.dtype,
        mesh=weights.mesh,
        config=weights.config,
        resume=resume,
    )
    outcome = robustness.run(model, wanted, shell.teller(speech.quiet))
    shell.print_result(lambda: outcome, lambda: attack_lines(outcome), speech.as_json, speech.quiet)


def report(
    *,
    directories: Annotated[
        list[Path],
        typer.Argument(
            metavar="DIR…",
            help="What evaluate and attack wrote, and OUT.exploration of explore.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Where report.md, .json and .png go.", show_default=False),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a report that is there.")] = False,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Put evaluations, attacks and explorations of several models in one table and one picture."""
    from m3jax.evaluation import report as reporting

    found = reporting.collect(directories)
    if out is not None:
        reporting.write(found, out, overwrite)
    shell.print_result(found.to_json, lambda: reporting.table_lines(found), as_json)


def explore(
    *,
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file with mixup.", show_default=False)],
    out: options.Out,
    tasks: options.Tasks,
    samples: options.Samples = 32,
    select: options.Select = "mean",
    strategy: options.Strategy = "draw",
    early_stopping: options.EarlyStopping = True,
    optimize: options.Optimize = None,
    granularity: options.Granularity = None,
    steps: options.Steps = 100,
    learning_rate: options.LearningRate = 0.05,
    journal: options.Journal = None,
    references: Annotated[
        bool, typer.Option("--references/--no-references", help="Score the base, the experts and equal weights too.")
    ] = True,
    picture: Annotated[
        Path | None,
        typer.Option(
            "--picture",
            metavar="FILE",
            help="Draw the scores over the weights (.png, .svg, .pdf); no sample is stopped early.",
        ),
    ] = None,
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

    if picture is not None:
        exploration.check_picture(picture)
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
            early_stopping=early_stopping and picture is None,  # what was stopped has no score to draw
            evaluation=how,
            optimize=learned,
            mesh=make_mesh(mesh),
            journal=journal,
            references=references,
            overwrite=overwrite,
            max_shard_size=max_shard_size,
            watch=watch,
            tell=tell,
        )
    if picture is not None:
        exploration.picture(found.drawn, picture)
    width = terminal.width()
    shell.print_result(found.to_json, lambda: exploration_lines(found, width), speech.as_json, speech.quiet)


def statistics(
    *,
    model: options.Model,
    out: Annotated[str, typer.Argument(metavar="OUT", help="The directory to make.", show_default=False)],
    data: options.Data = None,
    task: Annotated[
        str | None,
        typer.Option("--task", metavar="NAME", help="Whose prompts and answers are read.  [default: plain texts]"),
    ] = None,
    examples: Annotated[int | None, typer.Option(metavar="N", help="Use the first N examples only.")] = None,
    template: options.Template = None,
    overflow: Annotated[
        str, typer.Option(metavar="error|skip", help="What becomes of examples that are longer than the model sees.")
    ] = "error",
    kind: Annotated[
        str, typer.Option(metavar="fisher|gram", help="For merge_method: fisher, or for regmean.")
    ] = "fisher",
    weights: options.Weights,
    max_shard_size: options.MaxShardSize = "5GB",
    overwrite: options.Overwrite = False,
    speech: options.Speech,
) -> None:
    """Measure what data says of a model's parameters, to merge by it (merge_method: fisher, regmean)."""
    shell.silence_downloads(speech.quiet)
    from m3jax.evaluation.measuring import measure_statistics

    found = measure_statistics(
        model,
        out,
        data=data,
        task=task,
        examples=examples,
        template=template,
        overflow=overflow,
        dtype=weights.dtype,
        mesh=weights.mesh,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
        tell=shell.teller(speech.quiet),
        kind=kind,
    )
    shell.print_notes(found.notes, speech.quiet)
    shell.print_result(
        lambda: {**found._asdict(), "directory": str(found.directory), "notes": list(found.notes)},
        lambda: statistics_lines(found),
        speech.as_json,
        speech.quiet,
    )


def demo(
    *,
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where to work.")] = Path("m3jax-demo"),
    seed: Annotated[
        int, typer.Option("--seed", metavar="N", min=0, help="Of lessons, first weights, questions and draws.")
    ] = 0,
    speech: options.Speech,
) -> None:
    """Train two small experts, merge their skills and show what came of it."""
    from m3jax.laboratory.demo import main as run_demo

    def echo(line: str) -> None:
        if not speech.quiet:
            print(line, file=sys.stderr if speech.as_json else sys.stdout, flush=True)

    outcome = run_demo(directory, echo, seed, stage=lambda: terminal.progress_reporter(speech.quiet))
    if speech.as_json:
        shell.print_json(outcome)
