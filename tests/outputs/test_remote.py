import json
import os
import tempfile
from pathlib import Path

import pytest
from support.clusters import SHAPES, SHARD, recipe_file, run_all
from support.directories import recipe, write_models
from support.object_store import SECRET, answering, nobody, point_at, store

from m3jax import merge_checkpoint, replay, verify
from m3jax.errors import M3Error

KEYS = {"merge_method": "task_arithmetic", "sparsify": {"method": "dare", "density": 0.5}, "seed": 4}
OLD = {"output": {"files": {"tokenizer.json": ""}, "weight_files": {"model.safetensors": ""}}}
WRITES = ("put_object", "complete_multipart_upload")


@pytest.fixture
def s3(monkeypatch):
    with store(monkeypatch) as opened:
        yield opened


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("models")
    write_models(place, shapes=SHAPES)
    (place / "base" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    merge_checkpoint(recipe(place, **KEYS), place / "reference", max_shard_size=SHARD)
    return place


@pytest.fixture(autouse=True)
def scratch(monkeypatch, tmp_path):
    """A place for scratch files of its own, empty again at the end."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    yield scratch
    assert not [entry for entry in scratch.iterdir() if entry.name.startswith("m3jax-") and any(entry.iterdir())]


def merge(place, url, **options):
    return merge_checkpoint(recipe(place, **KEYS), url, max_shard_size=SHARD, **options)


def contents(directory: Path):
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def stored(s3, prefix="out"):
    return {name: s3.driver.cat_file(f"{s3.bucket}/{prefix}/{name}") for name in s3.names(prefix)}


def sent(s3):
    """The names of what was written, journals aside."""
    keys = [request.key for request in s3.requests if request.method in WRITES]
    return [key.removeprefix("out/") for key in keys if "journal" not in key]


def test_a_remote_output_is_that_of_a_local_merge(s3, place) -> None:
    result = merge(place, f"{s3.url}/out")
    assert stored(s3) == contents(place / "reference")
    assert sent(s3)[-3:] == ["m3jax.json", "model.safetensors.index.json", "config.json"]
    assert str(result.directory) == f"{s3.url}/out"


def test_a_remote_output_is_verified_and_replayed(s3, place, tmp_path) -> None:
    merge(place, f"{s3.url}/out")
    assert not verify(f"{s3.url}/out").differences
    assert replay(f"{s3.url}/out", tmp_path / "again").digest == verify(f"{s3.url}/out").digest
    s3.driver.pipe_file(f"{s3.bucket}/out/config.json", b"{}")
    assert verify(f"{s3.url}/out").differences == ("config.json: has changed",)


def test_an_interrupted_merge_is_no_model_and_goes_on(s3, place, monkeypatch) -> None:
    plain, allowed = s3.driver.put_file, 3

    def put(*args, **options):
        nonlocal allowed
        if allowed == 0:
            raise KeyboardInterrupt
        allowed -= 1
        plain(*args, **options)

    monkeypatch.setattr(s3.driver, "put_file", put)
    with pytest.raises(KeyboardInterrupt):
        merge(place, f"{s3.url}/out")
    names = s3.names("out")
    assert not {"config.json", "model.safetensors.index.json", "m3jax.json"} & names
    assert len([name for name in names if name.endswith(".safetensors")]) == 3
    s3.driver.rm_file(f"{s3.bucket}/out/{min(n for n in names if n.endswith('.safetensors'))}")  # lost since
    allowed = 10**6
    assert merge(place, f"{s3.url}/out").resumed_shards == 2
    assert stored(s3) == contents(place / "reference")


@pytest.mark.parametrize("old", [False, True])
def test_a_merge_goes_on_wherever_its_sending_ends(s3, place, monkeypatch, old) -> None:
    """At the small files too, which come last, and where the model that it replaces is none any more."""
    plain, sends = s3.driver.put_file, len(contents(place / "reference"))
    for allowed, is_sent in ((0, True), (1, False), (sends - 4, True), (sends - 1, False)):
        left = [None] * allowed
        for name in s3.names("out"):
            s3.driver.rm_file(f"{s3.bucket}/out/{name}")
        for name in ("m3jax.json", "model.safetensors", "tokenizer.json") if old else ():
            s3.driver.pipe_file(f"{s3.bucket}/out/{name}", json.dumps(OLD).encode())

        def put(*args, left=left, is_sent=is_sent, **options):
            if not left:
                if is_sent:  # and nothing tells of it
                    plain(*args, **options)
                raise KeyboardInterrupt
            left.pop()
            plain(*args, **options)

        monkeypatch.setattr(s3.driver, "put_file", put)
        with pytest.raises(KeyboardInterrupt):
            merge(place, f"{s3.url}/out", overwrite=old)
        monkeypatch.setattr(s3.driver, "put_file", plain)
        merge(place, f"{s3.url}/out", overwrite=old)
        assert stored(s3) == contents(place / "reference")


def test_what_somebody_puts_there_meanwhile_is_named_and_stays(s3, place) -> None:
    def drop(progress):
        s3.driver.pipe_file(f"{s3.bucket}/out/notes.txt", b"mine")

    with pytest.raises(M3Error, match=r"notes\.txt: is no part of the merge"):
        merge(place, f"{s3.url}/out", progress=drop)
    assert stored(s3)["notes.txt"] == b"mine"
    s3.driver.rm_file(f"{s3.bucket}/out/notes.txt")
    assert merge(place, f"{s3.url}/out").resumed_shards > 0
    assert stored(s3) == contents(place / "reference")


def test_another_merge_begins_anew(s3, place, monkeypatch) -> None:
    plain, left = s3.driver.put_file, [None] * 3

    def put(*args, **options):
        if not left:
            raise KeyboardInterrupt
        left.pop()
        plain(*args, **options)

    monkeypatch.setattr(s3.driver, "put_file", put)
    with pytest.raises(KeyboardInterrupt):
        merge_checkpoint(recipe(place, **KEYS | {"seed": 5}), f"{s3.url}/out", max_shard_size=SHARD)
    monkeypatch.setattr(s3.driver, "put_file", plain)
    assert merge(place, f"{s3.url}/out").resumed_shards == 0
    assert stored(s3) == contents(place / "reference")


def test_what_is_there_is_kept_unless_overwritten(s3, place) -> None:
    s3.driver.pipe_file(f"{s3.bucket}/out/model.safetensors", b"old")
    s3.driver.pipe_file(f"{s3.bucket}/out/config.json", b"{}")
    with pytest.raises(M3Error, match="exists already"):
        merge(place, f"{s3.url}/out")
    with pytest.raises(M3Error, match=r"holds no m3jax\.json of an output, and only what m3jax"):
        merge(place, f"{s3.url}/out", overwrite=True)
    assert stored(s3) == {"model.safetensors": b"old", "config.json": b"{}"}
    s3.driver.pipe_file(f"{s3.bucket}/out/m3jax.json", json.dumps({"output": {"files": {"config.json": ""}}}).encode())
    merge(place, f"{s3.url}/out", overwrite=True)
    assert stored(s3) == contents(place / "reference")
    s3.driver.pipe_file(f"{s3.bucket}/notes/plan.txt", b"mine")
    with pytest.raises(M3Error, match=r"holds no m3jax\.json"):
        merge(place, f"{s3.url}/notes", overwrite=True)
    assert stored(s3, "notes") == {"plan.txt": b"mine"}


@pytest.mark.parametrize(
    "file", ["thesis.txt", "runs/logs.txt", "my_finetune.safetensors", "m3jax-journal-thesis.json"]
)
def test_what_is_not_of_the_old_output_is_not_removed(s3, place, file) -> None:
    merge(place, f"{s3.url}/out")
    s3.driver.pipe_file(f"{s3.bucket}/out/{file}", b"mine")
    before = stored(s3)
    with pytest.raises(M3Error, match=rf"{file} is not of the output that is to be replaced: move it away"):
        merge(place, f"{s3.url}/out", overwrite=True)
    assert stored(s3) == before


def test_a_journal_that_claims_whatever_is_there_is_not_believed(s3, place) -> None:
    s3.driver.pipe_file(f"{s3.bucket}/out/thesis.txt", b"mine")
    journal = {"identity": "x", "entries": [], "names": ["*"]}
    s3.driver.pipe_file(f"{s3.bucket}/out/m3jax-journal-0.json", json.dumps(journal).encode())
    with pytest.raises(M3Error, match="exists already"):
        merge(place, f"{s3.url}/out")
    assert stored(s3)["thesis.txt"] == b"mine"


def test_places_that_cannot_be(s3, place, monkeypatch) -> None:
    for url, words in (
        (s3.url, "is a whole bucket"),
        (f"s3://none-of-this-name-{os.getpid()}/out", "does not exist"),
    ):
        with pytest.raises(M3Error, match=words):
            merge(place, url)
    s3.driver.pipe_file(f"{s3.bucket}/file", b"one")
    with pytest.raises(M3Error, match="is an object"):
        merge(place, f"{s3.url}/file")
    with answering(403) as port:
        point_at(monkeypatch, port)
        with pytest.raises(M3Error, match="is refused") as caught:
            merge(place, f"{s3.url}/out")
        assert SECRET not in str(caught.value)
    point_at(monkeypatch, nobody())
    with pytest.raises(M3Error, match="cannot be reached"):
        merge(place, f"{s3.url}/out")


@pytest.mark.slow
def test_several_processes_without_shared_storage(s3, place, tmp_path) -> None:
    codes, _, errors = run_all(recipe_file(place, tmp_path, KEYS), f"{s3.url}/out", 2, "--quiet")
    assert codes == [0, 0], errors
    assert stored(s3) == contents(place / "reference")
