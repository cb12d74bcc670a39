import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import constants, errors
from huggingface_hub.utils import SafetensorsFileMetadata, SafetensorsRepoMetadata, TensorInfo
from safetensors.numpy import save_file
from support.torch_files import write_shards

from m3jax.checkpoints import companions, locate_model, open_pytorch, open_safetensors, sketch_model
from m3jax.errors import M3Error

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """A hub cache that holds one model, and no network."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    repo = tmp_path / "cache" / "models--org--tiny"
    (repo / "snapshots" / COMMIT).mkdir(parents=True)
    (repo / "snapshots" / COMMIT / "config.json").write_text("{}")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    (repo / "refs" / "v1").write_text(COMMIT)
    monkeypatch.chdir(tmp_path)
    return repo


@pytest.mark.parametrize("name", ["org/tiny", "org/tiny@main", "org/tiny@v1", f"org/tiny@{COMMIT}"])
def test_a_hub_model_comes_from_the_cache(hub_cache, name) -> None:
    assert locate_model(name) == (name, hub_cache / "snapshots" / COMMIT, COMMIT, None)


def test_an_adapter_and_its_base_have_revisions_of_their_own(hub_cache) -> None:
    other = "f" * 40
    lora = hub_cache.parent / "models--org--lora"
    (lora / "snapshots" / other).mkdir(parents=True)
    (lora / "snapshots" / other / "adapter_config.json").write_text("{}")
    (lora / "refs").mkdir()
    (lora / "refs" / "v2").write_text(other)
    found = locate_model("org/tiny@v1+org/lora@v2")
    adapter = ("org/lora@v2", lora / "snapshots" / other, other, None)
    assert found == ("org/tiny@v1+org/lora@v2", hub_cache / "snapshots" / COMMIT, COMMIT, adapter)
    with pytest.raises(M3Error, match=r"^org/tiny\+org/none: 'org/none' does not exist here"):
        locate_model("org/tiny+org/none")


def test_what_exists_here_wins(hub_cache, tmp_path) -> None:
    (tmp_path / "org" / "tiny").mkdir(parents=True)
    found = locate_model("org/tiny")
    assert (found.name, str(found.path), found.revision) == ("org/tiny", "org/tiny", None)


def test_the_home_directory(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert locate_model("~/model").path == tmp_path / "model"


@pytest.mark.parametrize(
    "name", ["", "nothing", "/no/such/model", "./org/tiny", "a/b/c", "org/tiny@", "o/t\0", "a b/c"]
)
def test_neither_a_path_nor_a_hub_id(hub_cache, name) -> None:
    with pytest.raises(M3Error, match="does not exist here and is no hub id"):
        locate_model(name)


@pytest.mark.parametrize("name", ["org/absent", "org/tiny@v9"])
def test_not_in_the_cache_while_offline(hub_cache, name) -> None:
    with pytest.raises(M3Error, match=f"{name}' does not exist here and is not complete in the hub cache: unset"):
        locate_model(name)


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        (errors.GatedRepoError, "is gated on the hub: accept its terms"),
        (errors.RepositoryNotFoundError, "no such model: check the spelling"),
        (errors.RevisionNotFoundError, "no revision 'v2'"),
        (errors.LocalEntryNotFoundError, "cannot be reached"),
        (errors.HFValidationError, "no valid hub id"),
        (RuntimeError, r"\(RuntimeError\)"),
    ],
)
def test_failures_of_the_hub_are_one_sentence_without_secrets(monkeypatch, tmp_path, kind, sentence) -> None:
    def fail(*args, **kwargs):
        error = kind.__new__(kind)
        error.args = ("GET https://user:hf_secret@hub\nsecond line",)
        raise error

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(M3Error, match=sentence) as caught:
        locate_model("org/tiny@v2")
    assert "hf_secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_only_what_a_merge_needs_is_downloaded(monkeypatch, tmp_path) -> None:
    asked = {}

    def download(repo, **options):
        asked.update(options, repo=repo)
        (tmp_path / COMMIT).mkdir()
        (tmp_path / COMMIT / "model.safetensors").touch()
        return str(tmp_path / COMMIT)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert locate_model("org/tiny@refs/pr/1").revision == COMMIT
    assert (asked["repo"], asked["revision"]) == ("org/tiny", "refs/pr/1")
    patterns = huggingface_hub.utils.filter_repo_objects
    files = [
        "model-00001-of-00002.safetensors",
        "pytorch_model.bin",
        "config.json",
        "tokenizer.model",
        "README.md",
    ]
    kept = list(patterns(files, allow_patterns=asked["allow_patterns"]))
    assert kept == ["model-00001-of-00002.safetensors", "config.json", "tokenizer.model"]


def test_other_weights_are_downloaded_where_there_are_no_safetensors(monkeypatch, tmp_path) -> None:
    asked = []

    def download(repo, **options):
        asked.append([name in options["allow_patterns"] for name in ("*.msgpack", "pytorch_model*.bin")])
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert locate_model("org/tiny").path == tmp_path
    assert asked == [[False, False], [True, False], [True, True]]


def hub_of(monkeypatch, model: Path, fetched: list) -> None:
    """A hub that has one model, whose revision main is `COMMIT`."""

    def download(repo, **options):
        fetched.append(options["allow_patterns"])
        (snapshot := model.parent / COMMIT).mkdir(exist_ok=True)
        names = [file.name for file in model.iterdir()]
        for name in huggingface_hub.utils.filter_repo_objects(names, allow_patterns=options["allow_patterns"]):
            shutil.copy(model / name, snapshot / name)
        return str(snapshot)

    def metadata(repo, revision):
        assert (repo, revision) == ("org/tiny", COMMIT)
        files = {}
        for path in model.glob("*.safetensors"):
            blob = path.read_bytes()
            header = json.loads(blob[8 : 8 + int.from_bytes(blob[:8], "little")])
            told = header.pop("__metadata__", {})
            tensors = {name: TensorInfo(e["dtype"], e["shape"], tuple(e["data_offsets"])) for name, e in header.items()}
            files[path.name] = SafetensorsFileMetadata(told, tensors)
        if not files:
            raise errors.NotASafetensorsRepoError("no safetensors")
        return SafetensorsRepoMetadata(metadata=None, sharded=len(files) > 1, weight_map={}, files_metadata=files)

    class HubFiles:
        def ls(self, place, detail):
            assert place == f"org/tiny@{COMMIT}"
            return [f"{place}/{path.name}" for path in model.iterdir()]

        def info(self, address):
            return {"size": (model / Path(address).name).stat().st_size}

        def cat_file(self, address, start, end):
            fetched.append(end - start)
            return (model / Path(address).name).read_bytes()[start:end]

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", metadata)
    monkeypatch.setattr(huggingface_hub, "HfFileSystem", HubFiles)


def test_a_sketch_of_a_hub_model_has_its_headers_and_no_weights(monkeypatch, tmp_path) -> None:
    (model := tmp_path / "model").mkdir()
    save_file({"a": np.ones((3, 4), np.float32), "b": np.ones(5, np.float16)}, model / "model.safetensors")
    (model / "config.json").write_text('{"tie_word_embeddings": true}')
    fetched: list = []
    hub_of(monkeypatch, model, fetched)
    monkeypatch.chdir(tmp_path)
    found = sketch_model("org/tiny")
    assert found.revision == COMMIT
    assert fetched
    assert not any("safetensors" in pattern for patterns in fetched for pattern in patterns)
    with open_safetensors(found.path) as sketched, open_safetensors(model) as real:
        assert sketched.tensors == real.tensors
    assert (found.path / "config.json").read_text() == '{"tie_word_embeddings": true}'
    assert sketch_model(str(model)).path == model  # what is here needs none


def test_a_sketch_of_pytorchs_files(monkeypatch, tmp_path) -> None:
    (model := tmp_path / "model").mkdir()
    write_shards(model, {f"layers.{layer}.w": np.ones((200, 300), np.float32) for layer in range(4)}, 2)
    fetched: list = []
    hub_of(monkeypatch, model, fetched)
    monkeypatch.chdir(tmp_path)
    found = sketch_model("org/tiny")
    assert found.revision == COMMIT
    with open_pytorch(found.path) as sketched, open_pytorch(model) as real:
        assert sketched.tensors == real.tensors
        prints = [
            {file: told["header_blake3"] for file, told in each.fingerprint().items()} for each in (sketched, real)
        ]
    assert prints[0] == prints[1]
    sizes = [size for size in fetched if isinstance(size, int)]
    assert sum(sizes) < 3 * 2**16  # the ends of the files, which directories are in
    (model / "pytorch_model-00001-of-00002.bin").write_bytes(b"junk")
    with pytest.raises(M3Error, match="no zip archive of PyTorch"):
        sketch_model("org/tiny")


def test_a_hub_model_without_safetensors_is_fetched(monkeypatch, tmp_path) -> None:
    (model := tmp_path / "model").mkdir()
    (model / "flax_model.msgpack").write_bytes(b"weights")
    fetched: list = []
    hub_of(monkeypatch, model, fetched)
    assert (sketch_model("org/tiny").path / "flax_model.msgpack").read_bytes() == b"weights"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert sketch_model("org/tiny").path == tmp_path / COMMIT  # as the cache has it


def test_companions(tmp_path) -> None:
    carried = [
        "additional_chat_templates/rag.jinja",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "merges.txt",
        "preprocessor_config.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "vocab.json",
    ]
    left = [
        "README.md",
        "model.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        ".git/config.json",
    ]
    for name in carried + left:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "tokenizer_old.json").mkdir()
    assert [str(path.relative_to(tmp_path)) for path in companions(tmp_path)] == carried


def test_companions_of_nothing(tmp_path) -> None:
    assert companions(tmp_path) == []
    with pytest.raises(M3Error, match="absent cannot be listed"):
        companions(tmp_path / "absent")


def test_copies_outlive_a_process_that_was_forked_and_not_their_own():
    lines = [
        "import os, sys",
        "from m3jax.checkpoints.locate import scratch",
        "place = scratch()",
        "if os.fork() == 0: sys.exit()",
        "os.wait()",
        "print(place, os.path.isdir(place))",
    ]
    said = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True).stdout
    place, there = said.split()
    assert there == "True"
    assert not os.path.exists(place)
