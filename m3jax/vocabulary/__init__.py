"""Tokenizers of several models as one, and models seen with its rows; no JAX."""

from m3jax.vocabulary.files import united_files, with_ids
from m3jax.vocabulary.reading import Added, Vocabulary, digests, is_vocabulary, numbering, read_vocabulary
from m3jax.vocabulary.rows import (
    Model,
    RowPlan,
    count_rows,
    is_own,
    notes_on_rows,
    plan_rows,
    seen_with_rows,
    word_tensors,
)
from m3jax.vocabulary.uniting import (
    Speaker,
    United,
    difference,
    first_conflict,
    misnumbered,
    read_speakers,
    told_apart,
    unite,
)

__all__ = [
    "Added",
    "Model",
    "RowPlan",
    "Speaker",
    "United",
    "Vocabulary",
    "count_rows",
    "difference",
    "digests",
    "first_conflict",
    "is_own",
    "is_vocabulary",
    "misnumbered",
    "notes_on_rows",
    "numbering",
    "plan_rows",
    "read_speakers",
    "read_vocabulary",
    "seen_with_rows",
    "told_apart",
    "unite",
    "united_files",
    "with_ids",
    "word_tensors",
]
