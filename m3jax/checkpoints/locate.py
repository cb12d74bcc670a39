"""From what a user calls a model to the directory that holds it, and the files that travel with weights."""

import atexit
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from blake3 import blake3

from m3jax.checkpoints.formats import MSGPACK, PUBLISHED
from m3jax.checkpoints.remote import RemotePath, absent, as_path, is_url
from m3jax.checkpoints.runs import split_step, step_name, step_place
from m3jax.checkpoints.storage import exists, is_dir, is_file, list_names
from m3jax.checkpoints.trust import check_companion, check_size, read_companion
from m3jax.documents import parse_json
from m3jax.errors import M3Error, saying_what_failed

_HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+)(@(?P<revision>[^@\s]+))?", re.ASCII)
CONFIG = "config.json"
_COMMIT = re.compile("[0-9a-f]{40}")

_SMALL = ["*.json", "*.jinja", "*.txt", "*.model", "tokenizer.model.*", "*.tiktoken"]

_COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer*.json",
    "tokenizer.model",
    "tokenizer.model.*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tekken.json",
    "*.tiktoken",
    "spiece.model",
    "sentencepiece*.model",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "preprocessor_config.json",
    "processor_config.json",
    "image_processor_config.json",
    "video_preprocessor_config.json",
)


_TEMPLATES = "additional_chat_templates"

_AnyPath = TypeVar("_AnyPath", bound=Path)


class ModelDirectory(NamedTuple):
    """A model that was found.

    Attributes:
        name: What the user wrote.
        path: Where its files are: a directory, or a single weight file; a `RemotePath` for a URL.
        revision: The commit that was fetched from the hub; `None` elsewhere.
        adapter: What is to be added to it, where it was named with an adapter.
    """

    name: str
    path: Path
    revision: str | None
    adapter: "ModelDirectory | None" = None


def locate_model(name: str) -> ModelDirectory:
    """Finds a model in remote storage, on this disk, or else on the Hugging Face hub, from where it is fetched.

    Args:
        name: A URL such as `s3://bucket/model` or `gs://bucket/model`, whose weights stay where they are; a local
            path; or a hub id: `org/name` or `org/name@revision`. A path that exists here wins over a hub id. The path
            or URL of a run means its last finished step, and `RUN@2000` that one. Two of them joined by a plus,
            `model+adapter`, are a model and a LoRA adapter to be added to it; see `split_adapter`.

    Returns:
        The model's place; with `HF_HUB_OFFLINE=1` a hub id is looked up in the hub cache only.

    Raises:
        M3Error: There is nothing of that name here, and the hub cache and the hub do not give it; or the storage
            does not have it, refuses it or cannot be reached.

    Example:
        >>> locate_model(".").path
        PosixPath('.')
    """
    if (parts := split_adapter(name)) is not None:
        return _with_adapter(name, parts, locate_model)
    if is_url(name):
        return ModelDirectory(name, _locate_remote(name), None)
    step = step_place(name)
    if step is not None:
        return ModelDirectory(name, step, None)
    local = Path(os.path.expanduser(name))
    if name and exists(local):
        return ModelDirectory(name, local, None)
    hub_id = _HUB_ID.fullmatch(name)
    if hub_id is None:
        left = local.with_name(f"{local.name}.partial") if local.name else local
        begun = f"; {left} is what an interrupted command has left, and goes on with" if exists(left) else ""
        raise M3Error(f"{name!r} does not exist here and is no hub id either{begun}: give a path or 'org/name'.")
    with _hub(name, hub_id["revision"]):
        snapshot = _fetch(hub_id["repo"], hub_id["revision"])
    return ModelDirectory(name, snapshot, _commit_of(snapshot, hub_id["revision"]))


def _locate_remote(name: str) -> Path:
    """The place of a model in remote storage."""
    remote = as_path(name)
    if not isinstance(remote, RemotePath):
        return remote
    told = remote.info()
    step = None if told is not None and told["type"] == "file" else step_place(name)
    if step is None and told is None:
        raise absent(remote)
    return step or remote


class AdaptedName(NamedTuple):
    """What a model with an adapter is called by."""

    model: str
    adapter: str


def split_adapter(name: str) -> AdaptedName | None:
    """The two names in `model+adapter`.

    What exists under the whole name is one model, whatever is in it, and so is a step of a run; else the last plus
    between two that each exist here, are a URL, a step or can be hub ids stands between them; else the last plus.

    Args:
        name: What a user calls a model.

    Returns:
        Them; None where it is one name.

    Example:
        >>> split_adapter("org/base@main+org/adapter@v1")
        AdaptedName(model='org/base@main', adapter='org/adapter@v1')
        >>> split_adapter("org/base") is None
        True
    """
    if "+" not in name or exists(os.path.expanduser(name)) or split_step(name) is not None:
        return None
    if is_url(name) and name.count("://") == 1 and _exists_remotely(name):
        return None
    splits = [AdaptedName(name[:at], name[at + 1 :]) for at, letter in enumerate(name) if letter == "+"]
    likely = [split for split in splits if all(map(_may_be_model, split))]
    if not likely and _HUB_ID.fullmatch(name):
        return None  # a revision with a plus
    possible = [split for split in likely or splits if all(split)]
    return possible[-1] if possible else None


def _exists_remotely(name: str) -> bool:
    remote = as_path(name)
    return isinstance(remote, RemotePath) and remote.info() is not None


def _may_be_model(name: str) -> bool:
    local = exists(os.path.expanduser(name)) if name else False
    return local or is_url(name) or split_step(name) is not None or _HUB_ID.fullmatch(name) is not None


def step_named(name: str) -> str:
    """A model's name with the steps that it means, of runs that leave them open: its own, and its adapter's.

    Args:
        name: As a user wrote it.

    Raises:
        M3Error: As `step_place`.
    """
    parts = split_adapter(name)
    return step_name(name) if parts is None else f"{step_named(parts.model)}+{step_named(parts.adapter)}"


def _with_adapter(name: str, parts: AdaptedName, locate: Callable[[str], ModelDirectory]) -> ModelDirectory:
    """A model and its adapter, found."""
    try:
        model, adapter = locate(parts.model), locate_model(parts.adapter)
    except M3Error as error:
        raise M3Error(f"{name}: {error}") from (error.__cause__ or error)
    if model.adapter is not None or adapter.adapter is not None:
        raise M3Error(
            f"{name}: names two adapters: add one to the model by m3jax convert, and the other to what it makes."
        )
    return model._replace(name=name, adapter=adapter)


def locate_recorded(
    name: str, sources: Mapping[str, str], locate: Callable[[str], ModelDirectory] = locate_model
) -> ModelDirectory:
    """Finds a model that a manifest records.

    Args:
        name: As it is recorded.
        sources: Where models are now that have moved, by recorded name.
        locate: Finds a model by what a user would write.

    Returns:
        The place, called as it is recorded.

    Raises:
        M3Error: It is not there; the sentence says whose word for the place was taken.
    """
    here = sources.get(name, name)
    try:
        return locate(here)._replace(name=name)
    except M3Error as error:
        said = str(error).rstrip(".")
        if name in sources:
            raise M3Error(f"{said}; this is where --input {name}={here} says that {name} is: correct it") from error
        raise M3Error(f"{said}; if it has moved, --input {name}=HERE says where it is") from error


def sketch_model(name: str) -> ModelDirectory:
    """Finds a model of which headers and small files are all that is wanted: no weights are fetched from the hub.

    Args:
        name: As `locate_model` takes it.

    Returns:
        The model's place. For a hub model it is a directory whose weight files have headers, but no content; it is
        deleted when the process ends.

    Raises:
        M3Error: As `locate_model`.
    """
    if (parts := split_adapter(name)) is not None:
        return _with_adapter(name, parts, sketch_model)
    hub_id = _HUB_ID.fullmatch(name)
    if is_url(name) or hub_id is None or split_step(name) or exists(os.path.expanduser(name)):
        return locate_model(name)
    from huggingface_hub import constants, errors, get_safetensors_metadata, snapshot_download

    if constants.HF_HUB_OFFLINE:
        return locate_model(name)
    repo, revision = hub_id["repo"], hub_id["revision"]
    sketch = Path(tempfile.mkdtemp(dir=scratch()))
    with _hub(name, revision):
        snapshot = Path(snapshot_download(repo, revision=revision, allow_patterns=_SMALL))
        commit = _commit_of(snapshot, revision)
        try:
            files = get_safetensors_metadata(repo, revision=commit).files_metadata
        except errors.NotASafetensorsRepoError:
            from m3jax.checkpoints.hub import outline_pytorch

            files = {}
            if not outline_pytorch(repo, commit, sketch, (MSGPACK,)):
                return locate_model(name)
    with saying_what_failed(name):
        for path in (path for pattern in _SMALL for path in snapshot.glob(pattern)):
            shutil.copyfile(path, sketch / path.name)
        for file, header in files.items():
            _write_outline(sketch / file, header)
    return ModelDirectory(name, sketch, commit)


def _write_outline(path: Path, header: Any) -> None:
    """A sparse safetensors file with this header and zeros."""
    tensors = {
        name: {"dtype": told.dtype, "shape": list(told.shape), "data_offsets": list(told.data_offsets)}
        for name, told in header.tensors.items()
    }
    text = json.dumps({"__metadata__": header.metadata or {}, **tensors}).encode()
    end = max((told.data_offsets[1] for told in header.tensors.values()), default=0)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def _commit_of(snapshot: Path, revision: str | None) -> str | None:
    return snapshot.name if _COMMIT.fullmatch(snapshot.name) else revision


def _fetch(repo: str, revision: str | None) -> Path:
    """The directory of a hub model, downloaded where it is not yet in the cache."""
    from huggingface_hub import snapshot_download  # imports an HTTP client: only when a hub id is asked for

    patterns: list[str] = []
    for names in PUBLISHED:  # not all at once: most models have the same weights in several formats
        patterns += names
        snapshot = Path(snapshot_download(repo, revision=revision, allow_patterns=[*patterns, *_SMALL]))
        if any(file for pattern in patterns for file in snapshot.glob(pattern)):
            break
    return snapshot


@contextmanager
def _hub(name: str, revision: str | None) -> Iterator[None]:
    """Says in a sentence what goes wrong at the hub."""
    try:
        yield
    except M3Error:
        raise
    except Exception as error:  # the client lets through errors of whichever HTTP library it uses
        # Not the client's own words: they run over many lines and may repeat a URL in full.
        raise M3Error(f"{name!r} does not exist here and {_hub_failure(error, revision)}.") from error


def _hub_failure(error: Exception, revision: str | None) -> str:
    """What went wrong at the hub and the mend, as the rest of a sentence."""
    from huggingface_hub import constants, errors

    match error:
        case errors.GatedRepoError():
            return "is gated on the hub: accept its terms on its page, then `hf auth login`"
        case errors.RepositoryNotFoundError():
            return "the hub shows no such model: check the spelling, or `hf auth login` if it is private"
        case errors.RevisionNotFoundError():
            return f"the hub's model has no revision {revision!r}: name a branch, tag or commit that it has"
        case errors.HFValidationError():
            return "is no valid hub id either: give a path or 'org/name'"
        case _ if constants.HF_HUB_OFFLINE:
            return "is not complete in the hub cache: unset HF_HUB_OFFLINE to fetch it, or give a path"
        case errors.LocalEntryNotFoundError():
            return "the hub cannot be reached and its cache lacks it: check the network, or give a path"
        case _:
            kind = type(error).__name__
            return f"could not be fetched from the hub ({kind}): check network and disk, or give a path"


def companions(directory: Path) -> list[Path]:
    """The files beside a model's weights that a model merged from it needs too.

    Args:
        directory: A model directory.

    Returns:
        Paths of local files (configuration, tokenizer, chat templates, processors), sorted, each under `directory`,
        or for a remote one each a copy; never weights, model cards or code.

    Raises:
        M3Error: The directory cannot be listed, a remote one cannot be read, or a file is none of the model's own;
            see `check_companion`.
    """
    if isinstance(directory, RemotePath):
        directory = download_companions(directory)
    found = sorted(path for path in _like_companions(directory) if not is_dir(path))
    for path in found:
        check_companion(path, directory)
    return found


def named_companions(model: Path) -> dict[str, Path]:
    """The companions of a model by their names under its directory.

    Args:
        model: A model directory, or a weight file in one.

    Returns:
        As `companions` gives them.

    Raises:
        M3Error: As `companions`.
    """
    directory = model if is_dir(model) else model.parent
    if isinstance(directory, RemotePath):
        directory = download_companions(directory)
    return {str(path.relative_to(directory)): path for path in companions(directory)}


def digest_companions(model: Path) -> dict[Path, str]:
    """The digests of a model's companions on this disk, by their paths; of a remote one none.

    Args:
        model: A model directory, or a weight file in one.

    Raises:
        M3Error: As `companions`.
    """
    directory = model if is_dir(model) else model.parent
    if isinstance(directory, RemotePath):
        return {}
    return {path: blake3(read_companion(path, directory)).hexdigest() for path in companions(directory)}


def read_config(model: Path) -> dict[str, Any] | None:
    """A model's config.json; None where there is none.

    Args:
        model: Its directory.

    Raises:
        M3Error: It is not a JSON object, or not the model's own; see `check_companion`.
    """
    path = model / CONFIG
    remote = isinstance(path, RemotePath)
    if not remote and os.path.lexists(path) and not is_dir(path):
        check_companion(path, model)
    if not is_file(path):
        return None
    try:
        config = parse_json(path.read_bytes() if remote else read_companion(path, model))
    except ValueError as error:
        raise M3Error(f"{path}: is not JSON ({error}): restore the file") from None
    except OSError as error:
        raise M3Error(f"{path}: cannot be read: {error.strerror}: check the file") from error
    if not isinstance(config, dict):
        raise M3Error(f"{path}: is not a JSON object: restore the file")
    return config


def download_companions(directory: RemotePath) -> Path:
    """Copies the companions of a remote model to this disk.

    Args:
        directory: A remote model directory.

    Returns:
        A directory with the copies under their names; it is deleted when the process ends.

    Raises:
        M3Error: The directory cannot be listed or read.
    """
    copies = Path(tempfile.mkdtemp(dir=scratch()))
    for path in _like_companions(directory):
        if is_file(path):
            check_size(path, path.stat().st_size)
            copy = copies / path.key.relative_to(directory.key)
            copy.parent.mkdir(exist_ok=True)
            copy.write_bytes(path.read_bytes())
    return copies


def _like_companions(directory: _AnyPath) -> list[_AnyPath]:
    """What is in a directory under the names that companions have."""
    names = list_names(directory)
    if _TEMPLATES in names and is_dir(directory / _TEMPLATES):
        names += [f"{_TEMPLATES}/{name}" for name in list_names(directory / _TEMPLATES)]
    return [directory / name for name in names if any(fnmatchcase(name, pattern) for pattern in _COMPANIONS)]


@cache
def scratch() -> str:
    """A directory for the copies that this process makes; it is deleted when the process ends."""
    directory = tempfile.mkdtemp(prefix="m3jax-")
    atexit.register(_remove_scratch, directory, os.getpid())
    return directory


def _remove_scratch(directory: str, owner: int) -> None:
    if os.getpid() == owner:  # a process that was forked from it leaves it
        shutil.rmtree(directory, ignore_errors=True)
