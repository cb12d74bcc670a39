"""Vocabularies as the files beside the weights tell them: tokens with their ids, added tokens, merges and scores."""

import json
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

from blake3 import blake3

from m3jax.checkpoints import digest_file
from m3jax.documents import FAULTS, parse_json
from m3jax.errors import M3Error
from m3jax.vocabulary.pieces import read_pieces

_FILES = (
    *("tokenizer.json", "tokenizer.model*", "vocab.*", "merges.txt", "added_tokens.json"),
    *("tekken.json", "*.tiktoken", "spiece.model", "sentencepiece*.model"),
)
_BESIDE = ("tokenizer_config.json", "special_tokens_map.json")
_PIECES = ("tokenizer.model", "spiece.model", "sentencepiece*.model")
_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FURTHER_ROLES = ("additional_special_tokens", "extra_special_tokens")
_LARGEST_ID = 2**31
# Classes whose ids are not those of their pieces: they shift them, or add tokens that no file names.
_NUMBERED_OTHERWISE = (
    "XLMRoberta",
    "Camembert",
    "MBart",
    "Nllb",
    "T5",
    "Pegasus",
    "BigBird",
    "Barthez",
    "XGLM",
    "Plbart",
)
_SPACE = "▁"

BPE, BYTE_LEVEL, PIECE_BPE = "BPE", "byte-level BPE", "SentencePiece BPE"
"""Kinds of byte-pair encoding: of files that do not say which, of bytes, and of SentencePiece's pieces."""

Merges: TypeAlias = tuple[tuple[str, ...], ...]


class Added(NamedTuple):
    """How a token is found in a text before all else.

    Attributes:
        special: It is left out where a text is wanted without special tokens.
        lstrip: Spaces before it belong to it.
        rstrip: Spaces behind it belong to it.
        normalized: It is looked for in the normalised text.
        single_word: It is no part of a longer word.
    """

    special: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False
    single_word: bool = False


class Vocabulary(NamedTuple):
    """The tokens of one model.

    Attributes:
        tokens: The id of every token, added ones too.
        added: Those that are never parts of a longer one; None where the files do not tell.
        merges: Pairs that byte-pair encoding joins, the first joined first; None where the files do not tell.
        kind: What splits texts: "byte-level BPE", "SentencePiece BPE", "Unigram", "WordPiece", …; None if unknown.
        scores: Of pieces; None where there are none.
        roles: The tokens that are called `bos_token`, `pad_token`, ….
        steps: What else splits texts, as a tokenizer.json says it: "normalizer", "pre_tokenizer", and "options", those
            of what splits words; None where the files do not tell.
    """

    tokens: Mapping[str, int]
    added: Mapping[str, Added] | None = None
    merges: Merges | None = None
    kind: str | None = None
    scores: Mapping[str, float] | None = None
    roles: Mapping[str, str] = MappingProxyType({})
    steps: Mapping[str, Any] | None = None


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
        roles, further = _roles(files)
        later = dict(_added_later(files, {*roles.values(), *further}))
    except (*FAULTS, OSError):
        return None
    tokens = {**told.tokens, **{token: number for token, (number, _) in later.items()}}
    missing = [token for token in dict.fromkeys((*roles.values(), *further)) if token not in tokens]
    first = 1 + max(tokens.values(), default=-1)  # where loaders put special tokens that no other file has
    tokens |= {token: first + place for place, token in enumerate(missing)}
    special = {token: Added(special=True) for token in (*roles.values(), *further)}
    added = {**special, **{token: how for token, (_, how) in later.items()}, **(told.added or {})}
    return told._replace(tokens=tokens, added=added if told.added is not None or added else None, roles=roles)


def check_tokenizer(files: Mapping[str, Path]) -> None:
    """Raise M3Error for the first of a tokenizer's JSON files that is none, as one that was cut.

    Args:
        files: The model's companions by name.
    """
    for name in (*_own(files), *_BESIDE):
        if name.endswith(".json") and name in files:
            try:
                read_json(files[name])
            except FAULTS as error:
                raise M3Error(
                    f"{files[name]}: is no JSON ({error}), so its tokens cannot be told: restore it"
                ) from None


def numbering(vocabulary: Vocabulary | None) -> str:
    """BLAKE3 of which token has which id, as JSON with sorted keys and without spaces; empty where nobody can tell.

    Args:
        vocabulary: As it was read.
    """
    if vocabulary is None:
        return ""
    told = json.dumps(dict(vocabulary.tokens), sort_keys=True, separators=(",", ":"))
    return blake3(told.encode()).hexdigest()


def has_tokenizer(files: Mapping[str, Path]) -> bool:
    """Whether a model has files that hold a vocabulary, be they readable or not."""
    return bool(_own(files))


def digests(files: Mapping[str, Path]) -> dict[str, str]:
    """The digests of the files that hold a vocabulary, by name."""
    return {name: digest_file(files[name]) for name in _own(files)}


def is_vocabulary(name: str) -> bool:
    """Whether a file of that name holds a vocabulary."""
    return any(fnmatchcase(name, pattern) for pattern in _FILES)


def pieces_of(files: Mapping[str, Path]) -> str | None:
    """The name of the file that holds a model of SentencePiece; None where there is none."""
    return next((name for name in files if any(fnmatchcase(name, pattern) for pattern in _PIECES)), None)


def read_json(path: Path) -> Any:
    """What a file of JSON says; half a surrogate pair may be in it."""
    return parse_json(path.read_bytes(), halves=True)


def _own(files: Mapping[str, Path]) -> list[str]:
    return [name for name in files if is_vocabulary(name)]


def _from_files(files: Mapping[str, Path]) -> Vocabulary | None:
    """The vocabulary without what is added to it in files of their own."""
    if "tokenizer.json" in files:
        return _from_tokenizer(read_json(files["tokenizer.json"]))
    if "vocab.json" in files:
        lines = _lines(files["merges.txt"]) if "merges.txt" in files else None
        pairs = None if lines is None else tuple(tuple(line.split(" ")) for line in lines if line[:8] != "#version")
        return Vocabulary(_ids(read_json(files["vocab.json"])), None, pairs, None if pairs is None else BPE)
    if "vocab.txt" in files:
        words = {token: number for number, token in enumerate(_lines(files["vocab.txt"]))}
        return Vocabulary(words, None, None, "WordPiece")
    name = pieces_of(files)
    if name is None or _numbers_otherwise(files):
        return None
    told = read_pieces(files[name].read_bytes())
    ids = {piece.text: number for number, piece in enumerate(told.pieces)}
    return Vocabulary(ids, None, None, told.kind, {piece.text: piece.score for piece in told.pieces})


def _numbers_otherwise(files: Mapping[str, Path]) -> bool:
    """Whether a tokenizer's class gives pieces other ids than their model does."""
    told = read_json(files["tokenizer_config.json"]) if "tokenizer_config.json" in files else {}
    name = str(told.get("tokenizer_class", ""))
    return any(part in name for part in _NUMBERED_OTHERWISE)


def _from_tokenizer(entries: Any) -> Vocabulary:
    """What a tokenizer.json tells."""
    model = entries["model"]
    listed = isinstance(model["vocab"], list)  # with scores, the id of each its place
    vocabulary = {token: number for number, (token, _) in enumerate(model["vocab"])} if listed else model["vocab"]
    scores = {token: float(score) for token, score in model["vocab"]} if listed else None
    told = entries.get("added_tokens") or ()
    ids = _ids({token["content"]: token["id"] for token in told})
    added = {token["content"]: _added(token) for token in told}
    pairs = model.get("merges")
    merges = None if pairs is None else tuple(tuple(p.split(" ") if isinstance(p, str) else p) for p in pairs)
    kind = _kind(entries, model, listed)
    options = {key: each for key, each in model.items() if each and key not in ("type", "vocab", "merges", "unk_id")}
    steps = {"normalizer": entries.get("normalizer"), "pre_tokenizer": entries.get("pre_tokenizer"), "options": options}
    return Vocabulary({**_ids(vocabulary), **ids}, added, merges, kind, scores, steps=steps)


def _kind(entries: Mapping[str, Any], model: Mapping[str, Any], listed: bool) -> str | None:
    """What splits texts, as a tokenizer.json says or shows it."""
    kind = model.get("type")
    if kind is None:  # files of early versions, which had no types
        words = "WordPiece" if "max_input_chars_per_word" in model else None
        kind = BPE if "merges" in model else "Unigram" if listed else words
    if kind != BPE:
        return kind if isinstance(kind, str) else None
    steps = list(_steps([entries.get(key) for key in ("normalizer", "pre_tokenizer", "decoder")]))
    if any(step.get("type") == "ByteLevel" for step in steps):
        return BYTE_LEVEL
    marked = any(_SPACE in step.values() or step.get("type") == "Metaspace" for step in steps)
    return PIECE_BPE if marked or model.get("byte_fallback") else BPE


def _steps(told: Any) -> Iterator[Mapping[str, Any]]:
    """All objects in what a tokenizer.json says of its steps."""
    if isinstance(told, Mapping):
        yield told
        yield from _steps(list(told.values()))
    elif isinstance(told, list):
        for each in told:
            yield from _steps(each)


def _added(told: Mapping[str, Any]) -> Added:
    """How a token is found, as a tokenizer.json or tokenizer_config.json says it."""
    special = bool(told.get("special", False))
    flags = {key: bool(told.get(key, False)) for key in ("lstrip", "rstrip", "single_word")}
    return Added(special=special, normalized=bool(told.get("normalized", not special)), **flags)


def _added_later(files: Mapping[str, Path], special: set[str]) -> Iterator[tuple[str, tuple[int, Added]]]:
    """Tokens that other files than the vocabulary's own add to it, with their ids."""
    if "added_tokens.json" in files:
        for token, number in _ids(read_json(files["added_tokens.json"])).items():
            yield token, (number, Added(special=token in special, normalized=token not in special))
    if "tokenizer_config.json" in files:
        decoder = read_json(files["tokenizer_config.json"]).get("added_tokens_decoder") or {}
        found = _ids({token["content"]: int(number) for number, token in decoder.items()})
        yield from ((token["content"], (found[token["content"]], _added(token))) for token in decoder.values())


def _roles(files: Mapping[str, Path]) -> tuple[dict[str, str], list[str]]:
    """The tokens that have a role, by its name, and further special ones."""
    roles: dict[str, str] = {}
    further: list[str] = []
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        told = read_json(files[name]) if name in files else {}
        found = {role: _content(told.get(role)) for role in _ROLES}
        roles |= {role: token for role, token in found.items() if token}
        for key in _FURTHER_ROLES:
            listed = told.get(key) or ()
            each = listed.values() if isinstance(listed, Mapping) else listed
            further += [token for token in map(_content, each) if token]
    return roles, list(dict.fromkeys(further))


def _content(told: Any) -> str | None:
    """The text of a token, which may stand there with its flags."""
    text = told.get("content") if isinstance(told, Mapping) else told
    return text if isinstance(text, str) else None


def _lines(path: Path) -> Sequence[str]:
    return path.read_text(encoding="utf-8").rstrip("\n").split("\n")


def _ids(entries: Mapping[Any, Any]) -> dict[str, int]:
    """A mapping of tokens to ids, if it is one."""
    if not all(isinstance(t, str) and type(n) is int and 0 <= n < _LARGEST_ID for t, n in entries.items()):
        raise ValueError("no mapping of tokens to ids")
    return dict(entries)
