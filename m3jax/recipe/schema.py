"""The recipe: what to merge and how, in a superset of mergekit's YAML.

Every bad recipe is an `M3Error` with one sentence: at which dotted place, what is wrong, and the mend.
"""

import functools
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    ModelWrapValidatorHandler,
    PlainSerializer,
    PlainValidator,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from m3jax import documents
from m3jax.errors import M3Error
from m3jax.methods.rows import MethodRow
from m3jax.methods.schedules import Schedule, read_schedule
from m3jax.recipe.blocks import read_blocks, weight_parameters
from m3jax.recipe.chat_templates import read_chat_template
from m3jax.recipe.checks import CHECKS, placed_blocks
from m3jax.recipe.dialect import from_dialect
from m3jax.recipe.entries import (
    AnatomySettings,
    Dtype,
    MixupSettings,
    ModelEntry,
    Module,
    Name,
    Parameters,
    Regex,
    Slice,
    Source,
    Sparsify,
    Strict,
)
from m3jax.recipe.faults import say, sentence
from m3jax.recipe.intermediates import in_order, needed_for, read_intermediates
from m3jax.recipe.sections import Section, entries_of, name_in, section_at, sections_of, stacks
from m3jax.recipe.settings import Place, RecipeError, Setting, defaults_of, evaluate, is_gradient, parameters_of
from m3jax.recipe.tokenizers import TokenizerSettings, plain_tokenizer, read_tokenizer
from m3jax.recipe.values import OutputDtype, read_method, read_seed, read_seeds


def _as_list(raw: object) -> object:
    return [raw] if isinstance(raw, str) else raw


def _method_name(raw: object) -> str:
    return read_method(raw).name


def _as_schedule(raw: object) -> Schedule:
    try:
        return read_schedule(raw)
    except M3Error as error:
        raise RecipeError(str(error).removeprefix("schedule: ")) from None


class Recipe(Strict):
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
    models: tuple[ModelEntry, ...] | None = None
    slices: tuple[Slice, ...] | None = Field(default=None, min_length=1)
    modules: dict[str, Module] | None = Field(default=None, min_length=1)
    sparsify: Sparsify | None = None
    mixup: MixupSettings | None = None
    parameters: Parameters = Field(default={}, validate_default=True)
    seed: Annotated[int, PlainValidator(read_seed)] = 0
    seeds: Annotated[
        tuple[int, ...] | None,
        PlainValidator(read_seeds),
        PlainSerializer(lambda seeds: seeds and list(seeds), return_type=list[int] | None),
    ] = None
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
    intermediates: Annotated[
        tuple["Recipe", ...],
        PlainValidator(lambda raw: read_intermediates(raw, Recipe)),
        PlainSerializer(lambda recipes: [recipe.resolved() for recipe in recipes], return_type=list[dict[str, Any]]),
    ] = ()

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
            if recipe.intermediates:
                recipe = recipe.model_copy(update={"intermediates": _in_order(recipe)})
        except ValidationError as error:
            raise M3Error(sentence(error, _SCHEMAS)) from None
        except RecipeError as fault:
            raise M3Error(say(fault.place, fault)) from None
        return recipe

    @property
    def needed(self) -> "tuple[Recipe, ...]":
        """The intermediates that are to be made before this, in order."""
        return needed_for(self)

    @property
    def output_dtype(self) -> OutputDtype | None:
        """The dtype that is written, or None for the inputs' own."""
        return self.out_dtype or self.dtype

    @property
    def row(self) -> MethodRow:
        """The method's row of the catalogue."""
        return read_method(self.merge_method)

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy, which finds its own sections."""
        copied = super().model_copy(update=update, deep=deep)
        copied.__dict__.pop("sections", None)
        return copied

    @functools.cached_property
    def sections(self) -> dict[str | None, tuple[Section, ...]]:
        """What is merged from the same sources, by module; of a recipe without `modules` under None."""
        return sections_of(self)

    @property
    def every_section(self) -> tuple[Section, ...]:
        """The sections of all modules, in order."""
        return tuple(section for own in self.sections.values() for section in own)

    @property
    def experts(self) -> tuple[ModelEntry, ...]:
        """The models to be merged, in order; of several sections those of the first."""
        return self.every_section[0].experts

    @property
    def weight_name(self) -> str:
        """The parameter by which each model counts; see `check_schedule`."""
        return weight_parameters(self.row)[0]

    @property
    def counts(self) -> tuple[int, ...]:
        """How many experts the sections have: one number where all have as many."""
        return tuple(dict.fromkeys(len(section.experts) for section in self.every_section))

    @property
    def named_models(self) -> tuple[str, ...]:
        """Every model that the recipe names, each once: the base, the models, what else it takes something from."""
        named = [self.base_model]
        holders: list[Recipe | Module] = [self, *(self.modules or {}).values()]
        for holder in holders:
            named += [entry.model for _, entry in entries_of(holder)]
            named += [part.base_model for part in holder.slices or ()]
        if self.tokenizer_source not in (None, "union", "base"):
            named.append(self.tokenizer_source)
        return tuple(dict.fromkeys(name for name in named if name is not None))

    @property
    def base_role(self) -> str | None:
        """What the base is read for: "base", or "template" where only its configuration and tokenizer are used."""
        if self.row.base == "first":
            return None
        if self.uses_base:
            return "base"
        return None if self.base_model is None else "template"

    @property
    def uses_base(self) -> bool:
        """Whether the merge works on differences from the base model."""
        if self.row.base == "expert":
            return self.sparsify is not None and self.sparsify.target == "delta"
        given = any(section.base is not None for section in self.every_section)
        return self.row.base == "task_vectors" or (self.row.base == "optional" and given)

    @property
    def stacks(self) -> bool:
        """Whether layers or modules of several models are put together, beyond what parameters say."""
        return self.modules is not None or (self.slices is not None and stacks(self.slices))

    def declared_layers(self, module: str | None = None) -> int | None:
        """How many layers `slices` says a module or model has; None without slices."""
        last = self.sections[module][-1]
        return None if last.layers is None else last.first + last.layers

    def parameter(
        self,
        name: str,
        tensor_name: str,
        expert_index: int | None,
        t: float,
        module: str | None = None,
        layer: int | None = None,
    ) -> float | bool | str | None:
        """One parameter's value for one tensor.

        The first of these levels that has a value decides, as in mergekit: the expert's own parameters, those
        of the slice, those of the module, those of the recipe. A list of filters none of which matches has no value.

        Args:
          name: a parameter's name, such as "weight".
          tensor_name: the tensor's full name.
          expert_index: which expert of the tensor's section, or None for a parameter that is not an expert's.
          t: the tensor's position in the model, see `layer_position`. With `slices`, gradients run over each
            slice anew, see `section_at`.
          module: the module that it is of, where the recipe has `modules`.
          layer: the block that it is of; told by its name if None.

        Returns:
          The value, or None where no level has one.
        """
        if name not in parameters_of(self.row):
            return None
        section, t = section_at(self.sections[module], tensor_name, t, layer)
        expert = None if expert_index is None else section.experts[expert_index]
        if expert is not None:  # whose filters are of the names in its own model
            tensor_name = name_in(section, expert, tensor_name)
        for level in (*(() if expert is None else (expert.parameters,)), *section.levels):
            if name in level:
                value = evaluate(level[name], tensor_name, t)
                if value is not None:
                    return value
        return None

    def count_at(self, tensor_name: str, t: float, module: str | None = None, layer: int | None = None) -> int:
        """How many experts a tensor has; the arguments are those of `parameter`."""
        return len(section_at(self.sections[module], tensor_name, t, layer)[0].experts)

    def flag(self, name: str, default: bool = False) -> bool:
        """A switch of the whole merge, such as "normalize".

        Args:
          name: the switch's name.
          default: what to say when the merge method has no such switch.

        Returns:
          What the recipe says, or else the method's own default.
        """
        return bool(self.parameters.get(name, default)) if name in parameters_of(self.row) else default

    def numbers(
        self, sets: str, tensor_name: str, t: float, module: str | None = None, layer: int | None = None
    ) -> dict[str, tuple[float, ...]]:
        """What the parameters that may differ between tensors are for one tensor, one number per expert.

        Args:
          sets: whose they are: "method", "sparsifier", "weights" or "scale".
          tensor_name: the tensor's full name.
          t: the tensor's position in the model.
          module: as in `parameter`.
          layer: as in `parameter`.

        Returns:
          By the argument that each sets; weights and the scale under their parameter's name.
        """
        found = {}
        for parameter in self.row.parameters:
            whose, _, argument = parameter.sets.partition(".")
            if whose != sets or parameter.level == "merge":
                continue
            count = self.count_at(tensor_name, t, module, layer)
            each = range(count) if parameter.level == "expert" else [None] * count
            default = 0.5 if parameter.default is None else float(parameter.default)
            values = [self.parameter(parameter.name, tensor_name, expert, t, module, layer) for expert in each]
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
        unused = {"models", "slices", "modules"} - ({"models"} if self.models is not None else set())
        unused |= {"intermediates", "anatomy", "only", "keep_state", "dequantize", "tokenizer", "also_for"}
        unused |= {"format", "schedule", "seeds"}
        for key in unused:  # what most recipes have not
            if not everything[key]:
                del everything[key]
        if self.seeds is not None:
            del everything["seed"]
        return everything

    def by_seed(self) -> "dict[int, Recipe]":
        """The recipes of the merges that `seeds` asks for, each with its own `seed`; none where it says nothing."""
        return {seed: self.model_copy(update={"seed": seed, "seeds": None}) for seed in self.seeds or ()}

    def notes(self) -> tuple[str, ...]:
        """What a reader who knows mergekit should be told, one sentence each."""
        notes = []
        if "int8_mask" in self.parameters:
            notes.append("int8_mask is ignored: the exact arithmetic never stores a mask, so it saves nothing.")
        listed = {entry.model for section in self.every_section for entry in section.experts}
        shared = {self.parameters.get(name, 1.0) for name in weight_parameters(self.row)} - {1.0}  # not the default
        if self.base_role == "template" and shared and self.base_model not in listed:
            notes.append(
                f"base_model gives {self.merge_method} configuration and tokenizer only, where mergekit averages it"
                " too; list it among the models to have that."
            )
        gradients = [each for block in self._blocks() for each in block.values() if is_gradient(each)]
        if any(isinstance(each, tuple) for each in gradients):
            notes.append("gradients stand at their last value after the layers, where mergekit takes their first.")
        unused = {name for block in self._blocks() for name in block} - {*parameters_of(self.row)}
        if unused:
            notes.append(f"{self.merge_method} does not use {', '.join(sorted(unused))}, which is ignored.")
        idle = [str(recipe.name) for recipe in self.intermediates if recipe not in self.needed]
        if idle:
            notes.append(
                f"{', '.join(idle)}: the output does not need it, so it is not made; give it a file of its own."
            )
        notes += [parameter.note for parameter in self.row.parameters if parameter.note and self.flag(parameter.name)]
        return tuple(notes)

    def _blocks(self) -> Iterator[dict[str, Setting]]:
        """Every block of parameters."""
        return (block for _, block in placed_blocks(self))


def _in_order(recipe: Recipe) -> tuple[Recipe, ...]:
    try:
        return in_order(recipe.intermediates, recipe)
    except RecipeError as fault:
        raise RecipeError(str(fault), *(("intermediates", *fault.place) if fault.place else ())) from None


_SCHEMAS: dict[Place, type[BaseModel]] = {
    (): Recipe,
    ("models",): ModelEntry,
    ("slices",): Slice,
    ("slices", "sources"): Source,
    ("modules",): Module,
    ("sparsify",): Sparsify,
    ("mixup",): MixupSettings,
    ("anatomy",): AnatomySettings,
}
