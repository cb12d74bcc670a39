"""Chat templates: those with a name, and what a recipe may say of one."""

from collections.abc import Mapping
from types import MappingProxyType

from m3jax.recipe.settings import RecipeError, nearest

AUTO = "auto"
"""Says that the output takes the template that most of the models have."""

# `{{- … -}}` and `{%- … -%}` swallow the space around them, so that what is between quotes is all that is written.

# The prompt without input and the targets of https://github.com/tatsu-lab/stanford_alpaca, train.py; what a system
# message says stands in the place of its first paragraph.
_ALPACA = r"""
{{- bos_token -}}
{%- if messages[0]['role'] == 'system' -%}
    {{- messages[0]['content'] -}}
{%- else -%}
    {{- 'Below is an instruction that describes a task. ' -}}
    {{- 'Write a response that appropriately completes the request.' -}}
{%- endif -%}
{{- '\n\n' -}}
{%- for message in messages -%}
    {%- if message['role'] == 'user' -%}
        {{- '### Instruction:\n' + message['content'] + '\n\n' -}}
    {%- elif message['role'] == 'assistant' -%}
        {{- '### Response:' + message['content'] -}}{{- eos_token -}}{{- '\n\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '### Response:' -}}{%- endif -%}
"""

# https://github.com/openai/openai-python/blob/release-v0.28.0/chatml.md
_CHATML = r"""
{%- for message in messages -%}
    {{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""

# `ChatFormat` of https://github.com/meta-llama/llama3, llama/tokenizer.py
_LLAMA3 = r"""
{{- bos_token -}}
{%- for message in messages -%}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' -}}
    {{- message['content'] | trim -}}{{- '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}{%- endif -%}
"""

# Tokenizer V3 of https://github.com/mistralai/cookbook, concept-deep-dive/tokenization/chat_templates.md, where the
# system message goes before the last user's.
_MISTRAL = r"""
{%- set told = namespace(system='', last=-1) -%}
{%- for message in messages -%}
    {%- if message['role'] == 'system' -%}{%- set told.system = message['content'] + '\n\n' -%}{%- endif -%}
    {%- if message['role'] == 'user' -%}{%- set told.last = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{{- bos_token -}}
{%- for message in messages -%}
    {%- if message['role'] == 'user' -%}
        {{- '[INST] ' -}}
        {%- if loop.index0 == told.last -%}{{- told.system -}}{%- endif -%}
        {{- message['content'] + '[/INST]' -}}
    {%- elif message['role'] == 'assistant' -%}
        {{- ' ' -}}{{- message['content'] | trim -}}{{- eos_token -}}
    {%- endif -%}
{%- endfor -%}
"""

# tokenizer_config.json of https://huggingface.co/LGAI-EXAONE/EXAONE-3.5-7.8B-Instruct: a conversation begins with a
# system turn, if an empty one, and a user's turn ends without a mark.
_EXAONE = r"""
{%- if messages[0]['role'] != 'system' -%}{{- '[|system|][|endofturn|]\n' -}}{%- endif -%}
{%- for message in messages -%}
    {{- '[|' + message['role'] + '|]' + message['content'] -}}
    {%- if message['role'] != 'user' -%}{{- '[|endofturn|]' -}}{%- endif -%}
    {{- '\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '[|assistant|]' -}}{%- endif -%}
"""

BUILT_IN: Mapping[str, str] = MappingProxyType(
    {
        "alpaca": _ALPACA.lstrip(),
        "chatml": _CHATML.lstrip(),
        "llama3": _LLAMA3.lstrip(),
        "mistral": _MISTRAL.lstrip(),
        "exaone": _EXAONE.lstrip(),
    }
)
"""Jinja templates by the names that recipes give them, as mergekit's do."""


def read_chat_template(raw: str) -> str:
    """What a recipe says of the output's chat template: a name, or text in Jinja as it is.

    Args:
      raw: the text.

    Returns:
      `auto`, a name of `BUILT_IN`, or the template.

    Raises:
      RecipeError: it is one word that is no name.
    """
    if any(mark in raw for mark in "{}\n"):
        return raw
    name = raw.strip()
    known = (AUTO, *BUILT_IN)
    if name not in known:
        mend = nearest(name, known)
        raise RecipeError(f"{raw!r} is neither a chat template's name nor Jinja text; {mend}")
    return name
