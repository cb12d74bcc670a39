"""The recipe: what to merge and how, in a superset of mergekit's YAML.

Every bad recipe is an `M3Error` with one sentence: at which dotted place, what is wrong, and the mend.
"""

import json
import os
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    FiniteFloat,
    ModelWrapValidatorHandler,
    PlainSerializer,
    PlainValidator,
    SerializerFunctionWrapHandler,
    StrictInt,
    StringConstraints,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from m3jax import documents
from m3jax.errors import M3Error
from m3jax.methods.rows import MethodRow, SparsifierRow, arguments
from m3jax.methods.schedules import Schedule, read_schedule
from m3jax.naming import block_of, position
from m3jax.recipe.blocks import read_blocks, read_sparsify, weight_parameters
from m3jax.recipe.chat_templates import read_chat_template
from m3jax.recipe.checks import CHECKS
from m3jax.recipe.dialect import from_dialect, read_yaml, with_override
from m3jax.recipe.settings import (
    Place,
    RecipeError,
    Setting,
    defaults_of,
    dotted,
    evaluate,
    is_gradient,
    nearest,
    parameters_of,
    plain,
    plain_parameters,
)
from m3jax.recipe.tokenizers import TokenizerSettings, plain_tokenizer, read_tokenizer
from m3jax.recipe.values import OutputDtype, read_alpha, read_dtype, read_method, read_regex, read_seed, read_sparsifier

Name: TypeAlias = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
Regex: TypeAlias = Annotated[str, AfterValidator(read_regex)]
Dtype: TypeAlias = Annotated[OutputDtype | None, PlainValidator(read_dtype)]


def _as_read(raw: object) -> dict[Any, Any]:
    """Parameters, which were read before the schema by what the method's row says; of no method there is nothing."""
    return dict(raw) if isinstance(raw, Mapping) else {}


Parameters: TypeAlias = Annotated[
    dict[str, Setting],
    PlainValidator(_as_read),
    PlainSerializer(plain_parameters, return_type=dict[str, Any]),
]


class _Strict(BaseModel):
    """Frozen, and no key that is not known."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


def _as_list(raw: object) -> object:
    return [raw] if isinstance(raw, str) else raw


def _method_name(raw: object) -> str:
    return read_method(raw).name


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
    """What is done to each expert before they are combined; in YAML its parameters stand beside `method`.

    References:
      Yu et al., Language Models are Super Mario (DARE), 2024, arXiv 2311.03099.
    """

    method: str
    target: Literal["delta", "weights"] = "delta"
    parameters: Parameters = {}

    @model_validator(mode="before")
    @classmethod
    def _from_flat(cls, raw: object) -> object:
        return read_sparsify(raw) if isinstance(raw, Mapping) else raw

    @model_serializer
    def _flat(self) -> dict[str, Any]:
        return {"method": self.method, "target": self.target, **plain_parameters(self.parameters)}

    @property
    def row(self) -> SparsifierRow:
        """Its row of the catalogue."""
        return read_sparsifier(self.method)

    def numbers(self, tensor_name: str, t: float, count: int) -> dict[str, tuple[float, ...]]:
        """What its parameters are for one tensor, by the factory's arguments: the same for every expert.

        Args:
          tensor_name: the tensor's full name.
          t: the tensor's position in the model.
          count: how many experts there are.
        """
        defaults = {parameter.name: parameter.default for parameter in self.row.parameters}
        found = {}
        for argument, name in arguments(self.row.parameters, "sparsifier", "leaf").items():
            value = evaluate(self.parameters[name], tensor_name, t)
            missing = 1.0 if defaults[name] is None else defaults[name]
            found[argument] = (float(missing if value is None else value),) * count  # type: ignore[arg-type]
        return found


class MixupSettings(_Strict):
    """M³: the weights are drawn from Beta(α, α), or Dirichlet(α, …, α) for more than two experts.

    `weights` has the outcome of earlier draws, by group ("model", the blocks, or the tensors), which is then used.

    References:
      Zhou et al., Mixup Model Merge, 2025, arXiv 2502.15434.
    """

    alpha: Annotated[float | tuple[float, float], PlainValidator(read_alpha), PlainSerializer(plain, return_type=Any)]
    granularity: Literal["model", "layer", "tensor"] = "model"
    weights: dict[str, tuple[FiniteFloat, ...]] | None = None

    @model_serializer(mode="wrap")
    def _without_what_is_not_given(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        told: dict[str, Any] = serialize(self)
        return {key: value for key, value in told.items() if key != "weights" or value is not None}


def _as_schedule(raw: object) -> Schedule:
    try:
        return read_schedule(raw)
    except M3Error as error:
        raise RecipeError(str(error).removeprefix("schedule: ")) from None


class AnatomySettings(_Strict):
    """What tensors are, where their names do not say it; patterns are searched in stored names."""

    blocks: Regex | None = None
    stacked: dict[str, StrictInt] = {}
    kinds: dict[str, Literal["parameter", "buffer", "statistics", "optimizer", "step", "random"]] = {}
    tied: bool | None = None


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
    merge_method: Annotated[str, BeforeValidator(_method_name)]
    base_model: Name | None = None
    models: tuple[ModelEntry, ...]
    slices: tuple[Slice, ...] | None = None
    sparsify: Sparsify | None = None
    mixup: MixupSettings | None = None
    parameters: Parameters = Field(default={}, validate_default=True)
    seed: Annotated[int, PlainValidator(read_seed)] = 0
    dtype: Dtype = None
    out_dtype: Dtype = None
    dequantize: bool = False
    tokenizer_source: Name | None = None
    tokenizer: Annotated[
        TokenizerSettings | None,
        PlainValidator(read_tokenizer),
        PlainSerializer(plain_tokenizer, return_type=dict[str, Any] | None),
    ] = None
    also_for: Annotated[tuple[Name, ...], BeforeValidator(_as_list)] = ()
    chat_template: Annotated[str, AfterValidator(read_chat_template)] | None = None
    exclude: tuple[Regex, ...] = ()
    only: Annotated[tuple[Name, ...], BeforeValidator(_as_list)] = ()
    keep_state: Literal["first"] | None = None
    format: Literal["safetensors", "orbax"] | None = None
    schedule: Annotated[Schedule, PlainValidator(_as_schedule), PlainSerializer(Schedule.to_json)] | None = None
    anatomy: AnatomySettings | None = None

    @field_validator("parameters")
    @classmethod
    def _fill_defaults(cls, given: dict[str, Setting], info: ValidationInfo) -> dict[str, Setting]:
        if "merge_method" not in info.data:
            return given  # and the method is what the user reads of
        row = read_method(info.data["merge_method"])
        defaults = defaults_of(row)
        if info.data.get("mixup") is not None:
            for name in weight_parameters(row):
                defaults.pop(name, None)  # drawn, not given
        return {**defaults, **given}

    @model_validator(mode="wrap")
    @classmethod
    def _check(cls, raw: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            recipe = handler(raw if isinstance(raw, cls) else read_blocks(from_dialect(raw)))
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
    def row(self) -> MethodRow:
        """The method's row of the catalogue."""
        return read_method(self.merge_method)

    @property
    def experts(self) -> tuple[ModelEntry, ...]:
        """The models to be merged, in order.

        Methods on task vectors drop the base where it stands among the models; those that interpolate put it first;
        to averages it is a model like any other.
        """
        if self.row.base == "expert" or self.base_model is None:
            return self.models
        others = tuple(entry for entry in self.models if entry.model != self.base_model)
        if self.row.base != "first":
            return others
        base = (entry for entry in self.models if entry.model == self.base_model)
        return (next(base, ModelEntry(model=self.base_model)), *others)

    @property
    def base_role(self) -> str | None:
        """What the base is read for: "base", or "template" where only its configuration and tokenizer are used."""
        if self.base_model is None or self.row.base == "first":
            return None
        return "base" if self.uses_base else "template"

    @property
    def uses_base(self) -> bool:
        """Whether the merge works on differences from the base model."""
        if self.row.base == "expert":
            return self.sparsify is not None and self.sparsify.target == "delta"
        return self.row.base == "task_vectors" or (self.row.base == "optional" and self.base_model is not None)

    @property
    def stacks(self) -> bool:
        """Whether `slices` stack layers into another model, and do not only give runs of layers other parameters."""
        if not self.slices:
            return False
        same = sorted(source.model for source in self.slices[0].sources)
        ends = [0, *(part.layers[1] for part in self.slices)]
        return not all(
            sorted(source.model for source in part.sources) == same
            and part.layers[0] == end
            and all(source.layer_range == part.layers for source in part.sources)
            for part, end in zip(self.slices, ends, strict=False)
        )

    def _sources(self, part: Slice) -> tuple[Source, ...]:
        """The sources of a slice that are experts, in their order."""
        if self.row.base == "expert" or self.base_model is None:
            return part.sources
        others = tuple(source for source in part.sources if source.model != self.base_model)
        if self.row.base != "first":
            return others
        return (*(source for source in part.sources if source.model == self.base_model), *others)

    def stacked_experts(self) -> list[list[Source]]:
        """For each expert of stacked layers, the source of each slice."""
        return [list(column) for column in zip(*map(self._sources, self.slices or ()), strict=True)]

    def stacked_base(self) -> list[tuple[int, int]]:
        """The layers of the base that stand below each slice: those that it is a source of, or those of the others.

        Raises:
          M3Error: the sources of a slice give different layers, and the base is none of them.
        """
        found = []
        for number, part in enumerate(self.slices or ()):
            own = [source.layer_range for source in part.sources if source.model == self.base_model]
            ranges = own or list({source.layer_range for source in part.sources})
            if len(ranges) > 1:
                raise M3Error(
                    f"slices.{number}: the sources give different layers, so which of the base belong to them cannot "
                    "be told; add the base as a source with its layer_range"
                )
            found.append(ranges[0])
        return found

    @property
    def weight_name(self) -> str:
        """The parameter by which each model counts; see `check_schedule`."""
        return weight_parameters(self.row)[0]

    @property
    def declared_layers(self) -> int | None:
        """How many layers `slices` says the models have; None without slices."""
        return sum(last - first for first, last in (part.layers for part in self.slices)) if self.slices else None

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
        if name not in parameters_of(self.row):
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
        return bool(self.parameters.get(name, default)) if name in parameters_of(self.row) else default

    def numbers(self, sets: str, tensor_name: str, t: float) -> dict[str, tuple[float, ...]]:
        """What the parameters that may differ between tensors are for one tensor, one number per expert.

        Args:
          sets: whose they are: "method", "sparsifier", "weights" or "scale".
          tensor_name: the tensor's full name.
          t: the tensor's position in the model.

        Returns:
          By the argument that each sets; weights and the scale under their parameter's name.
        """
        found = {}
        for parameter in self.row.parameters:
            whose, _, argument = parameter.sets.partition(".")
            if whose != sets or parameter.level == "merge":
                continue
            each = range(len(self.experts)) if parameter.level == "expert" else [None] * len(self.experts)
            default = 0.5 if parameter.default is None else float(parameter.default)
            values = [self.parameter(parameter.name, tensor_name, expert, t) for expert in each]
            found[argument or parameter.name] = tuple(default if v is None else float(v) for v in values)
        return found

    def has_gradients(self) -> bool:
        """Whether some parameter follows the layers."""
        sparsify = self.sparsify.parameters if self.sparsify is not None else {}
        return any(is_gradient(setting) for block in (*self._blocks(), sparsify) for setting in block.values())

    def anatomy_overrides(self) -> dict[str, Any] | None:
        """What the recipe says of tensors, by the names of `m3jax.anatomy.Overrides`; None if nothing."""
        return None if self.anatomy is None else self.anatomy.model_dump()

    def excludes(self, tensor_name: str) -> bool:
        """Whether some `exclude` pattern is found in a tensor's name."""
        return any(documents.pattern(pattern).search(tensor_name) for pattern in self.exclude)

    def resolved(self) -> dict[str, Any]:
        """The recipe as plain data for JSON or YAML, every default written out.

        Returns:
          A mapping from which `Recipe.model_validate` makes this same recipe.
        """
        everything = self.model_dump(mode="json")
        del everything["models" if self.slices else "slices"]
        for key in (
            "anatomy",
            "only",
            "keep_state",
            "dequantize",
            "tokenizer",
            "also_for",
            "format",
            "schedule",
        ):  # what most recipes have not
            if not everything[key]:
                del everything[key]
        return everything

    def notes(self) -> tuple[str, ...]:
        """What a reader who knows mergekit should be told, one sentence each."""
        notes = []
        if "int8_mask" in self.parameters:
            notes.append("int8_mask is ignored: the exact arithmetic never stores a mask, so it saves nothing.")
        unused = {name for block in self._blocks() for name in block} - {*parameters_of(self.row)}
        if unused:
            notes.append(f"{self.merge_method} does not use {', '.join(sorted(unused))}, which is ignored.")
        notes += [parameter.note for parameter in self.row.parameters if parameter.note and self.flag(parameter.name)]
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
        first = 0
        for part in self.slices:
            count = part.layers[1] - part.layers[0]
            if block[1] < first + count:
                break
            first += count
        return part, position(block[1] - first, count)

    def _own(self, expert: ModelEntry, part: Slice) -> list[Source]:
        """The sources of a slice that stand for an expert."""
        if self.stacks:
            place = next((i for i, entry in enumerate(self.experts) if entry is expert), 0)
            return [self._sources(part)[place]]
        return [source for source in part.sources if source.model == expert.model]

    def levels(self, expert: ModelEntry | None, part: Slice | None) -> Iterator[dict[str, Setting]]:
        """The blocks of parameters that a tensor's setting is looked up in, the first to decide first."""
        if expert is not None:
            yield expert.parameters
        if part is not None:
            if expert is not None:
                yield from (source.parameters for source in self._own(expert, part))
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
    ("mixup",): MixupSettings,
    ("anatomy",): AnatomySettings,
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
