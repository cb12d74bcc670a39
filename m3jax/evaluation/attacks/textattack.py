"""The attacks as the M³ paper's own code runs them: its words, its candidates, its sentences, its order.

The paper (arXiv 2502.15434) attacks with a copy of PromptBench, and that with TextAttack. Facts are from
github.com/MLGroupJLU/MixupModelMerge at 82147bd (promptbench/), github.com/microsoft/promptbench at fcda538
(promptbench/prompt_attack) and github.com/QData/TextAttack at v0.3.10 (shared/utils/strings.py,
shared/attacked_text.py, transformations/word_swaps); the stop words are NLTK's English ones (nltk_data, 2020).
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from m3jax.evaluation.attacks.draws import stream
from m3jax.evaluation.attacks.edits import LETTERS, changed, delete, insert, substitute, swap
from m3jax.evaluation.attacks.wording import Candidates, Wording

_STOP_WORDS = """
i me my myself we our ours ourselves you you're you've you'll you'd your yours yourself yourselves he him his
himself she she's her hers herself it it's its itself they them their theirs themselves what which who whom this
that that'll these those am is are was were be been being have has had having do does did doing a an the and but if
or because as until while of at by for with about against between into through during before after above below to
from up down in out on off over under again further then once here there when where why how all any both each few
more most other some such no nor not only own same so than too very s t can will just don don't should should've
now d ll m o re ve y ain aren aren't couldn couldn't didn didn't doesn doesn't hadn hadn't hasn hasn't haven
haven't isn isn't ma mightn mightn't mustn mustn't needn needn't shan shan't shouldn shouldn't wasn wasn't weren
weren't won won't wouldn wouldn't
"""
STOP_WORDS = frozenset(_STOP_WORDS.split())  # as they are written: "As" at the beginning is none

TAUTOLOGIES = (" and true is true ", " and false is not true ", " and true is true " * 5)
_SEQUENCES = """
d6ZQ3u0GBQ vTAjHynoIG OB4KVJzIft LkF0FZxMZ4 iia2yL9Uzm CuVpbbkC4c w52rwgo0Av Vq3aBzuZcD hXLpw3bbiw RcRneWo6Iv
S6oUV5E54P xikCjkMydH MQnugHcaoy Q47Jmd4lMV 9vGXgnbWB8 IhuBIhoPGc 5yWbBXztUY AMsRIKZniY EAB4KP2NVY 9Q3S1F94fE
b74X5IVXQY SFPCqpiClT bhrRSokrfa YHQiDfFhw4 BWmsLx8xOA PDCGfz6DL9 yh912BU8T0 ofOQXLxiW4 Cev0s49fbe rzu98kF2KF
zexKUTWJYG 5XeflW1ZJc is77sOXAu8 XStsD2pUzu fwhUZUQzXW Pbl3tYuoRo MSAddJ4D2a mzjVogkRhM Kw6nrs57gH ItGDrrA1Sc
KjPJJ2a7RB mOJ9nEwT4f ofw9fEkN5R njCuciQJpB 6a4Yn3RGVc SvAp8RlOFn g0vBZf3tQC zq0DcZ5dnI lf8wBa2yEm lWJoGGRdjv
"""
SEQUENCES = tuple(_SEQUENCES.split())

_EDGE = "'-_*@"  # may stand in a word and end it, but not begin it
_RUN = re.compile(r"[\w˗`×'\-*@]+")
_BRACES = re.compile(r"\{[^{}\s]*\}")
_SLOTS = 8  # choices set aside for each word


def _spans(text: str) -> Iterator[tuple[int, int]]:
    """Where the words of a text are; a quotation mark behind one is part of it."""
    for chunk in re.finditer(r"\S+", text):
        start = chunk.end() - len(chunk.group().lstrip(_EDGE))
        for run in _RUN.finditer(text, start, chunk.end()):
            first = run.end() - len(run.group().lstrip(_EDGE))
            if first < run.end():
                yield first, run.end()


def words_of(text: str) -> list[str]:
    """The words of a text.

    Example:
        >>> words_of("Is 'it' well-made, don't you think?")
        ['Is', "it'", 'well-made', "don't", 'you', 'think']
    """
    return [text[start:end] for start, end in _spans(text)]


def read_prompt(prompt: str, protected: Sequence[str] = ()) -> Wording:
    """A prompt taken apart; stop words, placeholders and what is protected are fixed.

    Args:
        prompt: The text.
        protected: Words or phrases, whatever their case, that must stay as they are.

    Example:
        >>> prompt = read_prompt("Is the text 'good' or 'bad'?\\nText:{content}", ["good", "bad"])
        >>> [word for index, word in enumerate(prompt.words) if index not in prompt.fixed]
        ['Is', 'text', 'Text']
    """
    whole = Wording.at(prompt, list(_spans(prompt)), protected)
    held = [match.span() for match in _BRACES.finditer(prompt)]
    spans = [whole.span(index) for index in range(len(whole.words))]
    kept = {
        index
        for index, (start, end) in enumerate(spans)
        if whole.words[index] in STOP_WORDS or any(first < end and start < last for first, last in held)
    }
    return whole._replace(fixed=whole.fixed | kept)


def without(prompt: Wording, index: int) -> str:
    """The text with a word left out, and with it the space before it; behind the first word, that after it.

    Args:
        prompt: The prompt.
        index: Which word.

    Example:
        >>> prompt = read_prompt("Good or bad?\\nSay which.")
        >>> without(prompt, 0), without(prompt, 2), without(prompt, 3)
        ('or bad?\\nSay which.', 'Good or?\\nSay which.', 'Good or bad?\\n which.')
    """
    start, end = prompt.span(index)
    before, after = prompt.text[:start], prompt.text[end:]
    if after and index == 0:
        after = after.removeprefix(" ")
    elif after:
        before = before.removesuffix(" ")
    return before + after


def deepwordbug(key: Any) -> Candidates:
    """DeepWordBug's four edits of a word, one of each in a random place; none of a word of one letter.

    A letter is never put behind the last, and one that is substituted by itself is no edit.

    Args:
        key: Of the random places and letters: an integer seed or a threefry2x32 JAX key.
    """
    draw = stream(key, "deepwordbug")

    def candidates(prompt: Wording, index: int) -> list[str]:
        word = prompt.words[index]
        size = len(word)
        if size < 2:
            return []

        def choose(slot: int, below: int) -> int:
            return draw(index * _SLOTS + slot, below)

        made = [swap(word, choose(0, size - 1))]
        made += [substitute(word, choose(1, size), LETTERS[choose(2, len(LETTERS))])]
        made += [delete(word, choose(3, size))]
        made += [insert(word, choose(4, size), LETTERS[choose(5, len(LETTERS))])]
        return changed(word, made)

    return candidates


def stresstest(prompt: Wording) -> list[str]:
    """The prompt with each of three tautologies behind its last word, spaces before and behind them."""
    return [_followed_by(prompt, tautology) for tautology in TAUTOLOGIES]


def checklist(prompt: Wording) -> list[str]:
    """The prompt with each of fifty fixed sequences of letters and digits behind its last word."""
    return [_followed_by(prompt, sequence) for sequence in SEQUENCES]


def _followed_by(prompt: Wording, addition: str) -> str:
    """The text with something behind its last word; behind the placeholder, where that is the last word."""
    text = prompt.text
    end = prompt.span(len(prompt.words) - 1)[1] if prompt.words else len(text)
    end = next((match.end() for match in _BRACES.finditer(text) if match.start() < end <= match.end()), end)
    return f"{text[:end]} {addition}{text[end:]}"
