"""lm-evaluation-harness runs tasks of a local file on a model of ours, offline."""

import importlib.util
import json
import math
import os
import random
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from jinja2.exceptions import TemplateError
from support.tiny_models import build_models

from m3jax.cli import commands
from m3jax.errors import M3Error
from m3jax.evaluation import (
    Completion,
    GenerationSettings,
    LogLikelihood,
    Pair,
    harness_tasks,
    load_harness_tasks,
    make_harness_model,
    run_harness,
)
from m3jax.evaluation.harness import Showing, _settings, _windows
from m3jax.evaluation.models import harness_model, load_model
from m3jax.evaluation.records import Reply, open_journal
from m3jax.evaluation.tokens import split, split_as_harness

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
    chat_template = "a text"

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
    run_harness(adapter, ["m3jax_writing"], include_path=str(tasks), limit=2, showing=Showing(chat=True))
    assert sorted(prompt for prompts, _ in model.asked for prompt in prompts) == [
        "<user>Colour 0?<assistant>", "<user>Colour 1?<assistant>",
    ]  # fmt: skip
    assert adapter.tokenizer_name == "tests__words"
    bare = Words()
    bare.chat_template = None  # type: ignore[assignment]
    adapter = make_harness_model(model.generate, model.score, bare, max_length=64)
    with pytest.raises(M3Error, match="no chat template: leave --apply-chat-template out"):
        run_harness(adapter, ["m3jax_writing"], include_path=str(tasks), showing=Showing(chat=True))


@needs_harness
@pytest.mark.slow
def test_shots_and_system_message_are_shown_as_the_harness_shows_them(tasks: Path) -> None:
    """In turns of their own or in the question's, and without a message that the template refuses."""

    class Strict(Words):
        def apply_chat_template(self, history: list[dict[str, str]], **options: object) -> str:
            if history[0]["role"] == "system":
                raise TemplateError("no system role here")
            return super().apply_chat_template(history, **options)

    with (tasks / "writing.yaml").open("a") as file:
        file.write("fewshot_split: test\nfewshot_config: {sampler: first_n}\n")

    def asked(tokenizer: Words, showing: Showing) -> tuple[str, list[str]]:
        model, told = Model(), list[str]()
        adapter = make_harness_model(model.generate, model.score, tokenizer, max_length=64, tell=told.append)
        run_harness(adapter, [str(tasks / "writing.yaml")], limit=1, showing=showing)
        return model.asked[0][0][0], [line for line in told if line.startswith("note:")]

    assert asked(Words(), Showing(1)) == ("Colour 1? 1?\n\nColour 0?", [])
    turns, once = Showing(1, True, "Be brief."), Showing(1, True, "Be brief.", False)
    shown = "<system>Be brief.<user>Colour 1?<assistant>1?<user>Colour 0?<assistant>"
    assert asked(Words(), turns) == (shown, [])
    assert asked(Words(), once)[0] == "<system>Be brief.<user>Colour 1? 1?\n\nColour 0?<assistant>"
    prompt, notes = asked(Strict(), turns)
    assert prompt == shown.removeprefix("<system>Be brief.")
    assert notes == ["note: the tokenizer's chat template takes no system message, which is left out"]
    with pytest.raises(M3Error, match="--num-fewshot is -1, but must be at least 0"):
        asked(Words(), Showing(-1))


# --- Texts as the harness cuts them ------------------------------------------------------------------------------


def spanning_tokenizer() -> Any:
    """Letters and spaces, with merges over the ends of words, behind a token that begins a text."""
    from tokenizers import Tokenizer, models, processors
    from transformers import PreTrainedTokenizerFast

    merges = [("a", "b"), (" ", "b"), ("b", "c"), ("ab", "c"), ("c", " "), ("a", " "), ("a ", "bc"), ("ab", " b")]
    names = ["<s>", "</s>", "a", "b", "c", " ", *("".join(pair) for pair in merges)]
    made = Tokenizer(models.BPE({name: number for number, name in enumerate(names)}, merges))
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


def random_pairs(count: int) -> list[tuple[str, str]]:
    draw = random.Random(5)
    texts = ["".join(draw.choices("abc ", k=draw.randrange(1, 6))) for _ in range(2 * count)]
    return [*zip(texts[::2], texts[1::2], strict=True), ("", "ab c"), ("  ", "bc")]


def harness_reader(tokenizer: Any, score: Callable[[list[int], list[int]], tuple[float, bool]]) -> Any:
    """A model of the harness's own kind, which cuts its texts itself."""
    from lm_eval.api.model import TemplateLM

    class Reader(TemplateLM):
        eot_token_id, prefix_token_id = 1, 0

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
            return list(tokenizer.encode(string, add_special_tokens=add_special_tokens is not False))

        def _loglikelihood_tokens(self, requests: Sequence[Any], **_: object) -> list[tuple[float, bool]]:
            return [score(before, after) for _, before, after in requests]

        loglikelihood_rolling = generate_until = _loglikelihood_tokens

    return Reader()


@needs_harness
def test_texts_are_cut_where_the_harness_cuts_them() -> None:
    tokenizer, pairs = spanning_tokenizer(), random_pairs(300)
    cut: list[tuple[list[int], list[int]]] = []
    reader = harness_reader(tokenizer, lambda *parts: (cut.append(parts), (0.0, True))[1])
    reader.loglikelihood([SimpleNamespace(args=pair) for pair in pairs], disable_tqdm=True)
    ours = [split_as_harness(tokenizer, *pair) for pair in pairs]
    assert 150 < sum(all(one) for one in cut) < len(pairs)  # at the others the harness's models fail
    assert sum(one != split(tokenizer, *pair) for one, pair in zip(ours, pairs, strict=True)) > 20
    for pair, mine, theirs in zip(pairs, ours, cut, strict=True):
        assert mine == (theirs if all(theirs) else split(tokenizer, *pair))


@needs_harness
@pytest.mark.torch
@pytest.mark.slow
def test_scores_are_the_harnesss_own(tmp_path: Path) -> None:
    """Of the same weights in PyTorch, read as the harness reads, spanning tokens and all."""
    import torch
    from transformers import AutoModelForCausalLM

    build_models(tmp_path)
    tokenizer = spanning_tokenizer()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "expert-a", dtype=torch.float32)

    def score(before: list[int], after: list[int]) -> tuple[float, bool]:
        if not after:
            return 0.0, True
        with torch.no_grad():
            logits = theirs(torch.tensor([before + after])).logits[0, len(before) - 1 : -1].log_softmax(-1)
        return float(logits[range(len(after)), after].sum()), logits.argmax(-1).tolist() == after

    requests = [SimpleNamespace(args=pair) for pair in random_pairs(60)]
    wanted = harness_reader(tokenizer, score).loglikelihood(requests, disable_tqdm=True)
    model = load_model(str(tmp_path / "expert-a"), "float32")._replace(tokenizer=tokenizer)
    found = harness_model(model, Counter()).loglikelihood(requests)
    scored = [(one, other) for one, other in zip(found, wanted, strict=True) if other[0]]
    assert len(scored) > 40
    for one, other in scored:
        assert one == pytest.approx(other, abs=1e-3)


# --- Resuming ----------------------------------------------------------------------------------------------------


@needs_harness
def test_a_killed_run_goes_on_from_what_is_finished(tmp_path: Path) -> None:
    greedy, warm = {"until": [], "max_gen_toks": 3}, {"until": [], "do_sample": True}
    texts = [SimpleNamespace(args=(text, greedy)) for text in ("a b", "c", "d e f", "g")]
    texts += 2 * [SimpleNamespace(args=("h", warm))]
    pairs = [SimpleNamespace(args=(text, " red")) for text in ("a", "b b", "c")]

    def run(limit: int) -> tuple[list[Any], Model, Counter[str]]:
        model, cuts = Model(), Counter[str]()

        def generate(prompts: Sequence[str], settings: GenerationSettings) -> list[Completion]:
            if len(model.asked) == limit:
                raise KeyboardInterrupt
            return [one._replace(prompt_truncated=one.text == "F") for one in model.generate(prompts, settings)]

        journal = open_journal(tmp_path, {"model": "m"}, True, lambda: "w", Reply)
        adapter = make_harness_model(
            generate, model.score, Words(), max_length=64, batch_size=2, cuts=cuts, journal=journal
        )
        scores = adapter.loglikelihood(pairs)
        return [scores, adapter.loglikelihood_rolling(pairs), adapter.generate_until(texts)], model, cuts

    with pytest.raises(KeyboardInterrupt):
        run(1)
    resumed, rest, cuts = run(99)
    assert [text for prompts, _ in rest.asked for text in prompts] == ["c", "g", "h", "h"]
    assert rest.pairs == []
    assert cuts == {"contexts": 0, "prompts": 1}
    again, idle, cuts = run(0)
    assert again == resumed
    assert idle.asked == []
    assert cuts["prompts"] == 1
    with pytest.raises(M3Error, match="holds another run: it differs in weights"):
        open_journal(tmp_path, {"model": "m"}, True, lambda: "other", Reply)


@needs_harness
@pytest.mark.slow
def test_the_command_is_quiet_and_goes_on(tasks: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    build_models(tmp_path / "models")
    arguments = ["evaluate", str(tmp_path / "models" / "expert-a"), "--harness", f"{tasks / 'choice.yaml'}"]
    arguments += ["--limit", "3", "--out", str(tmp_path / "run"), "--num-fewshot", "0"]
    assert commands.main([*arguments, "-q", "--json"]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    outcome = json.loads(out)
    assert outcome == json.loads((tmp_path / "run" / "harness.json").read_text())
    assert outcome["shown"] == {"shots": {"m3jax_choice": 0}, "chat": False, "system": None, "multiturn": True}
    assert commands.main(arguments) == 2
    assert "harness.json is already there" in capfd.readouterr().err
    assert commands.main([*arguments, "--resume", "--json"]) == 0
    out, err = capfd.readouterr()
    assert json.loads(out) == outcome
    assert "6 of 6 texts scored were done before" in err


# --- Task files of others ----------------------------------------------------------------------------------------


@needs_harness
@pytest.mark.slow
def test_code_that_task_files_name_is_not_run_unasked(tasks: Path) -> None:
    """Whether in the file, in one that it includes, in a group's member, or as a metric; nor what templates reach."""
    ran = tasks / "ran"
    (tasks / "code.py").write_text(f"open({str(ran)!r}, 'w').close()\n\ndef text(doc):\n    return doc['question']\n")
    text = (tasks / "writing.yaml").read_text()
    (tasks / "code.yaml").write_text(text.replace('"{{question}}"', "!function code.text").replace("_writing", "_code"))
    (tasks / "more.yaml").write_text("include: code.yaml\ntask: m3jax_more\n")
    (tasks / "group.yaml").write_text("group: m3jax_group\ntask: [m3jax_writing, {task: m3jax_more}]\n")
    (tasks / "metric.yaml").write_text(text.replace("exact_match", "some/metric").replace("_writing", "_metric"))
    (tasks / "trust.yaml").write_text(text.replace("{data_files", "{trust_remote_code: true, data_files"))
    reach = "{{question.__class__.__base__.__subclasses__()}}"
    (tasks / "reach.yaml").write_text(text.replace("{{question}}", reach).replace("_writing", "_reach"))
    sentence = r"code.yaml names Python code \(!function code.text\).*--allow-task-code"
    for name in ("code.yaml", "more.yaml", "group.yaml"):
        with pytest.raises(M3Error, match=sentence):
            load_harness_tasks([str(tasks / name)])
    with pytest.raises(M3Error, match=sentence):
        load_harness_tasks(["m3jax_group"], str(tasks))
    with pytest.raises(M3Error, match=r"has the metric some/metric, which the harness would fetch and run"):
        load_harness_tasks([str(tasks / "metric.yaml")])
    with pytest.raises(M3Error, match=r"wants its data set to run code"):
        load_harness_tasks([str(tasks / "trust.yaml")])
    adapter = make_harness_model(Model().generate, Model().score, Words(), max_length=64)
    with pytest.raises(M3Error, match=r"SecurityError"):
        run_harness(adapter, [str(tasks / "reach.yaml")])
    assert not ran.exists()
    found = load_harness_tasks([str(tasks / "group.yaml")], allow_code=True)
    assert sorted(found.loaded["tasks"]) == ["m3jax_more", "m3jax_writing"]
    assert ran.exists()


_CODE = r"code.yaml names Python code \(!function code.text\)"
_METRIC = r"sly.yaml has the metric ./mine, which the harness would fetch and run"


@needs_harness
@pytest.mark.parametrize(
    ("added", "sentence"),
    [
        ("include: plain.yaml\ninclude: code.yaml", _CODE),
        ("<<: {include: code.yaml}", _CODE),
        ("<<: [{limit: 1}, &a {<<: {include: [plain.yaml, code.yaml]}}]", _CODE),
        ("metadata: &a code.yaml\n? !!str include\n: *a", _CODE),
        ("!!str {=: include}: code.yaml", _CODE),
        ("include: [plain.yaml, below/on.yaml]", _CODE),
        ('doc_to_text: !function code.text\ndoc_to_text: ""', r"sly.yaml names Python code \(!function code.text\)"),
        ("metadata: !!python/name:os.system", r"sly.yaml names Python code \(tag:yaml.org,2002:python/name:os.system"),
        ("metric_list: [{metric: exact_match, metric: ./mine}]", _METRIC),
        ("metric_list: [{<<: {metric: ./mine}, aggregation: mean}]", _METRIC),
        ("metric_list: [{metric: acc, hf_evaluate: no, hf_evaluate: yes}]", r"has the metric acc, which"),
        ("dataset_kwargs: {trust_remote_code: false, trust_remote_code: on}", r"wants its data set to run code"),
        ('dataset_kwargs: {<<: {trust_remote_code: "false"}}', r"wants its data set to run code"),
        ("dataset_path: pandas", r"sly.yaml has a data set of pickles"),
        ("include: pipe", r"pipe is no regular file"),
    ],
)
def test_task_files_are_read_as_the_harness_reads_them(tasks: Path, added: str, sentence: str) -> None:
    """The last of a key that is there twice, what << merges, aliases and all that includes lead to."""
    (tasks / "code.yaml").write_text("doc_to_text: !function code.text\n")
    (tasks / "plain.yaml").write_text("test_split: test\n")
    (tasks / "below").mkdir()
    (tasks / "below" / "on.yaml").write_text("include: ../code.yaml\n")
    os.mkfifo(tasks / "pipe")
    (tasks / "sly.yaml").write_text(f"task: m3jax_sly\n{added}\n")
    with pytest.raises(M3Error, match=sentence):
        harness_tasks.check_code_free(Index(), str(tasks / "sly.yaml"))


class Index:
    """The harness's index, of tasks that are asked for by their files."""

    task_index: Mapping[object, object] = {}


@needs_harness
def test_a_groups_members_are_found_where_they_are_merged(tasks: Path) -> None:
    from lm_eval.tasks import TaskManager

    (tasks / "code.yaml").write_text("task: m3jax_code\ndoc_to_text: !function code.text\n")
    (tasks / "group.yaml").write_text("group: m3jax_group\n<<: {task: [{<<: {task: m3jax_code}}]}\n")
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    with pytest.raises(M3Error, match=_CODE):
        harness_tasks.check_code_free(manager, "m3jax_group")


@needs_harness
@pytest.mark.slow
def test_a_directory_is_all_of_its_tasks(tasks: Path) -> None:
    found = load_harness_tasks([str(tasks)])
    assert sorted(found.loaded["tasks"]) == ["m3jax_choice", "m3jax_rolling", "m3jax_writing"]
    with pytest.raises(M3Error, match=r"nowhere.yaml is not there: give a task's .yaml file"):
        load_harness_tasks([str(tasks / "nowhere.yaml")])
    (tasks / "broken.yaml").write_text("task: [unclosed")
    with pytest.raises(M3Error, match=r"broken.yaml is no task file"):
        load_harness_tasks([str(tasks / "broken.yaml")])


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
        ("metric_list: [{metric: no_such_metric}]", r"has the metric no_such_metric, which the harness would fetch"),
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
