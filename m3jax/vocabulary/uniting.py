"""One vocabulary for several models: its tokens and their ids, and where it is taken from."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from m3jax.checkpoints import digest_file
from m3jax.errors import M3Error
from m3jax.vocabulary.reading import (
    BPE,
    Added,
    Vocabulary,
    check_tokenizer,
    digests,
    has_tokenizer,
    read_vocabulary,
)

_NAMED = 3  # differences that a sentence names
UNION, BASE = "union", "base"


class Speaker(NamedTuple):
    """A model with its tokens.

    Attributes:
        name: As the recipe calls it.
        files: Its companions by name.
        vocabulary: What they tell; None where there is none, or none that can be read.
    """

    name: str
    files: Mapping[str, Path]
    vocabulary: Vocabulary | None


class Conflict(NamedTuple):
    """A number that stands for different tokens in two models.

    Attributes:
        number: It.
        said: Each token with the name of its model.
        is_ordinary: Whether neither is an added one.
    """

    number: int
    said: tuple[tuple[str, str], tuple[str, str]]
    is_ordinary: bool


class United(NamedTuple):
    """The vocabulary of an output.

    Attributes:
        speakers: The models, in their order.
        leader: Whose tokenizer it is, with what others add to it, by position.
        tokens: The id of every token; empty where the models have none that can be read, and so the same ones.
        added: How tokens are found that the leader's files do not tell of, or not as added ones.
        roles: Tokens with a role that the leader has not, by the role's name.
        notes: What a reader of the recipe should know.
    """

    speakers: tuple[Speaker, ...]
    leader: int
    tokens: Mapping[str, int]
    added: Mapping[str, Added]
    roles: Mapping[str, str]
    notes: tuple[str, ...]

    @property
    def own(self) -> Mapping[str, int]:
        """The leader's own tokens."""
        told = self.speakers[self.leader].vocabulary
        return told.tokens if told is not None else {}

    @property
    def new(self) -> tuple[str, ...]:
        """The tokens that the leader lacks, by their ids."""
        return tuple(sorted((token for token in self.tokens if token not in self.own), key=self.tokens.__getitem__))

    def tokens_of(self, position: int) -> Mapping[str, int]:
        """The tokens of a model by its own ids: the leader's, where it has none that can be read."""
        told = self.speakers[position].vocabulary
        return self.own if told is None else told.tokens


def told_apart(files: Mapping[str, Path]) -> tuple[tuple[str, str], ...]:
    """The digests of all files that tell of a model's tokens: models for which they are equal have the same."""
    beside = {file: files[file] for file in ("tokenizer_config.json", "special_tokens_map.json") if file in files}
    return tuple(sorted({**digests(files), **{file: digest_file(path) for file, path in beside.items()}}.items()))


def read_speakers(models: Sequence[tuple[str, Mapping[str, Path]]]) -> tuple[Speaker, ...]:
    """The models with their tokens; files that are equal are read once.

    Args:
        models: The name of each, and its companions by name.

    Raises:
        M3Error: A file is damaged.
    """
    known: dict[tuple[tuple[str, str], ...], Vocabulary | None] = {}
    speakers = []
    for name, files in models:
        key = told_apart(files)
        if key not in known:
            known[key] = read_vocabulary(files)
            if known[key] is None:
                check_tokenizer(files)
        speakers.append(Speaker(name, files, known[key]))
    return tuple(speakers)


def unite(source: str, speakers: Sequence[Speaker], template: int) -> United:
    """The vocabulary that a recipe asks for.

    Args:
        source: "union", "base", or the name of one of the models.
        speakers: The models, in their order.
        template: Which of them gives the output its configuration: the base, or the first.

    Raises:
        M3Error: No model is called so; tokenizers are of different types, or cannot be compared.
    """
    leader = template
    if source not in (UNION, BASE):
        found = next((i for i, speaker in enumerate(speakers) if speaker.name == source), None)
        if found is None:
            raise M3Error(f"tokenizer_source: {source} is not one of the models: write union, base or one of them")
        leader = found
    first = speakers[leader]
    notes = [said for other in speakers if (said := _incomparable(source, first, other)) is not None]
    if first.vocabulary is None:
        return United(tuple(speakers), leader, {}, {}, {}, tuple(dict.fromkeys(notes)))
    others = [speaker for speaker in speakers if speaker.vocabulary is not None]
    for other in others:
        _check_kinds(first, other)
    if source != UNION:
        return United(tuple(speakers), leader, first.vocabulary.tokens, {}, {}, tuple(dict.fromkeys(notes)))
    tokens = dict(first.vocabulary.tokens)
    added, roles = dict(first.vocabulary.added or {}), dict(first.vocabulary.roles)
    owners = dict.fromkeys(added, first.name)
    for other in others:
        assert other.vocabulary is not None
        fresh = sorted((t for t in other.vocabulary.tokens if t not in tokens), key=other.vocabulary.tokens.__getitem__)
        end = 1 + max(tokens.values(), default=-1)
        tokens |= {token: end + place for place, token in enumerate(fresh)}
        for token, how in (other.vocabulary.added or {}).items():
            led, leads = added.setdefault(token, how), owners.setdefault(token, other.name)
            if _around(led) != _around(how):
                notes.append(f"{token!r} is read as in {leads}: {other.name} treats the spaces around it otherwise")
            if led.special != how.special:
                notes.append(
                    f"{token!r} is {'' if led.special else 'not '}special, as in {leads}: in {other.name} it is"
                    f" {'not' if led.special else 'special'}"
                )
        roles = {**other.vocabulary.roles, **roles}
        notes += [*_on_splitting(first, other), *_on_reading(first, other), *_on_scores(first, other)]
    own = first.vocabulary
    return United(
        tuple(speakers),
        leader,
        tokens,
        {token: how for token, how in added.items() if token not in (own.added or {}) and token in tokens},
        {role: token for role, token in roles.items() if role not in own.roles},
        tuple(dict.fromkeys(notes)),
    )


def _around(how: Added) -> tuple[bool, bool, bool]:
    """What a token takes of the text around it."""
    return how.lstrip, how.rstrip, how.single_word


def _incomparable(source: str, first: Speaker, other: Speaker) -> str | None:
    """What to say of a model whose tokens cannot be compared with the leader's; None where they can.

    Raises:
        M3Error: They would have to be.
    """
    if first.vocabulary is not None and other.vocabulary is not None:
        return None
    if digests(first.files) == digests(other.files):
        return None
    bare = next((speaker for speaker in (first, other) if not has_tokenizer(speaker.files)), None)
    if source == UNION:
        said = "their files differ" if bare is None else f"{bare.name} has no tokenizer"
        raise M3Error(
            f"tokenizer_source: union: the vocabularies of {first.name} and {other.name} cannot be united: {said}, and"
            " what cannot be read cannot be compared; write base or one of the models, or save a tokenizer.json there"
        )
    said = f"{bare.name} has no tokenizer" if bare is not None else "their tokenizers cannot be read"
    return f"{first.name}, {other.name}: {said}, so the rows of both are taken to be of the same tokens"


def _check_kinds(first: Speaker, other: Speaker) -> None:
    """Raise M3Error where tokens are pieces of different kinds, so that equal texts need not be the same token."""
    a, b = first.vocabulary, other.vocabulary
    assert a is not None
    assert b is not None
    if a.kind is None or b.kind is None or a.kind == b.kind or a.tokens == b.tokens:
        return
    if BPE in (a.kind, b.kind) and a.kind.endswith(BPE) and b.kind.endswith(BPE):
        return
    raise M3Error(
        f"tokenizer_source: the tokenizers are of different types, {a.kind} in {first.name} and {b.kind} in"
        f" {other.name}, whose tokens have nothing in common: merge models of one type of tokenizer"
    )


def _on_splitting(first: Speaker, other: Speaker) -> Iterator[str]:
    """What to say where texts are split otherwise than one of the models has learned it."""
    a, b = first.vocabulary, other.vocabulary
    assert a is not None
    assert b is not None
    ordinary = [token for token in b.tokens if token not in a.tokens and token not in (b.added or {})]
    if ordinary:
        told = f"{ordinary[0]!r}" if len(ordinary) == 1 else f"{ordinary[0]!r} and {len(ordinary) - 1:,} more"
        yield (
            f"{told} of {other.name} come to the tokens of {first.name}, so that texts are split otherwise than either"
            " model has learned it"
        )
    elif a.merges is not None and b.merges is not None and a.merges != b.merges:
        yield (
            f"{first.name} and {other.name} have the same tokens, but their merges differ from number"
            f" {_first_difference(a, b)} on: those of {first.name} come first"
        )


def _on_reading(first: Speaker, other: Speaker) -> Iterator[str]:
    """What to say where equal tokens are found otherwise than one of the models has learned it."""
    a, b = first.vocabulary, other.vocabulary
    assert a is not None
    assert b is not None
    if a.steps is None or b.steps is None:  # files of a time when they did not tell it
        return
    differing = [(name, a.steps[name], b.steps[name]) for name in a.steps if a.steps[name] != b.steps[name]]
    names = [name for name, own, theirs in differing if _loaded(name, own) != _loaded(name, theirs)]
    if names:
        yield (
            f"texts are split by the {' and '.join(names)} of {first.name}'s tokenizer.json: what {other.name} has"
            " learned with is another"
        )
    once = [t for t in a.tokens if t in b.tokens and (t in (a.added or ())) != (t in (b.added or ()))]
    if once:
        adding, lacking = (first, other) if once[0] in (a.added or ()) else (other, first)
        yield f"{_some(once)} is found before all else, as it is added in {adding.name}: in {lacking.name} it is not"


def _on_scores(first: Speaker, other: Speaker) -> Iterator[str]:
    """What to say where pieces are not scored as one of the models has learned it."""
    a, b = first.vocabulary, other.vocabulary
    assert a is not None
    assert b is not None
    if scored := _scored_otherwise(a, b):
        yield f"{_some(scored)} has another score in {other.name}: that of {first.name} is taken"
    if a.steps is None or not a.scores or not b.scores:  # a model of SentencePiece takes pieces as they are
        return
    lowest = min(a.scores.values())
    below = [token for token, score in b.scores.items() if score < lowest and token not in a.tokens]
    if below:
        yield (
            f"{_some(below)} of {other.name} gets the score {lowest:g} in place of {b.scores[below[0]]:g}: it is the"
            f" lowest of {first.name}, from which the score of what is unknown is reckoned"
        )


def _some(tokens: Sequence[str]) -> str:
    return f"{tokens[0]!r}" if len(tokens) == 1 else f"{tokens[0]!r} (and {len(tokens) - 1:,} more)"


def _loaded(name: str, step: Any) -> Any:
    """A step of a tokenizer.json as its library understands it, which has several ways to say the same."""
    from tokenizers import Tokenizer

    if name == "options":
        return step
    told = {"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", "vocab": {}, "unk_token": ""}}
    try:
        return json.loads(Tokenizer.from_str(json.dumps({**told, name: step})).to_str())[name]
    except BaseException as error:  # as of `files._ids_of`: then what is written is compared
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        return step


def _scored_otherwise(a: Vocabulary, b: Vocabulary) -> list[str]:
    """The pieces of two models whose scores differ; of byte-pair encoding, whose order by them does."""
    scores, others = a.scores, b.scores
    if scores is None or others is None:
        return []
    common = [token for token in scores if token in others and token not in (a.added or ())]
    if a.kind == "Unigram":
        return [token for token in common if not math.isclose(scores[token], others[token], rel_tol=1e-6)]
    pairs = zip(*(sorted(common, key=lambda token: (-own[token], token)) for own in (scores, others)), strict=True)
    return [one for one, other in pairs if one != other]


def _first_difference(a: Vocabulary, b: Vocabulary) -> int:
    x, y = a.merges or (), b.merges or ()
    return next((i for i, (p, q) in enumerate(zip(x, y, strict=False)) if p != q), min(len(x), len(y)))


# --- In words --------------------------------------------------------------------------------------------


def difference(one: Speaker, other: Speaker) -> str | None:
    """What differs between the vocabularies of two models, in words; None where nothing does, or nobody can tell."""
    a, b = one.vocabulary, other.vocabulary
    if a is None or b is None:
        return None
    tokens = [token for token in {**a.tokens, **b.tokens} if a.tokens.get(token) != b.tokens.get(token)]
    if not tokens:
        return None
    told = [_told(token, one, other) for token in tokens[:_NAMED]]
    more = [f"{len(tokens) - _NAMED:,} more"] if len(tokens) > _NAMED else []
    return ", ".join(told + more)


def first_conflict(speakers: Sequence[Speaker], count: int) -> Conflict | None:
    """The first number that stands for one token in a model and for another in another model.

    Args:
        speakers: Any number of models; all are held against all.
        count: How many rows they have: numbers beyond are of no row.

    Returns:
        The number and its tokens, two ordinary ones before others; None where no number has several, or nobody can
        tell.
    """
    tokens: dict[int, str] = {}
    owners: dict[int, Speaker] = {}
    found: dict[int, Conflict] = {}
    distinct: dict[int, Speaker] = {}
    for speaker in speakers:
        distinct.setdefault(id(speaker.vocabulary), speaker)
    for speaker in distinct.values():
        told = speaker.vocabulary
        for token, number in told.tokens.items() if told is not None else ():
            if number >= count:
                continue
            first, owner = tokens.setdefault(number, token), owners.setdefault(number, speaker)
            if first == token:
                continue
            is_added = _is_added(first, owner), _is_added(token, speaker)
            if number not in found or not (found[number].is_ordinary or any(is_added)):
                found[number] = Conflict(number, ((first, owner.name), (token, speaker.name)), not any(is_added))
            if is_added == (True, False):  # against which other ordinary ones are held
                tokens[number], owners[number] = token, speaker
    return min(found.values(), key=lambda each: (not each.is_ordinary, each.number), default=None)


def _is_added(token: str, speaker: Speaker) -> bool:
    return speaker.vocabulary is not None and token in (speaker.vocabulary.added or ())


def misnumbered(united: United, position: int) -> str | None:
    """What a model's tokenizer numbers otherwise than a united vocabulary, in words; None where nothing."""
    speaker = united.speakers[position]
    if speaker.vocabulary is None:
        same = digests(speaker.files) == digests(united.speakers[united.leader].files)
        return None if same else f"the tokenizer of {speaker.name} cannot be read"
    tokens = speaker.vocabulary.tokens
    token = next((token for token, number in tokens.items() if united.tokens.get(token) != number), None)
    if token is None:
        return None
    there = f"the output {united.tokens[token]}" if token in united.tokens else "the output not at all"
    return f"{speaker.name} numbers {token!r} {tokens[token]}, {there}"


def _told(token: str, one: Speaker, other: Speaker) -> str:
    ids = [(speaker.name, speaker.vocabulary.tokens.get(token)) for speaker in (one, other) if speaker.vocabulary]
    there = [(name, number) for name, number in ids if number is not None]
    if len(there) == 1:
        return f"{token!r} is a token of {there[0][0]} alone"
    return f"{token!r} is {' and '.join(f'{number} in {name}' for name, number in there)}"
