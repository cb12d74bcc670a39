"""What a recipe is made of: models, slices of their layers, what is dropped and what is drawn."""

import reprlib
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    PlainSerializer,
    PlainValidator,
    SerializerFunctionWrapHandler,
    StrictInt,
    StringConstraints,
    model_serializer,
    model_validator,
)

from m3jax.methods.rows import SparsifierRow, arguments
from m3jax.recipe.blocks import read_sparsify
from m3jax.recipe.settings import RecipeError, Setting, evaluate, plain, plain_parameters
from m3jax.recipe.values import OutputDtype, read_alpha, read_dtype, read_regex, read_smooth, read_sparsifier

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


class Strict(BaseModel):
    """Frozen, and no key that is not known."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


class ModelEntry(Strict):
    """One model of the merge: its path or hub id, the statistics that belong to it, and what is set for it alone."""

    model: Name
    statistics: Name | None = None
    parameters: Parameters = {}

    @model_serializer(mode="wrap")
    def _plain(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in handler(self).items() if key != "statistics" or value}

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


class Slice(Strict):
    """A run of layers with parameters, and perhaps a base, of its own, as in mergekit's `slices`."""

    sources: tuple[Source, ...] = Field(min_length=1)
    base_model: Name | None = None
    parameters: Parameters = {}

    @model_serializer(mode="wrap")
    def _plain(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in handler(self).items() if key != "base_model" or value}

    @property
    def layers(self) -> tuple[int, int]:
        """The first layer, and the one after the last."""
        return self.sources[0].layer_range


class Module(Strict):
    """A part of a model, such as its vision tower, with models or slices of its own, as in mergekit's `modules`."""

    models: tuple[ModelEntry, ...] | None = None
    slices: tuple[Slice, ...] | None = Field(default=None, min_length=1)
    parameters: Parameters = {}

    @model_serializer(mode="wrap")
    def _plain(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in handler(self).items() if value is not None}


class Sparsify(Strict):
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


class MixupSettings(Strict):
    """M³: the weights are drawn from Beta(α, α), or Dirichlet(α, …, α) for more than two experts.

    `weights` has the outcome of earlier draws, by group ("model", the blocks, or the tensors), which is then used.

    References:
      Zhou et al., Mixup Model Merge, 2025, arXiv 2502.15434.
    """

    alpha: Annotated[float | tuple[float, float], PlainValidator(read_alpha), PlainSerializer(plain, return_type=Any)]
    granularity: Literal["model", "layer", "tensor"] = "model"
    smooth: Annotated[float, PlainValidator(read_smooth)] = 0.0
    weights: dict[str, tuple[FiniteFloat, ...]] | None = None

    @model_serializer(mode="wrap")
    def _without_what_is_not_given(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in serialize(self).items() if key not in ("smooth", "weights") or value}


class AnatomySettings(Strict):
    """What tensors are, where their names do not say it; patterns are searched in stored names."""

    blocks: Regex | None = None
    stacked: dict[str, StrictInt] = {}
    kinds: dict[str, Literal["parameter", "buffer", "statistics", "optimizer", "step", "random"]] = {}
    tied: bool | None = None
