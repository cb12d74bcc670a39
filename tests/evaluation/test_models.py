"""From a model directory, or a merge in memory, to a score."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import m3jax
from m3jax import cli, demo
from m3jax.decoder import DecoderConfig, load_params
from m3jax.errors import M3Error
from m3jax.evaluation import GenerationSettings, models

TINY = demo.Size(vocabulary=320, hidden=32, intermediate=48, layers=2, heads=4, key_value_heads=2, shard=10**9)
ROWS = [{"sentence": f"a fine film {'very ' * i}", "label": i % 2} for i in range(5)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models") / "models"
    demo.build_models(directory, TINY)
    (directory / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS))
    return directory


@pytest.fixture(scope="module")
def model(place):
    return models.load_model(str(place / "expert-a"), "float32")


def weights(directory: Path):
    return {k: v for file in directory.glob("*.safetensors") for k, v in load_file(file).items()}


@pytest.mark.slow
def test_generation_does_not_depend_on_the_batch(model):
    prompts = ["The ratio of", "A merge", "A long prompt about many things that have been merged before"]
    for settings in (GenerationSettings(12), GenerationSettings(12, temperature=0.8, top_p=0.9, seed=3)):
        generator = models.make_generator(model)
        together = generator(prompts, settings)
        assert [generator([prompt], settings)[0] for prompt in prompts] == together
        assert all(c.tokens <= 12 for c in together)


def test_stop_strings_are_cut_off(model):
    (whole,) = models.make_generator(model)(["The ratio of"], GenerationSettings(16))
    stop = whole.text[4:6]
    (cut,) = models.make_generator(model)(["The ratio of"], GenerationSettings(16, stop=(stop,)))
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finished


def test_long_prompts_are_never_passed_over_in_silence(model):
    long = "merge " * model.config.context_length
    with pytest.raises(M3Error, match="tokens"):
        models.make_generator(model)([long], GenerationSettings(4))
    (skipped,) = models.make_generator(model, "skip")([long], GenerationSettings(4))
    assert skipped.skipped
    (cut,) = models.make_generator(model, "truncate")([long], GenerationSettings(4))
    assert cut.prompt_truncated


def test_scores_of_pieces_add_up(model):
    """log p(ab | c) = log p(a | c) + log p(b | c a), where the cut is between tokens."""
    score = models.make_scorer(model)
    (whole,) = score([("The", " ratio of a merge")])
    parts = score([("The", " ratio of"), ("The ratio of", " a merge")])
    assert np.isclose(whole.sum, sum(p.sum for p in parts), atol=1e-3)
    (alone,) = score([("", "The ratio")])
    assert alone.sum < 0


@pytest.mark.slow
def test_a_merge_in_memory_scores_like_the_one_on_disk(place, tmp_path):
    recipe = {
        "merge_method": "linear",
        "models": [str(place / e) for e in ("expert-a", "expert-b")],
        "mixup": {"alpha": 1},
    }
    m3jax.merge_checkpoint({**recipe, "dtype": "float32"}, tmp_path / "merged")
    experts = [weights(place / name) for name in ("expert-a", "expert-b")]
    merged = m3jax.merge(experts, weights=m3jax.mixup(1.0), key=0, dtype="float32")
    written = models.load_model(str(tmp_path / "merged"))
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    options = {"data": place / "rows.jsonl", "settings": GenerationSettings(8), "batch_size": 4}
    one = m3jax.evaluate(merged, config, written.tokenizer, "sst2", out_dir=tmp_path / "one", **options)
    own = m3jax.evaluate(written.params, written.config, written.tokenizer, "sst2", out_dir=tmp_path / "two", **options)
    assert one == own
    records = [(tmp_path / run / "records.jsonl").read_text() for run in ("one", "two")]
    assert records[0] == records[1]


def test_the_command(place, tmp_path, capsys):
    arguments = ["evaluate", str(place / "expert-a"), "--task", "sst2", "--data", str(place / "rows.jsonl")]
    arguments += ["--max-tokens", "4", "--out", str(tmp_path / "run"), "--dtype", "float32"]
    assert cli.main([*arguments, "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["examples"] == len(ROWS)
    assert len((tmp_path / "run" / "records.jsonl").read_text().splitlines()) == len(ROWS)
    assert cli.main([*arguments, "--resume"]) == 0
    assert "95 % interval" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "--task NAME or --harness"),
        (["--task", "gsm9k"], "gsm9k"),
        (["--task", "sst2", "--overflow", "drop"], "--overflow"),
        (["--task", "sst2", "--limit", "0"], "--limit"),
        (["--task", "sst2", "--resume"], "--resume needs --out"),
        (["--harness", "arc_easy", "--data", "x"], "--data has no meaning with --harness"),
        (["--harness", ","], "names no task"),
        (["--task", "humaneval", "--data", "x.jsonl"], "--run-code"),
    ],
)
def test_wrong_options_are_said_in_one_sentence(place, capsys, arguments, sentence):
    assert cli.main(["evaluate", str(place / "expert-a"), *arguments]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert sentence in said[-1]


def test_tokenizers_that_do_not_fit(place, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(place / "expert-a", bare, ignore=shutil.ignore_patterns("*token*"))
    with pytest.raises(M3Error, match="has no tokenizer"):
        models.load_model(str(bare))
    config = DecoderConfig.from_directory(place / "expert-a")

    class Wide:
        vocab_size = config.vocab_size + 1

    with pytest.raises(M3Error, match="tokens, but its embedding only"):
        m3jax.evaluate({}, config, Wide(), "sst2")


@pytest.mark.parametrize("axes", ["tp", "tp=0", "rows=2", "tp=2,tp=2", "fsdp=4,tp=4"])
def test_meshes_that_cannot_be(axes):
    with pytest.raises(M3Error, match="--mesh"):
        models.make_mesh(axes)


def test_parameters_on_a_mesh(place, model):
    mesh = models.make_mesh("fsdp=2,tp=2")
    spread = model._replace(params=load_params(place / "expert-a", model.config, "float32", mesh))
    settings = GenerationSettings(8)
    prompts = ["The ratio of", "A merge of two"]
    assert models.make_generator(spread)(prompts, settings) == models.make_generator(model)(prompts, settings)


def test_the_tokenizers_own_end_ends_a_text(model):
    """Even where no config names it, and where a task gives a special token as a stop string."""
    from m3jax.evaluation.models import _stop_tokens

    tokenizer, config = model.tokenizer, dataclasses.replace(model.config, stop_token_ids=())
    assert _stop_tokens(tokenizer, config, ()) == (tokenizer.eos_token_id,)
    assert tokenizer.bos_token_id in _stop_tokens(tokenizer, config, (tokenizer.bos_token, "\n"))


def test_cut_prompts_keep_their_beginning(model):
    from m3jax.evaluation.models import _encode, _shortened

    text = _encode(model.tokenizer, "merge " * 50)
    cut = _shortened(model.tokenizer, text, 10)
    assert len(cut) == 10
    assert cut[-9:] == text[-9:]
    if text[0] == model.tokenizer.bos_token_id:
        assert cut[0] == text[0]


def test_a_run_does_not_go_on_with_other_weights(place, tmp_path, capsys):
    here = tmp_path / "model"
    shutil.copytree(place / "expert-a", here)
    arguments = ["evaluate", str(here), "--task", "sst2", "--data", str(place / "rows.jsonl"), "--max-tokens", "2"]
    arguments += ["--out", str(tmp_path / "run")]
    assert cli.main(arguments) == 0
    assert cli.main([*arguments, "--resume"]) == 0
    assert cli.main([*arguments, "--resume", "--dtype", "float32"]) == 2
    shutil.rmtree(here)
    shutil.copytree(place / "expert-b", here)
    assert cli.main([*arguments, "--resume"]) == 2
    capsys.readouterr()


def test_scores_where_a_token_spans_the_cut_and_of_nothing(model):
    score = models.make_scorer(model)
    nothing, spanning = score([("The", ""), ("The rat", "io of")])
    assert nothing == (0.0, True)
    assert spanning.sum < 0
