"""Small models with tokenizers of their own, trained here, and the rows of their union by plain numpy."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from support.directories import write

KINDS = ("byte-level BPE", "SentencePiece BPE", "Unigram", "WordPiece")
TEXTS = {
    "base": ["merging models is mixing weights", "the base of all models"],
    "a": ["chat models talk to people", "people ask and models answer"],
    "b": ["proofs need numbers", "numbers and proofs of theorems"],
}
SPECIAL = {"base": ["<s>", "</s>"], "a": ["<|user|>", "<|end|>"], "b": ["[PAD]"]}
WIDTH = 6


def make_tokenizer(kind: str, name: str, texts: list[str]) -> Tokenizer:
    """A tokenizer of a kind; that of a model has the base's special tokens first, then its own."""
    first = ["[UNK]", *SPECIAL["base"]]
    match kind:
        case "byte-level BPE":
            made = Tokenizer(models.BPE())
            made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
            trainer = trainers.BpeTrainer(
                vocab_size=290,
                special_tokens=first,
                initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                show_progress=False,
            )
        case "SentencePiece BPE":
            made = Tokenizer(models.BPE(unk_token="[UNK]"))
            made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
            trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=first, show_progress=False)
        case "Unigram":
            made = Tokenizer(models.Unigram())
            made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
            trainer = trainers.UnigramTrainer(
                vocab_size=50, special_tokens=first, unk_token="[UNK]", show_progress=False
            )
        case _:
            made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
            made.pre_tokenizer = pre_tokenizers.Whitespace()
            trainer = trainers.WordPieceTrainer(vocab_size=60, special_tokens=first, show_progress=False)
    made.train_from_iterator(texts * 4, trainer)
    if name == "base":
        made.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", made.token_to_id("<s>"))])
    else:
        made.add_special_tokens(SPECIAL[name])
    if name == "a":
        made.add_tokens([AddedToken("<fold>", rstrip=True, normalized=False)])
    return made


def write_model(
    place: Path, name: str, tokenizer: Tokenizer, seed: int, dtype: str, **how: object
) -> dict[str, np.ndarray]:
    """Writes a model of one block with a tokenizer; returns its tensors.

    Args:
        place: Where.
        name: "base", "a" or "b".
        tokenizer: Its own.
        seed: Of its numbers.
        dtype: Of its numbers.
        **how: `padding`, rows beyond its tokens; `tied`; `flax`, for a head that is [width, rows].
    """
    rng = np.random.default_rng(seed)
    rows = tokenizer.get_vocab_size() + int(how.get("padding", 0))
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    shapes = {"model.embed_tokens.weight": (rows, WIDTH), "model.layers.0.mlp.weight": (4, WIDTH)}
    if not how.get("tied"):
        shapes["lm_head.weight"] = (rows, WIDTH)
    tensors = {key: rng.standard_normal(shape).astype(np.float32).astype(kind) for key, shape in shapes.items()}
    config = {"model_type": "llama", "vocab_size": rows, "tie_word_embeddings": bool(how.get("tied"))}
    config |= {"bos_token_id": tokenizer.token_to_id("<s>"), "eos_token_id": tokenizer.token_to_id("</s>")}
    write(place / name, tensors)
    (place / name / "config.json").write_text(json.dumps(config))
    (place / name / "generation_config.json").write_text(json.dumps({"eos_token_id": config["eos_token_id"]}))
    tokenizer.save(str(place / name / "tokenizer.json"))
    told = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    told |= {"pad_token": "[PAD]"} if name == "b" else {}
    (place / name / "tokenizer_config.json").write_text(json.dumps(told))
    return tensors
