"""What stands beside merged and converted weights: templates, vocabularies, and nothing that is not the model's."""

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file
from support.directories import write
from support.faults import Faults, Killed

import m3jax
from m3jax.checkpoints import trust
from m3jax.errors import M3Error
from m3jax.outputs.companions import card, gather
from m3jax.outputs.conversion import convert
from m3jax.progress import Progress
from m3jax.recipe import load_recipe
from m3jax.recipe.chat_templates import BUILT_IN
from m3jax.streaming import jobs, merging
from m3jax.streaming.jobs import prepared

ONE = {"model.layers.0.w": np.float32([1, 2])}


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    return [write(tmp_path / name, ONE) for name in ("a", "b", "c")]


def merge(models: list[Path], out: str = "out", **keys: Any) -> Path:
    place = models[0].parent / out
    m3jax.merge_checkpoint({"merge_method": "linear", "models": list(map(str, models)), **keys}, place)
    return place


# --- Chat templates --------------------------------------------------------------------------------------


def test_a_named_template_and_jinja_text_are_written(models: list[Path]) -> None:
    assert (merge(models, "named", chat_template="chatml") / "chat_template.jinja").read_text() == BUILT_IN["chatml"]
    text = "{% for message in messages %}{{ message }}{% endfor %}"
    assert (merge(models, "text", chat_template=text) / "chat_template.jinja").read_text() == text


def test_every_place_that_repeats_the_template_has_the_new_one(models: list[Path]) -> None:
    (models[0] / "tokenizer_config.json").write_text('{"eos_token": "é", "chat_template": "{{ old }}"}')
    (models[0] / "chat_template.json").write_text('{"chat_template": "{{ old }}"}')
    (models[0] / "chat_template.jinja").write_text("{{ old }}")
    out = merge(models, chat_template="llama3")
    told = json.loads((out / "tokenizer_config.json").read_text())
    assert told == {"eos_token": "é", "chat_template": BUILT_IN["llama3"]}
    assert json.loads((out / "chat_template.json").read_text()) == {"chat_template": BUILT_IN["llama3"]}
    assert (out / "chat_template.jinja").read_text() == BUILT_IN["llama3"]
    assert m3jax.verify(out).differences == ()


def test_auto_takes_the_commonest(models: list[Path]) -> None:
    (models[0] / "tokenizer_config.json").write_text('{"chat_template": "{{ mine }}"}')
    (models[1] / "chat_template.jinja").write_text("{{ theirs }}")
    named = [{"name": "tool_use", "template": "{{ tools }}"}, {"name": "default", "template": "{{ theirs }}"}]
    (models[2] / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    out = merge(models, chat_template="auto")
    assert (out / "chat_template.jinja").read_text() == "{{ theirs }}"
    assert json.loads((out / "tokenizer_config.json").read_text()) == {"chat_template": "{{ theirs }}"}
    assert m3jax.verify(out).differences == ()


def test_auto_keeps_what_the_template_has_where_that_is_as_common(models: list[Path]) -> None:
    for model, text in zip(models, ("{{ b }}", "{{ a }}", None), strict=True):
        if text is not None:
            (model / "tokenizer_config.json").write_text(json.dumps({"chat_template": text}))
    out = merge(models, chat_template="auto")
    assert (out / "tokenizer_config.json").read_bytes() == (models[0] / "tokenizer_config.json").read_bytes()
    assert not (out / "chat_template.jinja").exists()


def test_auto_of_models_without_a_template_writes_none(models: list[Path]) -> None:
    assert not (merge(models, chat_template="auto") / "chat_template.jinja").exists()


# --- Code ------------------------------------------------------------------------------------------------

CODE = {"auto_map": {"AutoConfig": "mine.MineConfig"}}


def test_code_is_neither_copied_nor_named_in_outputs(models: list[Path]) -> None:
    (models[0] / "config.json").write_text(json.dumps({"model_type": "mine", "torch_dtype": "float32", **CODE}))
    (models[0] / "tokenizer_config.json").write_text(json.dumps({"eos_token": "x", **CODE}))
    (models[0] / "vocab.json").write_text('{"auto_map": 0}')
    (models[0] / "mine.py").write_text("raise SystemExit('run')")
    converted = convert(models[0], models[0].parent / "converted")
    assert any(
        "mine.py, auto_map in config.json, auto_map in tokenizer_config.json" in note for note in converted.notes
    )
    for out in (merge(models), converted.directory):
        assert json.loads((out / "config.json").read_text()) == {"model_type": "mine", "torch_dtype": "float32"}
        assert json.loads((out / "tokenizer_config.json").read_text()) == {"eos_token": "x"}
        assert (out / "vocab.json").read_text() == '{"auto_map": 0}'
        assert not list(out.glob("*.py"))


def test_configurations_without_code_are_copied_as_they_are(models: list[Path]) -> None:
    text = '{ "model_type":"x", "torch_dtype" : "float32", "a":1.0 }'
    (models[0] / "config.json").write_text(text)
    (models[0] / "tokenizer_config.json").write_text('[ "no object" ]')
    for out in (merge(models, dtype="float32"), convert(models[0], models[0].parent / "converted").directory):
        assert (out / "config.json").read_text() == text
        assert (out / "tokenizer_config.json").read_text() == '[ "no object" ]'


def test_what_nobody_can_read_is_not_copied(models: list[Path]) -> None:
    (models[0] / "tokenizer_config.json").write_text('{"eos_token": "x"')
    for work in (lambda: merge(models), lambda: convert(models[0], models[0].parent / "converted")):
        with pytest.raises(M3Error, match=r"tokenizer_config\.json: is no JSON, and the output would be as unreadable"):
            work()
    assert not (models[0].parent / "converted").exists()


def test_what_was_left_alone_is_told(models: list[Path]) -> None:
    (models[1] / "mine.py").touch()
    weights = (models[2] / "model.safetensors").rename(models[2] / "a.safetensors")
    index = {"weight_map": dict.fromkeys(ONE, weights.with_name("a.safetensors").name)}
    (models[2] / "model.safetensors.index.json").write_text(json.dumps(index))
    (models[2] / "model.safetensors").write_bytes(b"stray")
    asked = m3jax.load_recipe({"merge_method": "linear", "models": list(map(str, models))})
    with prepared(asked, models[0].parent / "out") as ready:
        code, stray = ready.notes
    assert code.startswith(f"{models[1]} brings Python code (mine.py)")
    assert stray.startswith(f"{models[2]}: model.safetensors is not read, as model.safetensors.index.json")


# --- Files that are not the model's own ------------------------------------------------------------------


def hostile(place: Path, kind: str) -> None:
    match kind:
        case "environment":
            place.symlink_to("/proc/self/environ")
        case "outside":
            (place.parent.parent / "secret").write_text("secret")
            place.symlink_to("../secret")
        case "pipe":
            os.mkfifo(place)
        case "device":
            place.symlink_to("/dev/zero")
        case "huge":
            with open(place, "wb") as file:
                file.truncate(2**40)


KINDS = ("environment", "outside", "pipe", "device", "huge")


@pytest.mark.parametrize("name", ["tokenizer.model", "config.json"])
@pytest.mark.parametrize("kind", KINDS)
def test_merge_and_convert_refuse_what_is_not_the_models(models: list[Path], kind: str, name: str) -> None:
    (models[0] / name).unlink(missing_ok=True)
    hostile(models[0] / name, kind)
    for attempt in (lambda: merge(models), lambda: convert(models[0], models[0].parent / "out")):
        with pytest.raises(M3Error, match=rf"a/{name} (leads out of|is not a regular file|has 1,099,511,627,776)"):
            attempt()
    assert sorted(path.name for path in models[0].parent.glob("out*")) == []


@pytest.mark.parametrize("kind", KINDS)
def test_other_models_are_refused_where_their_files_are_used(models: list[Path], kind: str) -> None:
    hostile(models[1] / "tokenizer.model", kind)
    for keys in ({"tokenizer_source": str(models[1])}, {"tokenizer_source": "union"}, {"chat_template": "auto"}):
        with pytest.raises(M3Error, match=r"b/tokenizer\.model (leads out of|is not a regular file|has )"):
            merge(models, **keys)
    merge(models)  # which uses none of them
    (models[2] / "config.json").unlink()
    hostile(models[2] / "config.json", kind)
    with pytest.raises(M3Error, match=r"c/config\.json (leads out of|is not a regular file|has )"):
        merge(models, "other")


# --- Files that change meanwhile -------------------------------------------------------------------------


def rewritten(place: Path, kind: str) -> None:
    """What becomes of a file while it is read elsewhere."""
    match kind:
        case "edited":
            place.write_text('{"hidden_size": 999}')
        case "gone":
            place.unlink()
        case _:
            place.unlink()
            hostile(place, kind)


def as_last_read(place: Path, kind: str, last: str = "merging") -> Callable[[Progress], None]:
    """Has a file become another when all weights are read."""

    def change(progress: Progress) -> None:
        if progress.stage == last and progress.done == progress.total and os.path.lexists(place):
            rewritten(place, kind)

    return change


@pytest.mark.parametrize("kind", ["edited", "gone", "outside", "environment", "pipe"])
@pytest.mark.parametrize("name", ["a/config.json", "a/tokenizer_config.json", "b/config.json"])
def test_what_changes_beside_the_weights_meanwhile_is_not_published(models: list[Path], name: str, kind: str) -> None:
    (models[0] / "tokenizer_config.json").write_text('{"eos_token": "x"}')
    place, said = models[0].parent, r"config\.json|the configuration of \S*[ab] changed while"
    made = merge(models)
    file = place / name
    before = file.read_bytes()
    asked = {"merge_method": "linear", "models": list(map(str, models))}
    works: dict[str, Callable[[Path], Any]] = {
        "merged": lambda out: m3jax.merge_checkpoint(asked, out, progress=as_last_read(file, kind)),
        "replayed": lambda out: m3jax.replay(made, out, progress=as_last_read(file, kind)),
    }
    if name.startswith("a/"):
        works["converted"] = lambda out: convert(models[0], out, progress=as_last_read(file, kind, "converting"))
    for out, work in works.items():
        file.unlink(missing_ok=True)
        file.write_bytes(before)
        with pytest.raises(M3Error, match=said):
            work(place / out)
        assert not [path.name for path in place.iterdir() if path.name.startswith(out)]


@pytest.mark.parametrize("kind", ["edited", "outside"])
def test_what_is_swapped_behind_the_last_look_is_not_copied(models: list[Path], kind: str) -> None:
    (models[0] / "tokenizer_config.json").write_text('{"eos_token": "x"}')
    plain = merging._check_at_rest

    def then_swapped(*of: Any) -> None:
        plain(*of)
        rewritten(models[0] / "tokenizer_config.json", kind)

    with (
        mock.patch.object(merging, "_check_at_rest", then_swapped),
        pytest.raises(M3Error, match=r"tokenizer_config\.json has changed since the output was planned from it"),
    ):
        merge(models)
    assert not list(models[0].parent.glob("out*"))


def test_what_a_plan_is_made_from_is_what_stands_there_when_it_is_made(models: list[Path]) -> None:
    plain = jobs.make_plan

    def then_edited(*of: Any) -> Any:
        (models[1] / "config.json").write_text('{"model_type": "llama", "hidden_size": 999}')
        return plain(*of)

    with (
        mock.patch.object(jobs, "make_plan", then_edited),
        pytest.raises(M3Error, match=r"the configuration of \S*b changed while it was being merged"),
    ):
        merge(models)
    for model in models:
        (model / "tokenizer.json").write_text(json.dumps(TOKENIZER))

    def tokens_then_edited(*of: Any) -> Any:
        (models[1] / "tokenizer.json").write_text(json.dumps(changed(vocab={"a": 1})))
        return plain(*of)

    with (
        mock.patch.object(jobs, "make_plan", tokens_then_edited),
        pytest.raises(M3Error, match=r"b/tokenizer\.json has changed since the output was planned from it"),
    ):
        union(models)


def test_a_link_that_comes_between_looking_and_opening_is_refused(models: list[Path]) -> None:
    (models[0].parent / "secret").write_text('{"secret": 1}')
    file, plain = models[0] / "config.json", trust.open_file

    def swapped(path: Path) -> int:
        file.unlink()
        file.symlink_to("../secret")
        return plain(path)

    with (
        mock.patch.object(trust, "open_file", swapped),
        pytest.raises(M3Error, match=r"a/config\.json leads out of the model"),
    ):
        trust.read_companion(file, models[0])


# --- Modes -----------------------------------------------------------------------------------------------


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_outputs_open_to_nobody_what_inputs_keep_closed(models: list[Path]) -> None:
    for path in (models[0], models[0] / "model.safetensors", models[0] / "config.json"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    (models[0] / "tokenizer.json").write_text("{}")
    (models[0] / "tokenizer.json").chmod(0o400)
    assert mode(merge(models) / "tokenizer.json") == 0o600
    out = convert(models[0], models[0].parent / "open").directory
    assert [mode(out), mode(out / "model.safetensors"), mode(out / "tokenizer.json")] == [0o755, 0o644, 0o600]
    (models[0] / "model.safetensors").chmod(0o640)
    models[0].chmod(0o710)
    out = convert(models[0], models[0].parent / "closed").directory
    assert [mode(out), mode(out / "model.safetensors"), mode(out / "config.json")] == [0o710, 0o640, 0o640]


def test_an_output_of_linked_weights_is_as_closed_as_where_they_are(models: list[Path]) -> None:
    closed = models[0].parent / "closed"
    closed.mkdir(0o700)
    weights = (models[0] / "model.safetensors").rename(closed / "model.safetensors")
    (models[0] / "model.safetensors").symlink_to(weights)
    out = convert(models[0], models[0].parent / "out").directory
    assert mode(out) == 0o700


def test_what_is_being_made_is_closed_to_others_also_after_a_kill(models: list[Path]) -> None:
    place, seen = models[0].parent, []

    def look(progress: Progress) -> None:
        seen.extend(mode(partial) for partial in place.glob("*.partial"))

    two = {"model.layers.0.w": np.float32([1, 2]), "model.layers.1.w": np.float32([3])}
    asked = {"merge_method": "linear", "models": [str(write(place / "large", two)), str(place / "large")]}
    works = (
        lambda out: m3jax.merge_checkpoint(asked, out, progress=look, max_shard_size=8),
        lambda out: convert(place / "large", out, progress=look),
    )
    for number, work in enumerate(works):
        before = os.umask(0o027)
        try:
            out = place / f"umask{number}"
            work(out)
            assert mode(out) == 0o750
        finally:
            os.umask(before)
    assert set(seen) == {0o700}
    with (
        pytest.raises(Killed),
        Faults(place).until(lambda call: call.startswith("fsync") and "model-00002" in call),
    ):
        works[0](place / "killed")
    partial = place / "killed.partial"
    assert list(partial.glob("model-00001*"))
    assert mode(partial) == 0o700
    partial.chmod(0o755)  # as earlier versions left it
    seen.clear()
    works[0](place / "killed")
    assert set(seen) == {0o700}


def test_a_chat_template_is_as_closed_as_the_file_that_it_comes_from(models: list[Path]) -> None:
    for model in models[1:]:
        (model / "tokenizer_config.json").write_text('{"chat_template": "{{ x }}"}')
        (model / "tokenizer_config.json").chmod(0o600)
    assert mode(merge(models, chat_template="auto") / "chat_template.jinja") == 0o600


# --- Vocabularies ----------------------------------------------------------------------------------------

TOKENIZER = {
    "added_tokens": [{"id": 0, "content": "<s>", "special": True}],
    "model": {"type": "BPE", "vocab": {"<s>": 0, "a": 1, "b": 2, "ab": 3, "ba": 4}, "merges": ["a b", "b a"]},
}


def changed(**model: Any) -> dict[str, Any]:
    return {**TOKENIZER, "model": {**TOKENIZER["model"], **model}}


def union(models: list[Path]) -> Path:
    return merge(models, tokenizer_source="union")


def test_vocabularies_written_in_other_ways_are_the_same(models: list[Path]) -> None:
    listed = [list(pair.split(" ")) for pair in TOKENIZER["model"]["merges"]]
    with_more = {**changed(merges=listed), "version": "1.0", "truncation": None}
    (models[0] / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    (models[1] / "tokenizer.json").write_text(json.dumps(with_more, indent=2, sort_keys=True))
    (models[2] / "vocab.json").write_text(json.dumps(TOKENIZER["model"]["vocab"]))
    (models[2] / "merges.txt").write_text("#version: 0.2\na b\nb a\n")
    assert (union(models) / "tokenizer.json").read_bytes() == (models[0] / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        (
            {"model": {"type": "odd"}},
            "cannot be united: their files differ, and what cannot be read cannot be compared",
        ),
        (None, "cannot be united: .*b has no tokenizer"),
        (
            changed(type="WordPiece", vocab={"a": 0}),
            "tokenizers are of different types, BPE in .*a and WordPiece in .*b, whose tokens have nothing in common",
        ),
        (changed(vocab={"a": 1, "b": 2}), "a: has no tensor that is known as an embedding"),
    ],
)
def test_vocabularies_that_have_no_union_are_refused(models: list[Path], other: Any, sentence: str) -> None:
    (models[0] / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    if other is not None:
        (models[1] / "tokenizer.json").write_text(json.dumps(other))
    with pytest.raises(M3Error, match=sentence):
        union(models[:2])


def test_pieces_of_sentencepiece_are_compared_with_a_tokenizer_json(models: list[Path]) -> None:
    from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

    text = models[0].parent / "text.txt"
    text.write_text("merging models is mixing models\n" * 40)
    how = {"vocab_size": 16, "hard_vocab_limit": False, "minloglevel": 2}
    SentencePieceTrainer.Train(input=str(text), model_prefix=str(models[0] / "tokenizer"), **how)
    (models[0] / "tokenizer.vocab").unlink()
    pieces = SentencePieceProcessor()
    pieces.Load(str(models[0] / "tokenizer.model"))
    listed = [[pieces.IdToPiece(i), pieces.GetScore(i)] for i in range(pieces.GetPieceSize())]
    (models[1] / "tokenizer.json").write_text(json.dumps({"model": {"type": "Unigram", "vocab": listed}}))
    assert (union(models[:2]) / "tokenizer.model").exists()
    (models[1] / "tokenizer.json").write_text(json.dumps({"model": {"type": "Unigram", "vocab": listed[:-1]}}))
    with pytest.raises(M3Error, match="a: has no tensor that is known as an embedding"):
        merge(models[:2], "other", tokenizer_source="union")


def test_models_without_tokenizers_have_one_vocabulary(models: list[Path]) -> None:
    assert not list(union(models).glob("tok*"))


def test_files_that_cannot_be_read_are_compared_as_they_are(models: list[Path]) -> None:
    for model in models:
        (model / "tekken.json").write_text("[1]")
        (model / "tokenizer.model").write_bytes(b"\xff no model")
    union(models)
    (models[2] / "tekken.json").write_text("[2]")
    with pytest.raises(M3Error, match="their files differ"):
        merge(models, "other", tokenizer_source="union")


def test_what_is_gathered_is_looked_at_before_anything_is_read(models: list[Path]) -> None:
    from m3jax.checkpoints import locate_model

    hostile(models[0] / "tokenizer_config.json", "pipe")
    asked = m3jax.load_recipe({"merge_method": "linear", "models": ["a", "b"], "chat_template": "auto"})
    with pytest.raises(M3Error, match=r"tokenizer_config\.json is not a regular file"):
        gather(asked, [locate_model(str(model)) for model in models[:2]], 1)


# --- Model cards -----------------------------------------------------------------------------------------------------


def told_recipe(out: Path) -> dict[str, Any]:
    """The recipe that a model card shows."""
    return yaml.safe_load((out / "README.md").read_text().split("```yaml\n")[1].split("```")[0])


@pytest.mark.parametrize("granularity", ["model", "layer"])
def test_the_recipe_in_a_card_makes_the_model_it_describes(models: list[Path], granularity: str) -> None:
    save_file({"model.layers.0.w": np.float32([5, 3])}, models[1] / "model.safetensors")
    recipe = {"merge_method": "linear", "models": list(map(str, models[:2])), "mixup": {"granularity": granularity}}
    recipe["mixup"]["alpha"] = 0.5
    group = {"model": "model", "layer": "model.layers.0"}[granularity]
    place = models[0].parent
    drawn = m3jax.merge_checkpoint(recipe, place / "drawn")
    chosen = m3jax.merge_checkpoint(recipe, place / "chosen", weights={group: (0.3, 0.9)})
    assert "weights" not in told_recipe(place / "drawn")["mixup"]
    assert told_recipe(place / "chosen")["mixup"]["weights"] == {group: [0.3, 0.9]}
    assert "Weights chosen in place of a draw" in (place / "chosen" / "README.md").read_text()
    for name, result in (("drawn", drawn), ("chosen", chosen)):
        again = m3jax.merge_checkpoint(told_recipe(place / name), place / f"{name} again")
        assert again.digest == result.digest
    assert drawn.digest != chosen.digest
    recipe["mixup"]["weights"] = {group: [0.3, 0.9], "model.layers.9": [0, 1]}
    with pytest.raises(M3Error, match=r"mixup.weights: (model.layers.9 is no group|one draw for the model)"):
        m3jax.merge_checkpoint(recipe, place / "surplus")
    assert m3jax.replay(place / "chosen again", place / "replayed").digest == chosen.digest


def test_a_card_names_to_the_hub_only_what_is_there() -> None:
    recipe = load_recipe({"merge_method": "linear", "models": ["org/a@v1", "models/b"]})
    front = [yaml.safe_load(card(recipe, {}, published).split("---")[1]) for published in (["org/a@v1"], [])]
    assert front[0]["base_model"] == ["org/a"]
    assert "base_model" not in front[1]
    adapted = load_recipe({"merge_method": "linear", "models": ["org/a@v1+org/lora@v2", "models/b"]})
    told = card(adapted, {}, ["org/a@v1", "org/lora@v2"])
    assert yaml.safe_load(told.split("---")[1])["base_model"] == ["org/a", "org/lora"]


@pytest.mark.parametrize(
    ("weights", "sentence"),
    [
        ({"model": [0.5]}, r"mixup.weights.model: 1 are given where 2 are needed"),
        ({"w": [0.5, 0.5]}, r"mixup.weights: one draw for the model has one group"),
        ({"model": [0.5, float("nan")]}, r"mixup.weights.model"),
    ],
)
def test_weights_in_place_of_draws_are_checked(weights: dict[str, list[float]], sentence: str) -> None:
    with pytest.raises(M3Error, match=sentence):
        load_recipe({"merge_method": "linear", "models": ["a", "b"], "mixup": {"alpha": 1, "weights": weights}})
