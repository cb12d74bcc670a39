"""lm-evaluation-harness's tasks, loaded before there is a model, and what the harness needs around it.

The harness (the extra `eval`) is imported only when one of these functions is called.
"""

import contextlib
import functools
import logging
import os
import random
import sys
import warnings
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import yaml

from m3jax.documents import FAULTS
from m3jax.errors import M3Error
from m3jax.evaluation.checks import did_you_mean
from m3jax.evaluation.data import quiet_hub
from m3jax.evaluation.tasks import TASKS
from m3jax.progress import Tell

# The harness's own: some tasks shuffle as they are loaded.
_RANDOM_SEED, _NUMPY_SEED = 0, 1234
# No processes forked from one that runs JAX; and no advice that PyTorch is missing.
_SETTINGS = {"DISABLE_MULTIPROC": "1", "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1"}
_LEFT_BY_HARNESS = "TOKENIZERS_PARALLELISM"
# Ways of sampling that the decoder has not, with what they are where they change nothing.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "top_k": (None, 0, -1),
    "min_p": (None, 0),
    "typical_p": (None, 1),
    "num_beams": (None, 1),
    "repetition_penalty": (None, 1),
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
}


class HarnessTasks(NamedTuple):
    """Tasks that the harness has loaded, with their data; see `load_harness_tasks`.

    Attributes:
        names: As they were asked for.
        loaded: By "tasks" and "groups", the harness's own objects by name.
    """

    names: tuple[str, ...]
    loaded: dict[str, dict[str, Any]]


def load_harness_tasks(
    names: Sequence[str], include_path: str | None = None, tell: Tell | None = None, allow_code: bool = False
) -> HarnessTasks:
    """Load tasks of the harness and their data; needs no model.

    Args:
        names: Names of tasks, groups or tags; or a task file, or a directory of them for all that it holds.
        include_path: A directory with further task files.
        tell: Told what is loaded; progress bars are shown only with it.
        allow_code: Run the Python code that task files beside the harness's own name.

    Raises:
        M3Error: The harness is not installed, knows no such task, cannot load it, or the task needs what is not here;
            or it names Python code and `allow_code` is false.
    """
    harness_class()
    if include_path is not None and not Path(include_path).is_dir():
        raise M3Error(f"--include-path {include_path} is no directory: give the one that holds your task files")
    loaded: dict[str, dict[str, Any]] = {"tasks": {}, "groups": {}}
    with surroundings(tell) as complaints:
        manager = _manager(names, include_path)
        for name in names:
            if tell is not None:
                tell(f"loading the harness's task {name}")
            for member in _members(manager, name):
                if member in loaded["tasks"]:  # with its group
                    continue
                if not allow_code:
                    check_code_free(manager, member)
                found = _load(manager, member, complaints)
                for kind, objects in loaded.items():
                    objects |= found[kind]
    return HarnessTasks(tuple(names), loaded)


def _manager(names: Sequence[str], include_path: str | None) -> Any:
    """The harness's index of tasks, without its own where none of them is asked for: reading those takes seconds."""
    from lm_eval.tasks import TaskManager  # type: ignore[import-untyped, import-not-found, unused-ignore]

    places = [Path(name) for name in names if _is_place(name)]
    named = {name for name in names if not _is_place(name)}
    own = [] if include_path is None else [Path(include_path)]
    own += [place for place in places if place.is_dir()]
    own += [place.parent for place in places if _group_of(place) is not None]
    try:
        manager = TaskManager(include_path=own or None, include_defaults=bool(named) and not own)
        if own and (manager.all_groups or not named <= set(manager.all_subtasks)):
            manager = TaskManager(include_path=own)
    except Exception as error:  # whatever stands in the task files
        raise M3Error(f"lm-evaluation-harness cannot read its task files: {said(error)}") from error
    for name in named:
        if name not in manager.all_tasks:
            _raise_unknown(name, manager.all_tasks)
    return manager


def _is_place(name: str) -> bool:
    """Whether what was asked for is a file or directory, and no name."""
    return name.endswith((".yaml", ".yml")) or os.sep in name


def _group_of(place: Path) -> str | None:
    """The group that a file is of, whose members stand in others; None where it is no such file."""
    named = _entry(_read(place).content, "group") if place.is_file() else None
    return None if named is None else str(named)


def _members(manager: Any, name: str) -> list[str]:
    """What the harness is to load for a name: itself, or all groups and tasks of a directory."""
    place = Path(name).resolve()
    if not _is_place(name) or place.is_file():
        return [_group_of(place) or name] if _is_place(name) else [name]
    within = [
        task
        for task in (*manager.all_groups, *manager.all_subtasks)
        if (path := manager.task_index[task].yaml_path) is not None and path.resolve().is_relative_to(place)
    ]
    if not within:
        why = "holds no task file" if place.is_dir() else "is not there"
        raise M3Error(f"--harness {name} {why}: give a task's .yaml file, or a directory of such")
    return within


def harness_class() -> Any:
    """The harness's class of models.

    Raises:
        M3Error: The harness is not installed.
    """
    try:
        from lm_eval.api.model import LM  # type: ignore[import-untyped, import-not-found, unused-ignore]
    except ImportError as error:
        raise M3Error("running tasks of lm-evaluation-harness needs it installed: pip install 'm3jax[eval]'") from error
    return LM


def _raise_unknown(name: str, known: Sequence[str]) -> NoReturn:
    raise M3Error(
        f"lm-evaluation-harness has no task called {name}{did_you_mean(name, known)}; see `lm_eval ls tasks`, or give "
        "the directory of your own task files with --include-path"
    )


def _load(manager: Any, name: str, complaints: Sequence[str]) -> dict[str, Any]:
    """The harness's tasks and groups of one name."""
    try:
        found: dict[str, Any] = manager.load([name])
    except Exception as error:  # tasks are programs of many authors
        ours = [own for own in TASKS if name.startswith(own)]
        instead = f"; m3jax has a task of its own: --task {ours[0]}" if ours else ""
        raise M3Error(
            f"lm-evaluation-harness cannot load its task {name}: {said(error, complaints)}; its data or code may have "
            f"to be fetched with a network first{instead}"
        ) from error
    for task, loaded in found["tasks"].items():
        _check_task(task, loaded)
    return found


def _check_task(name: str, task: Any) -> None:
    """Check that a task asks for nothing that is not here."""
    if getattr(task, "UNSAFE_CODE", False):
        raise M3Error(
            f"the harness's task {name} runs programs that the model wrote without a sandbox: use m3jax's own "
            "--task humaneval or --task mbpp"
        )
    if getattr(task, "MULTIMODAL", False):
        raise M3Error(
            f"the harness's task {name} shows more than text, which is all that the model reads: leave it out"
        )
    if task.get_config("output_type") == "generate_until":
        for key, value in (task.get_config("generation_kwargs") or {}).items():
            if key in _NEUTRAL and value not in _NEUTRAL[key]:
                raise M3Error(
                    f"the harness's task {name} wants to generate with {key}={value}, which m3jax does not do: remove "
                    "it from a task file of your own"
                )


def said(error: BaseException, complaints: Sequence[str] = ()) -> str:
    """What an error says, in a line.

    Args:
        error: The error.
        complaints: What was logged before it; the last is added.

    Example:
        >>> said(KeyError(None), ["no such metric"])
        'KeyError: None (no such metric)'
    """
    words = " ".join(str(error).split())[:300].rstrip(". ")
    logged = f" ({' '.join(complaints[-1].split())[:200].rstrip('. ')})" if complaints else ""
    return f"{type(error).__name__}{': ' if words else ''}{words}{logged}"


# --- Task files of others --------------------------------------------------------------------------------------


def check_code_free(manager: Any, name: str) -> None:
    """Check that loading a task runs no code but the harness's own.

    Args:
        manager: The harness's index of tasks.
        name: A task, a group, a tag or a task file.

    Raises:
        M3Error: A task file that is not the harness's own names Python code, or a metric that is fetched as code.
    """
    for path in sorted(_files(manager, name, set())):
        _check_file(path)


def _files(manager: Any, name: str, seen: set[str]) -> set[Path]:
    """The task files behind a name, but for the harness's own; those of a group's or tag's members too."""
    entry = manager.task_index.get(name)
    path = Path(name) if entry is None else entry.yaml_path
    found = set() if path is None else _with_included(path.resolve())
    members = set(entry.tags) if entry is not None and path is None else set()
    for own in found:
        members |= _named_in(_read(own).content) & set(manager.task_index)
    for member in sorted(members - seen, key=str):
        seen.add(member)
        found |= _files(manager, member, seen)
    return found


def _with_included(path: Path) -> set[Path]:
    """A task file and those that it includes, but for the harness's own."""
    found: set[Path] = set()
    left = [path]
    while left:
        path = left.pop()
        try:
            path = path.resolve()
        except (OSError, ValueError, RuntimeError) as error:
            raise M3Error(f"{path} is no name of a task file ({error}): mend what includes it") from error
        if path in found or _is_harness_own(path) or not os.path.exists(path):
            continue
        if not os.path.isfile(path):  # what a pipe says is another thing each time
            raise M3Error(f"{path} is no regular file, as a task file is to be: mend what names it")
        found.add(path)
        included = _entry(_read(path).content, "include")
        left += [path.parent / name for name in _listed(included) if isinstance(name, str)]
    return found


def _is_harness_own(path: Path) -> bool:
    import lm_eval.tasks  # type: ignore[import-untyped, import-not-found, unused-ignore]

    return path.is_relative_to(Path(lm_eval.tasks.__file__).resolve().parent)


# The parser that the harness takes: another one may read the same text otherwise.
_Harness: Any = yaml.CSafeLoader if getattr(yaml, "__with_libyaml__", False) else yaml.SafeLoader


class _Loader(_Harness):  # type: ignore[misc]
    """Makes of a task file what the harness does (of a key that is there twice the last, of `<<` what it merges), but
    for what would run code, which it keeps.
    """

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self.code: list[str] = []

    def keep(self, tag: str, node: yaml.Node) -> None:
        """What is of no kind of plain data, whether anything comes of it or a later key takes its place."""
        self.code.append(f"{tag} {node.value}" if isinstance(node, yaml.ScalarNode) else tag)


yaml.add_multi_constructor("", _Loader.keep, Loader=_Loader)


class _TaskFile(NamedTuple):
    """What a task file says.

    Attributes:
        content: Its data, as the harness takes it, with None for what would run code.
        code: What would run code.
    """

    content: Any
    code: tuple[str, ...]


def _read(path: Path) -> _TaskFile:
    """What a file says; none of its code is run."""
    try:
        loader = _Loader(path.read_bytes())
        try:
            return _TaskFile(loader.get_single_data(), tuple(loader.code))
        finally:
            loader.dispose()
    except (OSError, yaml.YAMLError, *FAULTS) as error:
        raise M3Error(f"{path} is no task file: {' '.join(str(error).split())}") from error


def _values(root: Any) -> list[Any]:
    """Data and all that is in it, each once."""
    found: dict[int, Any] = {}
    left = [root]
    while left:
        one = left.pop()
        if id(one) in found:  # an alias
            continue
        found[id(one)] = one
        if isinstance(one, dict):
            left += [*one.keys(), *one.values()]
        elif isinstance(one, list | tuple | set):
            left += one
    return list(found.values())


def _entry(content: Any, key: str) -> Any:
    """What data says under a key; None where it says nothing."""
    return content.get(key) if isinstance(content, dict) else None


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _named_in(content: Any) -> set[Any]:
    """The tasks and groups that a group has for members, as far as they may be such; a task names none."""
    members = _entry(content, "task")
    return {one for one in _values(members) if isinstance(one, Hashable)} if isinstance(members, list) else set()


def _check_file(path: Path) -> None:
    content, code = _read(path)
    mend = "read it, and allow it with --allow-task-code"
    if code:
        raise M3Error(f"{path} names Python code ({code[0]}), which is not run unasked: {mend}")
    for one in _values(content):
        if isinstance(one, dict):
            if one.get("trust_remote_code", False) is not False:
                raise M3Error(f"{path} wants its data set to run code (trust_remote_code): {mend}")
            if one.get("dataset_path") == "pandas":
                raise M3Error(f"{path} has a data set of pickles, which are programs (dataset_path: pandas): {mend}")
            _check_metric(path, one, mend)


def _check_metric(path: Path, told: Mapping[Any, Any], mend: str) -> None:
    """The package evaluate runs a metric that the harness does not know as code, fetched or from a directory here."""
    from lm_eval.api import metrics, registry  # type: ignore[import-untyped, import-not-found, unused-ignore] # noqa: F401

    name = told.get("metric")
    if isinstance(name, str) and (name not in registry.metric_registry or told.get("hf_evaluate")):
        raise M3Error(f"{path} has the metric {name}, which the harness would fetch and run as code: {mend}")


# --- What is around the harness ----------------------------------------------------------------------------------


@contextlib.contextmanager
def surroundings(tell: Tell | None) -> Iterator[list[str]]:
    """Let the harness run, and leave nothing of it: no setting, no seed, and nothing printed that nobody asked for.

    Args:
        tell: Progress bars are shown only with it.

    Yields:
        The errors that the harness logs, as it goes.
    """
    before = {name: os.environ.get(name) for name in (*_SETTINGS, _LEFT_BY_HARNESS)}
    python, numpy = random.getstate(), np.random.get_state()
    os.environ.update(_SETTINGS)
    random.seed(_RANDOM_SEED)
    np.random.seed(_NUMPY_SEED)
    try:
        # Standard output is for results.
        with (
            _said(tell is not None),
            quiet_hub(),
            _progress_bars(tell is not None),
            _sandboxed_templates(),
            _collected_log() as complaints,
        ):
            yield complaints
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


@contextlib.contextmanager
def _said(shown: bool) -> Iterator[None]:
    """Put what the harness prints on standard error, or nowhere, and its warnings with it."""
    if shown:
        with contextlib.redirect_stdout(sys.stderr):
            yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class _Complaints(logging.Handler):
    """Keeps what is logged as an error."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


@contextlib.contextmanager
def _collected_log() -> Iterator[list[str]]:
    """The errors that the harness logs; Python prints none of it where nobody set up logging."""
    logger, complaints = logging.getLogger("lm_eval"), _Complaints()
    logger.addHandler(complaints)
    try:
        yield complaints.said
    finally:
        logger.removeHandler(complaints)


@contextlib.contextmanager
def _sandboxed_templates() -> Iterator[None]:
    """Keep what stands between braces in a task file from reaching Python: the harness itself would run it."""
    from jinja2.sandbox import SandboxedEnvironment
    from lm_eval import utils  # type: ignore[import-untyped, import-not-found, unused-ignore]

    original = utils.env
    confined = SandboxedEnvironment(
        loader=original.loader,
        undefined=original.undefined,
        keep_trailing_newline=original.keep_trailing_newline,
    )
    confined.filters |= original.filters
    utils.env = confined
    try:
        yield
    finally:
        utils.env = original


@contextlib.contextmanager
def _progress_bars(shown: bool) -> Iterator[None]:
    """Hide the progress bars of the harness and its data library, unless they are to be shown."""
    from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]

    original = tqdm.__init__
    if not shown:
        tqdm.__init__ = functools.partialmethod(original, disable=True)
    try:
        yield
    finally:
        tqdm.__init__ = original
