"""Several real processes at one output, and processes that may open or write too little."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support import faults
from support.directories import recipe
from support.faults import contents, make_inputs, prepare

import m3jax

ROUNDS = 6
MEETING = """
import json, sys, time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from m3jax.cli.commands import app
from m3jax.cli.shell import main
from m3jax.outputs import directories

place, asked, me, kinds = Path(sys.argv[1]), sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
make = directories.make

def meet(name):
    (place / f"{name}-{me}").touch()
    end = time.monotonic() + 60
    while len(list(place.glob(f"{name}-*"))) < 2:
        if time.monotonic() > end:
            sys.exit("the other one has not come")
        time.sleep(0.001)

for number, kind in enumerate(kinds):
    def meeting(directory, called=[]):  # before the first of them makes a directory
        if not called:
            called.append(meet(number))
        return make(directory)

    directories.make = meeting
    with open(place / f"said-{number}-{me}", "w") as says, redirect_stderr(says), redirect_stdout(says):
        over = ["--overwrite"] if kind == "overwriting" else []
        code = main(app, ["merge", asked, str(place / f"out-{number}" / "out"), "--max-shard-size", "5000", *over])
    (place / f"code-{number}-{me}").write_text(str(code))
"""


STARTS = ("fresh", "resumed", "overwriting")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    place = tmp_path_factory.mktemp("inputs")
    make_inputs(place)
    asked = recipe(place, merge_method="ties", parameters={"density": 0.5, "trim_scope": "model"})
    (place / "recipe.yaml").write_text(yaml.safe_dump(asked))
    return place


def start(script, *arguments):
    """A process of Python, of the same packages."""
    paths = [str(Path(faults.__file__).parents[1]), str(Path(m3jax.__file__).parents[1])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.Popen([sys.executable, "-c", script, *map(str, arguments)], env=environment)


def test_two_processes_at_one_output(inputs, tmp_path):
    """One merges, the other says why it does not; whoever is later where both replace what is there merges again."""
    scenarios = {}
    for kind in STARTS:
        (tmp_path / kind).mkdir()
        scenarios[kind] = prepare(inputs, tmp_path / kind, "merge", kind)
    kinds = [STARTS[number % 3] for number in range(ROUNDS)]
    for number, kind in enumerate(kinds):
        shutil.copytree(scenarios[kind].start, tmp_path / f"out-{number}")
    both = [start(MEETING, tmp_path, inputs / "recipe.yaml", me, json.dumps(kinds)) for me in "ab"]
    assert [each.wait(timeout=300) for each in both] == [0, 0]
    for number, kind in enumerate(kinds):
        place = tmp_path / f"out-{number}"
        codes = {me: int((tmp_path / f"code-{number}-{me}").read_text()) for me in "ab"}
        said = [(tmp_path / f"said-{number}-{me}").read_text() for me in "ab" if codes[me]]
        assert sorted(codes.values()) in ([[0, 2]] if kind != "overwriting" else [[0, 2], [0, 0]]), said
        for sentence in said:
            assert "another merge is writing there" in sentence or "exists already" in sentence
        assert [path.name for path in place.iterdir()] == ["out"]
        assert contents(place / "out") == scenarios[kind].reference
        assert m3jax.verify(place / "out").differences == ()


LIMITED = """
import json, os, resource, sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from support.faults import contents
from m3jax.cli.commands import app
from m3jax.cli.shell import main

place, asked = Path(sys.argv[1]), sys.argv[2]

def merge(out, which, limit):
    before = resource.getrlimit(which)
    with open(place / "said", "w") as says, redirect_stderr(says), redirect_stdout(says):
        resource.setrlimit(which, (limit, before[1]))
        try:
            return main(app, ["merge", asked, str(out), "--max-shard-size", "5000"])
        finally:
            resource.setrlimit(which, before)

def freely(out):
    return merge(out, resource.RLIMIT_NOFILE, resource.getrlimit(resource.RLIMIT_NOFILE)[0])

def rising(name, limit, step):
    ended = []
    while not ended or ended[-1][0] != 0:
        out = place / name / f"{limit}" / "out"
        out.parent.mkdir(parents=True)
        code = merge(out, getattr(resource, name), limit)
        said = (place / "said").read_text()
        whole = contents(out) in (None, contents(place / "warm"))
        again = 0 if code == 0 else freely(out)
        left = [path.name for path in out.parent.iterdir() if path != out]
        ended.append((code, said, whole, again, left, limit))
        limit += step
    return ended

freely(place / "warm")  # what is imported and compiled is there from here on
descriptors = rising("RLIMIT_NOFILE", 1 + len(os.listdir("/proc/self/fd")), 1)
ended = {"RLIMIT_NOFILE": descriptors, "RLIMIT_FSIZE": rising("RLIMIT_FSIZE", 0, 900)}
(place / "ended").write_text(json.dumps(ended))
"""


def test_limits_of_a_process(inputs, tmp_path):
    """Too few descriptors, or files that may not grow: a sentence and nothing half-made; it goes on without a limit."""
    assert start(LIMITED, tmp_path, inputs / "recipe.yaml").wait(timeout=300) == 0
    want = contents(tmp_path / "warm")
    found = json.loads((tmp_path / "ended").read_text())
    for name, option in (("RLIMIT_NOFILE", "ulimit -n"), ("RLIMIT_FSIZE", "ulimit -f")):
        *refused, last = found[name]
        assert len(refused) >= 3
        assert last[0] == 0
        for code, said, whole, again, left, _ in refused:
            assert (code, whole, again, left) == (2, True, 0, []), said
            assert said.splitlines()[-1].startswith("m3jax: "), said
            assert option in said
        for *_, limit in found[name]:
            assert contents(tmp_path / name / f"{limit}" / "out") == want
