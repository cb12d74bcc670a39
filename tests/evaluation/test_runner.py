"""A run keeps a journal, goes on after an interruption, and sums up."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from support.evaluation import GOLD, answering, real_examples, real_file

from m3jax.errors import M3Error
from m3jax.evaluation import (
    TASKS,
    Completion,
    Example,
    Execution,
    GenerationSettings,
    Summary,
    evaluate_named,
    evaluate_task,
    get_task,
    runner,
    why_no_sandbox,
)
from m3jax.evaluation import records as records_module
from m3jax.evaluation.sandbox import UnsandboxedWarning

QUESTIONS = [
    {"question": f"Question {number}: " + "word " * (number * 7 % 11), "answer": f"#### {number}"}
    for number in range(20)
]
TASK = get_task("gsm8k")
EXAMPLES = TASK.read(QUESTIONS)


class Model:
    """Right for even numbers, wrong for odd ones, silent for multiples of five; counts its work."""

    def __init__(self, break_after: int | None = None) -> None:
        self.batches: list[list[str]] = []
        self.break_after = break_after

    def __call__(self, prompts: Sequence[str], settings: GenerationSettings) -> list[Completion]:
        if self.break_after is not None and len(self.batches) >= self.break_after:
            raise KeyboardInterrupt
        self.batches.append(list(prompts))
        return [self.answer(int(prompt.split("Question ")[1].split(":")[0])) for prompt in prompts]

    def answer(self, number: int) -> Completion:
        if number == 19:
            return Completion("", 0, finished=False, skipped=True)
        if number % 5 == 0:
            return Completion("I do not know \ud800", 4, finished=False)
        return Completion(f"The answer is: {number + number % 2}", 6, finished=True, prompt_truncated=number == 1)


def run(out_dir: Path | None, model: Model | None = None, **options: object) -> Summary:
    return evaluate_task(TASK, EXAMPLES, model or Model(), out_dir=out_dir, model="toy", **options)  # type: ignore[arg-type]


def records(place: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (place / "records.jsonl").read_text().splitlines()]


def test_a_run_of_which_all_is_skipped_is_refused_and_blocks_no_other(tmp_path: Path) -> None:
    class Small(Model):
        def answer(self, number: int) -> Completion:
            return Completion("", 0, finished=False, skipped=True)

    for _ in range(2):
        with pytest.raises(M3Error, match=r"none of 20 prompts fits in the context of toy, .* --overflow truncate"):
            run(tmp_path, Small())
        assert not list(tmp_path.iterdir())
    assert run(tmp_path).judged == 19


def test_summary_counts_everything_apart(tmp_path: Path) -> None:
    summary = run(tmp_path)
    assert summary[:5] == ("gsm8k", "toy", 20, 19, 8)
    assert summary.accuracy == 8 / 19
    assert summary.interval is not None
    assert summary.interval[0] < 8 / 19 < summary.interval[1]
    assert (summary.unparsed, summary.truncated, summary.prompts_truncated, summary.skipped) == (4, 4, 1, 1)
    assert summary.tokens == 4 * 4 + 15 * 6
    written = json.loads((tmp_path / "summary.json").read_text())
    assert written == json.loads(json.dumps(summary._asdict()))


def test_one_record_per_example_in_their_order(tmp_path: Path) -> None:
    run(tmp_path, batch_size=3)
    found = records(tmp_path)
    assert [record["number"] for record in found] == list(range(20))
    assert found[2]["correct"] is True
    assert found[2]["parsed"] == found[2]["gold"] == "2"
    assert found[3] == {
        "number": 3, "id": "3", "prompt": found[3]["prompt"], "completion": "The answer is: 4", "parsed": "4",
        "gold": "3", "correct": False,
        "unparsed": False, "truncated": False, "prompt_truncated": False, "skipped": False, "tokens": 6,
        "detail": "", "unclear": False,
    }  # fmt: skip
    assert found[5]["unparsed"] is True
    assert found[5]["correct"] is False
    assert found[5]["completion"] == "I do not know \ud800"
    assert found[19]["correct"] is None
    assert "Let's think step by step." in str(found[0]["prompt"])


@pytest.mark.parametrize("batch_size", [1, 3, 8, 100])
def test_batches_do_not_change_results(batch_size: int) -> None:
    model = Model()
    assert run(None, model, batch_size=batch_size) == run(None)
    lengths = [len(prompt) for batch in model.batches for prompt in batch]
    assert lengths == sorted(lengths, reverse=True)
    assert all(len(batch) <= batch_size for batch in model.batches)


def test_a_broken_run_goes_on_where_it_was(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Model(break_after=2), batch_size=4)
    assert len(records(tmp_path)) == 8
    with open(tmp_path / "records.jsonl", "a") as file:
        file.write('{"number": 9, "id": "9", "prom')
    model, told = Model(), []
    summary = run(tmp_path, model, batch_size=4, resume=True, progress=lambda done, total: told.append((done, total)))
    assert sum(map(len, model.batches)) == 12
    assert told == [(8, 20), (12, 20), (16, 20), (20, 20)]
    assert summary == run(None)
    assert [record["number"] for record in records(tmp_path)] == list(range(20))
    done = Model()
    assert run(tmp_path, done, resume=True) == summary
    assert done.batches == []


def test_resume_begins_a_run_that_is_not_there(tmp_path: Path) -> None:
    assert run(tmp_path / "new" / "place", resume=True).correct == 8


def test_a_run_is_not_overwritten(tmp_path: Path) -> None:
    run(tmp_path)
    with pytest.raises(M3Error, match="already holds a run; pass --resume to go on with it, or give another"):
        run(tmp_path)


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"template": "alpaca"}, "template, prompts"),
        ({"settings": GenerationSettings(max_tokens=7)}, "max_tokens, stop"),
        ({"limit": 3}, "examples, data, prompts"),
        ({"model": "other"}, "model"),
    ],
)
def test_another_run_is_not_gone_on_with(tmp_path: Path, change: dict[str, object], difference: str) -> None:
    run(tmp_path)
    options: dict[str, object] = {"model": "toy", "resume": True, **change}
    with pytest.raises(M3Error, match=f"holds another run: it differs in {difference}; run with the same settings"):
        evaluate_task(TASK, EXAMPLES, Model(), out_dir=tmp_path, **options)  # type: ignore[arg-type]


def test_another_gold_answer_is_another_run(tmp_path: Path) -> None:
    run(tmp_path)
    other = [EXAMPLES[0]._replace(gold="99"), *EXAMPLES[1:]]
    with pytest.raises(M3Error, match="it differs in data"):
        evaluate_task(TASK, other, Model(), out_dir=tmp_path, model="toy", resume=True)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("run.json", "{", "cannot read .*run.json"),
        ("run.json", "[]", "holds another run"),
        ("records.jsonl", '{"a": 1}\n', "records.jsonl line 1 is no record"),
        ("records.jsonl", "nonsense\n", "records.jsonl line 1 is no record"),
    ],
)
def test_a_damaged_journal_is_said(tmp_path: Path, name: str, content: str, sentence: str) -> None:
    run(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(M3Error, match=sentence):
        run(tmp_path, resume=True)


def test_foreign_records_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "records.jsonl").write_text("mine\n")
    with pytest.raises(M3Error, match=r"holds records of a run but no run\.json"):
        run(tmp_path, resume=True)
    assert (tmp_path / "records.jsonl").read_text() == "mine\n"


def test_an_output_directory_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(M3Error, match=r"cannot make the directory .*file/out"):
        run(tmp_path / "file" / "out")


def test_a_run_without_records_is_begun_anew(tmp_path: Path) -> None:
    """What failed before its first example is in nobody's way, whatever was wrong with it."""
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Model(break_after=0), limit=3)
    assert (tmp_path / "run.json").exists()
    assert run(tmp_path).correct == 8
    for left in ("records.jsonl", "run.json"):
        (tmp_path / left).write_text("" if left == "records.jsonl" else "{")
    (tmp_path / "records.jsonl").write_text('{"number": 3, "id"')
    assert run(tmp_path).correct == 8


@pytest.mark.parametrize(
    ("name", "mine"),
    [
        ("run.json", '{"my experiment": 1}'),
        ("run.json", '{"model": "mine", "weights": "x"}'),
        ("run.json", "no JSON"),
        ("summary.json", '{"my experiment": 1}'),
        ("summary.json", "no JSON"),
        ("harness.json", "[]\n{}"),
        ("records.jsonl", "thesis"),
        ("records.jsonl", '{"number": 1, "mine": 2}\nhalf'),
    ],
)
def test_files_of_somebody_elses_are_left_as_they_are(tmp_path: Path, name: str, mine: str) -> None:
    """Whether a run is begun there or gone on with, and whether or not it has a name that ours have."""
    for begun in (False, True):
        if begun and name == "run.json":
            continue
        out = tmp_path / str(begun)
        out.mkdir()
        if begun:
            with pytest.raises(KeyboardInterrupt):
                run(out, Model(break_after=0))
        (out / name).write_text(mine)
        for resume in (False, True):
            with pytest.raises(M3Error, match=r"give another (place|output directory)"):
                run(out, resume=resume)
            assert (out / name).read_text() == mine


def test_weights_are_identified_last(tmp_path: Path) -> None:
    run(tmp_path, fingerprint=lambda: "one")

    def never() -> str:
        raise AssertionError("read the weights of another run")

    with pytest.raises(M3Error, match="differs in template, prompts;"):
        run(tmp_path, template="alpaca", resume=True, fingerprint=never)
    with pytest.raises(M3Error, match="differs in weights;"):
        run(tmp_path, resume=True, fingerprint=lambda: "other")
    assert run(tmp_path, resume=True, fingerprint="one").correct == 8


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_what_cannot_be_written_is_said_and_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """The third batch finds the disk full, with half of its text written."""
    written: list[int] = []

    def fsync(descriptor: int) -> None:
        written.append(descriptor)
        if len(written) == 5:  # after run.json (twice) and two batches
            os.ftruncate(descriptor, os.fstat(descriptor).st_size - 50)
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(records_module.os, "fsync", fsync)
    mend = "make room and try again" if code == errno.ENOSPC else "make it writable"
    with pytest.raises(M3Error, match=rf"cannot write .*records.jsonl: {os.strerror(code)}; {mend}"):
        run(tmp_path, batch_size=4)
    model = Model()
    assert run(tmp_path, model, batch_size=4, resume=True) == run(None)
    assert sum(map(len, model.batches)) in (9, 10, 11)  # the whole lines of the third batch count
    assert [record["number"] for record in records(tmp_path)] == list(range(20))


def test_a_summary_that_cannot_be_written_leaves_the_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def replace(source: Path, target: Path) -> None:
        if target.name == "summary.json":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(records_module.os, "replace", replace)
        with pytest.raises(M3Error, match=r"cannot write .*summary.json: No space left"):
            run(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["records.jsonl", "run.json"]
    model = Model()
    assert run(tmp_path, model, resume=True).correct == 8
    assert model.batches == []


def test_a_full_disk_of_a_real_process_is_said(tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk."""
    program = """
import resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from evaluation.test_runner import run
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
run(Path(sys.argv[2]), batch_size=2)
"""
    tests = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", program, tests, tmp_path], capture_output=True, text=True, check=False)
    assert "M3Error: cannot write" in done.stderr.splitlines()[-1]
    assert "File too large; make room and try again; a run goes on with --resume" in done.stderr
    assert run(tmp_path, resume=True) == run(None)


def test_bad_numbers_and_no_examples_are_said() -> None:
    with pytest.raises(M3Error, match="the batch size must be at least 1, not 0"):
        run(None, batch_size=0)
    with pytest.raises(M3Error, match="the limit must be at least 1, not -1"):
        run(None, limit=-1)
    with pytest.raises(M3Error, match="the limit is '5', but must be a whole number"):
        run(None, limit="5")
    with pytest.raises(M3Error, match="the batch size is None, but must be a whole number"):
        run(None, batch_size=None)
    with pytest.raises(M3Error, match="settings is 3, but must be of type GenerationSettings"):
        run(None, settings=3)
    with pytest.raises(M3Error, match="gsm8k: there are no examples to evaluate"):
        evaluate_task(TASK, [], Model())


def test_a_generator_that_answers_too_little_is_an_error_of_its_own() -> None:
    with pytest.raises(ValueError, match="answered 8 prompts with 0 completions"):
        evaluate_task(TASK, EXAMPLES, lambda prompts, settings: [])


def test_limit_takes_the_first() -> None:
    model = Model()
    assert run(None, model, limit=3).examples == 3
    assert sum(map(len, model.batches)) == 3


@pytest.mark.parametrize("task", ["humaneval", "mbpp"])
def test_code_runs_only_when_allowed(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    example = Example("0", "x", "", {"prompt": "def f():\n", "name": "f", "tests": "assert f() == 1"})

    def never(prompts: Sequence[str], settings: GenerationSettings) -> list[Completion]:
        raise AssertionError("asked before it was allowed")

    with pytest.raises(M3Error, match=r"runs programs that the model wrote, which must be allowed: pass --run-code"):
        evaluate_task(get_task(task), [example], never)
    with pytest.raises(M3Error, match="--run-code"):
        evaluate_named(task, "/nowhere.jsonl", never)
    monkeypatch.setattr(runner, "why_no_sandbox", lambda: "no namespaces")
    with pytest.raises(M3Error, match=r"does not allow a sandbox .*\(no namespaces\); pass --allow-unsandboxed"):
        evaluate_task(get_task(task), [example], never, run_code=True)
    allowed = Execution(allow_unsandboxed=True)
    with pytest.warns(UnsandboxedWarning, match=r"without a sandbox, .*\(no namespaces\): they have limits"):
        runner.check_code(get_task(task), True, allowed)


@pytest.mark.skipif(why_no_sandbox() is not None, reason=f"no sandbox here: {why_no_sandbox()}")
def test_code_is_judged_in_a_run(tmp_path: Path) -> None:
    rows = [{"text": f"Task {number}.", "test_list": [f"assert f(2) == {number}"]} for number in range(4)]
    task = get_task("mbpp")
    generator = answering({"Task 2.": "def f(x): return x", "Task 3.": "def f(x): return x"})
    summary = evaluate_task(
        task, task.read(rows), generator, out_dir=tmp_path, run_code=True, execution=Execution(workers=2)
    )
    assert (summary.judged, summary.correct, summary.unparsed) == (4, 1, 2)
    assert str(records(tmp_path)[3]["detail"]).startswith("failed: AssertionError")


def test_classification_has_a_correlation() -> None:
    task = get_task("cola")
    rows = [{"sentence": f"Sentence {number}!", "label": number % 2} for number in range(4)]
    right = {f"Sentence {number}!": ("unacceptable", "acceptable")[number % 2] for number in range(4)}
    assert evaluate_task(task, task.read(rows), answering(right)).correlation == 1.0
    summary = evaluate_task(task, task.read(rows), answering({"Sentence": "acceptable"}))
    assert (summary.accuracy, summary.correlation) == (0.5, 0.0)
    assert run(None).correlation is None


ROWS: dict[str, dict[str, object]] = {
    "gsm8k": {"question": "q", "answer": "#### 3"},
    "math": {"problem": "p", "answer": "3"},
    "humaneval": {"prompt": "def f():\n", "test": "def check(f): pass", "entry_point": "f"},
    "mbpp": {"text": "t", "test_list": ["assert True"]},
    "livebench_typos": {"question_id": "q", "turns": ["t"], "ground_truth": "g"},
    "sst2": {"sentence": "s", "label": 0},
    "cola": {"sentence": "s", "label": 0},
}


def test_rows_are_those_of_every_task_that_judges() -> None:
    assert set(ROWS) == {name for name in TASKS if not get_task(name).judged_elsewhere}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("text", ["", " \n"])
@pytest.mark.skipif(why_no_sandbox() is not None, reason=f"no sandbox here: {why_no_sandbox()}")
def test_an_answer_that_is_none_is_wrong_and_counted_apart(name: str, text: str) -> None:
    task = get_task(name)
    summary = evaluate_task(
        task, task.read([ROWS[name]]), lambda prompts, _: [Completion(text, 1, True)], run_code=True
    )
    assert (summary.judged, summary.correct, summary.unparsed, summary.accuracy) == (1, 0, 1, 0.0)


@pytest.mark.parametrize("task", ["gsm8k", "math", "sst2"])
def test_a_model_that_is_always_right_scores_everything(task: str) -> None:
    path, examples = real_file(task), real_examples(task)[:200]
    texts = {example.instruction: GOLD[task][0](example) for example in examples}
    summary = evaluate_named(task, path, answering(texts), limit=200, batch_size=64)
    assert (summary.accuracy, summary.unparsed, summary.examples) == (1.0, 0, 200)
