"""Blocks seen one by one, stacked, and along another axis: the bytes of numpy, at any range."""

import itertools

import numpy as np
import pytest
from safetensors.numpy import save_file

from m3jax import M3Error
from m3jax.checkpoints import open_checkpoint
from m3jax.checkpoints import views_stacked as views
from m3jax.checkpoints.digest import digest_tensor
from m3jax.checkpoints.views import stored_digests
from m3jax.checkpoints.views_stacked import BlockPlace, Stacking, restacked

DEPTH, SHAPE = 3, (5, 4, 7)


@pytest.fixture
def blocks(tmp_path):
    rng = np.random.default_rng(0)
    blocks = [rng.integers(0, 2**16, SHAPE).astype(np.uint16) for _ in range(DEPTH)]
    stored = {f"one.{i}": block for i, block in enumerate(blocks)}
    stored |= {f"stack.{axis}": np.stack(blocks, axis) for axis in range(4)}
    save_file(stored, tmp_path / "model.safetensors")
    return tmp_path, blocks


STORED = {
    "one": lambda i: BlockPlace(f"one.{i}"),
    **{a: lambda i, a=a: BlockPlace(f"stack.{a}", a, i) for a in range(4)},
}


@pytest.mark.parametrize("far", [1, 2**14], ids=["run by run", "with what lies between"])
@pytest.mark.parametrize("source", STORED)
def test_every_layout_is_seen_as_every_other(blocks, source, far, monkeypatch):
    monkeypatch.setattr(views, "_FAR", far)
    monkeypatch.setattr(views, "_MOST", 200)
    place, held = blocks
    own = [STORED[source](i) for i in range(DEPTH)]
    seen = {f"one.{i}": Stacking((block,)) for i, block in enumerate(own)}
    seen |= {f"stack.{axis}": Stacking(tuple(own), axis) for axis in range(4)}
    with restacked(open_checkpoint(place), seen) as view:
        for name in seen:
            want = held[int(name[-1])] if name.startswith("one") else np.stack(held, int(name[-1]))
            raw = want.tobytes()
            assert view.tensors[name].shape == want.shape
            cuts = [0, 1, 6, 13, 14, 100, 141, len(raw)]
            for start, stop in itertools.combinations(cuts, 2):
                room = np.empty(min(stop, len(raw)) - start, np.uint8)
                view.read_into(name, start, room)
                assert room.tobytes() == raw[start:stop], (name, start, stop)


def test_digests_are_of_what_is_stored(blocks):
    place, _ = blocks
    seen = {
        "both": Stacking((BlockPlace("one.0"), BlockPlace("stack.1", 1, 2)), 0),
        "one.1": Stacking((BlockPlace("one.1"),)),
    }
    with open_checkpoint(place) as stored, restacked(open_checkpoint(place), seen) as view:
        for name in seen:
            found = stored_digests(view, name, digest_tensor(view, name))
            assert found == {n: digest_tensor(stored, n) for n in found}
        assert set(stored_digests(view, "both", "")) == {"one.0", "stack.1"}


def test_blocks_that_differ_are_refused(blocks):
    place, _ = blocks
    with open_checkpoint(place) as stored:
        with pytest.raises(M3Error, match=r"the blocks of 'all' are U16 \[5, 3, 4, 7\] and U16 \[5, 4, 7\]"):
            restacked(stored, {"all": Stacking((BlockPlace("one.0"), BlockPlace("stack.1")), 0)})
        with pytest.raises(M3Error, match="has no 'two', of which 'all' is to be made"):
            restacked(stored, {"all": Stacking((BlockPlace("two"),))})
