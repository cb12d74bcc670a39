"""Vocabularies as the files beside the weights tell them: tokens with their ids, added tokens, and merges."""

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from m3jax.checkpoints import digest_file
from m3jax.documents import FAULTS, parse_json
from m3jax.errors import M3Error

_FILES = (
    *("tokenizer.json", "tokenizer.model*", "vocab.*", "merges.txt", "added_tokens.json"),
    *("tekken.json", "*.tiktoken", "spiece.model", "sentencepiece*.model"),
)
_PIECES = ("tokenizer.model", "spiece.model", "sentencepiece*.model")
_NAMED = 3  # differences that a sentence names

Merges = tuple[tuple[str, ...], ...]


class Vocabulary(NamedTuple):
    """The tokens of one model.

    Attributes:
        tokens: The id of every token, added ones too.
        added: Tokens that are never parts of a longer one; None where the files do not tell.
        merges: Pairs that byte-pair encoding joins, the first joined first; None where the files do not tell.
    """

    tokens: Mapping[str, int]
    added: frozenset[str] | None
    merges: Merges | None


def read_vocabulary(files: Mapping[str, Path]) -> Vocabulary | None:
    """The vocabulary that a model's files tell, however they are written.

    Args:
        files: The model's companions by name.

    Returns:
        The vocabulary; None where there is none, or none that can be read here.
    """
    try:
        told = _from_files(files)
        if told is None:
            return None
        later = dict(_added_later(files))
    except (*FAULTS, RuntimeError, OSError):
        return None
    added = told.added if told.added is not None or not later else frozenset()
    return told._replace(tokens={**told.tokens, **later}, added=None if added is None else added | later.keys())


def _from_files(files: Mapping[str, Path]) -> Vocabulary | None:
    """The vocabulary without what is added to it in files of their own."""
    if "tokenizer.json" in files:
        return _from_tokenizer(_json(files["tokenizer.json"]))
    if "vocab.json" in files:
        lines = _lines(files["merges.txt"]) if "merges.txt" in files else None
        pairs = None if lines is None else tuple(tuple(line.split(" ")) for line in lines if line[:8] != "#version")
        return Vocabulary(_ids(_json(files["vocab.json"])), None, pairs)
    if "vocab.txt" in files:
        return Vocabulary({token: number for number, token in enumerate(_lines(files["vocab.txt"]))}, None, None)
    pieces = next((path for name, path in files.items() if any(fnmatchcase(name, p) for p in _PIECES)), None)
    return None if pieces is None else Vocabulary(_from_pieces(pieces), None, None)


def _from_tokenizer(entries: Any) -> Vocabulary:
    """What a tokenizer.json tells."""
    model = entries["model"]
    listed = isinstance(model["vocab"], list)  # with scores, the id of each its place
    vocabulary = {token: number for number, (token, _) in enumerate(model["vocab"])} if listed else model["vocab"]
    added = _ids({token["content"]: token["id"] for token in entries.get("added_tokens") or ()})
    pairs = model.get("merges")
    merges = None if pairs is None else tuple(tuple(p.split(" ") if isinstance(p, str) else p) for p in pairs)
    return Vocabulary({**_ids(vocabulary), **added}, frozenset(added), merges)


def _from_pieces(path: Path) -> dict[str, int]:
    """What a model of SentencePiece tells."""
    from sentencepiece import SentencePieceProcessor

    pieces = SentencePieceProcessor()
    pieces.LoadFromSerializedProto(path.read_bytes())
    return {pieces.IdToPiece(number): number for number in range(pieces.GetPieceSize())}


def _added_later(files: Mapping[str, Path]) -> Iterator[tuple[str, int]]:
    """Tokens that other files than the vocabulary's own add to it."""
    if "added_tokens.json" in files:
        yield from _ids(_json(files["added_tokens.json"])).items()
    if "tokenizer_config.json" in files:
        decoder = _json(files["tokenizer_config.json"]).get("added_tokens_decoder") or {}
        yield from ((token["content"], int(number)) for number, token in decoder.items())


def _json(path: Path) -> Any:
    return parse_json(path.read_bytes(), halves=True)


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").rstrip("\n").split("\n")


def _ids(entries: Mapping[Any, Any]) -> dict[str, int]:
    """A mapping of tokens to ids, if it is one."""
    if not all(isinstance(token, str) and type(number) is int for token, number in entries.items()):
        raise ValueError("no mapping of tokens to ids")
    return dict(entries)


# --- Comparing -------------------------------------------------------------------------------------------


def check_same_vocabularies(models: Mapping[str, Mapping[str, Path]]) -> None:
    """Raise M3Error unless all vocabularies are the same, so that their union is each of them.

    Args:
        models: The companions of each model, by its name.
    """
    (first, files), *others = models.items()
    vocabulary = read_vocabulary(files)
    for other, beside in others:
        difference = _difference(first, vocabulary, files, other, read_vocabulary(beside), beside)
        if difference is not None:
            raise M3Error(
                f"tokenizer_source: union of different vocabularies ({first}, {other}) is not available: {difference};"
                " write base or one of the models"
            )


def _difference(
    first: str,
    a: Vocabulary | None,
    of_a: Mapping[str, Path],
    other: str,
    b: Vocabulary | None,
    of_b: Mapping[str, Path],
) -> str | None:
    """What differs between two vocabularies, in words; None where nothing does."""
    if a is None or b is None:
        bare = next((name for name, files in ((first, of_a), (other, of_b)) if not _digests(files)), None)
        if _digests(of_a) == _digests(of_b):
            return None
        return "their files differ" if bare is None else f"{bare} has no tokenizer"
    tokens = [token for token in {**a.tokens, **b.tokens} if a.tokens.get(token) != b.tokens.get(token)]
    if tokens:
        told = [f"{token!r} is {_id(a, token)} and {_id(b, token)}" for token in tokens[:_NAMED]]
        more = [f"{len(tokens) - _NAMED:,} more"] if len(tokens) > _NAMED else []
        return f"{len(tokens):,} {'token differs' if len(tokens) == 1 else 'tokens differ'} ({', '.join(told + more)})"
    if a.added is not None and b.added is not None and a.added != b.added:
        token = min(a.added ^ b.added)
        return f"{token!r} is an added token of {first if token in a.added else other} alone"
    if a.merges is not None and b.merges is not None and a.merges != b.merges:
        pairs = zip(a.merges, b.merges, strict=False)
        place = next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a.merges), len(b.merges)))
        return f"the tokens are the same, but their merges differ from number {place} on"
    return None


def _id(vocabulary: Vocabulary, token: str) -> str:
    return str(vocabulary.tokens[token]) if token in vocabulary.tokens else "absent"


def _digests(files: Mapping[str, Path]) -> dict[str, str]:
    """The digests of the files that hold a vocabulary, by name."""
    own = (name for name in files if any(fnmatchcase(name, pattern) for pattern in _FILES))
    return {name: digest_file(files[name]) for name in own}
