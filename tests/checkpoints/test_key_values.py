"""Where TensorStore is sent for files, and what is said when it comes back without them."""

from pathlib import Path

import pytest
from support.object_store import SECRET, point_at

from m3jax.checkpoints.key_values import context, files_at, unusable
from m3jax.checkpoints.remote import as_path


def test_places(monkeypatch) -> None:
    assert files_at(Path("/models/a")) == {"driver": "file", "path": "/models/a/"}
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:9")
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", "")  # so that what is set here goes again
    monkeypatch.delenv("TENSORSTORE_GCS_HTTP_URL")
    monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "any")
    assert files_at(as_path("gs://bucket/run/7")) == {"driver": "gcs", "bucket": "bucket", "path": "run/7/"}
    point_at(monkeypatch, 9)
    told = files_at(as_path("s3://bucket/run"))
    assert (told["driver"], told["bucket"], told["path"]) == ("s3", "bucket", "run/")
    assert (told["endpoint"], told["aws_region"]) == ("http://127.0.0.1:9", "us-east-1")
    assert SECRET not in str(told)
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    monkeypatch.setattr("m3jax.checkpoints.key_values.file_system", lambda _: Provider())
    assert "endpoint" not in files_at(as_path("s3://bucket/run"))
    assert files_at(as_path("s3://bucket/run"))["aws_credentials"] == {"type": "anonymous"}


class Provider:
    """The driver of the provider's own storage, without credentials."""

    anon = True

    class s3:  # noqa: N801
        class meta:  # noqa: N801
            endpoint_url = "https://s3.eu-west-1.amazonaws.com"

    def connect(self) -> None:
        pass


@pytest.mark.parametrize(
    ("place", "reason", "words"),
    [
        ("gs://bucket/run/7", "PERMISSION_DENIED", "in gs://bucket/run/7 is refused: check that the credentials"),
        ("s3://bucket/run/7", "UNAUTHENTICATED", "needs credentials, and none are found"),
        ("s3://bucket/run/7", "ABORTED", "cannot be reached: check the network and the endpoint"),
        ("s3://bucket/run/7", "DATA_LOSS", r"is damaged or missing \(DATA_LOSS\): get the checkpoint again"),
        ("/run/7", "PERMISSION_DENIED", r"is damaged or missing \(PERMISSION_DENIED\)"),
    ],
)
def test_sentences(place, reason, words) -> None:
    error = unusable("array 'w'", as_path(place), ValueError(f"{reason}: {SECRET} at https://…"))
    assert SECRET not in str(error)
    with pytest.raises(type(error), match=words):
        raise error


def test_no_sentence_quotes_what_is_no_status() -> None:
    error = unusable("array 'w'", as_path("/run/7"), TypeError("Unable to cast an object of the C++ type std::string"))
    assert str(error).startswith("array 'w' in /run/7 is damaged or missing (TypeError): get the checkpoint again")


def test_waits_are_bounded() -> None:
    for name in ("s3_request_retries", "gcs_request_retries"):
        assert context().spec.to_json()[name]["max_retries"] == 6
