"""The M³ paper's protocol: its tasks, and its attacks as the paper's own code runs them.

`promptbench.json` holds what that code printed for a model that is a checksum of its prompt; the file names its source.
"""

import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from m3jax.errors import M3Error
from m3jax.evaluation import Completion, GenerationSettings, evaluate_named, get_task
from m3jax.evaluation.attacks import Wording, get_profile, greedy, make_attack, textattack
from m3jax.evaluation.attacks.search import modifiable
from m3jax.evaluation.attacks.semantic import PROMPTS
from m3jax.evaluation.attacks.trial import attack_task
from m3jax.evaluation.robustness import make_plan
from m3jax.evaluation.tasks.base import Answer, Execution

PRINTED = json.loads((Path(__file__).parent / "promptbench.json").read_text(encoding="utf-8"))
ROWS = PRINTED["rows"]
LABELS = {"sst2": ("negative", "positive"), "cola": ("unacceptable", "acceptable")}
STOP = ("Instruction:", "Instruction", "Response:", "Response")
tasks = pytest.mark.parametrize("name", ["sst2", "cola"])


def says(name: str, prompt: str) -> str:
    return LABELS[name][zlib.crc32(prompt.encode()) % 2]


def accuracy(name: str, prompt: str) -> float:
    right = [says(name, prompt.replace("{content}", row["sentence"])) == LABELS[name][row["label"]] for row in ROWS]
    return sum(right) / len(right)


def open_words(prompt: Wording) -> list[int]:
    return modifiable(prompt, frozenset(), get_profile("m3-paper").positions)


# --- Attacks -----------------------------------------------------------------------------------------------------


@tasks
def test_words_and_their_order_are_those_of_the_papers_code(name: str) -> None:
    printed = PRINTED["tasks"][name]
    prompt = textattack.read_prompt(printed["prompt"], LABELS[name])
    assert list(prompt.words) == printed["words"]
    assert open_words(prompt) == printed["open"]
    visited: list[int] = []
    scored: list[tuple[str, float]] = []

    def score(prompts: Sequence[str]) -> npt.NDArray[np.float64]:
        scored.extend((one, accuracy(name, one)) for one in prompts)
        return np.array([accuracy(name, one) for one in prompts])

    greedy(prompt, score, lambda _, index: visited.append(index) or [], "unk", positions=(2, 3, 6))  # type: ignore[func-returns-value]
    assert visited == printed["order"]
    assert scored[1:] == [tuple(pair) for pair in printed["deepwordbug"]["ranked"]]


@tasks
def test_sentences_and_drop_rates_are_those_of_the_papers_code(name: str) -> None:
    """From the task's own prompt to the drop rate, with the same model."""

    def generate(prompts: Sequence[str], settings: GenerationSettings) -> list[Completion]:
        return [Completion(says(name, prompt), 1, True) for prompt in prompts]

    printed = PRINTED["tasks"][name]
    task = get_task(name, profile="m3-paper")
    plan = make_plan(attacks=("stresstest", "checklist"), profile="m3-paper", limit=len(ROWS))
    found = attack_task(task, ROWS, generate, plan)
    assert (found.prompt, found.template, found.grader) == (printed["prompt"], "none", "paper")
    for one in found.attacks:
        told = printed[one.attack]
        assert (one.drop.clean, one.prompt, one.drop.attacked) == (told["clean"], told["attacked"], told["score"])
        assert one.drop.pdr == pytest.approx(told["pdr"], abs=1e-12)
        assert one.queries == 1 + len(told["scored"])


@tasks
def test_the_search_is_that_of_the_papers_code(name: str) -> None:
    """Given the candidates that it drew, the same prompt comes out."""
    printed = PRINTED["tasks"][name]
    prompt = textattack.read_prompt(printed["prompt"], LABELS[name])
    tried = [tuple(textattack.words_of(text)) for text, _ in printed["deepwordbug"]["tried"]]

    def drawn(current: Wording, index: int) -> list[str]:
        others = [words for words in tried if words[:index] + words[index + 1 :] == without(current.words, index)]
        return [words[index] for words in reversed(others) if words[index] != current.words[index]]

    def without(words: tuple[str, ...], index: int) -> tuple[str, ...]:
        return words[:index] + words[index + 1 :]

    def score(prompts: Sequence[str]) -> npt.NDArray[np.float64]:
        return np.array([accuracy(name, one) for one in prompts])

    found = greedy(prompt, score, drawn, "unk", positions=(2, 3, 6), takes_worst=True)
    told = printed["deepwordbug"]
    assert (found.prompt, found.score, found.clean) == (told["attacked"], told["score"], told["clean"])


def test_the_first_word_is_edited_even_where_that_helps() -> None:
    """In TextAttack the original has a score that everything beats."""
    prompt = textattack.read_prompt(PRINTED["tasks"]["sst2"]["prompt"], LABELS["sst2"])

    def score(prompts: Sequence[str]) -> npt.NDArray[np.float64]:
        return np.array([0.5 if one == prompt.text else 0.75 for one in prompts])

    found = make_attack("deepwordbug", 0, get_profile("m3-paper")).run(prompt, score, None)
    assert (found.clean, found.score) == (0.5, 0.75)
    assert [change.before for change in found.changes] == ["classifier"]
    words = textattack.deepwordbug(0)(prompt, 3)
    assert found.changes[0].after == min(words)
    assert make_attack("deepwordbug", 0).run(prompt, score, None).prompt == prompt.text


def test_letters_are_edited_as_textattack_edits_them() -> None:
    """A word of one letter stays; a letter goes before another, never behind the last."""
    prompt = textattack.read_prompt("Judge x in these texts")
    made = [textattack.deepwordbug(seed)(prompt, 0) for seed in range(300)]
    assert all(textattack.deepwordbug(seed)(prompt, 1) == [] for seed in range(5))
    longer = {word for words in made for word in words if len(word) == 6}
    assert longer
    assert not any(word[:5] == "Judge" and word[5] != "e" for word in longer)
    assert {len(words) for words in made} <= {3, 4}
    assert any(len(words) == 3 for words in made)  # a letter substituted by itself


def test_the_worst_variant_is_taken_even_where_it_helps() -> None:
    """The model is right only behind a tautology or a sequence: the drop rate is negative."""

    def generate(prompts: Sequence[str], settings: GenerationSettings) -> list[Completion]:
        right = [LABELS["sst2"][row["label"]] for row in ROWS] * (len(prompts) // len(ROWS))
        wrong = {"positive": "negative", "negative": "positive"}
        plain = [prompt.endswith("'negative'.") and row % 2 for row, prompt in enumerate(prompts)]
        return [Completion(wrong[one] if bad else one, 1, True) for one, bad in zip(right, plain, strict=True)]

    task = get_task("sst2", profile="m3-paper")
    names = ("stresstest", "checklist", "semantic")
    found = attack_task(task, ROWS, generate, make_plan(attacks=names, profile="m3-paper", task="sst2"))
    assert found.accuracy == 0.5
    assert [(one.drop.attacked, one.drop.pdr) for one in found.attacks] == [(1.0, -1.0)] * 3
    assert found.attacks[2].prompt == min(PROMPTS["sst2"]) + " {content}"
    ours = attack_task(task, ROWS, generate, make_plan(attacks=names, task="sst2"))
    assert [(one.drop.pdr, one.prompt) for one in ours.attacks] == [(0.0, ours.prompt)] * 3


def test_semantic_prompts_are_for_their_tasks_only() -> None:
    assert all(label in prompt for task, prompts in PROMPTS.items() for prompt in prompts for label in LABELS[task])
    with pytest.raises(M3Error, match="semantic has prompts for sst2, cola only"):
        make_attack("semantic", 0)


def test_a_prompt_without_words_can_be_followed() -> None:
    assert textattack.checklist(textattack.read_prompt("{content}"))[0] == "{content} d6ZQ3u0GBQ"
    assert textattack.stresstest(textattack.read_prompt("?"))[0] == "?  and true is true "


# --- Tasks -------------------------------------------------------------------------------------------------------


def test_sentences_stand_in_the_prompt_as_the_file_has_them(tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    task = get_task("sst2", profile="m3-paper")
    assert (task.template, task.settings, task.limit) == ("none", GenerationSettings(1024, STOP), None)
    (example,) = task.read([{"sentence": "a small wonder . ", "label": 1}])
    assert "\nText:a small wonder . \nPlease respond" in example.instruction
    asked: list[str] = []

    def generate(prompts: Sequence[str], settings: GenerationSettings) -> list[Completion]:
        asked.extend(prompts)
        return [Completion("It is 'acceptable'.", 1, True) for _ in prompts]

    summary = evaluate_named("cola", data, generate, profile="m3-paper")
    assert (summary.examples, summary.grader, summary.protocol) == (10, "paper", "m3-paper")
    assert summary.accuracy == 0.5
    assert asked[0].startswith("As a grammar identification system, ")
    everything = evaluate_named("cola", data, generate, profile="m3-paper", limit=12, grader="m3jax")
    assert (everything.examples, everything.grader) == (12, "m3jax")
    with pytest.raises(M3Error, match="profile is 'paper', but must be one of m3jax, m3-paper"):
        evaluate_named("cola", data, generate, profile="paper")


def test_livebench_is_asked_raw_and_its_typos_in_the_papers_form(tmp_path: Path) -> None:
    row: dict[str, Any] = {
        "question_id": "q",
        "turns": ["Fix the text.\n\nTeh cat.\n\nSat."],
        "ground_truth": "The cat.",
    }
    for name, cleaned in (("instruction_following", "Yes."), ("coding", "The answer is: Yes. \n")):
        task = get_task(f"livebench_{name}", profile="m3-paper")
        assert (task.template, task.settings) == ("none", GenerationSettings(2048))
        (example,) = task.read([row])
        assert example.instruction == row["turns"][0]
        assert task.export is not None
        path = task.export([Answer(example, "The answer is: Yes. \n", 3)], "model", tmp_path / name)
        assert json.loads(path.read_text())["choices"][0]["turns"] == [cleaned]
    typos = get_task("livebench_typos", profile="m3-paper")
    (example,) = typos.read([row])
    assert example.instruction.endswith(
        "### Instruction:\nFix the text.\n\n### Text with errors:\nTeh cat.\n\nSat.\n\n"
        "### Response: the corrected paragraph is:"
    )
    assert (typos.settings, typos.limit) == (GenerationSettings(2048, ("The answer is:",)), 50)
    answers = ["Here:\nSo, The cat. Sat.\n\n", "The cat.\nOr not", "\n"]
    judged = typos.judge([example] * 3, answers, Execution())
    assert [one.correct for one in judged] == [True, False, False]
    assert judged[2].parsed is None


def test_programs_are_asked_with_tabs_and_long_tests_by_name() -> None:
    rows = [
        {"task_id": number, "text": "Do    it.", "code": "", "test_list": ["assert f(1,    2)"], "test_setup_code": ""}
        for number in (5, 493)
    ]
    task = get_task("mbpp", profile="m3-paper")
    first, long = (example.instruction for example in task.read(rows))
    assert first == "\nDo\tit.\nTest examples:\nassert f(1,\t2)"
    assert long == "\nDo\tit.\nTest examples:\ncalculate_polygons(startx, starty, endx, endy, radius)"
    assert (task.grader, get_task("gsm8k", profile="m3-paper").grader) == ("paper", "paper")
