"""The laboratory: small models trained from scratch, on which the paper's tables can be run within an hour."""

from m3jax.laboratory.conducting import SETTINGS, Setting, conduct, open_laboratory
from m3jax.laboratory.experiments import ExperimentSettings, Laboratory
from m3jax.laboratory.models import Curriculum, make_models
from m3jax.laboratory.skills import Skill, functions, programs, sentiment, word_problems
from m3jax.laboratory.training import Course, Size

__all__ = [
    "SETTINGS",
    "Course",
    "Curriculum",
    "ExperimentSettings",
    "Laboratory",
    "Setting",
    "Size",
    "Skill",
    "conduct",
    "functions",
    "make_models",
    "open_laboratory",
    "programs",
    "sentiment",
    "word_problems",
]
