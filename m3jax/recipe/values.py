"""The recipe's single values: methods, dtypes, seeds, shapes, regular expressions."""

import re
import reprlib
from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

from m3jax import documents
from m3jax.errors import M3Error
from m3jax.methods import catalogue
from m3jax.methods.rows import MethodRow, SparsifierRow
from m3jax.recipe.settings import Place, RecipeError, nearest, number

Row = TypeVar("Row", MethodRow, SparsifierRow)
OutputDtype = Literal["bfloat16", "float16", "float32"]
_MOST_SEEDS = 1_000


def _row(name: object, known: Sequence[str], find: Callable[[str], Row]) -> Row:
    if name in known:
        try:
            return find(str(name))
        except M3Error as error:
            raise RecipeError(str(error)) from None
    close = nearest(str(name), known)
    suggestion = f"{close} " if close.startswith("did") else ""
    raise RecipeError(f"{reprlib.repr(name)} is not here; {suggestion}available are {', '.join(known)}")


def read_method(raw: object) -> MethodRow:
    """The row of a merge method.

    Raises:
      RecipeError: there is none of this name, it is left out on purpose, or the package that brings it is at fault.
    """
    # Packages outside are only looked through for what is not ours.
    own = catalogue.own_row(raw)
    if own is not None:
        return own
    known = catalogue.names()
    if isinstance(raw, str) and raw in catalogue.LEFT_OUT and raw not in known:
        raise RecipeError(catalogue.LEFT_OUT[raw])
    return _row(raw, known, catalogue.method_row)


def read_sparsifier(raw: object) -> SparsifierRow:
    """The row of a sparsifier.

    Raises:
      RecipeError: there is none of this name.
    """
    return _row(raw, [row.name for row in catalogue.SPARSIFIERS], catalogue.sparsifier_row)


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


def read_smooth(raw: object) -> float:
    """Reads how much neighbouring blocks share of their draws."""
    value = number(raw, (), 0.0, 1.0)
    if value == 1.0:
        raise RecipeError("1 is one draw for all layers; write a number below it, or granularity: model")
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


def read_seeds(raw: object) -> tuple[int, ...]:
    """Reads several seeds: `0..31`, a list of seeds and ranges, or the same as text with commas.

    Raises:
      RecipeError: one is no seed or no range, a range runs backwards, or there are none, too many or one twice.

    Example:
      >>> read_seeds("0..3, 7"), read_seeds([5, "1..2"])
      ((0, 1, 2, 3, 7), (5, 1, 2))
    """
    parts = raw.split(",") if isinstance(raw, str) else raw
    if not isinstance(parts, list | tuple):
        raise RecipeError(f"{reprlib.repr(raw)} is no list of seeds; write such as 0..31, or seed for one")
    seeds = [seed for part in parts for seed in _seed_range(part)]
    if not seeds:
        raise RecipeError("is empty; write such as 0..31")
    if len(seeds) > _MOST_SEEDS:
        raise _too_many(len(seeds))
    twice = next((seed for seed in seeds if seeds.count(seed) > 1), None)
    if twice is not None:
        raise RecipeError(f"{twice} is there twice; name each seed once")
    return tuple(seeds)


def _seed_range(part: object) -> Sequence[int]:
    if isinstance(part, str) and (dashed := re.fullmatch(r"\s*(\d+)\s*(?:-|:|\.{3})\s*(\d+)\s*", part)):
        raise RecipeError(f"{part.strip()} is no range of seeds; write {dashed[1]}..{dashed[2]}")
    if not isinstance(part, str) or ".." not in part:
        return [read_seed(part)]
    first, last = (read_seed(end.strip()) for end in part.split("..", 1))
    if last < first:
        raise RecipeError(f"{part.strip()} runs backwards; write {last}..{first}")
    if last - first >= _MOST_SEEDS:
        raise _too_many(last - first + 1)
    return range(first, last + 1)


def _too_many(count: int) -> RecipeError:
    return RecipeError(f"{count:,} seeds are more than {_MOST_SEEDS:,}; write fewer, or several recipes")


def read_regex(pattern: str) -> str:
    """Reads a regular expression and sees that it is one."""
    try:
        documents.pattern(pattern)
    except ValueError as error:
        shown = reprlib.repr(pattern)
        raise RecipeError(f"{shown} is no regular expression ({error}); mend it, as in '.*rotary.*'") from None
    return pattern
