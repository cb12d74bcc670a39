"""Merges of models whose vocabularies differ, row by row against a plain numpy alignment and the oracle."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support import oracle
from support.alignment import BASE, NAMES, ROWS, UNION, VOCABULARIES, WIDTH, aligned, tokenizer, write_models
from support.directories import read
from support.interruptions import interruption
from support.matrix import METHODS, SPARSIFIERS, same

import m3jax
from m3jax.errors import M3Error
from m3jax.streaming import merging
from m3jax.vocabulary import read_speakers, unite, united_files

EXPERTS = ("one", "two", "three")
FAMILIES = [
    ("linear", "none"),
    ("task_arithmetic", "dare"),
    ("ties_paper", "dare"),
    ("ties_mergekit", "none"),
    ("task_arithmetic", "breadcrumbs"),
    ("task_arithmetic", "della"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def tensors(place):
    return write_models(place / "in", ml_dtypes.bfloat16)


def recipe(place, names=EXPERTS, **keys):
    told = {"merge_method": "task_arithmetic", "base_model": "base", "tokenizer_source": "union", **keys}
    told["models"] = [str(place / "in" / name) for name in names]
    return {**told, "base_model": str(place / "in" / told["base_model"])}


def merge(place, out, names=EXPERTS, **keys):
    return m3jax.merge_checkpoint(recipe(place, names, **keys), out)


@pytest.mark.parametrize(("method", "sparsifier"), FAMILIES)
def test_rows_of_the_union_are_those_of_its_tokens(place, tensors, tmp_path, method, sparsifier):
    _, keys, told = METHODS[method]
    _, more, also = SPARSIFIERS[sparsifier]
    result = merge(place, tmp_path / "out", **keys, **more, seed=3)
    seen = aligned(tensors)
    want = oracle.merge([seen[n] for n in EXPERTS], seen["base"], weights=[1.0] * 3, seed=3, **told, **also)
    assert same(read(tmp_path / "out"), want) == (True, [])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == len(UNION)
    told = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    assert told["model"]["vocab"] == {token: number for number, token in enumerate(UNION)}
    assert m3jax.verify(tmp_path / "out").differences == ()
    assert m3jax.verify_sample(tmp_path / "out", inputs=True).differences == ()
    assert m3jax.replay(tmp_path / "out", tmp_path / "again").digest == result.digest


def test_slerp_and_model_stock_see_the_same_rows(place, tensors, tmp_path):
    names = ("one", "two")
    seen = aligned({name: tensors[name] for name in ("one", "base", "two")})
    merge(place, tmp_path / "slerp", ("one",), merge_method="slerp", parameters={"t": 0.3})
    # The vocabulary of the union is that of the base with what one adds.
    two = aligned({name: tensors[name] for name in ("base", "one")}, tokens=[*BASE, "shared", "e", "<|user|>"])
    want = oracle.merge([two["base"], two["one"]], method="slerp", weights=0.3)
    assert same(read(tmp_path / "slerp"), want) == (True, [])
    merge(place, tmp_path / "stock", names, merge_method="model_stock")
    want = oracle.merge([seen[name] for name in names], seen["base"], "model_stock", None)
    assert same(read(tmp_path / "stock"), want) == (True, [])


def test_a_draw_without_a_base_to_subtract_lends_the_bases_rows(place, tensors, tmp_path):
    names = ("one", "two")
    result = merge(place, tmp_path / "out", names, merge_method="linear", mixup={"alpha": 0.5}, seed=1)
    seen = aligned({name: tensors[name] for name in ("base", *names)})
    want = oracle.merge([seen[n] for n in names], None, "linear", oracle.draw(1, 0.5, 2), normalize=True)
    assert same(read(tmp_path / "out"), want) == (True, [])
    told = {record["role"]: record for record in result.manifest["inputs"]}
    stored = load_file(place / "in" / "base" / "model.safetensors")
    assert told["template"]["tensors"].keys() == {"model.embed_tokens.weight", "lm_head.weight"}
    shutil.copytree(place / "in", tmp_path / "in")
    moved = {
        record["name"]: str(tmp_path / "in" / record["name"].split("/")[-1]) for record in result.manifest["inputs"]
    }
    assert m3jax.replay(tmp_path / "out", tmp_path / "again", sources=moved).digest == result.digest
    stored["lm_head.weight"] = -stored["lm_head.weight"]
    save_file(stored, tmp_path / "in" / "base" / "model.safetensors")
    with pytest.raises(M3Error, match=r"lm_head\.weight is not what was merged"):
        m3jax.replay(tmp_path / "out", tmp_path / "third", sources=moved)


def test_a_manifest_does_not_tell_which_file_was_finished_first(place, tensors, tmp_path, monkeypatch):
    keys = recipe(place, ("one", "two"), merge_method="linear")
    own = merging._own_shards
    for out, order in (("forth", list), ("back", lambda found: list(reversed(found)))):
        monkeypatch.setattr(merging, "_own_shards", lambda *of, order=order: dict(order(own(*of).items())))
        m3jax.merge_checkpoint(keys, tmp_path / out, max_shard_size=1)
    forth, back = ((tmp_path / out / "m3jax.json").read_text() for out in ("forth", "back"))
    assert forth == back
    assert '"role": "template"' in forth  # which lends rows


@pytest.mark.parametrize(("style", "tied", "dtype"), [("flax", False, "float32"), ("plain", True, "float16")])
def test_heads_of_flax_and_tied_ones(tmp_path, style, tied, dtype):
    tensors = write_models(tmp_path / "in", np.dtype(dtype), style, tied)
    _, more, also = SPARSIFIERS["dare"]
    merge(tmp_path, tmp_path / "out", **more, seed=2)
    seen = aligned(tensors, style)
    want = oracle.merge([seen[n] for n in EXPERTS], seen["base"], "task_arithmetic", [1.0] * 3, seed=2, **also)
    assert same(read(tmp_path / "out"), want) == (True, [])


def test_a_tied_base_lends_its_embedding_to_heads(tmp_path):
    tensors = write_models(tmp_path / "in", np.float32)
    for name in ("base", "two"):
        stored = load_file(tmp_path / "in" / name / "model.safetensors")
        tensors[name]["lm_head.weight"] = tensors[name]["model.embed_tokens.weight"]
        del stored["lm_head.weight"]
        save_file(stored, tmp_path / "in" / name / "model.safetensors")
        config = json.loads((tmp_path / "in" / name / "config.json").read_text())
        (tmp_path / "in" / name / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    result = merge(tmp_path, tmp_path / "out")
    seen = aligned(tensors)
    want = oracle.merge([seen[n] for n in EXPERTS], seen["base"], "task_arithmetic", [1.0] * 3)
    assert same(read(tmp_path / "out"), want) == (True, [])
    told = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (told["tie_word_embeddings"], told["vocab_size"]) == (False, len(UNION))
    assert m3jax.replay(tmp_path / "out", tmp_path / "again").digest == result.digest


def test_the_vocabulary_of_one_model(place, tensors, tmp_path):
    merge(place, tmp_path / "base", tokenizer_source="base")
    seen = aligned(tensors, tokens=BASE, size=ROWS["base"])  # the base's padding stays
    want = oracle.merge([seen[n] for n in EXPERTS], seen["base"], "task_arithmetic", [1.0] * 3)
    assert same(read(tmp_path / "base"), want) == (True, [])
    two = str(place / "in" / "two")
    merge(place, tmp_path / "two", tokenizer_source=two)
    seen = aligned(tensors, tokens=VOCABULARIES["two"], size=ROWS["two"])
    want = oracle.merge([seen[n] for n in EXPERTS], seen["base"], "task_arithmetic", [1.0] * 3)
    assert same(read(tmp_path / "two"), want) == (True, [])
    assert (tmp_path / "two" / "tokenizer.json").read_bytes() == (place / "in" / "two" / "tokenizer.json").read_bytes()


def test_what_a_recipe_says_of_tokens(place, tensors, tmp_path):
    one, three = str(place / "in" / "one"), str(place / "in" / "three")
    tokens = {
        "[PAD]": {"source": three, "force": True},
        "shared": {"source": {"kind": "zero"}},
        "e": {"source": {"kind": "model_token", "model": three, "token": "d"}},
        "<|user|>": {"source": {"kind": "model_token", "model": one, "token_id": 0}},
    }
    asked = {"source": "union", "tokens": tokens, "pad_to_multiple_of": 8}
    keys = recipe(place, tokenizer=asked)
    del keys["tokenizer_source"]
    result = m3jax.merge_checkpoint(keys, tmp_path / "out")
    seen = {name: dict(found) for name, found in tensors.items()}
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        said = {
            "[PAD]": (True, tensors["three"][key][8]),
            "shared": (False, np.zeros(WIDTH)),
            "e": (False, tensors["three"][key][4]),
            "<|user|>": (False, tensors["one"][key][0]),
        }
        own = {name: {key: found[key]} for name, found in tensors.items()}
        for name, found in aligned(own, asked=said, size=16).items():
            seen[name][key] = found[key]
    want = oracle.merge([seen[n] for n in EXPERTS], seen["base"], "task_arithmetic", [1.0] * 3)
    assert same(read(tmp_path / "out"), want) == (True, [])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 16
    assert m3jax.replay(tmp_path / "out", tmp_path / "again").digest == result.digest


def test_an_interrupted_merge_is_gone_on_with(place, tensors, tmp_path):
    keys = recipe(place, merge_method="linear")
    whole = m3jax.merge_checkpoint(keys, tmp_path / "whole", max_shard_size=1)
    interrupt = interruption(tmp_path / "out.partial", 0.5)
    with pytest.raises(KeyboardInterrupt):
        m3jax.merge_checkpoint(keys, tmp_path / "out", max_shard_size=1, progress=interrupt)
    result = m3jax.merge_checkpoint(keys, tmp_path / "out", max_shard_size=1)
    assert result.resumed_shards
    assert result.manifest == whole.manifest


def test_what_was_made_before_an_experts_tokens_or_config_were_corrected_is_made_again(place, tensors, tmp_path):
    shutil.copytree(place / "in", tmp_path / "in")
    keys = recipe(tmp_path, ["one"], tokenizer_source="base")
    files = {name: tmp_path / "in" / "one" / name for name in ("tokenizer.json", "config.json")}
    right = files["tokenizer.json"].read_text()
    wrong = json.dumps(tokenizer(["<unk>", "a", "b", *VOCABULARIES["one"][3:]]))
    config = json.loads(files["config.json"].read_text())

    def begin(told, out="out"):
        files["tokenizer.json"].write_text(told)
        interrupt = interruption(tmp_path / f"{out}.partial", 0.5)
        with pytest.raises(KeyboardInterrupt):
            m3jax.merge_checkpoint(keys, tmp_path / out, max_shard_size=1, progress=interrupt)

    begin(wrong)
    files["tokenizer.json"].write_text(right)
    result = m3jax.merge_checkpoint(keys, tmp_path / "out", max_shard_size=1)
    whole = m3jax.merge_checkpoint(keys, tmp_path / "whole", max_shard_size=1)
    assert (result.resumed_shards, result.manifest) == (0, whole.manifest)
    begin(right, "other")
    files["config.json"].write_text(json.dumps({**config, "num_attention_heads": 3}))
    assert m3jax.merge_checkpoint(keys, tmp_path / "other", max_shard_size=1).resumed_shards == 0
    # what was merged tells of tokens that have changed since
    assert m3jax.verify(tmp_path / "out", inputs=True).differences == ()
    files["tokenizer.json"].write_text(json.dumps({**json.loads(right), "truncation": None}))
    assert m3jax.replay(tmp_path / "out", tmp_path / "again").digest == result.digest  # whose ids are the same
    files["tokenizer.json"].write_text(wrong)
    (said,) = m3jax.verify(tmp_path / "out", inputs=True).differences
    assert "one: its tokenizer gives tokens other numbers than when it was merged" in said
    assert any(said in told for told in m3jax.verify_sample(tmp_path / "out").differences)
    with pytest.raises(M3Error, match="one: its tokenizer gives tokens other numbers"):
        m3jax.replay(tmp_path / "out", tmp_path / "no")


def configured(place, tmp_path):
    """The models, whose configurations tell that they have one layer."""
    shutil.copytree(place / "in", tmp_path / "in")
    for config in (tmp_path / "in").glob("*/config.json"):
        config.write_text(json.dumps({**json.loads(config.read_text()), "num_hidden_layers": 1}))
    return tmp_path


def layers(place, *runs):
    """One slice for each list of models."""
    return [{"sources": [{"model": str(place / "in" / name), "layer_range": [0, 1]} for name in run]} for run in runs]


def test_stacked_layers_have_the_rows_of_the_models_that_they_are_of(place, tensors, tmp_path):
    names = ("one", "three")
    stack = layers(configured(place, tmp_path), *((name,) for name in names))
    m3jax.merge_checkpoint(
        {"merge_method": "passthrough", "slices": stack, "tokenizer_source": "union"}, tmp_path / "out"
    )
    # One leads, so that its tokens come first, and nobody has a base's rows.
    tokens = [*VOCABULARIES["one"], "[PAD]"]
    seen = aligned({name: tensors[name] for name in ("one", "three")}, tokens=tokens, base=None)
    got = read(tmp_path / "out")
    assert same(got, {"model.embed_tokens.weight": seen["one"]["model.embed_tokens.weight"]}) == (True, [])
    assert same(got, {"lm_head.weight": seen["three"]["lm_head.weight"]}) == (True, [])
    told = m3jax.replay(tmp_path / "out", tmp_path / "again").manifest["inputs"]
    assert [sorted(record["tensors"]) for record in told] == [
        ["lm_head.weight", "model.embed_tokens.weight", "model.layers.0.mlp.weight"] for _ in names
    ]


def test_the_base_of_stacked_layers_and_modules_leads(place, tensors, tmp_path):
    new = configured(place, tmp_path)
    base, one = (str(new / "in" / name) for name in ("base", "one"))
    seen = aligned({name: tensors[name] for name in ("one", "base")}, tokens=VOCABULARIES["one"], base="one")
    want = oracle.merge([seen["base"], seen["one"]], None, "linear", [0.5, 0.5])
    asked = {"merge_method": "linear", "base_model": one, "tokenizer_source": "base", "parameters": {"weight": 0.5}}
    whole = {"modules": {"default": {"models": [base, one]}}}
    for out, made_of in (("s", {"slices": layers(new, ("base", "one"), ("base", "one"))}), ("m", whole)):
        m3jax.merge_checkpoint({**asked, **made_of}, tmp_path / out)
        assert json.loads((tmp_path / out / "tokenizer.json").read_text()) == tokenizer(VOCABULARIES["one"])
        got = read(tmp_path / out)
        assert all(np.array_equal(got[name], want[name]) for name in NAMES["plain"])


def test_a_base_of_a_slice_leads_nobody_and_its_rows_are_seen(place, tensors, tmp_path):
    new = configured(place, tmp_path)
    stack = layers(new, ("one",), ("base",))
    stack[1]["base_model"] = str(new / "in" / "one")
    asked = {"merge_method": "task_arithmetic", "base_model": str(new / "in" / "base"), "slices": stack}
    asked["parameters"] = {"weight": 0.5}
    m3jax.merge_checkpoint({**asked, "tokenizer_source": "base"}, tmp_path / "out")
    seen = aligned({name: tensors[name] for name in ("base", "one")}, tokens=BASE, size=ROWS["base"])
    got = read(tmp_path / "out")
    for key, expert, below in zip(NAMES["plain"], ("one", "base"), ("base", "one"), strict=True):
        want = oracle.merge([{key: seen[expert][key]}], {key: seen[below][key]}, "task_arithmetic", [0.5])
        assert np.array_equal(got[key], want[key])
    for told in (asked, {"merge_method": "passthrough", "slices": layers(new, ("base",), ("one",))}):
        with pytest.raises(M3Error, match=r"token 1 is .* cannot be merged by numbers: write tokenizer_source"):
            m3jax.merge_checkpoint(told, tmp_path / "no")
    within = {"merge_method": "passthrough", "slices": layers(new, ("base",), ("one",), ("base",))}
    m3jax.merge_checkpoint(within, tmp_path / "within")  # whose own rows are nowhere in the output


# --- What cannot be --------------------------------------------------------------------------------------


def changed(place, tmp_path, name, told):
    """The models, with another tokenizer.json for one of them."""
    shutil.copytree(place / "in", tmp_path / "in")
    (tmp_path / "in" / name / "tokenizer.json").write_text(json.dumps(told))
    return tmp_path


def test_tokens_beyond_the_rows(place, tensors, tmp_path):
    more = [*VOCABULARIES["three"], "<never>"]
    new = changed(place, tmp_path, "three", tokenizer(more))
    notes = merge(new, tmp_path / "special").notes  # nobody has a row for it: the mean of all
    assert notes[-1].endswith("three: '<never>' has no row there, and gets one as where it is lacking")
    seen = aligned(tensors, tokens=[*UNION, "<never>"])
    want = oracle.merge([seen[n] for n in EXPERTS], seen["base"], "task_arithmetic", [1.0] * 3)
    assert same(read(tmp_path / "special"), want) == (True, [])
    (tmp_path / "in" / "three" / "tokenizer.json").write_text(json.dumps(tokenizer([*VOCABULARIES["three"], "f"])))
    with pytest.raises(
        M3Error, match="three: its tokenizer has more tokens than its embedding has rows: 'f' is number 9"
    ):
        merge(new, tmp_path / "out")


def test_without_a_key_the_refusal_names_the_one_that_settles_it(place, tensors, tmp_path):
    keys = recipe(place, ("three",))
    del keys["tokenizer_source"]
    with pytest.raises(M3Error) as caught:
        m3jax.merge_checkpoint(keys, tmp_path / "out")
    assert "base has 2 more rows than" in str(caught.value)
    assert "'[PAD]' is a token of " in str(caught.value)
    assert "three alone: write tokenizer_source: union to keep every token, or tokenizer_source: base" in str(
        caught.value
    )
    m3jax.merge_checkpoint({**keys, "exclude": ["embed_tokens", "lm_head"]}, tmp_path / "without")


def test_as_many_rows_of_other_tokens_are_not_merged_by_numbers_unsaid(place, tmp_path):
    by_numbers = {"merge_method": "linear", "models": [str(place / "in" / name) for name in ("base", "one")]}
    with pytest.raises(M3Error, match=r"token 1 is 'a' in .*base and 'b' in .*one, so that .*: write tokenizer_source"):
        m3jax.merge_checkpoint(by_numbers, tmp_path / "out")
    m3jax.merge_checkpoint({**by_numbers, "exclude": ["embed_tokens", "lm_head"]}, tmp_path / "without")
    for name, token in (("a", "[PAD]"), ("b", "<|user|>")):
        shutil.copytree(place / "in" / "base", tmp_path / name)
        (tmp_path / name / "tokenizer.json").write_text(json.dumps(tokenizer([*BASE, token])))
    by_numbers["models"] = [str(tmp_path / name) for name in "ab"]
    (note,) = (n for n in m3jax.merge_checkpoint(by_numbers, tmp_path / "added").notes if "token" in n)
    assert "added token 8 is '[PAD]' in " in note
    assert "'<|user|>' in " in note
    assert "tokenizer_source: base, union or a model" in note
    # models that fit the base, which has rows without tokens, need not fit each other
    by_numbers["models"] = [str(place / "in" / "base"), *by_numbers["models"]]
    (note,) = (n for n in m3jax.merge_checkpoint(by_numbers, tmp_path / "three").notes if "token" in n)
    assert "added token 8 is '[PAD]' in " in note
    for name, token in (("a", "x"), ("b", "y")):
        (tmp_path / name / "tokenizer.json").write_text(json.dumps(tokenizer([*BASE, token])))
    for keys in (by_numbers, {**recipe(place), "base_model": str(tmp_path / "a"), "models": [str(tmp_path / "b")]}):
        keys.pop("tokenizer_source", None)  # the base is told first
        with pytest.raises(M3Error, match=r"token 8 is 'x' in .*a and 'y' in .*b, so that "):
            m3jax.merge_checkpoint(keys, tmp_path / "ordinary")


@pytest.mark.parametrize(
    ("tokens", "sentence"),
    [
        ({"[PA]": {"source": {"kind": "zero"}}}, r"tokens\.\[PA\]: is a token of no tokenizer; did you mean '\[PAD\]'"),
        ({"e": {"source": "IN/two"}}, r"tokens\.e: 'e' is no token of .*two"),
        (
            {"e": {"source": {"kind": "model_token", "model": "IN/two", "token_id": 9}}},
            r"tokens\.e: .*two has 9 rows, so there is no row 9: name another",
        ),
    ],
)
def test_token_sources_that_name_no_token(place, tensors, tmp_path, tokens, sentence):
    told = json.loads(json.dumps(tokens).replace("IN", str(place / "in")))
    keys = recipe(place, tokenizer={"tokens": told})
    with pytest.raises(M3Error, match=sentence):
        m3jax.merge_checkpoint(keys, tmp_path / "out")


# --- Beside the tokenizers of others ---------------------------------------------------------------------


def test_the_same_weights_stand_beside_an_experts_own_tokenizer(place, tensors, tmp_path):
    three, out = str(place / "in" / "three"), tmp_path / "out"
    names = ("three",)
    keys = {"also_for": [three], "merge_method": "task_arithmetic"}
    merge(place, out, names, **keys)
    beside = out / "also_for" / "three"
    assert {file.name for file in beside.iterdir()} == {"config.json", "model.safetensors", "tokenizer.json"}
    assert (beside / "model.safetensors").samefile(out / "model.safetensors")
    assert (beside / "tokenizer.json").read_bytes() == (place / "in" / "three" / "tokenizer.json").read_bytes()
    assert json.loads((beside / "config.json").read_text())["vocab_size"] == ROWS["base"]
    assert m3jax.verify(out).differences == ()
    assert m3jax.verify_sample(out, inputs=True).differences == ()
    again = m3jax.replay(out, tmp_path / "again", max_shard_size=200)
    assert (tmp_path / "again" / "also_for" / "three" / "model.safetensors.index.json").exists()
    assert m3jax.verify(again.directory).differences == ()
    m3jax.merge_checkpoint(recipe(place, names, **keys), out, overwrite=True)
    (beside / "model.safetensors").unlink()
    shutil.copyfile(out / "model.safetensors", beside / "model.safetensors")
    assert m3jax.verify(out).differences == ()
    with open(beside / "model.safetensors", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\xff")
    assert m3jax.verify(out).differences == ("also_for/three/model.safetensors: is not the same as model.safetensors",)
    one = str(place / "in" / "one")
    with pytest.raises(M3Error, match=r"also_for: .*one numbers 'b' 1, the output 2, so the same weights cannot stand"):
        merge(place, tmp_path / "other", ("one",), also_for=[one])


def test_notes_tell_what_is_read_otherwise_than_a_model_has_learned_it(tmp_path):
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}

    def speaker(name, scores, special=True, **steps):
        told = [[token, score] for token, score in scores.items()]
        added = [{"id": 0, "content": "<unk>", **flags, "special": special}]
        model = {"type": "Unigram", "unk_id": 0, "vocab": told, "byte_fallback": False}
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps({"version": "1.0", "added_tokens": added, "model": model, **steps}))
        return name, {"tokenizer.json": file}

    def notes(*others):
        return unite("union", read_speakers([speaker("one", scores), *others]), 0).notes

    scores = {"<unk>": 0.0, "a": -1.0, "b": -2.0, "ab": -5.0}
    space = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"}
    assert notes(speaker("two", {**scores, "a": -1.00000001}, normalizer=None)) == ()
    same = [
        speaker("two", scores, pre_tokenizer=space),
        speaker("three", scores, pre_tokenizer={**space, "split": True}),
    ]
    assert unite("union", read_speakers(same), 0).notes == ()  # two ways to say one thing
    (said,) = notes(speaker("two", {**scores, "ab": -4.0}))
    assert said == "'ab' has another score in two: that of one is taken"
    (said,) = notes(speaker("two", scores, False))
    assert said == "'<unk>' is special, as in one: in two it is not"
    (said,) = notes(speaker("two", scores, normalizer={"type": "Lowercase"}))
    assert said.startswith("texts are split by the normalizer of one's tokenizer.json: ")
    _, said = notes(speaker("two", {**scores, "d": -20.0}))
    assert said.startswith("'d' of two gets the score -5 in place of -20: ")
    united = unite("union", read_speakers([speaker("one", scores), speaker("two", {**scores, "d": -20.0})]), 0)
    assert json.loads(united_files(united)["tokenizer.json"])["model"]["vocab"][-1] == ["d", -5.0]
