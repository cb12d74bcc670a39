"""Texts as token ids: what a tokenizer is asked for in evaluation."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from m3jax.checkpoints import companions, digest_file
from m3jax.checkpoints.trust import check_tokenizer_files
from m3jax.decoder import DecoderConfig, encode
from m3jax.documents import failing_plainly
from m3jax.errors import M3Error

_VOCABULARIES = ("tokenizer.json", "*.model", "vocab.json", "vocab.txt", "tekken.json", "*.tiktoken")


def import_transformers() -> Any:
    """The package, which is slow to import, and need not say that torch is missing."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers

    return transformers


def load_tokenizer(name: str, directory: Path) -> Any:
    """The transformers tokenizer of a model directory.

    Args:
        name: What the model is called in errors.
        directory: The model directory.

    Raises:
        M3Error: It has none, one that cannot be read, one that is Python code, or files that are not the model's own;
            see `check_companion`.
    """
    companions(directory)
    check_tokenizer_files(directory)  # before the libraries follow its links
    if not any(path for pattern in _VOCABULARIES for path in directory.glob(pattern)):
        raise M3Error(f"{name}: has no tokenizer: copy tokenizer.json and tokenizer_config.json of its base into it")
    try:
        with failing_plainly(f"{name}: its tokenizer cannot be read", "copy that of its base"):
            # Said in so many words: by default transformers asks on standard input whether to run a model's code.
            return import_transformers().AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except M3Error as error:
        if "trust_remote_code" in str(error.__cause__):
            raise M3Error(
                f"{name}: its tokenizer is Python code of its own, which is never run: save it as tokenizer.json"
            ) from error
        raise


def file_digests(directory: Path) -> dict[str, str]:
    """What stands beside the weights of a model, tokenizer and chat template with it, as digests by name.

    A tokenizer has too many ways for its texts and tokens to be told otherwise than by its files.

    Args:
        directory: The model directory.

    Raises:
        M3Error: It has files that are not the model's own; see `check_companion`.
    """
    vocabularies = (path for pattern in _VOCABULARIES for path in directory.glob(pattern))
    files = sorted({*companions(directory), *vocabularies})
    return {str(path.relative_to(directory)): digest_file(path) for path in files}


def first_token(tokenizer: Any) -> int | None:
    """The token that stands before a text of which nothing is known: its beginning, else the end of another."""
    token = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return None if token is None else int(token)


def split(tokenizer: Any, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Token ids of a context and of what follows it, as the model reads both in one.

    Args:
        tokenizer: A transformers tokenizer.
        context: Empty for the beginning of a text.
        continuation: What follows.

    Example:
        >>> from types import SimpleNamespace
        >>> letters = SimpleNamespace(bos_token=None, bos_token_id=1, encode=lambda text, **_: [*map(ord, text)])
        >>> split(letters, "a ", "b"), split(letters, "", "b")
        (([97], [32, 98]), ([1], [98]))
    """
    context, continuation = _spaced(context, continuation)
    if not context:
        return _begun(tokenizer, list(tokenizer.encode(continuation, add_special_tokens=False)))
    before, whole = encode(tokenizer, context), encode(tokenizer, context + continuation)
    # Where a token spans the cut, the texts part before it.
    shared = next((i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), len(before))
    return (whole[:shared], whole[shared:]) if shared else _begun(tokenizer, whole)


def split_as_harness(tokenizer: Any, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Token ids of a context and of what follows it, cut where lm-evaluation-harness cuts them.

    The context is read alone, and what follows it is as many tokens of both in one as are left. Where a token spans
    the cut that is a text which no tokenizer writes, but the score is the harness's. Where none is left, at which the
    harness fails, the cut is that of `split`.

    Args:
        tokenizer: A transformers tokenizer.
        context: Empty for the beginning of a text.
        continuation: What follows.

    References:
        lm_eval.api.model.TemplateLM._encode_pair of lm-eval 0.4.13.
    """
    before_cut, after_cut = _spaced(context, continuation)
    if before_cut:
        before = encode(tokenizer, before_cut)
        after = encode(tokenizer, before_cut + after_cut)[len(before) :]
        if before and after:
            return before, after
    return split(tokenizer, context, continuation)


def _spaced(context: str, continuation: str) -> tuple[str, str]:
    """Both texts with the space between them before the second, to whose first token it belongs."""
    tail = len(context) - len(context.rstrip())
    return (context[:-tail], context[-tail:] + continuation) if tail else (context, continuation)


def _begun(tokenizer: Any, whole: list[int]) -> tuple[list[int], list[int]]:
    """A text behind the token that begins one; behind its own first token where there is no such."""
    begin = first_token(tokenizer)
    return (whole[:1], whole[1:]) if begin is None or whole[:1] == [begin] else ([begin], whole)


def shorten(tokenizer: Any, text: list[int], length: int) -> list[int]:
    """The right end of a text, behind its beginning-of-text token if it has one."""
    begins = bool(text) and text[0] == tokenizer.bos_token_id
    return text[:1] + text[1 - length :] if begins else text[-length:]


def stop_tokens(tokenizer: Any, config: DecoderConfig | None, stops: Sequence[str]) -> tuple[int, ...]:
    """What ends a text: the config's tokens, the tokenizer's own, and stop strings that are special tokens."""
    special = [tokenizer.convert_tokens_to_ids(stop) for stop in stops if stop in tokenizer.all_special_tokens]
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return tuple(sorted({*(() if config is None else config.stop_token_ids), *own, *special}))


def cut(text: str, stops: Sequence[str]) -> str:
    """The text before the first stop string."""
    ends = [text.find(stop) for stop in stops if stop in text]
    return text[: min(ends)] if ends else text
