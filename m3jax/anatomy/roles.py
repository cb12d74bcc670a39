"""What a tensor does in its model: attention, MLP, norm, embedding or head; told from names and anatomy."""

import re
from typing import Literal, TypeAlias, get_args

from m3jax.anatomy.types import Anatomy
from m3jax.naming import HEAD

Role: TypeAlias = Literal["embedding", "attention", "mlp", "norm", "head", "other"]

ROLES: tuple[Role, ...] = get_args(Role)
"""In the order in which a model uses them."""

_NORM = re.compile(
    r"norm(?!al)|(?:^|\.)ln(?:_?[a-z0-9]{1,4})?(?=\.|$)|(?:^|\.)[a-z]+_ln(?=\.|$)|layrnorm", re.IGNORECASE
)
_ATTENTION = re.compile(
    r"att(?:n|en)|(?:^|\.)(?:wqkv|qkv|[qkvo](?:_?proj)?|query|key|value|query_key_value|c_attn|w[qkvo]|sinks)(?=\.|$)",
    re.IGNORECASE,
)
_MLP = re.compile(
    r"mlp|ffn|ffw|feed_?forward|densereludense|(?:^|[._])moe(?=[._]|$)|expert|router|(?:^|\.)(?:fc\w{0,4}|intermediate|output|"
    r"gate|wi(?:_\d)?|wo|w[123]|(?:gate|up|down|gate_up)_proj|lin(?:ear)?_?\d|dense_(?:h_to_4h|4h_to_h)|c_fc)(?=\.|$)",
    re.IGNORECASE,
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
    inside = bool(part.groups)
    said = _behind_block(own or name, part.groups) if inside else name
    module = said.rpartition(".")[0] or said  # what the last word names is a weight, a bias, a scale
    if not inside:
        if name == anatomy.head or HEAD.search(name):
            return "head"
        if name == anatomy.embedding or part.vocabulary_axis is not None or _EMBEDDING.search(name):
            return "embedding"
    if _NORM.search(module):
        return "norm"
    if inside and _ATTENTION.search(said):
        return "attention"
    return "mlp" if inside and _MLP.search(said) else "other"


def _behind_block(name: str, groups: tuple[str, ...]) -> str:
    """A name without what stands before its place in the block, which may speak of anything."""
    found = next((name.partition(f"{group}.")[2] for group in groups if f"{group}." in name), "")
    return found or re.sub(r"^.*?[._]\d+(?:\.|_)", "", name)
