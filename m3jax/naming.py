"""What a tensor's name says about where it stands in a model."""

import re

_BLOCK = re.compile(r"(?:^|\.)(?:layers|h|blocks|block|layer)\.(\d{1,9})(?=\.|$)")
_AFTER_BLOCKS = re.compile(r"embed_out|unembed")
_BEFORE_BLOCKS = re.compile(r"embed|(?:^|\.)w[tp]e(?:\.|$)")

INPUT_EMBEDDING = re.compile(
    r"(?:^|\.)(?:embed_tokens(?:\.embed_tokens|\.word_embeddings)?|wte|word_embeddings?|tok_embeddings|tokens_embed|embed_in|"
    r"token_embeddings?|shared|embed_tokens_per_layer|embed_text_tokens)\.weight$"
)
"""How embeddings of tokens are called by most architectures."""
NO_WORDS = re.compile(
    r"pos(?:ition)?s?(?:_|e?mb|itional|$|\.)|wpe|token_type|segment|patch|class|type_emb|image|vision|audio|time|entity"
)
"""What is found in the names of embeddings of something else."""
HEAD = re.compile(
    r"(?:^|\.)(?:lm_head|embed_out|output_projection|vocab_projector|proj_out|generator_lm_head|lm_loss|pred_layer\.proj|"
    r"(?:lm_head|predictions|cls\.predictions|mlm_score|head|mlm_head)\.decoder|predictions(?:\.dense)?|lm_head\.out_proj|final_logits|"
    r"output_layer|unembed|unembedding_projection|logits_dense|logits|embed_tokens_head)(?:\.(?:weight|bias|kernel|w|embedding))?$"
    r"|^(?:model\.)?(?:head|output|decoder)\.(?:weight|bias|kernel|w)$|(?:^|\.)final_logits_bias$"
)
"""How output embeddings and their biases are called."""
SIDES = re.compile(r"(?:^|\.)(?:encoder|decoder|text_encoder|text_decoder)\.(?:embed_tokens|word_embeddings)\.weight$")
"""How encoder and decoder call the embedding that they share."""
OUTSIDE_BLOCKS = "outside blocks"
"""The group of all tensors that belong to no transformer block (embeddings, final norm, head)."""


def block_of(name: str) -> tuple[str, int] | None:
    """The transformer block of a tensor: its name up to the block's number, and that number.

    Example:
        >>> block_of("model.layers.3.mlp.up_proj.weight")
        ('model.layers.3', 3)
        >>> block_of("lm_head.weight") is None
        True
    """
    match = _BLOCK.search(name)
    return None if match is None else (name[: match.end()], int(match.group(1)))


def position(index: int, count: int) -> float:
    """Where layer `index` of `count` stands in [0, 1]; a lone layer stands at 1, as in mergekit."""
    return min(index / (count - 1), 1.0) if count > 1 else 1.0


def layer_position(name: str, num_layers: int) -> float:
    """The position t in [0, 1] at which gradients are read for a tensor.

    Args:
        name: The tensor's name.
        num_layers: How many transformer blocks the model has.

    Returns:
        0 for embeddings, i/(num_layers − 1) for block i, and 1 for everything after the blocks (and for the block of
        a one-block model).

    Example:
        >>> layer_position("model.layers.3.mlp.up_proj.weight", 5)
        0.75
        >>> layer_position("model.embed_tokens.weight", 5), layer_position("lm_head.weight", 5)
        (0.0, 1.0)
    """
    block = block_of(name)
    if block is not None:
        return position(block[1], num_layers)
    before = _BEFORE_BLOCKS.search(name) and not _AFTER_BLOCKS.search(name)
    return 0.0 if before else 1.0


def block_group(name: str, granularity: str) -> str:
    """The group that shares one draw of weights with tensor `name`.

    Args:
        name: The tensor's name.
        granularity: "layer" or "tensor".

    Example:
        >>> block_group("model.layers.3.mlp.up_proj.weight", "layer")
        'model.layers.3'
    """
    if granularity == "tensor":
        return name
    block = block_of(name)
    return OUTSIDE_BLOCKS if block is None else block[0]
