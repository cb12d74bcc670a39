"""Programs whose statements at the outermost level matter, in ways that are seen and in ways that are not."""

import pytest

from m3jax.evaluation import get_task, sandbox
from m3jax.evaluation.tasks.base import Execution

pytestmark = pytest.mark.skipif(
    sandbox.why_no_sandbox() is not None, reason=f"no sandbox here: {sandbox.why_no_sandbox()}"
)

# Each is right as a whole: f(n) == 2 * n for n in 0 to 3, and f(3000) == 6000.
RIGHT = {
    "a deep recursion": "import sys\nsys.setrecursionlimit(9000)\ndef f(n): return 0 if n == 0 else 2 + f(n - 1)",
    "a limit by its own name": (
        "from sys import setrecursionlimit\nsetrecursionlimit(9000)\ndef f(n): return 0 if n == 0 else 2 + f(n - 1)"
    ),
    "a global that a call makes": (
        "def build(n):\n    global table\n    table = [2 * i for i in range(n)]\nbuild(3001)\ndef f(n): return table[n]"
    ),
    "a table that a call is given": (
        "memo = {}\ndef fill(some):\n    for i in range(3001): some[i] = 2 * i\nfill(memo)\ndef f(n): return memo[n]"
    ),
    "a call for what it returns": (
        "memo = {}\ndef build(n):\n    for i in range(n): memo[i] = 2 * i\n    return n\n"
        "count = build(3001)\ndef f(n): return memo[n]"
    ),
    "a function that changes its argument": (
        "import heapq\nqueue = list(range(6000, -2, -2))\nheapq.heapify(queue)\ndef f(n): return queue[0] + 2 * n"
    ),
    "a decorator that registers": (
        "known = {}\ndef handler(g):\n    known[g.__name__] = g\n    return g\n"
        "@handler\ndef twice(n): return 2 * n\ndef f(n): return known['twice'](n)"
    ),
    "another name": "memo = {}\ncache = memo\ncache['by'] = 2\ndef f(n): return memo['by'] * n",
    "an attribute by its name": (
        "class Scale: pass\nscale = Scale()\nsetattr(scale, 'by', 2)\ndef f(n): return scale.by * n"
    ),
    "a test of its own that fails": "def f(n): return 2 * n\nassert f(1) == 3",
    "a question": "def f(n): return 2 * n\nprint(f(int(input())))",
}
WRONG = {
    "a patched module": "import math\nmath.floor = lambda x: 0\ndef f(n): return math.floor(2 * n)",
    "wrong in any way": "memo = {}\ndef build(): memo[1] = 1\nbuild()\ndef f(n): return memo.get(n, 0)",
}


def judged(task: str, source: str) -> bool:
    mbpp = {"text": "Double a number.", "test_list": ["assert f(2) == 4", "assert f(3000) == 6000"]}
    humaneval = {
        "prompt": 'def f(n):\n    """Double a number."""\n',
        "test": "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(3000) == 6000\n",
        "entry_point": "f",
    }
    found = get_task(task)
    examples = found.read([{"mbpp": mbpp, "humaneval": humaneval}[task]])
    (one,) = found.judge(examples, [f"```python\n{source}\n```"], Execution())
    return bool(one.correct)


@pytest.mark.parametrize("task", ["mbpp", "humaneval"])
@pytest.mark.parametrize("name", RIGHT)
def test_a_right_program_is_right_as_a_whole_or_without_what_it_does_not_need(name: str, task: str) -> None:
    assert judged(task, RIGHT[name])


@pytest.mark.parametrize("task", ["mbpp", "humaneval"])
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_program_is_wrong_in_both_ways(name: str, task: str) -> None:
    # As a whole, and without what seems to serve nothing.
    assert not judged(task, WRONG[name])
