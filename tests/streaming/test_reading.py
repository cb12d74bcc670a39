"""Chunks as they are read: into buffers that others were in."""

import pytest
from support.directories import recipe, write_models

import m3jax
from m3jax.streaming import reading


@pytest.fixture
def made(monkeypatch):
    """The sizes of the buffers that are made."""
    sizes, make = [], reading._aligned_empty

    def counted(size):
        sizes.append(size)
        return make(size)

    monkeypatch.setattr(reading, "_aligned_empty", counted)
    return sizes


def test_buffers_of_every_size_are_used_again(tmp_path, made):
    rows = {"a": 3500, "b": 90}
    shapes = {f"model.layers.{n}.{kind}.weight": (many, 256) for n in range(6) for kind, many in rows.items()}
    write_models(tmp_path / "in", shapes=shapes)
    asked = recipe(tmp_path / "in", merge_method="ties", parameters={"density": 0.5})  # ranks tensors, then merges them
    m3jax.merge_checkpoint(asked, tmp_path / "out", chunk_entries=2**18)
    chunks = 3 * 6 * (4 + 1)  # of each of three models
    assert len(set(made)) > 1
    assert len(made) < chunks / 2, f"{len(made)} buffers for {chunks} chunks that were read twice"


def test_buffers_of_sizes_that_come_once_are_given_up():
    lane = reading._Lane(None, 1000, 50)
    taken = [lane.buffer(1000) for _ in range(40)]
    for buffer in taken:
        lane.give_back(buffer)
    assert lane.buffer(1000) is taken[-1]
    kept = []
    for size in range(100, 400):
        buffer = lane.buffer(size)
        lane.give_back(buffer)
        kept.append(sum(own * len(buffers) for own, buffers in lane._spare.items()))
    assert max(kept) <= (reading._MOST_SPARE + 1) * 1000  # bytes, where 40,000 had been
