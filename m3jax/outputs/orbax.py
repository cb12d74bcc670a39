"""Merges written as Orbax: in parts, one for each weight file, which are read back and at the end put together.

A merge fills a file of safetensors, as its chunks come in another order than those of arrays; when the file is finished
it becomes a part of the output and goes. So a merge resumes part by part, whoever makes them, and the disk holds one
file twice, not the weights.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from m3jax.checkpoints import TensorInfo, digest_file, digest_tensor, open_safetensors
from m3jax.checkpoints.formats import ORBAX
from m3jax.checkpoints.locate import split_adapter
from m3jax.checkpoints.opening import recognise
from m3jax.checkpoints.orbax import open_part
from m3jax.checkpoints.orbax_beside import BesideItem, digest_copy, find_beside
from m3jax.checkpoints.orbax_template import (
    DEFAULT_ITEM,
    Template,
    file_patterns,
    read_template,
    tree_of,
    without_state,
)
from m3jax.checkpoints.orbax_tree import STEP, STEPS, is_item
from m3jax.checkpoints.orbax_writer import check_tree, finish_item, small_files, write_part
from m3jax.checkpoints.remote import RemotePath
from m3jax.checkpoints.runs import find_run, place_of, split_step
from m3jax.checkpoints.shards import WEIGHTS_METADATA
from m3jax.checkpoints.views import renamed
from m3jax.errors import M3Error, saying_what_failed
from m3jax.outputs.places import intermediates_directory, partial_directory
from m3jax.outputs.remote import begun_in
from m3jax.outputs.written import digest_save, digest_text


class OrbaxOutput(NamedTuple):
    """How a merge is written as Orbax.

    Attributes:
        template: What its tree and layout are taken from.
        item: What its item is called in the step that it is; empty where it is no step.
        names: What each tensor is called in the tree, by its name in the merge.
        tensors: What is written, by the names in the tree.
        beside: What is copied from the template's step, or from that of the training's state.
    """

    template: Template
    item: str
    names: Mapping[str, str]
    tensors: Mapping[str, TensorInfo]
    beside: BesideItem

    @property
    def patterns(self) -> tuple[str, ...]:
        """Patterns of all its files."""
        return file_patterns(self.template, self.tensors.values(), self.beside.files)

    @property
    def trees_beside(self) -> list[str]:
        """The names of the other trees of its step."""
        return [path.name for path in self.template.beside if path.is_dir() and is_item(path)]

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
        M3Error: The names make no tree, or have no place in the template's; or something that would be copied is not
            the step's own.
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
    output = OrbaxOutput(found, found.name, names, stored, find_beside(found.beside))
    _texts(output)  # so that what is wrong with them shows before anything is merged
    return output


def _texts(output: OrbaxOutput) -> dict[str, str]:
    return small_files(output.tensors, WEIGHTS_METADATA, output.template, output.template.item)


def foreseen_files(output: OrbaxOutput) -> dict[str, str]:
    """The digests of the files that an output will have and whose content is known, as its manifest will tell them.

    Args:
        output: How it will be written.

    Raises:
        M3Error: A file that would be copied cannot be read.
    """
    copied = {name: digest_copy(path) for name, path in output.beside.files.items()}
    return {**copied, **{name: digest_text(text) for name, text in _texts(output).items()}}


def keep_part(directory: Path, output: OrbaxOutput, number: int, file: str, digests: Mapping[str, str]) -> list[str]:
    """Makes a part of an output of a finished weight file, reads it back, and removes the file.

    Args:
        directory: Where the output is made.
        output: How.
        number: Of the part: that of the file.
        file: The name of the safetensors.
        digests: Of each of its tensors, by its name in the merge.

    Returns:
        The names of the part's files.

    Raises:
        M3Error: What is read back is not what was merged, or the disk fails.
    """
    own = {output.names[name]: name for name in digests}
    with renamed(open_safetensors(directory / file), own) as merged:
        names = write_part(directory / output.item, number, merged, output.template)
    wrong = _differing(directory, output, number, digests)
    if wrong is not None:
        raise M3Error(f"{directory}: {wrong!r} reads back otherwise than it was merged: check the disk, start again")
    (directory / file).unlink()
    return [(PurePosixPath(output.item) / name).as_posix() for name in names]


def holds_part(directory: Path, output: OrbaxOutput, number: int, digests: Mapping[str, str]) -> bool:
    """Whether a part is as it was made.

    Args:
        directory: Where the output is made.
        output: How.
        number: Of the part.
        digests: Of each of its tensors, by its name in the merge.
    """
    try:
        return _differing(directory, output, number, digests) is None
    except M3Error:
        return False


def _differing(directory: Path, output: OrbaxOutput, number: int, digests: Mapping[str, str]) -> str | None:
    """The first of a part's tensors that is not what was merged, by its name in the merge."""
    with open_part(directory / output.item, number, output.template) as made:
        for name, digest in digests.items():
            stored = output.names[name]
            if stored not in made.tensors or digest_tensor(made, stored) != digest:
                return name
    return None


class Described(NamedTuple):
    """What a manifest tells of the files of an output.

    Attributes:
        files: The digests of those that are the same each time.
        saves: Those of what tells of the save, but for its times.
    """

    files: dict[str, str]
    saves: dict[str, str]


def finish_orbax(directory: Path, output: OrbaxOutput) -> Described:
    """Makes the output of its parts.

    Args:
        directory: Where the output is made. Of parts that are elsewhere, what `is_node` knows is enough.
        output: How.

    Returns:
        What its manifest tells of its files.

    Raises:
        M3Error: A part is missing or damaged, or the disk fails.
    """
    item = directory / output.item
    with saying_what_failed(item):
        item.mkdir(exist_ok=True)
    finish_item(item, output.tensors, WEIGHTS_METADATA, output.template)
    determined = sorted({*_texts(output), *output.beside.files} - {STEP})
    gone = next((name for name in determined if not (directory / name).is_file()), None)
    if gone is not None:
        raise M3Error(f"{directory / gone}: was not copied, as its original has gone since: start again") from OSError()
    return Described(
        {name: digest_file(directory / name) for name in determined}, {STEP: digest_save(directory / STEP)}
    )


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
        M3Error: It is no number of a step, or OUT holds something else.
    """
    if step is None:
        yield out
        return
    if step < 0:
        raise M3Error(f"step: {step} is no number of a step: give one from 0 on")
    below = (out / STEPS).is_dir() or (not out.exists() and like is not None and _keeps_below(like))
    place = out / STEPS if below else out
    target = place / str(step)
    taken = place.exists() and (not place.is_dir() or any(place.iterdir()))
    if taken and not _begun(target) and find_run(out) is None:
        raise M3Error(f"{out}: holds no steps of a run, to which {step} could be added: give a run or a new directory")
    if isinstance(out, RemotePath):  # where there are no directories to make
        yield target
        return
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


def _begun(target: Path) -> bool:
    """Whether a merge of that output was begun, and interrupted."""
    if isinstance(target, RemotePath):
        return begun_in(target)
    return partial_directory(target).exists() or intermediates_directory(target).exists()


def _keeps_below(model: str) -> bool:
    """Whether a model is a step of a run that keeps its steps in `checkpoints`."""
    adapted = split_adapter(model)
    model = model if adapted is None else adapted.model
    said = split_step(model)
    path = place_of(model if said is None else said[0])
    run = find_run(path)
    return run is not None and any(step.parent != path for step in run.steps.values())
