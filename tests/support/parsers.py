"""Every reader of files that others may have written: a good file each, and mutations of it."""

import gzip
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as orbax
from safetensors.numpy import save_file

import m3jax
from m3jax import documents
from m3jax.anatomy import anatomy_of
from m3jax.checkpoints import TensorInfo, inspection, open_msgpack, open_pytorch, open_safetensors, write_msgpack
from m3jax.checkpoints.adapters import open_model
from m3jax.checkpoints.digest import digest_checkpoint, digest_file
from m3jax.checkpoints.locate import locate_model, read_config
from m3jax.checkpoints.orbax import open_orbax
from m3jax.checkpoints.orbax_template import read_template, step_content, tree_files, tree_of
from m3jax.checkpoints.standing_in import CONVERSION
from m3jax.decoder import DecoderConfig
from m3jax.evaluation import get_task, harness_tasks, load_rows, report
from m3jax.evaluation.attacks.bert import BertConfig
from m3jax.evaluation.attacks.likeness import _pooling
from m3jax.evaluation.attacks.words import read_embeddings
from m3jax.evaluation.chats import _check_numbers
from m3jax.evaluation.records import Record, open_journal
from m3jax.exploration.journal import SampleJournal
from m3jax.ledger import Ledger
from m3jax.outputs import copies, journal, manifest, mark, places, provenance, remote, statistics
from m3jax.outputs.conversion import convert
from m3jax.outputs.verification import verify
from m3jax.recipe import load_recipe
from m3jax.vocabulary import plan_rows, read_speakers, read_vocabulary, unite, united_files
from m3jax.vocabulary.pieces import CONTROL, ScoredPiece, with_pieces
from support import torch_files
from support.adapters import factors
from support.alignment import tokenizer
from support.directories import write
from support.faults import Faults, Killed

_EARLY = Path(__file__).parents[1] / "checkpoints" / "fixtures" / "orbax" / "0.2.3"
_MOST_READ = 1 << 24  # bytes of a tensor; arrays of Orbax may be larger than what is stored of them
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
def _asked() -> dict[str, Any]:
    place = Path(tempfile.mkdtemp())
    base, *models = [str(write(place / name, TENSORS)) for name in "abc"]
    return {
        **{"merge_method": "ties", "models": models, "base_model": base, "seed": 3},
        **{"mixup": {"alpha": 0.5}, "parameters": {"density": 0.5, "trim_scope": "model"}},
    }


def _merge(out: Path) -> Path:
    return m3jax.merge_checkpoint(_asked(), out, max_shard_size=100).directory


@cache
def _merged() -> Path:
    return m3jax.merge_checkpoint(_asked(), Path(tempfile.mkdtemp()) / "out").directory


@cache
def _interrupted() -> Path:
    """The directory of a merge of which one of two weight files is finished."""
    out = Path(tempfile.mkdtemp()) / "out"
    with suppress(Killed), Faults(out.parent).until(lambda call: call.startswith("fsync") and "model-00002" in call):
        _merge(out)
    return places.partial_directory(out)


@cache
def _converted() -> Path:
    return convert(_merged(), Path(tempfile.mkdtemp()) / "out", "orbax").directory


@cache
def _restorable() -> Path:
    """A checkpoint as Orbax writes it, with all the small files that restoring reads."""
    place = Path(tempfile.mkdtemp()) / "out"
    with orbax.StandardCheckpointer() as checkpointer:
        checkpointer.save(place, {"a": jnp.ones((2, 3)), "b": {"c": jnp.zeros(2, jnp.bfloat16), "d": None}})
    return place


@cache
def _measured() -> Path:
    """Statistics of a model."""
    model, out = locate_model(str(_merged())), Path(tempfile.mkdtemp()) / "out"
    tensors = {name: np.ones(value.shape, np.float32) for name, value in TENSORS.items()}
    told = {"samples": 2, "seed": 0, "shared": {"a": "b"}, "inputs_first": ["c"]}
    statistics.write_statistics(out, statistics.measured_of(model, "a"), "fisher", told, tensors, 10**9)
    return out


@cache
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
            if info.nbytes > _MOST_READ:
                continue
            checkpoint.read_into(name, 0, memoryview(bytearray(info.nbytes)))


def _adapter(place: Path) -> None:
    """An adapter's configuration, beside factors that fit the good one."""
    save_file(factors({"model.layers.0.q": (4, 3)}, 2, 0), place / "adapter_model.safetensors")
    base = place / "base"
    if not base.exists():
        write(base, {"model.layers.0.q.weight": np.ones((4, 3), np.float32)})
    _tensors(open_model(locate_model(f"{base}+{place}")))


def _within(model: Callable[[], Path], file: str, then: Callable[[Path], object]) -> Callable[[Path], object]:
    """A reader of a model whose file of that name is another."""

    @cache
    def whole() -> Path:
        copy = Path(tempfile.mkdtemp(), "whole")
        shutil.copytree(model(), copy)
        return copy

    def read(place: Path) -> None:
        (whole() / file).write_bytes((place / Path(file).name).read_bytes())
        then(whole())

    return read


def _sealed(name: str, read: Callable[[Path], object]) -> Callable[[Path], object]:
    """A reader of a manifest whose digests were made to fit after it was edited, as whoever wrote it could do."""

    def read_sealed(place: Path) -> None:
        file = place / name
        with suppress(*documents.FAULTS):
            told = json.loads(file.read_bytes())
            with suppress(*documents.FAULTS):
                tensors = {n: (e["dtype"], e["shape"], e["digest"]) for n, e in told["output"]["tensors"].items()}
                told["output"]["digest"] = digest_checkpoint(tensors)
            file.write_text(json.dumps(manifest.sealed(told)))
        read(place)

    return read_sealed


def _verified(place: Path) -> None:
    """A manifest beside what it tells of."""
    for path in _merged().iterdir():
        if path.name != manifest.FILE_NAME:
            shutil.copyfile(path, place / path.name)
    verify(place, inputs=True)


def _header(place: Path) -> None:
    """A header of safetensors with its length before it, and behind it as many bytes as the good one tells of."""
    raw = (place / "header.json").read_bytes()
    (place / "model.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(132))
    _tensors(open_safetensors(place))


def _safetensors_header() -> bytes:
    whole = (_merged() / "model.safetensors").read_bytes()
    return whole[8 : 8 + int.from_bytes(whole[:8], "little")]


_JOURNAL = "m3jax-journal.jsonl"


def _journal() -> bytes:
    """What the lines of a journal tell, as one list."""
    lines = (_interrupted() / _JOURNAL).read_text().splitlines()
    return json.dumps([json.loads(line.partition(" ")[2]) for line in lines]).encode()


def _lines(raw: bytes) -> str:
    """The lines of a journal with sums that fit."""
    lines = raw.decode(errors="replace").splitlines()
    with suppress(*documents.FAULTS):
        told = json.loads(raw)
        lines = [json.dumps(line) for line in told] if isinstance(told, list) else lines
    return "".join(f"{journal._sum(line)} {line}\n" for line in lines)


def _told_again(place: Path) -> None:
    """What is made of a journal's lines before a merge goes on."""
    told = place / _JOURNAL
    told.write_text(_lines((place / "journal.json").read_bytes()))
    read = journal.read_journal(told)
    for entry in journal.weights_in(journal.finished_in([read], read.identity)).values():
        journal.files_of(entry)


def _resumed(place: Path) -> None:
    """A journal with sums that fit, where its merge is begun again."""
    partial = places.partial_directory(place / "merged")
    shutil.copytree(_interrupted(), partial)
    (partial / _JOURNAL).write_text(_lines((place / "journal.json").read_bytes()))
    _merge(place / "merged")


def _sent(place: Path) -> None:
    """What a merge in an object store makes of a journal there."""
    out = place / "merged"
    journals = {out / "m3jax-journal-0.json": remote._read_journal(place / "journal.json")}
    objects = {name: {} for name in ("a", "m3jax-journal-0.json")}
    remote._check_free(out, remote._There(objects, {}, journals), False)


def _written_from(item: Path) -> None:
    """All that a checkpoint written in the manner of another takes from it."""
    template = read_template(item)
    with open_orbax(item) as checkpoint:
        for _ in tree_files(template, checkpoint.tensors):
            pass
        if template.tree is not None:
            tree_of(template, checkpoint.tensors)
        step_content(template, 0, 0)


def _copied(place: Path) -> None:
    file = place / "tokenizer_config.json"
    copies.write_copy(file, place, "copied.json", digest_file(file))


def _pooled(place: Path) -> None:
    (place / "1_Pooling").mkdir(exist_ok=True)
    shutil.copyfile(place / "config.json", place / "1_Pooling" / "config.json")
    _pooling(place)


def _stopped(place: Path) -> None:
    """The stop tokens of a file beside a good configuration."""
    (place / "config.json").write_text(json.dumps(_CONFIG))
    DecoderConfig.from_directory(place)


def _orbax(item: Path) -> None:
    read_template(item)
    _tensors(open_orbax(item))


def _parquet() -> bytes:
    from pyarrow import Table, parquet

    with tempfile.TemporaryDirectory() as place:
        parquet.write_table(Table.from_pylist([{"sentence": "good", "label": 1}]), Path(place, "x"))
        return Path(place, "x").read_bytes()


def _vocabulary(name: str, **others: str) -> Callable[[Path], object]:
    """A reader of a tokenizer's file beside others."""
    beside = {other.replace("_json", ".json").replace("_txt", ".txt"): text for other, text in others.items()}
    return lambda place: read_vocabulary({name: place / name} | {n: _written(n, text) for n, text in beside.items()})


@cache
def _written(name: str, text: str) -> Path:
    path = Path(tempfile.mkdtemp(), name)
    path.write_text(text)
    return path


def _task_file(place: Path) -> None:
    for path in harness_tasks._with_included(place / "task.yaml"):
        harness_tasks._check_file(path)


def _config(place: Path) -> None:
    anatomy_of(INFOS, read_config(place))
    shutil.copyfile(_merged() / "model.safetensors", place / "model.safetensors")
    inspection.look_at(os.fspath(place))


def _decoder(place: Path) -> None:
    DecoderConfig.from_directory(place)


def _examples(task: str) -> Callable[[Path], object]:
    return lambda place: get_task(task).read(load_rows(place / f"{task}.jsonl"))


def _table(file: str) -> Callable[[Path], object]:
    return lambda place: get_task("sst2").read(load_rows(place / file))


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
seed: 130
dtype: bfloat16
"""
_TASK = b"""task: own
include: [other.yaml]
dataset_path: json
doc_to_text: "{{question}}"
metric_list:
- {metric: &m exact_match, aggregation: mean}
- metric: *m
dataset_kwargs: {trust_remote_code: false}
"""
_CONFIG = {
    **{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4, "intermediate_size": 8},
    **{"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 8},
    **{"max_position_embeddings": 16, "rms_norm_eps": 1e-6, "rope_theta": 1e4, "hidden_act": "silu"},
    **{"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "tie_word_embeddings": True, "eos_token_id": [1, 2]},
    **{"torch_dtype": "bfloat16", "quantization_config": None},
}
_SPARSE = {
    **{**_CONFIG, "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 2},
    **{"num_experts_per_tok": 1, "sliding_window": 8, "head_dim": 2, "attention_dropout": 0.0},
    "rope_scaling": {
        **{"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 8, "beta_fast": 32.0},
        **{"beta_slow": 1.0, "mscale": 1.0, "truncate": False},
    },
}
_BERT = {
    **{"model_type": "bert", "vocab_size": 8, "hidden_size": 4, "intermediate_size": 8, "num_hidden_layers": 1},
    **{"num_attention_heads": 2, "max_position_embeddings": 16, "type_vocab_size": 2, "hidden_act": "gelu_new"},
    **{"layer_norm_eps": 1e-12, "position_embedding_type": "absolute", "id2label": {"0": "NOUN", "1": "VERB"}},
}
_SETTINGS = {
    **{"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": True}},
    "added_tokens_decoder": {"3": {"content": "<s>", "special": True}, "4": {"content": "</s>", "normalized": False}},
    "additional_special_tokens": ["<pad>"],
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
_VOCAB = json.dumps({"a": 0, "b": 1, "ab": 2})
_TOKENIZER = tokenizer(["<unk>", "a", "b", "ab"])


def _vocabularies(place: Path) -> None:
    other = _written("tokenizer.json", json.dumps(tokenizer(["<unk>", "b", "a", "[PAD]"])))
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
    "manifest, sealed again": Parser(
        "m3jax.json", lambda: (_merged() / "m3jax.json").read_bytes(), _sealed("m3jax.json", _verified)
    ),
    "manifest, replayed": Parser(
        "m3jax.json",
        lambda: (_merged() / "m3jax.json").read_bytes(),
        _sealed("m3jax.json", lambda place: m3jax.replay(place / "m3jax.json", place / "replayed")),
    ),
    "mark": Parser(CONVERSION, lambda: (_converted() / CONVERSION).read_bytes(), mark.read),
    "mark, sealed again": Parser(
        CONVERSION,
        lambda: (_converted() / CONVERSION).read_bytes(),
        _within(_converted, CONVERSION, _sealed(CONVERSION, verify)),
    ),
    "mark, as it is replaced": Parser(
        CONVERSION,
        lambda: (_converted() / CONVERSION).read_bytes(),
        lambda place: places.check_free(place, overwrite=True),
    ),
    "journal": Parser("journal.json", _journal, _told_again),
    "journal, and its merge gone on with": Parser("journal.json", _journal, _resumed),
    "journal in an object store": Parser(
        "journal.json",
        _dumped({"identity": "0", "entries": [{"shard": "a", "tensors": {}, "sent": ["t", 1]}, {"ours": ["a"]}]}),
        _sent,
    ),
    "config": Parser("config.json", _dumped({**_CONFIG, **_PARTS}), _config),
    "adapter": Parser("adapter_config.json", _dumped(_LORA), _adapter),
    "decoder": Parser("config.json", _dumped(_CONFIG), _decoder),
    "decoder of experts": Parser("config.json", _dumped(_SPARSE), _decoder),
    "stop tokens": Parser("generation_config.json", _dumped({"eos_token_id": [1, 2], "do_sample": True}), _stopped),
    "bert": Parser("config.json", _dumped(_BERT), lambda place: BertConfig.from_directory(place)),
    "pooling": Parser(
        "config.json", _dumped({"pooling_mode_mean_tokens": True, "word_embedding_dimension": 4}), _pooled
    ),
    "statistics": Parser(
        statistics.CONVERSION,
        lambda: (_measured() / statistics.CONVERSION).read_bytes(),
        _sealed(statistics.CONVERSION, statistics.read_record),
    ),
    "companion": Parser(
        "tokenizer_config.json",
        _dumped({"chat_template": "x", "auto_map": {"a": []}}),
        _copied,
    ),
    "tokenizer": Parser("tokenizer.json", _dumped(_TOKENIZER), _vocabularies),
    "pieces": Parser(
        "tokenizer.model",
        lambda: with_pieces(b"", [ScoredPiece("<s>", 0.0, CONTROL), ScoredPiece("a", -1.5), ScoredPiece("b", -2.5)]),
        lambda place: read_vocabulary({"tokenizer.model": place / "tokenizer.model"}),
        False,
    ),
    "vocab.json": Parser("vocab.json", _dumped({"a": 0, "b": 1, "ab": 2}), _vocabulary("vocab.json", merges_txt="a b")),
    "merges.txt": Parser(
        "merges.txt", lambda: b"#version: 0.2\na b\nab b\n", _vocabulary("merges.txt", vocab_json=_VOCAB), False
    ),
    "vocab.txt": Parser("vocab.txt", lambda: b"[PAD]\na\n##b\n", _vocabulary("vocab.txt"), False),
    "special tokens": Parser(
        "special_tokens_map.json",
        _dumped(
            {"bos_token": {"content": "<s>", "lstrip": False}, "additional_special_tokens": ["a", {"content": "x"}]}
        ),
        _vocabulary("special_tokens_map.json", vocab_json=_VOCAB),
    ),
    "added tokens": Parser(
        "added_tokens.json", _dumped({"<s>": 3, "x": 4}), _vocabulary("added_tokens.json", vocab_json=_VOCAB)
    ),
    "settings of a tokenizer": Parser(
        "tokenizer_config.json",
        _dumped(_SETTINGS),
        _vocabulary("tokenizer_config.json", tokenizer_json=json.dumps(_TOKENIZER)),
    ),
    "safetensors": Parser(
        "model.safetensors",
        lambda: (_merged() / "model.safetensors").read_bytes(),
        lambda place: _tensors(open_safetensors(place)),
        False,
    ),
    "safetensors' header": Parser("header.json", _safetensors_header, _header),
    "index": Parser(
        "model.safetensors.index.json",
        _dumped({"metadata": {"total_size": 1}, "weight_map": {"a": "model-1.safetensors"}}),
        lambda place: _tensors(open_safetensors(place)),
    ),
    "index of msgpack": Parser(
        "flax_model.msgpack.index.json",
        _dumped({"metadata": {"total_size": 1}, "weight_map": {"a": "flax_model-1.msgpack"}}),
        lambda place: _tensors(open_msgpack(place)),
    ),
    "index of PyTorch": Parser(
        "pytorch_model.bin.index.json",
        _dumped({"metadata": {"total_size": 1}, "weight_map": {"a": "pytorch_model-1.bin"}}),
        lambda place: _tensors(open_pytorch(place)),
    ),
    "tree of Orbax": Parser(
        "_METADATA", lambda: (_converted() / "_METADATA").read_bytes(), _within(_converted, "_METADATA", _orbax)
    ),
    "step of Orbax": Parser(
        "_CHECKPOINT_METADATA",
        lambda: (_converted() / "_CHECKPOINT_METADATA").read_bytes(),
        _within(_converted, "_CHECKPOINT_METADATA", _orbax),
    ),
    "manifest of Orbax's store": Parser(
        "manifest.ocdbt",
        lambda: (_converted() / "manifest.ocdbt").read_bytes(),
        _within(_converted, "manifest.ocdbt", _orbax),
        False,
    ),
    "array of an early Orbax": Parser(
        ".zarray",
        lambda: (_EARLY / "stored/dense.kernel/.zarray").read_bytes(),
        _within(lambda: _EARLY / "stored", "dense.kernel/.zarray", _orbax),
    ),
    "chunk of an early Orbax": Parser(
        "0.0",
        lambda: (_EARLY / "stored/dense.kernel/0.0").read_bytes(),
        _within(lambda: _EARLY / "stored", "dense.kernel/0.0", _orbax),
        False,
    ),
    "template of Orbax": Parser(
        "_METADATA",
        lambda: (_restorable() / "_METADATA").read_bytes(),
        _within(_restorable, "_METADATA", _written_from),
    ),
    "shardings of Orbax": Parser(
        "_sharding",
        lambda: (_restorable() / "_sharding").read_bytes(),
        _within(_restorable, "_sharding", _written_from),
    ),
    "arrays of Orbax": Parser(
        "process_0",
        lambda: (_restorable() / "array_metadatas" / "process_0").read_bytes(),
        _within(_restorable, "array_metadatas/process_0", _written_from),
    ),
    "tree of an early Orbax": Parser(
        "checkpoint",
        lambda: (_EARLY / "mixed/checkpoint").read_bytes(),
        _within(lambda: _EARLY / "mixed", "checkpoint", _orbax),
        False,
    ),
    "msgpack": Parser("flax_model.msgpack", _msgpack, lambda place: _tensors(open_msgpack(place)), False),
    "pytorch": Parser("pytorch_model.bin", _pytorch, lambda place: _tensors(open_pytorch(place)), False),
    "pytorch's pickle": Parser("data.pkl", _pickle, _pickled, False),
    "list of examples": Parser("sst2.json", _dumped({"data": [{"sentence": "good", "label": 1}]}), _table("sst2.json")),
    "sst2": Parser("sst2.jsonl", _dumped({"sentence": "good", "label": 1}), _examples("sst2")),
    "gsm8k": Parser("gsm8k.jsonl", _dumped({"question": "1+1?", "answer": "#### 2"}), _examples("gsm8k")),
    "mbpp": Parser(
        "mbpp.jsonl",
        _dumped({"task_id": 1, "text": "t", "code": "c", "test_list": ["assert f()"], "test_setup_code": ""}),
        _examples("mbpp"),
    ),
    "humaneval": Parser(
        "humaneval.jsonl",
        _dumped({"task_id": "a/1", "prompt": "def f():\n", "test": "def check(f): pass", "entry_point": "f"}),
        _examples("humaneval"),
    ),
    "math": Parser(
        "math.jsonl", _dumped({"problem": "1+1?", "solution": "\\boxed{2}", "unique_id": "a"}), _examples("math")
    ),
    "alpaca_eval": Parser("alpaca_eval.jsonl", _dumped({"instruction": "a", "dataset": "b"}), _examples("alpaca_eval")),
    "table of tabs": Parser("sst2.tsv", lambda: b"sentence\tlabel\ngood\t1\nbad\t0\n", _table("sst2.tsv"), False),
    "table of commas": Parser("sst2.csv", lambda: b'sentence,label\n"a, b",1\nbad,0\n', _table("sst2.csv"), False),
    "packed": Parser(
        "sst2.jsonl.gz",
        lambda: gzip.compress(b'{"sentence": "good", "label": 1}', mtime=0),
        _table("sst2.jsonl.gz"),
        False,
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
if find_spec("pyarrow") is not None:
    PARSERS["parquet"] = Parser("sst2.parquet", _parquet, _table("sst2.parquet"), False)
if find_spec("lm_eval") is not None:
    PARSERS["task of the harness"] = Parser("task.yaml", lambda: _TASK, _task_file, False)


def refusal(parser: Parser, blob: bytes, place: Path) -> m3jax.M3Error | None:
    """Has a file read; gives the sentence by which it was refused. Whatever else is raised is a fault of ours.

    Args:
        parser: The reader.
        blob: What the file holds.
        place: A directory that is empty, or holds the file as it was before.
    """
    with open(f"{place}/{parser.file}", "wb", 0) as file:
        file.write(blob)
    try:
        parser.read(place)
    except m3jax.M3Error as error:
        return error
    return None
