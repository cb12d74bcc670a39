"""Whatever a file holds, a reader gives a result or a sentence, and raises nothing else."""

import random
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.parsers import PARSERS, mutated, reads_or_refuses


@pytest.mark.parametrize("name", PARSERS)
def test_a_good_file_is_read(name: str, tmp_path: Path) -> None:
    parser = PARSERS[name]
    assert reads_or_refuses(parser, parser.good(), tmp_path) or name in ("index", "tokenizer")


@pytest.mark.parametrize("name", PARSERS)
@given(seed=st.integers(0, 2**32))
@settings(max_examples=25, deadline=None)
def test_mutations_are_read_or_refused(name: str, seed: int) -> None:
    with tempfile.TemporaryDirectory() as place:
        reads_or_refuses(PARSERS[name], mutated(random.Random(seed), PARSERS[name]), Path(place))


@pytest.mark.parametrize("name", PARSERS)
@given(blob=st.binary(max_size=200) | st.text(max_size=80).map(lambda text: text.encode("utf-8", "replace")))
@settings(max_examples=10, deadline=None)
def test_any_bytes_are_read_or_refused(name: str, blob: bytes) -> None:
    with tempfile.TemporaryDirectory() as place:
        reads_or_refuses(PARSERS[name], blob, Path(place))
