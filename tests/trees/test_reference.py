"""Reference digests are the oracle's, and what a machine makes is compared with them."""

import jax
import pytest
from support import oracle

from m3jax.trees import reference

TOLD = {
    "linear": {"method": "linear"},
    "task arithmetic, DARE": {"method": "task_arithmetic", "scale": 0.7, "sparsify": "dare", "keep": 0.3},
    "TIES by tensor, DELLA": {"method": "ties", "density": 0.4, "sparsify": "della", "keep": 0.5, "epsilon": 0.2},
    "TIES by model": {
        "method": "ties",
        "density": 0.4,
        "trim_scope": "model",
        "election": "unweighted",
        "sparsify": "breadcrumbs",
        "keep": 0.6,
        "gamma": 0.1,
    },
    "slerp": {"method": "slerp"},
    "Model Stock by row": {"method": "model_stock", "by_row": True},
}


@pytest.mark.parametrize("name", TOLD)
def test_digests_are_the_oracles(name):
    case = reference.CASES[name]
    base, *experts = reference.small_models(case)
    weights = list(case.weights) if isinstance(case.weights, tuple) else case.weights
    want = oracle.merge(experts, base, weights=weights, seed=5, **TOLD[name])
    assert reference.digest_of(want) == case.digest


def test_every_case_is_told():
    assert reference.CASES.keys() == TOLD.keys()


def test_a_machine_is_examined(monkeypatch):
    kept = ("linear", "task arithmetic, DARE")
    cases = {name: reference.CASES[name] for name in kept}
    cases["linear"] = cases["linear"]._replace(digest="of another machine")
    monkeypatch.setattr(reference, "CASES", cases)
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:2])
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--fast")
    lines = []
    found = reference.examine(lines.append)
    assert [[made.right for made in device.made] for device in found.devices] == [[False, True]] * 2
    assert not found.right
    assert found.flags["LIBTPU_INIT_ARGS"] == "--fast"
    assert len(lines) == 2
    assert found.to_json()["devices"][1]["made"][0]["case"] == "linear"
