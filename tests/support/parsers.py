"""Every reader of files that others may have written: a good file each, and mutations of it."""

import copy
import json
import os
import random
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import save_file

import m3jax
from m3jax import documents
from m3jax.anatomy import anatomy_of
from m3jax.checkpoints import TensorInfo, inspection, open_msgpack, open_pytorch, open_safetensors, write_msgpack
from m3jax.checkpoints.adapters import open_model
from m3jax.checkpoints.locate import locate_model, read_config
from m3jax.decoder import DecoderConfig
from m3jax.evaluation import get_task, load_rows, report
from m3jax.evaluation.attacks.words import read_embeddings
from m3jax.evaluation.chats import _check_numbers
from m3jax.evaluation.records import Record, open_journal
from m3jax.exploration.journal import SampleJournal
from m3jax.ledger import Ledger
from m3jax.outputs import copies, manifest, provenance
from m3jax.recipe import load_recipe
from m3jax.vocabulary import plan_rows, read_speakers, read_vocabulary, unite, united_files
from m3jax.vocabulary.pieces import CONTROL, ScoredPiece, with_pieces
from support import torch_files
from support.adapters import factors
from support.alignment import tokenizer
from support.directories import write

TENSORS = {"model.embed_tokens.weight": np.ones((8, 4), np.float32), "model.layers.0.w": np.float16([1, 2])}
INFOS = {name: TensorInfo(name, value.shape, "F32") for name, value in TENSORS.items()}


class Parser(NamedTuple):
    """A reader.

    Attributes:
        file: The name that its file has.
        good: What such a file holds.
        read: Reads the file in a directory.
        is_json: Whether the file is JSON, whose values can be replaced.
    """

    file: str
    good: Callable[[], bytes]
    read: Callable[[Path], object]
    is_json: bool = True


def _dumped(told: Any) -> Callable[[], bytes]:
    return lambda: json.dumps(told).encode()


@cache
def _merged() -> Path:
    place = Path(tempfile.mkdtemp())
    models = [str(write(place / name, TENSORS)) for name in ("a", "b")]
    asked = {"merge_method": "linear", "models": models, "mixup": {"alpha": 0.5}}
    return m3jax.merge_checkpoint(asked, place / "out").directory


def _msgpack() -> bytes:
    with tempfile.TemporaryDirectory() as place, open_safetensors(_merged()) as checkpoint:
        write_msgpack(Path(place), checkpoint, 10**9)
        return next(Path(place).glob("*.msgpack")).read_bytes()


@cache
def _pytorch() -> bytes:
    with tempfile.TemporaryDirectory() as place:
        return torch_files.write_arrays(Path(place) / "x", TENSORS, strided=True).read_bytes()


@cache
def _pickle() -> bytes:
    with tempfile.TemporaryDirectory() as place:
        opened = zipfile.ZipFile(torch_files.write_arrays(Path(place) / "x", TENSORS, strided=True))
        return opened.read("archive/data.pkl")


def _pickled(place: Path) -> None:
    """A pickle in a sound archive with storages of the sizes that the good one has."""
    raw = (place / "data.pkl").read_bytes()
    storages = [torch_files.Entry("data/0", bytes(268)), torch_files.Entry("data/1", bytes(14))]
    torch_files.write_archive(place / "x.bin", [torch_files.Entry("data.pkl", raw), *storages])
    _tensors(open_pytorch(place / "x.bin"))


def _tensors(opened: Any) -> None:
    with opened as checkpoint:
        for name, info in checkpoint.tensors.items():
            checkpoint.read_into(name, 0, memoryview(bytearray(info.nbytes)))


def _adapter(place: Path) -> None:
    """An adapter's configuration, beside factors that fit the good one."""
    save_file(factors({"model.layers.0.q": (4, 3)}, 2, 0), place / "adapter_model.safetensors")
    base = place / "base"
    if not base.exists():
        write(base, {"model.layers.0.q.weight": np.ones((4, 3), np.float32)})
    _tensors(open_model(locate_model(f"{base}+{place}")))


def _config(place: Path) -> None:
    anatomy_of(INFOS, read_config(place))
    shutil.copyfile(_merged() / "model.safetensors", place / "model.safetensors")
    inspection.look_at(os.fspath(place))


def _decoder(place: Path) -> None:
    DecoderConfig.from_directory(place)


def _examples(task: str) -> Callable[[Path], object]:
    return lambda place: get_task(task).read(load_rows(place / f"{task}.jsonl"))


def _reported(place: Path) -> None:
    list(report.table_lines(report.collect([place])))


def _records(place: Path) -> None:
    (place / "run.json").write_text('{"weights": ""}')
    open_journal(place, {}, True, lambda: "", Record)


def _ledger(place: Path) -> None:
    Ledger(place / "journal.jsonl", {"a": 1}, "experiment", "with --out DIR").__exit__(None, None, None)


def _samples(place: Path) -> None:
    line = (place / "samples.json").read_bytes()
    (place / "journal.jsonl").write_bytes(b'{"a": 1}\n' + line.replace(b"\n", b" ") + b"\n")
    SampleJournal(place, {"a": 1}).__exit__(None, None, None)


def _template(place: Path) -> None:
    _check_numbers((place / "chat_template.jinja").read_text(errors="surrogateescape"))


def _pattern(place: Path) -> None:
    try:
        documents.Pattern((place / "pattern.txt").read_text(errors="replace")).search("model.layers.0.w")
    except ValueError as error:
        raise m3jax.M3Error(str(error)) from None


_RECIPE = b"""merge_method: dare_ties
base_model: base
models:
- model: a
  parameters: {weight: 1, density: [{filter: mlp, value: 0.5}, {value: [0.1, 0.9]}]}
- &b {model: b, parameters: {weight: 1e-1}}
parameters: {normalize: true}
exclude: ['.*rotary.*']
seed: 1:30
dtype: bfloat16
"""
_CONFIG = {
    **{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4, "intermediate_size": 8},
    **{"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 8},
    **{"max_position_embeddings": 16, "rms_norm_eps": 1e-6, "rope_theta": 1e4, "hidden_act": "silu"},
    **{"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "tie_word_embeddings": True, "eos_token_id": [1, 2]},
    **{"torch_dtype": "bfloat16", "quantization_config": None},
}
_PARTS = {
    "text_config": _CONFIG,
    "vision_config": {"num_hidden_layers": 1},
    "quantization_config": {"quant_method": "x"},
}
_DROP = {"examples": 1, "clean": 0.8, "attacked": 0.2, "pdr": 0.75, "interval": [0.5, 0.9]}
_SUMMARY = {"model": "m", "task": "sst2", "examples": 1, "accuracy": 0.8, "interval": [0.5, 0.9], "limit": 3}
_ATTACK = {
    **_SUMMARY,
    "profile": "promptbench",
    "prompt": "x",
    "attacks": [{"attack": "deepwordbug", "drop": _DROP, "queries": 1, "prompt": "y"}],
    "shifts": [{"shift": "typos", "drop": _DROP}],
}
_RECORD = Record(0, "a", "p", "c", None, "g", True, False, False, False, False, 3, "", False)
_SAMPLE = {
    **{"sample": 1, "weights": {"model": ["0x1p-1", "0x1p-1"]}, "share": 1.0, "scores": {"sst2": 0.5}},
    **{"seconds": 1.5, "granularity": "model", "optimized": None, "learning": None},
}
_LORA = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 4.0,
    "rank_pattern": {"k": 1},
    "alpha_pattern": {"q": 3},
    "use_rslora": True,
    "init_lora_weights": True,
    "target_modules": ["q"],
}
_TOKENIZER = tokenizer(["<unk>", "a", "b", "ab"])


def _vocabularies(place: Path) -> None:
    other = place / "other.json"
    other.write_text(json.dumps(tokenizer(["<unk>", "b", "a", "[PAD]"])))
    models = [("a", {"tokenizer.json": place / "tokenizer.json"}), ("b", {"tokenizer.json": other})]
    united = unite("union", read_speakers(models), 0)
    united_files(united)
    plan_rows(united, [8, 8], 0, None)


PARSERS: dict[str, Parser] = {
    "recipe": Parser("recipe.yml", lambda: _RECIPE, lambda place: load_recipe(place / "recipe.yml"), False),
    "manifest": Parser("m3jax.json", lambda: (_merged() / "m3jax.json").read_bytes(), manifest.read),
    "manifest, as it is looked at": Parser(
        "m3jax.json", lambda: (_merged() / "m3jax.json").read_bytes(), provenance.method_of
    ),
    "config": Parser("config.json", _dumped({**_CONFIG, **_PARTS}), _config),
    "adapter": Parser("adapter_config.json", _dumped(_LORA), _adapter),
    "decoder": Parser("config.json", _dumped(_CONFIG), _decoder),
    "companion": Parser(
        "tokenizer_config.json",
        _dumped({"chat_template": "x", "auto_map": {"a": []}}),
        lambda place: copies.write_copy(place / "tokenizer_config.json", place / "out", "tokenizer_config.json"),
    ),
    "tokenizer": Parser("tokenizer.json", _dumped(_TOKENIZER), _vocabularies),
    "pieces": Parser(
        "tokenizer.model",
        lambda: with_pieces(b"", [ScoredPiece("<s>", 0.0, CONTROL), ScoredPiece("a", -1.5), ScoredPiece("b", -2.5)]),
        lambda place: read_vocabulary({"tokenizer.model": place / "tokenizer.model"}),
        False,
    ),
    "safetensors": Parser(
        "model.safetensors",
        lambda: (_merged() / "model.safetensors").read_bytes(),
        lambda place: _tensors(open_safetensors(place)),
        False,
    ),
    "index": Parser(
        "model.safetensors.index.json",
        _dumped({"metadata": {"total_size": 1}, "weight_map": {"a": "model-1.safetensors"}}),
        lambda place: _tensors(open_safetensors(place)),
    ),
    "msgpack": Parser("flax_model.msgpack", _msgpack, lambda place: _tensors(open_msgpack(place)), False),
    "pytorch": Parser("pytorch_model.bin", _pytorch, lambda place: _tensors(open_pytorch(place)), False),
    "pytorch's pickle": Parser("data.pkl", _pickle, _pickled, False),
    "sst2": Parser("sst2.jsonl", _dumped({"sentence": "good", "label": 1}), _examples("sst2")),
    "gsm8k": Parser("gsm8k.jsonl", _dumped({"question": "1+1?", "answer": "#### 2"}), _examples("gsm8k")),
    "mbpp": Parser(
        "mbpp.jsonl",
        _dumped({"task_id": 1, "text": "t", "code": "c", "test_list": ["assert f()"], "test_setup_code": ""}),
        _examples("mbpp"),
    ),
    "summary": Parser("summary.json", _dumped(_SUMMARY), _reported),
    "attack": Parser("attack.json", _dumped(_ATTACK), _reported),
    "records": Parser("records.jsonl", lambda: json.dumps(_RECORD._asdict()).encode() + b"\n", _records),
    "ledger": Parser("journal.jsonl", lambda: b'{"a": 1}\n{"b": [1]}\n', _ledger, False),
    "samples": Parser("samples.json", _dumped(_SAMPLE), _samples),
    "embeddings": Parser(
        "vectors.txt",
        lambda: b"2 3\ngood 0.1 0.2 0.3\nbad -1e3 2 .5\n",
        lambda p: read_embeddings(p / "vectors.txt"),
        False,
    ),
    "chat template": Parser("chat_template.jinja", lambda: b"{% if a %}{{ 'x' * 3 }}{% endif %}", _template, False),
    "pattern": Parser("pattern.txt", lambda: rb"^model\.(layers|h)\.(\d{1,3})\.(?=q)", _pattern, False),
}

# --- Mutations ---------------------------------------------------------------------------------------------------

_ODD: tuple[Any, ...] = (
    *(None, True, 0, -1, 1, 2**31, 2**63, 2**64, 10**400, 0.5, -0.0, 1e308, float("inf"), float("nan")),
    *("", "0", "0x1p99999", "\ud800", "\x1b[2J", "../x", "/proc/self/environ", "a" * 5000, "a\0b", "(a+)+$", "1e999"),
    *([], {}, [None], {"": None}, [[]], ["a", "b"], {"a": 1}, [[[[[]]]]], {"model": "x"}),
)
_PIECES = (
    b"\0",
    b"\xff",
    b"{",
    b"}",
    b"[",
    b"]",
    b'"',
    b":",
    b"*a",
    b"&a ",
    b"<<: ",
    b"!!bool ",
    b"9" * 500,
    b"\n",
    b"- ",
)


def mutated_json(source: random.Random, good: bytes) -> bytes:
    """JSON with some values replaced, some keys gone, some keys added."""
    told = json.loads(good)
    for _ in range(source.randint(1, 3)):
        holders = list(_holders(told))
        if not holders:
            break
        holder = source.choice(holders)
        keys: list[Any] = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        key, odd = source.choice(keys), copy.deepcopy(source.choice(_ODD))
        match source.randint(0, 5):
            case 0:
                del holder[key]
            case 1 if isinstance(holder, dict):
                holder[source.choice(["", "a", "\x1b", "\ud800", "a" * 300, "../x"])] = odd
            case _:
                holder[key] = odd
    return json.dumps(told).encode()


def _holders(told: Any) -> Iterator[Any]:
    if isinstance(told, dict | list) and told:
        yield told
        for inner in told.values() if isinstance(told, dict) else told:
            yield from _holders(inner)


def mutated_bytes(source: random.Random, good: bytes) -> bytes:
    """Bytes with bits turned, pieces put in, left out, repeated or moved."""
    blob = bytearray(good)
    for _ in range(source.choice([1, 1, 2, 4, 16])):
        at, to = sorted(source.randrange(len(blob) + 1) for _ in range(2))
        match source.randint(0, 5):
            case 0 if blob:
                blob[min(at, len(blob) - 1)] ^= 1 << source.randrange(8)
            case 1:
                blob[at:at] = source.choice(_PIECES)
            case 2:
                del blob[at : min(to, at + 20)]
            case 3:
                blob[at:at] = blob[at : min(to, at + 40)] * source.choice([1, 2, 50])
            case 4:
                del blob[at:]
            case _:
                blob[at : at + 1] = bytes([source.randrange(256)])
    return bytes(blob)


def mutated(source: random.Random, parser: Parser) -> bytes:
    """A mutation of a reader's good file."""
    good = parser.good()
    return mutated_json(source, good) if parser.is_json and source.random() < 0.7 else mutated_bytes(source, good)


def reads_or_refuses(parser: Parser, blob: bytes, place: Path) -> bool:
    """Has a file read; whether it was. Whatever is raised but an M3Error is a fault of ours.

    Args:
        parser: The reader.
        blob: What the file holds.
        place: An empty directory.
    """
    (place / parser.file).write_bytes(blob)
    (place / "out").mkdir(exist_ok=True)
    try:
        parser.read(place)
    except m3jax.M3Error:
        return False
    return True
