"""What configurations have to say alike of tensors that have one shape, so that entries at one place mean the same."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from m3jax.errors import M3Error

_DIVISIONS = ("num_attention_heads", "num_key_value_heads", "head_dim", "n_head", "num_heads")
"""Into how many heads the rows of a projection are divided."""

_MEANINGS = (
    *("model_type", "hidden_act", "hidden_activation", "activation_function"),
    *("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon"),
    *("rope_theta", "rope_scaling", "partial_rotary_factor", "sliding_window"),
    *("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"),
    *("attention_multiplier", "embedding_multiplier", "residual_multiplier", "logits_scaling"),
)
"""What a model computes with its weights; a model may have been trained on to have it otherwise."""


def notes_on_configurations(configs: Sequence[tuple[str, Mapping[str, Any] | None]]) -> Iterator[str]:
    """Sentences on what configurations say otherwise of how weights are used.

    What one of them does not say is not compared, as defaults are the families'.

    Args:
        configs: The names of models, and what their config.json says.

    Raises:
        M3Error: They divide tensors of one shape into other heads.
    """
    told = [(name, _entries(config)) for name, config in configs if config is not None]
    for name, entries in told[1:]:
        first, known = told[0]
        for key in (*_DIVISIONS, *_MEANINGS):
            one, other = known.get(key), entries.get(key)
            if one is None or other is None or one == other:
                continue
            said = f"{key} is {one!r} in {first} and {other!r} in {name}"
            if key in _DIVISIONS:
                raise M3Error(
                    f"config.json: {said}, so that rows at one place are of other heads: merge models of one form, or "
                    "correct the config.json that is wrong"
                )
            yield f"config.json: {said}; their weights are merged all the same, and are used as the output's says"


def _entries(config: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a configuration; of models with several towers those of the text."""
    part = config.get("text_config")
    found = {**config, **(part if isinstance(part, Mapping) else {})}
    rope = found.get("rope_parameters")  # as transformers 5 writes them
    return {**(rope if isinstance(rope, Mapping) and "rope_theta" in rope else {}), **found}
