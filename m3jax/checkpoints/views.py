"""One checkpoint seen as another: renamed, or with its blocks selected, by byte range and without copies.

A view is a `Checkpoint` itself, so whatever reads checkpoints reads views, and views of views. Its bytes are those that
are stored; `stored_at` tells under which name, and `stored_digests` gives digests that hold for the files.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Protocol, TypeAlias, runtime_checkable

import numpy as np
import numpy.typing as npt

from m3jax.checkpoints.digest import Passing
from m3jax.checkpoints.files import joined_metadata
from m3jax.checkpoints.protocol import (
    Checkpoint,
    Closing,
    FileFingerprint,
    TensorInfo,
    in_natural_order,
    is_sequential,
    room_for,
)
from m3jax.errors import M3Error
from m3jax.naming import block_of, layer_position

Run: TypeAlias = tuple[Checkpoint | None, int, int]
"""Blocks of a checkpoint: it, the first block, and the one after the last; a gap of as many blocks for None."""

WRAPPER = "params"
"""The key under which Flax keeps parameters, beside which a train state has other trees."""


class Stored(NamedTuple):
    """Where a tensor is in files.

    Attributes:
        location: The checkpoint that has it, as a person would name it.
        name: Its name there.
    """

    location: str
    name: str


@runtime_checkable
class Borrowing(Protocol):
    """What a view offers beyond `Checkpoint`; readers of files do without it, because `stored_at` knows both."""

    def source_name(self, name: str) -> Stored:
        """Where a tensor is stored; the first of several places.

        Raises:
            M3Error: There is no such tensor.
        """

    def source_digests(self, name: str, digest: str) -> dict[str, str]:
        """The digests of what a tensor is made from; see `stored_digests`."""


@runtime_checkable
class Lending(Protocol):
    """What a view offers whose tensors hold rows of others' beside those that `source_digests` tells of."""

    def lenders(self, name: str) -> tuple[tuple[Checkpoint, str], ...]:
        """The checkpoints and tensors of which rows are in a tensor."""


def stored_at(checkpoint: Checkpoint, name: str) -> Stored:
    """Where the bytes of a tensor are in files, through however many views.

    Args:
        checkpoint: A view, or a checkpoint that is none.
        name: One of its tensors.

    Returns:
        The place; for a checkpoint that is no view, itself and the same name.

    Raises:
        M3Error: A view has no such tensor.
    """
    return checkpoint.source_name(name) if isinstance(checkpoint, Borrowing) else Stored(checkpoint.location, name)


def stored_digests(checkpoint: Checkpoint, name: str, digest: str) -> dict[str, str]:
    """The digests of the stored tensors that a tensor is made from, by their names in the files at `stored_at`.

    Args:
        checkpoint: A view, or a checkpoint that is none.
        name: One of its tensors, which has been read.
        digest: Of the tensor's bytes as `checkpoint` gives them.

    Raises:
        M3Error: What is stored cannot be read again, where it has not been read in order.
    """
    return checkpoint.source_digests(name, digest) if isinstance(checkpoint, Borrowing) else {name: digest}


class View(Closing):
    """Tensors of one or several checkpoints under other names; made by the functions of this module.

    Attributes:
        location: What it is called.
        tensors: Every tensor by its name here, in natural order.
        metadata: The texts of all that is viewed, the first checkpoint first.
    """

    def __init__(
        self, location: str, places: Mapping[str, tuple[Checkpoint, str]], viewed: Sequence[Checkpoint]
    ) -> None:
        """Opens nothing: what is viewed is open.

        Args:
            location: What the view is called.
            places: By new name, the checkpoint that has a tensor and its name there.
            viewed: All checkpoints that are viewed, which the view closes; none twice.
        """
        self._places = dict(places)
        self._viewed = tuple(viewed)
        self.location = location
        self.tensors = in_natural_order(
            {name: checkpoint.tensors[stored]._replace(name=name) for name, (checkpoint, stored) in places.items()}
        )
        self.metadata = joined_metadata(checkpoint.metadata for checkpoint in viewed)

    def source_name(self, name: str) -> Stored:
        """Where a tensor is stored; see `Borrowing.source_name`."""
        if name not in self._places:
            raise M3Error(f"{self.location} has no tensor {name!r}: check the name.")
        return stored_at(*self._places[name])

    def source_digests(self, name: str, digest: str) -> dict[str, str]:
        """The digests of what a tensor is made from; see `stored_digests`."""
        return stored_digests(*self._places[name], digest)

    def lenders(self, name: str) -> tuple[tuple[Checkpoint, str], ...]:
        """What lends rows to a tensor; see `Lending.lenders`."""
        checkpoint, stored = self._places[name]
        return checkpoint.lenders(stored) if isinstance(checkpoint, Lending) else ()

    def read_into(self, name: str, start: int, out: memoryview | npt.NDArray[np.uint8]) -> None:
        """Fills `out` with the tensor's little-endian bytes from `start` on; see `Checkpoint.read_into`."""
        view = room_for(self, name, start, out)
        checkpoint, stored = self._places[name]
        with _naming(name, stored):
            checkpoint.read_into(stored, start, view)

    @property
    def sequential(self) -> bool:
        """See `Sequential`."""
        return any(map(is_sequential, self._viewed))

    def files(self) -> tuple[Path, ...]:
        """The files that hold the weights of all that is viewed."""
        return tuple(dict.fromkeys(file for checkpoint in self._viewed for file in checkpoint.files()))

    def fingerprint(self) -> dict[str, FileFingerprint]:
        """What the stored files look like now; of several checkpoints, each file below the number of its own."""
        if len(self._viewed) == 1:
            return self._viewed[0].fingerprint()
        return {
            f"{number}/{file}": told
            for number, checkpoint in enumerate(self._viewed)
            for file, told in checkpoint.fingerprint().items()
        }

    def close(self) -> None:
        """Closes all that is viewed."""
        for checkpoint in self._viewed:
            checkpoint.close()


class MakingView(Closing):
    """A view whose tensors are made of those of one checkpoint, not only called otherwise: what such views share.

    Attributes:
        location: The checkpoint's.
        metadata: The checkpoint's.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Opens nothing.

        Args:
            checkpoint: An open checkpoint, which the view closes.
        """
        self._checkpoint = checkpoint
        self._passing = Passing(checkpoint)
        self.location = checkpoint.location
        self.metadata = checkpoint.metadata

    def _digests_of(self, names: Iterable[str]) -> dict[str, str]:
        """The digests of whole tensors of the checkpoint, by their names in the files."""
        return {
            stored: found
            for name in dict.fromkeys(names)
            for stored, found in stored_digests(self._checkpoint, name, self._passing.digest(name)).items()
        }

    @property
    def sequential(self) -> bool:
        """See `Sequential`."""
        return is_sequential(self._checkpoint)

    def files(self) -> tuple[Path, ...]:
        """The files that hold the weights."""
        return self._checkpoint.files()

    def fingerprint(self) -> dict[str, FileFingerprint]:
        """What the stored files look like now."""
        return self._checkpoint.fingerprint()

    def close(self) -> None:
        """Closes what is viewed."""
        self._checkpoint.close()


@contextmanager
def _naming(name: str, stored: str) -> Iterator[None]:
    """Says of a tensor that cannot be read under which name it was asked for, where its own sentence does not."""
    try:
        yield
    except M3Error as error:
        if name == stored:
            raise
        # The cause stays: by it a caller knows whether the same merge may go on once it is mended.
        raise M3Error(f"{name!r}, stored as {stored!r}: {error}") from (error.__cause__ or error)


# --- Other names -----------------------------------------------------------------------------------------


def renamed(checkpoint: Checkpoint, names: Mapping[str, str] | Callable[[str], str]) -> Checkpoint:
    """A checkpoint with other names for its tensors.

    Args:
        checkpoint: An open checkpoint, which the view closes.
        names: Stored names by new ones, where tensors that are not among them keep their names; or a function from a
            stored name to the new one. One stored tensor may have several new names.

    Returns:
        The view; its location is the checkpoint's.

    Raises:
        M3Error: A stored name is absent, or two tensors get one name.

    Example:
        >>> import tempfile
        >>> from m3jax.checkpoints import ShardWriter, open_safetensors
        >>> file = Path(tempfile.mkdtemp()) / "model.safetensors"
        >>> with ShardWriter(file, [TensorInfo("params.kernel", (2,), "F32")]) as shard:
        ...     shard.write("params.kernel", 0, np.float32([1, 2]))
        ...     shard.finish()
        >>> with renamed(open_safetensors(file), {"kernel": "params.kernel"}) as view:
        ...     print(list(view.tensors), stored_at(view, "kernel").name)
        ['kernel'] params.kernel
    """
    if isinstance(names, Mapping):
        absent = next((pair for pair in names.items() if pair[1] not in checkpoint.tensors), None)
        if absent is not None:
            new, stored = absent
            raise M3Error(f"{checkpoint.location} has no tensor {stored!r} to be seen as {new!r}: check the name.")
        taken = set(names.values())
        pairs = [*names.items(), *((name, name) for name in checkpoint.tensors if name not in taken)]
    else:
        pairs = [(names(name), name) for name in checkpoint.tensors]
    places: dict[str, tuple[Checkpoint, str]] = {}
    for new, stored in pairs:
        if new in places:
            raise M3Error(
                f"{checkpoint.location} has two tensors to be seen as {new!r}, {places[new][1]!r} and {stored!r}:"
                " give them different names."
            )
        places[new] = checkpoint, stored
    return View(checkpoint.location, places, [checkpoint])


def prefix_view(checkpoint: Checkpoint, *others: Iterable[str]) -> Checkpoint:
    """A checkpoint without the wrapper around its tree that others have not, such as Flax's `params`.

    A wrapper is the beginning, up to a dot, of all names, or of those below a key `params`, without which they are the
    names of another model, or all among them, or have all of them: one may have a head that the other lacks. The names
    beside `params` stay as they are. A part of a model, as the language model of one that also sees, is no wrapper:
    without its name it would be another model's.

    Args:
        checkpoint: An open checkpoint, which the view closes.
        others: The names of the tensors of each model that it is to fit.

    Returns:
        The view; the checkpoint itself where it has no wrapper, or two that are equally deep.

    Raises:
        M3Error: A name below the wrapper is also one beside it.
    """
    prefix = wrapper(checkpoint.tensors, *others)
    if not prefix:
        return checkpoint
    return renamed(checkpoint, lambda name: name.removeprefix(prefix))


def wrapper(names: Collection[str], *others: Iterable[str]) -> str:
    """The wrapper of a model's names, with its dot; see `prefix_view`.

    Returns:
        The wrapper; of several, as others have shallower ones, the longest; empty where there is none.

    Example:
        >>> wrapper(["step", "params.dense.kernel", "opt.mu.dense.kernel"], ["dense.kernel"])
        'params.'
        >>> wrapper(["model.norm", "model.embed"], ["params.model.norm", "params.model.embed"])
        ''
    """
    below: dict[str, set[str]] = {}
    for name in names:
        dots = (at for at, letter in enumerate(name) if letter == ".")
        for dot in dots:
            below.setdefault(name[: dot + 1], set()).add(name[dot + 1 :])
    return max((_wrapper(set(names), below, set(other)) for other in others), key=len, default="")


def _wrapper(names: set[str], below: Mapping[str, set[str]], other: set[str]) -> str:
    fitting = [
        prefix
        for prefix, inside in below.items()
        if (len(inside) == len(names) or prefix.split(".")[-2] == WRAPPER) and (inside <= other or inside >= other)
    ]
    # Where one model lacks a few tensors more than one beginning may fit: the one with most in common is meant.
    most = max((len(below[prefix] & other) for prefix in fitting), default=0)
    if most <= len(names & other):
        return ""
    # Optimizer states mirror the parameters, deeper in the tree.
    likely = [prefix for prefix in fitting if len(below[prefix] & other) == most]
    least = min(prefix.count(".") for prefix in likely)
    shallow = [prefix for prefix in likely if prefix.count(".") == least]
    return shallow[0] if len(shallow) == 1 else ""


# --- Parts of models -------------------------------------------------------------------------------------


def part_of(checkpoint: Checkpoint, names: Iterable[str]) -> Checkpoint:
    """A checkpoint with some of its tensors.

    Args:
        checkpoint: An open checkpoint, which the view closes.
        names: Of the tensors.
    """
    return View(checkpoint.location, {name: (checkpoint, name) for name in names}, [checkpoint])


def beside(checkpoints: Sequence[Checkpoint]) -> Checkpoint:
    """Parts of models as one checkpoint.

    Args:
        checkpoints: Open, which the view closes; no name is in two of them.

    Raises:
        M3Error: A name is in two of them.
    """
    places: dict[str, tuple[Checkpoint, str]] = {}
    for checkpoint in checkpoints:
        twice = next((name for name in checkpoint.tensors if name in places), None)
        if twice is not None:
            raise M3Error(f"{twice} is in two parts, of {places[twice][0].location} and {checkpoint.location}.")
        places |= {name: (checkpoint, name) for name in checkpoint.tensors}
    location = ", ".join(dict.fromkeys(checkpoint.location for checkpoint in checkpoints))
    return View(location, places, list({id(checkpoint): checkpoint for checkpoint in checkpoints}.values()))


# --- Other blocks ----------------------------------------------------------------------------------------


def selected(checkpoint: Checkpoint, *runs: tuple[int, int]) -> Checkpoint:
    """A checkpoint with some of its blocks, in any order and as often as wanted, renumbered from 0 on.

    Args:
        checkpoint: An open checkpoint, which the view closes.
        runs: The first block and the one after the last, of each run.

    Returns:
        The view; see `stacked_layers`.

    Raises:
        M3Error: As `stacked_layers`.
    """
    return stacked_layers([(checkpoint, first, end) for first, end in runs])


def stacked_layers(runs: Sequence[Run]) -> Checkpoint:
    """Runs of blocks of one or several checkpoints, one after the other, as the blocks of one model.

    Block i of the view is the i-th block of the runs. Tensors that stand before the blocks (embeddings) are those of
    the first run's checkpoint, tensors after them (final norm, head) those of the last one's.

    Args:
        runs: Checkpoints, which the view closes, each with the first block and the one after the last. A block may be
            in several runs, and a checkpoint too; where a run is a gap, so is what stands beside it.

    Returns:
        The view.

    Raises:
        M3Error: There is no run, or one is empty or leaves the model; a checkpoint has no blocks, or several stacks of
            them; blocks are called or shaped differently.
    """
    if not runs:
        raise M3Error("no layers are selected: give at least one run of them.")
    stack = _common_stack([checkpoint for checkpoint, _, _ in runs if checkpoint is not None])
    first, last = runs[0][0], runs[-1][0]
    places: dict[str, tuple[Checkpoint, str]] = {}
    for checkpoint, before in ((first, True), (last, False)):
        if checkpoint is None:
            continue
        outside = (name for name in checkpoint.tensors if block_of(name) is None)
        places |= {name: (checkpoint, name) for name in outside if (layer_position(name, 1) == 0.0) == before}
    number = 0
    for checkpoint, begin, end in runs:
        if checkpoint is None:
            number += end - begin
            continue
        blocks = _blocks(checkpoint)
        _check_run(checkpoint, len(blocks), begin, end)
        for block in range(begin, end):
            for rest, name in blocks[block].items():
                places[f"{stack}.{number}{rest}"] = checkpoint, name
            number += 1
    there = [(checkpoint, begin, end) for checkpoint, begin, end in runs if checkpoint is not None]
    viewed = list({id(checkpoint): checkpoint for checkpoint, _, _ in there}.values())
    _check_widths(viewed)
    location = ", ".join(f"layers {begin} to {end} of {checkpoint.location}" for checkpoint, begin, end in there)
    return View(location, places, viewed)


def _stacks(checkpoint: Checkpoint) -> list[str]:
    """What the names of blocks begin with, before the number."""
    found = filter(None, map(block_of, checkpoint.tensors))
    return list(dict.fromkeys(block.rpartition(".")[0] for block, _ in found))


def _common_stack(checkpoints: Sequence[Checkpoint]) -> str:
    """The one beginning of all blocks' names."""
    named: dict[str, str] = {}
    for checkpoint in checkpoints:
        stacks = _stacks(checkpoint)
        if len(stacks) != 1:
            several = f"several stacks of layers, {stacks[0]!r} and {stacks[1]!r}" if stacks else "no numbered layers"
            raise M3Error(f"{checkpoint.location} has {several}: layers are selected from models with one stack.")
        named.setdefault(stacks[0], checkpoint.location)
    if len(named) > 1:
        (one, here), (other, there), *_ = named.items()
        raise M3Error(f"layers are called {one!r} in {here} and {other!r} in {there}: take models of one architecture.")
    return next(iter(named))


def _blocks(checkpoint: Checkpoint) -> list[dict[str, str]]:
    """The tensors of each block, by what follows the block's number."""
    found: dict[int, dict[str, str]] = {}
    for name in checkpoint.tensors:
        block = block_of(name)
        if block is not None:
            found.setdefault(block[1], {})[name[len(block[0]) :]] = name
    absent = next((number for number in range(len(found)) if number not in found), None)
    if absent is not None:
        raise M3Error(f"{checkpoint.location} has layer {max(found)} but no layer {absent}: get the whole model.")
    return [found[number] for number in range(len(found))]


def _check_run(checkpoint: Checkpoint, count: int, begin: int, end: int) -> None:
    if begin >= end:
        raise M3Error(f"layers {begin} to {end} of {checkpoint.location} are none: the end, not included, comes later.")
    if begin < 0 or end > count:
        raise M3Error(
            f"layers {begin} to {end} of {checkpoint.location} leave the model, which has {count}: stay in 0 to"
            f" {count}."
        )


def _check_widths(checkpoints: Sequence[Checkpoint]) -> None:
    """Checks that blocks of different checkpoints fit each other.

    Blocks of one model may differ, so two models are of different width where what has one place in their blocks has no
    shape in common.
    """
    first, *others = checkpoints
    ours = _by_place(first)
    for other in others:
        for rest, infos in _by_place(other).items():
            here, there = ours.get(rest, infos), infos
            if {info.shape for info in here}.isdisjoint(info.shape for info in there):
                raise M3Error(
                    f"{here[0].name} of {first.location} is {list(here[0].shape)} but {there[0].name} of"
                    f" {other.location} is {list(there[0].shape)}: stack layers of models of one width."
                )


def _by_place(checkpoint: Checkpoint) -> dict[str, list[TensorInfo]]:
    """The tensors of all blocks by their places in a block."""
    found: dict[str, list[TensorInfo]] = {}
    for block in _blocks(checkpoint):
        for rest, name in block.items():
            found.setdefault(rest, []).append(checkpoint.tensors[name])
    return found
