"""Tensors merged at the same time: the bytes of one after the other, and one sentence where one goes wrong."""

import signal
import threading
import time

import numpy as np
import pytest
from safetensors.numpy import save_file
from support.directories import WIDE, read, recipe, write, write_models
from support.interruptions import interruption
from support.matrix import METHODS, SPARSIFIERS

import m3jax
from m3jax import M3Error
from m3jax.checkpoints import open_safetensors
from m3jax.checkpoints.files import WeightFiles
from m3jax.checkpoints.remote import as_path
from m3jax.checkpoints.views import renamed
from m3jax.checkpoints.views_permuted import Permuted, permuted
from m3jax.cluster.meshes import parse_mesh
from m3jax.streaming import lanes, passes
from m3jax.streaming.passes import Passes
from m3jax.streaming.seeds import merge_seeds
from m3jax.streaming.writing import Writing

ONE = {"mesh": parse_mesh("fsdp=1")}  # chunks that are spread over several devices have one lane


@pytest.fixture
def asked(tmp_path):
    write_models(tmp_path / "in", n=2)
    return recipe(tmp_path / "in", 2, **METHODS["ties_paper"][1], sparsify={"method": "dare", "density": 0.3})


def test_lanes_share_the_tensors_of_every_phase(tmp_path, asked, monkeypatch):
    seen, together = {}, threading.Barrier(2, timeout=30)
    consume = Passes._consume

    def consumed(passes, reader, writing, tally, stopped):
        names = [visit.plan.output.name for visit in reader._schedule]
        sampled = any(visit.stage.sampled for visit in reader._schedule)
        seen.setdefault(writing is not None, []).append(set(names))
        if not sampled:
            together.wait()  # they run at the same time, or this fails
        consume(passes, reader, writing, tally, stopped)

    monkeypatch.setattr(Passes, "_consume", consumed)
    steps = []
    result = m3jax.merge_checkpoint(
        asked, tmp_path / "out", lanes=2, **ONE, progress=steps.append, max_shard_size=10_000
    )
    assert sum(map(len, seen[True])) == len(set.union(*seen[True])) == len(WIDE)
    merging = [step for step in steps if step.stage == "merging"]
    assert [step.done for step in merging] == sorted(step.done for step in merging)
    assert merging[-1].done == merging[-1].total
    monkeypatch.undo()
    alone = m3jax.merge_checkpoint(asked, tmp_path / "alone", lanes=1, **ONE, max_shard_size=10_000)
    assert (alone.digest, alone.bytes_read) == (result.digest, result.bytes_read)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    for file in (tmp_path / "alone").iterdir():
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes(), file.name


@pytest.mark.parametrize(
    ("method", "sparsifier"),
    [("linear", "none"), ("ties_mergekit", "breadcrumbs"), ("task_arithmetic", "della"), ("ties_paper", "magnitude")],
)
def test_measures_of_tensors_and_rows_are_each_lanes_own(tmp_path, method, sparsifier):
    write_models(tmp_path / "in", n=2)
    keys = {**METHODS[method][1], **SPARSIFIERS[sparsifier][1], "seed": 5}
    made = [
        m3jax.merge_checkpoint(recipe(tmp_path / "in", 2, **keys), tmp_path / f"{n}", lanes=n, **ONE) for n in (1, 4)
    ]
    assert made[0].manifest == made[1].manifest


def test_what_one_lane_cannot_read_ends_all(tmp_path, asked):
    place = tmp_path / "in" / "expert-0" / "model.safetensors"
    whole = place.read_bytes()
    for name in list(WIDE)[:: len(WIDE) // 2]:
        tensors = read(place.parent)
        tensors[name] = np.full_like(tensors[name], np.nan)
        save_file(tensors, place, {"format": "pt"})
        with pytest.raises(M3Error, match=f"{name} of .*expert-0.*: holds NaN"):
            m3jax.merge_checkpoint(asked, tmp_path / "out", lanes=3, **ONE)
        assert not (tmp_path / "out").exists()
        place.write_bytes(whole)
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith(("lane", "reader", "writer"))]


def test_an_interrupted_merge_goes_on_with_other_lanes(tmp_path, asked):
    want = m3jax.merge_checkpoint(asked, tmp_path / "want", **ONE, max_shard_size=10_000).digest
    interrupt = interruption(tmp_path / "out.partial", 0.6)
    with pytest.raises(KeyboardInterrupt):
        m3jax.merge_checkpoint(asked, tmp_path / "out", lanes=3, **ONE, progress=interrupt, max_shard_size=10_000)
    result = m3jax.merge_checkpoint(asked, tmp_path / "out", lanes=2, **ONE, max_shard_size=10_000)
    assert result.digest == want
    assert result.resumed_shards


def test_there_is_a_lane_for_every_four_cores(monkeypatch):
    for cores, count in ((1, 1), (2, 1), (7, 1), (8, 2), (16, 4), (224, 8)):
        monkeypatch.setattr(lanes, "usable_cores", lambda cores=cores: cores)
        assert lanes.lane_count(None) == count
    for odd in (0, True, 1.5):
        with pytest.raises(M3Error, match="but must be a whole number of at least 1"):
            lanes.lane_count(odd)


def test_a_wrong_number_is_said_before_anything_is_made(tmp_path, asked):
    for merge, more in ((m3jax.merge_checkpoint, {}), (merge_seeds, {"seeds": "0..1"})):
        with pytest.raises(M3Error, match="lanes are 0"):
            merge(asked, tmp_path / "out", lanes=0, **more)
        assert [path.name for path in tmp_path.iterdir()] == ["in"]
    assert lanes.divided("ab", [1, 1], 9) == [["a"], ["b"]]


def test_what_is_best_read_in_order_has_one_lane(tmp_path, monkeypatch):
    """Decoded chunks of Orbax, turned matrices and what storage is asked for ahead would by turns be made anew."""
    counts = []
    plain = passes.side_by_side
    monkeypatch.setattr(passes, "side_by_side", lambda works: (counts.append(len(works)), plain(works)))
    for i in range(2):
        write(tmp_path / f"file-{i}", {name: np.full((4, 3), i, np.float32) for name in "ab"})
        m3jax.convert(tmp_path / f"file-{i}", tmp_path / f"orbax-{i}", to="orbax")
    for kind in ("file", "orbax"):
        asked = {"merge_method": "linear", "models": [str(tmp_path / f"{kind}-{i}") for i in range(2)]}
        m3jax.merge_checkpoint(asked, tmp_path / kind, lanes=3, **ONE)
    assert counts == [2, 1]
    turned = {"w": Permuted((3, 2), "F32", (3, 2), (1, 3), (("w", 0),))}
    write(tmp_path / "model", {"w": np.zeros((2, 3), np.float32)})
    with open_safetensors(tmp_path / "model") as stored, permuted(stored, turned) as view:
        assert lanes.lanes_over(3, [stored, renamed(stored, {})], alone=False) == 3
        assert lanes.lanes_over(3, [stored, renamed(view, {})], alone=False) == 1
        assert lanes.lanes_over(3, [stored], alone=True) == 1
    assert WeightFiles("a", as_path("s3://bucket/a"), {}, lambda path: None).sequential


@pytest.mark.parametrize("last", ["lane-2", "reader-1", "writer"])
def test_threads_that_have_begun_end_where_there_are_no_more(tmp_path, asked, monkeypatch, last):
    plain = threading.Thread.start

    def start(thread):
        if thread.name == last:
            raise RuntimeError("can't start new thread")
        plain(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    before = set(threading.enumerate())
    with pytest.raises(M3Error, match=r"no more threads .*\(can't start new thread\): raise the limit"):
        m3jax.merge_checkpoint(asked, tmp_path / "out", lanes=3, **ONE)
    ours = [t for t in set(threading.enumerate()) - before if t.name.startswith(("lane", "reader", "writer"))]
    for thread in ours:
        thread.join(5)
        assert not thread.is_alive(), thread.name


def test_an_interruption_while_others_work_waits_for_them():
    """On Python 3.11 a thread whose join is interrupted counts as ended, though it still writes."""
    ended, main = threading.Event(), threading.main_thread().ident

    def work(stopped):
        if threading.current_thread() is threading.main_thread():
            return
        time.sleep(0.05)  # so that the main thread waits
        signal.pthread_kill(main, signal.SIGINT)
        assert stopped.wait(30)
        time.sleep(0.05)
        ended.set()

    with pytest.raises(KeyboardInterrupt):
        lanes.side_by_side([work] * 2)
    assert ended.is_set()


def test_an_interruption_while_a_file_is_written_waits_for_that(monkeypatch):
    written, main = threading.Event(), threading.main_thread().ident

    def write(*_):
        time.sleep(0.05)  # so that the main thread waits
        signal.pthread_kill(main, signal.SIGINT)
        time.sleep(0.05)
        written.set()

    monkeypatch.setattr(Writing, "_write", write)
    with pytest.raises(KeyboardInterrupt), Writing(None, None) as writing:
        writing.submit(None, None)
    assert written.is_set()
