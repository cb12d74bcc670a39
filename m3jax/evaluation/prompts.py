"""Prompt templates: how an instruction is put to a model.

The wordings are those of the models that the M³ paper (arXiv 2502.15434) merges, as in the evaluation it follows
(DARE, arXiv 2311.03099): WizardLM's (Vicuna's), WizardMath's, Alpaca's, and WizardCoder's for code models.
"""

from typing import Any

from m3jax.errors import M3Error
from m3jax.evaluation.chats import chat_text

_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n### Response:"
)
_TEMPLATES = {
    "wizardlm": (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: {} ASSISTANT:"
    ),
    "wizardmath": _ALPACA + " Let's think step by step.",
    "alpaca": _ALPACA,
    "code-alpaca": (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n\n### Instruction:\nCreate a Python script for this problem:\n{}\n\n### Response:"
    ),
    "none": "{}",
}
CHAT = "chat"
TEMPLATE_NAMES = (*_TEMPLATES, CHAT)


def render(template: str, instruction: str, tokenizer: Any = None) -> str:
    """Put an instruction into a template.

    Args:
        template: One of `TEMPLATE_NAMES`; "chat" is the tokenizer's own.
        instruction: The text of the instruction.
        tokenizer: Needed for "chat": has `apply_chat_template`, as transformers' tokenizers do.

    Example:
        >>> render("wizardlm", "Say hello.")[-27:]
        'USER: Say hello. ASSISTANT:'
    """
    if template == CHAT:
        return _chat(instruction, tokenizer)
    if template not in _TEMPLATES:
        raise M3Error(f"no prompt template is called {template!r}; there are: {', '.join(TEMPLATE_NAMES)}")
    return _TEMPLATES[template].replace("{}", instruction)


def has_chat_template(tokenizer: Any) -> bool:
    """Whether a tokenizer brings a template of its own."""
    return getattr(tokenizer, "chat_template", None) is not None


def _chat(instruction: str, tokenizer: Any) -> str:
    if not has_chat_template(tokenizer):
        raise M3Error(
            "the template 'chat' is the tokenizer's own, and this model's tokenizer has none; choose another with "
            f"--template: {', '.join(_TEMPLATES)}"
        )
    return chat_text(tokenizer, [{"role": "user", "content": instruction}], add_generation_prompt=True)
