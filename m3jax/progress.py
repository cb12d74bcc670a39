"""What long work tells whoever watches it."""

from typing import NamedTuple


class Progress(NamedTuple):
    """How far a stage of long work has come.

    Attributes:
        stage: What is being done, in a few words.
        done: Bytes gone through so far.
        total: Bytes in all.
    """

    stage: str
    done: int
    total: int
