"""push(): an output sent to the hub, if it is what its manifest tells, and nothing but what that lists."""

import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from m3jax.checkpoints.remote import RemotePath, as_path
from m3jax.checkpoints.standing_in import CONVERSION, STATISTICS
from m3jax.errors import M3Error
from m3jax.outputs import manifest, mark
from m3jax.outputs.verification import Report, is_of_conversion, verify
from m3jax.text import count_text, size_text

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*(?<![.-])", re.ASCII)  # as the hub has it
_PLACE = re.compile(  # an absolute path; none of a URL, of a link within the hub, or of a tag
    r"""(?<![\w/:.~\\<>}-])(?<!\]\()(?:file:/+|~/|/|[A-Za-z]:\\)[^\s/\\`"'()<>|,;][^\s`"'()<>|,;]*""", re.ASCII
)


class PushResult(NamedTuple):
    """What was sent, or would be.

    Attributes:
        repository: `org/name` on the hub.
        private: Whether it was asked to be private.
        files: Names and bytes, in the order of names.
        digest: BLAKE3 of the weights.
        notes: What verifying the output said beside, and what names places on this machine.
        url: Of the commit; None where nothing was sent.
    """

    repository: str
    private: bool
    files: tuple[tuple[str, int], ...]
    digest: str
    notes: tuple[str, ...]
    url: str | None

    def __repr__(self) -> str:
        told = f"{count_text(len(self.files), 'file')}, {size_text(sum(size for _, size in self.files))}"
        return f"PushResult({self.repository}, {told}, {'not sent' if self.url is None else self.url})"


def push(
    directory: str | os.PathLike[str],
    repository: str,
    *,
    private: bool = False,
    dry_run: bool = False,
    endpoint: str | None = None,
    token: str | None = None,
    progress: Report | None = None,
) -> PushResult:
    """Send an output of m3jax to the hub, in one commit, once every byte of it is verified.

    Sent are the files that the manifest lists, the manifest, README.md and a signature; never what stands beside them,
    and no link.

    Args:
        directory: What `m3jax merge`, `replay` or `convert` wrote, as safetensors.
        repository: `org/name`; made where it is not there.
        private: Make it private. One that is there and public is then refused.
        dry_run: Verify and list, and send nothing.
        endpoint: The hub's address; that of the environment (`HF_ENDPOINT`) if None.
        token: To send with; that of `hf auth login` or `HF_TOKEN` if None.
        progress: Called while the output is verified.

    Raises:
        M3Error: The directory is not as recorded or cannot be sent as it is, or the hub refuses it.
    """
    _check_name(repository)
    place = as_path(directory)
    if isinstance(place, RemotePath):
        raise M3Error(f"{place}: is not on this disk: push from a directory here")
    found = verify(place, progress=progress)
    if found.differences or found.digest is None:
        raise M3Error(
            f"{found.directory}: is not as recorded and is not sent ({found.differences[0]}): m3jax verify names all"
        )
    own = CONVERSION if is_of_conversion(found.directory) else manifest.FILE_NAME
    told = mark.read(found.directory) if own == CONVERSION else manifest.read(found.directory)
    files = tuple((name, _size(found.directory, name)) for name in _listed(found.directory, own, told))
    notes = (*found.notes, *_places_told(found.directory, own, told))
    result = PushResult(repository, private, files, found.digest, notes, None)
    return result if dry_run else result._replace(url=_send(found.directory, result, endpoint, token))


def _places_told(place: Path, record: str, told: Mapping[str, Any]) -> list[str]:
    """Notes where the model card or the record names directories of this machine, which few mean to publish."""
    inputs = [match[0] for entry in told["inputs"] if (match := _PLACE.match(str(entry["name"]))) is not None]
    notes = []
    if manifest.README in told["output"]["files"]:
        lines = (place / manifest.README).read_text(encoding="utf-8", errors="replace").splitlines()
        found = [f"{number} ({match[0]})" for number, line in enumerate(lines, 1) if (match := _PLACE.search(line))]
        if found:
            notes.append(
                f"{manifest.README} names places on this machine, which will be public: line {', '.join(found)}; it "
                "may be edited before it is sent"
            )
    if inputs:
        notes.append(
            f"{record} names {', '.join(dict.fromkeys(inputs))}, as it records what was read, and is sent as it is: "
            "name models by hub ids or relative paths where that must not be public"
        )
    return notes


def _check_name(repository: str) -> None:
    if _NAME.fullmatch(repository) is None or "--" in repository or ".." in repository:
        raise M3Error(f"{repository!r} is no name of a repository of the hub: write org/name")


def _listed(place: Path, record: str, told: Mapping[str, Any]) -> list[str]:
    """The names that are sent, as the manifest, or what tells of a conversion, lists them."""
    of_conversion, output = record == CONVERSION, told["output"]
    written = told["format"] if of_conversion else output.get("format", "safetensors")
    if written != "safetensors":
        raise M3Error(f"{place}: is {written}, which loaders of the hub do not read: m3jax convert it to safetensors")
    if STATISTICS in told:
        raise M3Error(f"{place}: are statistics of a model, and no model: push the merge that is made with them")
    if not of_conversion and "weight_files" not in output:
        raise M3Error(f"{place}: its manifest is of a version that does not list all files: m3jax replay it first")
    signed = {name for name in (manifest.SIGNATURE,) if os.path.lexists(place / name)}
    return sorted({*output["files"], *output.get("weight_files", ()), *output.get("links", ()), record, *signed})


def _size(place: Path, name: str) -> int:
    """The bytes of a file that is of the directory itself, on the way to which there is no link."""
    path = place
    for part in Path(name).parts:
        path /= part
        mode = path.lstat().st_mode
        if stat.S_ISLNK(mode):
            raise M3Error(f"{path}: is a link, and links are not sent: put the file itself there")
    if not stat.S_ISREG(mode):
        raise M3Error(f"{path}: is no regular file and is not sent: m3jax replay makes the output again")
    return path.stat().st_size


def _send(place: Path, what: PushResult, endpoint: str | None, token: str | None) -> str:
    from huggingface_hub import CommitOperationAdd, HfApi

    api: Any = HfApi(endpoint=endpoint, token=token, library_name="m3jax")
    adding = [CommitOperationAdd(name, str(place / name)) for name, _ in what.files]
    try:
        api.create_repo(what.repository, private=what.private or None, exist_ok=True)
        is_open = what.private and not api.repo_info(what.repository).private
        if not is_open:
            message = f"m3jax: weights {what.digest[:12]}"
            return str(api.create_commit(what.repository, adding, commit_message=message).commit_url)
    except Exception as error:  # the client lets through errors of whichever HTTP library it uses
        raise M3Error(f"{what.repository}: could not be sent to: {_failure(error)}") from error
    raise M3Error(f"{what.repository}: is there and public: make it private on its page, or leave out --private")


def _failure(error: Exception) -> str:
    """What went wrong at the hub, and the mend."""
    from huggingface_hub import constants, errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set: unset it"
    if status in (401, 403) or isinstance(error, errors.LocalTokenNotFoundError):
        return "the hub does not let you write there: `hf auth login` with a token that may, or set HF_TOKEN"
    told = f"{type(error).__name__}{f', status {status}' if status else ''}"
    return f"the hub or the way to it failed ({told}): check the network, and run the same command again"
