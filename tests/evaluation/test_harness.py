"""lm-evaluation-harness runs tasks of a local file on a model of ours, offline."""

import importlib.util
import json
import math
import os
import random
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from m3jax.errors import M3Error
from m3jax.evaluation import (
    Completion,
    GenerationSettings,
    LogLikelihood,
    Pair,
    load_harness_tasks,
    make_harness_model,
    run_harness,
)
from m3jax.evaluation.harness import _settings, _windows

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

    bos_token, bos_token_id, eos_token_id = "<s>", 1, 2

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        found = [int(word) if word.isdigit() else 1000 + len(word) for word in re.findall(r"<s>|\S+", text)]
        return [1] * add_special_tokens + [1 if token == 1003 else token for token in found]

    def apply_chat_template(self, history: list[dict[str, str]], **options: object) -> str:
        return "".join(f"<{turn['role']}>{turn['content']}" for turn in history) + "<assistant>"


class Model:
    """Likes the colour red, writes the last word in capitals, and gives each word half a bit."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[str], GenerationSettings]] = []
        self.pairs: list[Pair] = []

    def generate(self, prompts: Sequence[str], settings: GenerationSettings) -> list[Completion]:
        self.asked.append((list(prompts), settings))
        return [Completion(prompt.split()[-1].upper(), 1, True) for prompt in prompts]

    def score(self, pairs: Sequence[Pair]) -> list[LogLikelihood]:
        self.pairs += pairs
        return [self.score_one(continuation) for _, continuation in pairs]

    def score_one(self, continuation: str | Sequence[int]) -> LogLikelihood:
        if not isinstance(continuation, str):
            return LogLikelihood(-5.0 * len(continuation), False)
        return LogLikelihood(-0.5 * len(continuation.split()) - 9 * (" red" not in continuation), "red" in continuation)


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
    had_torch = "torch" in sys.modules
    model = Model()
    adapter = make_harness_model(model.generate, model.score, Words(), max_length=64, batch_size=4)
    names = ["m3jax_choice", "m3jax_writing", "m3jax_rolling"]
    results = run_harness(adapter, names, include_path=str(tasks))["results"]
    assert results["m3jax_choice"]["acc,none"] == 0.5
    assert results["m3jax_writing"]["exact_match,none"] == 1.0
    assert math.isclose(results["m3jax_rolling"]["word_perplexity,none"], math.exp(3 * 5 / 2))
    assert ("Colour 3?", " red") in model.pairs
    assert ([1], [1, 1006, 1002]) in model.pairs  # the token before the text, then the text as the model reads it
    assert {settings for _, settings in model.asked} == {GenerationSettings(max_tokens=5, stop=("\n",))}
    assert max(len(prompts) for prompts, _ in model.asked) == 4
    assert had_torch or "torch" not in sys.modules


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
    with pytest.raises(M3Error, match=r"has no task called no_such_task_here.*; see"):
        run_harness(adapter, ["no_such_task_here"])


@needs_harness
def test_results_come_in_the_order_of_the_requests() -> None:
    model = Model()
    adapter = make_harness_model(model.generate, model.score, Words(), max_length=64, batch_size=2)
    texts = ["a b c", "d", "e f", "g h i j"]
    greedy = {"until": "x", "max_gen_toks": 3}
    warm = {"until": ["y", ""], "do_sample": True, "temperature": 0.7, "top_p": 0.9}
    requests = [SimpleNamespace(args=(text, warm if len(text) == 1 else greedy)) for text in texts]
    assert adapter.generate_until(requests) == ["C", "D", "F", "J"]
    assert {settings for _, settings in model.asked} == {
        GenerationSettings(3, ("x",)), GenerationSettings(256, ("y",), 0.7, 0.9),
    }  # fmt: skip
    pairs = [SimpleNamespace(args=("", " red" * number)) for number in (1, 3, 2)]
    assert adapter.loglikelihood(pairs) == [(-0.5, True), (-1.5, True), (-1.0, True)]


@needs_harness
def test_windows_are_the_harnesss_own() -> None:
    """The example in the documentation of `lm_eval.api.model.LM.loglikelihood_rolling`, and what must always hold."""
    text = "<s> " + " ".join(map(str, range(10, 19)))
    assert _windows(text, Words(), 4) == [([1], [1, 10, 11, 12]), ([12], [13, 14, 15, 16]), ([14, 15, 16], [17, 18])]
    for max_length in (2, 3, 9, 10, 11, 99):
        windows = _windows(text, Words(), max_length)
        assert [token for _, after in windows for token in after] == [1, *range(10, 19)]
        assert all(len(before) + len(after) <= max_length + 1 for before, after in windows)
    assert _windows("", Words(), 8) == [([1], [1])]


@needs_harness
def test_windows_without_a_token_that_begins_a_text() -> None:
    bare = Words()
    bare.bos_token = bare.bos_token_id = bare.eos_token_id = None  # type: ignore[assignment]
    bare.encode = lambda text, **_: [*map(int, text.split())]  # type: ignore[method-assign]
    assert _windows("5 6 7", bare, 8) == [([5], [6, 7])]
    assert _windows("", bare, 8) == []


@needs_harness
def test_repeats_of_a_prompt_are_drawn_anew() -> None:
    model = Model()
    adapter = make_harness_model(model.generate, model.score, Words(), max_length=64, batch_size=8)
    warm, cold = {"until": [], "do_sample": True, "temperature": 1.0}, {"until": []}
    adapter.generate_until(3 * [SimpleNamespace(args=("a", warm))] + 2 * [SimpleNamespace(args=("b", cold))])
    assert [(prompts, settings.draw) for prompts, settings in model.asked] == [
        (["a"], 0), (["a"], 1), (["a"], 2), (["b", "b"], 0),
    ]  # fmt: skip


@needs_harness
@pytest.mark.parametrize(
    ("wanted", "settings"),
    [
        ({}, (256, 0.0)),
        ({"max_gen_toks": 7, "max_tokens": 9}, (7, 0.0)),
        ({"max_new_tokens": 8}, (8, 0.0)),
        ({"max_tokens": "9"}, (9, 0.0)),
        ({"max_completion_tokens": 10}, (10, 0.0)),
        ({"temperature": 0.5}, (256, 0.5)),
        ({"temperature": 0.5, "do_sample": False}, (256, 0.0)),
        ({"do_sample": True}, (256, 1.0)),
    ],
)
def test_settings_have_every_name_that_the_harness_knows(wanted: dict[str, Any], settings: tuple[int, float]) -> None:
    found = _settings(wanted)
    assert (found.max_tokens, found.temperature) == settings


@needs_harness
@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("doc_to_text: '{{ question | nothing }}'", r"lm-evaluation-harness (fails at|cannot load its task) .*nothing"),
        ("dataset_path: nobody/nothing_here", r"cannot load its task m3jax_writing: .*fetched with a network"),
        ("output_type: nonsense", r"cannot load its task m3jax_writing: .*nonsense"),
        ("unsafe_code: true", r"m3jax_writing runs programs .* without a sandbox: use m3jax's own"),
        ("generation_kwargs: {until: [], top_k: 50}", r"wants to generate with top_k=50, which m3jax does not do"),
        ("metric_list: [{metric: no_such_metric}]", r"cannot load its task m3jax_writing: .*no_such_metric"),
    ],
)
def test_what_the_harness_cannot_do_is_one_sentence(tasks: Path, change: str, sentence: str) -> None:
    key = change.partition(":")[0]
    lines = [line for line in (tasks / "writing.yaml").read_text().splitlines() if not line.startswith(key)]
    (tasks / "writing.yaml").write_text("\n".join([*lines, change]))
    adapter = make_harness_model(Model().generate, Model().score, Words(), max_length=64)
    with pytest.raises(M3Error, match=sentence) as caught:
        run_harness(adapter, ["m3jax_writing"], include_path=str(tasks))
    assert "\n" not in str(caught.value)


@needs_harness
@pytest.mark.slow
def test_code_tasks_of_the_harness_name_our_own(tasks: Path) -> None:
    """They fetch programs when they are imported, which fails offline."""
    with pytest.raises(M3Error, match=r"humaneval.*--task humaneval"):
        load_harness_tasks(["humaneval"])


@needs_harness
@pytest.mark.slow
def test_a_failing_model_is_no_fault_of_the_harness(tasks: Path) -> None:
    def broken(pairs: Sequence[Pair]) -> list[LogLikelihood]:
        raise ZeroDivisionError("ours")

    adapter = make_harness_model(Model().generate, broken, Words(), max_length=64)
    with pytest.raises(ZeroDivisionError, match="ours"):
        run_harness(adapter, ["m3jax_choice"], include_path=str(tasks))


@needs_harness
@pytest.mark.slow
def test_no_directory_of_task_files_is_said(tmp_path: Path) -> None:
    with pytest.raises(M3Error, match=r"--include-path .*nowhere is no directory"):
        load_harness_tasks(["arc_easy"], str(tmp_path / "nowhere"))


@needs_harness
@pytest.mark.slow
def test_nothing_of_the_harness_is_left(tasks: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Not even where it draws samples for a standard error, which it announces on standard output."""
    text = (tasks / "writing.yaml").read_text().replace("exact_match", "bleu")
    (tasks / "writing.yaml").write_text(text)
    model = Model()
    adapter = make_harness_model(model.generate, model.score, Words(), max_length=64)
    random.seed(5)
    before = random.getstate(), np.random.get_state()[1].tolist(), dict(os.environ)
    run_harness(adapter, ["m3jax_writing"], include_path=str(tasks), limit=3)
    assert (random.getstate(), np.random.get_state()[1].tolist(), dict(os.environ)) == before
    out, err = capfd.readouterr()
    assert out == ""
    assert "%|" not in err


@needs_harness
def test_progress_is_told_with_its_rate() -> None:
    said: list[str] = []
    model = Model()
    adapter = make_harness_model(model.generate, model.score, Words(), max_length=64, batch_size=2, tell=said.append)
    adapter.loglikelihood([SimpleNamespace(args=("", " red")) for _ in range(4)])
    assert re.fullmatch(r"4 of 4 texts scored, [\d.]+/s in 0.0 s", said[-1])


def test_without_the_harness_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(M3Error, match=r"pip install 'm3jax\[eval\]'"):
        make_harness_model(Model().generate, Model().score, Words(), max_length=64)
    with pytest.raises(M3Error, match=r"pip install 'm3jax\[eval\]'"):
        run_harness(None, ["arc_easy"])
