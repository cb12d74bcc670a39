"""Words of like meaning, from a file of embeddings: TextFooler's candidates.

References:
    Jin et al., Is BERT Really Robust? A Strong Baseline for Natural Language Attack on Text Classification and
    Entailment, 2020; Mrkšić et al., Counter-fitting Word Vectors to Linguistic Constraints, 2016.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from m3jax.errors import M3Error
from m3jax.evaluation.attacks.edits import changed
from m3jax.evaluation.attacks.wording import Candidates, Wording

# Words of grammar, which PromptBench leaves alone: pronouns, auxiliaries, conjunctions, prepositions, determiners,
# adverbs of degree, and what their contractions leave.
_GRAMMAR = """
i me my mine myself we us our ours ourselves you your yours yourself yourselves he him his himself she her hers
herself it its itself they them their theirs themselves who whom whose which what this that these those
am is are was were be been being have has had having do does did doing can could may might must shall should will
would isn't aren't wasn't weren't hasn't haven't hadn't doesn't don't didn't can't couldn't won't wouldn't
shouldn't mustn't i'm you're he's she's it's we're they're i've you've we've they've i'd you'd we'd i'll you'll
and but or nor so yet if because as until while than though although whether
of at by for with about against between into through during before after above below to from up down in out on off
over under again further then once upon within without per
a an the no not only own same such each every both all any few more most other some
too very just here there when where why how now s t d ll m o re ve y
"""
STOP_WORDS = frozenset(_GRAMMAR.split())


class Embeddings(NamedTuple):
    """Word vectors.

    Attributes:
        rows: Row of each word.
        vectors: Vectors of length 1, float32 [words, width].
    """

    rows: Mapping[str, int]
    vectors: npt.NDArray[np.float32]


def read_embeddings(path: str | Path) -> Embeddings:
    """Reads word vectors in text form: on each line a word and its numbers, with spaces between.

    Args:
        path: The file, such as the counter-fitted vectors; a first line with just counts, as word2vec writes, is
            passed over.

    Raises:
        M3Error: It cannot be read, or a line is not of this form.
    """
    try:
        if Path(path).exists() and not Path(path).is_file():
            raise M3Error(f"cannot read the embeddings {path}: it is no regular file; give a text file of word vectors")
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        said = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise M3Error(f"cannot read the embeddings {path}: {said}; give a text file of word vectors") from error
    header = len(lines) > 1 and len(lines[0].split()) == 2 < len(lines[1].split())
    rows: dict[str, int] = {}
    vectors: list[npt.NDArray[np.float32]] = []
    for number, line in enumerate(lines[header:], 1 + header):
        if line.strip():
            word, vector = _read_line(line, f"{path} line {number}")
            if vectors and vector.size != vectors[0].size:
                raise M3Error(f"{path} line {number} has {vector.size} numbers where the first has {vectors[0].size}")
            if word not in rows and vector.any():  # a vector of zeros is near to nothing
                rows[word] = len(vectors)
                vectors.append(vector)
    if not vectors:
        raise M3Error(f"{path} holds no word vectors: give lines of a word and its numbers")
    matrix = np.stack(vectors)
    with np.errstate(over="ignore"):
        lengths = np.sqrt(np.sum(matrix * matrix, axis=1, keepdims=True))
    if not np.isfinite(lengths).all():
        raise M3Error(f"{path} holds numbers of which float32 has no squares: give word vectors")
    return Embeddings(rows, (matrix / np.where(lengths > 0, lengths, 1)).astype(np.float32))


def _read_line(line: str, where: str) -> tuple[str, npt.NDArray[np.float32]]:
    word, *numbers = line.split()
    try:
        with np.errstate(over="ignore"):  # what is too large is refused below
            vector = np.array([float(number) for number in numbers], np.float32)
    except ValueError as error:
        raise M3Error(
            f"{where} is no word vector: it should hold a word and its numbers, with spaces between"
        ) from error
    if not numbers or not np.isfinite(vector).all():
        raise M3Error(f"{where} is no word vector: it should hold a word and its finite numbers")
    return word, vector


def synonyms(embeddings: Embeddings, most: int, least_cosine: float = -1.0) -> Candidates:
    """The words nearest to one by the cosine of their vectors.

    Args:
        embeddings: Word vectors, lower case as a rule.
        most: How many of them at most.
        least_cosine: They are at least so near.

    Returns:
        Candidates in the case of the word that they replace; none where the embeddings do not have it.
    """
    names = list(embeddings.rows)

    def candidates(prompt: Wording, index: int) -> list[str]:
        word = prompt.words[index]
        row = embeddings.rows.get(word, embeddings.rows.get(word.lower()))
        if row is None:
            return []
        cosines = embeddings.vectors @ embeddings.vectors[row]
        nearest = np.argsort(-cosines, kind="stable")[: most + 1]
        near = [names[i] for i in nearest if i != row and cosines[i] >= least_cosine]
        return changed(word, [like_case(name, word) for name in near[:most]])

    return candidates


def like_case(word: str, like: str) -> str:
    """A word in the case of another: capitals, one capital, or as it is.

    Example:
        >>> like_case("film", "MOVIE"), like_case("film", "Movie"), like_case("film", "movie")
        ('FILM', 'Film', 'film')
    """
    if len(like) > 1 and like.isupper():
        return word.upper()
    return word[:1].upper() + word[1:] if like[:1].isupper() else word
