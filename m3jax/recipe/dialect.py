"""From YAML text and mergekit's spellings to the plain mapping that the recipe's schema reads."""

import copy
import os
import reprlib
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import yaml

from m3jax.documents import DEEPEST, FAULTS, read_bounded
from m3jax.errors import M3Error
from m3jax.recipe.settings import RecipeError

_LARGEST = 2**20  # bytes of a recipe; long ones have some thousands
_MOST_NODES = 100_000  # of what a recipe says, everything counted where an alias repeats it


class _Loader(yaml.SafeLoader):
    """YAML in which a key that is written twice is an error, not a silent loss of the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                problem = f"the key {key.value!r} is written twice; remove one"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            if isinstance(key, yaml.ScalarNode):
                seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


def _parse(text: str) -> object:
    loader = None
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        if root is None:
            return None
        _check_size(root)
        return loader.construct_document(root)
    except RecipeError:
        raise
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise RecipeError(f"{line}not valid YAML: {error.problem}") from None
    except RecursionError:
        raise RecipeError("not valid YAML: brackets inside brackets without end; mend them") from None
    except (yaml.YAMLError, *FAULTS) as error:  # PyYAML raises of every kind where a tag does not fit its text
        raise RecipeError(f"not valid YAML: {' '.join(str(error).split()) or type(error).__name__}") from None
    finally:
        if loader is not None:
            loader.dispose()


def _check_size(root: yaml.Node) -> None:
    """Raise RecipeError where aliases make more of a text than anyone means, or something that is inside itself."""
    sizes: dict[yaml.Node, int] = {}
    open_: set[yaml.Node] = set()

    def size(node: yaml.Node, depth: int) -> int:
        if node in open_:
            raise RecipeError(f"line {node.start_mark.line + 1}: an alias stands inside what it repeats; write it out")
        if depth > DEEPEST:
            raise RecipeError("not valid YAML: brackets inside brackets without end; mend them")
        if node not in sizes:
            open_.add(node)
            sizes[node] = 1 + sum(size(inner, depth + 1) for inner in _inside(node))
            open_.remove(node)
            if sizes[node] > _MOST_NODES:
                raise RecipeError(f"aliases make more than {_MOST_NODES:,} entries of it; write out what is meant")
        return sizes[node]

    size(root, 0)


def _inside(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [inner for pair in node.value for inner in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def read_yaml(path: str | os.PathLike[str]) -> object:
    """What a YAML file says.

    Raises:
      M3Error: the file cannot be read, or is not YAML.
    """
    try:
        text = read_bounded(Path(path), _LARGEST).decode("utf-8")
    except FileNotFoundError:
        raise M3Error(f"{os.fspath(path)}: no such recipe file; check the path") from None
    except UnicodeDecodeError:
        raise M3Error(f"{os.fspath(path)}: cannot be read (it is not UTF-8 text); name a YAML file") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise M3Error(f"{os.fspath(path)}: cannot be read ({reason}); name a YAML file") from None
    try:
        return _parse(text)
    except RecipeError as fault:
        raise M3Error(f"{os.fspath(path)}: {fault}") from None


def with_override(raw: object, override: str) -> object:
    """A recipe's mapping with one `key=value` of the command line put in.

    Args:
      raw: the mapping; it is not changed.
      override: a dotted key, "=", and a value in YAML.

    Returns:
      The new mapping.

    Raises:
      M3Error: there is no "=", the value is no YAML, or the key leads through something that has no keys.

    Example:
      >>> with_override({"models": ["a", "b"]}, "models.0.parameters.weight=0.7")
      {'models': [{'model': 'a', 'parameters': {'weight': 0.7}}, 'b']}
    """
    key, equals, text = override.partition("=")
    steps = key.strip().split(".")
    if not equals or not all(steps):
        raise M3Error(f"--set {override}: not of the form key=value; write for instance mixup.alpha=0.5")
    try:
        return _put(copy.deepcopy(raw), steps, _parse(text), "")
    except RecipeError as fault:
        raise M3Error(f"--set {override}: {fault}") from None


def _put(node: object, steps: list[str], value: object, parent: str) -> object:
    if not steps:
        return value
    step, rest = steps[0], steps[1:]
    if parent == "models" and isinstance(node, str):
        node = {"model": node}  # mergekit's short form grows where something is set in it
    if node is None:
        node = {}
    if isinstance(node, Mapping):
        return {**node, step: _put(node.get(step), rest, value, step)}
    if not isinstance(node, list | tuple):
        raise RecipeError(f"{parent} is {reprlib.repr(node)} and has no {step!r} inside; set {parent} itself")
    if not (step.isascii() and step.isdigit() and int(step) < len(node)):
        raise RecipeError(f"{parent} has no entry {step!r}; write a number from 0 to {len(node) - 1}")
    at = int(step)
    return [*node[:at], _put(node[at], rest, value, parent), *node[at + 1 :]]


def from_dialect(raw: object) -> dict[Any, Any]:
    """A recipe's mapping in the one spelling that the schema reads.

    Keys without a value are as good as absent, the source of `tokenizer` is
    `tokenizer_source`, and the models of `slices` are named as `models` too.

    Raises:
      RecipeError: it is no mapping, or has a mergekit key without a meaning here.
    """
    if not isinstance(raw, Mapping):
        raise RecipeError(f"{reprlib.repr(raw)} is not a mapping of keys to values; start with 'merge_method: ...'")
    keys = {key: value for key, value in raw.items() if value is not None}
    if "modules" in keys:
        raise RecipeError("merging by module is not supported; name whole models under 'models'", "modules")
    if isinstance(tokenizer := keys.get("tokenizer"), Mapping):
        source = tokenizer.get("source")
        if source is not None and "tokenizer_source" in keys:
            raise RecipeError("given together with tokenizer_source; keep one of the two", "tokenizer", "source")
        keys.setdefault("tokenizer_source", "union" if source is None else source)
        keys["tokenizer"] = {key: said for key, said in tokenizer.items() if key != "source"}
        if not keys["tokenizer"]:
            del keys["tokenizer"]
    if "slices" in keys:
        if "models" in keys:
            raise RecipeError("given together with models; keep one of the two", "slices")
        keys["models"] = _models_of(keys["slices"])
    return keys


def _models_of(slices: object) -> list[object]:
    """The models of the first slice; malformed slices are left for the schema to refuse."""
    first = slices[0] if isinstance(slices, list | tuple) and slices else None
    sources = first.get("sources") if isinstance(first, Mapping) else None
    if not isinstance(sources, list | tuple):
        raise RecipeError("not a list of slices with sources; list the models under 'models' instead", "slices")
    models = [source.get("model") for source in sources if isinstance(source, Mapping)]
    return [model for model in models if isinstance(model, str)]
