"""The recipe as a JSON schema, by which editors complete and check what is typed. Rows of the catalogue say it all."""

from collections.abc import Mapping
from typing import Any

from m3jax.methods import catalogue
from m3jax.methods.rows import MethodRow, Parameter, SparsifierRow
from m3jax.methods.schedules import SHAPES
from m3jax.recipe.chat_templates import AUTO, BUILT_IN
from m3jax.recipe.entries import AnatomySettings, MixupSettings, ModelEntry, Module, Slice, Source, Strict
from m3jax.recipe.schema import Recipe
from m3jax.recipe.settings import mergekits, parameters_of

Schema = dict[str, Any]
_TEXT: Schema = {"type": "string"}
_DTYPE: Schema = {"enum": ["bfloat16", "float16", "float32", "bf16", "fp16", "fp32", "half", "float", None]}
_REGEX: Schema = {"type": "string", "format": "regex"}
_REGEXES: Schema = {"type": "array", "items": _REGEX}
_SEED: Schema = {"type": "integer", "minimum": 0}
_RANGE: Schema = {**_TEXT, "pattern": r"\d", "description": "0..31, or 0..7, 12"}
_DECAYING: Schema = {
    "type": "object",
    "properties": {
        "method": {"enum": ["uniform", "ema", "wsm"]},
        "decay": {"anyOf": [{"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}, {"enum": [*SHAPES]}]},
    },
    "required": ["method"],
    "additionalProperties": False,
}
_SCHEDULE: Schema = {"anyOf": [{"enum": ["uniform", "wsm"]}, _DECAYING]}

_HELP: Mapping[str, str] = {
    "name": "The output's title; of a document that others start from, what they call it.",
    "merge_method": "How the models are merged.",
    "base_model": "The model that task vectors are differences from: a path, a hub id, or id@revision.",
    "models": "The models that are merged.",
    "slices": "Runs of layers, one after the other, each from models of its own.",
    "modules": "Parts of the models, such as text_decoder and vision_tower, each with models or slices.",
    "sparsify": "What is dropped of each expert before they are combined.",
    "mixup": "M³: weights are drawn from Beta(α, α), or Dirichlet(α, …, α), not given.",
    "parameters": "Of the method.",
    "seed": "Of all that is random.",
    "seeds": "Several seeds, 0..31 or a list: as many merges, OUT/seed-00 and so on.",
    "dtype": "That is written, unless out_dtype says another.",
    "out_dtype": "That is written.",
    "dequantize": "Merge float8 weights as the numbers that they stand for.",
    "tokenizer_source": "union, base, or one of the models.",
    "tokenizer": "Where the output's tokenizer comes from, and where rows of single tokens do.",
    "also_for": "Models beside whose own tokenizers the same weights are to stand too.",
    "chat_template": "auto, a built-in name, or Jinja text.",
    "exclude": "Regular expressions of tensors that are copied from the base, or the first model.",
    "only": "The collections that are merged, such as params.",
    "keep_state": "What becomes of optimizer states.",
    "format": "In which the weights are written; that of the base, or else the first model, if it says nothing.",
    "schedule": "How the steps of a run, RUN@last:5, share the weight of their entry.",
    "anatomy": "What tensors are, where their names do not say it.",
    "intermediates": "Recipes with names, by which the others take what they give.",
}


def recipe_schema() -> Schema:
    """The JSON schema (2020-12) of recipes, of all methods that there are here."""
    rows = [row for row in catalogue.rows() if isinstance(row, MethodRow)]
    known = _properties(rows)
    fields = {
        name: {**known[name], "description": _HELP[name], **_default(Recipe, name)} for name in Recipe.model_fields
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Recipe of m3jax",
        "type": "object",
        "properties": fields,
        "additionalProperties": False,
        "required": ["merge_method"],
        "oneOf": [{"required": [key]} for key in ("models", "slices", "modules")],
        "allOf": [_of_method(row) for row in rows],
        "$defs": _definitions(rows),
    }


def _properties(rows: list[MethodRow]) -> Schema:
    return {
        "name": _or_null(_TEXT),
        "merge_method": {"oneOf": [{"const": row.name, "description": row.summary} for row in rows]},
        "base_model": _or_null(_TEXT),
        "models": {"type": "array", "items": {"$ref": "#/$defs/model"}},
        "slices": {"type": "array", "minItems": 1, "items": {"$ref": "#/$defs/slice"}},
        "modules": {"type": "object", "additionalProperties": {"$ref": "#/$defs/module"}},
        "sparsify": {"anyOf": [_sparsifier(row) for row in catalogue.SPARSIFIERS] + [{"type": "null"}]},
        "mixup": _or_null({"$ref": "#/$defs/mixup"}),
        "parameters": {"$ref": "#/$defs/parameters"},
        "seed": _SEED,
        "seeds": _or_null({"anyOf": [_RANGE, {"type": "array", "minItems": 1, "items": {"anyOf": [_SEED, _RANGE]}}]}),
        "dtype": _DTYPE,
        "out_dtype": _DTYPE,
        "dequantize": {"type": "boolean"},
        "tokenizer_source": _or_null(_TEXT),
        "tokenizer": _or_null({"$ref": "#/$defs/tokenizer"}),
        "chat_template": {"anyOf": [{"enum": [AUTO, *BUILT_IN, None]}, _TEXT]},
        "exclude": _REGEXES,
        "also_for": {"anyOf": [_TEXT, {"type": "array", "items": _TEXT}]},
        "only": {"anyOf": [_TEXT, {"type": "array", "items": _TEXT}]},
        "keep_state": {"enum": ["first", None]},
        "format": {"enum": ["safetensors", "orbax", None]},
        "schedule": _or_null(_SCHEDULE),
        "anatomy": _or_null({"$ref": "#/$defs/anatomy"}),
        "intermediates": {"type": "array", "items": {"$ref": "#"}},
    }


def _definitions(rows: list[MethodRow]) -> Schema:
    everything = {p.name: _of_parameter(p) for row in reversed(rows) for p in row.parameters}
    parameters = {"$ref": "#/$defs/parameters"}
    slices = {"type": "array", "minItems": 1, "items": {"$ref": "#/$defs/slice"}}
    entry: Schema = {
        "model": {**_TEXT, "description": "A path, a hub id (id@revision), a URL, a run, or base+adapter."},
        "statistics": {**_TEXT, "description": "What m3jax statistics has measured of the model: fisher, regmean."},
        "parameters": {**parameters, "description": "Of this model alone."},
    }
    layers = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 2, "maxItems": 2}
    source = {**entry, "layer_range": {**layers, "description": "The first layer, and the one after the last."}}
    run_of_layers: Schema = {
        "sources": {
            "type": "array",
            "minItems": 1,
            "items": {"$ref": "#/$defs/source"},
            "description": "The models whose layers are merged, as many of each.",
        },
        "base_model": {**_or_null(_TEXT), "description": "The base of these layers alone."},
        "parameters": {**parameters, "description": "Of these layers alone."},
    }
    part: Schema = {
        "models": {"type": "array", "items": {"$ref": "#/$defs/model"}, "description": "Whole parts are merged."},
        "slices": {**slices, "description": "Or runs of their layers."},
        "parameters": {**parameters, "description": "Of this part alone."},
    }
    return {
        "number": {"anyOf": [{"type": "number"}, {**_TEXT, "description": "1e-3, linear(0, 1), cosine(0, 1)"}]},
        "filter": {
            "type": "object",
            "properties": {
                "filter": {**_or_null(_TEXT), "description": "A part of the tensor's name; without it, every tensor."},
                "value": {"$ref": "#/$defs/setting", "description": "Theirs."},
            },
            "required": ["value"],
            "additionalProperties": False,
        },
        "setting": {
            "anyOf": [
                {"$ref": "#/$defs/number"},
                {"$ref": "#/$defs/filter"},
                {"type": "array", "minItems": 1, "items": {"$ref": "#/$defs/number"}},
                {"type": "array", "minItems": 1, "items": {"$ref": "#/$defs/filter"}},
            ]
        },
        "parameters": _or_null({"type": "object", "properties": everything}),
        "model": {"anyOf": [_TEXT, _object(ModelEntry, entry, "model")]},
        "source": _object(Source, source, "model", "layer_range"),
        "slice": _object(Slice, run_of_layers, "sources"),
        "module": _object(Module, part),
        "mixup": _object(MixupSettings, _mixup(), "alpha"),
        "anatomy": _object(AnatomySettings, _anatomy()),
        "tokenizer": _tokenizer(),
    }


def _mixup() -> Schema:
    shape: Schema = {"$ref": "#/$defs/number"}
    return {
        "alpha": {
            "anyOf": [shape, {"type": "array", "items": shape, "minItems": 2, "maxItems": 2}],
            "description": "α of Beta(α, α) or Dirichlet(α, …, α); or the two shapes of a Beta.",
        },
        "granularity": {
            "enum": ["model", "layer", "tensor"],
            "description": "One draw for the model, for each layer, or for each tensor.",
        },
        "smooth": {
            "type": "number",
            "minimum": 0,
            "exclusiveMaximum": 1,
            "description": "With granularity layer: how much layers share with their neighbours.",
        },
        "weights": {
            **_or_null({"type": "object", "additionalProperties": {"type": "array", "items": {"type": "number"}}}),
            "description": "What was drawn before, by group, as a manifest has it: then nothing is drawn.",
        },
    }


def _anatomy() -> Schema:
    kinds = ["parameter", "buffer", "statistics", "optimizer", "step", "random"]
    return {
        "blocks": {**_or_null(_REGEX), "description": "Finds a block in a tensor's name; group 1 is its number."},
        "stacked": {
            "type": "object",
            "additionalProperties": {"type": "integer"},
            "description": "By regular expression of names, the axis along which tensors stack blocks; -1: none.",
        },
        "kinds": {
            "type": "object",
            "additionalProperties": {"enum": kinds},
            "description": "By regular expression of names, what tensors are.",
        },
        "tied": {
            **_or_null({"type": "boolean"}),
            "description": "Whether the output embedding is the input embedding.",
        },
    }


def _tokenizer() -> Schema:
    model = {**_TEXT, "description": "A model."}
    zero = {"type": "object", "properties": {"kind": {"const": "zero"}}, "required": ["kind"]}
    other: Schema = {"kind": {"const": "model_token"}, "model": model, "token": _TEXT, "token_id": _SEED}
    row = {"anyOf": [model, zero, {"type": "object", "properties": other, "required": ["model"]}]}
    force = {"type": "boolean", "default": False, "description": "In models that have the token too."}
    described = {**row, "description": "A model whose row it is, {kind: zero}, or {kind: model_token, model, token}."}
    token: Schema = {"type": "object", "properties": {"source": described, "force": force}, "required": ["source"]}
    properties = {
        "source": {**_or_null(_TEXT), "description": "As tokenizer_source."},
        "tokens": {
            **_or_null({"type": "object", "additionalProperties": {**token, "additionalProperties": False}}),
            "description": "By token, whose row it has in models that lack it.",
        },
        "pad_to_multiple_of": {
            **_or_null({"type": "integer", "minimum": 1}),
            "description": "What the number of rows is to be a multiple of.",
        },
    }
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _object(kind: type[Strict], known: Schema, *required: str) -> Schema:
    properties = {name: {**known[name], **_default(kind, name)} for name in kind.model_fields}
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


def _default(kind: type[Strict], name: str) -> Schema:
    """What a key is where it is not given, if that can be said in a word."""
    value = kind.model_fields[name].default
    return {"default": value} if isinstance(value, str | int | float) else {}


def _of_parameter(parameter: Parameter) -> Schema:
    told: Schema = {"description": parameter.help}
    if parameter.default is not None:
        told["default"] = parameter.default
    if parameter.kind == "flag":
        return {**told, "enum": [True, False, 0, 1, 0.0, 1.0]}
    if parameter.kind == "choice":
        return {**told, "enum": list(parameter.choices)}
    return {**told, "$ref": "#/$defs/setting" if parameter.level != "merge" else "#/$defs/number"}


def _of_method(row: MethodRow) -> Schema:
    """What follows from the method: its own parameters, and those of mergekit's that it lets be."""
    own = {name: _of_parameter(parameter) for name, parameter in parameters_of(row).items()}
    others = {p.name: True for each in catalogue.METHODS for p in each.parameters if mergekits(p.name)}
    named: Schema = {"type": "object", "properties": {**others, **own}, "additionalProperties": False}
    then: Schema = {"properties": {"parameters": _or_null(named)}}
    return {"if": {"properties": {"merge_method": {"const": row.name}}, "required": ["merge_method"]}, "then": then}


def _sparsifier(row: SparsifierRow) -> Schema:
    needed = [parameter.name for parameter in row.parameters if parameter.default is None]
    own = {parameter.name: _of_parameter(parameter) for parameter in row.parameters}
    target = {"enum": ["delta", "weights"], "default": "delta", "description": "What entries are dropped of."}
    properties = {"method": {"const": row.name}, "target": target, **own}
    return {
        "type": "object",
        "description": row.summary,
        "properties": properties,
        "required": ["method", *needed],
        "additionalProperties": False,
    }
