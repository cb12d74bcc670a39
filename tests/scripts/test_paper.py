"""The paper's table, on stand-ins of its models."""

import argparse
import importlib.machinery
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.stand_ins import BASE, EXPERTS, ROWS, write_stand_ins

from m3jax.checkpoints import open_checkpoint
from m3jax.recipe import load_recipe

SCRIPT = Path(__file__).parents[2] / "scripts" / "paper"
EXAMPLES = {
    "alpaca_eval": {"instruction": "Name a colour.", "output": "Red.", "dataset": "colours", "generator": "a person"},
    "humaneval": {
        **{
            "task_id": "HumanEval/0",
            "prompt": "def one():\n",
            "entry_point": "one",
            "canonical_solution": "    return 1",
        },
        "test": "def check(candidate):\n    assert candidate() == 1\n",
    },
    "mbpp": {"task_id": 11, "text": "Return 1.", "code": "", "test_list": ["assert one() == 1"], "test_setup_code": ""},
    "livebench_typos": {
        "question_id": "a",
        "turns": ["Mend.\n\nHelo."],
        "ground_truth": "Hello.",
        "task": "typos",
    },
    "sst2": {"sentence": "a good film", "label": 1},
    "cola": {"sentence": "He go.", "label": 0},
}


def paper():
    loader = importlib.machinery.SourceFileLoader("paper", str(SCRIPT))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("paper", loader))
    sys.modules["paper"] = module  # typing looks for the annotations of its tuples there
    loader.exec_module(module)
    return module


def asked(tmp_path: Path, **given) -> argparse.Namespace:
    options = {"out": tmp_path, "data": None, "masked_lm": None, "only": ["*"], "passed": [], **given}
    return argparse.Namespace(**options)


def test_every_recipe_is_evaluated_where_its_experts_are(tmp_path) -> None:
    rows = {model.name: model for model in paper().table(asked(tmp_path, masked_lm="bert"))}
    assert len(rows) == 3 + 36
    steps = {name: [step.name for step in model.steps] for name, model in rows.items()}
    attacks = ["attack sst2", "attack cola"]
    assert steps["math"] == ["gsm8k", "math", *attacks]
    assert steps["lm-math_ties_m3"] == ["alpaca_eval", "gsm8k", "math", "livebench_coding", *attacks]
    places = [step.command[1].rpartition("/merged/")[2] for step in rows["lm-math_ties_m3"].steps]
    beside = [f"lm-math_ties_m3/also_for/{name}" for name in ("WizardLM-13B-V1.2", "WizardMath-13B-V1.0")]
    assert places == [beside[0], beside[1], beside[1], *["lm-math_ties_m3"] * 3]
    command = rows["math-code_average"].steps[-1].command
    assert command[command.index("--attack") + 1] == "deepwordbug,stresstest,bertattack"
    for name, model in rows.items():
        if model.merge is not None:
            recipe = load_recipe(Path(model.merge.command[1]))
            assert [expert.model for expert in recipe.models] == [
                EXPERTS[part] for part in name.split("_")[0].split("-")
            ]
            assert recipe.base_model == BASE


def test_a_test_set_that_is_not_there_is_named(tmp_path) -> None:
    with pytest.raises(SystemExit, match=r"has no test set gsm8k.jsonl"):
        list(paper().table(asked(tmp_path, data=tmp_path, only=["math"])))


@pytest.mark.slow
def test_stand_ins_from_start_to_report(tmp_path) -> None:
    for name, row in EXAMPLES.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    write_stand_ins(tmp_path / "models", width=32)
    for name, rows in ROWS.items():
        with open_checkpoint(tmp_path / "models" / name) as checkpoint:
            assert len(checkpoint.files()) == 3
            assert checkpoint.tensors["lm_head.weight"][1:] == ((rows, 32), "F16")
    command = [sys.executable, SCRIPT, tmp_path / "out", "--models", tmp_path / "models", "--data", tmp_path]
    command += ["--only", "lm-code_ties_m3_dare", "--max-tokens", "2", "--free"]
    planned = subprocess.run([*command, "--plan"], capture_output=True, text=True, check=True).stdout
    assert "| lm-code_ties_m3_dare | 0.05 GB | 0.00 GB |" in planned
    assert "| merge, alpaca_eval, humaneval, mbpp, livebench_typos, attack sst2, attack cola |" in planned
    subprocess.run(command, check=True)
    report = (tmp_path / "out" / "report" / "report.md").read_text()
    assert all(task in report for task in ("humaneval", "mbpp", "livebench_typos", "sst2", "cola"))
    assert (tmp_path / "out" / "manifests" / "lm-code_ties_m3_dare.json").is_file()
    assert not list((tmp_path / "out" / "merged").iterdir())
    again = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "# lm-code" not in again
