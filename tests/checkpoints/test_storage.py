import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from support import torch_files
from support.object_store import SECRET, answering, cutting, google, nobody, point_at, store, write_model

from m3jax.checkpoints import companions, locate_model, open_checkpoint, open_safetensors
from m3jax.checkpoints.inspection import look_at
from m3jax.checkpoints.locate import download_companions, read_config
from m3jax.checkpoints.remote import RemotePath, as_path, file_system
from m3jax.checkpoints.storage import RemoteSource
from m3jax.errors import M3Error
from m3jax.streaming.merging import merge_checkpoint

PIECE = 2**20


@pytest.fixture
def s3(monkeypatch):
    with store(monkeypatch) as opened:
        yield opened


@pytest.fixture
def model(tmp_path):
    """Two shards of 4 MiB and 2 MiB."""
    return write_model(tmp_path / "model", 0, (512, 1024), 6, 4 * 2**20)


def read(checkpoint, name, piece=PIECE):
    out = np.empty(checkpoint.tensors[name].nbytes, np.uint8)
    for start in range(0, out.size, piece):
        checkpoint.read_into(name, start, out[start : start + piece])
    return out.tobytes()


def sentence(caught) -> str:
    text = str(caught.value)
    assert text.endswith(".")
    assert "\n" not in text
    assert SECRET not in text
    return text


# --- Paths -----------------------------------------------------------------------------------------------


def test_a_remote_path() -> None:
    path = as_path("s3://bucket/models//tiny/")
    assert str(path) == "s3://bucket/models/tiny"
    assert (path.name, path.suffix, str(path.parent)) == ("tiny", "", "s3://bucket/models")
    assert str(path / "a/b.json") == "s3://bucket/models/tiny/a/b.json"
    assert (path / "b.json").suffix == ".json"
    assert [str(parent) for parent in path.parents] == ["s3://bucket/models", "s3://bucket"]
    assert path == as_path(path) == as_path("S3://bucket/models/tiny") == RemotePath("s3", path.key)
    assert path.resolve() == path
    assert len({path, as_path("s3://bucket/models/tiny")}) == 1
    bucket = as_path("gs://bucket")
    assert bucket.parent == bucket


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("ftp://user:hidden@host/model", "ftp:// is no storage that can be read here: write s3://bucket/path, gs://"),
        ("s3://key:hidden@bucket/model", "leave credentials to the environment"),
        ("s3://bucket/model?X-Amz-Signature=hidden", "leave credentials to the environment"),
        ("gs://bucket/model#hidden", "leave credentials to the environment"),
        ("s3://", "does not name a bucket"),
        ("s3:///model", "does not name a bucket"),
        ("s3://bucket/../other", "does not name a bucket"),
    ],
)
def test_addresses_that_are_none(url, words) -> None:
    for find in (locate_model, open_safetensors):
        with pytest.raises(M3Error) as caught:
            find(url)
        assert words in sentence(caught)
        assert "hidden" not in str(caught.value)


def test_drivers_are_imported_when_a_url_is_used() -> None:
    code = "import sys, m3jax.checkpoints; sys.exit(bool({'fsspec', 's3fs', 'botocore', 'aiohttp'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_driver_that_is_not_installed(monkeypatch) -> None:
    import fsspec

    def fail(*args, **options):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "filesystem", fail)
    file_system.cache_clear()
    with pytest.raises(M3Error, match=r"s3:// needs the package s3fs: run `pip install 'm3jax\[s3\]'`"):
        locate_model("s3://bucket/model")
    with pytest.raises(M3Error, match=r"gs:// needs the package gcsfs: run `pip install 'm3jax\[gcs\]'`"):
        locate_model("gs://bucket/model")


# --- Reading ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["", "/model.safetensors.index.json", "/model-00002-of-00002.safetensors"])
def test_a_remote_model_is_the_local_one(s3, model, place) -> None:
    url = s3.put(model, "models/tiny") + place
    found = locate_model(url)
    assert (found.name, str(found.path), found.revision) == (url, url, None)
    with open_safetensors(found.path) as remote, open_safetensors(f"{model}{place}") as local:
        assert remote.location == url
        assert remote.tensors == local.tensors
        assert list(remote.tensors) == list(local.tensors)
        assert remote.metadata == local.metadata
        for name in local.tensors:
            assert read(remote, name) == read(local, name)
        assert [path.name for path in remote.files()] == [path.name for path in local.files()]
        assert [path.stat().st_size for path in remote.files()] == [path.stat().st_size for path in local.files()]
        told = remote.fingerprint()
        for file, fingerprint in local.fingerprint().items():
            assert told[file]["size"] == fingerprint["size"]
            assert told[file]["header_blake3"] == fingerprint["header_blake3"]
    with pytest.raises(ValueError, match="is closed"):
        read(remote, name)


def test_a_bucket_can_be_a_model_and_files_need_no_index(s3, tmp_path) -> None:
    directory = write_model(tmp_path / "model", 0, (8,), 1, 10**6)
    for path in directory.iterdir():
        s3.driver.put_file(str(path), f"{s3.bucket}/{path.name}")
    with open_safetensors(s3.url) as remote, open_safetensors(directory) as local:
        assert read(remote, "layers.0.weight") == read(local, "layers.0.weight")
    s3.driver.mv(f"{s3.bucket}/model.safetensors", f"{s3.bucket}/weights.safetensors")
    with open_safetensors(s3.url) as remote:
        assert list(remote.tensors) == ["layers.0.weight"]


def test_many_threads_read_at_once(s3, model) -> None:
    url = s3.put(model, "model")
    with open_safetensors(url) as remote, open_safetensors(model) as local:
        names = list(local.tensors)

        def piece(k: int) -> bool:
            name, start, size = names[k % len(names)], k * 7919 % 900_000, 1 + k * 997 % 90_000
            outs = np.empty((2, size), np.uint8)
            remote.read_into(name, start, outs[0])
            local.read_into(name, start, outs[1])
            return bool((outs[0] == outs[1]).all())

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(piece, range(200)))


def test_a_merge_asks_for_each_byte_once_in_few_requests(s3, tmp_path) -> None:
    places = [write_model(tmp_path / f"model-{k}", k, (1024, 1024), 12, 16 * 2**20) for k in range(2)]
    urls = [s3.put(place, f"models/{place.name}") for place in places]
    recipe = {"merge_method": "linear", "seed": 3, "mixup": {"alpha": 0.5}, "dtype": "bfloat16"}
    results = [
        merge_checkpoint(recipe | {"models": [{"model": str(name)} for name in names]}, tmp_path / out)
        for names, out in ((places, "local"), (urls, "remote"))
    ]
    assert results[0].digest == results[1].digest
    for name in ("config.json", "tokenizer.json"):
        assert (tmp_path / "remote" / name).read_bytes() == (tmp_path / "local" / name).read_bytes()
    weights = [request for request in s3.ranges() if request.key.endswith(".safetensors")]
    total = sum(path.stat().st_size for place in places for path in place.glob("*.safetensors"))
    assert total <= sum(request.size for request in weights) <= 1.05 * total
    assert len(weights) <= 4 * 6  # of 50 pieces; a longer file takes one request for 16 MiB


def test_reading_ahead_stops_where_the_order_of_names_leaves_the_file(s3, tmp_path) -> None:
    # The writer puts wide entries first; names go through the file to and fro.
    from m3jax.checkpoints import ShardWriter, TensorInfo

    infos = [TensorInfo(f"layers.{k}", (200_000,), "F32" if k % 2 else "U8") for k in range(8)]
    (tmp_path / "model").mkdir()
    with ShardWriter(tmp_path / "model" / "model.safetensors", infos) as shard:
        for info in infos:
            shard.write(info.name, 0, np.random.default_rng(0).integers(0, 9, info.nbytes, np.uint8))
        shard.finish()
    url = s3.put(tmp_path / "model", "model")
    with open_safetensors(url) as remote, open_safetensors(tmp_path / "model") as local:
        s3.requests.clear()
        for name in local.tensors:
            assert read(remote, name, 2**16) == read(local, name)
        assert sum(request.size for request in s3.ranges()) == sum(info.nbytes for info in infos)


def test_what_is_read_here_and_there_is_not_read_ahead(s3, model) -> None:
    url = s3.put(model, "model")
    with open_safetensors(url) as remote:
        s3.requests.clear()
        for name in remote.tensors:
            remote.read_into(name, 300_000, np.empty(2**17, np.uint8))
        assert [request.size for request in s3.ranges()] == [2**17] * 6


def test_a_long_read_is_several_requests(s3, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("m3jax.checkpoints.storage._WIDEST", 2**20)
    path = tmp_path / "object"
    path.write_bytes(np.random.default_rng(0).bytes(10 * 2**20 + 17))
    s3.driver.put_file(str(path), f"{s3.bucket}/object")
    source = RemoteSource(as_path(f"{s3.url}/object"))
    out = bytearray(11 * 2**20)
    assert source.read_into(memoryview(out), 5, len(out)) == 10 * 2**20 + 12
    assert out[: 10 * 2**20 + 12] == path.read_bytes()[5:]
    assert max(request.size for request in s3.ranges()) == 2**20
    assert source.read_into(memoryview(out), 11 * 2**20, len(out)) == 0
    source.close()


def test_memory_for_reading_ahead_is_bounded(s3, tmp_path, monkeypatch) -> None:
    path = tmp_path / "object"
    path.write_bytes(bytes(40 * 2**16))
    s3.driver.put_file(str(path), f"{s3.bucket}/object")
    source = RemoteSource(as_path(f"{s3.url}/object"))
    for k in range(40):
        source.read_into(memoryview(bytearray(1)), k * 2**16, 2**30)
        assert len(source._blocks) <= 8


def test_looking_at_a_remote_model(s3, model) -> None:
    url = s3.put(model, "model")
    remote, local = look_at(url), look_at(str(model))
    assert remote.location == url
    assert (remote.tensors, remote.files, remote.model) == (local.tensors, local.files, local.model)
    assert sum(request.size for request in s3.ranges()) < 2 * 2**16 + 2**12  # headers and the index


# --- What stands beside the weights ----------------------------------------------------------------------


def test_companions_are_copied_here(s3, model) -> None:
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "rag.jinja").write_text("{{ rag }}")
    (model / "README.md").write_text("not carried")
    path = locate_model(s3.put(model, "model")).path
    assert read_config(path) == {"model_type": "llama"}
    copies = companions(path)
    carried = ["additional_chat_templates/rag.jinja", "config.json", "tokenizer.json"]
    assert [copy.read_bytes() for copy in copies] == [(model / name).read_bytes() for name in carried]
    here = download_companions(path)
    assert sorted(copy.relative_to(here).as_posix() for copy in here.rglob("*") if copy.is_file()) == carried


def test_a_remote_model_without_a_config(s3, model) -> None:
    (model / "config.json").unlink()
    assert read_config(as_path(s3.put(model, "model"))) is None


def test_a_remote_model_of_pytorch(s3, tmp_path) -> None:
    rng = np.random.default_rng(0)
    arrays = {f"layers.{layer}.weight": rng.random((64, 96), np.float32) for layer in range(9)}
    torch_files.write_shards(tmp_path, arrays, 2)
    torch_files.write_arrays(tmp_path / "other.bin", arrays, strided=True)
    url = s3.put(tmp_path, "torch")
    for path in (url, f"{url}/other.bin"):
        with open_checkpoint(path) as remote:
            assert {name: read(remote, name) for name in arrays} == {n: a.tobytes() for n, a in arrays.items()}
            assert remote.fingerprint()
    assert look_at(url).format == "pytorch"


# --- What fails ------------------------------------------------------------------------------------------


def test_what_is_not_there(s3, model) -> None:
    url = s3.put(model, "model")
    s3.driver.rm_file(f"{s3.bucket}/model/model-00002-of-00002.safetensors")
    for name, words in (
        ("s3://no-such-bucket/model", "s3://no-such-bucket does not exist: check the name of the bucket"),
        (f"{s3.url}/nothing", f"{s3.url}/nothing does not exist: check the path"),
        (f"{url}/model-00002-of-00002.safetensors", "does not exist: check the path"),
        (url, "names 'model-00002-of-00002.safetensors', which is not there"),
    ):
        with pytest.raises(M3Error) as caught:
            open_safetensors(locate_model(name).path)
        assert words in sentence(caught)


@pytest.mark.parametrize("begun", [False, True])
def test_an_object_that_changes_while_it_is_read(s3, model, tmp_path, begun) -> None:
    url = s3.put(model, "model")
    other = write_model(tmp_path / "other", 1, (512, 1024), 6, 4 * 2**20)
    with open_safetensors(url) as remote:
        before = remote.fingerprint()
        if begun:
            remote.read_into("layers.0.weight", 0, np.empty(PIECE // 4, np.uint8))
        s3.put(other, "model")
        with pytest.raises(M3Error) as caught:
            read(remote, "layers.3.weight")
        assert "has changed since its header was read: start again" in sentence(caught)
        assert not isinstance(caught.value.__cause__, OSError)  # nothing to resume from
        after = remote.fingerprint()
        assert before != after
        assert before["model-00001-of-00002.safetensors"]["size"] == after["model-00001-of-00002.safetensors"]["size"]


def test_refused_credentials(monkeypatch) -> None:
    body = f"<Error><Code>AccessDenied</Code><Message>{SECRET} may not</Message></Error>".encode()
    with answering(403, body) as port:
        point_at(monkeypatch, port)
        with pytest.raises(M3Error) as caught:
            locate_model("s3://bucket/model")
        assert "s3://bucket/model is refused (403): check that the credentials" in sentence(caught)
        with pytest.raises(M3Error) as caught:
            list(as_path("s3://bucket/model").iterdir())
        assert "s3://bucket/model is refused (AccessDenied)" in sentence(caught)
    body = b"<Error><Code>AuthorizationHeaderMalformed</Code><Message>the region is wrong</Message></Error>"
    with answering(400, body) as port:
        point_at(monkeypatch, port)
        for name in ("s3://bucket/model", "s3://bucket/run@20"):
            with pytest.raises(M3Error) as caught:
                locate_model(name)
            assert "in another region: check AWS_DEFAULT_REGION" in sentence(caught)


def test_no_credentials(monkeypatch) -> None:
    point_at(monkeypatch, nobody())
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    with pytest.raises(M3Error) as caught:
        locate_model("s3://bucket/model")
    assert "needs credentials, and none are found" in sentence(caught)


def test_a_server_that_is_not_there(monkeypatch) -> None:
    point_at(monkeypatch, nobody())
    begun = time.monotonic()
    with pytest.raises(M3Error) as caught:
        locate_model("s3://bucket/model")
    assert time.monotonic() - begun < 60  # it gives up; how soon, a busy machine decides too
    assert "cannot be reached (EndpointConnectionError): check the network" in sentence(caught)
    assert isinstance(caught.value.__cause__, OSError)  # worth resuming from


@pytest.mark.slow
def test_a_server_that_fails(monkeypatch) -> None:
    with answering(500) as port:
        point_at(monkeypatch, port)
        with pytest.raises(M3Error) as caught:
            locate_model("s3://bucket/model")
        assert "cannot be used (500): check the path, or try again later" in sentence(caught)


def test_a_connection_that_is_cut_is_made_again(monkeypatch, model) -> None:
    with cutting(1, after=10**6) as port, store(monkeypatch, port) as s3:
        url = s3.put(model, "model")
        with open_safetensors(url) as remote, open_safetensors(model) as local:
            for name in local.tensors:
                assert read(remote, name) == read(local, name)


def test_connections_that_are_always_cut(monkeypatch, model) -> None:
    with cutting(10**6, after=10**5) as port, store(monkeypatch, port) as s3:
        url = s3.put(model, "model")
        with open_safetensors(url) as remote:
            with pytest.raises(M3Error) as caught:
                read(remote, "layers.0.weight")
            assert "model-00001-of-00002.safetensors cannot be reached (" in sentence(caught)
            assert isinstance(caught.value.__cause__, OSError)


# --- Google Cloud Storage --------------------------------------------------------------------------------


def test_a_model_in_google_cloud_storage(monkeypatch, model) -> None:
    with google(monkeypatch) as bucket:
        for path in model.iterdir():
            bucket.put(f"models/tiny/{path.name}", path.read_bytes())
        place = locate_model("gs://bucket/models/tiny")
        assert read_config(place.path) == {"model_type": "llama"}
        assert [copy.name for copy in companions(place.path)] == ["config.json", "tokenizer.json"]
        with open_safetensors(place.path) as remote, open_safetensors(model) as local:
            for name in local.tensors:
                assert read(remote, name) == read(local, name)
            before = remote.fingerprint()
            file = "model-00002-of-00002.safetensors"
            bucket.put(f"models/tiny/{file}", (model / file).read_bytes())
            assert remote.fingerprint() != before
            with pytest.raises(M3Error) as caught:
                read(remote, "layers.5.weight")
            assert f"gs://bucket/models/tiny/{file} has changed since" in sentence(caught)
        for name, words in (("gs://other/model", "gs://other does not"), ("gs://bucket/none", "none does not exist")):
            with pytest.raises(M3Error) as caught:
                locate_model(name)
            assert words in sentence(caught)
