"""Tokenizers of merged models as transformers loads them: every input's special tokens are read as that input did."""

import json
import os
from pathlib import Path

import pytest
from sentencepiece import SentencePieceTrainer
from support.vocabularies import KINDS, SPECIAL, TEXTS, make_tokenizer, write_model

import m3jax
from m3jax.errors import M3Error
from m3jax.vocabulary import read_vocabulary


def load(place: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(place)


def tokens(tokenizer, text: str) -> list[str]:
    return tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False).input_ids)


def merge(place: Path, out: Path, experts=("a", "b"), **keys):
    told = {"merge_method": "task_arithmetic", "base_model": str(place / "base"), "tokenizer_source": "union", **keys}
    return m3jax.merge_checkpoint({**told, "models": [str(place / name) for name in experts]}, out)


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_are_read_as_each_input_did(tmp_path, kind):
    for seed, name in enumerate(("base", "a", "b")):
        own = TEXTS[name] if name != "base" else []
        write_model(tmp_path, name, make_tokenizer(kind, name, TEXTS["base"] + own), seed, "float32")
    merge(tmp_path, tmp_path / "out")
    merged = load(tmp_path / "out")
    wanted = {token for name in ("base", "a", "b") for token in load(tmp_path / name).get_vocab()}
    assert merged.get_vocab().keys() == wanted
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["vocab_size"] == len(merged) == max(merged.get_vocab().values()) + 1
    assert (config["bos_token_id"], config["pad_token_id"]) == (merged.bos_token_id, merged.pad_token_id)
    assert merged.pad_token == "[PAD]"  # the one of b, as nobody else has any
    assert merged("models").input_ids[0] == merged.bos_token_id  # the base's post-processor
    for name in ("base", "a", "b"):
        own = load(tmp_path / name)
        for token in [*SPECIAL[name], *(["<fold>"] if name == "a" else [])]:
            flags = own.added_tokens_decoder[own.convert_tokens_to_ids(token)]
            assert (
                merged.added_tokens_decoder[merged.convert_tokens_to_ids(token)].__getstate__() == flags.__getstate__()
            )
            text = f"models {token} mixing{token}"
            places = [i for i, found in enumerate(tokens(merged, text)) if found == token]
            assert len(places) == 2
            assert tokens(own, text).count(token) == 2
            decoded = merged.decode(merged(text).input_ids, skip_special_tokens=True)
            assert (token in decoded) == (token == "<fold>")
    # Of the base alone, where nobody adds pieces, texts are split as ever.
    merge(tmp_path, tmp_path / "of-base", tokenizer_source="base")
    assert tokens(load(tmp_path / "of-base"), TEXTS["base"][0]) == tokens(load(tmp_path / "base"), TEXTS["base"][0])


def test_added_tokens_alone_leave_texts_split_as_they_were(tmp_path):
    for seed, name in enumerate(("base", "a", "b")):
        tokenizer = make_tokenizer("byte-level BPE", name, TEXTS["base"])
        write_model(tmp_path, name, tokenizer, seed, "float32", padding=2 * (name == "base"))
    assert merge(tmp_path, tmp_path / "out").notes == ()
    merged, base = load(tmp_path / "out"), load(tmp_path / "base")
    assert all(tokens(merged, text) == tokens(base, text) for each in TEXTS.values() for text in each)
    grown = merged.get_vocab()
    assert base.get_vocab().items() <= grown.items()
    assert sorted(grown.keys() - base.get_vocab().keys()) == ["<fold>", "<|end|>", "<|user|>", "[PAD]"]
    # Another model's tokenizer brings its own roles and ids.
    merge(tmp_path, tmp_path / "of-b", tokenizer_source=str(tmp_path / "b"))
    config, own = json.loads((tmp_path / "of-b" / "config.json").read_text()), load(tmp_path / "b")
    assert (config["vocab_size"], config["eos_token_id"]) == (len(own), own.eos_token_id)
    assert (tmp_path / "of-b" / "tokenizer.json").read_bytes() == (tmp_path / "b" / "tokenizer.json").read_bytes()


def write_pieces(place: Path, name: str, text: str, kind: str, added: dict[str, int] | None = None) -> None:
    """A model as of 2023: a model of SentencePiece, tokens added beside it, and no tokenizer.json."""
    write_model(place, name, make_tokenizer("WordPiece", "base", TEXTS["base"]), 0, "float16", padding=60)
    here = place / name
    (here / "tokenizer.json").unlink()
    (place / "text").write_text(f"{text}\n" * 40)
    how = {"hard_vocab_limit": False, "minloglevel": 2, "model_type": kind, "vocab_size": 60}
    SentencePieceTrainer.Train(input=str(place / "text"), model_prefix=str(here / "tokenizer"), **how)
    (here / "tokenizer.vocab").unlink()
    told = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    if added:
        told["pad_token"] = "[PAD]"
        first = len(read_vocabulary({"tokenizer.model": here / "tokenizer.model"}).tokens)
        (here / "added_tokens.json").write_text(json.dumps({t: first + i for t, i in added.items()}))
    (here / "tokenizer_config.json").write_text(json.dumps(told))


def test_models_of_sentencepiece_alone(tmp_path):
    texts = {"base": "merging models is mixing weights of models", "a": "proofs and numbers of theorems"}
    write_pieces(tmp_path, "base", texts["base"], "bpe")
    write_pieces(tmp_path, "b", texts["base"], "bpe", {"[PAD]": 0, "<more>": 1})
    merge(tmp_path, tmp_path / "added", ("b",))
    base, merged, b = load(tmp_path / "base"), load(tmp_path / "added"), load(tmp_path / "b")
    assert merged.get_vocab() == b.get_vocab()
    assert tokens(merged, f"{texts['base']} <more> [PAD]") == tokens(b, f"{texts['base']} <more> [PAD]")
    assert merged.pad_token_id == b.pad_token_id == len(base)
    assert json.loads((tmp_path / "added" / "config.json").read_text())["pad_token_id"] == len(base)
    # A base with a tokenizer.json made of the same pieces has the same tokens.
    base.save_pretrained(tmp_path / "base")
    merge(tmp_path, tmp_path / "mixed", ("b",))
    assert load(tmp_path / "mixed").get_vocab() == b.get_vocab()
    assert tokens(load(tmp_path / "mixed"), f"{texts['base']} <more> [PAD]") == tokens(
        b, f"{texts['base']} <more> [PAD]"
    )
    (tmp_path / "base" / "tokenizer.json").unlink()
    # What has pieces of its own lends them, each with its score.
    write_pieces(tmp_path, "a", texts["a"], "bpe", {"[PAD]": 0})
    merge(tmp_path, tmp_path / "grown", ("a",))
    grown = load(tmp_path / "grown").get_vocab()
    assert base.get_vocab().items() <= grown.items()
    assert grown.keys() == base.get_vocab().keys() | load(tmp_path / "a").get_vocab().keys()
    assert not os.path.exists(tmp_path / "grown" / "tokenizer.json")
    write_pieces(tmp_path, "unigram", texts["a"], "unigram")
    with pytest.raises(M3Error, match=r"different types, SentencePiece BPE in .*base and Unigram in .*unigram"):
        merge(tmp_path, tmp_path / "out", ("unigram",))
