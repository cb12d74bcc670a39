"""Finding the answer in what a model wrote, and comparing it with the right one."""

from m3jax.evaluation.scorers.code import extract_code
from m3jax.evaluation.scorers.labels import parse_label
from m3jax.evaluation.scorers.latex import equivalent
from m3jax.evaluation.scorers.marked import last_boxed, marked_answer
from m3jax.evaluation.scorers.numbers import parse_number, stated_number

__all__ = ["equivalent", "extract_code", "last_boxed", "marked_answer", "parse_label", "parse_number", "stated_number"]
