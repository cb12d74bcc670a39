"""One merge by several processes: the same bytes, no needless reading, and a clear end when one of them dies."""

import json
import os
import random
import signal
import threading
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from support.clusters import SHAPES, SHARD, free_port, recipe_file, run_all, start
from support.directories import recipe, write_models
from support.matrix import METHODS, few

from m3jax import merge_checkpoint, verify
from m3jax.cli.commands import main
from m3jax.cluster import processes
from m3jax.cluster.meshes import parse_mesh
from m3jax.cluster.supervision import explain
from m3jax.errors import M3Error
from m3jax.streaming.plan import divide

ELEMENTWISE = {"merge_method": "task_arithmetic", "sparsify": {"method": "dare", "density": 0.5}, "seed": 4}
TIES = METHODS["ties_paper"][1] | {"sparsify": {"method": "dare", "density": 0.8}, "mixup": {"alpha": 0.5}}
PRUNED = TIES | {"sparsify": {"method": "magnitude", "density": 0.6}}  # each tensor is ranked, then the model


# --- without a cluster --------------------------------------------------------------------------------------------


class Store:
    """The key-value store of a coordination service, in this process."""

    def __init__(self):
        self.values = {}
        self.news = threading.Condition()

    def key_value_set_bytes(self, key, value):
        with self.news:
            if key in self.values:
                raise jax.errors.JaxRuntimeError("ALREADY_EXISTS")
            self.values[key] = value
            self.news.notify_all()

    def blocking_key_value_get_bytes(self, key, timeout_in_ms):
        with self.news:
            if not self.news.wait_for(lambda: key in self.values, timeout_in_ms / 1000):
                raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED")
            return self.values[key]

    def key_value_delete(self, key):
        self.values = {k: v for k, v in self.values.items() if not k.startswith(key + "/")}


@pytest.fixture
def cluster(monkeypatch):
    """Makes the processes of a cluster that lives in threads."""
    from jax._src import distributed

    store = Store()
    monkeypatch.setattr(distributed, "global_state", SimpleNamespace(client=store))
    monkeypatch.setattr(processes, "_LONGEST_MS", 60_000)

    def make(count):
        monkeypatch.setattr(jax, "process_count", lambda: count)
        made = []
        for index in range(count):
            monkeypatch.setattr(jax, "process_index", lambda index=index: index)
            monkeypatch.setattr(processes, "_merges", iter([0]))
            made.append(processes.Cluster())
        return made

    make.store = store
    return make


def all_at_once(members, work):
    """What `work` gives or raises on each member, one thread each."""
    outcomes = [None] * len(members)

    def run(member):
        try:
            with member:
                outcomes[member.index] = work(member)
        except M3Error as error:
            outcomes[member.index] = str(error)

    threads = [threading.Thread(target=run, args=(member,)) for member in members]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=300)
    assert not any(thread.is_alive() for thread in threads)
    return outcomes


@pytest.mark.parametrize("count", [1, 3])
def test_everyone_gets_what_all_gave_in_order(cluster, count):
    def work(member):
        time.sleep(0.05 * ((member.index * 2) % count))  # not in the order of their numbers
        counts = np.array([[member.index, 2**40]], np.int64)
        return (
            processes.gather(member, {"process": member.index}),
            processes.share(member, ["of", member.index]),
            processes.add_up(member, counts).tolist(),
        )

    expected = (
        [{"process": index} for index in range(count)],
        ["of", 0],
        [[sum(range(count)), count * 2**40]],
    )
    assert all_at_once(cluster(count), work) == [expected] * count


def test_nothing_is_left_behind_but_the_last_exchange(cluster):
    all_at_once(cluster(2), lambda member: [processes.share(member, turn) for turn in range(9)])
    assert {key.split("/")[2] for key in cluster.store.values} <= {"7", "8", "end"}


@pytest.mark.parametrize("failing", [0, 2])
def test_the_failure_of_one_ends_all_with_its_sentence(cluster, failing):
    def work(member):
        if member.index == failing:
            raise M3Error("the disk is full")
        processes.share(member, None)
        while True:
            member.check()
            time.sleep(0.01)

    assert all_at_once(cluster(3), work) == ["the disk is full"] * 3


def test_who_waits_can_be_interrupted(cluster):
    first, second = cluster(2)
    here = threading.get_ident()
    threading.Timer(0.2, lambda: signal.pthread_kill(here, signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt), second:
        processes.share(second, None)  # the first process gives nothing
    with pytest.raises(M3Error, match="KeyboardInterrupt"), first:
        processes.share(first, None)


def test_there_is_no_cluster():
    with pytest.raises(M3Error, match=r"call jax\.distributed\.initialize\(\) on every process first"):
        processes.Cluster()


def test_work_is_divided_evenly():
    sizes = [random.Random(0).randrange(1, 100) for _ in range(200)]
    for count in (1, 2, 7):
        loads = [0] * count
        for size, owner in zip(sizes, divide(sizes, count), strict=True):
            loads[owner] += size
        assert max(loads) <= 1.02 * sum(sizes) / count


@pytest.mark.parametrize(
    ("log", "sentence"),
    [
        (
            "absl::Status: DEADLINE_EXCEEDED\n\nRPC: /xla.coordination.CoordinationService/RegisterTask",
            "was not reached",
        ),
        ("INVALID_ARGUMENT: Unexpected task registered with task=3\n\nRPC: /RegisterTask", "expects fewer processes"),
        ("request from a newer incarnation.\n\nRPC: /RegisterTask", "with the same number"),
        ("tasks are unhealthy (stopped sending heartbeats):\n2\nThe tasks", "process 2 died"),
        ("UNAVAILABLE: recvmsg:Connection reset by peer", "process 0 died"),
        ("F1122 something new", "F1122 something new"),
        ("", "without a word"),
    ],
)
def test_what_the_runtime_says_becomes_a_sentence(log, sentence):
    assert sentence in explain(log, "10.0.0.1:80")


# --- one digest ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("models")
    write_models(place, shapes=SHAPES)
    return place


@pytest.fixture(scope="module")
def reference(place):
    """What one process and one device make of a recipe."""
    made = {}

    def directory(name, keys):
        if name not in made:
            made[name] = place / f"reference-{name}"
            merge_checkpoint(recipe(place, **keys), made[name], max_shard_size=SHARD, mesh=parse_mesh("x=1"))
        return made[name]

    return directory


def contents(directory):
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


SPREAD = [("x=2", 2**16), ("fsdp=4,tp=2", 2**17), ("x=3", None), (None, 2**16)]
RECIPES = {"elementwise": ELEMENTWISE, "ties": TIES, "pruned": PRUNED}


@pytest.mark.parametrize(
    ("name", "axes", "chunk"),
    few(
        [(name, *spread) for spread in SPREAD for name in ("elementwise", "ties")],
        *((("ties", "elementwise")[i % 2], *spread) for i, spread in enumerate(SPREAD)),
    ),
)
def test_one_process_with_many_devices(place, reference, tmp_path, name, axes, chunk):
    keys = RECIPES[name]
    mesh = None if axes is None else parse_mesh(axes)
    merge_checkpoint(recipe(place, **keys), tmp_path / "out", max_shard_size=SHARD, mesh=mesh, chunk_entries=chunk)
    assert contents(tmp_path / "out") == contents(reference(name, keys))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "count", "devices"), [("elementwise", 4, 1), ("ties", 2, 4), ("ties", 4, 2), ("pruned", 3, 1)]
)
def test_several_processes(place, reference, tmp_path, name, count, devices):
    keys = RECIPES[name]
    file = recipe_file(place, tmp_path, keys)
    codes, outputs, errors = run_all(file, tmp_path / "out", count, "--json", "--quiet", devices=devices)
    assert codes == [0] * count, errors
    assert errors == [""] * count
    assert outputs[1:] == [""] * (count - 1)  # process 0 speaks
    assert contents(tmp_path / "out") == contents(reference(name, keys))
    told = json.loads(outputs[0])
    assert len(told["process_reads"]) == count
    if keys is ELEMENTWISE:
        weights = 3 * sum(2 * int(np.prod(shape)) for shape in SHAPES.values())
        owners = divide(_shard_sizes(tmp_path / "out"), count)
        shares = [
            3 * sum(s for s, o in zip(_shard_sizes(tmp_path / "out"), owners, strict=True) if o == i)
            for i in range(count)
        ]
        assert told["bytes_read"] == weights
        assert told["process_reads"] == shares


@pytest.mark.slow
def test_several_processes_write_one_checkpoint_of_orbax(place, reference, tmp_path):
    file = recipe_file(place, tmp_path, ELEMENTWISE)
    codes, outputs, errors = run_all(file, tmp_path / "run", 3, "--json", "--format", "orbax", "--step", "5")
    assert codes == [0] * 3, errors
    found = verify(tmp_path / "run" / "5")
    assert found.digest == verify(reference("elementwise", ELEMENTWISE)).digest
    assert found.differences == ()
    files = len(list((tmp_path / "run" / "5" / "default").glob("ocdbt.process_*")))
    assert files == len(_shard_sizes(reference("elementwise", ELEMENTWISE)))
    assert min(json.loads(outputs[0])["process_reads"]) > 0


def _shard_sizes(directory):
    from m3jax.checkpoints import open_safetensors

    files = sorted(directory.glob("*.safetensors"))
    return [sum(info.nbytes for info in open_safetensors(file).tensors.values()) for file in files]


# --- what goes wrong ----------------------------------------------------------------------------------------------


def check_killed(place, tmp_path, reference, victim, seconds, resume_with):
    """Kill one of four processes, see all end, resume with another number of processes."""
    file, out = recipe_file(place, tmp_path, TIES), tmp_path / "out"
    port = free_port()
    running = [start(file, out, index, 4, port, "--chunk-entries", "65536") for index in range(4)]
    time.sleep(seconds)
    running[victim].send_signal(signal.SIGKILL)
    ended = [process.communicate(timeout=300) for process in running]  # all end, however busy the machine is
    codes = [process.returncode for process in running]
    others = [index for index in range(4) if index != victim]
    for index in others:
        lines = [line for line in ended[index][1].splitlines() if line.startswith("m3jax:")]
        if codes[index]:
            assert (codes[index], len(lines)) == (2, 1), (codes, ended)
            expected = ("died or lost its connection", "was not reached", "not every process came")
            assert any(sentence in lines[0] for sentence in expected), lines[0]
        else:
            assert out.exists()
    if not out.exists():
        assert all(codes[index] == 2 for index in others)
        codes, _, errors = run_all(file, out, resume_with, "--quiet")
        assert codes == [0] * resume_with, errors
    assert contents(out) == contents(reference("ties", TIES))
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith("out")] == ["out"]


@pytest.mark.slow
@pytest.mark.parametrize(("victim", "seconds", "resume_with"), [(2, 6.0, 3), (0, 7.0, 1)])
def test_a_killed_process_ends_all_and_the_merge_resumes(place, reference, tmp_path, victim, seconds, resume_with):
    check_killed(place, tmp_path, reference, victim, seconds, resume_with)


@pytest.mark.skipif("M3JAX_KILLS" not in os.environ, reason="M3JAX_KILLS=20 kills twenty times: minutes")
@pytest.mark.parametrize("attempt", range(int(os.environ.get("M3JAX_KILLS", "0"))))
def test_killed_at_random_moments(place, reference, tmp_path, attempt):
    chance = random.Random(attempt)
    check_killed(place, tmp_path, reference, chance.randrange(4), chance.uniform(1, 12), chance.choice([1, 2, 3, 4]))


@pytest.mark.slow
def test_an_unreachable_coordinator(place, tmp_path):
    process = start(recipe_file(place, tmp_path, TIES), tmp_path / "out", 1, 2, port := free_port())
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 2
    assert errors.startswith(f"m3jax: the coordinator 127.0.0.1:{port} was not reached")
    assert errors.count("\n") == 1


@pytest.mark.slow
def test_a_mistake_is_said_once(place, tmp_path):
    file = recipe_file(place, tmp_path, TIES | {"models": [str(place / "expert-0"), str(place / "none")]})
    (tmp_path / "broken").mkdir()
    broken = recipe_file(place, tmp_path / "broken", TIES | {"merge_method": "tie"})
    for asked, words in ((file, "does not exist"), (broken, "merge_method")):
        codes, outputs, errors = run_all(asked, tmp_path / "out", 2)
        assert codes == [2, 2]
        assert words in errors[0]
        assert errors[0].count("\n") == 1
        assert errors[1] == ""
        assert outputs == ["", ""]


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("10.0.0.1", "write HOST:PORT"),
        (":8476", "write HOST:PORT"),
        ("10.0.0.1:99999", "write HOST:PORT"),
        ("no-such-host.invalid:8476", "there is no host no-such-host.invalid"),
    ],
)
def test_a_coordinator_that_cannot_be(address, words, capsys):
    command = ["merge", "r.yaml", "out", "--distributed", "--coordinator", address]
    assert main([*command, "--num-processes", "2", "--process-id", "1"]) == 2
    assert words in capsys.readouterr().err


def test_process_0_does_not_look_for_itself():
    log = "DEADLINE_EXCEEDED\n\nRPC: /xla.coordination.CoordinationService/RegisterTask"
    assert explain(log, "host:1", 0).startswith("not every process came to the coordinator host:1")
