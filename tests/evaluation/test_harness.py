"""lm-evaluation-harness runs tasks of a local file on a model of ours, offline."""

import importlib.util
import itertools
import json
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from m3jax.errors import M3Error
from m3jax.evaluation import Completion, GenerationSettings, LogLikelihood, make_harness_model, run_harness
from m3jax.evaluation.harness import _windows

needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None or importlib.util.find_spec("datasets") is None,
    reason="needs the extra 'eval' (lm-eval, datasets)",
)

# Warnings of the harness's and its data library's own making.
pytestmark = [pytest.mark.filterwarnings("default")]

CHOICE = """
task: m3jax_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
metric_list: [{{metric: acc}}]
"""

WRITING = """
task: m3jax_writing
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 5}}
metric_list: [{{metric: exact_match}}]
"""

ROLLING = """
task: m3jax_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list: [{{metric: word_perplexity}}]
"""


class Words:
    """A tokenizer of words."""

    name_or_path = "tests/words"

    def __call__(self, text: str, **options: object) -> dict[str, Any]:
        return {"offset_mapping": [found.span() for found in re.finditer(r"\S+", text)]}

    def apply_chat_template(self, history: list[dict[str, str]], **options: object) -> str:
        return "".join(f"<{turn['role']}>{turn['content']}" for turn in history) + "<assistant>"


class Model:
    """Likes the colour red, writes the last word in capitals, and gives each word half a bit."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[str], GenerationSettings]] = []
        self.pairs: list[tuple[str, str]] = []

    def generate(self, prompts: Sequence[str], settings: GenerationSettings) -> list[Completion]:
        self.asked.append((list(prompts), settings))
        return [Completion(prompt.split()[-1].upper(), 1, True) for prompt in prompts]

    def score(self, pairs: Sequence[tuple[str, str]]) -> list[LogLikelihood]:
        self.pairs += pairs
        return [
            LogLikelihood(-0.5 * len(continuation.split()) - 9 * (" red" not in continuation), "red" in continuation)
            for _, continuation in pairs
        ]


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    rows = [
        {"question": f"Colour {number}?", "choices": ["blue", "red"], "label": number % 2, "answer": f"{number}?"}
        for number in range(6)
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in (("choice", CHOICE), ("writing", WRITING), ("rolling", ROLLING)):
        (tmp_path / f"{name}.yaml").write_text(text.format(data=data))
    return tmp_path


@needs_harness
@pytest.mark.slow
def test_tasks_of_a_local_file(tasks: Path) -> None:
    model = Model()
    adapter = make_harness_model(model.generate, model.score, Words(), max_length=64, batch_size=4)
    names = ["m3jax_choice", "m3jax_writing", "m3jax_rolling"]
    results = run_harness(adapter, names, include_path=str(tasks))["results"]
    assert results["m3jax_choice"]["acc,none"] == 0.5
    assert results["m3jax_writing"]["exact_match,none"] == 1.0
    assert math.isclose(results["m3jax_rolling"]["word_perplexity,none"], math.exp(9 / 2 + 0.5))
    assert ("Colour 3?", " red") in model.pairs
    assert ("", "Colour 3?") in model.pairs
    assert {settings for _, settings in model.asked} == {GenerationSettings(max_tokens=5, stop=("\n",))}
    assert max(len(prompts) for prompts, _ in model.asked) == 4
    assert "torch" not in sys.modules


@needs_harness
@pytest.mark.slow
def test_limit_and_chat(tasks: Path) -> None:
    model = Model()
    adapter = make_harness_model(model.generate, model.score, Words(), max_length=64)
    run_harness(adapter, ["m3jax_writing"], include_path=str(tasks), limit=2, chat=True)
    assert sorted(prompt for prompts, _ in model.asked for prompt in prompts) == [
        "<user>Colour 0?<assistant>", "<user>Colour 1?<assistant>",
    ]  # fmt: skip
    assert adapter.tokenizer_name == "tests__words"


@needs_harness
@pytest.mark.slow
def test_unknown_task_is_said() -> None:
    adapter = make_harness_model(Model().generate, Model().score, Words(), max_length=64)
    with pytest.raises(M3Error, match="has no task called no_such_task_here; see"):
        run_harness(adapter, ["no_such_task_here"])


@needs_harness
def test_results_come_in_the_order_of_the_requests() -> None:
    model = Model()
    adapter = make_harness_model(model.generate, model.score, Words(), max_length=64, batch_size=2)
    texts = ["a b c", "d", "e f", "g h i j"]
    greedy = {"until": "x", "max_gen_toks": 3}
    warm = {"until": ["y"], "do_sample": True, "temperature": 0.7, "top_p": 0.9}
    requests = [SimpleNamespace(args=(text, warm if len(text) == 1 else greedy)) for text in texts]
    assert adapter.generate_until(requests) == ["C", "D", "F", "J"]
    assert {settings for _, settings in model.asked} == {
        GenerationSettings(3, ("x",)), GenerationSettings(256, ("y",), 0.7, 0.9),
    }  # fmt: skip
    pairs = [SimpleNamespace(args=("", " red" * number)) for number in (1, 3, 2)]
    assert adapter.loglikelihood(pairs) == [(-0.5, True), (-1.5, True), (-1.0, True)]


def test_windows_score_each_token_once() -> None:
    text = " ".join(f"w{number}" for number in range(25)) + " "
    for max_length in (4, 5, 9, 25, 26, 99):
        windows = _windows(text, Words(), max_length)
        assert "".join(continuation for _, continuation in windows) == text
        assert windows[0][0] == ""
        for (_, before), (context, continuation) in itertools.pairwise(windows):
            assert before.endswith(context)
            assert len(context.split()) == 1
            assert len((context + continuation).split()) < max_length
    assert _windows("", Words(), 8) == [("", "")]


def test_without_the_harness_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(M3Error, match=r"pip install 'm3jax\[eval\]'"):
        make_harness_model(Model().generate, Model().score, Words(), max_length=64)
    with pytest.raises(M3Error, match=r"pip install 'm3jax\[eval\]'"):
        run_harness(None, ["arc_easy"])
