"""The recipe's single values: methods, dtypes, seeds, shapes, regular expressions."""

import re
import reprlib
from typing import Literal, get_args

from m3jax.recipe.settings import Place, RecipeError, nearest, number

MergeMethod = Literal["linear", "task_arithmetic", "ties", "dare_linear", "dare_ties", "slerp"]
METHODS: tuple[str, ...] = get_args(MergeMethod)
OutputDtype = Literal["bfloat16", "float16", "float32"]


def read_method(raw: object) -> object:
    """Reads the name of a merge method."""
    if raw in METHODS:
        return raw
    close = nearest(str(raw), METHODS)
    suggestion = f"{close} " if close.startswith("did") else ""
    raise RecipeError(f"{reprlib.repr(raw)} is not here; {suggestion}available are {', '.join(METHODS)}")


_DTYPES: dict[str, OutputDtype] = {
    **dict.fromkeys(("bfloat16", "bf16"), "bfloat16"),
    **dict.fromkeys(("float16", "fp16", "f16", "half"), "float16"),
    **dict.fromkeys(("float32", "fp32", "f32", "float"), "float32"),
}


def read_dtype(raw: object) -> OutputDtype | None:
    """Reads a dtype in any of its usual spellings."""
    if raw is None:
        return None
    name = str(raw).removeprefix("torch.")
    if name not in _DTYPES:
        raise RecipeError(f"{reprlib.repr(raw)} is no output dtype; write bfloat16, float16 or float32")
    return _DTYPES[name]


def read_alpha(raw: object) -> float | tuple[float, float]:
    """Reads the shape parameter of a Beta or Dirichlet distribution, or a pair of them."""
    if not isinstance(raw, list | tuple):
        return _read_shape(raw, ())
    if len(raw) != 2:
        raise RecipeError(f"{len(raw)} shape parameters; write one number or a pair [a, b]")
    return _read_shape(raw[0], (0,)), _read_shape(raw[1], (1,))


def _read_shape(raw: object, place: Place) -> float:
    value = number(raw, place)
    if value <= 0:
        raise RecipeError(f"{value:g} is not above 0; a Beta distribution needs positive shapes, such as 0.5", *place)
    return value


def read_seed(raw: object) -> int:
    """Reads a seed, a whole number of 64 bits."""
    try:
        if isinstance(raw, bool) or not isinstance(raw, int | str):
            raise ValueError
        seed = int(raw)
    except ValueError:
        raise RecipeError(f"{reprlib.repr(raw)} is not a whole number; write one such as 0") from None
    if not 0 <= seed < 2**64:
        raise RecipeError(f"{seed} is outside [0, 2^64); write a whole number inside")
    return seed


def read_regex(pattern: str) -> str:
    """Reads a regular expression and sees that it is one."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise RecipeError(f"{pattern!r} is no regular expression ({error}); mend it, as in '.*rotary.*'") from None
    return pattern
