"""What keeps an attacked prompt like the original: a sentence encoder, and the parts of speech of its words.

Facts are from github.com/QData/TextAttack at v0.3.10 (constraints/semantics/sentence_encoders/sentence_encoder.py,
constraints/grammaticality/part_of_speech.py, shared/attacked_text.py). There the encoder is the Universal Sentence
Encoder and the tagger NLTK's; here both are BERTs that the user gives.

References:
    Jin et al., Is BERT Really Robust? A Strong Baseline for Natural Language Attack on Text Classification and
    Entailment, 2020; Reimers and Gurevych, Sentence-BERT: Sentence Embeddings using Siamese BERT-Networks, 2019;
    Petrov et al., A Universal Part-of-Speech Tagset, 2012.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from m3jax.decoder import length_bucket
from m3jax.decoder.entries import read_json
from m3jax.errors import M3Error
from m3jax.evaluation.attacks.bert import (
    BertConfig,
    Encoder,
    Params,
    Tagger,
    hidden_states,
    load_bert,
    read_bert,
    tag_logits,
)
from m3jax.evaluation.attacks.wording import Filter, Wording

Encode: TypeAlias = Callable[[Sequence[str]], npt.NDArray[np.float32]]
"""Texts in, a vector of each out, [texts, width]."""

Tag: TypeAlias = Callable[[Sequence[str], int], str]
"""Words of a text and the place of one in, its part of speech out: a tag of the universal tag set."""

_ROWS = 16  # texts that are encoded together
_BEFORE, _AFTER = 4, 3  # words around one that the tagger sees
# Tags of Universal Dependencies and of the Penn Treebank as those of the universal tag set that NLTK gives.
_TAGS: Mapping[str, str] = MappingProxyType(
    {
        **{tag: tag for tag in ("NOUN", "VERB", "ADJ", "ADV", "PRON", "DET", "ADP", "NUM", "PRT", "CONJ", "X", ".")},
        **{"PROPN": "NOUN", "AUX": "VERB", "SCONJ": "ADP", "CCONJ": "CONJ", "PART": "PRT", "INTJ": "X", "SYM": "X"},
        **{"PUNCT": ".", "NN": "NOUN", "NNS": "NOUN", "NNP": "NOUN", "NNPS": "NOUN", "MD": "VERB", "VB": "VERB"},
        **{"VBD": "VERB", "VBG": "VERB", "VBN": "VERB", "VBP": "VERB", "VBZ": "VERB", "JJ": "ADJ", "JJR": "ADJ"},
        **{"JJS": "ADJ", "RB": "ADV", "RBR": "ADV", "RBS": "ADV", "WRB": "ADV", "PRP": "PRON", "PRP$": "PRON"},
        **{"WP": "PRON", "WP$": "PRON", "EX": "DET", "DT": "DET", "PDT": "DET", "WDT": "DET", "IN": "ADP"},
        **{"CD": "NUM", "RP": "PRT", "TO": "PRT", "POS": "PRT", "CC": "CONJ", "FW": "X", "UH": "X", "LS": "X"},
    }
)


class Bound(NamedTuple):
    """How like the original the sentence encoder must find a prompt.

    Attributes:
        least: The least similarity.
        metric: "cosine", or "angular": 1 less the angle's share of half a turn.
        window: Words around the changed one that are compared, with the prompt so far, in prompts that have as many;
            the whole prompt, with the original, if None.
    """

    least: float
    metric: Literal["cosine", "angular"] = "cosine"
    window: int | None = None


def load_encoder(name: str) -> Encode:
    """Reads a sentence encoder: a BERT whose last layer's outputs are averaged, or whose first one counts.

    Args:
        name: A model directory or hub id, with safetensors, config and tokenizer. The pooling is what
            1_Pooling/config.json says, as Sentence Transformers writes it; the mean where there is none.

    Raises:
        M3Error: It is absent, no BERT, incomplete, or pools in another way.
    """
    path, config, tokenizer = read_bert(name)
    pool = _pooling(path)
    params = load_bert(path, config, Encoder)

    def encode(texts: Sequence[str]) -> npt.NDArray[np.float32]:
        rows = [tokenizer(text)["input_ids"] for text in texts]
        return np.concatenate([pool(*part) for part in _run(name, hidden_states, params, config, rows)])

    return encode


def load_tagger(name: str) -> Tag:
    """Reads a tagger: a BERT that gives each token a part of speech; a word has that of its first token.

    Args:
        name: A model directory or hub id, with safetensors, config and tokenizer, whose labels are the tags of
            Universal Dependencies or of the Penn Treebank.

    Raises:
        M3Error: It is absent, no BERT, incomplete, or its labels are no parts of speech.
    """
    path, config, tokenizer = read_bert(name)
    if not {"NOUN", "VERB"} <= {_TAGS.get(label) for label in config.labels}:
        few = ", ".join(config.labels[:5]) or "none"
        raise M3Error(
            f"{name}: its labels ({few}) are no parts of speech: give a tagger with NOUN and VERB, or NN and VB"
        )
    params = load_bert(path, config, Tagger)

    @functools.lru_cache(maxsize=4096)
    def tag_in(text: str, start: int) -> str:
        encoded = tokenizer(text, return_offsets_mapping=True)
        spans = [tuple(span) for span in encoded["offset_mapping"]]
        place = next((place for place, (first, last) in enumerate(spans) if first <= start < last), None)
        if place is None:
            return "X"  # a word of letters that the tokenizer leaves out
        ((logits, _),) = _run(name, tag_logits, params, config, [encoded["input_ids"]])
        return _TAGS.get(config.labels[int(np.argmax(logits[0, place]))], "X")

    def tag(words: Sequence[str], index: int) -> str:
        return tag_in(" ".join(words), sum(len(word) + 1 for word in words[:index]))

    return tag


def _pooling(path: Path) -> Callable[[npt.NDArray[np.float32], npt.NDArray[np.int32]], npt.NDArray[np.float32]]:
    """How the outputs for tokens become one vector."""
    place = path / "1_Pooling" / "config.json"
    entries = read_json(place) if place.exists() else {}
    modes = [key for key, value in entries.items() if key.startswith("pooling_mode_") and value is True]
    if modes == ["pooling_mode_cls_token"]:
        return lambda hidden, lengths: hidden[:, 0]
    if modes not in ([], ["pooling_mode_mean_tokens"]):
        raise M3Error(f"{place}: only the mean of tokens and the first token are known here, and it says {modes}")

    def mean(hidden: npt.NDArray[np.float32], lengths: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
        seen = np.arange(hidden.shape[1])[None, :, None] < lengths[:, None, None]
        return np.asarray(np.sum(hidden * seen, axis=1) / lengths[:, None], np.float32)

    return mean


def _run(
    name: str, forward: Any, params: Params, config: BertConfig, rows: Sequence[Sequence[int]]
) -> list[tuple[npt.NDArray[np.float32], npt.NDArray[np.int32]]]:
    """What a model makes of token ids, [texts, length, width] with the lengths, so many texts at a time."""
    longest = max(map(len, rows))
    if longest > config.context_length:
        raise M3Error(f"{name} sees {config.context_length} tokens, and the prompt has {longest}: shorten it")
    out = []
    for start in range(0, len(rows), _ROWS):
        part = rows[start : start + _ROWS]
        tokens = np.zeros((1 if len(rows) == 1 else _ROWS, length_bucket(longest, config.context_length)), np.int32)
        lengths = np.ones(len(tokens), np.int32)
        for place, row in enumerate(part):
            tokens[place, : len(row)], lengths[place] = row, len(row)
        found = forward(params, jnp.asarray(tokens), jnp.asarray(lengths), config=config)
        out.append((np.asarray(found)[: len(part)], lengths[: len(part)]))
    return out


def keeps_meaning(encode: Encode, bound: Bound) -> Filter:
    """Whether the encoder finds a prompt like the original, or, within a window, like the prompt so far.

    Args:
        encode: The sentence encoder.
        bound: How like.
    """

    def keep(original: Wording, current: Wording, index: int, tried: Sequence[Wording]) -> list[Wording]:
        size = bound.window
        if not tried or (size is not None and len(current.words) < size):
            return list(tried)
        if size is None:
            texts = [original.text, *(one.text for one in tried)]
        else:
            texts = [_window(one, index, size) for one in (current, *tried)]
        vectors = encode(texts).astype(np.float64)
        norms = np.linalg.norm(vectors, axis=1)
        cosines = np.clip(vectors[1:] @ vectors[0] / np.maximum(norms[1:] * norms[0], 1e-300), -1, 1)
        like = cosines if bound.metric == "cosine" else 1 - np.arccos(cosines) / np.pi
        return [one for one, value in zip(tried, like, strict=True) if value >= bound.least]

    return keep


def _window(prompt: Wording, index: int, size: int) -> str:
    """So many words around one, as TextAttack counts them."""
    count = len(prompt.words)
    if 2 * index < size - 1:
        first, last = 0, min(size, count) - 1
    elif 2 * index + size - 1 >= 2 * count:
        first, last = max(0, count - size), count - 1
    else:
        first, last = index - size // 2, index + (size - 1) // 2
    return prompt.text[prompt.span(first)[0] : prompt.span(last)[1]]


def keeps_part_of_speech(tag: Tag) -> Filter:
    """Whether a new word has the part of speech of the original one; nouns and verbs may stand for each other.

    Args:
        tag: The tagger; it sees the word between the four words before it and the three behind it.
    """

    def keep(original: Wording, current: Wording, index: int, tried: Sequence[Wording]) -> list[Wording]:
        before = original.words[max(0, index - _BEFORE) : index]
        after = original.words[index + 1 : index + 1 + _AFTER]

        def part(word: str) -> str:
            return tag((*before, word, *after), len(before))

        own = part(original.words[index])
        return [one for one in tried if (other := part(one.words[index])) == own or {own, other} <= {"NOUN", "VERB"}]

    return keep
