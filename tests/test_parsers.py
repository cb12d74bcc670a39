"""Whatever a file holds, a reader gives a result or a sentence, and raises nothing else."""

import json
import random
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.mutations import mutated
from support.parsers import PARSERS, refusal

_REFUSED = ("index", "index of msgpack", "index of PyTorch", "tokenizer", "journal in an object store")
"""Readers whose good file stands without what it tells of."""


@pytest.mark.parametrize("name", PARSERS)
def test_a_good_file_is_read(name: str, tmp_path: Path) -> None:
    parser = PARSERS[name]
    said = refusal(parser, parser.good(), tmp_path)
    assert said is None or name in _REFUSED, said


def _with(*path: Any) -> Callable[[bytes], bytes]:
    """A change of a file of JSON: the last of these stands where the others lead."""

    def changed(good: bytes) -> bytes:
        *way, key, value = path
        told = json.loads(good)
        holder = told
        for step in way:
            holder = holder[step]
        holder[key] = value
        return json.dumps(told).encode()

    return changed


FOUND: list[tuple[str, Callable[[bytes], bytes]]] = [
    ("manifest, replayed", _with("inputs", 0, "name", {})),
    ("manifest, replayed", lambda good: good.replace(b'"revision"', b'"x"')),
    ("manifest, sealed again", lambda good: re.sub(rb'"digest": ("\w+",\s*"tensors": \{\s*"model)', rb'"x": \1', good)),
    ("mark, sealed again", _with("output", "files", [])),
    ("journal in an object store", _with("entries", 0, "shard", {})),
    ("journal in an object store", _with("entries", 1, "ours", 1)),
    ("journal, and its merge gone on with", _with(1, "findings", [[]])),
    ("journal, and its merge gone on with", _with(1, "findings", None)),
    ("journal, and its merge gone on with", _with(1, "digests", [])),
    ("journal, and its merge gone on with", _with(1, [])),
    ("journal, and its merge gone on with", _with(2, "tensors", {"a": {}})),
    ("journal, and its merge gone on with", _with(2, "shard", {})),
    ("journal, and its merge gone on with", _with(2, "replaces", {"name": "a/b"})),
    ("journal, and its merge gone on with", lambda good: b"["),
    ("journal, and its merge gone on with", lambda good: good.replace(b'"0": {"model.embed', b'"0": {"x')),
    ("array of an early Orbax", _with("chunks", [2, 2**40])),
    ("tree of an early Orbax", lambda good: good.replace(b"//dense.kernel", b"//dense.kerne\\")),
    ("mark, sealed again", _with("inputs", 0, {"name": "a", "tensors": {}})),
    ("bert", _with("layer_norm_eps", "x")),
    ("bert", _with("layer_norm_eps", 10**290)),
    ("bert", _with("hidden_act", [])),
    ("pooling", lambda good: b"[1]"),
    ("template of Orbax", _with("tree_metadata", "('a',)", "key_metadata", [{"key": "a"}])),
    ("arrays of Orbax", _with("array_metadatas", [{}])),
    ("recipe", lambda good: b"[" * 1500),
    ("task of the harness", lambda good: b"[" * 100_000),
    ("task of the harness", lambda good: good.replace(b"other", b"x" * 300)),
    ("task of the harness", lambda good: good.replace(b"other.yaml", b'"\\0"')),
]
"""What the readers once did not stand."""


def test_what_was_found_is_read_or_refused(tmp_path: Path) -> None:
    for number, (name, change) in enumerate(FOUND):
        if name in PARSERS:  # not without the packages that it needs
            place = tmp_path / str(number)
            place.mkdir()
            refusal(PARSERS[name], change(PARSERS[name].good()), place)


@pytest.mark.parametrize("name", PARSERS)
@given(seed=st.integers(0, 2**32))
@settings(max_examples=25, deadline=None)
def test_mutations_are_read_or_refused(name: str, seed: int) -> None:
    parser = PARSERS[name]
    with tempfile.TemporaryDirectory() as place:
        refusal(parser, mutated(random.Random(seed), parser.good(), parser.is_json), Path(place))


@pytest.mark.parametrize("name", PARSERS)
@given(blob=st.binary(max_size=200) | st.text(max_size=80).map(lambda text: text.encode("utf-8", "replace")))
@settings(max_examples=10, deadline=None)
def test_any_bytes_are_read_or_refused(name: str, blob: bytes) -> None:
    with tempfile.TemporaryDirectory() as place:
        refusal(PARSERS[name], blob, Path(place))
