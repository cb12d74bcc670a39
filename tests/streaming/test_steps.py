"""Steps of runs in recipes of slices, modules and several documents, and with adapters."""

from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest
import yaml
from support.adapters import factors, write_adapter
from support.directories import read, write

from m3jax import M3Error, convert, load_recipe, merge_checkpoint, replay, verify
from m3jax.checkpoints import open_checkpoint
from m3jax.cli.commands import app
from m3jax.cli.shell import main
from m3jax.streaming import intermediates
from m3jax.streaming.explaining import explain_recipe
from m3jax.streaming.steps import with_steps

pytestmark = pytest.mark.filterwarnings("ignore:Sharding info not provided")  # as for the original

MODULES = {f"model.layers.{layer}.mlp.up_proj": (6, 4) for layer in range(2)}
EMA = {"method": "ema", "decay": 0.5}  # of two steps a third and two thirds


def weights(seed):
    rng = np.random.default_rng(seed)
    shapes = {f"{module}.weight": shape for module, shape in MODULES.items()} | {"model.norm.weight": (4,)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def tree(tensors):
    found = {}
    for name, value in tensors.items():
        *path, last = name.split(".")
        place = found
        for key in path:
            place = place.setdefault(key, {})
        place[last] = value
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A run of Hugging Face's trainer, one of Orbax with the same weights, a base of Orbax, and adapters."""
    place = tmp_path_factory.mktemp("steps")
    with ocp.CheckpointManager(place / "orbax") as manager:
        for step in (10, 20):
            write(place / "run" / f"checkpoint-{step}", weights(step), {"model_type": "llama", "num_hidden_layers": 2})
            manager.save(step, args=ocp.args.Composite(model=ocp.args.PyTreeSave(tree(weights(step)))))
        manager.wait_until_finished()
    with ocp.CheckpointManager(place / "base") as manager:
        manager.save(1, args=ocp.args.Composite(model=ocp.args.PyTreeSave(tree(weights(0)))))
        manager.wait_until_finished()
    write_adapter(place / "adapter", factors(MODULES, 2, 0))
    for step in (5, 6):
        write_adapter(place / "adapters" / f"checkpoint-{step}", factors(MODULES, 2, step))
    return place


def sliced(place, sources, base):
    """Two slices, each with its sources and a base of its own."""
    return [
        {"sources": [{"model": f"{place}/{name}", "layer_range": [i, i + 1]} for name in sources], "base_model": base}
        for i in range(2)
    ]


def test_sources_of_slices_and_models_of_modules_are_steps(place, tmp_path) -> None:
    told = {"merge_method": "task_arithmetic", "slices": sliced(place, ["run@last:2"], f"{place}/run@10")}
    told["slices"][1]["base_model"] = f"{place}/base"
    result = merge_checkpoint(told, tmp_path / "out")
    written = {**told, "slices": sliced(place, ["run@10", "run@20"], f"{place}/run@10")}
    written["slices"][1]["base_model"] = f"{place}/base@1"
    assert result.manifest["recipe"] == load_recipe(written).resolved()
    assert result.digest == merge_checkpoint(written, tmp_path / "written").digest
    assert replay(tmp_path / "out", tmp_path / "again").digest == result.digest
    explained, plainly = (explain_recipe(each, tmp_path / "none") for each in (told, written))
    assert (explained.models, explained.groups) == (plainly.models, plainly.groups)

    shared = {"parameters": {"weight": 0.6}, "slices": sliced(place, ["run@last:2", "run"], None)}
    whole = {"models": [{"model": f"{place}/run@last:2", "parameters": {"weight": 0.3}}]}
    told = {"merge_method": "linear", "schedule": EMA, "modules": {"text_decoder": shared, "vision_tower": whole}}
    found, notes = with_steps(load_recipe(told))
    text, vision = found.modules["text_decoder"], found.modules["vision_tower"]
    sources = [[(each.model, each.parameters.get("weight")) for each in part.sources] for part in text.slices]
    names = [f"{place}/run@10", f"{place}/run@20", f"{place}/run@20"]
    assert [[name for name, _ in part] for part in sources] == [names, names]
    assert [weight for _, weight in sources[1]] == pytest.approx([0.2, 0.4, None])
    assert [each.parameters["weight"] for each in vision.models] == pytest.approx([0.1, 0.2])
    assert f"{place}/run@last:2: the steps 10, 20 are read" in notes


def documents(place, **keys):
    average = {"name": "average", "merge_method": "linear", "models": [f"{place}/orbax@last:2"], "schedule": EMA}
    models = ["average", f"{place}/orbax"]
    told = {"merge_method": "task_arithmetic", "base_model": f"{place}/base", "models": models}
    return {**told, "intermediates": [{**average, **keys}]}


def test_the_output_alone_of_several_documents_is_of_a_format_and_a_run(place, tmp_path, monkeypatch) -> None:
    class Killed(BaseException):
        pass

    def killed(*_):
        raise Killed

    run, told = tmp_path / "run", documents(place)
    monkeypatch.setattr(intermediates, "_made", killed)
    with pytest.raises(Killed):
        merge_checkpoint(told, run, step=7)
    monkeypatch.undo()
    assert [path.name for path in run.iterdir()] == ["7.intermediates"]
    result = merge_checkpoint(told, run, step=7)
    assert [path.name for path in run.iterdir()] == ["7"]
    (within,) = result.manifest["intermediates"].values()
    assert (result.manifest["output"]["format"], within["output"].get("format")) == ("orbax", None)
    assert [entry["name"] for entry in within["inputs"]] == [f"{place}/orbax@{step}" for step in (10, 20)]
    assert verify(run / "7").differences == ()
    with ocp.CheckpointManager(run) as manager:
        assert manager.all_steps() == [7]
        restored = manager.restore(7)["model"]
    plain = merge_checkpoint(told, tmp_path / "plain", format="safetensors")
    assert plain.digest == result.digest == replay(run / "7", tmp_path / "again").digest
    for name, value in read(tmp_path / "plain").items():
        found = restored
        for key in name.split("."):
            found = found[key]
        np.testing.assert_array_equal(found, value)

    explained = explain_recipe(told, tmp_path / "out")
    assert [each.model for each in explained.intermediates["average"].models] == [
        f"{place}/orbax@{s}" for s in (10, 20)
    ]
    assert f"{place}/orbax@last:2: the steps 10, 20 are read" in explained.notes
    (place / "documents.yaml").write_text(yaml.safe_dump(told))
    for option in ("--explain", "--plan"):
        for step in ("8", "7"):  # also where there is one
            assert main(app, ["merge", str(place / "documents.yaml"), str(run), "--step", step, option]) == 0
    assert [path.name for path in run.iterdir()] == ["7"]


def test_adapters_and_models_are_steps(place, tmp_path) -> None:
    told = {
        "merge_method": "linear",
        "models": [f"{place}/orbax@10+{place}/adapter", f"{place}/orbax+{place}/adapters"],
    }
    result = merge_checkpoint(told, tmp_path / "out")
    first, second = (entry["name"] for entry in result.manifest["inputs"])
    assert first == told["models"][0]
    assert second == f"{place}/orbax@20+{place}/adapters@6"
    assert f"{told['models'][1]}: {second} is read, the last step that was saved to its end" in result.notes
    assert result.manifest["output"]["format"] == "orbax"
    same = [f"{place}/run@10+{place}/adapter", f"{place}/run/checkpoint-20+{place}/adapters/checkpoint-6"]
    assert result.digest == merge_checkpoint({**told, "models": same}, tmp_path / "same").digest
    assert replay(tmp_path / "out", tmp_path / "again").digest == result.digest
    converted = convert(f"{place}/orbax+{place}/adapter", tmp_path / "converted", to="orbax")
    assert verify(tmp_path / "converted", inputs=True).differences == ()
    assert converted.notes[0].startswith(f"{place}/orbax+{place}/adapter: {place}/orbax@20+{place}/adapter is read")
    with open_checkpoint(tmp_path / "converted") as checkpoint:
        assert checkpoint.files()[0].parent.name == "model"


def test_what_is_refused(place, tmp_path) -> None:
    def refused(told, sentence, **how) -> None:
        with pytest.raises(M3Error, match=sentence):
            merge_checkpoint({"merge_method": "linear", **told}, tmp_path / "out", **how)
        assert not (tmp_path / "out").exists()

    one, several = f"{place}/orbax", f"{place}/orbax@last:2"
    takes = "is 2 steps, which only models and sources of a recipe take, without an adapter: name one of them"
    refused({"models": [f"{several}+{place}/adapter"]}, takes)
    refused({"models": [one], "base_model": several}, takes)
    refused({"models": [several], "tokenizer_source": several}, takes)
    refused({"slices": sliced(place, ["orbax"], several)}, takes)
    refused({"merge_method": "slerp", "parameters": {"t": 0.5}, "models": [several, one]}, "models: slerp merges 2 mod")
    pair = {"alpha": [0.5, 1.0]}
    refused({"models": [several, one], "mixup": pair}, "mixup.alpha: a pair is for two experts, not 3")
    gradient = {"models": [{"model": several, "parameters": {"weight": [0.0, 1.0]}}], "schedule": EMA}
    refused(gradient, "schedule: the weight of .*orbax@last:2 is no number, which steps could share")
    refused({"modules": {"text_decoder": {"models": [several]}}}, "modules: put models together, for which the tree of")
    stack = sliced(place, ["orbax"], None)[:1] * 2
    refused({"slices": stack}, "slices: stack layers, for which the tree of .* has no place")
    refused(
        documents(place, format="orbax"), r"intermediates\.0\.format: is for the output, and this is made on the way"
    )
