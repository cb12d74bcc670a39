"""The bits of small merges of every kind are those that were kept."""

import importlib.machinery
import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KEPT = json.loads((ROOT / "tests" / "golden.json").read_text())


def golden():
    loader = importlib.machinery.SourceFileLoader("golden", str(ROOT / "scripts" / "golden"))
    spec = importlib.util.spec_from_loader("golden", loader)
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("first", "every"), [pytest.param(3, 60, id="few"), pytest.param(1, 25, id="many", marks=pytest.mark.slow)]
)
def test_bits_are_those_that_were_kept(first, every):
    found = golden().compute(first=first, every=every)
    assert len(found) == len(range(first, len(KEPT), every))
    assert found == {name: KEPT[name] for name in found}
