"""scripts/benchmark_device, run small on the CPU."""

import importlib.machinery
import importlib.util
import json
from pathlib import Path

import jax
import pytest
from support import matrix

SCRIPT = Path(__file__).parents[2] / "scripts" / "benchmark_device"


@pytest.fixture(scope="module")
def script():
    loader = importlib.machinery.SourceFileLoader("benchmark_device", str(SCRIPT))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("benchmark_device", loader))
    loader.exec_module(module)
    return module


def test_its_cases_are_the_matrix(script):
    assert {name: made for name, (made, _, _) in matrix.METHODS.items()} == script.METHODS
    assert {name: made for name, (made, _, _) in matrix.SPARSIFIERS.items()} == script.SPARSIFIERS
    assert set(script.DTYPES) == set(matrix.DTYPES)


def test_it_has_nothing_to_do_on_a_cpu(script, capsys):
    assert script.main([]) == 0
    assert "no accelerator" in capsys.readouterr().out


@pytest.mark.parametrize("only", ["linear", pytest.param("ties", marks=pytest.mark.slow)])
def test_figures_of_a_small_run(script, capsys, tmp_path, only):
    arguments = ["--cpu", "--match", "linear+dare/", "--parameters", "2e5", "--rounds", "1", "--copy-bytes", "4096"]
    arguments += ["--only", only]
    assert script.main([*arguments, "--json", str(tmp_path / "figures.json")]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((tmp_path / "figures.json").read_text())
    assert sorted(report["digests"]) == ["linear+dare/bfloat16", "linear+dare/float16", "linear+dare/float32"]
    assert list(report["merges"]) == [only]
    assert 1e5 < report["parameters"] < 3e5
    for name, figures in report["merges"].items():
        assert figures["seconds"] > 0
        assert figures["eager_seconds"] > 0
        # linear reads two trees and writes one, the others read three: share and copies tell the same time
        moved = 3 / 4 if name == "linear" else 4 / 6
        assert figures["share"] * figures["copies"] == pytest.approx(moved)


def test_a_digest_that_differs_ends_it_with_1(script, capsys, monkeypatch):
    digests = iter("ab")
    monkeypatch.setattr(script, "digest", lambda *_: next(digests))
    assert script.main(["--cpu", "--match", "slerp/bfloat16"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["different"] == ["slerp/bfloat16"]
    assert "merges" not in report


@pytest.mark.slow
def test_all_digests_of_one_device_are_equal(script, capsys):
    assert script.main(["--cpu", "--digests", "--match", "+none/bfloat16"]) == 0
    assert set(json.loads(capsys.readouterr().out)["digests"]) == {f"{m}+none/bfloat16" for m in script.METHODS}


def test_the_model_is_scaled_to_the_memory_at_hand(script):
    class Small:
        @staticmethod
        def memory_stats():
            return {"bytes_limit": 16 * 2**30}

    assert 1.2e9 < script.entries(script.fitting_shapes(7e9, Small, False)) < 1.8e9
    assert 6.5e9 < script.entries(script.fitting_shapes(7e9, jax.devices()[0], False)) < 7.2e9
