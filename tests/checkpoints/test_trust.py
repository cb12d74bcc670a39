"""What comes with a model: links that lead elsewhere and files that are none are refused, code is told of."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.directories import write

import m3jax
from m3jax.checkpoints import companions
from m3jax.checkpoints.locate import named_companions
from m3jax.checkpoints.trust import check_tokenizer_files, code_note, without_code
from m3jax.documents import LARGEST_FILE
from m3jax.errors import M3Error

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    return directory


def refused(model: Path, *words: str) -> None:
    with pytest.raises(M3Error) as caught:
        companions(model)
    sentence = str(caught.value)
    assert all(word in sentence for word in words), sentence
    assert sentence.endswith(".")
    assert "\n" not in sentence


@pytest.mark.parametrize("target", ["/proc/self/environ", "../secret", "/dev/zero", "/etc/passwd"])
def test_links_that_lead_out_are_refused_by_name(tmp_path: Path, model: Path, target: str) -> None:
    (tmp_path / "secret").write_text("secret")
    (model / "tokenizer.model").symlink_to(target)
    refused(model, f"{model}/tokenizer.model leads out of the model, to /", "put a copy there")


def test_a_chain_of_links_and_a_directory_that_is_a_link_are_followed_to_their_end(tmp_path: Path, model: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (model / "inside").symlink_to("../secret")
    (model / "tokenizer.json").symlink_to("inside")
    refused(model, "tokenizer.json leads out of the model")
    (model / "tokenizer.json").unlink()
    (tmp_path / "templates").mkdir()
    (tmp_path / "templates" / "x.jinja").write_text("{{ x }}")
    (model / "additional_chat_templates").symlink_to("../templates")
    refused(model, "additional_chat_templates/x.jinja leads out of the model")


def test_links_that_stay_inside_are_the_models_own(tmp_path: Path, model: Path) -> None:
    (model / "real.json").write_text('{"a": 1}')
    (model / "tokenizer.json").symlink_to("real.json")
    (tmp_path / "other name").symlink_to("model")
    for place in (model, tmp_path / "other name"):
        assert [path.name for path in companions(place)] == ["config.json", "tokenizer.json"]


def test_a_snapshot_of_the_hub_cache_leads_to_its_own_blobs_only(tmp_path: Path) -> None:
    for repository in ("models--org--tiny", "models--org--other"):
        (tmp_path / repository / "blobs").mkdir(parents=True)
        (tmp_path / repository / "blobs" / "abc").write_text("{}")
    snapshot = tmp_path / "models--org--tiny" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "tokenizer.json").symlink_to("../../blobs/abc")
    assert list(named_companions(snapshot)) == ["tokenizer.json"]
    (snapshot / "vocab.json").symlink_to("../../../models--org--other/blobs/abc")
    refused(snapshot, "vocab.json leads out of the model")
    (snapshot / "vocab.json").unlink()
    (tmp_path / "models--org--tiny" / "blobs" / "evil").symlink_to("/proc/self/environ")
    (snapshot / "vocab.json").symlink_to("../../blobs/evil")
    refused(snapshot, "vocab.json leads out of the model")


def test_a_directory_that_only_looks_like_a_hub_cache_has_no_blobs(tmp_path: Path) -> None:
    model = tmp_path / "snapshots" / "mine"
    model.mkdir(parents=True)
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "key").write_text("secret")
    (model / "tokenizer.json").symlink_to("../../blobs/key")
    refused(model, "tokenizer.json leads out of the model")


def test_what_is_no_file_or_not_there(model: Path) -> None:
    place = model / "tokenizer.json"
    os.mkfifo(place)
    refused(model, "tokenizer.json is not a regular file")
    place.unlink()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(place))
        refused(model, "tokenizer.json is not a regular file")
    place.unlink()
    place.symlink_to("nothing")
    refused(model, "tokenizer.json is a link to what is not there")
    place.unlink()
    place.symlink_to("tokenizer.json")
    refused(model, "tokenizer.json is a link to what is not there")


def test_huge_files(model: Path) -> None:
    with open(model / "tokenizer.model", "wb") as file:
        file.truncate(LARGEST_FILE)
    assert len(companions(model)) == 2
    with open(model / "tokenizer.model", "wb") as file:
        file.truncate(2**40)
    refused(model, "tokenizer.model has 1,099,511,627,776 bytes, more than any tokenizer")


def test_a_tokenizers_class_opens_nothing_that_is_not_the_models(tmp_path: Path, model: Path) -> None:
    (tmp_path / "weights").write_text("elsewhere, as it may be")
    for name in ("model.safetensors", "pytorch_model.bin.index.json"):
        (model / name).symlink_to("../weights")
    with open(model / "training.json", "wb") as file:
        file.truncate(2 * LARGEST_FILE)
    (model / "question_encoder").mkdir()
    (model / "question_encoder" / "vocab.txt").symlink_to("../config.json")
    (model / ".git").mkdir()
    os.mkfifo(model / ".git" / "daemon.ipc")
    check_tokenizer_files(model)
    for name, target in (
        ("source.spm", "/dev/zero"),
        ("prophetnet.tokenizer", "../weights"),
        ("README.md", "../weights"),
        ("vocabulary", "../weights"),
        ("question_encoder/source.spm", "../../weights"),
        ("generator_tokenizer", ".."),
    ):
        (model / name).symlink_to(target)
        assert list(named_companions(model)) == ["config.json"]
        with pytest.raises(M3Error, match=rf"{name} leads out of the model"):
            check_tokenizer_files(model)
        (model / name).unlink()
    check_tokenizer_files(model)


def test_weights_may_be_links_to_another_disk(tmp_path: Path, model: Path) -> None:
    """They are read as tensors alone, and large files are linked on purpose."""
    elsewhere = write(tmp_path / "disk", {"w": np.float32([1, 2]), "v": np.float32([3])}, shards=2)
    for file in elsewhere.glob("*.safetensors*"):
        (model / file.name).symlink_to(file)
    merged = m3jax.merge_checkpoint({"merge_method": "linear", "models": [str(model)]}, tmp_path / "out")
    assert merged.bytes_read == 12
    assert not (merged.directory / "model.safetensors").is_symlink()


# --- Code ------------------------------------------------------------------------------------------------


def test_code_is_told_of(model: Path) -> None:
    assert code_note("mine", model) is None
    (model / "config.json").write_text(json.dumps({"text_config": {"auto_map": {"AutoConfig": "my.Config"}}}))
    (model / "tokenizer_config.json").write_text('{"auto_map": {}, "custom_pipelines": {}}')
    (model / "vocab.json").write_text('{"auto_map": 1}')  # a token
    for name in "abcd":
        (model / f"{name}.py").touch()
    (model / "model.safetensors").touch()
    assert code_note("mine", model) == code_note("mine", model / "model.safetensors")
    assert code_note("mine", model) == (
        "mine brings Python code (a.py, b.py, c.py, 1 more .py files, auto_map in config.json,"
        " auto_map in tokenizer_config.json, custom_pipelines in tokenizer_config.json): it is never run, and neither"
        " files nor keys are copied."
    )


def test_configurations_that_cannot_be_read_are_left_to_who_needs_them(tmp_path: Path, model: Path) -> None:
    (tmp_path / "secret.json").write_text('{"auto_map": 1}')
    (model / "config.json").write_text("[" * 100_000)
    (model / "generation_config.json").write_text("{")
    (model / "tokenizer_config.json").symlink_to("../secret.json")
    os.mkfifo(model / "preprocessor_config.json")
    assert code_note("mine", model) is None


def test_keys_that_name_code_go_at_any_depth() -> None:
    kept = {"model_type": "x", "parts": [{"a": 1}, 2]}
    assert without_code({**kept, "auto_map": 1, "parts": [{"a": 1, "custom_pipelines": {}}, 2]}) == kept


_LOAD = """
import sys
from pathlib import Path
from m3jax.documents import LARGEST_FILE
from m3jax.errors import M3Error
from m3jax.evaluation.tokens import load_tokenizer
try:
    load_tokenizer("mine", Path(sys.argv[1]))
except M3Error as error:
    print(error)
else:
    print("loaded")
"""


@pytest.mark.slow  # a process of its own, which imports JAX and transformers
@pytest.mark.parametrize("kind", ["unknown tokenizer", "tokenizer.json beside"])
def test_a_tokenizers_code_never_runs_and_nobody_is_asked(tmp_path: Path, model: Path, kind: str) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    told = {"tokenizer_class": "MineTokenizer", "auto_map": {"AutoTokenizer": ["mine.MineTokenizer", None]}}
    (model / "tokenizer_config.json").write_text(json.dumps(told))
    (model / "config.json").write_text(
        json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "mine.MineConfig"}})
    )
    (model / "mine.py").write_text(
        f"open({str(tmp_path / 'harm')!r}, 'w').close()\nMineTokenizer = MineConfig = None\n"
    )
    if kind == "unknown tokenizer":
        (model / "vocab.json").write_text('{"a": 0}')
    else:
        Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a")).save(str(model / "tokenizer.json"))
    environment = {**os.environ, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", _LOAD, str(model)],
        input="y\n" * 9,
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    assert not (tmp_path / "harm").exists()
    assert "[y/N]" not in done.stdout + done.stderr
    assert "mine: its tokenizer is Python code of its own, which is never run" in done.stdout
