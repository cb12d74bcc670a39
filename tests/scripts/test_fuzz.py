"""The script that reads mutations of files says what it did, and keeps what shows a fault."""

import importlib.machinery
import importlib.util
from pathlib import Path

from support.parsers import Parser

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
