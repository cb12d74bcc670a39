"""From a model directory, or a merge in memory, to a score."""

import dataclasses
import json
import re
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from support.adapters import factors, write_adapter
from support.tiny_models import TINY, build_models

import m3jax
from m3jax.checkpoints import digest_tensor
from m3jax.cli import commands
from m3jax.decoder import DecoderConfig, load_params
from m3jax.errors import M3Error
from m3jax.evaluation import TEMPLATE_NAMES, GenerationSettings, get_task, models
from m3jax.outputs.conversion import convert

ROWS = [{"sentence": f"a fine film {'very ' * i}", "label": i % 2} for i in range(5)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models") / "models"
    build_models(directory)
    (directory / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS))
    return directory


@pytest.fixture(scope="module")
def model(place):
    return models.load_model(str(place / "expert-a"), "float32")


def weights(directory: Path):
    return {k: v for file in directory.glob("*.safetensors") for k, v in load_file(file).items()}


def test_a_model_with_an_adapter_is_the_merged_one(place, tmp_path, monkeypatch):
    base = place / "base"
    name, weight = next((n, w) for n, w in weights(base).items() if "q_proj" in n)
    lora = write_adapter(tmp_path / "lora", factors({name.removesuffix(".weight"): weight.shape}, 2, 0))
    convert(f"{base}+{lora}", tmp_path / "merged")
    ours, merged = (models.open_model(each) for each in (f"{base}+{lora}", str(tmp_path / "merged")))
    assert ours.fingerprint("error") == merged.fingerprint("error")
    monkeypatch.setattr(
        models.decoder, "load_params", lambda read, *_: {n: digest_tensor(read, n) for n in read.tensors}
    )
    assert ours.load().params == merged.load().params
    with pytest.raises(M3Error, match="is an adapter and no model"):
        models.open_model(str(lora))


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
    assert commands.main([*arguments, "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["examples"] == len(ROWS)
    assert len((tmp_path / "run" / "records.jsonl").read_text().splitlines()) == len(ROWS)
    assert commands.main([*arguments, "--resume"]) == 0
    assert "95 % interval" in capsys.readouterr().out


def test_what_needs_no_weights_is_said_before_they_are_loaded(place, tmp_path, capsys, monkeypatch):
    def never(*arguments):
        raise AssertionError("loaded weights for nothing")

    rows, out = str(place / "rows.jsonl"), str(tmp_path / "run")
    base = ["evaluate", str(place / "expert-a"), "--task", "sst2", "--max-tokens", "2", "--out", out, "--data"]
    assert commands.main([*base, rows]) == 0
    monkeypatch.setattr(models.decoder, "load_params", never)
    (tmp_path / "other.jsonl").write_text('{"text": "x"}')
    (tmp_path / "long.jsonl").write_text(json.dumps({"sentence": " positive" * 600, "label": 1}))
    (tmp_path / "file").touch()
    for arguments, sentence in [
        ([*base, "nowhere.jsonl"], "there is no data file nowhere.jsonl"),
        ([*base, str(tmp_path / "other.jsonl")], "it has the fields text, and sst2 wants label"),
        ([*base, rows], "already holds a run"),
        ([*base, rows, "--resume", "--limit", "2"], "holds another run: it differs in examples"),
        ([*base, rows, "--out", str(tmp_path / "file" / "out")], "cannot make the directory"),
        (
            [*base, str(tmp_path / "long.jsonl"), "--out", str(tmp_path / "new")],
            "tokens, which with an answer of 2 do not",
        ),
        ([*base, rows, "--out", str(tmp_path / "new"), "--template", "chat"], "this model's tokenizer has none"),
        (["evaluate", str(place / "expert-a"), "--task", "alpaca_eval", "--data", rows], "give --out DIR"),
        (["evaluate", str(place / "expert-a"), "--task", "sst2", "--include-path", "x"], "--include-path is for"),
        ([*base, rows, "--apply-chat-template"], "--apply-chat-template is for --harness: give --template chat"),
    ]:
        capsys.readouterr()
        assert commands.main(arguments) == 2, arguments
        assert sentence in capsys.readouterr().err
    assert commands.main([*base, rows, "--resume"]) == 0  # a finished run is only shown
    assert "5 of 5 examples were done before" in capsys.readouterr().err


def test_without_the_harness_no_weights_are_loaded(place, tmp_path, capsys, monkeypatch):
    for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model"):
        monkeypatch.setitem(sys.modules, name, None)
    assert commands.main(["evaluate", str(place / "no-model"), "--harness", "arc_easy"]) == 2
    assert "pip install 'm3jax[eval]'" in capsys.readouterr().err
    (tmp_path / "harness.json").touch()
    assert commands.main(["evaluate", str(place / "no-model"), "--harness", "arc_easy", "--out", str(tmp_path)]) == 2
    assert "harness.json is already there: give another output directory" in capsys.readouterr().err


def test_an_interruption_says_what_is_kept(place, tmp_path, capsys, monkeypatch):
    batches = []

    def interrupted(*arguments, **options):
        batches.append(arguments)
        if len(batches) == 2:
            raise KeyboardInterrupt
        return generate(*arguments, **options)

    generate = models.decoder.generate
    monkeypatch.setattr(models.decoder, "generate", interrupted)
    arguments = ["evaluate", str(place / "expert-a"), "--task", "sst2", "--data", str(place / "rows.jsonl")]
    arguments += ["--max-tokens", "2", "--batch-size", "2", "--out", str(tmp_path)]
    assert commands.main(arguments) == 130
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == f"m3jax: interrupted: 2 examples are in {tmp_path}, and the same command with --resume goes on."
    assert commands.main([*arguments, "--resume", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["examples"] == len(ROWS)


def test_a_model_of_ones_own_stands_in_for_the_decoder(model, place, tmp_path):
    """It says "positive" token by token, whatever it is shown; the parameters are its own."""
    end = model.tokenizer.eos_token_id
    answer = [*model.tokenizer.encode(" positive", add_special_tokens=False), end]
    shapes = []

    def apply_fn(params, tokens, lengths):
        shapes.append((tokens.shape, tokens.dtype, lengths.shape, lengths.dtype))
        prompt = jnp.max(jnp.where(tokens == params["mark"], jnp.arange(tokens.shape[1]), -1), axis=1)
        place = jnp.arange(tokens.shape[1])[None, :] - prompt[:, None]
        return jax.nn.one_hot(jnp.asarray(answer)[jnp.clip(place, 0, len(answer) - 1)], 320)

    told = []
    options = {"data": place / "rows.jsonl", "settings": GenerationSettings(16), "batch_size": 4, "template": "none"}
    mark = model.tokenizer.encode("Answer:")[-1]
    summary = m3jax.evaluate(
        {"mark": jnp.int32(mark)}, None, model.tokenizer, "sst2", apply_fn=apply_fn, tell=told.append, **options
    )
    assert (summary.examples, summary.unparsed, summary.correct) == (5, 0, 2)
    assert {(len(tokens), len(lengths)) for tokens, _, lengths, _ in shapes} == {(2, 1)}
    assert {(str(tokens), str(lengths)) for _, tokens, _, lengths in shapes} == {("int32", "int32")}
    assert any(line.startswith("compiling prefill for 4 x") for line in told)
    assert re.match(r"5 of 5 examples, .*/s in ", told[-1])


def test_calls_that_cannot_be_followed_are_said_at_once(model, capfd):
    for options, sentence in [
        ({"overflow": "drop"}, "overflow is 'drop', but must be one of error, truncate, skip"),
        ({"resume": True}, "needs fingerprint=TEXT"),
        ({"config": None}, "give the content of the model's config.json, or an apply_fn"),
        ({"data": "nowhere.jsonl"}, "there is no data file nowhere.jsonl"),
        ({"data": ROWS}, "but must be the path of a file, or a hub data set as text"),
    ]:
        config = options.pop("config", model.config)
        with pytest.raises(M3Error, match=re.escape(sentence)):
            m3jax.evaluate({}, config, model.tokenizer, "sst2", **options)


def test_the_help_names_all_templates(capsys):
    assert commands.main(["evaluate", "--help"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert all(name in said.partition("Prompt template: ")[2].partition("[default")[0] for name in TEMPLATE_NAMES)


def test_answers_end_where_max_tokens_says(model, place, tmp_path):
    options = {"data": place / "rows.jsonl"}
    given = [{"max_tokens": 3}, {"settings": get_task("sst2").settings._replace(max_tokens=3)}]
    for number, how in enumerate(given):
        out = tmp_path / str(number)
        m3jax.evaluate(model.params, model.config, model.tokenizer, "sst2", out_dir=out, **how, **options)
    assert (tmp_path / "0" / "records.jsonl").read_text() == (tmp_path / "1" / "records.jsonl").read_text()
    with pytest.raises(M3Error, match="max tokens"):
        m3jax.evaluate(model.params, model.config, model.tokenizer, "sst2", max_tokens=0, **options)


def test_nothing_is_printed_unless_asked_for(model, place, capfd):
    options = {"data": place / "rows.jsonl", "max_tokens": 2}
    m3jax.evaluate(model.params, model.config, model.tokenizer, "sst2", **options)
    assert capfd.readouterr() == ("", "")


def test_draws_of_a_prompt_differ_and_are_each_the_same_again(model):
    generator = models.make_generator(model)
    drawn = [
        [one.text for one in generator(["The ratio of", "A merge"], GenerationSettings(12, temperature=1.0, draw=draw))]
        for draw in (0, 1, 1)
    ]
    assert drawn[1] == drawn[2]
    assert drawn[0][0] != drawn[1][0]
    assert drawn[0][1] != drawn[1][1]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "--task NAME or --harness"),
        (["--task", "gsm9k"], "gsm9k"),
        (["--task", "sst2", "--overflow", "drop"], "--overflow"),
        (["--task", "sst2", "--profile", "paper"], "--profile is 'paper', but must be one of m3jax, m3-paper"),
        (["--task", "sst2", "--num-fewshot", "1"], "--num-fewshot is for --harness"),
        (["--harness", "arc_easy", "--profile", "m3-paper"], "--profile has no meaning with --harness"),
        (["--task", "sst2", "--limit", "0"], "--limit"),
        (["--task", "sst2", "--resume"], "--resume needs --out"),
        (["--harness", "arc_easy", "--data", "x"], "--data has no meaning with --harness"),
        (["--harness", ","], "names no task"),
        (["--task", "humaneval", "--data", "x.jsonl"], "--run-code"),
    ],
)
def test_wrong_options_are_said_in_one_sentence(place, capsys, arguments, sentence):
    assert commands.main(["evaluate", str(place / "expert-a"), *arguments]) == 2
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


@pytest.mark.slow
def test_parameters_on_a_mesh(place, model):
    mesh = models.make_mesh("fsdp=2,tp=2")
    spread = model._replace(params=load_params(place / "expert-a", model.config, "float32", mesh))
    settings = GenerationSettings(8)
    prompts = ["The ratio of", "A merge of two"]
    assert models.make_generator(spread)(prompts, settings) == models.make_generator(model)(prompts, settings)


def test_the_tokenizers_own_end_ends_a_text(model):
    """Even where no config names it, and where a task gives a special token as a stop string."""
    from m3jax.evaluation.tokens import stop_tokens

    tokenizer, config = model.tokenizer, dataclasses.replace(model.config, stop_token_ids=())
    assert stop_tokens(tokenizer, config, ()) == (tokenizer.eos_token_id,)
    assert tokenizer.bos_token_id in stop_tokens(tokenizer, config, (tokenizer.bos_token, "\n"))


def test_cut_prompts_keep_their_beginning(model):
    from m3jax.decoder import encode
    from m3jax.evaluation.tokens import shorten

    text = encode(model.tokenizer, "merge " * 50)
    cut = shorten(model.tokenizer, text, 10)
    assert len(cut) == 10
    assert cut[-9:] == text[-9:]
    if text[0] == model.tokenizer.bos_token_id:
        assert cut[0] == text[0]


def test_a_run_does_not_go_on_with_other_weights(place, tmp_path, capsys):
    here = tmp_path / "model"
    shutil.copytree(place / "expert-a", here)
    arguments = ["evaluate", str(here), "--task", "sst2", "--data", str(place / "rows.jsonl"), "--max-tokens", "2"]
    arguments += ["--out", str(tmp_path / "run")]
    assert commands.main(arguments) == 0
    assert commands.main([*arguments, "--resume"]) == 0
    assert commands.main([*arguments, "--resume", "--dtype", "float32"]) == 2
    shutil.rmtree(here)
    shutil.copytree(place / "expert-b", here)
    assert commands.main([*arguments, "--resume"]) == 2
    capsys.readouterr()


def test_scores_where_a_token_spans_the_cut_and_of_nothing(model):
    score = models.make_scorer(model)
    nothing, spanning = score([("The", ""), ("The rat", "io of")])
    assert nothing == (0.0, True, False)
    assert spanning.sum < 0
    spanned, alone = score([("T", "he ratio"), ("", "The ratio")])
    if len(model.tokenizer.encode("T", add_special_tokens=False)) == 1:  # one token begins in the context
        assert spanned.sum < 0
    ids = model.tokenizer.encode("The ratio", add_special_tokens=False)
    (same,) = score([([model.tokenizer.bos_token_id], ids)])
    assert np.isclose(same.sum, alone.sum, atol=1e-4)


def test_a_run_of_a_jax_library_is_the_model_that_it_is(place, model, tmp_path):
    (tmp_path / "run/checkpoints/7").mkdir(parents=True)
    convert(place / "expert-a", tmp_path / "run/checkpoints/7/items", "orbax", names="tunix")
    for file in (tmp_path / "run/checkpoints/7/items").glob("*.json"):
        if not file.name.startswith("m3jax"):
            file.rename(tmp_path / "run" / file.name)
    found = models.load_model(str(tmp_path / "run"), "float32")
    assert found.config == model.config
    again = models.load_model(str(tmp_path / "run/checkpoints/7"), "float32", config=place / "expert-a")
    for other in (found, again):
        jax.tree.map(np.testing.assert_array_equal, model.params, other.params)
    (tmp_path / "run/config.json").unlink()
    with pytest.raises(M3Error, match=r"no config.json beside its weights or above its steps: give Hugging .*--config"):
        models.open_model(str(tmp_path / "run"))


def test_a_run_goes_on_with_the_same_tokenizer_alone(tmp_path: Path) -> None:
    """Not with one of as many tokens that have other numbers, nor with another chat template."""
    build_models(tmp_path / "models", TINY._replace(layers=1))
    model, found = tmp_path / "models" / "base", []
    told = json.loads((model / "tokenizer.json").read_text())
    vocabulary = told["model"]["vocab"]
    one, other = sorted(vocabulary)[:2]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    for name, text in ((None, ""), ("tokenizer.json", json.dumps(told)), ("chat_template.jinja", "{{ messages }}")):
        if name is not None:
            (model / name).write_text(text)
        found.append(models.open_model(str(model)).fingerprint("error"))
    assert len(set(found)) == 3
