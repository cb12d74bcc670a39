"""Recipes of several documents: merges that a merge starts from."""

import json
import shutil

import numpy as np
import pytest
import yaml
from support import oracle
from support.directories import read, write
from support.faults import Faults, Killed
from support.matrix import same

import m3jax
from m3jax import M3Error
from m3jax.cli.displays.merges import estimate_lines
from m3jax.streaming.estimate import estimate_recipe
from m3jax.streaming.merging import MergeResult

LAYER, NORM = "model.layers.0.mlp.weight", "model.norm.weight"


def model(seed):
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in ((LAYER, (8, 8)), (NORM, (8,)))}


@pytest.fixture
def place(tmp_path):
    for seed, name in enumerate(("base", "a", "b", "c")):
        write(tmp_path / name, model(seed))
    first = {"name": "first", "merge_method": "linear", "models": [str(tmp_path / "a"), str(tmp_path / "b")]}
    second = {"name": "second/half", "merge_method": "slerp", "base_model": "first", "models": [str(tmp_path / "c")]}
    last = {"merge_method": "dare_linear", "base_model": str(tmp_path / "base"), "models": ["second/half", "first"]}
    recipes = ({**second, "parameters": {"t": 0.25}}, first, {**last, "parameters": {"density": 0.5}})
    (tmp_path / "recipe.yaml").write_text("---\n".join(map(yaml.safe_dump, recipes)))
    return tmp_path


def expected():
    base, a, b, c = map(model, range(4))
    first = oracle.merge([a, b], method="linear", weights=(1.0, 1.0), normalize=True)
    second = oracle.merge([first, c], method="slerp", weights=0.25)
    return oracle.merge(
        [second, first], base, method="task_arithmetic", weights=(1.0, 1.0), sparsify="dare", keep=0.5, seed=0
    )


def test_documents_are_merged_in_turn_and_replayed(place):
    result = m3jax.merge_checkpoint(place / "recipe.yaml", place / "out")
    assert same(read(place / "out"), expected()) == (True, [])
    assert sorted(path.name for path in place.iterdir()) == ["a", "b", "base", "c", "out", "recipe.yaml"]
    told = json.loads((place / "out" / "m3jax.json").read_text())
    assert list(told["intermediates"]) == ["first", "second/half"]
    assert told["inputs"][1]["digest"] == told["intermediates"]["first"]["output"]["digest"]
    assert not m3jax.verify(place / "out").differences
    (place / "c").rename(place / "moved")
    moved = {str(place / "c"): str(place / "moved")}
    assert m3jax.replay(place / "out", place / "again", sources=moved).digest == result.digest
    assert (place / "again" / "m3jax.json").read_bytes() == (place / "out" / "m3jax.json").read_bytes()
    compared = m3jax.verify(place / "out", inputs=True, sources=moved)
    assert not compared.differences
    with pytest.raises(M3Error, match="was merged from merges that are made on the way"):
        m3jax.verify_sample(place / "out", sources=moved)
    told["intermediates"]["first"]["seed"] = 1
    (place / "again" / "m3jax.json").write_text(json.dumps(told))
    with pytest.raises(M3Error, match="was changed after it was written"):
        m3jax.replay(place / "again", place / "no")
    shutil.rmtree(place / "moved")
    write(place / "moved", model(9))
    with pytest.raises(M3Error, match=r"second/half: .*moved: .* is not what was merged"):
        m3jax.replay(place / "out", place / "no", sources=moved)


def test_what_was_made_is_used_again_while_it_is_the_same(place, monkeypatch):
    made = []

    def interrupted(job, processes, merge=m3jax.streaming.merging._merge_one) -> MergeResult:
        made.append(job.recipe.name)
        if job.recipe.name is None:
            raise KeyboardInterrupt
        return merge(job, processes)

    with monkeypatch.context() as patch:
        patch.setattr(m3jax.streaming.merging, "_merge_one", interrupted)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                m3jax.merge_checkpoint(place / "recipe.yaml", place / "out")
        assert made == ["first", "second/half", None, None]
        shutil.rmtree(place / "c")
        write(place / "c", model(7))
        with pytest.raises(KeyboardInterrupt):
            m3jax.merge_checkpoint(place / "recipe.yaml", place / "out")
        assert made[4:] == ["second/half", None]
        weights = place / "out.intermediates" / "0-first" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    shutil.rmtree(place / "c")
    write(place / "c", model(3))
    m3jax.merge_checkpoint(place / "recipe.yaml", place / "out")
    assert same(read(place / "out"), expected()) == (True, [])
    assert not (place / "out.intermediates").exists()


def stopped(place, last, **options):
    """The command, killed at the first call of which something is true."""
    with pytest.raises(Killed), Faults(place).until(last):
        m3jax.merge_checkpoint(place / "recipe.yaml", place / "out", **options)


LEFT = (
    "open /out/m3jax-journal",  # the output has just appeared
    "unlink /out.intermediates/0-first/model",
    "unlink /out.intermediates/0-first/m3jax.json",
    "rmdir /out.intermediates/0-first",
    "unlink /out.intermediates/0-first.identity",
    "unlink /out.intermediates/1-second%2Fhalf/model",
    "rmdir /out.intermediates",
    "unlink /out/m3jax-journal",
)


def at(told):
    """The first call of a kind after the output has appeared."""
    appeared = []

    def is_last(call):
        appeared.extend([call] if call.startswith(("rename /out.partial", "exchange /out")) else [])
        return bool(appeared) and call.startswith(told)

    return is_last


@pytest.mark.parametrize("last", LEFT)
@pytest.mark.parametrize("start", ["fresh", "overwriting"])
def test_a_crash_while_they_are_removed_is_finished_by_the_same_command(place, monkeypatch, last, start):
    before = sorted(path.name for path in place.iterdir())
    if start == "overwriting":
        m3jax.merge_checkpoint({"merge_method": "linear", "models": [str(place / "a")]}, place / "out")
    how = {"overwrite": start == "overwriting"}
    stopped(place, at(last), **how)
    assert same(read(place / "out"), expected()) == (True, [])
    left = place / "out.intermediates"
    notes = [note for note in m3jax.verify(place / "out").notes if str(left) in note]
    assert len(notes) == left.exists()
    monkeypatch.setattr(m3jax.streaming.merging, "_merge_one", None)  # nothing is merged again
    result = m3jax.merge_checkpoint(place / "recipe.yaml", place / "out", **how)
    assert "was there already: the same command was stopped as it ended" in result.notes[0]
    assert result.digest == json.loads((place / "out" / "m3jax.json").read_text())["output"]["digest"]
    assert sorted(path.name for path in place.iterdir()) == sorted([*before, "out"])
    assert not list((place / "out").glob("m3jax-journal*"))
    assert not m3jax.verify(place / "out").differences
    with pytest.raises(M3Error, match=r"out: exists already") if start == "fresh" else pytest.raises(TypeError):
        m3jax.merge_checkpoint(place / "recipe.yaml", place / "out", **how)


@pytest.mark.parametrize("last", LEFT[1:6:2])
def test_another_command_removes_what_is_left_too(place, last):
    stopped(place, at(last))
    with pytest.raises(M3Error, match="exists already"):
        m3jax.merge_checkpoint({"merge_method": "linear", "models": [str(place / "a")]}, place / "out")
    assert not (place / "out.intermediates").exists()
    assert same(read(place / "out"), expected()) == (True, [])


def test_an_output_that_was_changed_after_a_crash_is_made_again(place):
    stopped(place, at(LEFT[1]))
    weights = place / "out" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    m3jax.merge_checkpoint(place / "recipe.yaml", place / "out")
    assert same(read(place / "out"), expected()) == (True, [])
    assert not (place / "out.intermediates").exists()


def test_only_what_was_made_there_is_removed(place):
    left = place / "out.intermediates"
    for name in ("thesis", "0-first", "2-thesis", "3-mine"):
        (left / name).mkdir(parents=True)
    for name in ("thesis/a.tex", "thesis.identity", "2-thesis/a.tex", "3-mine/b.tex", "4-mine.identity"):
        (left / name).write_text("mine")
    (left / "3-mine.identity").write_text("0" * 64)
    before = {path.relative_to(left).as_posix() for path in left.rglob("*")} - {"0-first"}
    result = m3jax.merge_checkpoint(place / "recipe.yaml", place / "out")
    assert {path.relative_to(left).as_posix() for path in left.rglob("*")} == before
    assert f"{left} holds what is not of the merges that were made there" in result.notes


def test_mistakes_show_before_anything_is_made(place, monkeypatch):
    monkeypatch.setattr(m3jax.streaming.merging, "_merge_one", None)
    text = (place / "recipe.yaml").read_text()
    (place / "recipe.yaml").write_text(text + "exclude: [nothing.like.it]\n")
    with pytest.raises(M3Error, match=r"exclude\.0: 'nothing\.like\.it' matches no tensor"):
        m3jax.merge_checkpoint(place / "recipe.yaml", place / "out")
    (place / "recipe.yaml").write_text(text.replace(f"{place}/c", f"{place}/d"))
    with pytest.raises(M3Error, match=r"second/half: '.*/d' does not exist here"):
        m3jax.merge_checkpoint(place / "recipe.yaml", place / "out")
    assert not (place / "out.intermediates").exists()


def test_a_plan_of_several_documents(place):
    found = estimate_recipe(place / "recipe.yaml", place / "out")
    assert [(entry.name, entry.bytes) for entry in found.inputs][:2] == [("second/half", 288), ("first", 288)]
    assert {name: own.bytes_written for name, own in found.intermediates.items()} == {"first": 288, "second/half": 288}
    assert found.to_json()["intermediates"]["first"]["method"] == "linear"
    assert [line for line in estimate_lines(found) if line.startswith("before")] == [
        "before it, first:",
        "before it, second/half:",
    ]
    with pytest.raises(M3Error, match="first: is another document of the recipe, which only m3jax merge makes"):
        m3jax.explore(
            {
                "merge_method": "linear",
                "models": ["first", str(place / "a")],
                "mixup": {"alpha": 1},
                "intermediates": [{"name": "first", "merge_method": "linear", "models": [str(place / "b")]}],
            },
            place / "out",
            score=lambda arrays, share: {"score": 0.0},
        )
