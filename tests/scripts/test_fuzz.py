"""The script that reads mutations of files says what it did, and keeps what shows a fault."""

import importlib.machinery
import importlib.util
import json
import random
from pathlib import Path

from support.memory import Served
from support.mutations import mutated_json
from support.parsers import Parser

from m3jax import M3Error

SCRIPT = Path(__file__).parents[2] / "scripts" / "fuzz"


def fuzz():
    loader = importlib.machinery.SourceFileLoader("fuzz", str(SCRIPT))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("fuzz", loader))
    loader.exec_module(module)
    return module


def test_readers_without_a_fault(tmp_path):
    done, read, faults = fuzz().fuzz("sst2", fuzz().PARSERS["sst2"], 0.1, 0, tmp_path / "kept")
    assert done > read >= 0
    assert not faults
    assert not (tmp_path / "kept").exists()


def test_a_fault_is_counted_and_its_file_kept(tmp_path):
    def read(place):
        return {}[(place / "a.txt").read_bytes()]

    parser = Parser("a.txt", lambda: b"good", read, False)
    done, read_well, faults = fuzz().fuzz("broken", parser, 0.05, 0, tmp_path)
    ((said, count),) = faults.items()
    assert said.startswith("KeyError at test_fuzz.py:")
    assert (read_well, count) == (0, done)
    assert [path.name for path in tmp_path.iterdir()] == ["broken-0-a.txt"]


def test_what_opens_a_file_is_read_from_memory_and_what_asks_the_disk_is_not(tmp_path):
    def sized(place):
        if (place / "a.txt").stat().st_size != len((place / "a.txt").read_bytes()):
            raise M3Error("cut")

    def left(place):
        (place / "b.txt").write_bytes((place / "a.txt").read_bytes())

    script = fuzz()
    assert script.reads_from_memory(script.PARSERS["sst2"])
    assert not script.reads_from_memory(Parser("a.txt", lambda: b"good", sized, False))
    assert not script.reads_from_memory(Parser("a.txt", lambda: b"good", left, False))
    with Served(tmp_path / "a.txt") as served:
        served.blob = b"of memory"
        (tmp_path / "b.txt").write_text("of the disk")
        assert (tmp_path / "a.txt").read_text() == "of memory"
        assert (tmp_path / "b.txt").read_text() == "of the disk"
    assert not (tmp_path / "a.txt").exists()


def test_a_reader_stops_after_so_many_executions(tmp_path):
    assert fuzz().fuzz("sst2", fuzz().PARSERS["sst2"], 60.0, 0, tmp_path, most=70)[0] == 70


def test_mutations_of_json_are_json(tmp_path):
    good = json.dumps({"a": [1, {"b": "x,]", "c": None}, []], "d": {}, "e": [[1]]}).encode()
    source = random.Random(0)
    told = [json.loads(mutated_json(source, good)) for _ in range(300)]
    assert len({json.dumps(each) for each in told}) > 100
    assert mutated_json(source, b"no JSON") == b"no JSON"
