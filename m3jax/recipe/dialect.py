"""From YAML text and mergekit's spellings to the plain mapping that the recipe's schema reads."""

import copy
import os
import reprlib
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from m3jax.documents import DEEPEST, FAULTS, read_bounded
from m3jax.errors import M3Error
from m3jax.recipe.settings import Place, RecipeError

_LARGEST = 2**20  # bytes of a recipe; long ones have some thousands
_MOST_NODES = 100_000  # of what a recipe says, everything counted where an alias repeats it


class _Loader(yaml.SafeLoader):
    """YAML in which a key that is written twice is an error, and so is a number that YAML 1.1 counts in sixties.

    What is nested deeper than anyone means is given up as it is met: PyYAML's time grows with the square of the depth.
    """

    def fetch_flow_collection_start(self, kind: type[yaml.Token]) -> None:
        """Begin with what is in brackets."""
        self._check_depth(self.flow_level)
        super().fetch_flow_collection_start(kind)

    def add_indent(self, column: int) -> bool:
        """Begin with what is indented."""
        self._check_depth(len(self.indents))
        return bool(super().add_indent(column))

    def _check_depth(self, depth: int) -> None:
        if depth > DEEPEST:
            problem = "brackets inside brackets without end; mend them"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=self.get_mark())

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                problem = f"the key {key.value!r} is written twice; remove one"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            if isinstance(key, yaml.ScalarNode):
                seen.add(key.value)
        return super().construct_mapping(node, deep=deep)

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        """A number as it is written; 1:30 would be 90."""
        if ":" in node.value:
            problem = f"{node.value} would be read as minutes and seconds; write a number, or text in quotes"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        is_whole = node.tag == "tag:yaml.org,2002:int"
        return self.construct_yaml_int(node) if is_whole else self.construct_yaml_float(node)


for _tag in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _Loader.construct_number)


def _parse(text: str) -> object:
    """The one value of a text in YAML."""
    documents = _parse_all(text)
    if len(documents) > 1:
        raise RecipeError("not valid YAML: several documents stand where one value is meant; remove '---'")
    return documents[0] if documents else None


def _parse_all(text: str) -> list[object]:
    """The documents of a text in YAML, but those that say nothing."""
    loader = None
    try:
        loader = _Loader(text)
        found = []
        while loader.check_node() and (root := loader.get_node()) is not None:
            _check_size(root)
            found.append(loader.construct_document(root))
        return [document for document in found if document is not None]
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
    """What a YAML file says; of several documents, the output's with the others as its `intermediates`.

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
        documents = _parse_all(text)
        return _joined(documents) if len(documents) > 1 else documents[0] if documents else None
    except RecipeError as fault:
        raise M3Error(f"{os.fspath(path)}: {fault}") from None


def _joined(documents: Sequence[object]) -> dict[Any, Any]:
    """Several documents as one: the output is the one without a name, or the last."""
    nameless = []
    for number, document in enumerate(documents, 1):
        if not isinstance(document, Mapping):
            raise RecipeError(
                f"document {number} is {reprlib.repr(document)}, not a mapping; start it with 'name: ...'"
            )
        if "intermediates" in document:
            raise RecipeError(f"document {number} has intermediates, which the documents before it are; remove the key")
        if document.get("name") is None:
            nameless.append(number)
    if len(nameless) > 1:
        said = " and ".join(map(str, nameless))
        raise RecipeError(f"documents {said} have no name; name all but the one that is to be written")
    output = nameless[0] - 1 if nameless else len(documents) - 1
    others = [document for number, document in enumerate(documents) if number != output]
    return {**documents[output], "intermediates": others}  # type: ignore[dict-item]


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

    Keys without a value are as good as absent, the source of `tokenizer` is `tokenizer_source`, and models that
    mergekit has written out as mappings are text.

    Raises:
      RecipeError: it is no mapping, or has a mergekit key without a meaning here.
    """
    if not isinstance(raw, Mapping):
        raise RecipeError(f"{reprlib.repr(raw)} is not a mapping of keys to values; start with 'merge_method: ...'")
    keys = _holder(raw, ())
    _check_kind(keys)
    if "modules" in keys:
        keys["modules"] = _modules(keys["modules"], keys)
    if isinstance(tokenizer := keys.get("tokenizer"), Mapping):
        source = tokenizer.get("source")
        if source is not None and "tokenizer_source" in keys:
            raise RecipeError("given together with tokenizer_source; keep one of the two", "tokenizer", "source")
        keys.setdefault("tokenizer_source", "union" if source is None else source)
        keys["tokenizer"] = {key: said for key, said in tokenizer.items() if key != "source"}
        if not keys["tokenizer"]:
            del keys["tokenizer"]
    if "base_model" in keys:
        keys["base_model"] = _reference(keys["base_model"], ("base_model",))
    return keys


def _check_kind(keys: Mapping[Any, Any]) -> None:
    """Raise RecipeError for files of mergekit's other commands."""
    if "merge_method" in keys:
        return
    if "gate_mode" in keys or "experts" in keys:
        raise RecipeError(
            "this is a file for mergekit-moe, and m3jax builds no mixtures of experts; build it there, then merge it as"
            " any other model"
        )
    if "genome" in keys:
        raise RecipeError(
            "this is a file for mergekit-evolve; write its genome as a recipe with mixup and give its tasks to"
            " 'm3jax explore'"
        )


def _holder(raw: Mapping[Any, Any], place: Place) -> dict[Any, Any]:
    """A recipe's mapping, or that of a module, with its models and slices in the one spelling."""
    keys = {key: value for key, value in raw.items() if value is not None}
    if "slices" in keys:
        if "models" in keys:
            raise RecipeError("given together with models; keep one of the two", *place, "slices")
        if not isinstance(keys["slices"], list | tuple) or not keys["slices"]:
            raise RecipeError(
                "not a list of slices with sources; list the models under 'models' instead", *place, "slices"
            )
        keys["slices"] = [_slice(part, (*place, "slices", i)) for i, part in enumerate(keys["slices"])]
    if isinstance(keys.get("models"), list | tuple):
        keys["models"] = [_entry(entry, (*place, "models", i)) for i, entry in enumerate(keys["models"])]
    return keys


def _modules(modules: object, keys: Mapping[Any, Any]) -> dict[Any, Any]:
    beside = next((key for key in ("models", "slices") if key in keys), None)
    if beside is not None:
        raise RecipeError(f"given together with {beside}; keep one of the two", "modules")
    if not isinstance(modules, Mapping) or not modules:
        raise RecipeError("names no part of the models; write such as 'text_decoder: {models: [...]}'", "modules")
    found = {}
    for name, module in modules.items():
        if not isinstance(module, Mapping) or not {"models", "slices"} & {
            k for k, v in module.items() if v is not None
        }:
            raise RecipeError("has neither models nor slices; give it one of them", "modules", str(name))
        found[name] = _holder(module, ("modules", str(name)))
    return found


def _slice(part: object, place: Place) -> object:
    if not isinstance(part, Mapping):
        return part
    part = {key: value for key, value in part.items() if value is not None}
    if "residual_weight" in part:
        raise RecipeError("mergekit reads it and does nothing with it; remove it", *place, "residual_weight")
    if "base_model" in part:
        part["base_model"] = _reference(part["base_model"], (*place, "base_model"))
    if isinstance(part.get("sources"), list | tuple):
        part["sources"] = [_entry(entry, (*place, "sources", i)) for i, entry in enumerate(part["sources"])]
    return part


def _entry(entry: object, place: Place) -> object:
    if not isinstance(entry, Mapping):
        return entry
    return {**entry, "model": _reference(entry["model"], (*place, "model"))} if "model" in entry else entry


def _reference(model: object, place: Place) -> object:
    """A model as text, where mergekit has written it out as a mapping."""
    if not isinstance(model, Mapping):
        return model
    if not set(model) <= {"model", "lora", "override_architecture"} or "model" not in model:
        raise RecipeError("is no model; write its path or hub id, as in 'org/name@revision'", *place)
    if model.get("override_architecture") is not None:
        raise RecipeError(
            "m3jax goes by the names of tensors, not by an architecture's name; remove it",
            *place,
            "override_architecture",
        )
    adapter = model.get("lora")
    return _path(model["model"], place) + (f"+{_path(adapter, place)}" if adapter is not None else "")


def _path(told: object, place: Place) -> str:
    if isinstance(told, str):
        return told
    path = told.get("path") if isinstance(told, Mapping) else None
    if not isinstance(told, Mapping) or not isinstance(path, str) or not set(told) <= {"path", "revision"}:
        raise RecipeError(f"{reprlib.repr(told)} is no path; write it as text, as in 'org/name@revision'", *place)
    return path if told.get("revision") is None else f"{path}@{told['revision']}"
