"""`m3jax doctor`: what it says and how it ends."""

import json
import os
import re
import subprocess
import sys

import pytest

from m3jax.cli import commands
from m3jax.trees import reference


@pytest.mark.parametrize(
    ("platform", "reason"), [("nosuch", r" \(Unable to initialize backend 'nosuch'.*\)"), ("cuda", ".*")]
)
def test_devices_that_are_not_here_get_a_sentence(platform, reason):
    command = [sys.executable, "-m", "m3jax", "doctor"]
    ended = subprocess.run(command, env=os.environ | {"JAX_PLATFORMS": platform}, capture_output=True, text=True)
    said = rf"m3jax: JAX_PLATFORMS={platform} gives no device here{reason}: unset JAX_PLATFORMS, or set it to cpu\.\n"
    assert ended.returncode == 2
    assert re.fullmatch(said, ended.stderr)


@pytest.mark.parametrize("right", [True, False])
def test_the_verdict(right, monkeypatch, capsys):
    made = (reference.Made("linear", True, 0.31), reference.Made("slerp", right, 1.0))
    device = reference.Examined("gpu:0", "a \x1b[31mcard", made)
    found = reference.Examination("m3jax-2", {"jax": "0.10"}, {"XLA_FLAGS": "--x"}, (device,))
    monkeypatch.setattr(reference, "examine", lambda tell: found)
    assert commands.main(["doctor"]) == (0 if right else 2)
    said = capsys.readouterr().out
    assert "\x1b" not in said
    assert "set here: XLA_FLAGS=--x" in said
    assert ("1 of 2 merges have other bits than on every other machine" in said) is not right
    assert ("every device makes the bits that every machine makes" in said) is right
    assert commands.main(["doctor", "--json"]) == (0 if right else 2)
    assert json.loads(capsys.readouterr().out)["right"] is right
