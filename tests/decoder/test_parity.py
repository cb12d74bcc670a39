"""The decoder and torch transformers, side by side on random models of every family."""

import pytest
from support import parity

pytestmark = [
    pytest.mark.torch,
    pytest.mark.filterwarnings("default"),  # torch and transformers warn of themselves
]
pytest.importorskip("torch", reason="needs torch")
pytest.importorskip("transformers", reason="needs transformers")


@pytest.fixture(scope="module", params=parity.CASES)
def pair(request, tmp_path_factory):
    return parity.make(request.param, tmp_path_factory.mktemp(request.param))


def test_logits_are_equal(pair):
    assert parity.logit_difference(pair) < 1e-4


def test_logits_behind_padding_are_equal(pair):
    assert parity.padded_difference(pair) < 1e-4


def test_greedy_texts_are_identical(pair):
    ours, theirs = parity.greedy_texts(pair)
    assert ours == theirs


def test_log_likelihoods_are_equal(pair):
    assert parity.log_likelihood_difference(pair) < 1e-4
