"""lm-evaluation-harness's tasks, loaded before there is a model, and what the harness needs around it.

The harness (the extra `eval`) is imported only when one of these functions is called.
"""

import contextlib
import functools
import logging
import os
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

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


def load_harness_tasks(names: Sequence[str], include_path: str | None = None, tell: Tell | None = None) -> HarnessTasks:
    """Load tasks of the harness and their data; needs no model.

    Args:
        names: Names of tasks, groups or tags.
        include_path: A directory with further task files.
        tell: Told what is loaded; progress bars are shown only with it.

    Raises:
        M3Error: The harness is not installed, knows no such task, cannot load it, or the task needs what is not here.
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
            found = _load(manager, name, complaints)
            for kind, objects in loaded.items():
                objects |= found[kind]
    return HarnessTasks(tuple(names), loaded)


def _manager(names: Sequence[str], include_path: str | None) -> Any:
    """The harness's index of tasks, without its own where none of them is asked for: reading those takes seconds."""
    from lm_eval.tasks import TaskManager  # type: ignore[import-untyped, import-not-found, unused-ignore]

    try:
        manager = TaskManager(include_path=include_path, include_defaults=include_path is None)
        if include_path is not None and not set(names) <= set(manager.all_subtasks):
            manager = TaskManager(include_path=include_path)
    except Exception as error:  # whatever stands in the task files
        raise M3Error(f"lm-evaluation-harness cannot read its task files: {said(error)}") from error
    for name in names:
        if name not in manager.all_tasks:
            _raise_unknown(name, manager.all_tasks)
    return manager


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
            contextlib.redirect_stdout(sys.stderr),
            quiet_hub(),
            _progress_bars(tell is not None),
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
