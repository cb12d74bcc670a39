"""At every request to an object store: no model or a whole one is there, and the command goes on."""

import pytest
from support.store_faults import FAULTS, scenarios, served, step_through


def check(place, command, fault, stride):
    with served() as server:
        outcomes, calls, wrong = step_through(scenarios(place)[command, "fresh"], server, fault, stride)
    assert wrong == []
    assert outcomes.total() == -(-calls // stride) >= 3


@pytest.mark.slow
def test_some_requests_of_a_merge(tmp_path):
    check(tmp_path, "merge into the store", "kill", 9)


@pytest.mark.slow
@pytest.mark.parametrize("fault", sorted(set(FAULTS) - {"slow"}))
def test_requests_of_a_conversion(tmp_path, fault):
    """`scripts/faults --store` takes every request."""
    check(tmp_path, "convert from the store", fault, 11)
