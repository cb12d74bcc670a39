"""Runs of training: directories of numbered steps, as Orbax's managers and trainers of models keep them.

A name may say which steps are meant: `RUN` the last that was saved to its end, `RUN@2000` one, `RUN@last:5` and
`RUN@2000:10000:2000` several.
"""

import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from m3jax.checkpoints import formats
from m3jax.checkpoints.orbax_tree import (
    STEPS,
    children,
    has_unfinished,
    holds_items,
    is_item,
    remembered,
    says_item,
    step_number,
)
from m3jax.checkpoints.protocol import natural_key
from m3jax.checkpoints.remote import RemotePath, as_path, is_url
from m3jax.checkpoints.storage import exists, is_dir, is_file, list_names
from m3jax.errors import M3Error

_MERGED = "m3jax.json"  # in a step that is a merge
_LAST = re.compile(r"last(?::([0-9]+))?")
_ONE = re.compile(r"[0-9]+")
_RANGE = re.compile(r"([0-9]+):([0-9]+)(?::([0-9]+))?")
_LOOKS = 16  # steps in remote storage that are looked into at a time


class Run(NamedTuple):
    """A run of training.

    Attributes:
        path: As it was named.
        steps: The directory of each step that was saved to its end, by its number, ascending.
        unfinished: Names of what was not.
    """

    path: Path
    steps: Mapping[int, Path]
    unfinished: tuple[str, ...]

    @property
    def last(self) -> int:
        """The last step that was saved to its end.

        Raises:
            M3Error: There is none.
        """
        if not self.steps:
            raise M3Error(
                f"{self.path} has no step that was saved to its end ({', '.join(self.unfinished[-3:])} was not): take "
                "another run, or save again."
            )
        return max(self.steps)

    def step(self, number: int) -> Path:
        """The directory of a step.

        Raises:
            M3Error: It is not there, or was not saved to its end.
        """
        if number in self.steps:
            return self.steps[number]
        nearest = min(self.steps, key=lambda step: (abs(step - number), -step), default=self.last)
        cut = any(step_number(name.partition(".")[0]) == number for name in self.unfinished)
        fault = f"step {number} of {self.path} was not saved to its end" if cut else f"{self.path} has no step {number}"
        raise M3Error(f"{fault}: the nearest is {self.path}@{nearest}.")


def find_run(path: Path) -> Run | None:
    """The run whose steps are in a directory, or in its `checkpoints`.

    Args:
        path: Any path, here or in remote storage.

    Returns:
        The run; None where there are no steps: each is a directory whose name ends in its number, after one beginning
        that all share.

    Raises:
        M3Error: A directory cannot be listed.
    """
    path = remembered(path)
    if not is_dir(path) or _is_item_itself(path):
        return None
    for place in (path, path / STEPS):
        found = _steps_in(place) if is_dir(place) else None
        if found is not None:
            return Run(path, *found)
    return None


def _is_item_itself(path: Path) -> bool:
    """Whether a directory is an item; a remote one is none whose names are steps', as each would be looked into."""
    if says_item(path):
        return True
    remote = isinstance(path, RemotePath)
    return not (remote and any(step_number(child.name) is not None for child in children(path))) and is_item(path)


def _steps_in(place: Path) -> tuple[dict[int, Path], tuple[str, ...]] | None:
    """The steps in a directory that were finished, and names of those that were not; None where it is no run's."""
    numbered = [(step_number(child.name.partition(".orbax")[0]), child) for child in children(place)]
    candidates = [(number, child) for number, child in numbered if number is not None]
    steps: dict[int, Path] = {}
    cut = []
    beginnings = set()
    for (number, child), state in zip(candidates, _states([child for _, child in candidates]), strict=True):
        if state is None:
            cut.append(child.name)
        elif state:
            beginnings.add(child.name.rstrip("0123456789"))
            if number in steps:
                return None  # numbers of something else
            steps[number] = child
    if len(beginnings) > 1 or not (steps or cut):
        return None
    return dict(sorted(steps.items())), tuple(sorted(cut, key=natural_key))


def _states(directories: Sequence[Path]) -> list[bool | None]:
    """Of each directory whether it holds a model; None where the save of one was interrupted."""
    if not any(isinstance(each, RemotePath) for each in directories):
        return [_state(each) for each in directories]
    with ThreadPoolExecutor(_LOOKS) as pool:  # each look is a wait
        return list(pool.map(_state, directories))


def _state(directory: Path) -> bool | None:
    return None if has_unfinished(directory) else holds_items(directory) or _holds_weights(directory)


def _holds_weights(directory: Path) -> bool:
    return any(format.names(name) for name in list_names(directory) for format in formats.FORMATS)


def split_step(name: str) -> tuple[str, str] | None:
    """A run and what is said of its steps, where a name says something and does not exist as it is.

    Args:
        name: Of a model, as a user wrote it.

    Example:
        >>> split_step("absent/run@2000") is None, split_step(".@last:5")
        (True, ('.', 'last:5'))
    """
    place, at, said = name.rpartition("@")
    known = _LAST.fullmatch(said) or _ONE.fullmatch(said) or _RANGE.fullmatch(said)
    if not at or not place or known is None or exists(place_of(name)) or not is_dir(place_of(place)):
        return None
    return place, said


def place_of(name: str) -> Path:
    """The path that a name is, here or in remote storage, where each directory is listed once.

    Args:
        name: As a user wrote it.
    """
    return remembered(as_path(name)) if is_url(name) else Path(name).expanduser()


def chosen_steps(place: str, said: str) -> list[int]:
    """The steps of a run that a name means, ascending.

    Args:
        place: The run's directory.
        said: `2000`, `last`, `last:5` or `2000:10000:2000`: the first, the last that may be, the distance.

    Raises:
        M3Error: It is no run, or lacks a step that is meant.
    """
    run = find_run(place_of(place))
    if run is None:
        raise M3Error(f"{place} holds no steps of a run, so that {place}@{said} is none: give the directory of steps.")
    if last := _LAST.fullmatch(said):
        newest = run.last  # which says so where there is none
        count, steps = (1, [newest]) if last[1] is None else (int(last[1]), _trained(run))
        if not 1 <= count <= len(steps):
            raise M3Error(
                f"{place}@{said}: the run has {len(steps)} steps of training that were saved to their end: ask for 1 to"
                f" {len(steps)}."
            )
        return steps[-count:]
    if several := _RANGE.fullmatch(said):
        first, end, distance = int(several[1]), int(several[2]), int(several[3] or 0)
        if several[3] is None:
            wanted = [step for step in _trained(run) if first <= step <= end]
        elif distance < 1 or (end - first) // distance > max(len(run.steps), 1) * 1000:
            raise M3Error(f"{place}@{said}: {distance} is no distance between steps: write FIRST:LAST:DISTANCE.")
        else:
            wanted = list(range(first, end + 1, distance))
        if not wanted:
            raise M3Error(f"{place}@{said}: names no step: the run has {run.last} as its last; write FIRST:LAST.")
        for number in wanted:
            run.step(number)
        return wanted
    run.step(int(said))
    return [int(said)]


def _trained(run: Run) -> list[int]:
    """The steps that are of training, ascending; an average of some of them may stand beside them as a step."""
    return [number for number, place in sorted(run.steps.items()) if not is_file(place / _MERGED)]


def step_place(name: str) -> Path | None:
    """The directory of the one step that a name means: the last of a run, or one that it says.

    Args:
        name: Of a model, as a user wrote it.

    Returns:
        The step's directory; None where the name means no step of a run.

    Raises:
        M3Error: It means several steps, or one that is not there.
    """
    said = split_step(name)
    if said is not None:
        place = place_of(said[0])
        found = _remote_step(place, said[1])
        if found is not None:
            return found
        step, run = _one_step(*said), find_run(place)
        return None if run is None else run.step(step)
    if not name:
        return None
    path = place_of(name)
    if not is_dir(path) or _holds_weights(path):
        return None
    run = find_run(path)
    return None if run is None else run.steps[run.last]


def _remote_step(place: Path, said: str) -> Path | None:
    """A step of a remote run that its number finds, without a look into the others; None where it may not."""
    if not isinstance(place, RemotePath) or not _ONE.fullmatch(said):
        return None
    found = [
        child
        for directory in (place, place / STEPS)
        for child in children(directory)
        if step_number(child.name) == int(said)
    ]
    return found[0] if len(found) == 1 and _state(found[0]) else None


def _one_step(place: str, said: str) -> int:
    """The one step that a name means."""
    steps = chosen_steps(place, said)
    if len(steps) > 1:
        raise M3Error(
            f"{place}@{said} is {len(steps)} steps, which only models and sources of a recipe take, without an adapter:"
            " name one of them."
        )
    return steps[0]


def step_name(name: str) -> str:
    """A model's name with the step that it means, where it is a run that leaves it open.

    Args:
        name: As a user wrote it.

    Raises:
        M3Error: As `step_place`.
    """
    said = split_step(name)
    if said is not None:
        return f"{said[0]}@{_one_step(*said)}"
    if not name:
        return name
    path = place_of(name)
    if not is_dir(path) or _holds_weights(path):
        return name
    run = find_run(path)
    return name if run is None else f"{name}@{run.last}"


def last_note(name: str, step: str) -> str:
    """What a user should know of a run of which the last step was taken.

    Args:
        name: As the user wrote it.
        step: As `step_name` gives it.
    """
    return f"{name}: {step} is read, the last step that was saved to its end"
