"""The registry: every row is whole, and what reads, writes and names formats follows it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.checkpoint_suite import info_of, read, write_file

from m3jax.checkpoints import Checkpoint, FileFingerprint, formats, open_checkpoint, open_safetensors
from m3jax.checkpoints.formats import FORMATS, MSGPACK, ORBAX, PYTORCH, SAFETENSORS, WRITTEN, Format, written
from m3jax.checkpoints.inspection import look_at
from m3jax.checkpoints.opening import recognise
from m3jax.checkpoints.protocol import Closing, in_natural_order, room_for
from m3jax.checkpoints.remote import as_path
from m3jax.checkpoints.views import stored_at
from m3jax.cli.commands import main
from m3jax.errors import M3Error
from m3jax.outputs.conversion import convert


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A model of two tensors, 16 bytes each."""
    return write_file(tmp_path / "source.safetensors", dict.fromkeys(("a.x", "a.y"), np.arange(4, dtype=np.float32)))


def test_rows_are_told_apart() -> None:
    names = [format.name for format in FORMATS]
    endings = [ending for format in FORMATS for ending in format.endings]
    assert len(set(names)) == len(names)
    assert len(set(endings)) == len(endings)
    for format in FORMATS:
        for file in (format.single_file, format.index_file):
            assert not file or [row for row in FORMATS if row.names(file)] == [format]


@pytest.mark.parametrize("format", FORMATS, ids=lambda row: row.name)
def test_what_a_row_names_is_there(format: Format, tmp_path: Path) -> None:
    assert format.resembles is None or format.resembles(tmp_path) is False
    with pytest.raises(M3Error):
        format.open(tmp_path / f"absent{''.join(format.endings[:1])}")


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("limit", [10**9, 16])
def test_what_is_written_is_recognised(source: Path, tmp_path: Path, name: str, limit: int) -> None:
    out, format = tmp_path / "out", written(name)
    out.mkdir()
    (out / "config.json").write_text("{}")
    with open_safetensors(source) as checkpoint:
        assert format.write is not None
        format.write(out, checkpoint, limit)
    assert recognise(out) is format
    files = {path.name for path in out.iterdir()}
    assert (format.single_file in files) == (format.divides and limit > 16)
    assert (format.index_file in files) == (format.divides and limit == 16)
    with open_checkpoint(out) as checkpoint:
        assert list(checkpoint.tensors) == ["a.x", "a.y"]


def test_what_is_not_written_is_named() -> None:
    for name in (PYTORCH.name, "torch", ""):
        with pytest.raises(M3Error, match="is no format to convert to: choose safetensors, orbax, msgpack"):
            written(name)


@pytest.mark.parametrize(
    ("url", "format"),
    [
        ("gs://bucket/model.safetensors.index.json", SAFETENSORS),
        ("s3://bucket/pytorch_model.bin", PYTORCH),
        ("s3://bucket/flax_model.msgpack", MSGPACK),
    ],
)
def test_remote_paths_are_known_by_name(url: str, format: Format) -> None:
    if format.remote:
        assert recognise(as_path(url)) is format
        return
    with pytest.raises(M3Error, match="is msgpack, which is read from this disk only: download it first"):
        recognise(as_path(url))


def test_pytorchs_files_are_taken_from_no_directory_that_holds_something_else(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").touch()
    assert recognise(tmp_path) is PYTORCH
    (tmp_path / "checkpoint_3").write_bytes(b"\x80")
    assert recognise(tmp_path) is MSGPACK
    (tmp_path / "_METADATA").touch()
    assert recognise(tmp_path) is ORBAX


class Archive(Closing):
    """The arrays of one of numpy's archives, as a package from outside could read them."""

    def __init__(self, path: Path) -> None:
        with np.load(path) as archive:
            self._arrays = {name: archive[name] for name in archive.files}
        self.location, self._path, self.metadata = str(path), path, {}
        self.tensors = in_natural_order({name: info_of(name, array) for name, array in self._arrays.items()})

    def read_into(self, name: str, start: int, out: Any) -> None:
        view = room_for(self, name, start, out)
        view[:] = self._arrays[name].tobytes()[start : start + len(view)]

    def files(self) -> tuple[Path, ...]:
        return (self._path,)

    def fingerprint(self) -> dict[str, FileFingerprint]:
        return {}

    def close(self) -> None:
        self._arrays.clear()


def test_a_row_is_all_that_a_format_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = Format("archive", "*.npz", Archive, endings=(".npz",))
    monkeypatch.setattr(formats, "FORMATS", (*FORMATS, row))
    np.savez(tmp_path / "weights.npz", w=np.arange(6, dtype=np.float32).reshape(2, 3))
    with open_checkpoint(tmp_path / "weights.npz") as checkpoint:
        assert isinstance(checkpoint, Checkpoint)
        assert stored_at(checkpoint, "w") == (str(tmp_path / "weights.npz"), "w")
        assert read(checkpoint, "w").tolist() == [[0, 1, 2], [3, 4, 5]]
    assert look_at(str(tmp_path / "weights.npz")).format == "archive"
    result = convert(tmp_path / "weights.npz", tmp_path / "out")
    assert (result.tensors, result.bytes) == (1, 24)
    assert recognise(tmp_path) is row
    (tmp_path / "weights.npz").unlink()
    with pytest.raises(M3Error, match=r"looked for \*\.safetensors, .*, \*\.npz; give the directory"):
        recognise(tmp_path)
    with pytest.raises(M3Error, match="'archive' is no format to convert to"):
        written("archive")


def test_the_command_line_offers_what_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "--help"]) == 0
    assert "|".join(WRITTEN) in capsys.readouterr().out
