"""What the command line says of work that is interrupted."""

import pytest

from m3jax.cli.shell import resumable


@pytest.mark.parametrize(
    ("made", "step", "words"),
    [
        ("out.partial", None, "what is finished is in {place}, and the same command resumes"),
        ("out/4.partial", 4, "what is finished is in {place}, and the same command with --step 4 resumes"),
        ("out/checkpoints/4.partial", 4, "what is finished is in {place}, and the same command with --step 4 resumes"),
        ("elsewhere", 4, "nothing is kept"),
    ],
)
def test_what_an_interrupted_merge_keeps(tmp_path, made, step, words) -> None:
    place = tmp_path / made
    place.mkdir(parents=True)
    with pytest.raises(KeyboardInterrupt) as caught, resumable(str(tmp_path / "out"), step=step):
        raise KeyboardInterrupt
    assert str(caught.value) == words.format(place=place)


def test_what_an_interrupted_merge_keeps_in_a_bucket() -> None:
    with pytest.raises(KeyboardInterrupt) as caught, resumable("gs://bucket/run", step=4):
        raise KeyboardInterrupt
    told = "what has been sent to gs://bucket/run for step 4 is kept, and the same command with --step 4 resumes"
    assert str(caught.value) == told
