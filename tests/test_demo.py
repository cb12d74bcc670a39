"""The demo: the models it makes, and its whole run on tiny ones."""

import hashlib
import json
import struct
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from m3jax import demo, inspection, load_recipe
from m3jax.checkpoints import open_safetensors
from m3jax.errors import M3Error

TINY = demo.Size(vocabulary=320, hidden=32, intermediate=48, layers=2, heads=4, key_value_heads=2, shard=30_000)

# SHA-256 over the weight files of all models of size TINY: the same on every machine and with every numpy.
WEIGHTS = "98db7cc0e398c60f040e6b2dd8075c361d249d594e702e055bdef9dd445504de"


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def weights(model: Path) -> dict[str, np.ndarray]:
    files = sorted(model.glob("*.safetensors"))
    return {name: tensor.astype(np.float32) for file in files for name, tensor in load_file(file).items()}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("demo") / "models"
    assert demo.build_models(directory, TINY)
    return directory


# --- Building --------------------------------------------------------------------------------------------


def test_two_builds_are_equal(models: Path, tmp_path: Path) -> None:
    demo.build_models(tmp_path / "again", TINY)
    assert contents(tmp_path / "again") == contents(models)


def test_weights_are_the_same_everywhere(models: Path) -> None:
    digest = hashlib.sha256()
    for path in sorted(models.rglob("*.safetensors")):
        digest.update(path.read_bytes())
    assert digest.hexdigest() == WEIGHTS


def test_whole_models_are_used_again(tmp_path: Path) -> None:
    models = tmp_path / "models"
    (tmp_path / "models.partial" / "base").mkdir(parents=True)  # what an interrupted run leaves
    assert demo.build_models(models, TINY)
    assert not (tmp_path / "models.partial").exists()
    assert not demo.build_models(models, TINY)
    assert demo.build_models(models, TINY._replace(layers=1))
    assert inspection.look_at(str(models / "base")).model.layers == 1
    (models / "made.json").unlink()
    assert demo.build_models(models, TINY._replace(layers=1))


def test_files_of_a_model(models: Path) -> None:
    assert sorted(path.name for path in models.iterdir()) == ["base", "expert-a", "expert-b", "made.json"]
    for name in ("base", "expert-a", "expert-b"):
        files = {path.name for path in (models / name).iterdir()}
        assert {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"} <= files
        assert "model.safetensors.index.json" in files
        assert len([file for file in files if file.endswith(".safetensors")]) > 1
        with open_safetensors(models / name) as checkpoint:
            assert {info.dtype for info in checkpoint.tensors.values()} == {"BF16"}


def test_safetensors_reads_them(models: Path) -> None:
    base = weights(models / "base")
    config = json.loads((models / "base" / "config.json").read_text())
    assert base["model.embed_tokens.weight"].shape == (config["vocab_size"], config["hidden_size"])
    assert base["model.layers.1.self_attn.k_proj.weight"].shape == (2 * config["head_dim"], config["hidden_size"])
    assert np.all(base["model.norm.weight"] == 1)
    assert len(base) == 9 * TINY.layers + 3
    assert base.keys() == weights(models / "expert-b").keys()


def test_task_vectors_share_something(models: Path) -> None:
    base, a, b = (weights(models / name) for name in ("base", "expert-a", "expert-b"))
    first, second = (np.concatenate([(x[n] - base[n]).ravel() for n in base]) for x in (a, b))
    assert 0.05 < np.dot(first, second) / np.linalg.norm(first) / np.linalg.norm(second) < 0.6
    kept = np.sort(np.abs(first))[-first.size // 2 :]
    assert np.sum(kept**2) > 0.9 * np.sum(first**2)  # what TIES trims matters little


def test_bell() -> None:
    numbers = demo.bell("anything", 200_000)
    assert numbers.dtype == np.float32
    assert abs(numbers.mean()) < 0.01
    assert abs(numbers.var() - 1) < 0.01
    assert np.array_equal(demo.bell("anything", 10), numbers[:10])
    assert not np.array_equal(demo.bell("other", 10), numbers[:10])


def test_tokenizer(models: Path) -> None:
    tokenizer = Tokenizer.from_file(str(models / "expert-a" / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == TINY.vocabulary
    assert [tokenizer.token_to_id(token) for token in demo.SPECIAL] == [0, 1, 2]
    for text in (demo.PRIMER, "λ·A + (1−λ)·B\n\n  🙂\t<x>", ""):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert len(tokenizer.encode(demo.PRIMER).ids) < len(demo.PRIMER)  # it has learned something


def test_full_size_vocabulary() -> None:
    assert demo.train_tokenizer(demo.Size().vocabulary).get_vocab_size() == demo.Size().vocabulary


@pytest.mark.torch
def test_transformers_loads_a_model(models: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, found = AutoModelForCausalLM.from_pretrained(models / "expert-a", output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    tokens = AutoTokenizer.from_pretrained(models / "expert-a")("Merge me", return_tensors="pt")
    assert model(**tokens).logits.shape[-1] == TINY.vocabulary


# --- Running ---------------------------------------------------------------------------------------------


def test_recipes_run_from_anywhere(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(models.parent)
    written = demo.write_recipes(tmp_path, Path("models"))
    monkeypatch.chdir(tmp_path)
    for path in written.values():
        recipe = load_recipe(str(path))
        assert recipe.mixup is not None
        assert all(Path(entry.model).is_dir() for entry in recipe.models)


def test_kolmogorov_distance() -> None:
    from scipy.stats import beta, kstest, kstwo

    draws = demo.draw_ratios(200)
    expected = kstest(draws, beta(demo.ALPHA, demo.ALPHA).cdf).statistic
    assert demo.kolmogorov_distance(draws) == pytest.approx(expected, abs=1e-12)
    assert demo.kolmogorov_limit(1000) == pytest.approx(kstwo(1000).ppf(0.99), rel=0.01)


def test_the_whole_demo(tmp_path: Path) -> None:
    lines: list[str] = []
    account = demo.main(tmp_path / "a demo", lines.append, TINY)
    assert json.loads(json.dumps(account)) == account
    assert account["models"]["built"]
    assert len({merge["digest"] for merge in account["merges"]}) == len(account["merges"]) == 5
    assert all(0 < distance < 2 for merge in account["merges"] for distance in merge["distances"])
    linear = account["merges"][0]
    assert linear["distances"] == pytest.approx([1 - linear["weights"][0], linear["weights"][0]], abs=0.01)
    assert account["replay"]["same_digest"]
    assert account["replay"]["differences"] == []
    assert account["draws"]["kolmogorov_distance"] < account["draws"]["limit_99"]
    picture = (tmp_path / "a demo" / "lambda.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    assert struct.unpack(">II", picture[16:24]) == (1500, 630)
    told = "\n".join(lines)
    assert all(merge["digest"][:12] in told for merge in account["merges"])
    assert "the same" in told
    assert "'" in told.splitlines()[-1]  # a path with a space, quoted for the shell

    again = demo.main(tmp_path / "a demo", lambda _: None, TINY)
    assert not again["models"]["built"]
    assert [m["digest"] for m in again["merges"]] == [m["digest"] for m in account["merges"]]


def test_other_directories_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    with pytest.raises(M3Error, match="something else than a demo"):
        demo.main(tmp_path, print, TINY)
    (tmp_path / "file").touch()
    with pytest.raises(M3Error, match="cannot be used"):
        demo.main(tmp_path / "file", print, TINY)
    assert {path.name for path in tmp_path.iterdir()} == {"models", "file"}
