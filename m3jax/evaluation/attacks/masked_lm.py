"""Words that a masked language model would put in a word's place: BERT-Attack's candidates.

References:
    Li et al., BERT-ATTACK: Adversarial Attack Against BERT Using BERT, 2020.
"""

import functools
import heapq
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from m3jax.decoder import length_bucket
from m3jax.errors import M3Error
from m3jax.evaluation.attacks.bert import load_bert, masked_logits, read_bert
from m3jax.evaluation.attacks.edits import changed
from m3jax.evaluation.attacks.profiles import MaskedWords
from m3jax.evaluation.attacks.textattack import words_of
from m3jax.evaluation.attacks.wording import Candidates, Wording
from m3jax.evaluation.attacks.words import STOP_WORDS

Scores = Callable[[Sequence[int]], npt.NDArray[np.float32]]
"""Token ids of a text in, the logits [length, vocabulary] of every word in every place out."""

_PIECE = "##"  # begins a token that goes on with a word


def load_masked_words(name: str) -> MaskedWords:
    """Reads a BERT.

    Args:
        name: A model directory or hub id, with safetensors, config and tokenizer.

    Raises:
        M3Error: It is absent, no BERT, incomplete, or has no tokenizer.
    """
    path, config, tokenizer = read_bert(name)
    if None in (tokenizer.mask_token, tokenizer.cls_token, tokenizer.unk_token):
        raise M3Error(
            f"{name}: its tokenizer is no masked language model's, as it has no mask: take that of the weights"
        )
    params = load_bert(path, config)

    def scores(text: Sequence[int]) -> npt.NDArray[np.float32]:
        if len(text) > config.context_length:
            raise M3Error(f"{name} sees {config.context_length} tokens, and the prompt has {len(text)}: shorten it")
        row = np.zeros((1, length_bucket(len(text), config.context_length)), np.int32)
        row[0, : len(text)] = text
        logits = masked_logits(params, jnp.asarray(row), jnp.asarray([len(text)], jnp.int32), config=config)
        return np.asarray(logits[0, : len(text)])

    return functools.partial(masked_words, tokenizer, scores)


def masked_words(tokenizer: Any, scores: Scores, most: int, to_the_letter: bool = False) -> Candidates:
    """BERT-Attack's candidates: the prompt is read as it is, nothing masked.

    The tokens likeliest in a word's place stand for it; where the word has several tokens, the words made of them
    whose cross-entropy is lowest. Stop words, pieces of words and what is no word are left out.

    Args:
        tokenizer: A transformers tokenizer whose pieces begin with ##.
        scores: The masked language model.
        most: Tokens taken for each place, and the most words.
        to_the_letter: As TextAttack does it: of a word of several tokens not the best combinations but the first,
            the last token changing fastest; and whatever is one word stays, stop words and numbers too.
    """
    special = set(tokenizer.all_special_ids)
    names: list[str] = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))

    @functools.lru_cache(maxsize=8)
    def read(text: str) -> tuple[npt.NDArray[np.float32], list[tuple[int, int]]]:
        encoded = tokenizer(text, return_offsets_mapping=True)
        spans = [span if token not in special else (0, 0) for token, span in _pairs(encoded)]
        logits = scores(encoded["input_ids"])[:, : len(names)]
        return logits, spans

    def candidates(prompt: Wording, index: int) -> list[str]:
        logits, spans = read(prompt.text)
        start, end = prompt.span(index)
        places = [place for place, (first, last) in enumerate(spans) if start <= first < last <= end]
        choices = [_likeliest(logits[place], most) for place in places]
        if to_the_letter:
            return changed(prompt.words[index], list(_first_words(names, choices, most)))
        words = (_joined([names[token] for token in combination]) for combination in best_first(choices, most))
        kept = [word for word in words if word is not None and word.lower() not in STOP_WORDS]
        return changed(prompt.words[index], kept)

    return candidates


def _pairs(encoded: Any) -> list[tuple[int, tuple[int, int]]]:
    return list(zip(encoded["input_ids"], map(tuple, encoded["offset_mapping"]), strict=True))


def _likeliest(logits: npt.NDArray[np.float32], most: int) -> list[tuple[float, int]]:
    """The likeliest tokens of a place with what each loses against the first."""
    order = np.argsort(-logits, kind="stable")[:most]
    return [(float(logits[order[0]]) - float(logits[token]), int(token)) for token in order]


def best_first(choices: Sequence[Sequence[tuple[float, int]]], most: int) -> list[tuple[int, ...]]:
    """The combinations of one choice for each place whose losses add up to least, the least first.

    Args:
        choices: For each place (loss, token), the least loss first.
        most: How many combinations.

    Example:
        >>> best_first([[(0.0, 1), (3.0, 2)], [(0.0, 5), (1.0, 6)]], 3)
        [(1, 5), (1, 6), (2, 5)]
    """
    if not choices:
        return []
    first = (0,) * len(choices)
    queue, met = [(sum(place[0][0] for place in choices), first)], {first}
    found: list[tuple[int, ...]] = []
    while queue and len(found) < most:
        _, picked = heapq.heappop(queue)
        found.append(tuple(place[pick][1] for place, pick in zip(choices, picked, strict=True)))
        for i, place in enumerate(choices):
            further = (*picked[:i], picked[i] + 1, *picked[i + 1 :])
            if further[i] < len(place) and further not in met:
                met.add(further)
                loss = sum(place[pick][0] for place, pick in zip(choices, further, strict=True))
                heapq.heappush(queue, (loss, further))
    return found


def _first_words(names: Sequence[str], choices: Sequence[Sequence[tuple[float, int]]], most: int) -> Iterator[str]:
    """TextAttack's candidates (v0.3.10, transformations/word_swaps/word_swap_masked_lm.py)."""
    if len(choices) == 1:
        said = [names[token] for _, token in choices[0]]
        yield from (word for word in said if not word.startswith(_PIECE) and len(words_of(word)) == 1)
        return
    made = ("".join(names[token] for _, token in pieces).replace(_PIECE, "") for pieces in itertools.product(*choices))
    yield from itertools.islice((word for word in made if len(words_of(word)) == 1), most if choices else 0)


def _joined(pieces: Sequence[str]) -> str | None:
    """The word that tokens make; None where they make none or several."""
    if pieces[0].startswith(_PIECE):
        return None
    word = pieces[0] + "".join(piece.removeprefix(_PIECE) for piece in pieces[1:])
    return word if word.isalpha() else None
