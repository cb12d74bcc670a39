"""The decoder and torch transformers, side by side on random models of every family.

Logits of all variants, the rest of one of each family: `scripts/decoder_parity` measures everything of all of them.
"""

import pytest
from support import parity

pytestmark = [
    pytest.mark.torch,
    pytest.mark.filterwarnings("default"),  # torch and transformers warn of themselves
]
pytest.importorskip("torch", reason="needs torch")
pytest.importorskip("transformers", reason="needs transformers")


FAMILIES = {kind: name for name, (kind, _) in reversed(parity.CASES.items())}


@pytest.fixture(scope="module", params=parity.CASES)
def pair(request, tmp_path_factory):
    return parity.make(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module", params=FAMILIES.values())
def family(request, tmp_path_factory):
    return parity.make(request.param, tmp_path_factory.mktemp(request.param))


def test_logits_are_equal(pair):
    assert parity.logit_difference(pair) < 1e-4


def test_logits_behind_padding_are_equal(family):
    assert parity.padded_difference(family) < 1e-4


def test_greedy_texts_are_identical(family):
    ours, theirs = parity.greedy_texts(family)
    assert ours == theirs


def test_log_likelihoods_are_equal(family):
    assert parity.log_likelihood_difference(family) < 1e-4


@pytest.mark.parametrize("name", ["llama3", "mistral-wide-heads", "qwen2", "gemma3"])
def test_what_maxtext_stores_of_a_model_computes_the_same(name, tmp_path):
    pair = parity.make(name, tmp_path / "model")
    again = parity.from_maxtext(pair, tmp_path)
    assert parity.logit_difference(pair._replace(params=again)) < 1e-4
