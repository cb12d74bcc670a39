"""Attacks on prompts: letters, words and sentences that make a model do worse."""

from m3jax.evaluation.attacks.measure import FLOOR, Drop, measure_drop
from m3jax.evaluation.attacks.profiles import (
    ATTACKS,
    PROFILES,
    Attack,
    MaskedWords,
    Profile,
    Sources,
    get_profile,
    make_attack,
)
from m3jax.evaluation.attacks.search import Change, Found, Score, greedy, try_all
from m3jax.evaluation.attacks.wording import CONTENT, Candidates, Wording
from m3jax.evaluation.attacks.words import Embeddings, read_embeddings, synonyms

__all__ = [
    "ATTACKS",
    "CONTENT",
    "FLOOR",
    "PROFILES",
    "Attack",
    "Candidates",
    "Change",
    "Drop",
    "Embeddings",
    "Found",
    "MaskedWords",
    "Profile",
    "Score",
    "Sources",
    "Wording",
    "get_profile",
    "greedy",
    "make_attack",
    "measure_drop",
    "read_embeddings",
    "synonyms",
    "try_all",
]
