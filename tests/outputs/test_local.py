"""The output directory: what it resumes from is checked, what is not ours stays, and what fails is said."""

import errno
import fcntl
import json
import os
import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file
from support.directories import recipe, write
from support.faults import Faults, Killed, contents

import m3jax
from m3jax import M3Error
from m3jax.checkpoints import ModelDirectory, shards
from m3jax.checkpoints.remote import as_path
from m3jax.cli.commands import main
from m3jax.outputs import directories
from m3jax.outputs.conversion import convert
from m3jax.outputs.journal import is_entry, line_of
from m3jax.outputs.local import Staging
from m3jax.outputs.places import check_apart

SHARD = 1000
WHOLE_MODEL = {"merge_method": "ties", "parameters": {"density": 0.5, "trim_scope": "model"}}


def tree(seed):
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal((20, 10)).astype(np.float32) for name in "abc"}


@pytest.fixture
def place(tmp_path):
    for seed, name in enumerate(("base", "expert-0", "expert-1")):
        write(tmp_path / "in" / name, tree(seed))
    return tmp_path / "in"


def merge(place, out, **options):
    return m3jax.merge_checkpoint(recipe(place, **WHOLE_MODEL), out, max_shard_size=SHARD, **options)


def killed(place, out):
    """A merge that is killed when it has finished two of three shards."""
    last = Faults(out.parent).until(lambda call: call.startswith("open") and "model-00003" in call)
    with pytest.raises(Killed), last:
        merge(place, out)
    return out.with_name(out.name + ".partial")


# --- Resuming -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["flipped", "cut", "removed", "another's"])
def test_finished_shards_are_hashed_again(place, tmp_path, damage):
    want = merge(place, tmp_path / "want")
    partial = killed(place, tmp_path / "out")
    shard = partial / "model-00001-of-00003.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    if damage == "another's":
        save_file({"a": tree(7)["a"]}, shard, {"format": "pt"})
    elif damage == "removed":
        shard.unlink()
    else:
        shard.write_bytes(content if damage == "flipped" else content[:-5])
    result = merge(place, tmp_path / "out")
    assert (result.digest, result.resumed_shards) == (want.digest, 1)
    assert [note for note in result.notes if "model-00001" in note and "was made again" in note]
    assert contents(tmp_path / "out") == contents(tmp_path / "want")


def test_a_journal_that_a_disk_has_changed_is_not_believed(place, tmp_path):
    merge(place, tmp_path / "want")
    journal = killed(place, tmp_path / "out") / "m3jax-journal.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    findings = next(i for i, line in enumerate(lines) if '"findings"' in line)
    at = next(i for i, letter in enumerate(lines[findings]) if i > 40 and letter.isdigit())
    lines[findings] = f"{lines[findings][:at]}{9 - int(lines[findings][at])}{lines[findings][at + 1 :]}"
    journal.write_text("".join(lines))
    assert merge(place, tmp_path / "out").resumed_shards == 2
    assert contents(tmp_path / "out") == contents(tmp_path / "want")


def rewrite(file, tensors):
    """Other weights in the same file, its size and its time as they were."""
    before = file.stat()
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    with open(file, "r+b") as opened:
        opened.seek(header)
        opened.write(b"".join(np.ascontiguousarray(value).tobytes() for value in tensors.values()))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size


def test_an_input_that_is_rewritten_after_a_kill_begins_anew(place, tmp_path):
    killed(place, tmp_path / "out")
    rewrite(place / "expert-0" / "model.safetensors", tree(5))
    result = merge(place, tmp_path / "out")
    assert result.resumed_shards == 0
    assert result.digest == merge(place, tmp_path / "want").digest


@pytest.mark.parametrize(("last", "sentence"), [(False, "changed while it was read"), (True, "was being merged")])
def test_an_input_that_is_rewritten_meanwhile_is_refused(place, tmp_path, last, sentence):
    """Between two passes by its bytes, which each of them hashes; behind the last by its ctime and then its bytes."""

    def rewriting(progress):
        if progress.done == progress.total and (progress.stage == "merging") == last:
            rewrite(place / "base" / "model.safetensors", tree(6))

    with pytest.raises(M3Error, match=sentence):
        merge(place, tmp_path / "out", progress=rewriting)
    assert not (tmp_path / "out").exists()


def test_an_input_that_is_only_linked_meanwhile_is_not_refused(place, tmp_path):
    def link(progress):
        (tmp_path / "backup").unlink(missing_ok=True)
        os.link(place / "base" / "model.safetensors", tmp_path / "backup")

    assert merge(place, tmp_path / "out", progress=link).digest == merge(place, tmp_path / "want").digest


def test_a_checkpoint_without_tensors_has_a_sentence_of_its_own(place, tmp_path):
    save_file({}, place / "expert-1" / "model.safetensors")
    with pytest.raises(M3Error, match=r"expert-1: holds no tensors, so there is nothing to merge"):
        merge(place, tmp_path / "out")
    with pytest.raises(M3Error, match=r"expert-1: holds no tensors to convert: give a model that has weights"):
        convert(place / "expert-1", tmp_path / "out", "msgpack")


# --- What is not ours ---------------------------------------------------------------------------------------------


def test_a_foreign_file_is_neither_published_nor_removed(place, tmp_path, capsys):
    partial = killed(place, tmp_path / "out")
    notes = partial / "notes.txt"
    notes.write_text("mine")
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe(place, **WHOLE_MODEL)))
    command = ["merge", str(tmp_path / "recipe.yaml"), str(tmp_path / "out"), "--quiet", "--max-shard-size", str(SHARD)]
    for more in ([], ["--seed", "4"]):  # this merge, and another one in its place
        assert main([*command, *more]) == 2
        assert f"{notes}: is no part of the merge that is made there: move it away" in capsys.readouterr().err
        assert notes.read_text() == "mine"
    notes.unlink()
    assert merge(place, tmp_path / "out").resumed_shards == 2


def test_a_foreign_file_that_comes_meanwhile_is_not_published(place, tmp_path):
    def drop(progress):
        (tmp_path / "out.partial" / "notes.txt").write_text("mine")

    for make, options in ((merge, {}), (convert, {"to": "msgpack"})):
        with pytest.raises(M3Error, match=r"notes\.txt: is no part"):
            make(place if make is merge else place / "base", tmp_path / "out", progress=drop, **options)
        assert not (tmp_path / "out").exists()
        assert (tmp_path / "out.partial" / "notes.txt").read_text() == "mine"
        shutil.rmtree(tmp_path / "out.partial")


def test_only_what_m3jax_has_made_is_overwritten(place, tmp_path):
    shutil.copytree(place / "base", tmp_path / "model")  # somebody's training
    with pytest.raises(M3Error, match=r"holds no m3jax\.json"):
        merge(place, tmp_path / "model", overwrite=True)
    assert contents(tmp_path / "model") == contents(place / "base")
    convert(place / "base", tmp_path / "model-2", "orbax")
    assert merge(place, tmp_path / "model-2", overwrite=True).digest == merge(place, tmp_path / "want").digest


def test_an_output_is_not_made_inside_what_it_is_made_of(place, tmp_path):
    asked = recipe(place, **WHOLE_MODEL)
    drawn = {**asked, "mixup": {"alpha": 1}}
    made = merge(place, tmp_path / "made").directory
    (tmp_path / "link").symlink_to("in/base")
    (tmp_path / "partial").mkdir()
    (tmp_path / "intermediates.intermediates").symlink_to("in/base")
    first = {"name": "first", "merge_method": "linear", "models": [str(place / "base")]}
    several = {"merge_method": "linear", "models": ["first"], "intermediates": [first]}
    works = (
        (lambda: m3jax.merge_checkpoint(asked, place / "expert-0" / "out"), "expert-0"),
        (lambda: m3jax.merge_checkpoint(asked, tmp_path / "link" / "out"), "base"),
        (lambda: m3jax.merge_checkpoint(asked, place / "base" / "run", step=3), "base"),
        (lambda: m3jax.merge_checkpoint(several, tmp_path / "intermediates"), "base"),
        (lambda: m3jax.merge_seeds(drawn, place / "base" / "out", seeds=[1, 2]), "base"),
        (lambda: m3jax.replay(made, place / "base" / "out"), "base"),
        (lambda: convert(made, made / "out"), "made"),
        (lambda: convert(made, made / "out", overwrite=True), "made"),
        (lambda: m3jax.extract_lora(place / "expert-0", place / "base", tmp_path / "link" / "out", 2), "base"),
        (lambda: m3jax.explore(drawn, place / "base" / "out", score=lambda *_: {}), "base"),
        (
            lambda: m3jax.explore(drawn, tmp_path / "out", score=lambda *_: {}, journal=place / "base" / "j"),
            "base",
        ),
    )
    before = sorted(tmp_path.rglob("*"))
    for number, (work, name) in enumerate(works):
        with pytest.raises(M3Error, match=rf"would be made inside \S*{name}, which is read: choose another output"):
            pytest.fail(f"{number} went through: {work()}")
        assert sorted(tmp_path.rglob("*")) == before, number
    assert not m3jax.verify(made).differences
    shutil.copyfile(place / "base" / "model.safetensors", tmp_path / "alone.safetensors")  # a file makes no directory
    assert convert(tmp_path / "alone.safetensors", tmp_path / "beside").tensors == 3


def test_no_place_is_made_inside_an_adapter_or_a_model_in_remote_storage(tmp_path):
    adapted = ModelDirectory("a+b", tmp_path / "a", None, ModelDirectory("b", tmp_path, None))
    with pytest.raises(M3Error, match=r"would be made inside a\+b, which is read"):
        check_apart(tmp_path / "out", adapted)
    model = ModelDirectory("a", as_path("s3://bucket/a"), None)
    check_apart(as_path("s3://bucket/ab"), model)
    with pytest.raises(M3Error, match="would be made inside a, which is read"):
        check_apart(as_path("s3://bucket/a/out"), model)


def test_an_output_that_a_models_files_lead_to_is_not_replaced(place, tmp_path):
    merge(place, tmp_path / "out")
    model = place / "expert-0"
    for shard in model.glob("*.safetensors*"):
        shard.unlink()
    for shard in (tmp_path / "out").glob("*.safetensors*"):
        (model / shard.name).symlink_to(shard)
    before = contents(tmp_path / "out")
    for work in (
        lambda: merge(place, tmp_path / "out", overwrite=True),
        lambda: convert(model, tmp_path / "out", overwrite=True),
        lambda: m3jax.extract_lora(model, place / "base", tmp_path / "out", 2, overwrite=True),
    ):
        with pytest.raises(M3Error, match=r"out: holds the file that \S*expert-0/model-\S* of \S*expert-0 leads to"):
            work()
        assert contents(tmp_path / "out") == before


# --- What a crash leaves ------------------------------------------------------------------------------------------


def test_a_journal_of_ours_without_content_is_ours(place, tmp_path):
    for name in ("m3jax-journal.jsonl", "m3jax-journal.jsonl.tmp"):
        (tmp_path / "out.partial").mkdir()
        (tmp_path / "out.partial" / name).write_bytes(b"")
        convert(place / "base", tmp_path / "out", "msgpack", overwrite=True)
        assert not (tmp_path / "out.partial").exists()


def test_an_output_with_its_journal_is_whole_and_is_tidied_up(place, tmp_path):
    with pytest.raises(Killed), Faults(tmp_path).until(lambda call: call.startswith("unlink /out/m3jax-journal")):
        merge(place, tmp_path / "out")
    assert m3jax.verify(tmp_path / "out").differences == ()
    journal = tmp_path / "out" / "m3jax-journal.jsonl"
    assert journal.exists()
    with pytest.raises(M3Error, match="exists already"):
        convert(place / "base", tmp_path / "out", "msgpack")  # another command
    assert not journal.exists()
    assert not (tmp_path / "out.partial").exists()
    assert m3jax.verify(tmp_path / "out").differences == ()


def test_a_replacement_that_was_interrupted_is_named_and_undone(place, tmp_path, monkeypatch):
    monkeypatch.setattr(directories, "_renameat2", lambda: None)
    convert(place / "base", tmp_path / "out", "msgpack")
    old = contents(tmp_path / "out")
    with pytest.raises(Killed), Faults(tmp_path).until(lambda call: call.startswith("rename /out.partial")):
        merge(place, tmp_path / "out", overwrite=True)
    with pytest.raises(M3Error, match=r"merge is in .*out\.partial, and what it was to replace is in .*out\.replaced-"):
        m3jax.verify(tmp_path / "out")
    with pytest.raises(M3Error, match="exists already"):
        merge(place, tmp_path / "out")  # without --overwrite
    assert contents(tmp_path / "out") == old
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out", "out.partial"]
    assert merge(place, tmp_path / "out", overwrite=True).resumed_shards == 3


# --- What the system refuses --------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["README.md", "m3jax.json", "out.partial", "place"])
def test_a_file_that_does_not_reach_the_disk_is_named(place, tmp_path, monkeypatch, what):
    there = tmp_path / "place"
    there.mkdir()
    plain = shards.os.fsync

    def fsync(descriptor):
        if (
            os.readlink(f"/proc/self/fd/{descriptor}").endswith(what)
            and (there / "out.partial/m3jax.json").exists() | (there / "out").exists()
        ):
            raise OSError(errno.EIO, "Input/output error")
        plain(descriptor)

    monkeypatch.setattr(shards.os, "fsync", fsync)
    with pytest.raises(M3Error, match=rf"{what}: Input/output error"):
        merge(place, there / "out")
    assert (there / "out").exists() == (what == "place")


@pytest.mark.parametrize(
    "file",
    [
        *("mine.txt", "runs/scores.json", ".git/HEAD", "config.json.tmp", "m3jax-journal-thesis.jsonl"),
        *("m3jax-journal/notes.jsonl", "deep/m3jax-journal.jsonl"),
    ],
)
def test_an_output_that_holds_files_of_its_user_is_not_replaced(place, tmp_path, file):
    merge(place, tmp_path / "out")
    mine = tmp_path / "out" / file
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine")
    top = file.split("/")[0]
    with pytest.raises(
        M3Error, match=rf"holds {file}, which is not of the output that is to be replaced: move it away"
    ):
        merge(place, tmp_path / "out", overwrite=True)
    assert mine.read_text() == "mine"
    shutil.move(tmp_path / "out" / top, tmp_path / "kept")
    merge(place, tmp_path / "out", overwrite=True)


def test_weights_beside_an_output_of_the_first_version_are_not_its_own(place, tmp_path):
    merge(place, tmp_path / "out")
    told = json.loads((tmp_path / "out" / "m3jax.json").read_text())
    for key in ("schema", "manifest_digest"):
        del told[key]
    del told["output"]["weight_files"]
    (tmp_path / "out" / "m3jax.json").write_text(json.dumps(told))
    shutil.copyfile(tmp_path / "in/base/model.safetensors", tmp_path / "out" / "my_finetune.safetensors")
    with pytest.raises(M3Error, match=r"holds my_finetune\.safetensors, which is not of the output"):
        merge(place, tmp_path / "out", overwrite=True)
    (tmp_path / "out" / "my_finetune.safetensors").unlink()
    merge(place, tmp_path / "out", overwrite=True)


@pytest.mark.parametrize("name", ["..", "mine", "out", "out.replaced-0123456", "out.replaced-thesis00", "a/b", "."])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_journal_from_elsewhere_removes_nothing(place, tmp_path, name, overwrite):
    """A directory with a journal that names another one may come from anybody; inodes of some are known to all."""
    (tmp_path / "work").mkdir()
    merge(place, tmp_path / "work" / "out")
    for other in ("mine", "out.replaced-0123456", "out.replaced-thesis00"):
        (tmp_path / "work" / other).mkdir()
        (tmp_path / "work" / other / "thesis.tex").write_text("mine")
    target = tmp_path / "work" / name
    inode = os.stat(target).st_ino if target.exists() else 2
    lines = [{"identity": "x", "names": []}, {"replaces": {"name": name, "inode": inode}}]
    (tmp_path / "work/out/m3jax-journal.jsonl").write_text("".join(map(line_of, lines)))
    before = contents(tmp_path)
    if overwrite:
        merge(place, tmp_path / "work" / "out", overwrite=True)
    else:
        with pytest.raises(M3Error, match="exists already"):
            merge(place, tmp_path / "work" / "out")
    after = contents(tmp_path)
    assert {path for path in before if path not in after} <= {"work/out/m3jax-journal.jsonl"}
    assert {path: after[path] for path in after if "thesis" in path} == {
        path: before[path] for path in before if "thesis" in path
    }


@pytest.mark.parametrize("pattern", ["*", "?*", "t*", "[st]hesis.tex"])
def test_a_journal_that_claims_whatever_is_there_is_not_believed(place, tmp_path, pattern):
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "thesis.tex").write_text("mine")
    (partial / "m3jax-journal.jsonl").write_text(line_of({"identity": "x", "names": [pattern]}))
    with pytest.raises(M3Error, match=r"thesis\.tex: is no part of the merge that is made there"):
        merge(place, tmp_path / "out")
    assert (partial / "thesis.tex").read_text() == "mine"


@pytest.mark.parametrize("where", ["out/m3jax.json", "out/m3jax-journal.jsonl", "out.partial/m3jax-journal.jsonl"])
@pytest.mark.parametrize("what", ["pipe", "sparse", "endless"])
def test_what_is_no_file_of_ours_is_not_waited_for(place, tmp_path, where, what):
    merge(place, tmp_path / "out")
    file = tmp_path / where
    file.parent.mkdir(exist_ok=True)
    file.unlink(missing_ok=True)
    if what == "pipe":
        os.mkfifo(file)
    elif what == "endless":
        file.symlink_to("/dev/zero")
    else:
        file.touch()
        os.truncate(file, 2**43)
    with pytest.raises(M3Error, match=r"holds|no part of the merge|exists already"):
        merge(place, tmp_path / "out", overwrite=where.startswith("out/m3jax.json"))


@pytest.mark.parametrize("name", ["m3jax.json", "m3jax-conversion.json"])
@pytest.mark.parametrize("text", ["", "{}", "x", '{"output": {"files": []}, "files": 3}'])
def test_a_file_of_the_manifests_name_makes_no_output(place, tmp_path, name, text):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text(text)
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    with pytest.raises(M3Error, match=r"holds no m3jax\.json of an output, and only what m3jax"):
        merge(place, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "thesis.tex").read_text() == "mine"


def locks_fail(monkeypatch, code):
    def flock(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_file_systems_without_locks(tmp_path, monkeypatch, code):
    locks_fail(monkeypatch, code)
    with Staging(tmp_path / "out", "one", 1, names=["m3jax.json"]) as staging:
        with pytest.raises(M3Error, match=r"has no locks, and m3jax-journal\.taken in it .* remove that file"):
            Staging(tmp_path / "out", "one", 1)
        (staging.path / "m3jax.json").write_text('{"output": {"files": {}}}')
        staging.publish()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["m3jax.json"]
    interrupted = Staging(tmp_path / "out", "one", 1, overwrite=True)
    interrupted.record({"shard": "model.safetensors"})
    interrupted.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    with Staging(tmp_path / "out", "one", 1, overwrite=True) as again:  # an interrupt leaves no mark
        assert [entry["shard"] for entry in again.finished] == ["model.safetensors"]


def test_other_errors_of_locks_are_not_another_merge(tmp_path, monkeypatch):
    locks_fail(monkeypatch, errno.EIO)
    with pytest.raises(OSError, match="Input/output error"):
        Staging(tmp_path / "out", "one", 1)


@pytest.mark.parametrize(
    ("entry", "fits"),
    [
        ({"shard": "a.safetensors", "files": ["d/a"], "sent": {"d/a": ["tag", 1]}, "ours": ["b"]}, True),
        ({"shard": "../a.safetensors"}, False),
        ({"shard": "a", "files": ["/etc/passwd"]}, False),
        ({"shard": "a", "sent": {"d/../../a": []}}, False),
        ({"shard": "a", "sent": ["a"]}, False),
        ({"ours": [""]}, False),
    ],
)
def test_a_journal_names_no_file_outside(entry, fits):
    """Whoever may write beside an output may forge its journal; what it names is read, sent and removed."""
    assert is_entry(entry) == fits
