"""The options of the commands, alone and in groups, and how those are read that hold more than one thing."""

import inspect
import re
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NamedTuple

import typer

from m3jax.cluster.supervision import Rendezvous
from m3jax.errors import M3Error

_HEARTBEAT_SECONDS = 30  # of silence after which a process counts as dead

# --- What is said, and where it goes ------------------------------------------------------------------------------

Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors (and --json's result).")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error. Also: M3JAX_DEBUG=1.")]
Out = Annotated[
    str,
    typer.Argument(metavar="OUT", help="The directory to make, or an s3:// or gs:// URL.", show_default=False),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace OUT if m3jax has made it.")]
MaxShardSize = Annotated[str, typer.Option(metavar="SIZE", help="Largest weight file.")]
Config = Annotated[
    str | None,
    typer.Option("--config", metavar="CONFIG", help="The model's config.json, if it is not beside its weights."),
]
Format = Annotated[
    str | None,
    typer.Option(
        "--format",
        metavar="same|safetensors|orbax",
        help="Of the weights.  [default: the recipe's, or the base's]",
        show_default=False,
    ),
]
Step = Annotated[
    int | None,
    typer.Option("--step", metavar="N", help="Write OUT/N, a new step of the run OUT.", show_default=False),
]

# --- Recipes and manifests ----------------------------------------------------------------------------------------

Seed = Annotated[int | None, typer.Option("--seed", metavar="N", help="Use this seed, not the recipe's.")]
Seeds = Annotated[
    str | None,
    typer.Option(
        "--seeds", metavar="A..B", help="A merge for each of these seeds, in OUT/seed-A and so on.", show_default=False
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change the recipe, as in mixup.alpha=0.5; may be repeated."),
]

Inputs = Annotated[
    list[str] | None,
    typer.Option("--input", metavar="RECORDED=HERE", help="Where a recorded input is now; may be repeated."),
]

# --- Devices and processes ----------------------------------------------------------------------------------------

MergeMesh = Annotated[
    str | None,
    typer.Option(
        "--mesh", metavar="AXES", help="Devices to use, as in fsdp=4,tp=2.  [default: all here]", show_default=False
    ),
]
Lanes = Annotated[
    int | None,
    typer.Option(
        "--lanes",
        metavar="N",
        help="Tensors merged at the same time.  [default: one for every four cores, at most 8]",
        show_default=False,
    ),
]
DecoderMesh = Annotated[
    str | None,
    typer.Option("--mesh", metavar="AXES", help="As in fsdp=4,tp=2.  [default: one device]", show_default=False),
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

# --- Evaluation ---------------------------------------------------------------------------------------------------

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A model directory or hub id; or MODEL+ADAPTER.", show_default=False)
]
Data = Annotated[str | None, typer.Option("--data", metavar="FILE", help="JSONL, TSV, Parquet …, or a hub data set.")]
BatchSize = Annotated[int, typer.Option(metavar="N", help="Prompts that run together.")]
MaxTokens = Annotated[int | None, typer.Option(metavar="N", help="Most tokens of an answer.")]
_TEMPLATE_HELP = "chat for the model's own, none, alpaca, code-alpaca, wizardlm, wizardmath.  [default: the task's]"
Template = Annotated[str | None, typer.Option(metavar="NAME", help=f"Prompt template: {_TEMPLATE_HELP}")]
_OVERFLOW_HELP = "What becomes of prompts that leave an answer no room."
Overflow = Annotated[str, typer.Option(metavar="error|truncate|skip", help=_OVERFLOW_HELP)]
AttackOverflow = Annotated[str, typer.Option(metavar="error|truncate", help=_OVERFLOW_HELP)]
IncludePath = Annotated[
    str | None, typer.Option(metavar="DIR", help="Further task files for the harness.", show_default=False)
]
NumFewshot = Annotated[
    int | None,
    typer.Option(metavar="N", help="Examples that the harness shows.  [default: the task's]", show_default=False),
]
ApplyChatTemplate = Annotated[
    bool, typer.Option("--apply-chat-template", help="Have the harness use the tokenizer's chat template.")
]
SystemInstruction = Annotated[
    str | None, typer.Option(metavar="TEXT", help="What the harness tells the model first.", show_default=False)
]
FewshotInOneTurn = Annotated[
    bool, typer.Option("--fewshot-in-one-turn", help="In a chat, show the harness's examples in the question's turn.")
]
AllowTaskCode = Annotated[
    bool, typer.Option("--allow-task-code", help="Run Python code that task files of your own name (!function).")
]
Dtype = Annotated[str | None, typer.Option(metavar="NAME", help="Of the weights.  [default: their own]")]
Grader = Annotated[
    str | None,
    typer.Option(
        metavar="m3jax|paper|math_verify",
        help="Whose rule judges answers.  [default: m3jax, or the profile's]",
        show_default=False,
    ),
]
RunCode = Annotated[bool, typer.Option("--run-code", help="Run programs that the model wrote, sandboxed.")]
AllowUnsandboxed = Annotated[
    bool, typer.Option("--allow-unsandboxed", help="Run them with limits only where no sandbox is possible.")
]

# --- Attacks and exploration --------------------------------------------------------------------------------------

Attacks = Annotated[
    str | None,
    typer.Option(
        "--attack",
        metavar="NAMES",
        help="By comma: deepwordbug, textbugger, bertattack, textfooler, stresstest, checklist, semantic; '' is none."
        "  [default: those that need no further files]",
        show_default=False,
    ),
]
Shifts = Annotated[
    str | None,
    typer.Option(
        "--shift",
        metavar="NAMES",
        help="By comma: typos[=RATE], whitespace[=RATE], lowercase, uppercase, mixed-case, number-format, paraphrase.",
    ),
]
Profile = Annotated[
    str, typer.Option(metavar="promptbench|m3-paper", help="How hard attacks try, or the M³ paper's protocol.")
]
Protocol = Annotated[
    str, typer.Option("--profile", metavar="m3jax|m3-paper", help="The task as it is here, or as the M³ paper sets it.")
]
SearchExamples = Annotated[
    int | None, typer.Option(metavar="N", help="Search on the first N examples, measure on the others.")
]
Budget = Annotated[int | None, typer.Option(metavar="N", help="Most prompts that an attack may score.")]
Prompt = Annotated[
    str | None, typer.Option(metavar="TEXT", help="Attack this, {content} in it, not the task's own prompt.")
]
Protect = Annotated[str | None, typer.Option(metavar="WORDS", help="Never touch these, by comma, nor the labels.")]
MaskedLm = Annotated[str | None, typer.Option("--masked-lm", metavar="BERT", help="For bertattack.")]
Embeddings = Annotated[
    str | None, typer.Option(metavar="FILE", help="Word vectors as text, for textfooler and textbugger.")
]
Encoder = Annotated[
    str | None, typer.Option(metavar="BERT", help="Sentence encoder; keeps textbugger, bertattack, textfooler near.")
]
Tagger = Annotated[
    str | None, typer.Option(metavar="BERT", help="Tagger of parts of speech, which textfooler then keeps.")
]
LeastSimilarity = Annotated[
    float | None, typer.Option(metavar="X", help="What --encoder must find; the profile's bounds if left out.")
]

Floor = Annotated[
    float, typer.Option(metavar="X", help="Clean accuracy below which PDR is undefined and nothing is attacked.")
]

Tasks = Annotated[
    list[str],
    typer.Option("--task", metavar="NAME=FILE", help="A task, its dev data; may be repeated.", show_default=False),
]
Samples = Annotated[int, typer.Option(metavar="N", help="The budget, in evaluations on all dev data.")]
Select = Annotated[
    str, typer.Option(metavar="mean|TASK|pareto|NUMBER", help="What the best sample is; or the sample to take.")
]
Strategy = Annotated[
    str,
    typer.Option(
        metavar="auto|draw|sobol|grid|halving|cma",
        help="Which ratios are tried; auto: equal weights, then CMA-ES.",
    ),
]
EarlyStopping = Annotated[
    bool,
    typer.Option(
        "--early-stopping/--no-early-stopping",
        help="Stop a sample once even right answers to all that is left could not make it best; off with --picture.",
    ),
]
Optimize = Annotated[
    str | None,
    typer.Option(metavar="loss|entropy", help="Refine the best sample by gradients.", show_default=False),
]
Granularity = Annotated[
    str | None,
    typer.Option(metavar="model|layer|tensor", help="Of refined weights.  [default: the recipe's]", show_default=False),
]
Steps = Annotated[int, typer.Option(metavar="N", help="Of refining.")]
LearningRate = Annotated[float, typer.Option(metavar="X", help="Of refining.")]
Journal = Annotated[
    str | None,
    typer.Option(metavar="DIR", help="Where samples are kept.  [default: OUT.exploration]", show_default=False),
]

# --- Groups -------------------------------------------------------------------------------------------------------


class Speech(NamedTuple):
    """What a command says."""

    as_json: Json = False
    quiet: Quiet = False
    debug: Debug = False


Only = Annotated[
    list[str] | None,
    typer.Option("--only", metavar="NAME", help="Merge this collection alone, such as params; may be repeated."),
]


class Changes(NamedTuple):
    """What a command changes in a recipe."""

    seed: Seed = None
    overrides: Overrides = None
    only: Only = None

    def all(self) -> list[str]:
        """The overrides, those that options of their own stand for last."""
        return [*(self.overrides or ()), *([f"only=[{', '.join(self.only)}]"] if self.only else [])]


class Machines(NamedTuple):
    """What a merge runs on."""

    mesh: MergeMesh = None
    lanes: Lanes = None
    distributed: Distributed = False
    coordinator: Coordinator = None
    num_processes: NumProcesses = None
    process_id: ProcessId = None
    heartbeat_timeout: Heartbeat = _HEARTBEAT_SECONDS

    def rendezvous(self) -> Rendezvous | None:
        """Where the processes meet; None where this is the only one."""
        return Rendezvous.of(
            self.distributed, self.coordinator, self.num_processes, self.process_id, self.heartbeat_timeout
        )


class Answers(NamedTuple):
    """How a model is asked."""

    max_tokens: MaxTokens = None
    template: Template = None


class Harness(NamedTuple):
    """How the harness's tasks are found, and how it shows their examples."""

    include_path: IncludePath = None
    num_fewshot: NumFewshot = None
    apply_chat_template: ApplyChatTemplate = False
    system_instruction: SystemInstruction = None
    fewshot_in_one_turn: FewshotInOneTurn = False
    allow_task_code: AllowTaskCode = False


class Weights(NamedTuple):
    """How a model is loaded."""

    dtype: Dtype = None
    mesh: DecoderMesh = None
    config: Config = None


class Programs(NamedTuple):
    """What becomes of programs that a model wrote."""

    run_code: RunCode = False
    allow_unsandboxed: AllowUnsandboxed = False


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """A command as Typer reads it: in the place of a parameter that is a group stand the options of the group.

    Args:
        command: Its parameters are keyword-only, so that a group needs no default.
    """
    signature = inspect.signature(command)
    groups = {name: one.annotation for name, one in signature.parameters.items() if _is_group(one.annotation)}
    flat = [
        option
        for name, one in signature.parameters.items()
        for option in (_options_of(groups[name]) if name in groups else [one])
    ]

    def work(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{field: given.pop(field) for field in group._fields})
        command(**given)

    for option in flat:
        _complete(option)
    work.__name__, work.__doc__ = command.__name__, command.__doc__
    work.__signature__ = signature.replace(parameters=flat)  # type: ignore[attr-defined]
    work.__annotations__ = {option.name: option.annotation for option in flat}
    return work


_WORDS = re.compile(r"[a-z][\w-]*(?:\|[a-z][\w-]*)+")  # of a metavar that says all that there is


def _complete(option: inspect.Parameter) -> None:
    """Has a shell complete the words that an option may have, and names of methods."""
    for told in getattr(option.annotation, "__metadata__", ()):
        metavar = getattr(told, "metavar", None) or ""
        if option.name == "method" or (option.name, metavar) == ("name", "NAME"):
            told.autocompletion = _methods
        elif _WORDS.fullmatch(metavar):
            told.autocompletion = _completing(metavar.split("|"))


def _completing(words: Sequence[str]) -> Callable[[str], list[str]]:
    def beginning(incomplete: str) -> list[str]:
        return [word for word in words if word.startswith(incomplete)]

    return beginning


def _methods(incomplete: str) -> list[str]:
    from m3jax.methods import catalogue

    return _completing(sorted({*catalogue.names(), *(row.name for row in catalogue.SPARSIFIERS)}))(incomplete)


def _is_group(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, tuple) and hasattr(annotation, "_fields")


def _options_of(group: Any) -> list[inspect.Parameter]:
    defaults = group._field_defaults
    return [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=kind, default=defaults[name])
        for name, kind in inspect.get_annotations(group).items()
    ]


# --- Options that hold more than one thing ------------------------------------------------------------------------


def names(text: str | None) -> tuple[str, ...]:
    """Names listed by comma.

    Example:
        >>> names("deepwordbug, stresstest"), names(None)
        (('deepwordbug', 'stresstest'), ())
    """
    return tuple(part.strip() for part in (text or "").split(",") if part.strip())


def read_sources(texts: Sequence[str]) -> dict[str, str]:
    """Where recorded inputs are now, from texts such as "RECORDED=HERE".

    Raises:
        M3Error: One is no pair.
    """
    return dict(map(_read_source, texts))


def _read_source(text: str) -> tuple[str, str]:
    recorded, equals, here = text.partition("=")
    if not (recorded and equals and here):
        raise M3Error(
            f"--input {text!r} is no pair: write RECORDED=HERE, the name in the manifest and a path or hub id."
        )
    return recorded, here


def read_tasks(texts: Sequence[str]) -> dict[str, str | None]:
    """Tasks and their data, from texts such as "NAME=FILE" or, for a task's own data on the hub, "NAME".

    Raises:
        M3Error: One is no task, or a task is named twice.

    Example:
        >>> read_tasks(["gsm8k=dev.jsonl", "sst2"])
        {'gsm8k': 'dev.jsonl', 'sst2': None}
    """
    tasks = dict(map(_read_task, texts))
    if len(tasks) < len(texts):
        raise M3Error("--task: names a task twice: give each task one file")
    return tasks


def _read_task(text: str) -> tuple[str, str | None]:
    name, equals, data = text.partition("=")
    if not name or (equals and not data):
        raise M3Error(f"--task {text!r} is no task: write NAME=FILE, or NAME alone for its own data on the hub")
    return name, data or None
