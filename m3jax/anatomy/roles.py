"""What a tensor does in its model: attention, MLP, norm, embedding or head; told from names and anatomy."""

import re
from typing import Literal, TypeAlias, get_args

from m3jax.anatomy.types import Anatomy
from m3jax.naming import HEAD

Role: TypeAlias = Literal["embedding", "attention", "mlp", "norm", "head", "other"]

ROLES: tuple[Role, ...] = get_args(Role)
"""In the order in which a model uses them."""

_NORM = re.compile(
    r"norm(?!al)|(?:^|\.)bn\d*(?=\.|$)|(?:^|\.)ln(?:_?[a-z0-9]{1,4})?(?=\.|$)|(?:^|\.)[a-z]+_ln(?=\.|$)|layrnorm",
    re.IGNORECASE,
)
_PARTS: tuple[tuple[Role, re.Pattern[str]], ...] = (  # of blocks; the one that is named first decides
    ("attention", re.compile(r"att(?:n|en)", re.IGNORECASE)),
    (
        "mlp",
        re.compile(
            r"mlp|ffn|ffw|feed_?forward|densereludense|(?:^|[._])moe(?=[._]|$)|expert|router|(?:^|\.)ff(?=\.)",
            re.IGNORECASE,
        ),
    ),
)
_MATRICES: tuple[tuple[Role, re.Pattern[str]], ...] = (  # by their own names, where no part is named
    (
        "attention",
        re.compile(
            r"(?:^|\.)(?:w?qkv|[qkvo](?:_?proj)?|query|key|value|query_key_value|c_attn|(?:[qkv]|out)_lin|w[qkv]|sinks)(?=\.|$)",
            re.IGNORECASE,
        ),
    ),
    (
        "mlp",
        re.compile(
            r"(?:^|\.)(?:fc\w{0,4}|intermediate|output|gate|up|down|wi(?:_\d)?|wo|w[123]|(?:gate|up|down|gate_up)_proj|"
            r"lin(?:ear)?_?\d|dense_(?:h_to_4h|4h_to_h)|c_fc)(?=\.|$)",
            re.IGNORECASE,
        ),
    ),
)
_EMBEDDING = re.compile(
    r"emb(?:ed|_|\.|$)|embedding|(?:^|\.)(?:w[tp]e|shared)(?=\.|$)|position|patch|token_type|cls_token"
)


def role_of(anatomy: Anatomy, name: str, own: str | None = None) -> Role:
    """What a tensor does.

    A norm is one wherever it stands, also inside attention; a bias is of what its weight is of.

    Args:
        anatomy: Of its model.
        name: What it is stored as.
        own: What its block's tensor is called, where it stacks several.

    Example:
        >>> from m3jax.anatomy import anatomy_of
        >>> from m3jax.checkpoints import TensorInfo
        >>> names = ["embed_tokens.weight", "layers.0.self_attn.q_norm.weight", "layers.0.mlp.up_proj.weight"]
        >>> told = anatomy_of({name: TensorInfo(name, (2, 2), "F32") for name in names})
        >>> [role_of(told, name) for name in names]
        ['embedding', 'norm', 'mlp']
    """
    part = anatomy.parts[name]
    if part.kind == "buffer":
        return "other"
    inside, called = bool(part.groups), (own or name).removesuffix(".value")  # the box of Flax, not that of attention
    said = _behind_block(called, part.groups) if inside else called
    module = said.rpartition(".")[0] or called  # what the last word names is a weight, a bias, a scale
    if not inside:
        if name == anatomy.head or HEAD.search(name):
            return "head"
        if name == anatomy.embedding or part.vocabulary_axis is not None or _EMBEDDING.search(name):
            return "embedding"
    if _NORM.search(module):
        return "norm"
    return _part_of_block(said) if inside else "other"


def _part_of_block(said: str) -> Role:
    found = [(match.start(), role) for role, pattern in _PARTS if (match := pattern.search(said))]
    if found:
        return min(found)[1]
    return next((role for role, pattern in _MATRICES if pattern.search(said)), "other")


def _behind_block(name: str, groups: tuple[str, ...]) -> str:
    """A name without what stands before its place in the block, which may speak of anything."""
    found = next((name.partition(f"{group}.")[2] for group in groups if f"{group}." in name), "")
    return found or re.sub(r"^.*?[._]\d+(?:\.|_)", "", name)
