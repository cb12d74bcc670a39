"""The recipe: what to merge and how, in a superset of mergekit's YAML.

Every bad recipe is an `M3Error` with one sentence: at which dotted place, what is wrong, and the mend.
"""

import json
import os
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PlainSerializer,
    PlainValidator,
    StrictBool,
    StrictInt,
    StringConstraints,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from m3jax.errors import M3Error
from m3jax.naming import block_of, position
from m3jax.recipe.checks import CHECKS
from m3jax.recipe.dialect import from_dialect, read_yaml, with_override
from m3jax.recipe.settings import (
    DEFAULTS,
    Place,
    RecipeError,
    Setting,
    dotted,
    evaluate,
    known_parameters,
    nearest,
    plain,
    plain_parameters,
    read_parameters,
    read_share_setting,
)
from m3jax.recipe.values import MergeMethod, OutputDtype, read_alpha, read_dtype, read_method, read_regex, read_seed

Name: TypeAlias = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
Regex: TypeAlias = Annotated[str, AfterValidator(read_regex)]
Dtype: TypeAlias = Annotated[OutputDtype | None, PlainValidator(read_dtype)]
Parameters: TypeAlias = Annotated[
    dict[str, Setting],
    PlainValidator(read_parameters),
    PlainSerializer(plain_parameters, return_type=dict[str, Any]),
]


class _Strict(BaseModel):
    """Frozen, and no key that is not known."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


class ModelEntry(_Strict):
    """One model of the merge: its path or hub id, and what is set for it alone."""

    model: Name
    parameters: Parameters = {}

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, raw: object) -> object:
        if isinstance(raw, str):
            return {"model": raw}
        if not isinstance(raw, Mapping | ModelEntry):
            raise RecipeError(f"{reprlib.repr(raw)} is not a model; write its path or hub id, quoted if it is a number")
        return raw


class Source(ModelEntry):
    """One model of a slice, with the layers that it gives."""

    layer_range: tuple[StrictInt, StrictInt]


class Slice(_Strict):
    """A run of layers with parameters of its own, as in mergekit's `slices`."""

    sources: tuple[Source, ...] = Field(min_length=1)
    parameters: Parameters = {}

    @property
    def layers(self) -> tuple[int, int]:
        """The first layer, and the one after the last."""
        return self.sources[0].layer_range


class Sparsify(_Strict):
    """What is done to each expert before they are combined.

    References:
      Yu et al., Language Models are Super Mario (DARE), 2024, arXiv 2311.03099.
    """

    method: Literal["dare", "magnitude"]
    density: Annotated[Setting, PlainValidator(read_share_setting), PlainSerializer(plain, return_type=Any)]
    target: Literal["delta", "weights"] = "delta"
    rescale: StrictBool | None = Field(default=None, validate_default=True)
    scope: Literal["tensor", "model"] = "tensor"

    @field_validator("rescale")
    @classmethod
    def _default_rescale(cls, given: bool | None, info: ValidationInfo) -> bool:
        return info.data.get("method") == "dare" if given is None else given

    @model_validator(mode="after")
    def _check_scope(self) -> Self:
        if self.scope == "model" and self.method == "dare":
            raise RecipeError("dare drops each entry by itself and has no scope; remove the key", "scope")
        if self.scope == "model" and not isinstance(self.density, float):
            raise RecipeError("one threshold for the whole model needs one density; write one number", "density")
        return self


class Mixup(_Strict):
    """M³: the weights are drawn from Beta(α, α), or Dirichlet(α, …, α) for more than two experts.

    References:
      Zhou et al., Mixup Model Merge, 2025, arXiv 2502.15434.
    """

    alpha: Annotated[float | tuple[float, float], PlainValidator(read_alpha), PlainSerializer(plain, return_type=Any)]
    granularity: Literal["model", "layer", "tensor"] = "model"


class Recipe(_Strict):
    """A whole merge, checked, with every default filled in.

    Example:
      >>> recipe = Recipe.model_validate({
      ...     "merge_method": "linear",
      ...     "models": ["math-7b", {"model": "code-7b", "parameters": {"weight": [0.0, 1.0]}}],
      ... })
      >>> recipe.parameter("weight", "model.layers.1.mlp.up_proj.weight", 1, t=0.25)
      0.25
      >>> recipe.flag("normalize")
      True
    """

    name: str | None = None
    merge_method: Annotated[MergeMethod, BeforeValidator(read_method)]
    base_model: Name | None = None
    models: tuple[ModelEntry, ...]
    slices: tuple[Slice, ...] | None = None
    sparsify: Sparsify | None = None
    mixup: Mixup | None = None
    parameters: Parameters = Field(default={}, validate_default=True)
    seed: Annotated[int, PlainValidator(read_seed)] = 0
    dtype: Dtype = None
    out_dtype: Dtype = None
    tokenizer_source: Name | None = None
    chat_template: str | None = None
    exclude: tuple[Regex, ...] = ()

    @field_validator("parameters")
    @classmethod
    def _fill_defaults(cls, given: dict[str, Setting], info: ValidationInfo) -> dict[str, Setting]:
        defaults = dict(DEFAULTS.get(info.data.get("merge_method", ""), {}))
        if info.data.get("mixup") is not None:
            defaults.pop("weight", None)  # drawn, not given
        return {**defaults, **given}

    @model_validator(mode="wrap")
    @classmethod
    def _check(cls, raw: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            recipe = handler(raw if isinstance(raw, cls) else from_dialect(raw))
            for check in CHECKS:
                check(recipe)
        except ValidationError as error:
            raise M3Error(_sentence(error)) from None
        except RecipeError as fault:
            raise M3Error(_say(fault.place, fault)) from None
        return recipe

    @property
    def output_dtype(self) -> OutputDtype | None:
        """The dtype that is written, or None for the inputs' own."""
        return self.out_dtype or self.dtype

    @property
    def experts(self) -> tuple[ModelEntry, ...]:
        """The models to be merged, in order.

        Methods on task vectors drop the base where it stands among the models; slerp puts it first (t = 0);
        to linear merging it is a model like any other.
        """
        if self.merge_method == "linear" or self.base_model is None:
            return self.models
        others = tuple(entry for entry in self.models if entry.model != self.base_model)
        if self.merge_method != "slerp":
            return others
        base = (entry for entry in self.models if entry.model == self.base_model)
        return (next(base, ModelEntry(model=self.base_model)), *others)

    @property
    def uses_base(self) -> bool:
        """Whether the merge works on differences from the base model."""
        if self.merge_method == "linear":
            return self.sparsify is not None and self.sparsify.target == "delta"
        return self.merge_method != "slerp"

    @property
    def declared_layers(self) -> int | None:
        """How many layers `slices` says the models have; None without slices."""
        return self.slices[-1].layers[1] if self.slices else None

    def parameter(self, name: str, tensor_name: str, expert_index: int | None, t: float) -> float | bool | str | None:
        """One parameter's value for one tensor.

        The first of these levels that has a value decides, as in mergekit: the expert's own parameters, those
        of the slice, those of the recipe. A list of filters none of which matches has no value.

        Args:
          name: a parameter's name, such as "weight".
          tensor_name: the tensor's full name.
          expert_index: which of `experts`, or None for a parameter that is not an expert's.
          t: the tensor's position in the model, see `layer_position`. With `slices`, gradients run over each
            slice anew, as they do in mergekit: t then only tells what is before the blocks (0) from what is
            after them (1).

        Returns:
          The value, or None where no level has one.
        """
        if name not in known_parameters(self.merge_method):
            return None
        part, t = self._slice_at(tensor_name, t)
        expert = None if expert_index is None else self.experts[expert_index]
        for level in self.levels(expert, part):
            if name in level:
                value = evaluate(level[name], tensor_name, t)
                if value is not None:
                    return value
        return None

    def flag(self, name: str, default: bool = False) -> bool:
        """A switch of the whole merge, such as "normalize".

        Args:
          name: the switch's name.
          default: what to say when the merge method has no such switch.

        Returns:
          What the recipe says, or else the method's own default.
        """
        known = name in known_parameters(self.merge_method)
        return bool(self.parameters.get(name, default)) if known else default

    def sparsify_density(self, tensor_name: str, t: float) -> float:
        """The share of a tensor's entries that `sparsify` keeps; 1 where it says nothing."""
        value = None if self.sparsify is None else evaluate(self.sparsify.density, tensor_name, t)
        return 1.0 if value is None else float(value)

    def excludes(self, tensor_name: str) -> bool:
        """Whether some `exclude` pattern is found in a tensor's name."""
        return any(re.search(pattern, tensor_name) for pattern in self.exclude)

    def resolved(self) -> dict[str, Any]:
        """The recipe as plain data for JSON or YAML, every default written out.

        Returns:
          A mapping from which `Recipe.model_validate` makes this same recipe.
        """
        everything = self.model_dump(mode="json")
        del everything["models" if self.slices else "slices"]
        return everything

    def notes(self) -> tuple[str, ...]:
        """What a reader who knows mergekit should be told, one sentence each."""
        notes = []
        if "int8_mask" in self.parameters:
            notes.append("int8_mask is ignored: the exact arithmetic never stores a mask, so it saves nothing.")
        unused = {name for block in self._blocks() for name in block} - {*known_parameters(self.merge_method)}
        if unused:
            notes.append(f"{self.merge_method} does not use {', '.join(sorted(unused))}, which is ignored.")
        if self.merge_method.startswith("dare_") and self.flag("rescale"):
            notes.append(
                "rescale divides the kept entries by the density, as DARE's paper does; mergekit 0.1 and"
                " later match the L1 norm of each tensor."
            )
        return tuple(notes)

    def _blocks(self) -> Iterator[dict[str, Setting]]:
        """Every block of parameters."""
        yield self.parameters
        yield from (entry.parameters for entry in self.models)
        for part in self.slices or ():
            yield part.parameters
            yield from (source.parameters for source in part.sources)

    def _slice_at(self, tensor_name: str, t: float) -> tuple[Slice | None, float]:
        if not self.slices:
            return None, t
        block = block_of(tensor_name)
        if block is None:
            return self.slices[0 if t < 0.5 else -1], t
        part = next((part for part in self.slices if block[1] < part.layers[1]), self.slices[-1])
        first, end = part.layers
        return part, position(block[1] - first, end - first)

    def levels(self, expert: ModelEntry | None, part: Slice | None) -> Iterator[dict[str, Setting]]:
        """The blocks of parameters that a tensor's setting is looked up in, the first to decide first."""
        if expert is not None:
            yield expert.parameters
        if part is not None:
            if expert is not None:
                yield from (source.parameters for source in part.sources if source.model == expert.model)
            yield part.parameters
        yield self.parameters


def load_recipe(
    source: str | os.PathLike[str] | Mapping[str, Any], overrides: Sequence[str] = (), seed: int | None = None
) -> Recipe:
    """Reads a recipe.

    Args:
      source: a YAML file's path, or a mapping such as a manifest holds.
      overrides: what `--set` says: "key=value" with a dotted key and a YAML value, the last one winning.
      seed: a seed that wins over the recipe's.

    Returns:
      The recipe, checked.

    Raises:
      M3Error: the file cannot be read, or the recipe or an override is wrong.

    Example:
      >>> load_recipe({"merge_method": "linear", "models": ["a", "b"]}, ["mixup.alpha=0.5"], seed=7).seed
      7
    """
    origin = "recipe" if isinstance(source, Mapping) else os.fspath(source)
    if overrides or seed is not None:
        origin += " with the given changes"
    raw: object = source if isinstance(source, Mapping) else read_yaml(source)
    for override in overrides:
        raw = with_override(raw, override)
    if seed is not None and isinstance(raw, Mapping):
        raw = {**raw, "seed": seed}
    try:
        recipe = Recipe.model_validate(raw)
        json.dumps(recipe.resolved(), ensure_ascii=False).encode()
    except M3Error as error:
        raise M3Error(f"{origin}: {error}") from None
    except UnicodeEncodeError:
        raise M3Error(f"{origin}: holds half a character (a lone surrogate such as \\ud800): remove it") from None
    return recipe


_SCHEMAS: dict[Place, type[BaseModel]] = {
    (): Recipe,
    ("models",): ModelEntry,
    ("slices",): Slice,
    ("slices", "sources"): Source,
    ("sparsify",): Sparsify,
    ("mixup",): Mixup,
}


_WANTED = {
    "string_type": "text, quoted if it looks like a number",
    "string_too_short": "a name that is not empty",
    "tuple_type": "a list",
    "too_short": "a longer list",
    "too_long": "a shorter list",
    "model_type": "'key: value' lines",
    "bool_type": "true or false",
    "int_type": "a whole number",
    "invalid_key": "keys that are text, quoted if YAML reads them as something else",
}


def _say(place: Place, message: object) -> str:
    return f"{dotted(place)}: {message}" if place else str(message)


def _sentence(error: ValidationError) -> str:
    """The one sentence for the first thing that pydantic found wrong."""
    found = error.errors(include_url=False)
    # a misspelt key is also a missing one; the misspelling says more
    first = min(found, key=lambda entry: entry["type"] != "extra_forbidden")
    place, got = first["loc"], reprlib.repr(first["input"])
    match first["type"]:
        case "value_error":
            cause = first["ctx"]["error"]
            return _say((*place, *getattr(cause, "place", ())), cause)
        case "extra_forbidden":
            schema = _SCHEMAS[tuple(key for key in place[:-1] if isinstance(key, str))]
            return _say(place, f"unknown key; {nearest(str(place[-1]), schema.model_fields)}")
        case "missing":
            return _say(place, "missing; add it")
        case "literal_error":
            return _say(place, f"{got} is not one of {first['ctx']['expected']}; write one of them")
        case kind:
            return _say(place, f"{got} does not fit here; write {_WANTED.get(kind, 'another value')}")
