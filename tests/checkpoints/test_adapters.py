"""A model with an adapter of PEFT: which tensors become what, and every sentence for what does not fit."""

import json
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from support import oracle
from support.adapters import PREFIX, factors, write_adapter
from support.directories import write

from m3jax.checkpoints import digest_tensor, locate_model, views_adapted
from m3jax.checkpoints.adapters import check_no_adapter, open_model, open_stored
from m3jax.checkpoints.locate import split_adapter
from m3jax.checkpoints.views import stored_at, stored_digests
from m3jax.errors import M3Error

BF16 = ml_dtypes.bfloat16
ATTENTION, MLP = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"
SHAPES = {ATTENTION: (12, 12), MLP: (700, 1500)}
MANY = {  # blocks of 2¹⁹ entries, a rest, and what is left alone
    f"{ATTENTION}.weight": (12, 12),
    f"{ATTENTION}.bias": (12,),
    f"{MLP}.weight": (700, 1500),
    "model.embed_tokens.weight": (9, 12),
    "model.norm.weight": (12,),
    "lm_head.weight": (9, 12),
    "score.kernel": (4, 6, 3, 3),
}


def numbers(shapes=MANY, dtype=BF16):
    rng = np.random.default_rng(7)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "base", numbers(), {"model_type": "llama", "tie_word_embeddings": False})
    return tmp_path


def whole(view, name):
    info = view.tensors[name]
    out = np.empty(info.shape, {"BF16": BF16, "F32": np.float32, "F16": np.float16}[info.dtype])
    view.read_into(name, 0, out.reshape(-1).view(np.uint8))
    return out


def adapted(base, tensors, module, scale, turned=False):
    a, b = (tensors[f"{PREFIX}{module}.lora_{which}.weight"] for which in "AB")
    left, right = (a.T, b.T) if turned else (b, a)
    return oracle.adapted(base[f"{module}.weight"], left, right, scale)


def test_entries_are_the_oracles_whatever_is_read(place):
    base, tensors = numbers(), factors(SHAPES, 2, 0)
    write_adapter(place / "lora", tensors)
    with open_model(locate_model("base+lora")) as view:
        assert (view.tensors.keys(), view.location) == (base.keys(), "base+lora")
        for name, value in base.items():
            module = name.removesuffix(".weight")
            want = adapted(base, tensors, module, 2.0) if module in SHAPES and name.endswith("weight") else value
            assert whole(view, name).tobytes() == want.tobytes(), name
        want = adapted(base, tensors, MLP, 2.0).tobytes()
        for start, count in ((0, 5), (2 * 523_500 - 7, 31), (len(want) - 3001, 3001), (1_000_001, 300_003)):
            piece = np.empty(count, np.uint8)
            view.read_into(f"{MLP}.weight", start, piece)
            assert piece.tobytes() == want[start : start + count]


def test_threads_that_read_by_turns_make_nothing_twice(place, monkeypatch):
    shapes = {f"model.layers.{i}.mlp.up_proj": (6, 4) for i in range(4)}
    base, tensors = numbers({f"{module}.weight": shape for module, shape in shapes.items()}), factors(shapes, 2, 0)
    write(place / "four", base, {"model_type": "llama", "tie_word_embeddings": False})
    write_adapter(place / "lora", tensors)
    made, turn = [], Barrier(4)
    for function in ("_made", "_matrix"):
        plain = getattr(views_adapted._Adapted, function)
        spy = lambda self, *of, plain=plain: (made.append(of), plain(self, *of))[1]  # noqa: E731
        monkeypatch.setattr(views_adapted._Adapted, function, spy)
    with open_model(locate_model("four+lora")) as view, ThreadPoolExecutor(4) as pool:

        def by_turns(name):
            out = np.empty(48, np.uint8)
            for start in range(0, 48, 12):
                turn.wait(30)
                view.read_into(name, start, out[start : start + 12])
            return out.tobytes()

        found = list(pool.map(by_turns, base))
    assert found == [adapted(base, tensors, module, 2.0).tobytes() for module in shapes]
    assert len(made) == len(set(made)) == 12


def test_digests_are_of_what_is_stored(place):
    write_adapter(place / "lora", factors(SHAPES, 2, 0))
    place_found = locate_model("base+lora")
    stored, adapting = open_stored(place_found)
    name = f"{MLP}.weight"
    with stored, open_model(place_found) as view:
        whole(view, name)  # in order: hashed on the way
        own = [name, *(f"{PREFIX}{MLP}.lora_{which}.weight" for which in "BA")]
        assert stored_digests(view, name, "") == {each: digest_tensor(stored, each) for each in own}
        assert stored_at(view, name) == ("base+lora", name)
        assert stored_digests(view, "model.norm.weight", "told") == {"model.norm.weight": "told"}
        files = view.fingerprint()
        assert set(files) == {"model.safetensors", "adapter/adapter_model.safetensors", "adapter/adapter_config.json"}
        assert files["adapter/adapter_config.json"]["header_blake3"] == adapting.config_digest


def test_all_that_a_configuration_says_of_scales(place):
    tensors = factors({ATTENTION: (12, 12)}, 4, 0) | factors({MLP: (700, 1500)}, 2, 1)
    patterns = {"rank_pattern": {"self_attn.q_proj": 4}, "alpha_pattern": {r"layers\.\d\.mlp\.up_proj": 10}}
    write_adapter(place / "plain", tensors, **patterns)
    write_adapter(place / "rs", tensors, **patterns, use_rslora=True)
    base = numbers()
    for name, scales in (("plain", (4 / 4, 10 / 2)), ("rs", (4 / 2, 10 / 2**0.5))):
        with open_model(locate_model(f"base+{name}")) as view:
            for module, scale in zip((ATTENTION, MLP), scales, strict=True):
                want = adapted(base, tensors, module, scale)
                assert whole(view, f"{module}.weight").tobytes() == want.tobytes()


def test_everything_else_that_an_adapter_may_hold(place):
    """Embeddings, convolutions, weights as [in, out], biases, whole modules, and a base without the outer module."""
    rng = np.random.default_rng(3)
    drawn = {
        "model.embed_tokens.lora_embedding_A": rng.standard_normal((2, 9)),
        "model.embed_tokens.lora_embedding_B": rng.standard_normal((12, 2)),
        f"{ATTENTION}.lora_A.weight": rng.standard_normal((2, 12)),
        f"{ATTENTION}.lora_B.weight": rng.standard_normal((12, 2)),
        f"{ATTENTION}.lora_B.bias": rng.standard_normal(12),
        f"{MLP}.lora_A.weight": rng.standard_normal((2, 700)),
        f"{MLP}.lora_B.weight": rng.standard_normal((1500, 2)),
        "conv.lora_A.weight": rng.standard_normal((2, 6, 3, 3)),
        "conv.lora_B.weight": rng.standard_normal((4, 2, 1, 1)),
        "lm_head.modules_to_save.weight": rng.standard_normal((9, 12)),
        "model.norm.weight": rng.standard_normal(12),
    }
    drawn = {name: value.astype(np.float32) for name, value in drawn.items()}
    drawn["model.norm.weight"] = drawn["model.norm.weight"].astype(BF16)
    base = numbers()
    base["conv.weight"] = base.pop("score.kernel")
    write(place / "inner", {name.removeprefix("model."): value for name, value in base.items() if "lm_" not in name})
    config = {"fan_in_fan_out": True, "lora_bias": True, "modules_to_save": ["norm", "lm_head"], "bias": "lora_only"}
    write(place / "whole", base, {"tie_word_embeddings": False})
    write_adapter(place / "lora", {PREFIX + name: value for name, value in drawn.items()}, **config)
    want = {
        "model.embed_tokens.weight": oracle.adapted(
            base["model.embed_tokens.weight"], *(drawn[f"model.embed_tokens.lora_embedding_{w}"].T for w in "AB"), 2
        ),
        f"{ATTENTION}.weight": adapted(base, {PREFIX + n: v for n, v in drawn.items()}, ATTENTION, 2, turned=True),
        f"{ATTENTION}.bias": oracle.adapted(
            base[f"{ATTENTION}.bias"][None], np.ones((1, 1), np.float32), drawn[f"{ATTENTION}.lora_B.bias"][None], 2
        )[0],
        f"{MLP}.weight": adapted(base, {PREFIX + n: v for n, v in drawn.items()}, MLP, 2, turned=True),
        "conv.weight": oracle.adapted(
            base["conv.weight"].reshape(4, 54),
            drawn["conv.lora_B.weight"].reshape(4, 2),
            drawn["conv.lora_A.weight"].reshape(2, 54),
            2,
        ).reshape(4, 6, 3, 3),
        "lm_head.weight": drawn["lm_head.modules_to_save.weight"].astype(BF16),
        "model.norm.weight": drawn["model.norm.weight"],
    }
    with open_model(locate_model("whole+lora")) as view:
        for name, value in want.items():
            assert whole(view, name).tobytes() == value.tobytes(), name
        assert stored_at(view, "model.norm.weight").name == f"{PREFIX}model.norm.weight"
    inside = {PREFIX + n: v for n, v in drawn.items() if n.startswith((ATTENTION, MLP))}
    write_adapter(place / "part", inside, **config | {"modules_to_save": None})
    with open_model(locate_model("inner+part")) as view:
        name = f"{MLP}.weight"
        assert whole(view, name.removeprefix("model.")).tobytes() == want[name].tobytes()


WRONG = [  # tensors, configuration, and what the sentence says
    (factors(SHAPES, 2, 0), {"peft_type": "LOHA"}, "is of LOHA, and only LoRA"),
    (factors(SHAPES, 2, 0), {"use_dora": True}, "is LoRA DoRA"),
    (factors(SHAPES, 2, 0), {"target_parameters": ["experts.w"]}, "LoRA of parameters"),
    (factors(SHAPES, 2, 0), {"something_new": 1}, r"not known here \(something_new\)"),
    (factors(SHAPES, 2, 0), {"init_lora_weights": "pissa_niter_4"}, "changes the base too"),
    (factors(SHAPES, 3, 0), {}, "says rank 2 of model.layers.0.*, whose factors have rank 3"),
    (factors(SHAPES, 2, 0), {"lora_alpha": "8"}, "for a number"),
    (factors(SHAPES, 2, 0), {"rank_pattern": {"(": 2}}, "no regular expression"),
    (factors({ATTENTION: (12, 12)}, 0, 0), {"r": 0}, "has rank 0"),
    (factors({ATTENTION: (12, 13)}, 2, 0), {}, r"of shape \[2, 13\] does not fit .*q_proj.weight of shape \[12, 12\]"),
    (factors({"model.layers.9.mlp.up_proj": (12, 12)}, 2, 0), {}, "of another base than base, which has no tensor"),
    ({k: v for k, v in factors(SHAPES, 2, 0).items() if "lora_B" not in k}, {}, "has lora_A of .* but no lora_B"),
    ({k: v.astype(np.int32) for k, v in factors(SHAPES, 2, 0).items()}, {}, "is I32, no float32"),
    ({k.removeprefix(PREFIX): v for k, v in factors(SHAPES, 2, 0).items()}, {}, "does not begin with base_model.model"),
    ({f"{PREFIX}{ATTENTION}.lora_magnitude_vector": np.ones(12, np.float32)}, {}, "kind of LoRA that is not known"),
    ({f"{PREFIX}model.embed_tokens.weight": np.ones((10, 12), np.float32)}, {}, r"\[10, 12\] does not fit"),
    ({}, {}, "holds no factors"),
    (factors({ATTENTION: (12, 12), MLP: (1500, 700)}, 2, 0), {}, "how model.layers.0.self_attn.q_proj.weight lies"),
]


@pytest.mark.parametrize(("tensors", "config", "said"), WRONG)
def test_what_cannot_be_added_is_refused_in_a_sentence(place, tensors, config, said):
    write_adapter(place / "lora", tensors, **config)
    with pytest.raises(M3Error, match=said) as caught:
        open_model(locate_model("base+lora"))
    assert "\n" not in str(caught.value)


Q, K, V, DENSE = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj")
EXPERT = "mlp.experts.0.down_proj"
TARGETS = ["q_proj", "v_proj", "down_proj"]


def inside(parts, *layers):
    return [f"model.layers.{layer}.{part}" for layer in layers for part in parts]


ALL = inside((Q, V, DENSE), 0, 1)
BELONGING = [  # modules with factors, configuration, and what is said; None where PEFT loads it whole
    (ALL, {"target_modules": TARGETS}, None),
    (ALL, {}, None),
    (inside((Q,), 1), {}, None),
    (ALL, {"target_modules": [*TARGETS, "c_attn"]}, None),
    (ALL, {"target_modules": ["self_attn.q_proj", "model.layers.0.self_attn.v_proj", V[-6:], DENSE]}, None),
    (ALL, {"target_modules": r".*\.(q|v|down)_proj", "exclude_modules": ".*experts.*"}, None),
    (ALL, {"target_modules": "all-linear"}, None),
    ([*ALL, *inside((EXPERT,), 0, 1)], {"target_modules": TARGETS}, None),
    (inside((Q,), 0), {"target_modules": ["q_proj"], "layers_to_transform": 0}, None),
    (inside((Q,), 1), {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}, None),
    (inside((Q,), 1), {"target_modules": ["q_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]}, None),
    (inside((Q, V), 0, 1), {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["score"]}, None),
    (["model.embed_tokens", "lm_head"], {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}, None),
    (inside((Q, V, DENSE), 0), {"target_modules": TARGETS}, r"no factors of .*layers.1.mlp.down_proj \(and 2 more\)"),
    (
        inside((Q, V, DENSE), 0),
        {"target_modules": "all-linear"},
        r"no factors of .*layers.1.mlp.down_proj \(and 2 more\)",
    ),
    (inside((Q, DENSE), 0, 1), {"target_modules": TARGETS}, r"no factors of .*0.self_attn.v_proj \(and 1 more\)"),
    (inside((Q,), 0, 1), {"target_modules": r".*\.(q|v)_proj"}, r"no factors of .*0.self_attn.v_proj \(and 1 more\)"),
    (
        [*ALL, *inside((EXPERT,), 0)],
        {"target_modules": TARGETS},
        "no factors of model.layers.1.mlp.experts.0.down_proj",
    ),
    (ALL, {"target_modules": TARGETS, "modules_to_save": ["lm_head"]}, "no lm_head.weight, which modules_to_save in"),
    (
        ALL,
        {"target_modules": TARGETS, "layers_to_transform": [0]},
        r"1.mlp.down_proj \(and 2 more\), which layers_to_transform",
    ),
    (
        ALL,
        {"layers_to_transform": [1]},
        r"changes model.layers.0.mlp.down_proj \(and 2 more\), which layers_to_transform",
    ),
    (ALL, {"target_modules": ["q_proj"]}, r"changes model.layers.0.mlp.down_proj \(and 3 more\), which target_modules"),
    (ALL, {"target_modules": "q_proj"}, r"changes model.layers.0.mlp.down_proj \(and 5 more\), which target_modules"),
    (ALL, {"target_modules": TARGETS, "exclude_modules": ["v_proj"]}, r"v_proj \(and 1 more\), which exclude_modules"),
    (ALL, {"target_modules": TARGETS, "modules_to_save": ["mlp"]}, r"down_proj \(and 1 more\), which modules_to_save"),
    (ALL, {"target_modules": 3}, "target_modules is 3, no list of names"),
    (ALL, {"target_modules": "("}, "target_modules holds what is no regular expression"),
    (ALL, {"target_modules": TARGETS, "layers_to_transform": ["0"]}, "layers_to_transform is .*no numbers of layers"),
]


def test_what_a_configuration_names_is_what_an_adapter_has(place):
    """As PEFT matches names, where experts may be modules or one parameter, whichever transformers makes of them."""
    modules = [*inside((Q, K, V, DENSE, EXPERT), 0, 1, 2), "mtp.layers.0.self_attn.q_proj"]
    modules += ["model.embed_tokens", "lm_head"]
    weights = {f"{module}.weight": np.ones((4, 4), np.float32) for module in modules}
    weights[f"{modules[0]}.bias"] = np.ones(4, np.float32)
    config = {"tie_word_embeddings": False, "num_hidden_layers": 2}  # the third layer predicts further tokens
    write(place / "model", weights, config)
    wrapped = {f"language.{name}": value for name, value in weights.items()}
    write(place / "wrapped", {**wrapped, "vision.q_proj.weight": np.ones((4, 4), np.float32)}, config)
    for index, (had, told, said) in enumerate(BELONGING):
        tensors = factors(dict.fromkeys(had, (4, 4)), 2, 0)
        for which, name in enumerate(list(tensors)):
            if "embed_tokens" in name:
                tensors[f"{name.split('.lora_')[0]}.lora_embedding_{'AB'[which % 2]}"] = tensors.pop(name)
        write_adapter(place / f"lora-{index}", tensors, **told)
        for base in ("model", "wrapped"):
            if said is None:
                open_model(locate_model(f"{base}+lora-{index}")).close()
                continue
            with pytest.raises(M3Error, match=said) as caught:
                open_model(locate_model(f"{base}+lora-{index}"))
            assert "\n" not in str(caught.value)


def test_values_that_are_no_numbers_are_refused(place):
    tensors = factors({ATTENTION: (12, 12)}, 2, 0)
    write_adapter(place / "large", {k: v * np.float32(1e25) for k, v in tensors.items()})
    tensors[f"{PREFIX}{ATTENTION}.lora_A.weight"][1, 3] = np.nan
    write_adapter(place / "lora", tensors)
    for name, said in (("lora", "lora_A.weight holds NaN"), ("large", "is beyond BF16")):
        with open_model(locate_model(f"base+{name}")) as view, pytest.raises(M3Error, match=said):
            whole(view, f"{ATTENTION}.weight")


def test_weights_that_are_no_floats_are_refused(place):
    write_adapter(place / "lora", factors(SHAPES, 2, 0))
    write(place / "integers", {name: np.ones(value.shape, np.int8) for name, value in numbers().items()})
    with pytest.raises(M3Error, match="is I8, and adapters"):
        open_model(locate_model("integers+lora"))


EMBED, HEAD, SHARED = "model.embed_tokens.weight", "lm_head.weight", "shared.weight"
SIDE = "encoder.embed_tokens.weight"


def test_what_is_tied_changes_under_all_of_its_names_or_is_refused(place):
    """Whatever of it is stored, by whichever name an adapter changes it; what is not tied changes alone."""
    rows = np.arange(108, dtype=np.float32).reshape(9, 12)
    drawn = {"A": np.ones((2, 9), np.float32), "B": np.ones((12, 2), np.float32)}
    factored = {f"{PREFIX}model.embed_tokens.lora_embedding_{which}": value for which, value in drawn.items()}
    adapters = {
        "head": factors({"lm_head": (9, 12)}, 2, 0),
        "whole-head": {PREFIX + HEAD: rows + 1},
        "embed": factored,
        "whole-embed": {PREFIX + EMBED: rows + 1},
        "both": {PREFIX + EMBED: rows + 1, PREFIX + HEAD: rows + 2},
        "whole-shared": {PREFIX + SHARED: rows + 1},
    }
    for name, tensors in adapters.items():
        write_adapter(place / name, tensors)
        write_adapter(place / f"{name}-tying", tensors, ensure_weight_tying=True)
    llama, both = {"model_type": "llama", "vocab_size": 9}, {EMBED: rows, HEAD: rows}
    tied, untied = ({"tie_word_embeddings": told} for told in (True, False))
    bases = {
        "tied": (both, llama | tied),
        "tied-one": ({EMBED: rows}, llama | tied),
        "silent": (both, llama),
        "untied": (both, llama | untied),
        "own": ({EMBED: rows, HEAD: rows + 5}, llama),
        "inner": (both, {"text_config": llama | tied}),
        "t5": ({SHARED: rows, SIDE: rows, HEAD: rows + 5}, {"model_type": "t5", "vocab_size": 9} | untied),
        "bart": ({SHARED: rows, SIDE: rows + 5, HEAD: rows + 5}, {"model_type": "bart", "vocab_size": 9} | untied),
    }
    for name, (tensors, config) in bases.items():
        write(place / name, tensors, config)

    for base in ("tied", "inner", "silent"):
        for name in ("head", "whole-head", "embed", "whole-embed", "both"):
            said = (
                "by tie_word_embeddings whether"
                if base == "silent"
                else "put embedding too .*tie_word_embeddings false"
            )
            with pytest.raises(M3Error, match=said):
                open_model(locate_model(f"{base}+{name}"))
    with pytest.raises(M3Error, match="which is the output embedding too, though"):
        open_model(locate_model("tied-one+embed"))
    with pytest.raises(M3Error, match=r"the embedding of encoder and decoder too .*in PEFT first"):
        open_model(locate_model("t5+whole-shared"))

    for base, name, alike, changed in (
        *(("tied", f"{each}-tying", both, both) for each in ("head", "whole-head", "embed", "whole-embed", "both")),
        ("silent", "embed-tying", both, both),
        ("tied-one", "embed-tying", {EMBED}, {EMBED}),
        ("t5", "whole-shared-tying", {SHARED, SIDE}, {SHARED, SIDE}),
        ("bart", "whole-shared", {SHARED}, {SHARED}),
        ("bart", "whole-shared-tying", {SHARED}, {SHARED}),
        *((base, f"head{end}", {HEAD}, {HEAD}) for base in ("untied", "own") for end in ("", "-tying")),
        *((base, f"whole-embed{end}", {EMBED}, {EMBED}) for base in ("untied", "own") for end in ("", "-tying")),
    ):
        with open_model(locate_model(f"{base}+{name}")) as view:
            seen = {each: whole(view, each) for each in view.tensors}
        assert {each for each in seen if (seen[each] != bases[base][0][each]).any()} == set(changed), (base, name)
        assert len({seen[each].tobytes() for each in alike}) == 1, (base, name)


def test_square_weights_lie_as_the_architecture_has_them(place):
    """PEFT adds to a Conv1D as [in, out] and to a Linear as [out, in], whatever fan_in_fan_out says."""
    inner, outer = "transformer.h.0.attn.c_proj", "lm_head"
    base = numbers({f"{inner}.weight": (12, 12), f"{outer}.weight": (12, 12)}, np.float32)
    tensors = factors({inner: (12, 12), outer: (12, 12)}, 2, 0)
    write(place / "gpt2", base, {"model_type": "gpt2", "tie_word_embeddings": False})
    for told in (False, True):
        write_adapter(place / "lora", tensors, fan_in_fan_out=told)
        with open_model(locate_model("gpt2+lora")) as view:
            for module, turned in ((inner, True), (outer, False)):
                want = adapted(base, tensors, module, 2, turned)
                assert whole(view, f"{module}.weight").tobytes() == want.tobytes(), (told, module)


@pytest.mark.torch
def test_an_adapter_may_be_a_file_of_pytorch(place):
    torch = pytest.importorskip("torch", reason="needs torch: scripts/test --all")
    tensors = factors(SHAPES, 2, 0)
    lora = write_adapter(place / "lora", tensors)
    (lora / "adapter_model.safetensors").unlink()
    torch.save({name: torch.from_numpy(value) for name, value in tensors.items()}, lora / "adapter_model.bin")
    with open_model(locate_model("base+lora")) as view:
        want = adapted(numbers(), tensors, ATTENTION, 2.0)
        assert whole(view, f"{ATTENTION}.weight").tobytes() == want.tobytes()
    with pytest.raises(M3Error, match="is an adapter and no model"):
        check_no_adapter(locate_model("lora"))


def test_names(place):
    """What exists wins; else the last plus between two that may be models."""
    write_adapter(place / "lora", factors(SHAPES, 2, 0))
    write_adapter(place / "lo+ra", factors(SHAPES, 2, 0))
    write(place / "c++" / "base", numbers())
    write(place / "base+x", numbers())
    assert [split_adapter(name) for name in ("base+x", "org/name@a+b", "base")] == [None, None, None]
    for name, parts in {
        "base+lora": ("base", "lora"),
        "base+x+lora": ("base+x", "lora"),
        "base+lo+ra": ("base", "lo+ra"),
        "c++/base+lora": ("c++/base", "lora"),
        "org/name@main+org/lora@v1": ("org/name@main", "org/lora@v1"),
        "org/name+lora": ("org/name", "lora"),
        "s3://place/base+gs://place/lora": ("s3://place/base", "gs://place/lora"),
        "nothing+lora": ("nothing", "lora"),
    }.items():
        assert split_adapter(name) == parts
    for name, said in {
        "nothing+lora": r"^nothing\+lora: 'nothing' does not exist here",
        "base+nothing": r"^base\+nothing: 'nothing' does not exist here",
        "base+lora+lora": "names two adapters",
    }.items():
        with pytest.raises(M3Error, match=said):
            locate_model(name)


def test_what_is_no_adapter_and_what_is_no_model(place):
    write_adapter(place / "lora", factors(SHAPES, 2, 0))
    for state in ("optimizer.pt", "training_args.bin"):
        (place / "lora" / state).touch()
    with pytest.raises(M3Error, match=r"lora is an adapter and no model: name it with its base, as BASE\+lora"):
        check_no_adapter(locate_model("lora"))
    (place / "empty").mkdir()
    (place / "empty" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    (place / "list").mkdir()
    (place / "list" / "adapter_config.json").write_text("[]")
    for name, said in {
        "lora+lora": "lora is an adapter and no model",
        "base+base": "is no adapter of PEFT",
        "base+empty": "has no adapter_model.safetensors",
        "base+list": "is not a JSON object",
    }.items():
        with pytest.raises(M3Error, match=said):
            open_model(locate_model(name))
    save_file(numbers(), place / "lora" / "model.safetensors")  # a merged model that kept its adapter's configuration
    check_no_adapter(locate_model("lora"))
