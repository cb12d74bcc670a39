"""Stand-ins of the paper's four models: their names, files, dtype and vocabularies, with few layers and small widths.

They have random weights and say nothing of what the models can do; they are for trying the paper's recipes end to end.
"""

import json
from itertools import product
from pathlib import Path
from string import ascii_lowercase, digits, punctuation
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, processors

from support.decoders import shapes
from support.torch_files import write_shards

BASE = "meta-llama/Llama-2-13b-hf"
EXPERTS = {
    "lm": "WizardLMTeam/WizardLM-13B-V1.2",
    "math": "WizardLMTeam/WizardMath-13B-V1.0",
    "code": "layoric/llama-2-13b-code-alpaca",
}
ROWS = {BASE: 32000, **dict.fromkeys(EXPERTS.values(), 32000), EXPERTS["math"]: 32001}
"""Of the embeddings; the last one of WizardMath is a padding token."""

_SPACE = "▁"
_PAD = "[PAD]"
_STEP = 2.0**-8  # by which experts differ from the base


def write_stand_ins(directory: Path, layers: int = 2, width: int = 64, shards: int = 3) -> None:
    """The base and the experts, each below its hub id.

    Args:
        directory: Where recipes are to look for them.
        layers: Blocks of each.
        width: Of the residual stream; a multiple of 16.
        shards: Files of each.
    """
    for seed, (name, rows) in enumerate(ROWS.items()):
        place = directory / name
        place.mkdir(parents=True)
        config = _config(rows, layers, width)
        write_shards(place, _weights(config, seed), shards)
        _write_json(place / "config.json", config)
        _write_json(place / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2})
        _write_tokenizer(place, padded=rows > ROWS[BASE])


def _config(rows: int, layers: int, width: int) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": rows,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float16",
    }


def _weights(config: dict[str, Any], seed: int) -> dict[str, np.ndarray]:
    """The base's weights and, for an expert, what it learned; with the buffers that checkpoints of 2023 have."""
    source, learned = np.random.default_rng(0), np.random.default_rng(seed)
    found = {}
    for name, shape in shapes(config | {"vocab_size": max(ROWS.values())}).items():
        value = 0.05 * source.standard_normal(shape, np.float32) + ("norm" in name)
        if seed:
            value += _STEP * learned.standard_normal(shape, np.float32)
        rows = config["vocab_size"] if shape[0] == max(ROWS.values()) else shape[0]
        found[name] = value[:rows].astype(np.float16)
    half = np.arange(config["hidden_size"] // config["num_attention_heads"] // 2, dtype=np.float32)
    for layer in range(config["num_hidden_layers"]):
        found[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = 10000 ** (-half / len(half))
    return found


def _write_json(path: Path, entries: dict[str, Any]) -> None:
    path.write_text(json.dumps(entries, indent=2))


# --- Tokenizers -------------------------------------------------------------------------------------------------


def _pieces(count: int) -> tuple[list[str], list[tuple[str, str]]]:
    """So many pieces of text, and the pairs that the longer ones are merged of, in the order of their ranks."""
    singles = [_SPACE, *ascii_lowercase, *ascii_lowercase.upper(), *digits, *punctuation]
    pairs = [*product(ascii_lowercase, repeat=2), *product([_SPACE], ascii_lowercase)]
    triples = [(f"{a}{b}", c) for (a, b), c in product(pairs, ascii_lowercase)]
    longer = [(f"{a}{b}", c) for (a, b), c in product(triples, ascii_lowercase)]
    merges = [*pairs, *triples, *longer][: count - len(singles)]
    return [*singles, *(f"{a}{b}" for a, b in merges)], merges


def _write_tokenizer(place: Path, padded: bool) -> None:
    """A tokenizer as Llama 2's: byte-pair encoding as SentencePiece has it, falling back on bytes."""
    special = ["<unk>", "<s>", "</s>"]
    whole = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces, merges = _pieces(ROWS[BASE] - len(special) - len(whole))
    vocabulary = {piece: number for number, piece in enumerate([*special, *whole, *pieces])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)])
    ends = [decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), *ends])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])
    tokenizer.add_special_tokens([*special, *([_PAD] if padded else [])])
    tokenizer.save(str(place / "tokenizer.json"))
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", **({"pad_token": _PAD} if padded else {})}
    _write_json(place / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **names})
    _write_json(place / "special_tokens_map.json", names)
