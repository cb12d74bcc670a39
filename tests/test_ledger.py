"""The ledger: what is noted stays, what was cut short does not, and other work is refused."""

import json
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from m3jax.errors import M3Error
from m3jax.ledger import Ledger

WORK = ({"a": 1}, "experiment", "with --out DIR")


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """No file may grow beyond this, as where the disk is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def test_entries_are_there_again(tmp_path: Path) -> None:
    path = tmp_path / "here" / "ledger.jsonl"
    with Ledger(path, *WORK) as ledger:
        ledger.add({"n": 1})
        ledger.add({"n": 2})
    with open(path, "ab") as file:
        file.write(b'{"n": 3, "half')
    with Ledger(path, *WORK) as ledger:
        assert ledger.entries == [{"n": 1}, {"n": 2}]
        ledger.add({"n": 3})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"a": 1}, {"n": 1}, {"n": 2}, {"n": 3}]


def test_a_full_disk_is_said_and_nothing_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    with Ledger(path, *WORK) as ledger:
        ledger.add({"n": 1})
    with (
        room_for(path.stat().st_size + 5),
        pytest.raises(M3Error, match=r"make room; the same command then goes on"),
        Ledger(path, *WORK) as ledger,
    ):
        ledger.add({"n": "x" * 100})
    with room_for(3), pytest.raises(M3Error, match="give another place with --out DIR"):
        Ledger(tmp_path / "new.jsonl", *WORK)
    with Ledger(path, *WORK) as ledger:
        assert ledger.entries == [{"n": 1}]


def test_other_work_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    with Ledger(path, *WORK), pytest.raises(M3Error, match="another experiment is at work there"):
        Ledger(path, *WORK)
    with Ledger(path, {"a": 2}, *WORK[1:]):
        pass  # nothing had been done, so nothing is lost
    with Ledger(path, *WORK) as ledger:
        ledger.add({"n": 1})
    with pytest.raises(M3Error, match="holds another experiment, which differs in a, b"):
        Ledger(path, {"a": 2, "b": 1}, *WORK[1:])
    path.write_text('{"mine": 1}\n')
    with pytest.raises(M3Error, match="which differs in a, mine"):
        Ledger(path, *WORK)
    path.write_text("{}\nno\n")
    with pytest.raises(M3Error, match="is no journal of an experiment"):
        Ledger(path, *WORK)


def test_a_file_of_somebody_elses_is_left_as_it_is(tmp_path: Path) -> None:
    """Whatever it holds; only a first line of our own that a kill cut short is begun again."""
    path = tmp_path / "ledger.jsonl"
    for mine in (
        "thesis",
        '{"a": 1',
        '{"b": 1}',
        '{"a": 2, "b": 1}\n',
        '{"b": 1}\nhalf',
        '{"a": 2}\n{"n": 1}\n{"n":',
        "\n",
    ):
        path.write_text(mine)
        if mine == '{"a": 1':
            with Ledger(path, *WORK) as ledger:
                ledger.add({"n": 1})
            assert path.read_text() == '{"a": 1}\n{"n": 1}\n'
            continue
        with pytest.raises(M3Error, match=r"give another place with --out DIR"):
            Ledger(path, *WORK)
        assert path.read_text() == mine
