"""Forms of MBPP's and HumanEval's answers."""

import ast
import json
import re
import textwrap
from collections.abc import Sequence

from m3jax.evaluation import Example
from m3jax.evaluation.scorers import slices


def reference(example: Example) -> str:
    """The right program, whole."""
    code = str(example.extra.get("prompt", "")) + example.gold
    return code.replace("\r\n", "\n").replace("\r", "\n").strip("\n") + "\n"


def wanted(example: Example) -> tuple[str, ...]:
    """The names that the tests call."""
    name = example.extra.get("name")
    return (str(name),) if name is not None else slices.called_names(example.extra["tests"])


def broken(code: str) -> str:
    """Every function returns what no test expects."""
    return re.sub(r"\b(return|yield)\b(?:[ \t]+from)?", r"\1 'neither here nor there',", code)


def forms(example: Example, code: str, draft: str) -> dict[str, str]:
    """A program in every form that fits it.

    Args:
        example: The problem.
        code: The program, whole.
        draft: Another program for the same problem, for forms in which one is taken back.
    """
    names = wanted(example)
    return (
        _fences(code)
        | _others(names[0], code, draft)
        | _bare(code)
        | _behind(example, names[0], code)
        | _rewritten(names, code)
        | (_bodies(example, code) if "prompt" in example.extra else {})
    )


def _fenced(code: str, label: str = "python") -> str:
    return f"```{label}\n{code}```\n"


def _fences(code: str) -> dict[str, str]:
    tag = code.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    typed = [(">>> " if line and not line[0].isspace() else "... ") + line for line in code.rstrip().split("\n")]
    return {
        "fence, prose around": f"Here is the solution:\n\n{_fenced(code)}\nIt handles every case.",
        "lone closing fence": f"{code}```\n",
        "lone closing fence, prose behind": f"{code}```\n\nThis function does it.\n",
        "lone opening fence": f"Sure.\n```python\n{code}",
        "unlabelled fence": f"Sure.\n{_fenced(code, '')}",
        "tildes": f"~~~python\n{code}~~~",
        "label Python3": _fenced(code, "Python3"),
        "label text": _fenced(code, "text"),
        "code behind the label": f"```python {code}```",
        "fences at line ends": f"Here it is: ```python\n{code.rstrip()}```",
        "fence in a list": f"1. Write it:\n\n{textwrap.indent(_fenced(code), '   ')}\n2. Run it.",
        "fence in a quotation": "".join(f"> {line}\n" for line in _fenced(code).splitlines()),
        "console": "```pycon\n" + "\n".join(typed) + "\n```",
        "[BEGIN] … [DONE]": f"[BEGIN]\n{code}[DONE]\n",
        "… [DONE]": f"{code}[DONE]\n\nYou are an expert programmer.",
        "[PYTHON]": f"[PYTHON]\n{code}[/PYTHON]\n[TESTS]\nassert False\n[/TESTS]",
        "<code>": f"<pre><code>{tag}</code></pre>",
        "Windows line ends": _fenced(code).replace("\n", "\r\n"),
        "three quotation marks": f"'''python\n{code}'''",
        "JSON": json.dumps({"explanation": "It loops.", "code": code}),
        "JSON in a fence": _fenced(json.dumps({"code": code}, indent=2) + "\n", "json"),
        "byte order mark": f"\ufeff{code}",
        "__future__": _fenced(f"from __future__ import annotations\n\n{code}"),
        "special token": f"{_fenced(code)}<|im_end|>",
    }


def _others(name: str, code: str, draft: str) -> dict[str, str]:
    return {
        "code and output": f"{_fenced(code)}\nOutput:\n\n```\n[1, 2, 3]\nTrue\n```\n",
        "code and a word": f"{_fenced(code)}\n```\nprint\n```\n",
        "code and usage": f"{_fenced(code)}\nUsage:\n\n```python\nresult = {name}(undefined)\nprint(result)\n```\n",
        "shell before": f"```bash\npip install numpy\n```\n\n{_fenced(code)}",
        "draft before": f"{_fenced(draft)}\nThat is wrong. Better:\n\n{_fenced(code)}",
        "imported behind": f"{_fenced(code)}\nTest it:\n\n```python\nfrom solution import {name}\nprint({name})\n```\n",
        "Harmony's channels": f"<|channel|>analysis<|message|>{_fenced(draft)}<|end|><|start|>assistant<|channel|>final"
        f"<|message|>{_fenced(code)}<|return|>",
        "signature behind": f"{_fenced(code)}\nIts signature:\n\n```python\ndef {name}(*args):\n    ...\n```\n",
        "thought aloud": f"<think>\nMaybe\n{_fenced(draft)}\nNo.</think>\n{_fenced(code)}",
        "next exercise": f"\n{_fenced(code)}\n### Instruction:\nAdd two.\n\n### Response:\n```python\ndef add_two(x):\n"
        "    return x + 2\n```\n",
    }


def _bare(code: str) -> dict[str, str]:
    return {
        "bare": code,
        "bare, prose around": f"Here is a function that does it:\n\n{code}\nThis function returns the result.",
        "bare, prose close by": f"Sure, here you go:\n{code}Explanation: it loops.\n- first\n- then",
        "bare, one word behind": f"{code}\nDone",
        "tabs": _fenced(re.sub(r"^(?: {4})+", lambda margin: "\t" * (len(margin.group()) // 4), code, flags=re.M)),
    }


def _behind(example: Example, name: str, code: str) -> dict[str, str]:
    asserts = [line for line in str(example.extra["tests"]).split("\n") if line.startswith("assert")]
    case = (
        f"class TestIt(unittest.TestCase):\n    def test(self):\n        self.assertTrue({name})\n\nunittest.main()\n"
    )
    return {
        "input() behind": _fenced(f"{code}\nn = int(input('n: '))\nprint({name}(n))\n"),
        "__main__ block": _fenced(
            f"{code}\nif __name__ == '__main__':\n    import sys\n    print({name}(sys.argv[1]))\n"
        ),
        "main() called": _fenced(f"{code}\ndef main():\n    n = int(input())\n    print({name}(n))\n\nmain()\n"),
        "own asserts, right": _fenced(f"{code}\n# tests\n" + "".join(f"{line}\n" for line in asserts)),
        "own asserts, wrong": _fenced(f"{code}\nassert {name} is None, 'wrong'\n"),
        "prints": _fenced(f"{code}\nprint({name}(undefined))\n# prints 3\n"),
        "unittest": _fenced(f"import unittest\n{code}\n{case}"),
        "packages imported for nothing": _fenced(f"import numpy as np\nimport pandas as pd\n{code}"),
    }


def _rewritten(names: Sequence[str], code: str) -> dict[str, str]:
    imports = [line for line in code.split("\n") if re.match(r"(?:import|from) ", line)]
    rest = "\n".join(line for line in code.split("\n") if line not in imports)
    found = {
        "class Solution": _as_method(code, names),
        "fence in a docstring": _with_fence_in_docstring(code, names),
        "one-line fence": _on_one_line(code),
        "imports in a fence of their own": "\n".join(imports) if imports else None,
    }
    said = {form: _fenced(text) for form, text in found.items() if text is not None}
    if "one-line fence" in said:
        said["one-line fence"] = f"Use ```python {found['one-line fence']}```."
    if imports:
        said["imports in a fence of their own"] = _fenced("\n".join(imports) + "\n") + "then\n" + _fenced(rest)
    return said


def _as_method(code: str, names: Sequence[str]) -> str | None:
    """The function as a method of a class; None where it calls itself or has others beside it."""
    tree = ast.parse(code)
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    if len(functions) != 1 or len(functions) + len(imports) != len(tree.body) or functions[0].name not in names:
        return None
    function = functions[0]
    if any(isinstance(node, ast.Name) and node.id == function.name for node in ast.walk(function)):
        return None
    function.args.args.insert(0, ast.arg("self"))
    head = "\n".join(map(ast.unparse, imports))
    return f"{head}\n\nclass Solution:\n{textwrap.indent(ast.unparse(function), '    ')}\n"


def _with_fence_in_docstring(code: str, names: Sequence[str]) -> str | None:
    """The program with an example between fences in its docstring."""
    tree = ast.parse(code)
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in names]
    if not functions:
        return None
    function = functions[-1]
    if ast.get_docstring(function) is not None:
        function.body = function.body[1:]
    function.body.insert(0, ast.Expr(ast.Constant("DOCSTRING")))
    example = f"Do it.\n\n    ```python\n    {function.name}(1)\n    ```\n\n    ```\n    output\n    ```\n    "
    return re.sub(r"(['\"]+)DOCSTRING\1", lambda _: f'"""{example}"""', ast.unparse(tree)) + "\n"


def _on_one_line(code: str) -> str | None:
    lines = [line for line in code.split("\n") if line.strip()]
    if len(lines) == 2 and lines[0].rstrip().endswith(":") and lines[1].strip().startswith("return"):
        return f"{lines[0].strip()} {lines[1].strip()}"
    return None


def _bodies(example: Example, code: str) -> dict[str, str]:
    """HumanEval's other ways: only the body, or the prompt as it was put, with tabs, and a body with spaces."""
    prompt = str(example.extra["prompt"])
    gold = code[len(prompt.lstrip("\n")) :]
    tabbed = prompt.replace("    ", "\t") + gold
    return {
        "body": gold,
        "body, first margin lost": gold.lstrip(),
        "body, no margin": _fenced(textwrap.dedent(gold).strip("\n") + "\n"),
        "body in a fence": _fenced(gold.strip("\n") + "\n"),
        "body, prose behind": f"{gold.rstrip()}\n\nThis returns it.",
        "prompt with tabs, body with spaces": tabbed,
        "the same in a fence": _fenced(tabbed.rstrip() + "\n"),
    }


def neighbours(example: Example, code: str, draft: str) -> dict[str, str]:
    """Answers that must not pass although the right program stands in them."""
    name = wanted(example)[0]
    return {
        "right only when thought": f"<think>\n{_fenced(code)}</think>\n{_fenced(draft)}",
        "right first, wrong last": f"{_fenced(code)}\nOr rather:\n\n{_fenced(draft)}",
        "another name": _fenced(re.sub(rf"\b{re.escape(name)}\b", "another_name", code)),
        "in comments": _fenced("".join(f"# {line}\n" for line in code.split("\n"))),
        "deleted": _fenced(f"{code}\ndel {name}\n"),
        "user's next turn": f"{_fenced(draft)}<|im_end|>\n<|im_start|>user\nAgain?\n{_fenced(code)}",
        "in a string": _fenced(f"program = {code!r}\n"),
        "only in a test": _fenced("def test():\n" + textwrap.indent(code, "    ")),
        "wrong in a fence, right bare": f"{code}\n{_fenced(draft)}",
    }
