"""The bits of small merges of every kind are those that were kept."""

import importlib.machinery
import importlib.util
import json
import os
import subprocess
import sys
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


def test_bits_are_those_that_were_kept():
    first, every = 3, 60
    found = golden().compute(first=first, every=every)
    assert len(found) == len(range(first, len(KEPT), every))
    assert found == {name: KEPT[name] for name in found}


def test_bits_are_those_that_were_kept_from_and_to_every_format():
    found = golden().compute(only="format ")
    assert found == {name: KEPT[name] for name in KEPT if name.startswith("format ")}


@pytest.mark.slow
def test_bits_are_those_that_were_kept_as_users_compile():
    """With all of the compiler's optimisations, of which the other tests have none."""
    first, every = 1, 25
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, str(ROOT / "scripts" / "golden"), "--first", str(first), "--every", str(every)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ran.stdout == f"{len(range(first, len(KEPT), every))} cases, 0 differ, 0 new\n", ran.stderr
    assert ran.returncode == 0
