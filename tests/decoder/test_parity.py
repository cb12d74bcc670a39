"""The decoder and torch transformers, side by side on random models of every architecture."""

import jax
import numpy as np
import pytest
from support.decoders import LLAMA3

from m3jax.decoder import DecoderConfig, bind, generate, load_params, log_likelihoods

pytestmark = [
    pytest.mark.torch,
    pytest.mark.filterwarnings("default"),  # torch and transformers warn of themselves
]
torch = pytest.importorskip("torch", reason="needs torch")
transformers = pytest.importorskip("transformers", reason="needs transformers")

SIZES = {"vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3}
SIZES |= {"num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 256}
CASES = {
    "llama": ("Llama", {}),
    "llama-tied-biased": ("Llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama-no-groups-linear": (
        "Llama",
        {"num_key_value_heads": 6, "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    ),
    "llama3": ("Llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500.0, **LLAMA3}}),
    "mistral": ("Mistral", {"sliding_window": 7}),
    "mistral-wide-heads": ("Mistral", {"sliding_window": None, "head_dim": 16}),
    "qwen2": ("Qwen2", {}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3-window": (
        "Qwen3",
        {"attention_bias": True, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
    ),
    "gemma2": ("Gemma2", {"head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 20}),
}
RNG = np.random.default_rng(0)
TEXTS = RNG.integers(3, 97, (2, 48))
PROMPTS = [TEXTS[0, :5].tolist(), TEXTS[1, :33].tolist(), TEXTS[0, 20:37].tolist()]


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
    """A random torch model, and ours as read from what it saves."""
    kind, features = CASES[request.param]
    torch.manual_seed(0)
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    settings = SIZES | features | tokens | {"initializer_range": 0.2, "attn_implementation": "eager"}
    config = getattr(transformers, f"{kind}Config")(**settings)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms begin as ones and biases as zeros, which would hide them
                parameter.add_(0.1 * torch.randn_like(parameter))
    directory = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(directory)
    ours = DecoderConfig.from_directory(directory)
    return model, ours, load_params(directory, ours)


def test_logits_are_equal(pair):
    model, config, params = pair

    @jax.jit
    def logits(params, tokens):
        decoder = bind(config, params)
        return decoder.logits(decoder(tokens)[0])

    with torch.no_grad():
        want = model(torch.tensor(TEXTS)).logits.numpy()
    np.testing.assert_allclose(logits(params, TEXTS), want, atol=1e-4, rtol=0)


def test_greedy_texts_are_identical(pair):
    model, config, params = pair
    found = generate(params, config, PROMPTS, max_new_tokens=64, stop_token_ids=(), batch_size=4)
    for prompt, completion in zip(PROMPTS, found, strict=True):
        with torch.no_grad():
            text = model.generate(
                torch.tensor([prompt]), max_new_tokens=64, min_new_tokens=64, do_sample=False, eos_token_id=None
            )
        assert list(completion.tokens) == text[0, len(prompt) :].tolist()


def test_log_likelihoods_are_equal(pair):
    model, config, params = pair
    pairs = [(prompt[:-2], prompt[-2:]) for prompt in PROMPTS]
    for (context, continuation), found in zip(pairs, log_likelihoods(params, config, pairs), strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([context + continuation])).logits[0, len(context) - 1 : -1]
        log_probs = torch.log_softmax(logits, -1)[torch.arange(len(continuation)), torch.tensor(continuation)]
        assert found.log_prob == pytest.approx(float(log_probs.sum()), abs=1e-4)
        assert found.is_greedy == (logits.argmax(-1).tolist() == continuation)
