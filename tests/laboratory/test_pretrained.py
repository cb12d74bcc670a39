"""The laboratory of a given base: from fine-tuning to the report, in one go and killed, and what it shares."""

import json
from pathlib import Path
from typing import Any

import jax
import pytest

from m3jax import decoder
from m3jax.decoder import DecoderConfig
from m3jax.errors import M3Error
from m3jax.laboratory import conducting
from m3jax.laboratory.conducting import LEDGER, Setting, conduct, open_laboratory
from m3jax.laboratory.experiments import TIES, Experiment, ExperimentSettings, jobs_of
from m3jax.laboratory.experts import Apprenticeship
from m3jax.laboratory.models import save_model
from m3jax.laboratory.skills import brief_word_problems
from m3jax.laboratory.training import Course, Size, make_config, make_tokenizer
from m3jax.laboratory.tuning import Tuning
from m3jax.outputs.verification import verify

CHATS = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}<s>"
BRIEF = brief_word_problems()._replace(max_tokens=3)
SKILLS = [BRIEF, BRIEF._replace(name="other")]
TINY = Setting(
    Apprenticeship(20, Tuning(Course(2, 4, 1e-2))),
    ExperimentSettings(
        seeds=1, samples=2, alphas=(2.0,), dev=4, test=4, attacked=2, points=3, searches=2, recalls=True, writes=True
    ),
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("given") / "model"
    tokenizer = make_tokenizer([a + b for a, b in BRIEF.lessons(BRIEF.rows("train", 50, 0))], 300)
    tokenizer.chat_template = CHATS
    entries = make_config(Size(16, 1, 2, len(tokenizer)))
    config = DecoderConfig.from_dict(entries)
    params = jax.tree.map(lambda x: 5 * x, decoder.random_params(config, 0))  # which says more than one thing
    save_model(place, params, config, entries, tokenizer)
    return place


class KilledError(Exception):
    """Stands for the end of the process."""


def is_wanted(job: Experiment) -> bool:
    """Whether it is not what the small laboratory's tests do already."""
    return job.kind in ("models", "curve", "search", "written") or (
        job.kind == "merge" and job.method != TIES and not job.dare
    )


@pytest.mark.slow
def test_a_laboratory_of_a_given_base(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(M3Error, match="give its directory with --base"):
        open_laboratory(tmp_path / "none", SKILLS, TINY, lambda _: None)
    some = [job for job in jobs_of([skill.name for skill in SKILLS], TINY.experiments) if is_wanted(job)]
    monkeypatch.setattr(conducting, "jobs_of", lambda *_: some)
    do, done = conducting.do, list[str]()

    def killing(*given: Any) -> dict[str, Any]:
        if len(done) == 2:
            raise KilledError
        done.append(given[1].name)
        return do(*given)

    monkeypatch.setattr(conducting, "do", killing)
    with pytest.raises(KilledError):
        conduct(tmp_path / "lab", SKILLS, TINY, lambda _: None, "scripts/lab", str(base))
    monkeypatch.setattr(conducting, "do", do)
    report = conduct(tmp_path / "lab", SKILLS, TINY, lambda _: None, "scripts/lab", str(base))
    lines = [json.loads(line) for line in (tmp_path / "lab" / LEDGER).read_bytes().splitlines()]
    assert [line["job"] for line in lines[1:]] == [job.name for job in some]
    by_method = {line["method"]: line for line in lines[1:] if line["kind"] == "merge"}
    assert by_method["average"]["trials"] == by_method["task arithmetic"]["trials"]  # the same, examined once
    assert "examination" not in by_method["task arithmetic"]["seconds"]
    (search,) = [line["searches"] for line in lines[1:] if line["kind"] == "search"]
    assert len(search) == 9
    assert {one["evaluations"] for one in search.values()} <= {1, 2}
    assert all(set(one["test"]) == {"arithmetic", "other"} for one in search.values())
    assert len(search["layers, drawn"]["weights"]) == 2  # a block, and what is in none
    assert len(search["layers, by the slope of the entropy"]["losses"]) == 2
    place = tmp_path / "lab" / "written" / "arithmetic+other"
    (written,) = [line["written"] for line in lines[1:] if line["kind"] == "written"]
    assert written["again"] == written["digest"] == verify(place / "model").digest
    assert written["test"] == written["reported"] == by_method[written["method"]]["arms"]["m3"]["test"]
    text = (report / "report.md").read_text()
    for said in ("## Fine-tuning", "## Answers", "## Weights of layers and tensors", "## What the curve lets expect"):
        assert said in text
    assert "- merge, arithmetic+other, TIES, 0.5, seed 0\n" in text  # which is told to be missing
