"""Models of JAX libraries as those of Hugging Face and back, against plain numpy."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from support import libraries as oracle
from support.checkpoint_suite import read

from m3jax.anatomy.libraries import HUGGINGFACE, BlockLayout, WantedLayout, seen_as
from m3jax.checkpoints import Checkpoint, TensorInfo, open_checkpoint, views_permuted
from m3jax.errors import M3Error

LLAMA3 = {"rope_type": "llama3", "factor": 8.0}
Case = tuple[dict[str, Any], WantedLayout, oracle.Making]


def cases() -> Iterator[Case]:
    """Every library and architecture."""
    scanned, apart = BlockLayout(True), BlockLayout(False)
    for kind in ("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma2", "gemma3_text"):
        for layout in (scanned, apart):
            yield (
                oracle.configuration(kind),
                WantedLayout("maxtext", layout),
                partial(oracle.maxtext, scanned=layout.scanned),
            )
    for kind in ("deepseek_v2", "deepseek_v3"):
        for layout in (scanned, apart):
            yield (
                oracle.configuration(kind),
                WantedLayout("maxtext", layout),
                partial(oracle.maxtext, scanned=layout.scanned),
            )
    yield (
        oracle.configuration("llama", rope_scaling=LLAMA3, tie_word_embeddings=True),
        WantedLayout("maxtext", BlockLayout(True, 0)),
        partial(oracle.maxtext, scanned=True, axis=0),
    )
    for kind in ("gemma2", "gemma3_text"):
        yield oracle.configuration(kind), WantedLayout("gemma"), oracle.gemma
        yield oracle.configuration(kind, num_key_value_heads=oracle.HEADS), WantedLayout("gemma"), oracle.gemma
        yield oracle.configuration(kind), WantedLayout("tunix"), oracle.tunix
    for kind in ("llama", "qwen2", "qwen3"):
        yield oracle.configuration(kind), WantedLayout("tunix"), oracle.tunix
    yield oracle.configuration("qwen3"), WantedLayout("bonsai"), oracle.bonsai


def told_of(wanted: WantedLayout) -> dict[str, str]:
    """What a trainer writes beside it."""
    return {"scan_layers": str(wanted.layout.scanned), "param_scan_axis": str(wanted.layout.axis)}


def arrays_of(checkpoint: Checkpoint) -> oracle.Arrays:
    return {name: read(checkpoint, name) for name in checkpoint.tensors}


def assert_equal(found: oracle.Arrays, wanted: oracle.Arrays, what: object) -> None:
    assert found.keys() == wanted.keys(), what
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype, (what, name)
        assert np.array_equal(found[name], array), (what, name)


def test_every_library_is_hugging_face_moved(tmp_path: Path) -> None:
    for number, (config, wanted, making) in enumerate(cases()):
        theirs = oracle.huggingface(config, number)
        own = making(config, theirs)
        what = config["model_type"], wanted
        with open_checkpoint(oracle.saved(tmp_path / f"{number}a.safetensors", theirs)) as stored:
            seen = seen_as(stored, wanted, config, {}, "it")
            assert_equal(arrays_of(seen.checkpoint), own, what)
            again = seen_as(seen.checkpoint, WantedLayout(HUGGINGFACE), config, told_of(wanted), "it")
            assert_equal(arrays_of(again.checkpoint), theirs, what)
        with open_checkpoint(oracle.saved(tmp_path / f"{number}b.safetensors", own)) as stored:
            seen = seen_as(stored, WantedLayout(HUGGINGFACE), config, told_of(wanted), "it")
            assert_equal(arrays_of(seen.checkpoint), theirs, what)
            assert seen_as(stored, wanted, None, told_of(wanted), "it").checkpoint is stored


def test_from_one_library_to_another(tmp_path: Path) -> None:
    config = oracle.configuration("gemma3_text")
    theirs = oracle.huggingface(config, dtype=ml_dtypes.bfloat16)
    with open_checkpoint(
        oracle.saved(tmp_path / "a.safetensors", oracle.gemma(config, theirs, turned=False))
    ) as stored:
        seen = seen_as(stored, WantedLayout("tunix"), config, {}, "it")
        assert_equal(arrays_of(seen.checkpoint), oracle.tunix(config, theirs), "tunix")


def test_what_is_read_in_pieces_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(views_permuted, "_SLAB", 56)
    config = oracle.configuration("mixtral")
    theirs = oracle.huggingface(config)
    own = oracle.maxtext(config, theirs, True)
    with open_checkpoint(oracle.saved(tmp_path / "a.safetensors", theirs)) as stored:
        view = seen_as(stored, WantedLayout("maxtext", BlockLayout(True)), config, {}, "it").checkpoint
        for name in ("decoder.layers.MoeBlock_0.wi_1", "decoder.layers.self_attention.query.kernel"):
            whole = own[f"params.params.{name}"].tobytes()
            for start, count in ((0, 56), (1, 300), (len(whole) - 61, 61), (55, 2)):
                room = np.empty(count, np.uint8)
                view.read_into(f"params.params.{name}", start, room)
                assert room.tobytes() == whole[start : start + count], (name, start)


def test_entries_that_would_be_rounded(tmp_path: Path) -> None:
    config = oracle.configuration("gemma2")
    theirs = oracle.huggingface(config)
    theirs["model.norm.weight"] = np.full(oracle.WIDTH, 2.0**-30, np.float32)
    with open_checkpoint(oracle.saved(tmp_path / "a.safetensors", theirs)) as stored:
        wanted, name = WantedLayout("maxtext", BlockLayout(True)), "params.params.decoder.decoder_norm.scale"
        view = seen_as(stored, wanted, config, {}, "it").checkpoint
        with pytest.raises(
            M3Error, match=r"as params.*decoder_norm.scale, model.norm.weight adds 1, by which .*--rounded"
        ):
            read(view, name)
        view = seen_as(stored, wanted, config, {}, "it", rounded=True).checkpoint
        assert np.array_equal(read(view, name), theirs["model.norm.weight"] + np.float32(1))
    # a head of 3 is no power of two, which is known before anything is read
    arrays = {"model.layers.0.self_attn.q_proj.weight": np.zeros((6, 16), np.float32)}
    config = oracle.configuration("llama", head_dim=3, num_attention_heads=2, num_key_value_heads=2)
    theirs = oracle.huggingface(config) | arrays
    theirs = {
        n: x[:6] if n.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")) else x for n, x in theirs.items()
    }
    theirs = {n: x[:, :6] if n.endswith("o_proj.weight") else x for n, x in theirs.items()}
    with open_checkpoint(oracle.saved(tmp_path / "b.safetensors", theirs)) as stored:
        with pytest.raises(M3Error, match=r"q_proj.weight multiplies by 0.577350\d*, by which entries are rounded"):
            seen_as(stored, wanted, config, {}, "it")
        view = seen_as(stored, wanted, config, {}, "it", rounded=True).checkpoint
        query = read(view, "params.params.decoder.layers.self_attention.query.kernel")[:, 1]
        scaled = theirs["model.layers.1.self_attn.q_proj.weight"].T.reshape(16, 2, 3) * np.float32(1 / np.sqrt(3))
        assert np.array_equal(query, scaled)


FAULTS: list[tuple[str, dict[str, Any], dict[str, str], dict[str, Any], str]] = [
    (
        "maxtext",
        {},
        {"scan_layers": "false"},
        {},
        r"metadata says scan_layers false, but by their names its blocks are sta",
    ),
    (
        "maxtext",
        {},
        {"param_scan_axis": "0"},
        {},
        r"query.kernel is \[16, 2, 6, 4\], of which axis 0, 16, is to be 2 \(layer\)",
    ),
    ("maxtext", {"num_hidden_layers": 3}, {}, {}, r"of which axis 1, 2, is to be 3 \(layer\)"),
    (
        "maxtext",
        {"model_type": "bloom"},
        {},
        {},
        r"model_type is 'bloom' .* in maxtext is not known here: known are llama, ",
    ),
    (
        "maxtext",
        {"num_key_value_heads": 4},
        {},
        {},
        r"num_attention_heads, 6, is not divided by num_key_value_heads, 4",
    ),
    (
        "maxtext",
        {"num_attention_heads": 4},
        {},
        {},
        r"query.kernel is \[16, 2, 6, 4\], of which axis 2, 6, is to be 4 \(heads\)",
    ),
    ("maxtext", {"vocab_size": None}, {}, {}, r"its config.json does not say vocab_size: give the whole"),
    (
        "maxtext",
        {},
        {},
        {f"params.params.decoder.layers.more_{i}.kernel": (2, 2) for i in range(7)},
        r"left over .*more_4.kernel and 2 more",
    ),
    (
        HUGGINGFACE,
        {},
        {},
        {"model.layers.0.self_attn.sinks": (2,)},
        r"not laid out as llama is in maxtext: it has left over .*sinks",
    ),
    (
        HUGGINGFACE,
        {"num_hidden_layers": 3},
        {},
        {},
        r"it lacks model.layers.2.input_layernorm.weight, .* and 4 more: give",
    ),
    (
        HUGGINGFACE,
        {"head_dim": 5},
        {},
        {},
        r"q_proj.weight is \[24, 16\], of which axis 0, 24, is to be 6 \(heads\) x 5 \(dim\)",
    ),
    (
        HUGGINGFACE,
        {"hidden_size": 15, "head_dim": None},
        {},
        {},
        r"hidden_size, 15, is not divided by num_attention_heads, 6",
    ),
    (HUGGINGFACE, {"model_type": "deepseek_v3", "first_k_dense_replace": "1"}, {}, {}, r"first_k_dense_replace '1'"),
    ("maxtext", {"num_hidden_layers": 10**12}, {}, {}, r"num_hidden_layers is 1e\+12 .* more than any model has"),
]


def test_layouts_of_one_library_round_nothing(tmp_path: Path) -> None:
    config = oracle.configuration("gemma2", hidden_size=oracle.WIDTH)
    own = oracle.maxtext(config, oracle.huggingface(config, dtype=ml_dtypes.bfloat16), True)
    # no norm of these comes back when 1 is taken off and added again
    own = {
        name: (x * 0 + ml_dtypes.bfloat16(1e-20)).astype(x.dtype) if "norm" in name else x for name, x in own.items()
    }
    with open_checkpoint(oracle.saved(tmp_path / "a.safetensors", own)) as stored:
        apart = seen_as(stored, WantedLayout("maxtext", BlockLayout(False)), config, {}, "it").checkpoint
        norm = read(apart, "params.params.decoder.layers_1.pre_ffw_norm_local.scale")
        assert np.array_equal(norm, own["params.params.decoder.layers.pre_ffw_norm_local.scale"][:, 1])


def test_gates_that_may_lie_either_way_are_refused(tmp_path: Path) -> None:
    config = oracle.configuration("gemma2", intermediate_size=oracle.WIDTH)
    theirs = oracle.huggingface(config)
    square = {n: x[: oracle.WIDTH, : oracle.WIDTH] for n, x in theirs.items() if ".mlp." in n}
    shape = (2, oracle.WIDTH, oracle.WIDTH)
    like = {"layers.0.mlp.gating_einsum": TensorInfo("layer_0.mlp.gating_einsum", shape, "F32")}
    with (
        open_checkpoint(oracle.saved(tmp_path / "a.safetensors", theirs | square)) as stored,
        pytest.raises(M3Error, match=r"layers.0.mlp.gating_einsum is \[2, 16, 16\], of which it is not told whether"),
    ):
        seen_as(stored, WantedLayout("gemma", like=like), config, {}, "it")


def test_what_does_not_fit_is_said(tmp_path: Path) -> None:
    plain = oracle.configuration("llama")
    theirs = oracle.huggingface(plain)
    own = oracle.maxtext(plain, theirs, True)
    for number, (stored_as, changed, metadata, more, said) in enumerate(FAULTS):
        arrays = {
            **(own if stored_as == "maxtext" else theirs),
            **{n: np.zeros(s, np.float32) for n, s in more.items()},
        }
        wanted = WantedLayout(HUGGINGFACE) if stored_as == "maxtext" else WantedLayout("maxtext", BlockLayout(True))
        file = oracle.saved(tmp_path / f"{number}.safetensors", arrays)
        with open_checkpoint(file) as stored, pytest.raises(M3Error, match=said):
            seen_as(stored, wanted, {**plain, **changed}, metadata, "it")
    strange = oracle.saved(tmp_path / "strange.safetensors", {"w": np.zeros(3, np.float32)})
    said = r"no library whose layout is known here \(huggingface, maxtext, .*\), as w: keep"
    with open_checkpoint(strange) as stored, pytest.raises(M3Error, match=said):
        seen_as(stored, WantedLayout(HUGGINGFACE), plain, {}, "it")
    said = r"there is no config.json beside it, which says model_type"
    with open_checkpoint(tmp_path / "0.safetensors") as stored, pytest.raises(M3Error, match=said):
        seen_as(stored, WantedLayout(HUGGINGFACE), None, {}, "it")


def test_other_spellings_of_a_library(tmp_path: Path) -> None:
    """Gemma's flat files, and MaxText's as NNX saves them."""
    config = oracle.configuration("gemma2")
    theirs = oracle.huggingface(config)
    flat = {f"transformer/{name.replace('.', '/')}": x for name, x in oracle.gemma(config, theirs).items()}
    ends = {"/scale": ".scale", "/w": ".w", "/input_embedding": ".input_embedding"}
    ends |= {"/gating_einsum": "/gating_einsum.w", "/linear": "/linear.w"}
    for end, stored in ends.items():
        flat = {name.removesuffix(end) + stored if name.endswith(end) else name: x for name, x in flat.items()}
    llama = oracle.configuration("llama")
    arrays = oracle.huggingface(llama)
    stored = oracle.maxtext(llama, arrays, False)
    listed = {f"{n.removeprefix('params.params.').replace('layers_', 'layers.')}.value": x for n, x in stored.items()}
    for number, (own, wanted, form) in enumerate(((flat, theirs, config), (listed, arrays, llama))):
        with open_checkpoint(oracle.saved(tmp_path / f"{number}.safetensors", own)) as checkpoint:
            seen = seen_as(checkpoint, WantedLayout(HUGGINGFACE), form, {}, "it").checkpoint
            assert_equal(arrays_of(seen), wanted, number)
