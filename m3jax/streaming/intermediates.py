"""Merges that a merge starts from, the other documents of its recipe: made beside its output, and used again.

Each is a whole output with a manifest of its own, in OUT.intermediates, until OUT is there. A merge that is resumed
takes those that are still what it would make: of the same recipe, inputs and versions, with the same bytes.
"""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from m3jax.checkpoints import write_index, write_outline
from m3jax.checkpoints.formats import SAFETENSORS
from m3jax.checkpoints.locate import scratch
from m3jax.checkpoints.remote import RemotePath
from m3jax.cluster.processes import Processes, share
from m3jax.errors import M3Error
from m3jax.outputs import companions, manifest
from m3jax.outputs.local import settle
from m3jax.outputs.places import check_apart, check_free, intermediates_directory
from m3jax.outputs.remote import check_remote_free
from m3jax.outputs.spent import conclude, finish, told_of_intermediate
from m3jax.outputs.verification import verify
from m3jax.recipe import Recipe
from m3jax.streaming.jobs import MergeJob, Ready, prepare

if TYPE_CHECKING:
    from m3jax.streaming.merging import MergeResult


def outlined(job: MergeJob, processes: Processes) -> MergeJob:
    """A merge that takes outlines for the merges that it starts from: right in all but their weights.

    Args:
        job: The merge.
        processes: Who works at it.

    Raises:
        M3Error: One of these merges cannot be made.
    """
    for recipe in job.recipe.needed:
        directory = Path(tempfile.mkdtemp(dir=scratch())) / "model"
        with _saying(recipe), ExitStack() as stack:
            ready = prepare(_own_job(job, recipe, directory), processes, stack)
            _write_outline(ready, recipe, directory)
        job = _with_model(job, recipe, directory)
        job = job._replace(outlined={**job.outlined, str(recipe.name): ready.identity})
    return job


def _write_outline(ready: Ready, recipe: Recipe, directory: Path) -> None:
    """What a merge would write, with holes for weights."""
    directory.mkdir()
    for file, infos in ready.shards:
        write_outline(directory / file, infos)
    if len(ready.shards) > 1:
        write_index(directory, ready.shards, sum(tensor.output.nbytes for tensor in ready.plan.tensors))
    files, weights = (ready.companions, ready.digests), ready.plan.weights
    companions.write_companions(directory, *files, recipe, weights, picked=ready.picked, unties=ready.unties)


def _own_job(job: MergeJob, recipe: Recipe, out: Path) -> MergeJob:
    """The merge of an intermediate, as a replay's where it is for one."""
    recorded = None if job.recorded is None else job.recorded["intermediates"][recipe.name]
    own = job._replace(recipe=recipe, out=out, overwrite=True, recorded=recorded, chosen=None)
    return own._replace(format=SAFETENSORS.name, as_step=False, said=())  # what is said of the format is of the output


def _with_model(job: MergeJob, recipe: Recipe, place: Path) -> MergeJob:
    return job._replace(sources={**job.sources, str(recipe.name): str(place)})


@contextmanager
def _saying(recipe: Recipe) -> Iterator[None]:
    """Says of which document a sentence is."""
    try:
        yield
    except M3Error as error:
        raise M3Error(f"{recipe.name}: {error}") from (error.__cause__ or error)


def with_intermediates(
    job: MergeJob, processes: Processes, merge: Callable[[MergeJob, Processes], "MergeResult"]
) -> "MergeResult | None":
    """Make the merges that one starts from, then it.

    Args:
        job: The merge.
        processes: Who works at it.
        merge: Makes a merge of which all models are there.

    Returns:
        What was done; None where the same was, and only what it had left was to be removed.

    Raises:
        M3Error: One of them cannot be made; before any is, if headers tell.
    """
    if isinstance(job.out, RemotePath):
        check_remote_free(job.out, job.overwrite)
        raise M3Error(
            f"{job.out}: is in remote storage, and merges of several documents are made on this disk: give a directory"
            " here, then copy it"
        )
    if processes.index == 0:
        check_free(job.out, job.overwrite)
    with ExitStack() as stack:  # what is wrong with the last merge shows before the first is made
        ready = prepare(outlined(job, processes), processes, stack)
        for source in ready.sources:
            check_apart(intermediates_directory(job.out), source.place, source.checkpoint.files())
    place = intermediates_directory(job.out)
    done = processes.index == 0 and finish(job.out, ready.identity) and not verify(job.out).differences
    if processes.index == 0 and done:
        settle(job.out, ready.identity)
    elif processes.index == 0:
        place.mkdir(exist_ok=True)
    if share(processes, done):  # which waits for it
        return None
    results = []
    for number, recipe in enumerate(job.recipe.needed):
        out = place / f"{number}-{quote(str(recipe.name), safe=' ')[:80]}"
        with _saying(recipe):
            record, result = _made(_own_job(job, recipe, out), processes, merge)
        results += [result] if result is not None else []
        job = _with_model(job, recipe, out)._replace(made={**job.made, str(recipe.name): record})
    last = merge(job._replace(whole=ready.identity), processes)
    if processes.index == 0:
        conclude(job.out)
    if processes.index == 0 and os.path.lexists(place):
        last = last._replace(notes=(*last.notes, f"{place} holds what is not of the merges that were made there"))
    together = [*results, last]
    return last._replace(
        seconds=sum(result.seconds for result in together),
        bytes_read=sum(result.bytes_read for result in together),
        bytes_written=sum(result.bytes_written for result in together),
        resumed_shards=sum(result.resumed_shards for result in together),
        notes=tuple(dict.fromkeys(note for result in (last, *results) for note in result.notes)),
        process_reads=tuple(map(sum, zip(*(result.process_reads for result in together), strict=True))),
    )


def _made(
    job: MergeJob, processes: Processes, merge: Callable[[MergeJob, Processes], "MergeResult"]
) -> tuple[dict[str, Any], "MergeResult | None"]:
    """The manifest of a merge that is made now, or was before, and what making it now took."""
    with ExitStack() as stack:
        identity = prepare(job, processes, stack).identity
    told = told_of_intermediate(job.out)
    if share(processes, processes.index == 0 and _is_made(job.out, told, identity)):
        return manifest.read(job.out), None
    if processes.index == 0:
        told.unlink(missing_ok=True)
    result = merge(job, processes)
    if processes.index == 0:
        told.write_text(identity, encoding="utf-8")
    return result.manifest, result


def _is_made(out: Path, told: Path, identity: str) -> bool:
    """Whether a merge is there as it would be made."""
    try:
        return told.read_text(encoding="utf-8") == identity and not verify(out).differences
    except (OSError, ValueError, M3Error):
        return False
