"""Merge methods and sparsifiers: one small file per idea, and the registry of their names in recipes."""

from collections.abc import Callable

from m3jax.methods import dare, linear, magnitude, slerp, ties
from m3jax.methods.base import Method, Sparsifier

METHODS: dict[str, Callable[..., Method]] = {
    "linear": linear.linear,
    "task_arithmetic": linear.task_arithmetic,
    "ties": ties.ties,
    "slerp": slerp.slerp,
}
SPARSIFIERS: dict[str, Callable[..., Sparsifier]] = {"dare": dare.dare, "magnitude": magnitude.magnitude}
