"""A prompt as words that an attack may change, and what lies between them, which it may not."""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeAlias

CONTENT = "{content}"
"""Where an example stands in a prompt."""

_PLACEHOLDER = re.compile(r"\{[^{}\s]*\}")
_WORD = re.compile(r"[^\W_]+(?:['’_-][^\W_]+)*")


class Wording(NamedTuple):
    """A prompt taken apart.

    Attributes:
        words: Its words, in order.
        gaps: What stands before, between and behind them, placeholders among it: one more than words.
        fixed: Indices of the words that are never touched.

    Example:
        >>> prompt = Wording.of("Is '{content}' good or bad?", protected=["good", "bad"])
        >>> prompt.words, sorted(prompt.fixed)
        (('Is', 'good', 'or', 'bad'), [1, 3])
        >>> prompt.replaced(0, "Was").text
        "Was '{content}' good or bad?"
    """

    words: tuple[str, ...]
    gaps: tuple[str, ...]
    fixed: frozenset[int]

    @classmethod
    def of(cls, prompt: str, protected: Iterable[str] = ()) -> "Wording":
        """Takes a prompt apart.

        Args:
            prompt: The text; what stands in braces, such as {content}, is a placeholder and no word.
            protected: Words or phrases, whatever their case, that must stay as they are: the labels, above all.
        """
        held = [match.span() for match in _PLACEHOLDER.finditer(prompt)]
        spans = [match.span() for match in _WORD.finditer(prompt) if not _touches(match.span(), held)]
        return cls.at(prompt, spans, protected)

    @classmethod
    def at(cls, prompt: str, spans: Sequence[tuple[int, int]], protected: Iterable[str] = ()) -> "Wording":
        """A prompt whose words are known to stand in some places.

        Args:
            prompt: The text.
            spans: Where each word begins and ends, in order.
            protected: As of `of`.
        """
        kept = [
            match.span()
            for phrase in protected
            if phrase.strip()
            for match in re.finditer(rf"(?<!\w){re.escape(phrase.strip())}(?!\w)", prompt, re.IGNORECASE)
        ]
        edges = [0, *(edge for span in spans for edge in span), len(prompt)]
        gaps = tuple(prompt[start:end] for start, end in zip(edges[::2], edges[1::2], strict=True))
        fixed = frozenset(index for index, span in enumerate(spans) if _touches(span, kept))
        return cls(tuple(prompt[start:end] for start, end in spans), gaps, fixed)

    @property
    def text(self) -> str:
        """The prompt."""
        return self.gaps[0] + "".join(map("".join, zip(self.words, self.gaps[1:], strict=True)))

    def span(self, index: int) -> tuple[int, int]:
        """Where a word begins and ends in the text.

        Args:
            index: Which word.

        Example:
            >>> Wording.of("Is it good?").span(2)
            (6, 10)
        """
        start = sum(map(len, self.gaps[: index + 1])) + sum(map(len, self.words[:index]))
        return start, start + len(self.words[index])

    def replaced(self, index: int, word: str) -> "Wording":
        """The same with another word in one place.

        Args:
            index: Which word.
            word: What takes its place; it counts as one word, whatever it holds.
        """
        return self._replace(words=(*self.words[:index], word, *self.words[index + 1 :]))

    def without(self, index: int) -> str:
        """The text with a word left out, and with it the space before or behind it.

        Args:
            index: Which word.

        Example:
            >>> prompt = Wording.of("Answer in one word.")
            >>> prompt.without(0), prompt.without(3)
            ('in one word.', 'Answer in one.')
        """
        before, after = self.gaps[index], self.gaps[index + 1]
        if before.endswith(" "):
            before = before[:-1]
        elif after.startswith(" "):
            after = after[1:]
        gaps = (*self.gaps[:index], before + after, *self.gaps[index + 2 :])
        return Wording((*self.words[:index], *self.words[index + 1 :]), gaps, frozenset()).text

    def followed_by(self, addition: str) -> str:
        """The text with something put behind its last word or placeholder; final punctuation stays final.

        Args:
            addition: What to put there.

        Example:
            >>> Wording.of("Is it good? {content}.").followed_by(" and true is true")
            'Is it good? {content} and true is true.'
        """
        last = self.gaps[-1]
        holders = list(_PLACEHOLDER.finditer(last))
        cut = holders[-1].end() if holders else 0
        return self._replace(gaps=(*self.gaps[:-1], last[:cut] + addition + last[cut:])).text


def _touches(span: tuple[int, int], others: Sequence[tuple[int, int]]) -> bool:
    return any(start < span[1] and span[0] < end for start, end in others)


Candidates: TypeAlias = Callable[[Wording, int], Sequence[str]]
"""Words that may take the place of one word of a prompt, given by its index; a source of words is one such function."""

Filter: TypeAlias = Callable[[Wording, Wording, int, Sequence[Wording]], list[Wording]]
"""The original, the prompt so far, the index of the word to change, and prompts with it changed in; those that are like
enough out."""
