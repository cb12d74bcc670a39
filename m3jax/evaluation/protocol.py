"""What evaluation asks of a model: text for prompts, and log-likelihoods of continuations."""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, TypeAlias, get_args

Overflow = Literal["error", "truncate", "skip"]
"""What becomes of a prompt that leaves no room for its answer: an error, the loss of its left end, or a skip."""

OVERFLOWS: tuple[Overflow, ...] = get_args(Overflow)


class GenerationSettings(NamedTuple):
    """How to continue a prompt.

    Attributes:
        max_tokens: Most tokens to generate.
        stop: Strings that end the text; they are not part of it.
        temperature: 0 takes the most likely token always.
        top_p: Probability mass to sample from, when temperature is not 0.
        seed: Seed of the sampling, when temperature is not 0.
        draw: Which sample of a prompt is wanted, from 0, when temperature is not 0; each is independent of the others.
    """

    max_tokens: int = 1024
    stop: tuple[str, ...] = ()
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    draw: int = 0


class Completion(NamedTuple):
    """The continuation of one prompt.

    Attributes:
        text: The generated text, without the prompt.
        tokens: Number of generated tokens.
        finished: Whether the model or a stop string ended it, not `max_tokens` or the end of the context.
        prompt_truncated: Whether the prompt did not fit and was cut.
        skipped: Whether the prompt did not fit and nothing was generated.
    """

    text: str
    tokens: int
    finished: bool
    prompt_truncated: bool = False
    skipped: bool = False


class LogLikelihood(NamedTuple):
    """How likely a continuation is.

    Attributes:
        sum: Natural logarithm of its probability.
        is_greedy: Whether greedy decoding would produce it.
        cut: Whether its context did not fit and was cut.
    """

    sum: float
    is_greedy: bool
    cut: bool = False


Generator: TypeAlias = Callable[[Sequence[str], GenerationSettings], Sequence[Completion]]
"""Prompts in, completions out, one for each and in their order."""

Pair: TypeAlias = tuple[str, str] | tuple[Sequence[int], Sequence[int]]
"""A context and its continuation, as texts or as token ids; an empty text means the beginning of one."""

Scorer: TypeAlias = Callable[[Sequence[Pair]], Sequence[LogLikelihood]]
"""Pairs in, the log-likelihoods of their continuations out, one for each and in their order."""
