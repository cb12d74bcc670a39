"""Merge methods and sparsifiers: one small file per idea, and the registry of their names in recipes."""

from m3jax.methods import dare, linear, magnitude, slerp, ties

METHODS = {
    "linear": linear.linear,
    "task_arithmetic": linear.task_arithmetic,
    "ties": ties.ties,
    "slerp": slerp.slerp,
}
SPARSIFIERS = {"dare": dare.dare, "magnitude": magnitude.magnitude}
