"""What a recipe says by the names of tensors, held against the names that there are."""

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence

from m3jax import documents
from m3jax.recipe.checks import placed_blocks
from m3jax.recipe.schema import Recipe
from m3jax.recipe.settings import Filtered, Place, Setting, dotted, parameters_of

_CLASSES = re.compile(r"\\[AbBdDsSwWZ]|\[[^\]]*\]|(?<!\\)\.|[\^$*+?(){}|]")


def unmatched(recipe: Recipe, names: Iterable[str], blocks: Iterable[str] = ()) -> str | None:
    """What to say of the first filter or `exclude` pattern that no tensor answers to.

    Args:
      recipe: the recipe.
      names: every name of every tensor of the models that are read, aliases too.
      blocks: what the tensors of single blocks in stacked ones are called, which filters see and `exclude` does not.

    Returns:
      A sentence with the place, what is written there and the nearest name; None where all of them match.

    Example:
      >>> asked = Recipe.model_validate({"merge_method": "linear", "models": ["a", "b"], "exclude": ["rotery"]})
      >>> unmatched(asked, ["layers.0.rotary.inv_freq", "norm.weight"])
      "exclude.0: 'rotery' matches no tensor; did you mean 'rotary', as in 'layers.0.rotary.inv_freq'?"
    """
    known = list(dict.fromkeys(names))
    seen = [*known, *blocks]
    for place, wanted in _filters(recipe):
        if not any(wanted in name for name in seen):
            return f"{dotted(place)}: {wanted!r} matches no tensor; {_nearest([wanted], seen)}"
    for i, pattern in enumerate(recipe.exclude):
        if not any(documents.pattern(pattern).search(name) for name in known):
            return f"{dotted(('exclude', i))}: {pattern!r} matches no tensor; {_nearest(_literals(pattern), known)}"
    return None


def _filters(recipe: Recipe) -> Iterator[tuple[Place, str]]:
    """The filters of every setting that the merge uses, with their places."""
    used = parameters_of(recipe.row)
    for place, block in placed_blocks(recipe):
        for name, setting in block.items():
            if name in used:
                yield from _filters_in(setting, (*place, name))
    for name, setting in recipe.sparsify.parameters.items() if recipe.sparsify is not None else ():
        yield from _filters_in(setting, ("sparsify", name))


def _filters_in(setting: Setting, place: Place) -> Iterator[tuple[Place, str]]:
    for i, entry in enumerate(setting if isinstance(setting, tuple) else ()):
        if not isinstance(entry, Filtered):
            continue
        if entry.filter not in (None, "*"):
            yield (*place, i, "filter"), str(entry.filter)
        yield from _filters_in(entry.value, (*place, i, "value"))


def _literals(pattern: str) -> list[str]:
    """The runs of plain text in a regular expression, the longest first.

    Example:
      >>> _literals(r"^model\\.layers\\.[0-9]+\\.mpl.*")
      ['model.layers', 'mpl']
    """
    runs = re.sub(r"\\(.)", r"\1", _CLASSES.sub(" ", pattern)).split()
    return sorted(filter(None, (run.strip(".") for run in runs)), key=len, reverse=True)


def _nearest(wanted: Sequence[str], names: Sequence[str]) -> str:
    """The mend for text that is in no name: the part of one that looks most like it."""
    missing = [text for text in wanted if not any(text in name for name in names)]
    for text in missing or wanted:
        parts = _parts(names, text.count(".") + 1)
        close = difflib.get_close_matches(text, parts, n=1, cutoff=0.6)
        if close:
            return f"did you mean {close[0]!r}, as in {parts[close[0]]!r}?"
    return f"names look like {names[0]!r}" if names else "the models have none"


def _parts(names: Iterable[str], width: int) -> dict[str, str]:
    """Every run of so many steps of a name, with the first name that has it."""
    found: dict[str, str] = {}
    for name in names:
        steps = name.split(".")
        for first in range(max(len(steps) - width + 1, 1)):
            found.setdefault(".".join(steps[first : first + width]), name)
    return found
