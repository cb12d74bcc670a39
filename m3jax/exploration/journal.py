"""What an exploration has done so far: its samples, on disk after every one."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from m3jax.documents import FAULTS, parse_json
from m3jax.exploration.samples import Weights, from_hex, to_hex
from m3jax.exploration.scoring import Hopeless
from m3jax.exploration.selection import Result
from m3jax.ledger import Ledger

FILE = "journal.jsonl"
SEEN = "seen"
"""The key of what is cheap to know of the models' files, by which their content is known to be the same."""
_LONGEST = 1 << 20  # bytes of a first line


class SampleJournal(Ledger):
    """A directory with one line per evaluated sample; the first line says of what exploration.

    Attributes:
        done: The results of earlier runs and of this one.
    """

    def __init__(self, directory: Path, identity: Mapping[str, Any]) -> None:
        """Open or begin.

        Args:
            directory: Made if it is not there; its parent is.
            identity: What results depend on; a journal of something else is refused.

        Raises:
            M3Error: It belongs to another exploration, another process has it open, or it cannot be used.
        """
        super().__init__(directory / FILE, identity, "exploration", "with --journal DIR", [SEEN])
        try:
            self.done = [_result(entry) for entry in self.entries]
        except FAULTS as error:
            self._file.close()
            raise self.no_ledger(error) from None

    def find(self, sample: int, share: float, weights: Weights, hopeless: Hopeless | None = None) -> Result | None:
        """The result of a trial, if it was evaluated before.

        Args:
            sample: Its number.
            share: Of the examples.
            weights: Its weights.
            hopeless: Whether what a merge could reach leaves no hope; what was stopped counts only where it says so.
        """
        same = [result for result in self.done if (result.sample, result.weights) == (sample, weights)]
        whole = next((result for result in same if result.most is None and result.share == share), None)
        if whole is not None or hopeless is None or share != 1.0:
            return whole
        return next((result for result in same if result.most is not None and hopeless(result.most)), None)

    def twin(self, share: float, weights: Weights) -> Result | None:
        """A result of the same merge on the same examples, whatever it is called.

        Args:
            share: Of the examples.
            weights: Its weights.
        """
        same = (r for r in self.done if r.weights and r.most is None and (r.share, r.weights) == (share, weights))
        return next(same, None)

    def note(self, result: Result) -> None:
        """Note a result, safely on the disk before returning.

        Raises:
            M3Error: It cannot be written.
        """
        told = {key: value for key, value in result._asdict().items() if key != "most" or value is not None}
        self.add({**told, "weights": to_hex(result.weights), "scores": dict(result.scores)})
        self.done.append(result)


def first_line(directory: Path) -> dict[str, Any]:
    """What the journal in a directory says that it is of; nothing where there is none, or it says nothing.

    Args:
        directory: That of the journal.
    """
    if not (directory / FILE).is_file():
        return {}
    try:
        with open(directory / FILE, "rb") as file:
            return dict(parse_json(file.readline(_LONGEST), halves=True))
    except (OSError, *FAULTS):  # whoever opens the journal says what is wrong
        return {}


def _result(entry: Mapping[str, Any]) -> Result:
    result = Result(**{**entry, "weights": from_hex(entry["weights"])})
    figures = [result.share, result.seconds, *result.scores.values(), *(result.most or {}).values()]
    counts = [result.sample, *([] if result.optimized is None else [result.optimized])]
    if not all(type(count) is int for count in counts) or not all(type(one) in (int, float) for one in figures):
        raise ValueError("a line is no result")
    if not all(map(math.isfinite, figures)) or not result.scores:
        raise ValueError("a line has no finite scores")
    if result.most is not None and result.most.keys() != result.scores.keys():
        raise ValueError("a line was stopped in other tasks than it has scores of")
    return result
