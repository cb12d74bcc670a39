"""Chat templates are programs of strangers: what they say is taken, what they refuse is said, none goes on forever."""

from collections.abc import Callable
from typing import Any

import pytest

from m3jax.errors import M3Error
from m3jax.evaluation.chats import chat_text
from m3jax.evaluation.prompts import render
from m3jax.evaluation.tokens import load_tokenizer
from m3jax.recipe.chat_templates import BUILT_IN

SAID = [{"role": "user", "content": "Hi"}]
LOOP = "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}"
DOUBLING = "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("name", BUILT_IN)
def test_templates_are_rendered(tokenizer: Any, name: str) -> None:
    tokenizer.chat_template = BUILT_IN[name]
    text = tokenizer.apply_chat_template(SAID, tokenize=False, add_generation_prompt=True)
    assert chat_text(tokenizer, SAID, add_generation_prompt=True) == text == render("chat", "Hi", tokenizer)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('no user turns') }}", r"fails \(no user turns\)"),
        ("{{ messages.foo.bar }}", "has no attribute 'foo'"),
        ("{% if %}", "Expected an expression"),
        ("{{ 'open", "chat template"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        (LOOP, r"more than 1,\d+,\d+ steps"),
        (DOUBLING, "memory"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ 9**9**9 }}", r"reckons with \*\* in line 1, which could not end: mend it, or choose another prompt"),
        ("{{ 'a' * 99999999999 }}", "reckons with 99999999999 in line 1"),
        ("{{ range(10, 1000001) }}", "reckons with 1000001"),
    ],
)
def test_templates_that_fail_are_said(tokenizer: Any, template: str, said: str) -> None:
    tokenizer.chat_template = template
    with pytest.raises(M3Error, match=said):
        chat_text(tokenizer, SAID, add_generation_prompt=True)


def test_a_long_template_is_compiled(tokenizer: Any) -> None:
    tokenizer.chat_template = "\n".join(BUILT_IN.values()) * 8
    assert chat_text(tokenizer, SAID).count("Hi") == 40


def test_a_trace_of_somebody_else_goes_on(tokenizer: Any) -> None:
    import sys

    def trace(*_: Any) -> Callable[..., Any] | None:
        return None

    tokenizer.chat_template = "{{ messages[0].content }}"
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        assert chat_text(tokenizer, SAID) == "Hi"
        assert sys.gettrace() is trace
    finally:
        sys.settrace(before)


def test_a_tokenizer_that_panics_is_said(tokenizer: Any, tmp_path: Any, capfd: pytest.CaptureFixture[str]) -> None:
    import json

    told = json.loads(tokenizer.backend_tokenizer.to_str())
    told["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(told))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(M3Error, match=r"m: its tokenizer cannot be read \(Precompiled: .*: copy that of its base"):
        load_tokenizer("m", tmp_path)
