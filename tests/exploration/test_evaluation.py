"""Exploring with the decoder and real tasks, and the command."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zlib

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from safetensors.numpy import load_file, save_file
from support.tiny_models import TINY, build_models

import m3jax
from m3jax.arithmetic import threefry
from m3jax.cli import commands
from m3jax.errors import M3Error
from m3jax.evaluation import GenerationSettings, get_task, report, runner, tokens
from m3jax.evaluation.models import load_model
from m3jax.evaluation.options import check_evaluation
from m3jax.evaluation.protocol import Completion
from m3jax.evaluation.tasks.base import Judgement
from m3jax.exploration import Evaluation, Optimization, exploring, scoring
from m3jax.exploration.samples import to_hex
from m3jax.outputs.conversion import convert
from m3jax.streaming.jobs import prepared

ONE_BLOCK = TINY._replace(layers=1)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models") / "models"
    build_models(directory, ONE_BLOCK)
    rows = [json.dumps({"sentence": f"a fine film {i}", "label": i % 2}) for i in range(8)]
    (directory / "dev.jsonl").write_text("\n".join(rows))
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": str(directory / "base"),
        "models": [str(directory / e) for e in ("expert-a", "expert-b")],
        "sparsify": {"method": "dare", "density": 0.8},
        "mixup": {"alpha": 1},
        "dtype": "float32",
        "seed": 3,
    }
    (directory / "recipe.yaml").write_text(json.dumps(recipe))
    return directory


@pytest.fixture
def graded(monkeypatch):
    """Random models say nothing that a task understands: here an answer is right if its letters add up to a 3-fold."""

    def judge(examples, texts, execution):
        return [Judgement(sum(map(ord, text)) % 3 == 0, text) for text in texts]

    for module in (scoring, runner):
        monkeypatch.setattr(module, "get_task", lambda *named: get_task(*named)._replace(judge=judge))


OPTIONS = Evaluation(max_tokens=4, batch_size=4, template="none")
MESH = jax.make_mesh((4, 2), ("fsdp", "tp"), axis_types=(AxisType.Auto,) * 2)


@pytest.mark.slow
def test_samples_are_evaluated_as_the_merge_that_is_written(place, tmp_path, graded):
    """By programs that are compiled once; as `m3jax.evaluate` does it."""
    lines = []
    data, recipe = {"sst2": place / "dev.jsonl"}, place / "recipe.yaml"
    options = {"tasks": data, "samples": 5, "evaluation": OPTIONS}
    found = m3jax.explore(recipe, tmp_path / "out", tell=lines.append, strategy="draw", **options)
    compiled = [line for line in lines if line.startswith("compiling")]
    assert (
        len(compiled) == 6
    )  # beginnings, what follows, and going on; of inputs and of merges in float32, none per sample
    assert len({result.scores["sst2"] for result in found.results}) > 1
    assert found.choice.scores["sst2"] == max(result.scores["sst2"] for result in found.results)
    model = load_model(str(tmp_path / "out"))
    settings = GenerationSettings(4)
    summary = m3jax.evaluate(
        model.params, model.config, model.tokenizer, "sst2", data=data["sst2"], settings=settings, template="none"
    )
    assert summary.accuracy == found.choice.scores["sst2"]
    merged = m3jax.merge_checkpoint(recipe, tmp_path / "own")  # sample 0 is what the recipe draws by itself
    assert to_hex(found.results[0].weights) == {g: list(w["hex"]) for g, w in merged.manifest["weights"].items()}
    for reference in found.references[:3]:
        directory = place / "base" if reference.reference == "base" else reference.reference
        alone = load_model(str(directory))
        summary = m3jax.evaluate(
            alone.params, alone.config, alone.tokenizer, "sst2", data=data["sst2"], settings=settings, template="none"
        )
        assert (summary.accuracy, reference.weights) == (reference.scores["sst2"], {})


@pytest.mark.slow
def test_the_decoder_on_eight_devices_chooses_as_on_one(place, tmp_path, graded):
    options = {"tasks": {"sst2": place / "dev.jsonl"}, "samples": 5, "evaluation": OPTIONS}
    one, eight = (
        m3jax.explore(place / "recipe.yaml", tmp_path / name, mesh=mesh, **options)
        for name, mesh in (("one", None), ("eight", MESH))
    )
    assert [result[:4] for result in one.results] == [result[:4] for result in eight.results]
    assert one.choice[:4] == eight.choice[:4]
    assert one.merge.digest == eight.merge.digest


def answers_by_merge(model, *_):
    """A stand-in for a model: each merge has a rate of its own, at which it is right, the same examples first."""
    letters = np.asarray(jax.tree.leaves(model.params)[0]).tobytes()
    rate = threefry.fold_in_name(threefry.root_key(0), str(zlib.crc32(letters)))[0] / 2**32

    def generate(prompts, settings):
        hard = [threefry.fold_in_name(threefry.root_key(1), prompt)[0] / 2**32 for prompt in prompts]
        return [Completion("c" if difficulty < rate else "a", True, 1) for difficulty in hard]

    return generate


def test_what_cannot_be_the_best_is_stopped_and_nothing_else_changes(place, tmp_path, graded, monkeypatch):
    monkeypatch.setattr(scoring, "make_generator", answers_by_merge)
    (tmp_path / "more.jsonl").write_text((place / "dev.jsonl").read_text().replace("fine", "bad"))
    tasks = {"sst2": place / "dev.jsonl", "cola": tmp_path / "more.jsonl"}
    how = {
        "tasks": tasks,
        "samples": 16,
        "evaluation": OPTIONS._replace(batch_size=1),
        "overwrite": True,
        "strategy": "sobol",
    }
    recipe, out = place / "recipe.yaml", tmp_path / "out"
    one = m3jax.explore(recipe, out, **how)
    told = json.loads((tmp_path / "out.exploration" / "exploration.json").read_text())
    assert [sample["sample"] for sample in told["samples"]] == list(range(16))
    (line,) = report.collect([out]).explorations
    assert (line.strategy, line.samples, line.chosen) == ("sobol", 16, one.choice.sample)
    stopped = {result.sample: result for result in one.results if result.most is not None}
    # Another run has what was stopped from the journal, but not where it is asked for itself, or nothing is stopped.
    seen = []
    how["watch"] = lambda result, known: seen.append(known)
    named = m3jax.explore(recipe, out, select=str(next(iter(stopped))), **how)
    assert (seen.count(False), named.choice.share) == (1, 1.0)
    seen.clear()
    other = m3jax.explore(recipe, out, early_stopping=False, **how)
    assert seen.count(False) == len(stopped) - 1
    assert one.choice[:4] == other.choice[:4]
    assert one.front == other.front
    assert one.cost < 16 == other.cost
    for result in other.results:
        mine = one.results[result.sample]
        assert mine.weights == result.weights
        if result.sample in stopped:
            assert mine.share < 1
            assert all(mine.most[task] >= score for task, score in result.scores.items())


def test_parts_of_dev_data_are_seeded_nested_and_of_all_labels(place):
    (dev,) = scoring.read_devs({"sst2": place / "dev.jsonl"}, OPTIONS, threefry.root_key(3))
    (other,) = scoring.read_devs({"sst2": place / "dev.jsonl"}, OPTIONS, threefry.root_key(4))
    parts = [dev.part(share) for share in (0.25, 0.5, 1.0)]
    assert [len(part) for part in parts] == [2, 4, 8]
    assert all(example in parts[1] for example in parts[0])
    assert parts[2] == dev.examples
    assert other.order != dev.order
    assert sorted(dev.order) == list(range(8))


@pytest.mark.slow
@pytest.mark.parametrize(("loss", "mesh"), [("loss", MESH), ("entropy", None)], ids=["loss", "entropy"])
def test_learning_goes_through_the_decoder(place, tmp_path, loss, mesh):
    found = m3jax.explore(
        place / "recipe.yaml",
        tmp_path / "out",
        tasks={"sst2": place / "dev.jsonl"},
        samples=2,
        evaluation=OPTIONS,
        optimize=Optimization(loss, steps=12, learning_rate=0.1, granularity="tensor"),
        mesh=mesh,
        select="2",
    )
    assert found.losses[-1] < found.losses[0]
    assert found.choice.optimized is not None
    assert found.merge.manifest["recipe"]["mixup"]["granularity"] == "tensor"
    assert len(found.merge.manifest["weights"]) == len(found.choice.weights) > 10
    assert m3jax.replay(tmp_path / "out", tmp_path / "again").digest == found.merge.digest


def command(place, out, *more):
    tasks = ["--task", f"sst2={place / 'dev.jsonl'}", "--max-tokens", "4", "--batch-size", "4", "--template", "none"]
    return ["explore", str(place / "recipe.yaml"), str(out), *tasks, "--samples", "4", *more]


def test_the_command(place, tmp_path, capsys, graded):
    """Beside the samples stand the base, the experts and equal weights, which are scored once and never chosen."""
    experts = [place / name for name in ("expert-a", "expert-b")]
    assert commands.main(command(place, tmp_path / "out", "--strategy", "grid", "--json")) == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert [sample["weights"]["model"][0] for sample in found["samples"]] == [0, 1 / 3, 2 / 3, 1]
    assert found["choice"] in found["samples"]
    lines = said.err.splitlines()
    assert lines[0] == "loading the experts"
    assert any(line.startswith("sample 3: 1.0000 0.0000: sst2 ") for line in lines)
    assert "; 4 of 4 evaluations" in said.err
    assert commands.main(["verify", str(tmp_path / "out"), "--quiet"]) == 0
    journal = ["--journal", str(tmp_path / "out.exploration"), "--strategy", "grid", "--select", "0"]
    assert commands.main(command(place, tmp_path / "first", *journal)) == 0
    said = capsys.readouterr()
    assert "(before); 4 of 4 evaluations" in said.err
    assert "compiling" not in said.err
    assert "loading" not in said.err
    assert f"{tmp_path / 'first'}: sample 0, 4 evaluations in " in said.out
    rows = said.out.splitlines()
    assert rows[0].split() == ["sample", "expert-a", "expert-b", "sst2"]
    named = [row.split("  ")[0] for row in rows[1:9]]
    assert named[:4] == ["base", "expert-a", "expert-b", "equal weights"]
    assert sorted(named[4:]) == ["0 *", "1", "2", "3"]
    counts = [round(8 * float(row.split()[-3])) for row in rows[1:9]]
    assert all(row.endswith("]") for row in rows[1:9])
    assert ("no sample has more than" in said.out) == (max(counts[4:]) <= 2)
    assert "they flatter it: evaluate it on others" in said.out
    assert [result["reference"] for result in found["references"]] == ["base", *map(str, experts), "equal weights"]
    assert "references" not in json.loads((tmp_path / "out.exploration" / "journal.jsonl").read_text().splitlines()[0])
    assert commands.main(command(place, tmp_path / "bare", *journal[:4], "--no-references", "--json")) == 0
    assert json.loads(capsys.readouterr().out)["references"] == []


def test_with_a_picture_no_sample_is_stopped(place, tmp_path, monkeypatch):
    asked = []

    def explore(*arguments, early_stopping, **options):
        asked.append(early_stopping)
        raise M3Error("enough")

    monkeypatch.setattr("m3jax.exploration.explore", explore)
    for more in ([], ["--picture", str(tmp_path / "found.png")]):
        assert commands.main(command(place, tmp_path / "out", *more)) == 2
    assert asked == [True, False]


def test_mistakes_are_said_before_weights_are_loaded(place, tmp_path, capsys, monkeypatch):
    def never(*arguments):
        raise AssertionError("loaded weights for nothing")

    monkeypatch.setattr("m3jax.exploration.exploring.load_resident", never)
    out = tmp_path / "out"
    for arguments, sentence in [
        (command(place, out, "--task", "sst2=x"), "names a task twice"),
        (command(place, out, "--task", "cola="), "--task 'cola=' is no task"),
        (command(place, out, "--task", "gsm8k=nowhere.jsonl"), "there is no data file nowhere.jsonl"),
        (command(place, out, "--task", "alpaca_eval=x"), "alpaca_eval is judged elsewhere"),
        (command(place, out, "--select", "speed"), "select is 'speed', but must be one of mean, pareto, sst2"),
        (command(place, out, "--strategy", "all"), "strategy is 'all', but must be one of"),
        (command(place, out, "--samples", "0"), "samples: is 0, but must be"),
        (command(place, out, "--granularity", "layer"), "--granularity is for --optimize"),
        (command(place, out, "--optimize", "speed"), "--optimize is 'speed'"),
        (command(place, out, "--limit", "0"), "--limit is 0"),
        (command(place, out, "--template", "chat"), "this model's tokenizer has none"),
        (command(place, out, "--overflow", "drop"), "--overflow is 'drop'"),
        (command(place, out, "--set", "mixup.alpha=0"), "alpha"),
        (command(place, tmp_path / "no" / "out"), "does not exist"),
    ]:
        capsys.readouterr()
        assert commands.main(arguments) == 2, arguments
        assert sentence in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"limit": "5"}, "--limit is '5', but must be a whole number"),
        ({"max_tokens": 2.5}, "--max-tokens is 2.5, but must be a whole number"),
        ({"batch_size": None}, "--batch-size is None, but must be a whole number"),
        ({"overflow": None}, "--overflow is None, but must be one of"),
        ({"template": 3}, "--template is 3, but must be one of"),
    ],
)
def test_options_of_wrong_types_are_said(options, sentence):
    with pytest.raises(M3Error, match=sentence):
        check_evaluation(Evaluation(**options))


@pytest.mark.slow
def test_a_killed_command_goes_on(place, tmp_path):
    """Killed by the system between samples: nothing is repeated, and the choice is the same."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}

    def start(out):
        arguments = [*command(place, out), "--set", "mixup.alpha=0.9", "--samples", "40", "--json"]
        return subprocess.Popen(
            [sys.executable, "-m", "m3jax", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
        )

    whole = json.loads(start(tmp_path / "whole").communicate(timeout=200)[0])
    journal = tmp_path / "out.exploration" / "journal.jsonl"
    running = start(tmp_path / "out")
    while running.poll() is None and (not journal.exists() or journal.read_bytes().count(b"\n") < 8):
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    running.communicate()
    assert not (tmp_path / "out").exists()
    before = journal.read_text().splitlines()
    again = json.loads(start(tmp_path / "out").communicate(timeout=200)[0])
    after = journal.read_text().splitlines()
    assert after[: len(before) - 1] == before[:-1]
    assert len(after) == 1 + 4 + 40  # what it is of, the references, the samples
    assert again["digest"] == whole["digest"]
    assert again["choice"]["sample"] == whole["choice"]["sample"]
    assert [s["scores"] for s in again["samples"]] == [s["scores"] for s in whole["samples"]]


def swap(model):
    """Exchange the numbers of two tokens."""
    told = json.loads((model / "tokenizer.json").read_text())
    vocabulary = told["model"]["vocab"]
    one, other = sorted(vocabulary)[:2]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    (model / "tokenizer.json").write_text(json.dumps(told))


def edit(file, **entries):
    told = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**told, **entries}))


def rewrite(model):
    """Other weights in the same file, whose time is set back."""
    file = model / "model.safetensors"
    before = file.stat()
    content = file.read_bytes()
    with open(file, "r+b") as opened:
        opened.seek(-2, os.SEEK_END)
        opened.write(bytes([content[-1] ^ 1, content[-2] ^ 1]))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda model: edit(model / "config.json", rope_theta=5e5), "files beside weights"),
        (lambda model: edit(model / "generation_config.json", eos_token_id=[3, 4]), "files beside weights"),
        (lambda model: [swap(each.parent) for each in model.parent.glob("*/tokenizer.json")], "files beside weights"),
        (lambda model: (model / "chat_template.jinja").write_text("{{ messages[0]['content'] }}!"), "files beside"),
        (rewrite, "models"),
    ],
    ids=["config", "generation", "tokenizer", "template", "weights"],
)
def test_scores_of_other_models_are_not_taken_over(place, tmp_path, graded, monkeypatch, change, named):
    """Nor of a model whose files only look the same; what has the same bytes is gone on with, whatever its times."""
    monkeypatch.setattr(scoring, "make_generator", answers_by_merge)
    shutil.copytree(place, tmp_path / "models")
    models = tmp_path / "models"
    recipe = json.loads((place / "recipe.yaml").read_text().replace(str(place), str(models)))
    options = {"tasks": {"sst2": place / "dev.jsonl"}, "samples": 2, "evaluation": OPTIONS, "references": False}
    m3jax.explore(recipe, tmp_path / "out", **options)
    shutil.rmtree(tmp_path / "out")
    (models / "expert-a" / "model.safetensors").chmod(0o600)
    os.utime(models / "base" / "model.safetensors")
    seen = []
    m3jax.explore(recipe, tmp_path / "out", **options, watch=lambda result, known: seen.append(known))
    assert seen == [True, True]
    shutil.rmtree(tmp_path / "out")
    change(models / "base")
    with pytest.raises(M3Error, match=f"holds another exploration, which differs in {named}"):
        m3jax.explore(recipe, tmp_path / "out", **options)


def test_models_whose_files_look_as_they_did_are_not_read_again(place, tmp_path, graded, monkeypatch):
    monkeypatch.setattr(scoring, "make_generator", answers_by_merge)
    options = {"tasks": {"sst2": place / "dev.jsonl"}, "samples": 2, "evaluation": OPTIONS, "references": False}
    m3jax.explore(place / "recipe.yaml", tmp_path / "out", **options)
    monkeypatch.setattr(exploring, "digest_tensor", None)
    m3jax.explore(place / "recipe.yaml", tmp_path / "out", **options, overwrite=True)


def test_the_grader_that_is_asked_for_judges(place):
    devs = [
        scoring.read_devs({"sst2": place / "dev.jsonl"}, OPTIONS._replace(grader=grader), threefry.root_key(3))[0]
        for grader in ("m3jax", "paper")
    ]
    assert [dev.task.grader for dev in devs] == ["m3jax", "paper"]
    assert devs[0].identity() != devs[1].identity()


def test_samples_have_the_tokenizer_and_the_rows_of_the_union(place, tmp_path):
    shutil.copytree(place, tmp_path / "models")
    more, recipe = tmp_path / "models" / "expert-b", json.loads((place / "recipe.yaml").read_text())
    tensors = load_file(more / "model.safetensors")
    config = json.loads((more / "config.json").read_text())
    rows = config["vocab_size"]
    grown = {n: np.concatenate([v, v[:1]]) if v.shape[:1] == (rows,) else v for n, v in tensors.items()}
    save_file(grown, more / "model.safetensors")
    (more / "config.json").write_text(json.dumps({**config, "vocab_size": rows + 1}))
    tokenizer = json.loads((more / "tokenizer.json").read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokenizer["added_tokens"].append({"id": rows, "content": "<turn>", "special": True, **flags})
    (more / "tokenizer.json").write_text(json.dumps(tokenizer))
    asked = json.loads(
        json.dumps({**recipe, "tokenizer_source": "union"}).replace(str(place), str(tmp_path / "models"))
    )
    with prepared(m3jax.load_recipe(asked), tmp_path / "out") as ready:
        assert exploring._config_of(ready).vocab_size == rows + 1
        tokenizer = tokens.load_tokenizer("union", exploring._tokenizer_place(ready))
        assert tokenizer.convert_tokens_to_ids("<turn>") == rows
        embedding = ready.models[0].input.anatomy.embedding
        assert all(model.checkpoint.tensors[embedding].shape[0] == rows + 1 for model in ready.models)


@pytest.mark.slow
def test_models_of_a_jax_library_are_explored_as_those_of_hugging_face(place, tmp_path, graded):
    for name in ("base", "expert-a", "expert-b"):
        convert(place / name, tmp_path / name, "orbax", names="tunix")
    options = {"tasks": {"sst2": place / "dev.jsonl"}, "samples": 2, "evaluation": OPTIONS}
    recipe = {**json.loads((place / "recipe.yaml").read_text()), "sparsify": None}
    theirs = m3jax.explore(recipe, tmp_path / "theirs", **options)
    models = [str(tmp_path / name) for name in ("base", "expert-a", "expert-b")]
    recipe |= {"base_model": models[0], "models": models[1:]}
    ours = m3jax.explore(recipe, tmp_path / "ours", **options, optimize=Optimization(steps=1, batch_size=2))
    assert [each.scores for each in ours.results[:2]] == [each.scores for each in theirs.results]
    assert load_model(str(tmp_path / "ours")).config.num_layers == 1  # what is written is evaluated too
