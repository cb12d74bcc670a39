"""What a decoder is, read from a model's config.json."""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from m3jax.errors import M3Error


class Rope(NamedTuple):
    """Rotary position embedding: its base, and how its frequencies are stretched for longer contexts.

    Attributes:
        theta: Base of the geometric series of frequencies.
        factor: Divisor of the stretched frequencies; 1 stretches none.
        low_freq_factor: Llama 3: wavelengths over `original_context / low_freq_factor` are stretched in full.
        high_freq_factor: Llama 3: wavelengths under `original_context / high_freq_factor` are left alone;
            0 stretches all alike (linear scaling).
        original_context: Llama 3: positions that the model was trained on before stretching.
    """

    theta: float = 10000.0
    factor: float = 1.0
    low_freq_factor: float = 0.0
    high_freq_factor: float = 0.0
    original_context: int = 0


_PLAIN = Rope()


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Everything that tells one decoder from another; hashable, so that compiled functions are keyed by it.

    Attributes:
        architecture: Name of the model class, such as `LlamaForCausalLM`.
        vocab_size: Rows of the embedding.
        hidden_size: Width of the residual stream.
        intermediate_size: Width of the feed-forward layer.
        num_layers: Transformer blocks.
        num_heads: Query heads.
        num_kv_heads: Key and value heads; each serves `num_heads / num_kv_heads` query heads.
        head_dim: Width of a head.
        context_length: Positions that the model can see.
        windows: Per block, how many positions a query sees, itself included; `None` is all before it.
        rope: Rotary position embedding.
        norm_eps: Added to the mean square inside a norm's root.
        norm_offset: Added to a norm's weight (1 in Gemma).
        activation: Of the feed-forward gate, a key of `modeling.ACTIVATIONS`.
        tie_embeddings: Whether the output layer is the embedding.
        qkv_bias: Whether query, key and value projections have a bias.
        output_bias: Whether the attention's output projection has one.
        mlp_bias: Whether the feed-forward projections have one.
        qk_norm: Whether each head's query and key are normalised.
        sandwich_norms: Whether attention and feed-forward are normalised behind as well as before (Gemma 2).
        embedding_scale: Factor on embeddings.
        query_scale: Factor on attention scores.
        attention_softcap: Bound c of attention scores, c·tanh(s/c); `None` is no bound.
        logit_softcap: The same of logits.
        stop_token_ids: Tokens that end a text.
        dtype: What the weights were trained in: `float32`, `bfloat16` or `float16`.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    context_length: int
    windows: tuple[int | None, ...]
    query_scale: float
    rope: Rope = _PLAIN
    norm_eps: float = 1e-6
    norm_offset: float = 0.0
    activation: str = "silu"
    tie_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sandwich_norms: bool = False
    embedding_scale: float = 1.0
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    stop_token_ids: tuple[int, ...] = ()
    dtype: str = "float32"

    @classmethod
    def from_dict(cls, entries: Mapping[str, Any], where: str = "config.json") -> "DecoderConfig":
        """Reads the parsed config.json of a Hugging Face model, of transformers 4 or 5.

        Args:
            entries: The parsed file.
            where: What to call it in errors.

        Raises:
            M3Error: The architecture or a feature of it is unknown here, or a value is missing or impossible.

        Example:
            >>> sizes = dict(vocab_size=8, hidden_size=4, intermediate_size=8)
            >>> counts = dict(num_hidden_layers=1, num_attention_heads=2)
            >>> DecoderConfig.from_dict({"model_type": "llama", **sizes, **counts}).head_dim
            2
        """
        return _from_dict(_Entries(entries, where))

    @classmethod
    def from_directory(cls, directory: str | os.PathLike[str]) -> "DecoderConfig":
        """Reads config.json of a model directory, and the stop tokens of its generation_config.json.

        Args:
            directory: The model directory.

        Raises:
            M3Error: The file is absent or damaged, or says what `from_dict` does not know.
        """
        path = Path(directory) / "config.json"
        config = cls.from_dict(_read_json(path), str(path))
        generation = path.with_name("generation_config.json")
        if not generation.is_file():
            return config
        stops = _token_ids(_Entries(_read_json(generation), str(generation)))
        return dataclasses.replace(config, stop_token_ids=tuple(sorted({*config.stop_token_ids, *stops})))


def _read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file."""
    try:
        entries = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise M3Error(f"{path} does not exist: give a model directory that has one.") from error
    except OSError as error:
        raise M3Error(f"{path} cannot be read: {error.strerror}; check the path and its mode.") from error
    except ValueError as error:
        raise M3Error(f"{path} is not valid JSON: get the file again from its source.") from error
    if not isinstance(entries, dict):
        raise M3Error(f"{path} is not a JSON object: get the file again from its source.")
    return entries


class _Entries(NamedTuple):
    """The entries of a configuration file, read with checks."""

    entries: Mapping[str, Any]
    where: str

    def get(self, key: str, default: Any = None) -> Any:
        """The entry, where `null` counts as absent."""
        value = self.entries.get(key)
        return default if value is None else value

    def count(self, key: str, default: int | None = None) -> int:
        """A positive whole number."""
        value = self.get(key, default)
        if type(value) is not int or value < 1:
            raise self.error(f"has {key}: {value!r}, not a positive whole number", "get the file from its source")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number."""
        value = self.get(key, default)
        if type(value) not in (int, float) or not 0 < value < float("inf"):
            raise self.error(f"has {key}: {value!r}, not a positive number", "get the file from its source")
        return float(value)

    def error(self, fault: str, mend: str) -> M3Error:
        """The sentence for a fault of this file."""
        return M3Error(f"{self.where} {fault}: {mend}.")


def _llama(entries: _Entries) -> dict[str, Any]:
    bias = bool(entries.get("attention_bias", False))
    return {"qkv_bias": bias, "output_bias": bias, "mlp_bias": bool(entries.get("mlp_bias", False))}


def _mistral(entries: _Entries) -> dict[str, Any]:
    # An explicit null is no window, an absent entry the 4,096 of the first Mistral.
    window = entries.entries.get("sliding_window", 4096)
    return {"windows": (window and entries.count("sliding_window", 4096),) * entries.count("num_hidden_layers")}


def _qwen2(entries: _Entries) -> dict[str, Any]:
    return {"qkv_bias": True, "windows": _qwen_windows(entries)}


def _qwen3(entries: _Entries) -> dict[str, Any]:
    bias = bool(entries.get("attention_bias", False))
    return {"qkv_bias": bias, "output_bias": bias, "qk_norm": True, "windows": _qwen_windows(entries)}


def _qwen_windows(entries: _Entries) -> tuple[int | None, ...]:
    """The last blocks have a window, if any has."""
    layers = entries.count("num_hidden_layers")
    if not entries.get("use_sliding_window", False):
        return (None,) * layers
    first = entries.get("max_window_layers", 28)
    return _windows(entries, ["full_attention" if i < first else "sliding_attention" for i in range(layers)])


def _gemma2(entries: _Entries) -> dict[str, Any]:
    bias = bool(entries.get("attention_bias", False))
    kinds = [("sliding_attention", "full_attention")[i % 2] for i in range(entries.count("num_hidden_layers"))]
    softcaps = {"attention_softcap": "attn_logit_softcapping", "logit_softcap": "final_logit_softcapping"}
    return {
        "qkv_bias": bias,
        "output_bias": bias,
        "windows": _windows(entries, kinds),
        "norm_offset": 1.0,
        "sandwich_norms": True,
        "embedding_scale": entries.count("hidden_size") ** 0.5,
        "query_scale": entries.number("query_pre_attn_scalar", 256) ** -0.5,
        "activation": entries.get("hidden_activation", "gelu_pytorch_tanh"),
        "tie_embeddings": bool(entries.get("tie_word_embeddings", True)),
        **{ours: None if entries.get(theirs) is None else entries.number(theirs) for ours, theirs in softcaps.items()},
    }


def _windows(entries: _Entries, kinds: list[str]) -> tuple[int | None, ...]:
    """The window of each block, by `layer_types` if the file has it, or else by the architecture's rule."""
    kinds = entries.get("layer_types", kinds)
    window = entries.count("sliding_window", 4096)
    known: dict[str, int | None] = {"sliding_attention": window, "full_attention": None}
    unknown = sorted({str(kind) for kind in kinds} - set(known))
    if unknown or len(kinds) != entries.count("num_hidden_layers"):
        fault = f"has the layer type {unknown[0]!r}" if unknown else f"has {len(kinds)} layer_types"
        raise entries.error(fault, f"give one of {', '.join(known)} for each block")
    return tuple(known[kind] for kind in kinds)


_Reader = Callable[[_Entries], dict[str, Any]]
_ARCHITECTURES: Mapping[str, tuple[str, _Reader, int | None]] = MappingProxyType(
    {
        # model_type: (class, what sets it apart, key-value heads where the file does not say)
        "llama": ("LlamaForCausalLM", _llama, None),
        "mistral": ("MistralForCausalLM", _mistral, 8),
        "qwen2": ("Qwen2ForCausalLM", _qwen2, None),
        "qwen3": ("Qwen3ForCausalLM", _qwen3, None),
        "gemma2": ("Gemma2ForCausalLM", _gemma2, 4),
    }
)
_ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh")
_DTYPES = ("float32", "bfloat16", "float16")


def _from_dict(entries: _Entries) -> DecoderConfig:
    """The configuration of one of the known architectures."""
    name, read, kv_heads = _architecture(entries)
    if entries.get("quantization_config") is not None:
        raise entries.error("is of a quantized model", "dequantize it first")
    layers, heads = entries.count("num_hidden_layers"), entries.count("num_attention_heads")
    head_dim = entries.count("head_dim", entries.count("hidden_size") // heads)
    dtype = str(entries.get("dtype", entries.get("torch_dtype", "float32"))).removeprefix("torch.")
    config = DecoderConfig(
        **{
            "architecture": name,
            "vocab_size": entries.count("vocab_size"),
            "hidden_size": entries.count("hidden_size"),
            "intermediate_size": entries.count("intermediate_size"),
            "num_layers": layers,
            "num_heads": heads,
            "num_kv_heads": entries.count("num_key_value_heads", kv_heads or heads),
            "head_dim": head_dim,
            "context_length": entries.count("max_position_embeddings", 2048),
            "windows": (None,) * layers,
            "rope": _rope(entries),
            "query_scale": head_dim**-0.5,
            "norm_eps": entries.number("rms_norm_eps", 1e-6),
            "activation": entries.get("hidden_act", "silu"),
            "tie_embeddings": bool(entries.get("tie_word_embeddings", False)),
            "stop_token_ids": _token_ids(entries),
            "dtype": dtype,
        }
        | read(entries)
    )
    _check(config, entries)
    return config


def _architecture(entries: _Entries) -> tuple[str, _Reader, int | None]:
    """The row of the table that a file asks for."""
    kind, classes = entries.get("model_type"), entries.get("architectures", [])
    row = _ARCHITECTURES.get(str(kind))
    if row is None or (classes and row[0] not in classes):
        found = ", ".join(map(str, classes)) or kind or "no architecture"
        known = ", ".join(sorted(row[0] for row in _ARCHITECTURES.values()))
        raise entries.error(
            f"names {found}, which the decoder does not know",
            f"it runs {known}; a model of another kind can be evaluated in Python, with m3jax.evaluate(…, apply_fn=…)",
        )
    return row


def _check(config: DecoderConfig, entries: _Entries) -> None:
    """Checks what no single entry shows."""
    if config.num_heads % config.num_kv_heads:
        fault = f"has {config.num_heads} heads for {config.num_kv_heads} key-value heads"
        raise entries.error(fault, "the first must be a multiple of the second")
    if config.head_dim % 2:
        raise entries.error(f"has the odd head_dim {config.head_dim}", "rotary embeddings need an even one")
    for what, value, known in (("activation", config.activation, _ACTIVATIONS), ("dtype", config.dtype, _DTYPES)):
        if value not in known:
            raise entries.error(f"has the unknown {what} {value!r}", f"the decoder knows {', '.join(known)}")


def _rope(entries: _Entries) -> Rope:
    """Rotary embedding, in the spelling of transformers 5 (`rope_parameters`) or 4 (`rope_scaling`)."""
    stated = entries.get("rope_parameters", entries.get("rope_scaling", {}))
    if not isinstance(stated, dict):
        raise entries.error(f"has rope parameters {stated!r}, not an object", "get the file from its source")
    rope = _Entries(stated, entries.where)
    theta = rope.number("rope_theta", entries.number("rope_theta", 10000.0))
    share = rope.number("partial_rotary_factor", entries.number("partial_rotary_factor", 1.0))
    if share != 1.0:
        raise entries.error(f"rotates {share:g} of each head", "the decoder rotates whole heads only")
    match rope.get("rope_type", rope.get("type", "default")):
        case "default":
            return Rope(theta)
        case "linear":
            return Rope(theta, rope.number("factor"))
        case "llama3":
            low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
            if not low < high:
                raise entries.error("has low_freq_factor not below high_freq_factor", "swap them")
            return Rope(theta, rope.number("factor"), low, high, rope.count("original_max_position_embeddings"))
        case kind:
            raise entries.error(f"asks for {kind!r} RoPE scaling", "the decoder knows default, linear and llama3")


def _token_ids(entries: _Entries) -> tuple[int, ...]:
    """The end-of-text tokens: one, several or none."""
    stated = entries.get("eos_token_id", [])
    ids = stated if isinstance(stated, list) else [stated]
    if not all(type(token) is int and token >= 0 for token in ids):
        raise entries.error(f"has eos_token_id {stated!r}, not a token id", "get the file from its source")
    return tuple(ids)
