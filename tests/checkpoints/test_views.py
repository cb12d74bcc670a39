"""Views: the bytes of other checkpoints under other names."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.checkpoint_suite import Arrays, write_file
from support.checkpoint_suite import read as read_array

from m3jax.checkpoints import Checkpoint, TensorInfo, digest_tensor, natural_key, open_safetensors
from m3jax.checkpoints.formats import WRITTEN, written
from m3jax.checkpoints.views import prefix_view, renamed, selected, stacked_layers, stored_at, wrapper
from m3jax.errors import M3Error


def save(path: Path, arrays: Arrays) -> Path:
    path.mkdir()
    write_file(path / "model.safetensors", arrays, metadata={"from": path.name})
    return path


def read(checkpoint: Checkpoint, name: str) -> bytes:
    return read_array(checkpoint, name).tobytes()


def layered(layers: int, seed: int, width: int = 4, stack: str = "model.layers") -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (9, width)}
    for layer in range(layers):
        shapes |= {f"{stack}.{layer}.mlp.weight": (width, width), f"{stack}.{layer}.norm.weight": (width,)}
    shapes |= {"model.norm.weight": (width,), "lm_head.weight": (9, width)}
    return {name: rng.standard_normal(shape).astype(ml_dtypes.bfloat16) for name, shape in shapes.items()}


@pytest.fixture
def wrapped(tmp_path: Path) -> Checkpoint:
    arrays = {f"params.layers.{layer}.w": np.full(3, layer, np.int16) for layer in (0, 2, 10)}
    return open_safetensors(save(tmp_path / "wrapped", arrays | {"step": np.int32(7).reshape(())}))


# --- Other names -----------------------------------------------------------------------------------------


def test_names_given_one_by_one(wrapped: Checkpoint) -> None:
    with renamed(wrapped, {"z.2": "params.layers.10.w", "again": "step", "step": "step"}) as view:
        assert list(view.tensors) == ["again", "params.layers.0.w", "params.layers.2.w", "step", "z.2"]
        assert view.tensors["z.2"] == TensorInfo("z.2", (3,), "I16")
        assert read(view, "z.2") == read(wrapped, "params.layers.10.w")
        assert read(view, "again") == read(view, "step") == read(wrapped, "step")
        assert (view.location, view.metadata, view.files()) == (wrapped.location, {"from": "wrapped"}, wrapped.files())
        assert view.fingerprint() == wrapped.fingerprint()
        assert isinstance(view, Checkpoint)


def test_names_by_a_function(wrapped: Checkpoint) -> None:
    with renamed(wrapped, lambda name: name.removeprefix("params.")) as view:
        assert list(view.tensors) == ["layers.0.w", "layers.2.w", "layers.10.w", "step"]
        assert stored_at(view, "layers.2.w") == (wrapped.location, "params.layers.2.w")
        assert digest_tensor(view, "layers.2.w") == digest_tensor(wrapped, "params.layers.2.w")
        assert stored_at(wrapped, "step") == (wrapped.location, "step")


def test_views_of_views(wrapped: Checkpoint) -> None:
    inner = renamed(wrapped, lambda name: name.removeprefix("params."))
    with renamed(inner, {"first": "layers.0.w"}) as view:
        assert stored_at(view, "first") == (wrapped.location, "params.layers.0.w")
        assert read(view, "first") == np.zeros(3, np.int16).tobytes()


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ({"new": "old"}, "has no tensor 'old' to be seen as 'new'"),
        ({"params.layers.0.w": "step"}, "to be seen as 'params.layers.0.w', 'step' and 'params.layers.0.w'"),
        (lambda _: "same", "to be seen as 'same', 'params.layers.0.w' and 'params.layers.2.w'"),
    ],
)
def test_names_that_do_not_fit(wrapped: Checkpoint, names: Any, words: str) -> None:
    with pytest.raises(M3Error) as caught:
        renamed(wrapped, names)
    assert words in str(caught.value)
    assert wrapped.location in str(caught.value)


def test_what_cannot_be_read_is_named_twice(wrapped: Checkpoint) -> None:
    with renamed(wrapped, {"new": "params.layers.10.w"}) as view:
        file = view.files()[0]
        file.write_bytes(file.read_bytes()[:-20])
        with pytest.raises(M3Error, match=r"'new', stored as 'params.layers.10.w': .*has changed"):
            read(view, "new")
        with pytest.raises(M3Error, match=r"^\S+ has changed"):
            read(view, "step")
        with pytest.raises(M3Error, match=r"has no tensor 'params.layers.10.w'"):
            stored_at(view, "params.layers.10.w")


def test_an_error_keeps_its_cause(wrapped: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise M3Error("the disk") from OSError(5)

    monkeypatch.setattr(wrapped, "read_into", fail)
    with renamed(wrapped, {"new": "step"}) as view, pytest.raises(M3Error) as caught:
        read(view, "new")
    assert isinstance(caught.value.__cause__, OSError)


def test_a_view_closes_what_it_views(wrapped: Checkpoint) -> None:
    with renamed(wrapped, {"new": "step"}) as view:
        pass
    for checkpoint, name in ((view, "new"), (wrapped, "step")):
        with pytest.raises(ValueError, match="is closed"):
            read(checkpoint, name)


# --- Wrappers --------------------------------------------------------------------------------------------

PLAIN = ["embed", "dense.kernel", "dense.bias"]


@pytest.mark.parametrize(
    ("names", "others", "found"),
    [
        ([f"params.{n}" for n in PLAIN], [PLAIN], "params."),
        ([f"a.b.{n}" for n in PLAIN], [PLAIN], "a.b."),
        ([f"params.{n}" for n in PLAIN] + ["step"], [PLAIN], "params."),
        ([f"params.{n}" for n in PLAIN] + ["step"], [[*PLAIN, "step"]], "params."),
        ([f"{p}.{n}" for n in PLAIN for p in ("opt.mu.params", "ema", "params")], [PLAIN], "params."),
        ([f"{p}.{n}" for n in PLAIN for p in ("a.params", "b.params")], [PLAIN], ""),
        ([f"language_model.{n}" for n in PLAIN] + ["vision_tower.embed"], [PLAIN], ""),
        ([f"params.{n}" for n in [*PLAIN, "head"]], [PLAIN], "params."),
        ([f"params.{n}" for n in PLAIN], [[*PLAIN, "head"]], "params."),
        ([f"params.{n}" for n in PLAIN], [[f"params.{n}" for n in PLAIN], PLAIN], "params."),
        ([f"a.params.{n}" for n in PLAIN], [[f"params.{n}" for n in PLAIN], PLAIN], "a.params."),
        (PLAIN, [PLAIN], ""),
        (PLAIN, [[f"params.{n}" for n in PLAIN]], ""),
        ([f"params.{n}" for n in PLAIN], [[f"params.{n}" for n in PLAIN]], ""),
        ([f"{p}.{n}" for n in PLAIN for p in ("encoder", "decoder")], [PLAIN], ""),
        ([f"params.{n}" for n in PLAIN], [["other"]], ""),
        ([f"params.{n}" for n in PLAIN], [[]], ""),
        ([f"params.{n}" for n in PLAIN], [], ""),
        ([], [PLAIN], ""),
    ],
)
def test_which_beginning_is_a_wrapper(names: list[str], others: list[list[str]], found: str) -> None:
    assert wrapper(names, *others) == found


def test_a_wrapper_is_left_out(wrapped: Checkpoint) -> None:
    plain = ["layers.0.w", "layers.2.w", "layers.10.w"]
    view = prefix_view(wrapped, plain)
    assert list(view.tensors) == [*plain, "step"]
    assert read(view, "layers.10.w") == np.full(3, 10, np.int16).tobytes()
    assert prefix_view(view, plain) is view
    assert prefix_view(wrapped, wrapped.tensors) is wrapped


# --- Other blocks ----------------------------------------------------------------------------------------


@pytest.fixture
def two(tmp_path: Path) -> tuple[Arrays, Arrays]:
    """Two models of two and three layers, in every format under its name: `safetensors/a` …"""
    models = layered(2, 1), layered(3, 2)
    for name, arrays in zip("ab", models, strict=True):
        save(tmp_path / name, arrays)
        for kind in WRITTEN:
            (tmp_path / kind / name).mkdir(parents=True)
            with open_safetensors(tmp_path / name) as source:
                write = written(kind).write
                assert write is not None
                write(tmp_path / kind / name, source, 100)
    return models


@pytest.mark.parametrize("kinds", [(kind, kind) for kind in WRITTEN] + [("orbax", "msgpack")])
def test_layers_of_two_models(tmp_path: Path, two: tuple[Arrays, Arrays], kinds: tuple[str, str]) -> None:
    a, b = (written(kind).open(tmp_path / kind / name) for kind, name in zip(kinds, "ab", strict=True))
    with stacked_layers([(a, 0, 2), (b, 1, 2), (b, 0, 2)]) as view:
        expected = {"model.embed_tokens.weight": two[0]["model.embed_tokens.weight"]}
        for number, (model, layer) in enumerate([(0, 0), (0, 1), (1, 1), (1, 0), (1, 1)]):
            for part in ("mlp", "norm"):
                old, new = (f"model.layers.{k}.{part}.weight" for k in (layer, number))
                expected[new] = two[model][old]
                assert stored_at(view, new) == ((a, b)[model].location, old)
        expected |= {name: two[1][name] for name in ("model.norm.weight", "lm_head.weight")}
        assert list(view.tensors) == sorted(expected, key=natural_key)
        for name, array in expected.items():
            assert view.tensors[name] == TensorInfo(name, array.shape, "BF16")
            assert read(view, name) == array.tobytes()
        assert set(view.files()) == {*a.files(), *b.files()}
        told = [(f"{k}/{file}", seen) for k, c in enumerate((a, b)) for file, seen in c.fingerprint().items()]
        assert view.fingerprint() == dict(told)
        runs = f"layers 0 to 2 of {a.location}, layers 1 to 2 of {b.location}, layers 0 to 2 of {b.location}"
        assert view.location == runs
    for checkpoint in (a, b):
        with pytest.raises(ValueError, match="is closed"):
            read(checkpoint, "lm_head.weight")


def test_layers_of_one_model(tmp_path: Path) -> None:
    arrays = layered(3, 0)
    with selected(open_safetensors(save(tmp_path / "a", arrays)), (2, 3), (0, 1)) as view:
        assert view.metadata == {"from": "a"}
        assert len(view.tensors) == 7
        assert read(view, "model.layers.0.mlp.weight") == arrays["model.layers.2.mlp.weight"].tobytes()
        assert read(view, "model.layers.1.mlp.weight") == arrays["model.layers.0.mlp.weight"].tobytes()
        assert view.fingerprint().keys() == {"model.safetensors"}


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 3)), min_size=1, max_size=5))
def test_any_runs_from_many_threads(tmp_path_factory: Any, runs: list[tuple[int, int]]) -> None:
    arrays = layered(8, 0)
    place = tmp_path_factory.mktemp("runs") / "a"
    order = [layer for first, count in runs for layer in range(first, first + count)]

    with selected(open_safetensors(save(place, arrays)), *((first, first + count) for first, count in runs)) as view:

        def check(number: int) -> None:
            whole, out = arrays[f"model.layers.{order[number]}.mlp.weight"].tobytes(), bytearray(5)
            view.read_into(f"model.layers.{number}.mlp.weight", number, memoryview(out))
            assert out == whole[number : number + 5]

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(check, range(len(order))))


@pytest.mark.parametrize(
    ("run", "words"),
    [
        ((1, 1), "layers 1 to 1 of"),
        ((2, 1), "are none"),
        ((-1, 1), "leave the model"),
        ((0, 3), "has 2: stay in 0 to 2"),
    ],
)
def test_runs_that_are_not_there(tmp_path: Path, run: tuple[int, int], words: str) -> None:
    with open_safetensors(save(tmp_path / "a", layered(2, 0))) as checkpoint, pytest.raises(M3Error, match=words):
        selected(checkpoint, run)


def test_models_whose_layers_do_not_fit(tmp_path: Path) -> None:
    a = open_safetensors(save(tmp_path / "a", layered(2, 0)))
    wide = open_safetensors(save(tmp_path / "wide", layered(2, 0, width=6)))
    other = open_safetensors(save(tmp_path / "other", layered(2, 0, stack="h")))
    both = open_safetensors(save(tmp_path / "both", layered(2, 0) | layered(1, 0, stack="decoder.layers")))
    gap = open_safetensors(save(tmp_path / "gap", {"layers.0.w": np.ones(1), "layers.2.w": np.ones(1)}))
    none = open_safetensors(save(tmp_path / "none", {"w": np.ones(1)}))
    for runs, words in (
        ([], "no layers are selected"),
        (
            [(a, 0, 1), (wide, 0, 1)],
            r"mlp.weight of .*/a is \[4, 4\] but model.layers.0.mlp.weight of .*/wide is \[6, 6\]",
        ),
        ([(a, 0, 1), (other, 0, 1)], "called 'model.layers' in .*/a and 'h' in .*/other"),
        ([(both, 0, 1)], "several stacks of layers, 'decoder.layers' and 'model.layers'"),
        ([(gap, 0, 1)], "has layer 2 but no layer 1"),
        ([(none, 0, 1)], "no numbered layers"),
    ):
        with pytest.raises(M3Error, match=words):
            stacked_layers(runs)
