"""Models of SentencePiece as their files say it: pieces with scores. Read and added to without its library.

References:
    https://github.com/google/sentencepiece/blob/v0.2.0/src/sentencepiece_model.proto
"""

import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple

_PIECE, _TRAINER = 1, 2  # fields of the model
_TEXT, _SCORE, _TYPE = 1, 2, 3  # fields of a piece
_MODEL_TYPE = 3  # a field of what the trainer was told
_VARINT, _LONG, _BYTES, _SHORT = 0, 1, 2, 5  # how a field is written
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
_KINDS = {1: "Unigram", 2: "SentencePiece BPE", 3: "SentencePiece words", 4: "SentencePiece characters"}


class ScoredPiece(NamedTuple):
    """One piece.

    Attributes:
        text: As it is stored, with ▁ for a space.
        score: Of Unigram its log probability, of BPE its rank negated.
        type: `NORMAL`, `CONTROL`, …
    """

    text: str
    score: float
    type: int = NORMAL


class Pieces(NamedTuple):
    """A model of SentencePiece.

    Attributes:
        kind: What it is: "Unigram" or "SentencePiece BPE", mostly.
        pieces: In the order of their ids.
    """

    kind: str
    pieces: tuple[ScoredPiece, ...]


def read_pieces(content: bytes) -> Pieces:
    """What a model of SentencePiece says.

    Args:
        content: Of its file.

    Raises:
        ValueError: It is none.

    Example:
        >>> read_pieces(with_pieces(b"", [ScoredPiece("<s>", 0.0, CONTROL), ScoredPiece("a", -1.5)])).pieces[1]
        ScoredPiece(text='a', score=-1.5, type=1)
    """
    pieces, kind = [], 1
    for field, value in _fields(content):
        if field == _PIECE and isinstance(value, bytes):
            told = dict(_fields(value))
            text, score, form = told.get(_TEXT, b""), told.get(_SCORE, 0.0), told.get(_TYPE, NORMAL)
            if not isinstance(text, bytes) or not isinstance(score, float) or not isinstance(form, int):
                raise ValueError("no piece")
            pieces.append(ScoredPiece(text.decode("utf-8"), score, form))
        elif field == _TRAINER and isinstance(value, bytes):
            told_kind = dict(_fields(value)).get(_MODEL_TYPE, 1)
            kind = told_kind if isinstance(told_kind, int) else 0
    if not pieces or kind not in _KINDS:
        raise ValueError("no model of SentencePiece")
    return Pieces(_KINDS[kind], tuple(pieces))


def with_pieces(content: bytes, pieces: Iterable[ScoredPiece]) -> bytes:
    """A model of SentencePiece with more pieces: what is written behind a message adds to its lists.

    Args:
        content: Of its file.
        pieces: In the order of their ids, which follow those that are there.
    """
    return content + b"".join(_field(_PIECE, _message(piece)) for piece in pieces)


def _message(piece: ScoredPiece) -> bytes:
    score = bytes([_SCORE << 3 | _SHORT]) + struct.pack("<f", piece.score)
    return _field(_TEXT, piece.text.encode()) + score + bytes([_TYPE << 3 | _VARINT, piece.type])


def _field(number: int, value: bytes) -> bytes:
    size, left = bytearray(), len(value)
    while left >= 128:
        size.append(left & 127 | 128)
        left >>= 7
    return bytes([number << 3 | _BYTES, *size, left]) + value


def _fields(content: bytes) -> Iterator[tuple[int, int | float | bytes]]:
    """The fields of a message, each with its number: of floats the value, of what is longer the bytes."""
    at = 0
    while at < len(content):
        key, at = _varint(content, at)
        form = key & 7
        if form == _VARINT:
            value, at = _varint(content, at)
            yield key >> 3, value
            continue
        if form == _BYTES:
            size, at = _varint(content, at)
        elif form in (_LONG, _SHORT):
            size = 8 if form == _LONG else 4
        else:
            raise ValueError("no message")
        if at + size > len(content):
            raise ValueError("a message that ends early")
        raw, at = content[at : at + size], at + size
        yield key >> 3, struct.unpack("<f", raw)[0] if form == _SHORT else raw


def _varint(content: bytes, at: int) -> tuple[int, int]:
    """A number and the place behind it."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(content):
            break
        byte = content[at]
        value, at = value | (byte & 127) << shift, at + 1
        if byte < 128:
            return value, at
    raise ValueError("a number that does not end")
