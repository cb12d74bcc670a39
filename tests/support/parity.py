"""Random models of every family, made by transformers and read by the decoder, and how far the two are apart.

Torch is imported where it is needed: pytest looks for doctests in every module, also where there is no torch.
"""

import copy
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from m3jax.decoder import PADDING, DecoderConfig, bind, generate, load_params, log_likelihoods
from m3jax.outputs.conversion import convert
from support import libraries

SIZES = {"vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3}
SIZES |= {"num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 256}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GPT2_NAMES = {"hidden_size": "n_embd", "intermediate_size": "n_inner", "num_hidden_layers": "n_layer"}
GPT2_NAMES |= {"num_attention_heads": "n_head", "max_position_embeddings": "n_positions"}

# Contexts of 32 positions before stretching: texts of half the prompts go beyond from the beginning, the others later.
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 8.0, "original_max_position_embeddings": 32}
RNG = np.random.default_rng(0)


def longrope(pairs: int) -> dict[str, Any]:
    return {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": np.linspace(1, 1.5, pairs).tolist(),
        "long_factor": np.linspace(1, 9, pairs).tolist(),
    }


def experts(number: int, **more: Any) -> dict[str, Any]:
    return {"num_experts_per_tok": 2, "num_local_experts": number, **more}


GRANITE = {"embedding_multiplier": 6.0, "residual_multiplier": 0.22, "logits_scaling": 3.0}
GRANITE |= {"attention_multiplier": 0.2}
QWEN3_MOE = {"num_experts_per_tok": 2, "num_experts": 5, "moe_intermediate_size": 24}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-tied-biased": ("Llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama-no-groups-linear": (
        "Llama",
        {"num_key_value_heads": 6, "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    ),
    "llama3": ("Llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500.0, **LLAMA3}}),
    "llama-yarn": ("Llama", {"rope_parameters": YARN}),
    "llama-yarn-magnitudes": (
        "Llama",
        {
            "rope_parameters": YARN
            | {"mscale": 0.7, "mscale_all_dim": 1.2, "beta_fast": 3, "beta_slow": 0.5, "truncate": False}
        },
    ),
    "llama-dynamic": (
        "Llama",
        {
            "max_position_embeddings": 32,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 8.0},
        },
    ),
    "mistral": ("Mistral", {"sliding_window": 7}),
    "mistral-wide-heads": ("Mistral", {"sliding_window": None, "head_dim": 16}),
    "mixtral": ("Mixtral", experts(4)),
    "mixtral-window": ("Mixtral", experts(3, sliding_window=7, head_dim=16)),
    "qwen2": ("Qwen2", {}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3-window": (
        "Qwen3",
        {"attention_bias": True, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
    ),
    "qwen3-yarn": ("Qwen3", {"head_dim": 16, "rope_parameters": YARN | {"rope_theta": 1e6}}),
    "qwen3-moe": ("Qwen3Moe", QWEN3_MOE | {"norm_topk_prob": True, "head_dim": 16}),
    "qwen3-moe-mixed": (
        "Qwen3Moe",
        QWEN3_MOE | {"norm_topk_prob": False, "mlp_only_layers": [0], "decoder_sparse_step": 2},
    ),
    "qwen3-moe-window": ("Qwen3Moe", QWEN3_MOE | {"use_sliding_window": True, "sliding_window": 5}),
    "phi3": ("Phi3", {"sliding_window": 7}),
    "phi3-partial-tied": (
        "Phi3",
        {
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75},
        },
    ),
    "phi3-longrope": ("Phi3", {"original_max_position_embeddings": 24, "rope_parameters": longrope(4)}),
    "phi4-mini": (
        "Phi3",
        {
            "hidden_size": 96,
            "original_max_position_embeddings": 24,
            "tie_word_embeddings": True,
            "rope_parameters": longrope(6) | {"partial_rotary_factor": 0.75},
        },
    ),
    "gemma": ("Gemma", {"head_dim": 16}),
    "gemma-one-kv-head": ("Gemma", {"head_dim": 16, "num_key_value_heads": 1, "hidden_act": "gelu"}),
    "gemma2": ("Gemma2", {"head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 20}),
    "gemma3": (
        "Gemma3",
        {"head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 20, "sliding_window_pattern": 2},
    ),
    "gemma3-linear": (
        "Gemma3",
        {
            "head_dim": 16,
            "sliding_window": 6,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "final_logit_softcapping": 5.0,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "olmo2": ("Olmo2", {}),
    "olmo2-biased": ("Olmo2", {"attention_bias": True, "tie_word_embeddings": True}),
    "granite": ("Granite", GRANITE),
    "granite-tied-biased": (
        "Granite",
        GRANITE | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    "smollm3": ("SmolLM3", {"no_rope_layer_interval": 2}),
    "smollm3-window-yarn": (
        "SmolLM3",
        {
            "no_rope_layers": [1, 0, 1],
            "use_sliding_window": True,
            "sliding_window": 5,
            "tie_word_embeddings": False,
            "rope_parameters": YARN,
        },
    ),
    "gpt-oss": (
        "GptOss",
        experts(4, sliding_window=6, head_dim=16, rope_parameters=YARN | {"truncate": False, "beta_slow": 1.0}),
    ),
    "gpt-oss-tight-clamp": ("GptOss", experts(3, head_dim=16, swiglu_limit=0.5, attention_bias=False)),
    "gpt-neox": ("GPTNeoX", {}),
    "gpt-neox-serial": (
        "GPTNeoX",
        {
            "use_parallel_residual": False,
            "attention_bias": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0},
        },
    ),
    "gpt2": ("GPT2", {}),
    "gpt2-unscaled": (
        "GPT2",
        {"scale_attn_weights": False, "activation_function": "gelu", "tie_word_embeddings": False},
    ),
}
TEXTS = RNG.integers(3, 97, (2, 48))
PROMPTS = [TEXTS[0, :5].tolist(), TEXTS[1, :33].tolist(), TEXTS[0, 20:37].tolist()]
CONTINUATIONS = [(PROMPTS[0], TEXTS[1, :8].tolist()), (PROMPTS[2], PROMPTS[0]), (PROMPTS[1], TEXTS[0, :15].tolist())]
NEW_TOKENS = 64


class Pair(NamedTuple):
    """A random torch model, and ours as read from what it saves."""

    model: Any
    config: DecoderConfig
    params: Any


class Parity(NamedTuple):
    """How far the two are apart.

    Attributes:
        logits: Largest difference of two logits.
        padded: The same with texts padded on the left.
        log_likelihoods: Largest difference of two log-likelihoods.
        greedy: Whether all greedy texts are equal, token by token, written in one batch.
    """

    logits: float
    padded: float
    log_likelihoods: float
    greedy: bool


def make(name: str, directory: Path) -> Pair:
    """Makes a model, saves it and reads it."""
    import torch
    import transformers

    kind, features = CASES[name]
    torch.manual_seed(0)
    sizes = SIZES | copy.deepcopy(features)  # which transformers completes in place
    if kind == "GPT2":
        sizes = {GPT2_NAMES.get(key, key): value for key, value in sizes.items()}
    if kind in ("GPT2", "GPTNeoX"):
        del sizes["num_key_value_heads"]
    settings = sizes | TOKENS | {"initializer_range": 0.2, "attn_implementation": "eager"}
    config = getattr(transformers, f"{kind}{'Text' * (kind == 'Gemma3')}Config")(**settings)
    model = getattr(transformers, "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim == 1 or "bias" in parameter_name:  # ones and zeros would hide them
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    ours = DecoderConfig.from_directory(directory)
    return Pair(model, ours, load_params(directory, ours))


def from_maxtext(pair: Pair, place: Path) -> Any:
    """Our parameters of the same model, out of what MaxText would store of it, in `place`, where `model` has it."""
    config = json.loads((place / "model/config.json").read_text())
    stored = libraries.maxtext(config, load_file(place / "model/model.safetensors"), True)
    libraries.saved(place / "maxtext/model.safetensors", stored)
    convert(place / "maxtext", place / "back", names="huggingface", config=place / "model", rounded=True)
    return load_params(place / "back", pair.config)


def torch_logits(model: Any, text: list[int], padding: int = 0) -> Any:
    """Logits of a text alone, behind so many tokens of padding."""
    import torch

    for module in model.modules():
        if hasattr(module, "original_inv_freq"):  # dynamic scaling remembers the longest text so far
            module.max_seq_len_cached = module.original_max_seq_len
            module.inv_freq = module.original_inv_freq.clone()
    mask = torch.tensor([[0] * padding + [1] * len(text)])
    places = torch.tensor([[0] * padding + list(range(len(text)))])
    with torch.no_grad():
        logits = model(torch.tensor([[0] * padding + text]), attention_mask=mask, position_ids=places).logits
    return logits[0, padding:].numpy()


def logit_difference(pair: Pair) -> float:
    """Largest difference of logits."""

    @jax.jit
    def logits(params: Any, tokens: Any) -> Any:
        decoder = bind(pair.config, params)
        return decoder.logits(decoder(tokens)[0])

    wanted = np.stack([torch_logits(pair.model, text.tolist()) for text in TEXTS])
    return float(np.max(np.abs(logits(pair.params, TEXTS) - wanted)))


def padded_difference(pair: Pair) -> float:
    """Largest difference of logits with prompts padded on the left to one length."""

    @jax.jit
    def logits(params: Any, tokens: Any, positions: Any) -> Any:
        decoder = bind(pair.config, params)
        return decoder.logits(decoder(tokens, positions)[0])

    longest = max(map(len, PROMPTS))
    tokens, positions = np.zeros((len(PROMPTS), longest), np.int32), np.full((len(PROMPTS), longest), PADDING)
    for row, prompt in enumerate(PROMPTS):
        tokens[row, -len(prompt) :] = prompt
        positions[row, -len(prompt) :] = range(len(prompt))
    found = np.asarray(logits(pair.params, jnp.asarray(tokens), jnp.asarray(positions, jnp.int32)))
    wanted = [torch_logits(pair.model, prompt, longest - len(prompt)) for prompt in PROMPTS]
    return max(float(np.max(np.abs(found[i, -len(PROMPTS[i]) :] - logit))) for i, logit in enumerate(wanted))


def log_likelihood_difference(pair: Pair) -> float:
    """Largest difference of log-likelihoods."""
    import torch

    scores = log_likelihoods(pair.params, pair.config, CONTINUATIONS, batch_size=4)
    worst = 0.0
    for (context, continuation), found in zip(CONTINUATIONS, scores, strict=True):
        logits = torch_logits(pair.model, (context + continuation)[:-1])[len(context) - 1 :]
        log_probs = torch.log_softmax(torch.tensor(logits), -1)[torch.arange(len(continuation)), continuation]
        assert found.is_greedy == (logits.argmax(-1).tolist() == continuation)
        worst = max(worst, abs(found.log_prob - float(log_probs.sum())))
    return worst


def greedy_texts(pair: Pair) -> tuple[list[list[int]], list[list[int]]]:
    """What each of the two writes behind the prompts: ours in one batch, torch's one by one."""
    import torch

    settings = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None}
    found = generate(pair.params, pair.config, PROMPTS, max_new_tokens=NEW_TOKENS, stop_token_ids=(), batch_size=4)
    wanted = []
    for prompt in PROMPTS:
        torch_logits(pair.model, prompt[:1])
        with torch.no_grad():
            text = pair.model.generate(torch.tensor([prompt]), **settings)
        wanted.append(text[0, len(prompt) :].tolist())
    return [list(completion.tokens) for completion in found], wanted


def measure(pair: Pair) -> Parity:
    """Everything at once."""
    ours, theirs = greedy_texts(pair)
    differences = (f(pair) for f in (logit_difference, padded_difference, log_likelihood_difference))
    return Parity(*differences, ours == theirs)
