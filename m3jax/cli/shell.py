"""From the shell and back: how a command is started, speaks and ends."""

import ctypes
import errno
import gc
import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn, TextIO

import typer

from m3jax.cluster.supervision import Rendezvous, work_together
from m3jax.errors import M3Error
from m3jax.progress import Tell
from m3jax.text import safe_text

BAD_INPUT = 2
_LONGEST_SENTENCE = 4000  # characters
_FAILURE, _INTERRUPTED, _PIPE_CLOSED = 1, 130, 141
_COMPLETING = "_M3JAX_COMPLETE"  # set by the functions that --install-completion gives to shells
_FEW_COLLECTIONS = 300_000  # objects made until garbage is looked for: imports make many, and leave none
_HEAP = {
    "MALLOC_ARENA_MAX": (-8, 1),  # a thread's own gives back what is free whatever is kept
    "MALLOC_MMAP_THRESHOLD_": (-3, 32 << 20),  # bytes of what is mapped apart: the most that glibc takes
    "MALLOC_TRIM_THRESHOLD_": (-1, 128 << 20),  # bytes that are kept at most
}
"""By the variable that sets it too: an option of glibc's heap, as <malloc.h> numbers it, and its value here."""
_CANNOT_PRINT = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def main(app: typer.Typer, arguments: Sequence[str] | None = None) -> int:
    """Runs a command line.

    Args:
        app: The commands.
        arguments: What follows `m3jax`; `None` takes it from the shell.

    Returns:
        The exit code: 0 done, 1 a failure of ours, 2 bad input or a difference found, 130 interrupted, 141 when
        whoever read the output has gone.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started us
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
        _print_anything(getattr(sys, name))
    # To find plugins, pydantic would read the metadata of every package that is installed.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    warnings.showwarning = _say_warning  # type: ignore[assignment]  # its further arguments go on as they come
    return reported(lambda: _invoke(app, given), wants_debug(given))


def run(app: typer.Typer) -> NoReturn:
    """Runs the command line of the shell, and ends the process.

    Args:
        app: The commands.
    """
    gc.set_threshold(_FEW_COLLECTIONS, *gc.get_threshold()[1:])
    _keep_freed_memory()
    code = main(app)
    if code == _INTERRUPTED:  # what JAX still computes would crash the interpreter as it is taken down
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)
    gc.freeze()  # else all that was imported would be looked through as the interpreter is taken down
    sys.exit(code)


def _keep_freed_memory() -> None:
    """Lets glibc use the memory of one chunk for the next; else it gives it back, and all pages are cleared anew."""
    if "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return
    with suppress(AttributeError, OSError, TypeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        for variable, (option, value) in _HEAP.items():
            if variable not in os.environ:
                mallopt(option, value)


def wants_debug(arguments: Sequence[str] = ()) -> bool:
    """Whether tracebacks are to be shown: by an argument, or by the environment."""
    return "--debug" in arguments or os.environ.get("M3JAX_DEBUG", "0") not in ("", "0")


def perform(work: Callable[[bool], None], where: Rendezvous | None, debug: bool) -> None:
    """Do the work of a command here, or with other processes.

    Args:
        work: Told whether this process speaks.
        where: Where the processes meet; None where this is the only one.
        debug: Show the traceback of an error.
    """
    if where is None:
        work(True)
        return
    status = work_together(work, where, lambda part, silent: reported(part, debug, silent))
    if status:
        raise typer.Exit(status)


def reported(work: Callable[[], int | None], debug: bool, silent: bool = False) -> int:
    """The exit code of some work, of which an error is said in a sentence.

    Args:
        work: Gives an exit code other than 0, if there is one.
        debug: Show the traceback of an error.
        silent: Leave the sentence to another process.
    """
    try:
        code = work() or 0
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        _abandon(sys.stdout)
        return _PIPE_CLOSED
    except SystemExit:
        raise
    except BaseException as error:  # panics of libraries in Rust are no Exceptions
        if debug:
            for line in "".join(traceback.format_exception(error)).splitlines():
                say(line, sys.stderr)
        sentence, code = _explain(error)
        if not silent:
            for line in sentence.split("\n") if _is_help(error) else [sentence]:
                say(line, sys.stderr)
        return code


def _invoke(app: typer.Typer, arguments: list[str]) -> int:
    """Runs a command without Typer's own ways of reporting errors."""
    command = typer.main.get_command(app)
    if _COMPLETING in os.environ:  # the shell asks what may come next, and Typer answers and ends
        command.main(arguments, prog_name="m3jax")
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
            return f"m3jax: {_shortened(str(error))}", BAD_INPUT
        case KeyboardInterrupt():
            return f"m3jax: interrupted{f': {error}' if error.args else ''}.", _INTERRUPTED
        case RecursionError():
            return "m3jax: something that was read is nested without end; run with --debug to see where.", BAD_INPUT
        case MemoryError():
            return "m3jax: out of memory; run with --debug to see where.", _FAILURE
        case OSError() if error.filename is None and error.errno in _CANNOT_PRINT:
            return f"m3jax: standard output: {error.strerror}: send it elsewhere; the work itself is done.", BAD_INPUT
        case OSError() if error.filename is not None and error.strerror:
            where = _shortened(str(error.filename))
            return f"m3jax: {where}: {error.strerror}: check the path, its mode and the disk.", BAD_INPUT
    if _is_of_devices(error):
        words = " ".join(str(error).split()).partition(" (set JAX_PLATFORMS")[0].rstrip(".")
        named = f"JAX_PLATFORMS={os.environ['JAX_PLATFORMS']}" if "JAX_PLATFORMS" in os.environ else "JAX"
        reason = f" ({words})" if words else ""
        return f"m3jax: {named} gives no device here{reason}: unset JAX_PLATFORMS, or set it to cpu.", BAD_INPUT
    # Typer hides its usage errors; their methods and exit code are the same in all its versions.
    if hasattr(error, "format_message"):
        return _usage(error), BAD_INPUT
    words = " ".join(str(error).split())
    return f"m3jax: unexpected {type(error).__name__}{f': {words}' if words else ''}; run with --debug.", _FAILURE


def _is_of_devices(error: BaseException) -> bool:
    """Whether JAX could not begin with the devices that it was told to use."""
    files = (Path(frame.f_code.co_filename) for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(file.stem == "xla_bridge" and "jax" in file.parts for file in files)


def _shortened(sentence: str) -> str:
    """A sentence without the middle of what a file made too long to read; its end is the mend."""
    half = _LONGEST_SENTENCE // 2
    return sentence if len(sentence) <= _LONGEST_SENTENCE else f"{sentence[:half]} … {sentence[-half:]}"


def _usage(error: Any) -> str:
    """The sentence for a command line that cannot be read; all of the help where nothing was asked."""
    message: str = error.format_message()
    if _is_help(error):
        return message
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "m3jax"
    said = f"m3jax: {' '.join(message.split()).rstrip('.')}"
    if (key := _key_of_recipe(command, getattr(error, "option_name", ""))) is not None:
        return f"{said}; {key} is a key of recipes, which --set {key}=VALUE changes."
    return f"{said}; see `{command} --help`."


def _key_of_recipe(command: str, option: str) -> str | None:
    """The key of recipes that an unknown option of a command that reads one is called as, if it is."""
    key = option.lstrip("-").replace("-", "_")
    if command.rpartition(" ")[2] not in ("merge", "explore") or not key:
        return None
    from m3jax.recipe.schema import Recipe

    return key if key in Recipe.model_fields else None


def _is_help(error: BaseException) -> bool:
    """Whether what is said of an error is the help, which has lines."""
    return type(error).__name__ == "NoArgsIsHelpError"


def say(line: str, stream: TextIO) -> None:
    """Prints a line, in one piece, in which nothing that a file holds can steer the terminal."""
    stream.write(f"{safe_text(line)}\n")


_show = warnings.showwarning


def _say_warning(message: Warning | str, category: type[Warning], *where: Any) -> None:
    """Says a warning of ours as a note; one of others as Python does."""
    if category.__module__.partition(".")[0] == "m3jax":
        say(f"note: {message}", sys.stderr)
    else:
        _show(message, category, *where)


def _print_anything(stream: TextIO) -> None:
    """Lets file names that are no text, or letters that the terminal lacks, be printed escaped."""
    with suppress(AttributeError):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[attr-defined]


def _abandon(stream: TextIO) -> None:
    """Points a stream whose reader has gone to nowhere, so that Python does not complain at exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


# --- What commands say ------------------------------------------------------------------------------------------


def silence_downloads(quiet: bool) -> None:
    """Keeps the hub client's own progress bars away; it reads this when it is imported.

    Args:
        quiet: Whether to.
    """
    if quiet:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"


@contextmanager
def resumable(out: str, known: str | None = None, step: int | None = None) -> Iterator[None]:
    """Says, when a merge is interrupted, what of its work is kept.

    Args:
        out: Where its output was to appear.
        known: What is kept, where that is known; found from what there is if None.
        step: Which step of `out` it was to be, if any.
    """
    try:
        yield
    except KeyboardInterrupt:
        if known is not None:
            raise KeyboardInterrupt(known) from None
        from m3jax.checkpoints.remote import is_url

        command = "the same command" if step is None else f"the same command with --step {step}"
        if is_url(out):
            whole = out if step is None else f"{out} for step {step}"
            kept = f"what has been sent to {whole} is kept, and {command} resumes"
        elif places := [str(place) for target in _targets(out, step) for place in _made_in(target) if place.exists()]:
            kept = f"what is finished is in {' and '.join(places)}, and {command} resumes"
        else:
            kept = "nothing is kept"
        raise KeyboardInterrupt(kept) from None


def _targets(out: str, step: int | None) -> list[Path]:
    """Where an output may have been about to appear."""
    from m3jax.checkpoints.orbax_tree import STEPS

    return [Path(out)] if step is None else [Path(out) / str(step), Path(out) / STEPS / str(step)]


def _made_in(target: Path) -> tuple[Path, Path]:
    """Where an output is made before it appears."""
    from m3jax.outputs.places import intermediates_directory, partial_directory

    return partial_directory(target), intermediates_directory(target)


def print_notes(notes: Iterable[str], quiet: bool) -> None:
    """Prints what a user should know, on standard error."""
    for note in () if quiet else notes:
        say(f"note: {note}", sys.stderr)


def teller(quiet: bool) -> Tell | None:
    """What is told how far the work is: it prints lines on standard error; None if `quiet`."""
    return None if quiet else _print_progress


def _print_progress(line: str) -> None:
    say(line, sys.stderr)


def print_result(
    data: Callable[[], dict[str, Any] | list[Any]],
    lines: Callable[[], Iterable[str]],
    as_json: bool,
    quiet: bool = False,
) -> None:
    """Prints a result on standard output, as JSON, or as lines unless `quiet`; only what is wanted is made."""
    if as_json:
        print_json(data())
    elif not quiet:
        for line in lines():
            say(line, sys.stdout)


def print_json(data: dict[str, Any] | list[Any]) -> None:
    """Prints JSON, on standard output."""
    print(json.dumps(data, indent=2, allow_nan=False))
