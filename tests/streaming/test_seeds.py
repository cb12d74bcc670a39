"""Merges of several seeds: each as it would be alone, kept when it is there, refused together where they cannot be."""

import json
import shutil

import numpy as np
import pytest
import yaml
from support.directories import write

import m3jax
from m3jax import M3Error
from m3jax.cli.commands import app
from m3jax.cli.shell import main
from m3jax.streaming import seeds

LAYER = "model.layers.{}.mlp.weight"
CONFIG = {"model_type": "llama", "num_hidden_layers": 2}


@pytest.fixture
def place(tmp_path):
    for seed, name in enumerate(("base", "a", "b")):
        rng = np.random.default_rng(seed)
        tensors = {LAYER.format(i): rng.standard_normal((8, 8)).astype(np.float32) for i in range(2)}
        write(tmp_path / name, tensors, CONFIG)
    return tmp_path


def asked(place, **keys):
    return {"merge_method": "linear", "models": [str(place / "a"), str(place / "b")], "mixup": {"alpha": 0.5}, **keys}


def saved(place, **keys):
    (place / "recipe.yaml").write_text(yaml.safe_dump(asked(place, **keys)))
    return str(place / "recipe.yaml")


def test_each_is_the_merge_of_its_seed_alone(place):
    made = m3jax.merge_seeds(asked(place, seeds="3..4, 11"), place / "out")
    assert [one.directory.name for one in made] == ["seed-03", "seed-04", "seed-11"]
    for one in made:
        alone = m3jax.merge_checkpoint(asked(place, seed=one.seed), place / f"alone-{one.seed}")
        assert one.digest == alone.digest
        assert (one.directory / "m3jax.json").read_bytes() == (alone.directory / "m3jax.json").read_bytes()
    assert m3jax.replay(place / "out" / "seed-11", place / "again").digest == made[2].digest
    assert len({one.digest for one in made}) == 3
    # Killed after the second: what is finished is kept, what was changed or is of another recipe is not.
    shutil.rmtree(place / "out" / "seed-11")
    told = []
    again = m3jax.merge_seeds(asked(place, seeds="3..4, 11"), place / "out", tell=told.append)
    assert [(one.digest, one.kept) for one in again] == [(one.digest, one.seed != 11) for one in made]
    assert told == ["2 merges of 3 finished before and kept"]
    weights = next((place / "out" / "seed-04").glob("*.safetensors"))
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + b"?")
    with pytest.raises(M3Error, match="seed-04: exists already: choose another output, or pass --overwrite"):
        m3jax.merge_seeds(asked(place, seeds="3..4"), place / "out")
    mended = m3jax.merge_seeds(asked(place, seeds="3..4"), place / "out", overwrite=True)
    assert [one.kept for one in mended] == [True, False]
    assert weights.read_bytes() == whole
    with pytest.raises(M3Error, match="seed-03: exists already"):
        m3jax.merge_seeds(asked(place, seeds="3..4", dtype="bfloat16"), place / "out")


def test_inputs_that_are_touched_are_told_by_their_digests(place):
    again = lambda **more: m3jax.merge_seeds(asked(place, seeds="0..1"), place / "out", **more)  # noqa: E731
    again()
    weights = place / "a" / "model.safetensors"
    whole = weights.read_bytes()
    weights.unlink()
    weights.write_bytes(whole)
    stages = []
    assert [one.kept for one in again(progress=lambda step: stages.append(step.stage))] == [True, True]
    assert {stage for stage in stages if str(place / "a") in stage} == {f"seed 0: verifying {place / 'a'}"}  # once
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(M3Error, match="seed-00: exists already"):
        again()


def test_a_merge_that_ended_just_after_it_appeared_is_kept(place, monkeypatch):
    merge = seeds.merge_checkpoint

    def dying(*given, **how):
        merge(*given, **how)
        raise KeyboardInterrupt

    monkeypatch.setattr(seeds, "merge_checkpoint", dying)
    with pytest.raises(KeyboardInterrupt):
        m3jax.merge_seeds(asked(place, seeds="0..1"), place / "out")
    monkeypatch.undo()
    assert [one.kept for one in m3jax.merge_seeds(asked(place, seeds="0..1"), place / "out")] == [True, False]


@pytest.mark.parametrize("base", [False, True])
def test_statistics_are_of_every_seed(place, base):
    for name in ("a", "b"):
        write(place / f"of-{name}", {LAYER.format(i): np.full((8, 8), i + 1, np.float32) for i in range(2)}, CONFIG)
    models = [{"model": str(place / name), "statistics": str(place / f"of-{name}")} for name in ("a", "b")]
    told = {"merge_method": "fisher", "models": models} | ({"base_model": str(place / "base")} if base else {})
    made = m3jax.merge_seeds(asked(place, **told, seeds="1..2"), place / "out")
    alone = m3jax.merge_checkpoint(asked(place, **told, seed=2), place / "alone")
    assert made[1].manifest == alone.manifest
    assert [one.kept for one in m3jax.merge_seeds(asked(place, **told, seeds="1..2"), place / "out")] == [True, True]


def test_documents_and_the_option(place):
    """`--seeds` is `--seed` in every document, the key `seeds` is `seed` in the last one."""
    first = {**asked(place), "name": "first"}
    last = {**asked(place), "models": ["first", str(place / "b")]}
    path = place / "documents.yaml"
    path.write_text(yaml.safe_dump_all([first, last]))
    by_option = m3jax.merge_seeds(path, place / "option", seeds=[5, 6])
    path.write_text(yaml.safe_dump_all([first, {**last, "seeds": [5, 6]}]))
    by_key = m3jax.merge_seeds(path, place / "key")
    seeds_of = [[one.manifest["intermediates"]["first"]["seed"] for one in made] for made in (by_option, by_key)]
    assert seeds_of == [[5, 6], [0, 0]]
    for made, spec in ((by_option[1], first | {"seed": 6}), (by_key[1], first)):
        path.write_text(yaml.safe_dump_all([spec, {**last, "seed": 6}]))
        assert m3jax.merge_checkpoint(path, place / f"alone-{made.directory.parent.name}").digest == made.digest
    path.write_text(yaml.safe_dump_all([first, {**last, "seeds": [5, 6]}]))
    assert [one.kept for one in m3jax.merge_seeds(path, place / "key")] == [True, True]


def test_plan_explanation_and_result_are_lists(place, capsys):
    recipe, out = saved(place, seeds="0..2"), str(place / "out")
    assert main(app, ["merge", recipe, out, "--plan", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert main(app, ["merge", recipe, out, "--explain", "--json"]) == 0
    explained = json.loads(capsys.readouterr().out)
    assert main(app, ["merge", recipe, out, "--explain"]) == 0
    text = capsys.readouterr().out
    assert not (place / "out").exists()
    assert main(app, ["merge", recipe, out, "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    for told in (planned, explained, made):
        assert [one["seed"] for one in told] == [0, 1, 2]
    for plan, explanation, one in zip(planned, explained, made, strict=True):
        drawn = [float(weight) for weight in one["weights"]["model"]["decimal"]]
        assert plan["weights"]["model"] == explanation["drawn"]["model"] == drawn
        assert (plan["directory"], plan["finished"]) == (one["directory"], False)
        assert (
            explanation["recipe"]
            == json.loads((place / "out" / f"seed-0{one['seed']}" / "m3jax.json").read_text())["recipe"]
        )
        assert f"{drawn[0]:.6f}  {drawn[1]:.6f}" in text
    assert main(app, ["merge", recipe, out, "--plan"]) == 0
    assert "is there\n\n0 merges to be made" in capsys.readouterr().out
    assert main(app, ["merge", recipe, out]) == 0
    said = capsys.readouterr()
    assert said.out.count("  kept  ") == 3
    assert "3 merges of 3 finished before and kept" in said.err


def test_what_cannot_be_merged_with_several_seeds_is_one_sentence(place, capsys, monkeypatch):
    recipe, out = saved(place, seeds="0..2"), str(place / "out")
    one = str(place / "one.yaml")
    (place / "one.yaml").write_text(yaml.safe_dump(asked(place)))
    given = str(place / "given.yaml")
    (place / "given.yaml").write_text(yaml.safe_dump(asked(place, mixup=None)))
    dare = asked(place, merge_method="dare_linear", base_model=str(place / "base"), mixup=None)
    (place / "dangling").symlink_to("nowhere")
    (place / "kept.yaml").write_text(yaml.safe_dump({**dare, "parameters": {"density": 1.0}, "seeds": "0..2"}))
    for arguments, said in (
        (["merge", recipe, out, "--seed", "1", "--seeds", "0..2"], "--seeds: given together with --seed"),
        (["merge", one, out, "--seeds", "2..0"], "--seeds: 2..0 runs backwards; write 0..2"),
        (["merge", given, out, "--seeds", "0..2"], "so that all merges would be the same; give --seed"),
        (["merge", str(place / "kept.yaml"), out], "nothing is drawn here, as all is kept (density 1)"),
        (["merge", recipe, out, "--step", "4"], "--step: writes one step of a run, and each seed's merge a directory"),
        (["merge", recipe, "s3://bucket/out"], "merges of several seeds are made on this disk"),
        (
            ["merge", recipe, str(place / "a" / "config.json")],
            "is no directory, and merges of several seeds go into one",
        ),
        (["merge", recipe, str(place / "dangling")], "is no directory, and merges of several seeds go into one"),
        (
            ["explore", recipe, out, "--task", "gsm8k=x"],
            "seeds: asks m3jax merge for several merges, while explore draws",
        ),
    ):
        assert main(app, arguments) == 2, arguments
        captured = capsys.readouterr()
        *notes, sentence = captured.err.splitlines()
        assert said in sentence, captured.err
        assert all(note.startswith("note: ") for note in notes)
        assert not captured.out
    with pytest.raises(M3Error, match="which m3jax merge and merge_seeds make: write one seed here"):
        m3jax.merge_checkpoint(asked(place, seeds=[1, 2]), out)
    with pytest.raises(M3Error, match="the recipe has none, so it is of one merge"):
        m3jax.merge_seeds(asked(place), out)
    m3jax.merge_checkpoint(asked(place), out)
    with pytest.raises(M3Error, match="is itself a merge"):
        m3jax.merge_seeds(asked(place, seeds=[1, 2]), out)
    full = shutil.disk_usage(place)._replace(free=1000)
    monkeypatch.setattr(seeds.shutil, "disk_usage", lambda _: full)
    for flags in (["--plan"], []):
        assert main(app, ["merge", recipe, str(place / "many"), *flags]) == 2
        assert "3 merges of 512 B take 1.5 kB, and the disk has 1.0 kB free" in capsys.readouterr().err
    assert not (place / "many").exists()
