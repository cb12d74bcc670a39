"""HumanEval and MBPP: functions to write, judged by running their tests."""

import functools
import re
from collections.abc import Callable, Sequence

from m3jax.errors import M3Error
from m3jax.evaluation.data import Field, HubSet, Row, read_fields
from m3jax.evaluation.protocol import GenerationSettings
from m3jax.evaluation.sandbox import Program, run_programs
from m3jax.evaluation.scorers.code import continued as continued_program
from m3jax.evaluation.scorers.code import defines, extract_code, is_python
from m3jax.evaluation.scorers.paper import paper_program
from m3jax.evaluation.scorers.slices import called_names
from m3jax.evaluation.tasks.base import Example, Execution, Judge, Judgement, Task

_FUTURE = re.compile(r"^from __future__ import .*$", re.MULTILINE)


def humaneval() -> Task:
    """Python functions from their signature and docstring (Chen et al., 2021); pass@1, greedy."""
    return Task(
        name="humaneval",
        read=_read_humaneval,
        judge=_judged_by_tests(_humaneval_program, functools.partial(_humaneval_program, whole=True)),
        template="code-alpaca",
        settings=GenerationSettings(max_tokens=2048),
        hub=HubSet("openai/openai_humaneval"),
        runs_code=True,
        graders={"paper": _judged_by_tests(_humaneval_program_of_paper)},
    )


def _read_humaneval(rows: Sequence[Row]) -> list[Example]:
    fields = {
        "prompt": Field(("prompt",)),
        "test": Field(("test",)),
        "entry_point": Field(("entry_point",)),
        "solution": Field(("canonical_solution",), required=False),
        "id": Field(("task_id",), required=False),
    }
    examples = []
    for number, row in enumerate(read_fields(rows, fields, "humaneval")):
        prompt, name = str(row["prompt"]), str(row["entry_point"])
        if f"def {name}" not in prompt:
            raise M3Error(f"example {number + 1} is not humaneval data: its prompt defines no function {name!r}")
        examples.append(
            Example(
                id=str(row.get("id", number)),
                # Tabs for spaces, as in the evaluation that the paper follows.
                instruction=prompt.replace("    ", "\t"),
                gold=str(row.get("solution", "")),
                extra={"prompt": prompt, "name": name, "tests": f"{row['test']}\n\ncheck({name})\n"},
            )
        )
    return examples


def _humaneval_program(example: Example, text: str, whole: bool = False) -> str | None:
    """The program to test: the answer's own, under the prompt's imports and helpers, or the prompt continued."""
    prompt, name = example.extra["prompt"], example.extra["name"]
    code = extract_code(text, name, whole)
    if code is not None and defines(code, name) and is_python(code):
        header = prompt[: prompt.rindex(f"def {name}")]
        future = "".join(f"{line}\n" for line in _FUTURE.findall(code))  # Python wants them first
        return f"{future}{header}\n{_FUTURE.sub('', code)}"
    continued = continued_program(prompt, name, text, whole)
    if continued is not None and is_python(continued):
        return continued
    return code if code is not None else continued


def _humaneval_program_of_paper(example: Example, text: str) -> str:
    return f"{example.extra['prompt']}{paper_program(text, 'humaneval')}\n"


def mbpp() -> Task:
    """Short Python functions from one sentence and three tests (Austin et al., 2021); pass@1, greedy."""
    return Task(
        name="mbpp",
        read=_read_mbpp,
        judge=_judged_by_tests(_mbpp_program, functools.partial(_mbpp_program, whole=True)),
        template="code-alpaca",
        settings=GenerationSettings(max_tokens=2048),
        hub=HubSet("google-research-datasets/mbpp", "full"),
        runs_code=True,
        graders={"paper": _judged_by_tests(_mbpp_program_of_paper)},
    )


def _read_mbpp(rows: Sequence[Row]) -> list[Example]:
    fields = {
        "text": Field(("text", "prompt")),
        "tests": Field(("test_list",)),
        "setup": Field(("test_setup_code",), required=False),
        "imports": Field(("test_imports",), required=False),
        "solution": Field(("code",), required=False),
        "id": Field(("task_id",), required=False),
    }
    examples = []
    for number, row in enumerate(read_fields(rows, fields, "mbpp"), 1):
        tests = row["tests"]
        if not isinstance(tests, list) or not tests or not all(isinstance(test, str) for test in tests):
            raise M3Error(f"example {number} is not mbpp data: test_list must be a list of assert statements")
        setup = "\n".join([*row.get("imports", []), str(row.get("setup", ""))]).replace("\r\n", "\n")
        instruction = f"\n{row['text']}\nTest examples:\n" + "\n".join(tests)
        examples.append(
            Example(
                id=str(row.get("id", number - 1)),
                instruction=instruction,
                gold=str(row.get("solution", "")),
                extra={"tests": f"{setup}\n" + "\n".join(tests) + "\n"},
            )
        )
    return examples


def _mbpp_program(example: Example, text: str, whole: bool = False) -> str | None:
    return extract_code(text, called_names(example.extra["tests"]), whole)


def _mbpp_program_of_paper(_: Example, text: str) -> str:
    return paper_program(text, "mbpp")


def program_finders(task: str) -> dict[str, Callable[[Example, str], str | None]]:
    """How each grader finds the program of a completion.

    Args:
        task: "humaneval" or "mbpp".
    """
    if task == "humaneval":
        return {"m3jax": _humaneval_program, "paper": _humaneval_program_of_paper}
    return {"m3jax": _mbpp_program, "paper": _mbpp_program_of_paper}


_NO_PROGRAM = "no program found"
_NO_PYTHON = "error: SyntaxError: what was found is no Python"  # so that no process need be started to say so


def _judged_by_tests(*programs_of: Callable[[Example, str], str | None]) -> Judge:
    """Judge by running each example's tests against a program found in the completion.

    Args:
        *programs_of: Ways to find it: where one that was found fails the tests, the next may find another.
    """

    def judge(examples: Sequence[Example], texts: Sequence[str], execution: Execution) -> list[Judgement]:
        judged: dict[int, Judgement] = {}
        tried = set[tuple[int, str]]()
        for program_of in programs_of:
            left = [place for place in range(len(texts)) if place not in judged or not judged[place].correct]
            found = {place: program_of(examples[place], texts[place]) for place in left}
            programs = [(place, source) for place, source in found.items() if source is not None and is_python(source)]
            programs = [program for program in programs if program not in tried]
            tried.update(programs)
            outcomes = run_programs(
                [Program(source, examples[place].extra["tests"]) for place, source in programs],
                limits=execution.limits,
                allow_unsandboxed=execution.allow_unsandboxed,
                workers=execution.workers,
            )
            for (place, source), outcome in zip(programs, outcomes, strict=True):
                if outcome.passed or place not in judged:  # of those that fail, the first is told
                    detail = "" if outcome.passed else f"{outcome.reason}: {outcome.detail}"
                    judged[place] = Judgement(outcome.passed, source, detail)
            for place, text in found.items():
                judged.setdefault(place, Judgement(False, None, _NO_PROGRAM if text is None else _NO_PYTHON))
        return [judged[place] for place in range(len(texts))]

    return judge
