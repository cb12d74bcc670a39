"""Each task puts its question as the paper's evaluation does, and judges or hands on the answers."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from m3jax.errors import M3Error
from m3jax.evaluation import (
    TASKS,
    TEMPLATE_NAMES,
    Completion,
    Execution,
    evaluate_task,
    get_task,
    render,
    why_no_sandbox,
)

GSM8K = [{"question": "What is 2 + 2?", "answer": "2 + 2 = <<2+2=4>>4\n#### 4"}]
MATH = [{"problem": "Half of one?", "solution": r"It is $\boxed{\frac{1}{2}}$."}]
HUMANEVAL = [
    {
        "task_id": "HumanEval/0",
        "prompt": 'import math\n\n\ndef helper(x):\n    return x\n\n\ndef double(x):\n    """Twice x."""\n',
        "test": "def check(candidate):\n    assert candidate(helper(2)) == 4\n",
        "entry_point": "double",
    }
]
MBPP = [{"task_id": 7, "text": "Double a number.", "test_list": ["assert double(2) == 4", "assert double(3) == 6"]}]
ALPACA = [{"instruction": "Say hi.", "output": "reference", "dataset": "helpful_base"}, {"instruction": "Bye."}]
LIVEBENCH = [
    {
        "question_id": "q1",
        "category": "language",
        "task": "typos",
        "turns": ["Fix: teh cat."],
        "ground_truth": "the cat.",
    },
    {"question_id": "q2", "category": "language", "task": "connections", "turns": ["Group."], "ground_truth": "a,b"},
]
SST2 = [{"sentence": "good film ", "label": 1}, {"sentence": "bad film", "label": "negative", "idx": 9}]
SAMPLES = {
    "gsm8k": GSM8K, "math": MATH, "humaneval": HUMANEVAL, "mbpp": MBPP, "alpaca_eval": ALPACA,
    "livebench_typos": LIVEBENCH,
    "livebench_coding": LIVEBENCH, "livebench_instruction_following": LIVEBENCH, "sst2": SST2,
    "cola": [{"sentence": "Them sleeps.", "label": 0}],
}  # fmt: skip


def verdicts(task: str, *texts: str) -> list[tuple[bool | None, str | None]]:
    read = get_task(task).read(SAMPLES[task])[:1]
    return [get_task(task).judge(read, [text], Execution())[0][:2] for text in texts]


@pytest.mark.parametrize("name", TASKS)
def test_every_task_reads_judges_and_has_a_template(name: str) -> None:
    task = get_task(name)
    assert task.name == name
    assert task.template in TEMPLATE_NAMES
    assert task.settings.temperature == 0
    examples = task.read(SAMPLES[name])
    if not task.runs_code:
        assert len(task.judge(examples, ["?"] * len(examples), Execution())) == len(examples)
    with pytest.raises(M3Error, match=f"is not {name} data: it has the fields foo, and {name} wants"):
        task.read([{"foo": 1}])


def test_prompts_are_those_of_the_papers_evaluation() -> None:
    (gsm8k,) = get_task("gsm8k").read(GSM8K)
    assert render("wizardmath", gsm8k.instruction) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nWhat is 2 + 2?\n\n### Response: Let's think step by step."
    )
    (mbpp,) = get_task("mbpp").read(MBPP)
    assert render("code-alpaca", mbpp.instruction).endswith(
        "\n\n\n### Instruction:\nCreate a Python script for this problem:\n\nDouble a number.\nTest examples:\n"
        "assert double(2) == 4\nassert double(3) == 6\n\n### Response:"
    )
    (humaneval,) = get_task("humaneval").read(HUMANEVAL)
    assert '\n\t"""Twice x."""' in humaneval.instruction
    assert render("none", "{} {x}") == "{} {x}"
    assert render("alpaca", "a {} b").endswith("### Instruction:\na {} b\n\n### Response:")


def test_the_tokenizers_own_template() -> None:
    tokenizer = SimpleNamespace(
        chat_template="x",
        apply_chat_template=lambda messages, **options: f"<{messages[0]['content']}|{sorted(options)}>",
    )
    assert render("chat", "hi", tokenizer) == "<hi|['add_generation_prompt', 'tokenize']>"
    with pytest.raises(M3Error, match=r"this model's tokenizer has none; choose another with --template: wizardlm"):
        render("chat", "hi", SimpleNamespace(chat_template=None))
    with pytest.raises(M3Error, match="no prompt template is called 'vicuna'; there are: wizardlm, "):
        render("vicuna", "hi")


def test_unknown_task_names_the_known() -> None:
    with pytest.raises(M3Error, match=r"no task is called 'gms8k' \(did you mean gsm8k\?\); there are: gsm8k, math"):
        get_task("gms8k")


def test_gsm8k_verdicts() -> None:
    assert verdicts("gsm8k", "The answer is: 4", "The answer is: 4.00 dollars", "The answer is: 5", "It is 4", "") == [
        (True, "4"), (True, "4"), (False, "5"), (False, None), (False, None),
    ]  # fmt: skip
    with pytest.raises(M3Error, match="its answer ends in no number after '####': 'four'"):
        get_task("gsm8k").read([{"question": "?", "answer": "#### four"}])


def test_math_verdicts() -> None:
    assert verdicts("math", "The answer is: $0.5$.", r"\boxed{1/2}", r"\boxed{2}", "a half") == [
        (True, "$0.5$"), (True, "1/2"), (False, "2"), (False, None),
    ]  # fmt: skip
    with pytest.raises(M3Error, match="wants an answer, or a solution that ends in"):
        get_task("math").read([{"problem": "?", "solution": "none"}])


needs_sandbox = pytest.mark.skipif(why_no_sandbox() is not None, reason=f"no sandbox here: {why_no_sandbox()}")


@needs_sandbox
@pytest.mark.parametrize(
    ("text", "correct", "is_parsed"),
    [
        ("    return 2 * x\n", True, True),
        ("return 2 * x", True, True),
        ("\treturn 2 * x\n\nprint(double(3))", True, True),
        ("```python\ndef double(x):\n    return math.floor(2 * helper(x))\n```", True, True),
        ("Sure!\ndef double(x):\n    return 2 * x\n\nThat is it.", True, True),
        ("```python\ndef helper(x): return 0\ndef double(x): return 4\n```", True, True),
        ("    return 3 * x\n", False, True),
        ("```python\ndef triple(x): return 4\n```", False, True),
        ("```python\ndef double(x) return 4\n```", False, False),
        ("I do not know.", False, False),
        ("", False, False),
    ],
)
def test_humaneval_verdicts(text: str, correct: bool, is_parsed: bool) -> None:
    ((verdict, parsed),) = verdicts("humaneval", text)
    assert verdict is correct
    assert (parsed is not None) is is_parsed


@needs_sandbox
def test_mbpp_verdicts_and_reasons() -> None:
    task = get_task("mbpp")
    texts = [
        "```python\ndef double(n): return n * 2\n```",
        "def double(n): return 4",
        "def dbl(n): return 4",
        "Sorry, no.",
        "def double(n) return 2 * n",
    ]
    judged = task.judge(task.read(MBPP * 5), texts, Execution(workers=2))
    assert [verdict.correct for verdict in judged] == [True, False, False, False, False]
    assert [verdict.parsed is None for verdict in judged] == [False, False, False, True, True]
    assert judged[1].detail == "failed: AssertionError at: assert double(3) == 6"
    assert "NameError" in judged[2].detail
    assert judged[3].detail == "no program found"
    assert judged[4].detail == "error: SyntaxError: what was found is no Python"
    with pytest.raises(M3Error, match="test_list must be a list of assert statements"):
        task.read([{"text": "x", "test_list": "assert 1"}])


@needs_sandbox
def test_mbpp_setup_uses_the_programs_classes() -> None:
    row = {
        "prompt": "Value of a node.", "test_list": ["assert value(root) == 3"],
        "test_setup_code": "root = Node(3)\r\nroot.left = Node(4)", "test_imports": ["import math"],
    }  # fmt: skip
    task = get_task("mbpp")
    text = "class Node:\n    def __init__(self, v): self.v = v\ndef value(n): return n.v"
    assert task.judge(task.read([row]), [text], Execution())[0].correct


def test_typos_are_judged_as_livebench_does() -> None:
    assert [correct for correct, _ in verdicts(
        "livebench_typos", "the cat.", "Here: the\ncat.", "<solution>the cat.</solution>",
        "<solution>no</solution> the cat.",
        "well --- the cat. --- done", "teh cat.", "",
    )] == [True, True, True, False, True, False, False]  # fmt: skip
    with pytest.raises(M3Error, match="none of the questions is of the task 'typos'"):
        get_task("livebench_typos").read(LIVEBENCH[1:])
    with pytest.raises(M3Error, match="turns must be a list of one text"):
        get_task("livebench_coding").read([{"question_id": "q", "turns": ["a", "b"]}])


def test_classification_verdicts() -> None:
    assert verdicts("sst2", "Positive!", "negative", "mixed") == [
        (True, "positive"),
        (False, "negative"),
        (False, None),
    ]
    assert get_task("sst2").read(SST2)[1].id == "9"
    with pytest.raises(M3Error, match="this split of sst2 hides its labels"):
        get_task("sst2").read([{"sentence": "x", "label": -1}])
    with pytest.raises(M3Error, match=r"its label is 2 and should be one of 0 \(negative\), 1 \(positive\)"):
        get_task("sst2").read([{"sentence": "x", "label": 2}])


def test_alpaca_eval_writes_what_alpaca_eval_reads(tmp_path: Path) -> None:
    task = get_task("alpaca_eval")
    summary = evaluate_task(
        task,
        task.read(ALPACA),
        lambda prompts, _: [Completion(" Hi é \ud800\n", 2, True) for _ in prompts],
        out_dir=tmp_path,
        model="mine",
    )
    assert summary.accuracy is None
    assert summary.judged == 0
    assert json.loads(Path(summary.answers or "").read_text(encoding="utf-8")) == [
        {"instruction": "Say hi.", "output": "Hi é ?", "generator": "mine", "dataset": "helpful_base"},
        {"instruction": "Bye.", "output": "Hi é ?", "generator": "mine"},
    ]


def test_livebench_writes_what_livebench_scores(tmp_path: Path) -> None:
    task = get_task("livebench_instruction_following")
    summary = evaluate_task(
        task, task.read(LIVEBENCH), lambda prompts, _: [Completion(" Done\n", 1, True) for _ in prompts],
        out_dir=tmp_path, model="me/mine",
    )  # fmt: skip
    assert summary.answers == str(tmp_path / "model_answer" / "me-mine.jsonl")
    lines = [json.loads(line) for line in Path(summary.answers).read_text().splitlines()]
    assert [line["question_id"] for line in lines] == ["q1", "q2"]
    assert lines[0]["choices"] == [{"index": 0, "turns": ["Done"]}]
    assert lines[0]["model_id"] == "me-mine"
    assert len({line["answer_id"] for line in lines}) == 2
