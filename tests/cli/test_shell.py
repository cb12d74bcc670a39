"""What the command line says of work that is interrupted."""

import pytest

from m3jax.cli.commands import main
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


@pytest.mark.parametrize(
    ("begun", "ends"),
    [
        ("m3jax me", ["merge", "methods"]),
        ("m3jax explore --strategy a", ["auto"]),
        ("m3jax statistics --kind ", ["fisher", "gram"]),
        ("m3jax methods dar", ["dare", "dare_linear", "dare_ties"]),
        ("m3jax recipe new nu", ["nuslerp"]),
    ],
)
def test_completion_is_printed_and_answers(begun, ends, monkeypatch, capsys) -> None:
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")  # the shell is named, not looked for
    with pytest.raises(SystemExit) as ended:
        main(["--show-completion", "bash"])
    assert not ended.value.code
    assert "complete -o default -F _m3jax_completion m3jax" in capsys.readouterr().out
    monkeypatch.setenv("_M3JAX_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", begun)
    monkeypatch.setenv("COMP_CWORD", str(begun.count(" ")))
    with pytest.raises(SystemExit):
        main([])
    assert capsys.readouterr().out.split() == ends


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("merge r.yaml out --dtype bfloat16", "dtype is a key of recipes, which --set dtype=VALUE changes"),
        ("merge r.yaml out --nothing", "see `m3jax merge --help`"),
        ("merge r.yaml out --seeds 0-3", "--seeds: 0-3 is no range of seeds; write 0..3"),
        ("verify run@10", "run@10: names a step of a run, not a directory: give the step's own, run/10"),
        ("merge r.yaml out --mesh fsdp=9", "XLA_FLAGS=--xla_force_host_platform_device_count=9"),
        ("statistics none r.yaml --data none.jsonl", "r.yaml: exists already"),
    ],
)
def test_slips_are_answered_with_the_mend(command, said, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "r.yaml").write_text("merge_method: linear\nmodels: [a, b]\nmixup: {alpha: 1}\n")
    assert main(command.split()) == 2
    assert said in capsys.readouterr().err
