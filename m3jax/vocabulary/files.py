"""The files of a united tokenizer: those of its leader, with the tokens that other models add."""

import json
from collections.abc import Mapping
from typing import Any

from m3jax.documents import FAULTS
from m3jax.errors import M3Error
from m3jax.vocabulary.pieces import CONTROL, NORMAL, USER_DEFINED, ScoredPiece, read_pieces, with_pieces
from m3jax.vocabulary.reading import Added, Merges, Vocabulary, pieces_of, read_json
from m3jax.vocabulary.uniting import Speaker, United

_JSON, _CONFIG, _MAP, _ADDED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
_STALE = ("tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "spiece.model")  # beside a tokenizer.json


def united_files(united: United) -> dict[str, bytes | None]:
    """The files in which an output's tokenizer is not its leader's.

    Args:
        united: The vocabulary.

    Returns:
        The content by name, None for a file that is left out; nothing where the leader's files are those of all.

    Raises:
        M3Error: The leader's files cannot be added to.
    """
    speaker = united.speakers[united.leader]
    if speaker.vocabulary is None or not (united.new or united.added or united.roles):
        return {}
    try:
        return _united_files(united, speaker, speaker.vocabulary)
    except FAULTS as error:
        raise M3Error(
            f"{speaker.name}: its tokenizer cannot take in the tokens of the others ({error}): save it once as"
            " tokenizer.json, or write tokenizer_source: base or one of the models"
        ) from None


def _united_files(united: United, speaker: Speaker, own: Vocabulary) -> dict[str, bytes | None]:
    files, ordinary = speaker.files, [token for token in united.new if token not in united.added]
    found: dict[str, bytes | None] = {}
    if _JSON in files:
        found[_JSON] = _as_json(_united_tokenizer(read_json(files[_JSON]), united, own, ordinary))
        if ordinary:
            found |= {name: None for name in files if name in _STALE}
    elif ordinary:
        name = pieces_of(files)
        if name is None:
            raise ValueError("it has no tokenizer.json")
        content = files[name].read_bytes()
        found[name] = with_pieces(content, _further_pieces(united, len(read_pieces(content).pieces)))
    later = {token: united.tokens[token] for token in united.new if token in united.added}
    if later and (_ADDED in files or _JSON not in files or pieces_of(files) is not None):
        before = read_json(files[_ADDED]) if _ADDED in files else {}
        found[_ADDED] = _as_json({**before, **later})
    config = read_json(files[_CONFIG]) if _CONFIG in files else {}
    if (grown := _united_config(config, united, own)) != config:
        found[_CONFIG] = _as_json(grown)
    if _MAP in files and united.roles:
        found[_MAP] = _as_json({**read_json(files[_MAP]), **united.roles})
    return found


def _as_json(told: Any) -> bytes:
    try:
        return (json.dumps(told, indent=2, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can only have escaped
        return (json.dumps(told, indent=2) + "\n").encode()


def _united_config(config: dict[str, Any], united: United, own: Vocabulary) -> dict[str, Any]:
    """tokenizer_config.json with the tokens that are added and the roles that are taken."""
    decoder = dict(config.get("added_tokens_decoder") or {})
    if decoder or _JSON not in united.speakers[united.leader].files:
        told = {**(own.added or {}), **united.added} if decoder else united.added
        decoder |= {str(united.tokens[token]): _flags(token, how) for token, how in told.items()}
        config = {**config, "added_tokens_decoder": dict(sorted(decoder.items(), key=lambda entry: int(entry[0])))}
    return {**config, **united.roles}


def _flags(token: str, how: Added) -> dict[str, Any]:
    return {"content": token, **how._asdict()}


# --- tokenizer.json --------------------------------------------------------------------------------------


def _united_tokenizer(entries: dict[str, Any], united: United, own: Vocabulary, ordinary: list[str]) -> dict[str, Any]:
    """A tokenizer.json with more tokens, once it is known that all get their ids."""
    listed = {token["content"]: token for token in entries.get("added_tokens") or ()}
    added = {**listed, **{t: {"id": united.tokens[t], **_flags(t, how)} for t, how in united.added.items()}}
    grown = {**entries, "added_tokens": sorted(added.values(), key=lambda token: int(token["id"]))}
    if ordinary:
        grown["model"] = _united_model(entries["model"], united, own)
    if _ids_of(grown) != dict(united.tokens):
        raise ValueError("its tokens would not keep their numbers")
    return grown


def _ids_of(entries: Mapping[str, Any]) -> dict[str, int]:
    """The id of every token, as whoever loads a tokenizer.json will see it."""
    from tokenizers import Tokenizer

    try:
        return dict(Tokenizer.from_str(json.dumps(entries)).get_vocab(with_added_tokens=True))
    except BaseException as error:  # the library raises nothing more special, and panics beside all exceptions
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise ValueError(f"its tokenizer.json cannot be loaded: {error}") from None


def _united_model(model: dict[str, Any], united: United, own: Vocabulary) -> dict[str, Any]:
    """The model of a tokenizer.json with every token of the union: loaders number what is not in it by themselves."""
    if not isinstance(model["vocab"], list):
        grown = {**model, "vocab": dict(sorted(united.tokens.items(), key=lambda entry: entry[1]))}
        if own.merges is not None:
            grown["merges"] = _as_stored(_united_merges(united, own), model.get("merges"))
        return grown
    scores = dict(own.scores or {})
    for speaker in united.speakers:
        told = speaker.vocabulary
        scores = {**((told.scores if told is not None else None) or {}), **scores}
    lowest = min((own.scores or scores).values())  # the score of what is unknown is reckoned from it
    order = sorted(united.tokens, key=united.tokens.__getitem__)
    if [united.tokens[token] for token in order] != list(range(len(order))):
        raise ValueError("some of its numbers belong to no token")
    return {**model, "vocab": [[token, max(scores.get(token, lowest), lowest)] for token in order]}


def _united_merges(united: United, own: Vocabulary) -> Merges:
    """The merges of all models, the leader's first, each once."""
    merges = dict.fromkeys(own.merges or ())
    for speaker in united.speakers:
        for merge in (speaker.vocabulary.merges if speaker.vocabulary is not None else None) or ():
            if len(merge) == 2 and {*merge, "".join(merge)} <= united.tokens.keys():
                merges.setdefault(merge)
    return tuple(merges)


def _as_stored(merges: Merges, before: Any) -> list[Any]:
    """Merges as a tokenizer.json has had them: as texts with a space, if no token has one."""
    in_texts = all(isinstance(each, str) for each in before or ())
    if in_texts and not any(" " in token for merge in merges for token in merge):
        return [" ".join(merge) for merge in merges]
    return [list(merge) for merge in merges]


# --- tokenizer.model -------------------------------------------------------------------------------------


def _further_pieces(united: United, count: int) -> list[ScoredPiece]:
    """The pieces that follow those of a leader, in the order of their ids."""
    scores: dict[str, float] = {}
    for speaker in united.speakers:
        told = speaker.vocabulary
        scores = {**((told.scores if told is not None else None) or {}), **scores}
    own = united.speakers[united.leader].vocabulary
    added = {**((own.added if own is not None else None) or {}), **united.added}
    order = sorted((t for t, number in united.tokens.items() if number >= count), key=united.tokens.__getitem__)
    if [united.tokens[token] for token in order] != list(range(count, count + len(order))):
        raise ValueError("some of its numbers belong to no token")
    pieces = []
    for token in order:
        if token not in added and token not in scores:
            raise ValueError(f"no model says how {token!r} is scored")
        form = NORMAL if token not in added else CONTROL if added[token].special else USER_DEFINED
        pieces.append(ScoredPiece(token, scores.get(token, 0.0), form))
    return pieces


# --- Configurations --------------------------------------------------------------------------------------


def with_ids(
    entries: dict[str, Any], united: United, who: tuple[int, int], theirs: Mapping[str, Any], size: int | None
) -> dict[str, Any]:
    """A config.json or generation_config.json whose ids are those of a tokenizer.

    Args:
        entries: Of the model that gives the output its configuration.
        united: The vocabulary.
        who: The position of that model, and of the one whose tokenizer it is.
        theirs: The same file of the latter.
        size: How many rows there are, for `vocab_size`; None for files that do not say it, and where none are added.
    """
    found, (template, leader) = dict(entries), who
    if size is not None and isinstance(entries.get("vocab_size"), int):
        found["vocab_size"] = size
    before = {number: token for token, number in united.tokens_of(template).items()}
    tokens = united.tokens if leader == united.leader else united.tokens_of(leader)
    for key, told in entries.items():
        if key.endswith("_token_id") and template != leader:
            found[key] = theirs[key] if key in theirs else _renumbered(told, before, tokens)
    for role, token in united.roles.items() if leader == united.leader else ():
        if found.get(key := f"{role}_id") is None and (key in entries or role == "pad_token"):
            found[key] = united.tokens[token]
    for key in ("text_config", "decoder", "encoder"):
        inner, of_theirs = entries.get(key), theirs.get(key)
        if isinstance(inner, dict) and "vocab_size" in inner:
            nested = united._replace(roles={r: t for r, t in united.roles.items() if f"{r}_id" in inner})
            found[key] = with_ids(inner, nested, who, of_theirs if isinstance(of_theirs, dict) else {}, size)
    return found


def _renumbered(told: Any, before: Mapping[int, str], tokens: Mapping[str, int]) -> Any:
    """Ids of tokens by the new vocabulary; None where it lacks them."""
    if isinstance(told, list):
        return [new for new in (_renumbered(each, before, tokens) for each in told) if new is not None]
    return tokens.get(before.get(told, "")) if type(told) is int else told
