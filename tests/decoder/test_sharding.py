import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec
from safetensors.numpy import save_file
from support.decoders import CONFIGS, weights

from m3jax import M3Error
from m3jax.decoder import DecoderConfig, bind, generate, load_params, params_from_tree
from m3jax.decoder.params import mesh_of

pytestmark = pytest.mark.slow

SHAPES = {"fsdp-tp": (4, 2), "tp-more-than-heads": (1, 8), "fsdp": (8, 1)}
LARGE = 32 * 32  # entries of a matrix
TOKENS = np.random.default_rng(0).integers(3, 64, (4, 12))
PROMPTS = [row[:n].tolist() for row, n in zip(TOKENS, (3, 12, 7, 9), strict=True)]


@pytest.fixture
def devices():
    assert jax.device_count() >= 8
    return np.array(jax.devices()[:8])


@pytest.mark.parametrize("shape", SHAPES)
def test_a_mesh_gives_what_one_device_gives(devices, shape, tmp_path):
    name = "gemma2" if shape == "fsdp-tp" else "qwen2"
    entries = CONFIGS[name] | {"num_hidden_layers": 1}
    config = DecoderConfig.from_dict(entries)
    save_file(weights(entries), tmp_path / "model.safetensors")
    mesh = Mesh(devices.reshape(SHAPES[shape]), ("fsdp", "tp"))
    alone, spread = load_params(tmp_path, config), load_params(tmp_path, config, mesh=mesh)
    jax.tree.map(np.testing.assert_array_equal, alone, spread)

    def logits(params, tokens, mesh):
        decoder = bind(config, params)
        return decoder.logits(decoder(tokens, mesh=mesh)[0])

    run = jax.jit(logits, static_argnums=2)
    np.testing.assert_allclose(run(spread, TOKENS, mesh_of(spread)), run(alone, TOKENS, None), atol=1e-5)
    if shape == "fsdp-tp":
        settings = {"max_new_tokens": 20, "batch_size": 4, "temperature": 1.0, "key": jax.random.key(0)}
        assert generate(spread, config, PROMPTS, **settings) == generate(alone, config, PROMPTS, **settings)


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss", "gpt2", "phi3", "olmo2"])
def test_other_families_run_on_a_mesh_too(devices, name, tmp_path):
    entries = CONFIGS[name]
    config = DecoderConfig.from_dict(entries)
    save_file(weights(entries), tmp_path / "model.safetensors")
    alone = load_params(tmp_path, config)
    spread = load_params(tmp_path, config, mesh=Mesh(devices[:4].reshape(2, 2), ("fsdp", "tp")))
    jax.tree.map(np.testing.assert_array_equal, alone, spread)
    settings = {"max_new_tokens": 12, "batch_size": 4, "stop_token_ids": ()}
    assert generate(spread, config, PROMPTS, **settings) == generate(alone, config, PROMPTS, **settings)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_large_weight_is_cut_over_both_axes(devices, name):
    config = DecoderConfig.from_dict(CONFIGS[name])
    mesh = Mesh(devices[:4].reshape(2, 2), ("fsdp", "tp"))
    params = params_from_tree(weights(CONFIGS[name]), config, mesh=mesh)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        part = leaf.addressable_shards[0].data
        pieces = leaf.size // part.size
        positions = path[0].key == "positions"  # read by all, and cut once
        assert pieces == (2 if positions else 4) if leaf.size >= LARGE // 2 else pieces in (1, 2), path


def test_explicit_axes_are_taken_as_automatic(devices):
    config = DecoderConfig.from_dict(CONFIGS["llama"])
    mesh = Mesh(devices.reshape(4, 2), ("fsdp", "tp"), axis_types=(AxisType.Explicit,) * 2)
    flat = weights(CONFIGS["llama"])
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    lying = params_from_tree({name: jax.device_put(leaf, rows) for name, leaf in flat.items()}, config)
    cut = params_from_tree(flat, config, mesh=mesh)
    for params in (lying, cut):
        jax.tree.map(np.testing.assert_array_equal, params, params_from_tree(flat, config))
        assert set(mesh_of(params).axis_types) == {AxisType.Auto}


def test_a_mesh_of_other_axes_is_an_error(devices):
    config = DecoderConfig.from_dict(CONFIGS["llama"])
    with pytest.raises(M3Error, match="axes data, model: name them 'fsdp', 'tp' or both"):
        params_from_tree(weights(CONFIGS["llama"]), config, mesh=Mesh(devices.reshape(4, 2), ("data", "model")))


def test_half_of_the_mesh_axes_will_do(devices):
    config = DecoderConfig.from_dict(CONFIGS["llama"])
    params = params_from_tree(weights(CONFIGS["llama"]), config, mesh=Mesh(devices[:2], ("tp",)))
    assert params["head"]["weight"].sharding.spec == PartitionSpec("tp", None)
