"""Merges written as Orbax: made of their finished safetensors, read back, and told of in the manifest.

A merge fills safetensors first, because those resume shard by shard, where the database of Orbax is one whole. At the
end they become Orbax, chunk by chunk, where the output is made, so that it still appears by one rename; until then the
disk holds the weights twice.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from m3jax.checkpoints import Checkpoint, TensorInfo, digest_file, digest_tensor, open_safetensors
from m3jax.checkpoints.formats import ORBAX, SAFETENSORS
from m3jax.checkpoints.locate import split_adapter
from m3jax.checkpoints.opening import recognise
from m3jax.checkpoints.orbax_template import (
    DEFAULT_ITEM,
    Template,
    file_patterns,
    read_template,
    tree_of,
    without_state,
)
from m3jax.checkpoints.orbax_tree import STEPS, is_item
from m3jax.checkpoints.orbax_writer import check_tree, fill_with_orbax
from m3jax.checkpoints.remote import RemotePath
from m3jax.checkpoints.runs import find_run, split_step
from m3jax.checkpoints.views import renamed
from m3jax.errors import M3Error, saying_what_failed
from m3jax.outputs.local import intermediates_directory, is_own, partial_directory
from m3jax.outputs.written import open_written, varying_files
from m3jax.progress import Progress


class OrbaxOutput(NamedTuple):
    """How a merge is written as Orbax.

    Attributes:
        template: What its tree and layout are taken from; None for a tree of dicts.
        item: What its item is called in the step that it is; empty where it is no step.
        names: What each tensor is called in the tree, by its name in the merge.
    """

    template: Template | None
    item: str
    names: Mapping[str, str]

    @property
    def patterns(self) -> tuple[str, ...]:
        """Patterns of all its files."""
        return file_patterns(self.template, self.names.values())

    @property
    def trees_beside(self) -> list[str]:
        """The names of the other trees of its step."""
        beside = self.template.beside if self.template is not None else ()
        return [path.name for path in beside if path.is_dir() and is_item(path)]

    @property
    def size_beside(self) -> int:
        """Bytes of what is copied from the template's step."""
        beside = self.template.beside if self.template is not None else ()
        files = (file for path in beside for file in (path.rglob("*") if path.is_dir() else [path]))
        return sum(file.stat().st_size for file in files if file.is_file())

    def to_json(self) -> dict[str, Any]:
        """What the manifest says of it."""
        others = {name: stored for name, stored in self.names.items() if name != stored}
        return {"format": ORBAX.name, "item": self.item, **({"stored": others} if others else {})}


def plan_orbax(
    template: Path, state: Path | None, names: Mapping[str, str], tensors: Sequence[TensorInfo], as_step: bool
) -> OrbaxOutput:
    """How a merge is to be written as Orbax.

    Args:
        template: The model whose tree it gets; a tree of dicts where it is not of Orbax.
        state: The model that the training's state is taken from, if it is kept.
        names: What each tensor is called in the tree, by its name in the merge.
        tensors: What is written.
        as_step: Write a step with an item, whatever the template is.

    Raises:
        M3Error: The names make no tree, or have no place in the template's.
    """
    stored = {names[info.name]: info._replace(name=names[info.name]) for info in tensors}
    if len(stored) < len(tensors):
        twice = next(info.name for info in tensors if list(names.values()).count(names[info.name]) > 1)
        raise M3Error(f"{twice!r} is stored as another tensor too, which a tree cannot hold: write safetensors.")
    found = read_template(template) if recognise(template) == ORBAX else None
    if found is None or found.tree is None:
        check_tree(stored, template)
    else:
        tree_of(found, stored)
    if found is None:
        found = Template(template, "", None, {}, ())
    if state is None:
        found = without_state(found)
    elif recognise(state) == ORBAX:
        found = found._replace(beside=read_template(state).beside)
    if as_step and not found.name:
        found = found._replace(name=DEFAULT_ITEM)
    return OrbaxOutput(found, found.name, names)


def make_orbax(
    directory: Path,
    output: OrbaxOutput,
    shards: Sequence[str],
    digests: Mapping[str, str],
    progress: Callable[[Progress], None] | None = None,
) -> dict[str, str]:
    """Makes Orbax of the finished safetensors in a directory, reads it back, and removes them.

    Args:
        directory: Where the output is made.
        output: How.
        shards: The names of the safetensors.
        digests: Of each tensor, by its name in the merge.
        progress: Called after every tensor that was read back.

    Returns:
        The digests of the files that do not depend on when it was made: those of the tree, and what was copied.

    Raises:
        M3Error: What is read back is not what was merged, or the disk fails.
    """
    sources = {*shards, SAFETENSORS.index_file}
    for path in directory.iterdir():  # what an interrupted attempt has left
        if path.name not in sources and not is_own(path.name):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    with renamed(open_safetensors(directory), {stored: name for name, stored in output.names.items()}) as merged:
        fill_with_orbax(directory, merged, template=output.template)
    with open_written(directory, output.to_json()) as made:
        _check(made, directory, digests, progress)
    for name in sources:
        (directory / name).unlink(missing_ok=True)
    varying = varying_files(output.item, output.names.values())
    files = (path for path in directory.rglob("*") if path.is_file() and not is_own(path.name))
    told = {path.relative_to(directory).as_posix(): path for path in files}
    return {name: digest_file(path) for name, path in sorted(told.items()) if not varying.matches(name)}


def _check(
    made: Checkpoint, directory: Path, digests: Mapping[str, str], progress: Callable[[Progress], None] | None
) -> None:
    total, done = sum(info.nbytes for info in made.tensors.values()), 0
    for name, digest in digests.items():
        if name not in made.tensors or digest_tensor(made, name) != digest:
            raise M3Error(f"{directory}: {name!r} reads back otherwise than it was merged: check the disk, start again")
        done += made.tensors[name].nbytes
        if progress is not None:
            progress(Progress("verifying", done, total))


@contextmanager
def step_directory(out: Path, step: int | None, like: str | None = None) -> Iterator[Path]:
    """Where a step of a run is to appear.

    Args:
        out: The run, which is made where it is not there and left again where nothing came of it.
        step: The step's number; None for an output that is no step.
        like: A model: if it is a step of a run that keeps its steps in `checkpoints`, a new run does too.

    Yields:
        The directory of the step, or `out` itself.

    Raises:
        M3Error: It is no number of a step, the run is not on this disk, or holds something else.
    """
    if step is None:
        yield out
        return
    if step < 0:
        raise M3Error(f"step: {step} is no number of a step: give one from 0 on")
    if isinstance(out, RemotePath):
        raise M3Error(f"{out}: steps are written to runs on this disk: give a local directory")
    below = (out / STEPS).is_dir() or (not out.exists() and like is not None and _keeps_below(like))
    place = out / STEPS if below else out
    target = place / str(step)
    begun = partial_directory(target).exists() or intermediates_directory(target).exists()  # and was interrupted
    taken = place.exists() and (not place.is_dir() or any(place.iterdir()))
    if taken and not begun and find_run(out) is None:
        raise M3Error(f"{out}: holds no steps of a run, to which {step} could be added: give a run or a new directory")
    made = [directory for directory in dict.fromkeys((out, place)) if not directory.exists()]
    with saying_what_failed(out):
        for directory in made:
            directory.mkdir(exist_ok=True)
    try:
        yield target
    finally:
        for directory in reversed(made):
            if not any(directory.iterdir()):
                directory.rmdir()


def _keeps_below(model: str) -> bool:
    """Whether a model is a step of a run that keeps its steps in `checkpoints`."""
    adapted = split_adapter(model)
    model = model if adapted is None else adapted.model
    said = split_step(model)
    path = Path(model if said is None else said[0]).expanduser()
    run = find_run(path)
    return run is not None and any(step.parent != path for step in run.steps.values())
