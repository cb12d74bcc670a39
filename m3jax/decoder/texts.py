"""Texts as token ids: what a tokenizer makes of them and of ids, and how much of a prompt the model reads."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

from m3jax.decoder.config import DecoderConfig
from m3jax.documents import failing_plainly
from m3jax.errors import M3Error

_MEND = "copy the tokenizer of its base into the model"

Tokens: TypeAlias = Sequence[int]
Overflow: TypeAlias = Literal["error", "truncate_left"]


# --- Tokenizers --------------------------------------------------------------------------------------------------


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text that is to be continued.

    What the tokenizer puts before a text is there exactly once; what it puts behind one, such as the end of text
    that T5 and `add_eos_token` append, is left out, since a model that reads it takes the text to be over.

    Args:
        tokenizer: A transformers tokenizer.
        text: The text; one that begins with the tokenizer's beginning-of-text token gets no other.

    Returns:
        Its token ids.

    Example:
        >>> from types import SimpleNamespace
        >>> def letters(text, add_special_tokens):
        ...     return [1, *map(ord, text), 2] if add_special_tokens else [*map(ord, text)]
        >>> encode(SimpleNamespace(bos_token="<s>", bos_token_id=1, encode=letters), "ab")
        [1, 97, 98]
    """
    with failing_plainly("the tokenizer cannot read a text", _MEND):
        plain = list(tokenizer.encode(text, add_special_tokens=False))
    if tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token):
        return plain
    with failing_plainly("the tokenizer cannot read a text", _MEND):
        whole = list(tokenizer.encode(text, add_special_tokens=True))
    if not plain:
        return whole[: int(whole[:1] == [tokenizer.bos_token_id])]
    starts = range(len(whole) - len(plain) + 1)
    start = next((i for i in starts if whole[i : i + len(plain)] == plain), None)
    return whole if start is None else whole[: start + len(plain)]


def detokenizer(tokenizer: Any) -> Callable[[Tokens], str]:
    """From token ids to exactly the text they stand for.

    Special tokens have no text, nor have ids beyond the tokenizer's: an embedding is often padded with rows that no
    token owns. A model may write such an id, since ruling it out would change what other libraries compute, but it
    does no harm here. Spaces before punctuation, which some tokenizers tidy away, stay: in code they have meaning.

    Args:
        tokenizer: A transformers tokenizer.

    Returns:
        A function from token ids to text.
    """
    count = _token_count(tokenizer)

    def decode(tokens: Tokens) -> str:
        known = [token for token in tokens if token < count]
        with failing_plainly("the tokenizer cannot write a text", _MEND):
            return str(tokenizer.decode(known, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    return decode


def check_vocabulary(name: str, tokenizer: Any, config: DecoderConfig) -> str | None:
    """Checks that a tokenizer's tokens have rows in the model's embedding.

    Args:
        name: What the model is called in errors and in the note.
        tokenizer: A transformers tokenizer.
        config: The decoder.

    Returns:
        A sentence for the user where the embedding has more rows than the tokenizer has tokens, else `None`.

    Raises:
        M3Error: Some tokens have no row.
    """
    rows = config.vocab_size
    if tokenizer.vocab_size > rows:  # added tokens beyond it are refused where a text has them
        raise M3Error(
            f"{name}: its tokenizer has {tokenizer.vocab_size} tokens, but its embedding only {rows} rows:"
            " take the tokenizer that belongs to the weights"
        )
    count = _token_count(tokenizer)
    if count >= rows:
        return None
    return (
        f"{name}: its embedding has {rows} rows, but its tokenizer only {count} tokens: the last {rows - count}"
        " stand for no text, and are left out where the model writes one."
    )


def _token_count(tokenizer: Any) -> int:
    """One more than the largest token id; gaps in between count."""
    return 1 + max(tokenizer.get_vocab().values(), default=-1)


# --- Prompts -----------------------------------------------------------------------------------------------------


def prompt_room(context_length: int, max_new_tokens: int) -> int:
    """How many tokens a prompt may have: such that the new ones fit behind it, but at least half the context.

    Args:
        context_length: Positions that the model sees.
        max_new_tokens: Most tokens of a continuation.

    Example:
        >>> prompt_room(4096, 1024), prompt_room(4096, 4096)
        (3072, 2048)
    """
    return max(context_length - max_new_tokens, context_length // 2)


def fit_prompt(
    prompt: list[int], what: str, config: DecoderConfig | None, max_new_tokens: int, overflow: Overflow
) -> list[int]:
    """The prompt as it will be read: whole, or its right end where it has more than `prompt_room` tokens.

    Args:
        prompt: Token ids.
        what: What to call it in errors.
        config: The decoder; without one nothing is too long.
        max_new_tokens: Most tokens of its continuation.
        overflow: What becomes of a prompt too long.

    Raises:
        M3Error: The prompt is empty or not of the vocabulary, or too long under `overflow="error"`.
    """
    check_text(prompt, what, config)
    if config is None:
        return prompt
    room = prompt_room(config.context_length, max_new_tokens)
    if len(prompt) <= room:
        return prompt
    if overflow == "error":
        raise M3Error(
            f"{what} has {len(prompt):,} tokens, behind which {max_new_tokens:,} new ones do not fit where the model"
            f" sees {config.context_length:,}: shorten it, take a smaller max_new_tokens, or overflow='truncate_left'."
        )
    return prompt[-room:]


def check_text(text: Tokens, what: str, config: DecoderConfig | None) -> None:
    """Checks that token ids can be fed to the model.

    Args:
        text: Token ids.
        what: What to call them in errors.
        config: The decoder; without one any id may be fed.

    Raises:
        M3Error: There are none, or one is not of the vocabulary.
    """
    if not len(text):
        raise M3Error(f"{what} is empty: begin it with the tokenizer's beginning-of-text token.")
    largest, smallest = max(text), min(text)
    if smallest < 0 or (config is not None and largest >= config.vocab_size):
        wrong = smallest if smallest < 0 else largest
        size = "" if config is None else f" of {config.vocab_size:,}"
        raise M3Error(f"{what} has the token id {wrong}, outside the model's vocabulary{size}: use its own tokenizer.")
