"""Chat templates with a name, rendered by transformers and compared with what their authors published."""

import pytest

from m3jax.errors import M3Error
from m3jax.evaluation.tokens import import_transformers
from m3jax.recipe import load_recipe
from m3jax.recipe.chat_templates import BUILT_IN

ASK = [{"role": "user", "content": "How far?"}]
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "How far?"},
    {"role": "assistant", "content": "Two miles."},
    {"role": "user", "content": "  And back?\nAlso two? "},
]
TOLD = [*ASK, {"role": "assistant", "content": "Two miles."}]
PREAMBLE = "Below is an instruction that describes a task. Write a response that appropriately completes the request."

EXPECTED = {
    "alpaca": (
        f"<s>{PREAMBLE}\n\n### Instruction:\nHow far?\n\n### Response:",
        "<s>Be brief.\n\n### Instruction:\nHow far?\n\n### Response:Two miles.</s>\n\n"
        "### Instruction:\n  And back?\nAlso two? \n\n### Response:",
        f"<s>{PREAMBLE}\n\n### Instruction:\nHow far?\n\n### Response:Two miles.</s>\n\n",
    ),
    "chatml": (
        "<|im_start|>user\nHow far?<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHow far?<|im_end|>\n"
        "<|im_start|>assistant\nTwo miles.<|im_end|>\n<|im_start|>user\n  And back?\nAlso two? <|im_end|>\n"
        "<|im_start|>assistant\n",
        "<|im_start|>user\nHow far?<|im_end|>\n<|im_start|>assistant\nTwo miles.<|im_end|>\n",
    ),
    "llama3": (
        "<s><|start_header_id|>user<|end_header_id|>\n\nHow far?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHow far?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nTwo miles.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nAnd back?\nAlso two?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<s><|start_header_id|>user<|end_header_id|>\n\nHow far?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nTwo miles.<|eot_id|>",
    ),
    "mistral": (
        "<s>[INST] How far?[/INST]",
        "<s>[INST] How far?[/INST] Two miles.</s>[INST] Be brief.\n\n  And back?\nAlso two? [/INST]",
        "<s>[INST] How far?[/INST] Two miles.</s>",
    ),
    "exaone": (
        "[|system|][|endofturn|]\n[|user|]How far?\n[|assistant|]",
        "[|system|]Be brief.[|endofturn|]\n[|user|]How far?\n[|assistant|]Two miles.[|endofturn|]\n"
        "[|user|]  And back?\nAlso two? \n[|assistant|]",
        "[|system|][|endofturn|]\n[|user|]How far?\n[|assistant|]Two miles.[|endofturn|]\n",
    ),
}


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    fast = import_transformers().PreTrainedTokenizerFast
    words = Tokenizer(WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    return fast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def test_there_is_an_expectation_for_each():
    assert EXPECTED.keys() == BUILT_IN.keys()


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_named_templates_write_what_was_published(tokenizer, name):
    def rendered(messages, ask):
        return tokenizer.apply_chat_template(
            messages, chat_template=BUILT_IN[name], tokenize=False, add_generation_prompt=ask
        )

    assert (rendered(ASK, True), rendered(TALK, True), rendered(TOLD, False)) == EXPECTED[name]


def merge(template):
    return load_recipe({"merge_method": "linear", "models": ["a", "b"], "chat_template": template})


@pytest.mark.parametrize("template", ["auto", "{{ messages }}", "line\nline", *BUILT_IN])
def test_what_is_known_is_kept_as_it_was_written(template):
    assert merge(template).chat_template == template
    assert load_recipe(merge(template).resolved()).chat_template == template


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        ("chat_ml", "chat_template: 'chat_ml' is neither a chat template's name nor Jinja text; did you mean 'chatml'"),
        ("llama-3", "chat_template: 'llama-3' is neither .* did you mean 'llama3'"),
        ("template.jinja", "chat_template: 'template.jinja' is .* known are auto, alpaca, chatml, llama3, mistral, ex"),
        ("", "chat_template: '' is neither"),
        (3, "chat_template: 3 does not fit here; write text"),
    ],
)
def test_a_word_that_is_no_name_is_refused_with_the_nearest(template, sentence):
    with pytest.raises(M3Error, match=sentence):
        merge(template)
