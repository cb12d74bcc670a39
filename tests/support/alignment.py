"""Models whose vocabularies differ, and their rows aligned by plain numpy, independent of m3jax."""

import json
from fractions import Fraction

import numpy as np

from support.directories import write

WIDTH = 6
BASE = ["<unk>", "a", "b", "c", "d", "ab", "cd", "abc"]
VOCABULARIES = {
    "base": BASE,
    "one": ["<unk>", "b", "a", "d", "c", "ab", "cd", "abc", "shared", "e", "<|user|>"],  # in another order, and more
    "two": ["<unk>", "a", "b", "c", "d", "ab", "shared", "[PAD]"],  # without cd and abc
    "three": [*BASE, "[PAD]"],
}
SPECIAL = ("<unk>", "<|user|>", "[PAD]", "<never>")
ROWS = {"base": 11, "one": 11, "two": 9, "three": 9}  # the base and two have rows beyond their tokens
UNION = [*BASE, "shared", "e", "<|user|>", "[PAD]"]
NAMES = {"plain": ("model.embed_tokens.weight", "lm_head.weight"), "flax": ("embed_tokens.embedding", "lm_head.kernel")}


def tokenizer(tokens, special=SPECIAL):
    """A tokenizer.json of these tokens, of byte-pair encoding."""
    merges = [["a", "b"], ["c", "d"], ["ab", "c"]]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": t, **flags} for i, t in enumerate(tokens) if t in special],
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [pair for pair in merges if {*pair, "".join(pair)} <= set(tokens)],
        },
    }


def write_models(place, dtype, style="plain", tied=False):
    """Writes base, one, two and three; returns their tensors."""
    rng, found = np.random.default_rng(0), {}
    embedding, head = NAMES[style]
    inner = "model.layers.0.mlp.weight" if style == "plain" else "layers.0.mlp.kernel"
    for name, tokens in VOCABULARIES.items():
        rows = ROWS[name]
        shapes = {embedding: (rows, WIDTH), inner: (4, WIDTH)}
        if not tied:
            shapes[head] = (rows, WIDTH) if style == "plain" else (WIDTH, rows)
        found[name] = {
            key: rng.standard_normal(shape).astype(np.float32).astype(dtype) for key, shape in shapes.items()
        }
        config = {"model_type": "llama", "vocab_size": rows, "tie_word_embeddings": tied}
        write(place / name, found[name], config)
        (place / name / "tokenizer.json").write_text(json.dumps(tokenizer(tokens)))
    return found


def mean(rows, dtype):
    """The exact mean, rounded to float32 and, as of eight digits no more than 24 are cut off, to the dtype."""
    found = np.empty(rows.shape[1:], np.float64)
    for place in np.ndindex(found.shape):
        found[place] = float(sum(map(Fraction, rows[(slice(None), *place)].astype(float).tolist())) / len(rows))
    return found.astype(np.float32).astype(dtype)


def align(tables, tokens=UNION, base="base", asked=None, size=None):
    """The rows [rows, width] of each model by the tokens of an output.

    Args:
        tables: Of each model, by name; the vocabularies are those above.
        tokens: Of the output, by their ids.
        base: The model that lends first; None for nobody.
        asked: By token, whether all models get its row, and the row.
        size: How many rows there are; as many as tokens if None.
    """
    ids = {name: {token: i for i, token in enumerate(VOCABULARIES[name])} for name in tables}
    found = {}
    for name, table in tables.items():
        rows = []
        for place in range(size or len(tokens)):
            token = tokens[place] if place < len(tokens) else None
            having = [other for other in tables if token in ids[other]]
            force, row = (asked or {}).get(token, (False, None))
            if token is None:
                own = len(VOCABULARIES[name]) <= place < len(table)
                rows.append(table[place] if own else mean(table, table.dtype))
            elif token in ids[name] and not force:
                rows.append(table[ids[name][token]])
            elif row is not None:
                rows.append(row.astype(table.dtype))
            elif base in having:
                rows.append(tables[base][ids[base][token]].astype(table.dtype))
            elif having:
                lent = np.stack([tables[other][ids[other][token]] for other in having])
                rows.append(mean(lent, table.dtype) if len(having) > 1 else lent[0].astype(table.dtype))
            else:
                rows.append(mean(table, table.dtype))
        found[name] = np.stack(rows)
    return found


def aligned(models, style="plain", **how):
    """The models with both tables aligned."""
    found = {name: dict(tensors) for name, tensors in models.items()}
    for key, turned in zip(NAMES[style], (False, style == "flax"), strict=True):
        if key in next(iter(models.values())):
            tables = {name: tensors[key].T if turned else tensors[key] for name, tensors in models.items()}
            for name, table in align(tables, **how).items():
                found[name][key] = np.ascontiguousarray(table.T) if turned else table
    return found
