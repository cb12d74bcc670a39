"""What is copied with an item of Orbax: the step's own regular files, and no code."""

import os
import shutil
import socket
import stat
from pathlib import Path

import numpy as np
import pytest
from support.directories import write
from support.object_store import google

from m3jax import convert, merge_checkpoint, verify
from m3jax.checkpoints import open_safetensors, write_orbax
from m3jax.checkpoints.orbax_beside import copy_beside, find_beside
from m3jax.checkpoints.orbax_template import read_template
from m3jax.checkpoints.remote import as_path
from m3jax.errors import M3Error

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """A step with the item `default` and, beside it, `extra`."""
    place = tmp_path_factory.mktemp("original")
    write(place / "model", {"a.w": np.ones((2, 3), np.float32)})
    (place / "1" / "extra" / "deep").mkdir(parents=True)
    with open_safetensors(place / "model") as source:
        write_orbax(place / "1" / "default", source)
    (place / "1" / "extra" / "metadata").write_text("{}")
    (place / "1" / "extra" / "deep" / "values").write_bytes(bytes(range(256)))
    return place / "1"


@pytest.fixture
def step(original: Path, tmp_path: Path) -> Path:
    shutil.copytree(original, tmp_path / "run" / "1")
    return tmp_path / "run" / "1"


def ways(step: Path, out: Path):
    """A conversion and a merge, which copy what stands beside."""
    yield lambda: convert(step, out, "orbax")
    yield lambda: merge_checkpoint({"merge_method": "linear", "models": [str(step)]}, out)


def refused(step: Path, *words: str) -> None:
    out = step.parent.parent / "out"
    for way in ways(step, out):
        with pytest.raises(M3Error) as caught:
            way()
        assert all(word in str(caught.value) for word in words), caught.value
        assert str(caught.value).endswith(".")
        assert not out.exists()
        assert not out.with_name("out.partial").exists()


@pytest.mark.parametrize(
    "name",
    [
        "extra/notes.txt",
        "extra/deep/notes.txt",
        "orbax.checkpoint",
        "_CHECKPOINT_METADATA",
        "default/_strings.json",
        "default/_sharding",
        "default/array_metadatas/process_0",
    ],
)
def test_links_that_lead_out_of_the_step_are_refused(step: Path, name: str) -> None:
    (step.parent / "secret").write_text('{"token": 1}')
    (step / name).parent.mkdir(exist_ok=True)
    (step / name).symlink_to(step.parent / "secret")
    refused(step, f"{step / name} leads out of the model, to /", "put a copy there")


def test_directories_that_are_links_are_refused_and_never_walked_round(step: Path) -> None:
    (step / "extra" / "a").symlink_to(".")
    refused(step, f"{step}/extra/a is a link to a directory: put a copy there")
    (step / "extra" / "a").unlink()
    (step / "extra" / "etc").symlink_to("/etc")
    refused(step, f"{step}/extra/etc is a link to a directory")
    (step / "extra" / "etc").unlink()
    elsewhere = step.parent / "elsewhere"
    (step / "extra").rename(elsewhere)
    (step / "extra").symlink_to(elsewhere)
    refused(step, f"{step}/extra is a link to a directory")


def test_what_is_no_file_is_refused(step: Path) -> None:
    for name in ("extra/pipe", "default/_strings.json"):
        os.mkfifo(step / name)
        refused(step, f"{step / name} is not a regular file")
        (step / name).unlink()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(step / "extra" / "s"))
        refused(step, f"{step}/extra/s is not a regular file")
    (step / "extra" / "s").unlink()
    (step / "extra" / "gone").symlink_to("nothing")
    refused(step, f"{step}/extra/gone is a link to what is not there")


def test_what_is_read_whole_has_a_largest_size(step: Path) -> None:
    for name in ("default/_strings.json", "default/_sharding", "orbax.checkpoint", "extra/config.json"):
        with open(step / name, "wb") as file:
            file.truncate(2**40)
        refused(step, f"{step / name} has 1,099,511,627,776 bytes")
        (step / name).unlink()


def test_links_that_stay_inside_are_copied_as_files(step: Path, tmp_path: Path) -> None:
    (step / "extra" / "same").symlink_to("deep/values")
    for number, way in enumerate(ways(step, tmp_path / "out")):
        way()
        copies = [tmp_path / "out" / "extra" / name for name in ("same", "deep/values")]
        assert not copies[0].is_symlink()
        assert copies[0].read_bytes() == copies[1].read_bytes() == bytes(range(256))
        assert verify(tmp_path / "out").differences == ()
        (tmp_path / "out").rename(tmp_path / f"out-{number}")


def test_a_snapshot_of_the_hub_cache_leads_to_its_own_blobs(step: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--tiny" / "snapshots" / COMMIT
    (tmp_path / "models--org--tiny" / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    shutil.copytree(step, snapshot / "1")
    (tmp_path / "models--org--tiny" / "blobs" / "abc").write_text("blob")
    (snapshot / "1" / "extra" / "more").symlink_to("../../../../blobs/abc")
    assert set(find_beside([snapshot / "1" / "extra"]).files) == {
        "extra/metadata", "extra/more", "extra/deep/values"
    }  # fmt: skip


def test_code_is_neither_copied_nor_named_and_is_told_of(step: Path, tmp_path: Path) -> None:
    (step / "extra" / "modeling.py").write_text("print(1)")
    (step / "extra" / "linked.py").symlink_to("/etc/passwd")
    (step / "extra" / "config.json").write_text('{"auto_map": {"AutoModel": "modeling.Model"}, "width": 2}')
    said = (
        f"{step} brings Python code (extra/linked.py, extra/modeling.py, auto_map in extra/config.json): it is never"
        " run, and neither files nor keys are copied."
    )
    for number, way in enumerate(ways(step, tmp_path / "out")):
        assert said in way().notes
        names = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*")}
        assert not any(name.endswith(".py") for name in names)
        assert "auto_map" not in (tmp_path / "out" / "extra" / "config.json").read_text()
        assert '"width": 2' in (tmp_path / "out" / "extra" / "config.json").read_text()
        assert verify(tmp_path / "out").differences == ()
        (tmp_path / "out").rename(tmp_path / f"out-{number}")


def test_copies_are_as_closed_as_what_they_are_of(step: Path, tmp_path: Path) -> None:
    (step / "extra" / "metadata").chmod(0o600)
    (step / "extra" / "deep").chmod(0o700)
    (step / "default" / "_strings.json").write_text("{}")
    (step / "default" / "_strings.json").chmod(0o600)
    for number, way in enumerate(ways(step, tmp_path / "out")):
        way()
        for name, mode in (
            ("extra/metadata", 0o600),
            ("extra/deep", 0o700),
            ("extra/deep/values", 0o644),
            ("default/_strings.json", 0o600),
        ):
            assert stat.S_IMODE((tmp_path / "out" / name).stat().st_mode) == mode, name
        (tmp_path / "out").rename(tmp_path / f"out-{number}")


def test_a_file_that_becomes_another_as_it_is_copied_is_refused(step: Path, tmp_path: Path, monkeypatch) -> None:
    from m3jax.checkpoints import orbax_beside

    plain = orbax_beside.open_file

    def swapped(path: Path) -> int:
        path.unlink()
        path.symlink_to("/etc/passwd")
        return plain(path)

    monkeypatch.setattr(orbax_beside, "open_file", swapped)
    with pytest.raises(M3Error, match="has changed since"):
        copy_beside([step / "extra"], tmp_path)
    assert not (tmp_path / "extra" / "metadata").exists()


def test_a_remote_step_brings_no_code_and_leads_nowhere_else(step: Path, tmp_path: Path, monkeypatch) -> None:
    (step / "extra" / "modeling.py").write_text("print(1)")
    (step / "extra" / "config.json").write_text('{"auto_map": 1}')
    with google(monkeypatch) as gcs:
        place = gcs.put_all(step, "runs/1")
        gcs.put("runs/1/commit_success.txt", b"")
        result = convert(place, tmp_path / "out", "orbax")
        assert f"{place} brings Python code (extra/modeling.py, auto_map in extra/config.json)" in " ".join(
            result.notes
        )
        there = {path.name for path in (tmp_path / "out" / "extra").rglob("*") if path.is_file()}
        assert there == {"metadata", "values", "config.json"}
        assert (tmp_path / "out" / "extra" / "config.json").read_text() == "{}\n"
        gcs.put("runs/1/extra/../../evil", b"")
        with pytest.raises(M3Error, match=r"which no output can have: rename it"):
            find_beside(read_template(as_path(place)).beside)
