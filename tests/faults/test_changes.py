"""A weight file is rewritten in place while a command reads it: what comes out is of one state, or nothing does."""

import io
import json
import os
import shutil
from contextlib import redirect_stderr, redirect_stdout
from unittest import mock

import jax
import numpy as np
import pytest
from support.directories import recipe
from support.faults import contents, make_inputs
from support.tiny_models import build_models

import m3jax
from m3jax import M3Error
from m3jax.checkpoints import storage
from m3jax.cli.commands import app
from m3jax.cli.shell import main
from m3jax.evaluation import Completion, models
from m3jax.outputs.extraction import extract_lora

LONG_AGO = 10**18  # so that the clock's next tick is another time


class Rewriting:
    """Before the read of a number, other bytes are in a file."""

    def __init__(self, file, content, at):
        self.file, self.content, self.at, self.reads = file, content, at, 0
        self._plain = storage.read_exactly

    def __enter__(self):
        self._patch = mock.patch.object(storage, "read_exactly", self._read)
        self._patch.start()
        return self

    def __exit__(self, *_):
        self._patch.stop()

    def _read(self, *args):
        self.reads += 1
        if self.reads == self.at:
            put(self.file, self.content)
        return self._plain(*args)


def put(file, content):
    with open(file, "r+b") as opened:  # the same file
        opened.write(content)


def negated(content, width):
    """A weight file with all tensors negated, its header as it was."""
    other = np.frombuffer(content, np.uint8).copy()
    other[8 + int.from_bytes(content[:8], "little") + width - 1 :: width] ^= 0x80
    return other.tobytes()


def check(command, file, tmp_path, width=4, stride=1):
    """Rewrites a file before each read of a command in turn; returns the sentences, and how often there was none."""
    place, first = tmp_path / "place", file.read_bytes()
    other, sentences, found = negated(first, width), [], []

    def run(content, at):
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        put(file, content)
        os.utime(file, ns=(LONG_AGO, LONG_AGO))
        with Rewriting(file, other, at) as rewriting:
            try:
                found.append(command(place))
            except M3Error as error:
                sentences.append(str(error))
        return rewriting.reads

    reads = run(first, 0)
    run(other, 0)  # which a replay refuses
    allowed, refused = found.copy(), len(sentences)
    assert len(allowed) + refused == 2
    for at in range(1, reads + 1, stride):
        run(first, at)
    put(file, first)
    assert all(one in allowed for one in found)
    return sentences[refused:], len(found) - len(allowed)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models") / "models"
    build_models(directory)
    rows = [{"sentence": f"a {word} film", "label": label} for word, label in (("bad", 0), ("good", 1), ("fine", 1))]
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("inputs")
    make_inputs(directory)
    return directory


def told(params):
    """What tells parameters from others."""
    return [float(np.asarray(leaf, np.float64).sum()) for leaf in jax.tree.leaves(params)]


@pytest.fixture
def seen(monkeypatch):
    """What models were asked to write with; they write what they are told by."""
    found = []

    def generator(model, *_):
        found.append(told(model.params))
        return lambda prompts, settings: [Completion(f"{found[-1]}", 1, finished=True) for _ in prompts]

    monkeypatch.setattr(models, "make_generator", generator)
    return found


def run(*arguments):
    """A command, as the shell gives it; what it ends with if that is not 0, is a sentence."""
    says = io.StringIO()
    with redirect_stderr(says), redirect_stdout(io.StringIO()):
        code = main(app, [str(argument) for argument in arguments])
    if code:
        assert code == 2
        raise M3Error(says.getvalue().splitlines()[-1])


def of_task(place):
    return place / "base", "--task", "sst2", "--data", place / "rows.jsonl"


def test_evaluations(place, tmp_path, seen):
    """What a run says that it is of is what its answers are of."""

    def evaluate(out):
        run("evaluate", *of_task(place), "--out", out / "out")
        records = [json.loads(line) for line in (out / "out" / "records.jsonl").read_text().splitlines()]
        return json.loads((out / "out" / "run.json").read_text())["weights"], [one["completion"] for one in records]

    sentences, _ = check(evaluate, place / "base" / "model.safetensors", tmp_path, width=2, stride=3)
    assert any("changed while it was evaluated: evaluate again once it is at rest" in one for one in sentences)


def test_attacks(place, tmp_path, seen):
    def attack(out):
        run("attack", *of_task(place), "--attack", "stresstest", "--budget", "5", "--out", out / "out")
        return seen[-1]

    sentences, _ = check(attack, place / "base" / "model.safetensors", tmp_path, width=2, stride=3)
    assert any("changed while it was loaded: load again" in one for one in sentences)


def test_replays(inputs, tmp_path):
    def replay(out):
        try:
            m3jax.replay(inputs / "merged", out / "out")
        except M3Error:
            assert not (out / "out").exists()
            raise
        return contents(out / "out")

    sentences, _ = check(replay, inputs / "expert-1" / "model.safetensors", tmp_path, stride=3)
    assert len(sentences) >= 3


def test_explorations(inputs, tmp_path):
    """The merge that is written is of the weights that were scored."""
    asked = recipe(inputs, merge_method="task_arithmetic", mixup={"alpha": 0.5}, seed=3)

    def explore(out):
        score = lambda params, share: {"sum": told(params)[0]}  # noqa: E731
        found = m3jax.explore(asked, out / "out", score=score, samples=2, select="sum")
        return [result.scores for result in found.results], contents(out / "out")

    sentences, _ = check(explore, inputs / "expert-1" / "model.safetensors", tmp_path, stride=5)
    assert any("changed while it was" in one for one in sentences)


def test_models_that_are_loaded(inputs, tmp_path):
    file = inputs / "expert-1" / "model.safetensors"
    sentences, _ = check(lambda _: told(m3jax.load(inputs / "expert-1")), file, tmp_path)
    assert any("changed while it was loaded: load again once it is at rest" in one for one in sentences)
    like = m3jax.load(inputs / "expert-1")
    sentences, _ = check(lambda _: told(m3jax.load(inputs / "expert-1", like=like)), file, tmp_path)
    assert any("changed while it was loaded: load again once it is at rest" in one for one in sentences)


def test_adapters_that_are_extracted(place, tmp_path):
    def extract(out):
        extract_lora(place / "expert-a", place / "base", out / "out", 2)
        return told(m3jax.load(out / "out" / "adapter_model.safetensors"))

    sentences, _ = check(extract, place / "base" / "model.safetensors", tmp_path, width=2, stride=3)
    assert any("changed while it was being read: extract again once it is at rest" in one for one in sentences)


def test_statistics(place, tmp_path):
    def measure(out):
        m3jax.measure_statistics(str(place / "base"), out / "out", task="sst2", data=str(place / "rows.jsonl"))
        return contents(out / "out")["model.safetensors"], (out / "out" / "m3jax-conversion.json").read_text()

    sentences, _ = check(measure, place / "base" / "model.safetensors", tmp_path, width=2, stride=11)
    assert any("changed while it was evaluated" in one for one in sentences)
