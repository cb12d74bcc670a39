"""From a model and a test set to what attacks and shifts leave of its accuracy."""

import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.evaluation import real_file
from support.tiny_models import build_models

import m3jax
from m3jax.cli import commands
from m3jax.errors import M3Error
from m3jax.evaluation import Completion, GenerationSettings, get_task, load_rows, models
from m3jax.evaluation.attacks import trial
from m3jax.evaluation.attacks.subject import find_subject
from m3jax.evaluation.attacks.trial import attack_task
from m3jax.evaluation.robustness import DEFAULT_ATTACKS, make_plan

ROWS = [{"sentence": f"film number {i}, {'very ' * i}fine {{x}}", "label": i % 2} for i in range(8)]
SST2 = get_task("sst2")
PROMPT = "Classify the sentiment of the sentence as 'positive' or 'negative'. Answer with one word.\nSentence: "
PROMPT += "{content}\nAnswer:"
NAMES = ("negative", "positive")


def generator_of(rule, calls=None):
    """A model that gives the right answer where a rule holds for its prompt, else the wrong one."""

    def generate(prompts, settings):
        if calls is not None:
            calls.append(len(prompts))
        return [Completion(NAMES[label_of(p) if rule(p) else 1 - label_of(p)], 1, True) for p in prompts]

    return generate


def label_of(prompt):
    # The sentence itself may be shifted: its digit stays.
    return int(re.search(r"\d", prompt)[0]) % 2


def tried(rule, calls=None, rows=ROWS, **plan):
    return attack_task(SST2, rows, generator_of(rule, calls), make_plan(**plan), template="none")


# --- What is attacked --------------------------------------------------------------------------------------------


def test_the_tasks_own_words_are_found():
    subject = find_subject(SST2, ROWS)
    assert (subject.prompt, subject.template, subject.labels) == (PROMPT, "alpaca", NAMES)
    assert subject.contents == tuple(row["sentence"].strip() for row in ROWS)
    for example, content in zip(subject.examples, subject.contents, strict=True):
        assert subject.prompt.replace("{content}", content) == example.instruction


def test_where_a_task_has_no_words_the_templates_are_attacked():
    rows = [{"question": f"How many is {i}?", "answer": f"#### {i}"} for i in range(3)]
    subject = find_subject(get_task("gsm8k"), rows)
    assert subject.template == "none"
    assert subject.prompt.startswith("Below is an instruction")
    assert subject.prompt.endswith("### Instruction:\n{content}\n\n### Response: Let's think step by step.")
    assert (subject.contents[1], subject.labels, subject.folded) == ("How many is 1?", (), True)
    own = find_subject(get_task("gsm8k"), rows, prompt="Work out: {content}")
    assert (own.prompt, own.template, own.contents[2]) == ("Work out: {content}", "wizardmath", "How many is 2?")
    for options in ({"template": "none"}, {"template": "chat"}):
        with pytest.raises(M3Error, match="has no words of its own to attack: give such with --prompt"):
            attack_task(get_task("gsm8k"), rows, generator_of(bool), make_plan(), **options)
    found = attack_task(
        get_task("gsm8k"), rows, generator_of(bool), make_plan(attacks=(), shifts=["typos"], floor=0), template="none"
    )
    assert [one.shift for one in found.shifts] == ["typos"]  # which need no words
    with pytest.raises(M3Error, match=r"should have \{content\} in it once"):
        find_subject(SST2, ROWS, prompt="Good or bad?")


@pytest.mark.parametrize("task", ["gsm8k", "math", "humaneval", "mbpp", "sst2"])
def test_real_test_sets_come_apart_and_together(task):
    rows = load_rows(real_file(task))[:50]
    subject = find_subject(get_task(task), rows)
    for example, content in zip(subject.examples, subject.contents, strict=True):
        assert example.instruction in subject.prompt.replace("{content}", content)


# --- Attacks -----------------------------------------------------------------------------------------------------

PLANTED = {
    "deepwordbug": lambda text: not (len(text) and re.search(r"(?<!\w)(?!Classify)[A-Za-z]lassify(?!\w)", text)),
    "textbugger": lambda text: all(ord(letter) < 128 for letter in text),
    "stresstest": lambda text: "false is not true" not in text,
    "checklist": lambda text: not re.search(r"Answer [A-Za-z0-9]{10}:", text),
}


@pytest.mark.parametrize("name", ["textbugger", "stresstest", "checklist"])
def test_a_planted_model_is_broken_by_its_attack_and_no_other(name):
    found = tried(PLANTED[name], attacks=DEFAULT_ATTACKS)
    assert found.accuracy == 1
    assert {one.attack: (one.drop.attacked, one.drop.pdr) for one in found.attacks} == {
        attack: (0.0, 1.0) if attack == name else (1.0, 0.0) for attack in DEFAULT_ATTACKS
    }
    for one in found.attacks:
        assert (one.prompt == PROMPT) == (one.attack != name)


def test_a_word_that_matters_is_found():
    """The model needs one word; every attack on letters breaks it there and nowhere else."""
    found = tried(lambda text: "sentiment" in text, attacks=DEFAULT_ATTACKS)
    broken = {one.attack: one for one in found.attacks if one.drop.attacked == 0}
    assert set(broken) == {"deepwordbug", "textbugger"}
    for one in broken.values():
        assert [change.before for change in one.changes] == ["sentiment"]


def test_a_constant_model_is_broken_by_nothing():
    right = tried(lambda text: True, attacks=DEFAULT_ATTACKS, shifts=("typos", "uppercase"))
    assert {one.drop.pdr for one in (*right.attacks, *right.shifts)} == {0.0}
    stopped = tried(lambda text: False, attacks=DEFAULT_ATTACKS, shifts=("typos",))
    assert (stopped.attacks, stopped.shifts, stopped.complete) == ((), (), True)
    assert stopped.undefined == "clean accuracy is 0.0%, and below 5.0% drop rates are undefined"
    wrong = tried(lambda text: False, attacks=DEFAULT_ATTACKS, shifts=("typos",), floor=0.0)
    assert (wrong.accuracy, wrong.interval[0]) == (0, 0)
    assert {(one.drop.pdr, one.drop.interval) for one in (*wrong.attacks, *wrong.shifts)} == {(None, None)}
    assert {one.queries for one in wrong.attacks} == {1}


def test_labels_and_protected_words_reach_every_prompt():
    seen = []

    def rule(text):
        seen.append(text)
        return len(text) % 3 > 0

    attack_task(SST2, ROWS, generator_of(rule), make_plan(), protect=["one word"], template="none")
    assert len(seen) > 500
    assert all("'positive' or 'negative'" in text and "one word" in text for text in seen)
    assert all(sum(row["sentence"].strip() in text for row in ROWS) == 1 for text in seen)


def test_the_candidates_of_a_step_go_to_the_model_in_one_batch():
    calls = []
    found = tried(lambda text: "sentiment" in text, calls, attacks=["deepwordbug"])
    (one,) = found.attacks
    words = 5  # Classify, sentiment, sentence, Answer, word, …: all but labels and words of grammar
    assert calls[0] == len(ROWS)
    assert calls[1] >= words * len(ROWS)
    assert calls[2] == 4 * len(ROWS)
    assert len(calls) == 3
    assert sum(calls) == one.queries * len(ROWS)


def test_the_same_key_gives_the_same_run():
    def rule(text):
        return len(text) % 7 > 2 or "Q" in text

    plan = {"attacks": DEFAULT_ATTACKS, "shifts": ("typos", "whitespace", "mixed-case", "paraphrase")}
    first, second, other = (tried(rule, key=key, **plan) for key in (5, jax.random.key(5), 6))
    assert first == second
    assert first.seed == 5
    assert first.attacks != other.attacks
    alone = tried(rule, key=5, attacks=["checklist"])
    assert alone.attacks[0] == first.attacks[3]  # whatever else is tried


def test_searches_may_see_other_examples_than_are_measured():
    found = tried(lambda text: "number 0" not in text or "true" not in text, attacks=["stresstest"], search_examples=3)
    assert (found.examples, found.searched) == (5, 3)
    (one,) = found.attacks
    assert one.drop[:4] == (5, 1.0, 1.0, 0.0)  # what it found hurts example 0 alone
    assert "true" in one.prompt


def test_profiles_and_budgets():
    paper = tried(lambda text: len(text) % 5 > 0, profile="m3-paper", attacks=["deepwordbug"], rows=ROWS * 2)
    assert paper.examples == 16
    whole = tried(lambda text: len(text) % 5 > 0, attacks=["deepwordbug"], rows=ROWS * 2)
    assert (whole.examples, whole.attacks[0].exhausted) == (16, False)
    assert paper.attacks[0].queries < whole.attacks[0].queries
    short = tried(lambda text: len(text) % 5 > 0, attacks=["deepwordbug"], budget=4)
    assert (short.attacks[0].queries, short.attacks[0].exhausted) == (4, True)


# --- Shifts ------------------------------------------------------------------------------------------------------


def test_shifts_change_the_example_and_not_the_prompt():
    seen = []

    def rule(text):
        seen.append(text)
        return "FILM" not in text

    found = tried(rule, attacks=(), shifts=("uppercase", "lowercase"))
    assert [(one.shift, one.drop.attacked, one.changed) for one in found.shifts] == [
        ("uppercase", 0.0, 8),
        ("lowercase", 1.0, 0),
    ]
    before, after = PROMPT.split("{content}")
    assert all(text.startswith(before) and text.endswith(after) for text in seen)


def test_paraphrases_change_the_instruction_within_its_template():
    seen = []

    def rule(text):
        seen.append(text)
        return True

    attack_task(SST2, ROWS, generator_of(rule), make_plan(attacks=(), shifts=("paraphrase",)))
    shifted = seen[len(ROWS) :]
    assert len(shifted) == len(ROWS)
    assert all(text.startswith("Below is an instruction") and PROMPT.split("{")[0] in text for text in shifted)
    assert all("### Instruction:\nClassify" not in text for text in shifted)


# --- Errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plan", "sentence"),
    [
        ({"attacks": ["deepwordbugg"]}, "did you mean deepwordbug"),
        ({"attacks": []}, "nothing to try"),
        ({"shifts": ["typo"]}, "did you mean typos"),
        ({"profile": "paper"}, "no profile is called 'paper'"),
        ({"budget": 0}, "the budget must be at least 1, not 0"),
        ({"limit": 0}, "the limit must be at least 1"),
        ({"limit": "5"}, "the limit is '5', but must be a whole number"),
        ({"search_examples": 2.5}, "the number of search examples is 2.5, but must be a whole number"),
        ({"attacks": None}, "attacks is None, but must be names in a list"),
        ({"shifts": [3]}, "no shift is called '3'"),
        ({"search_examples": 8}, "leaves none to measure on"),
        ({"key": -1}, "the seed is -1"),
        ({"key": np.zeros(3)}, "key: is float64[3], but must be an integer seed or a threefry2x32 key"),
        ({"key": "5"}, "key: is '5', but must be an integer seed or a threefry2x32 key"),
        ({"key": jax.random.split(jax.random.key(0), 3)}, "it is 3 keys, of which one is wanted"),
        ({"embeddings": "nowhere.txt"}, "cannot read the embeddings nowhere.txt"),
        ({"masked_lm": "./nowhere"}, "nowhere"),
    ],
)
def test_plans_that_will_not_do(plan, sentence):
    with pytest.raises(M3Error, match=re.escape(sentence)):
        tried(lambda text: True, **plan)


def test_tasks_that_cannot_be_attacked():
    elsewhere = get_task("alpaca_eval")
    with pytest.raises(M3Error, match="judged elsewhere"):
        attack_task(elsewhere, [{"instruction": "Say hello."}], generator_of(bool), make_plan(), prompt="Do {content}")
    rows = [{"task_id": 1, "text": "Add.", "code": "def f(): pass", "test_list": ["assert f() is None"]}]
    with pytest.raises(M3Error, match="would break the programs in mbpp"):
        attack_task(get_task("mbpp"), rows, generator_of(bool), make_plan(attacks=(), shifts=["typos"]))


# --- Real models -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models") / "models"
    build_models(directory)
    (directory / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS))
    return directory


@pytest.fixture(scope="module")
def model(place):
    return models.load_model(str(place / "expert-a"), "float32")


def answering(tokenizer, rule, answers):
    """A model that gives the first answer where a rule holds for its parameters and the prompt, else the second.

    It begins its answer behind the last "?", which no attack may touch.
    """
    end = tokenizer.eos_token_id
    given = [[*tokenizer.encode(text, add_special_tokens=False), end] for text in answers]
    length = max(map(len, given))
    table = jnp.asarray([answer + [end] * (length - len(answer)) for answer in given])
    (mark,) = tokenizer.encode("?", add_special_tokens=False)

    def apply_fn(params, tokens, lengths):
        places = jnp.arange(tokens.shape[1])
        start = jnp.max(jnp.where(tokens == mark, places[None], -1), axis=1)
        read = jnp.where(places[None] <= start[:, None], tokens, 0)
        chosen = jnp.where(rule(params, read), 0, 1)
        step = jnp.clip(places[None] - start[:, None], 0, length - 1)
        return jax.nn.one_hot(table[chosen[:, None], step], 320)

    return apply_fn


ASKED = {"prompt": "Name the sentiment: {content} ?", "template": "none", "settings": GenerationSettings(12)}


def test_a_planted_model_in_memory(model, place):
    """It says "positive" where the prompt has one word whole."""
    word = model.tokenizer.encode(" sentiment", add_special_tokens=False)

    def has_word(params, tokens):
        found = [jnp.roll(tokens, -shift, axis=1) == token for shift, token in enumerate(word)]
        return jnp.all(jnp.stack(found), axis=0).any(axis=1)

    found = m3jax.attack(
        {},
        None,
        model.tokenizer,
        "sst2",
        data=place / "rows.jsonl",
        apply_fn=answering(model.tokenizer, has_word, (" positive", " eh")),
        attacks=["deepwordbug", "stresstest"],
        shifts=["uppercase"],
        batch_size=8,
        **ASKED,
    )
    assert (found.accuracy, found.attacks[0].drop.attacked, found.shifts[0].drop.pdr) == (0.5, 0.0, 0.0)
    assert [change.before for change in found.attacks[0].changes] == ["sentiment"]
    assert found.attacks[1].drop.pdr == 0


def test_calls_that_cannot_be_followed_are_said_at_once(model, place):
    for options, sentence in [
        ({"batch_size": 0}, "the batch size must be at least 1, not 0"),
        ({"batch_size": "8"}, "the batch size is '8', but must be a whole number"),
        ({"settings": {"max_tokens": 3}}, "settings is {'max_tokens': 3}, but must be of type GenerationSettings"),
        ({"overflow": "skip"}, "overflow is 'skip', but must be one of error, truncate"),
        ({"prompt": 3}, "the prompt 3 should have {content} in it once"),
        ({"data": ROWS}, "but must be the path of a file, or a hub data set as text"),
        ({"config": None}, "give the content of the model's config.json, or an apply_fn"),
    ]:
        given = {"config": model.config, "data": place / "rows.jsonl", **options}
        with pytest.raises(M3Error, match=re.escape(sentence)):
            m3jax.attack({}, given.pop("config"), model.tokenizer, "sst2", **given)


@pytest.mark.slow
def test_the_attack_is_the_same_on_eight_devices(model, place):
    """A model whose answer hangs on every letter, by a random matrix that lies on the devices."""

    def scattered(params, tokens):
        seen = params["vectors"][tokens] * jnp.cos(jnp.arange(tokens.shape[1], dtype=jnp.float32))[None, :, None]
        return jnp.sin(seen.sum(axis=(1, 2))) > 0

    vectors = jax.random.normal(jax.random.key(0), (320, 16))
    options = {"data": place / "rows.jsonl", "apply_fn": answering(model.tokenizer, scattered, NAMES), **ASKED}
    options |= {"attacks": DEFAULT_ATTACKS, "shifts": ["typos"], "key": jax.random.key(3), "batch_size": 8}
    one = m3jax.attack({"vectors": vectors}, None, model.tokenizer, "sst2", **options)
    mesh = models.make_mesh("fsdp=4,tp=2")
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp", "tp"))
    eight = m3jax.attack({"vectors": jax.device_put(vectors, rows)}, None, model.tokenizer, "sst2", **options)
    assert one == eight
    assert one.accuracy > 0
    assert any(attacked.drop.pdr > 0 for attacked in one.attacks)
    assert sum(attacked.queries for attacked in one.attacks) > 60


@pytest.mark.slow
def test_a_decoder_on_eight_devices_gives_the_same(model, place):
    options = {"data": place / "rows.jsonl", "budget": 3, "attacks": ["stresstest"], "batch_size": 8, **ASKED}
    one = m3jax.attack(model.params, model.config, model.tokenizer, "sst2", **options)
    spread = models.load_model(str(place / "expert-a"), "float32", models.make_mesh("fsdp=4,tp=2"))
    eight = m3jax.attack(spread.params, spread.config, spread.tokenizer, "sst2", **options)
    assert one == eight


def test_another_grader_may_judge():
    """The paper's rule takes the last word for the answer; ours finds the label, and finds none in a word."""

    def generate(prompts, settings):
        return [Completion(f"{NAMES[label_of(prompt)]}, I think", 3, True) for prompt in prompts]

    accuracies = {
        grader: attack_task(get_task("sst2", grader), ROWS, generate, make_plan(attacks=["stresstest"]))
        for grader in ("m3jax", "paper")
    }
    assert {grader: (one.accuracy, one.grader) for grader, one in accuracies.items()} == {
        "m3jax": (1.0, "m3jax"), "paper": (0.0, "paper"),
    }  # fmt: skip


def test_the_command_and_its_report(place, tmp_path, capsys):
    arguments = ["attack", str(place / "expert-a"), "--task", "sst2", "--data", str(place / "rows.jsonl")]
    arguments += ["--attack", "stresstest", "--shift", "uppercase", "--max-tokens", "2", "--dtype", "float32"]
    arguments += ["--template", "none", "--limit", "4", "--grader", "paper"]
    assert commands.main(arguments) == 0  # a model that says nothing sensible
    said = capsys.readouterr().out
    assert "note: clean accuracy is 0.0%, and below 5.0% drop rates are undefined, so nothing was attacked" in said
    arguments += ["--floor", "0", "--out", str(tmp_path / "run")]
    assert commands.main([*arguments, "--json"]) == 0
    outcome = json.loads(capsys.readouterr().out)
    assert outcome == json.loads((tmp_path / "run" / "attack.json").read_text())
    assert (outcome["examples"], outcome["prompt"], outcome["protected"]) == (4, PROMPT, list(NAMES))
    assert [one["attack"] for one in outcome["attacks"]] == ["stresstest"]
    assert (outcome["data"], outcome["limit"], outcome["complete"]) == (str(place / "rows.jsonl"), 4, True)
    assert outcome["grader"] == "paper"
    assert commands.main(arguments) == 2
    assert "attack.json is already there" in capsys.readouterr().err
    assert commands.main([*arguments, "--overwrite"]) == 0
    said = capsys.readouterr()
    assert "PDR undefined, as too little was right before" in said.out
    assert "loading" in said.err
    assert commands.main(["report", str(tmp_path / "run"), "--out", str(tmp_path / "report")]) == 0
    assert "| stresstest | 4 | 0.0% | undefined (too little is right) |" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "report").iterdir()} == {"report.md", "report.json", "report.png"}


def attack_command(place, *more, attacks="stresstest,checklist", shifts="typos,uppercase"):
    model = ["attack", str(place / "expert-a"), "--task", "sst2", "--data", str(place / "rows.jsonl"), "--limit", "2"]
    how = ["--attack", attacks, "--shift", shifts, "--max-tokens", "2", "--template", "none", "--floor", "0"]
    return [*model, *how, *more]


def attack_into(place, out, *more):
    return attack_command(place, "--json", "--out", str(out), *more)


def test_an_interruption_says_what_is_kept(place, tmp_path, capsys, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(trial, "_shift", interrupted)
    arguments = attack_command(place, attacks="stresstest", shifts="typos")
    assert commands.main([*arguments, "--out", str(tmp_path)]) == 130
    said = capsys.readouterr().err.splitlines()[-1]
    kept = f"what is finished (1 of the attacks and shifts) is in {tmp_path}"
    assert said == f"m3jax: interrupted: {kept}, and the same command with --resume goes on."
    kept = json.loads((tmp_path / "attack.json").read_text())
    assert ([one["attack"] for one in kept["attacks"]], kept["shifts"]) == (["stresstest"], [])
    assert kept["complete"] is False
    assert commands.main(["report", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert f"| {place / 'expert-a'} (incomplete) | sst2 | stresstest |" in shown
    assert f"data `{place / 'rows.jsonl'}`, limit 2, 2 examples measured, incomplete: the attack was inter" in shown
    assert commands.main(arguments) == 130
    assert "nothing is kept; with --out DIR what is finished would be" in capsys.readouterr().err


def test_a_killed_attack_goes_on(place, tmp_path, capsys, monkeypatch):
    """With --resume, from what is finished, to the same outcome; never with another attack, nor unasked."""
    assert commands.main(attack_into(place, tmp_path / "whole")) == 0
    whole = json.loads(capsys.readouterr().out)
    done, attacked = [], trial._attack

    def killed_at(count):
        def attack(one, *rest):
            if len(done) == count:
                raise KeyboardInterrupt
            done.append(one.name)
            return attacked(one, *rest)

        return attack

    out = tmp_path / "out"
    monkeypatch.setattr(trial, "_attack", killed_at(1))
    assert commands.main(attack_into(place, out)) == 130
    assert commands.main(attack_into(place, out)) == 2
    assert "holds an attack that is not finished: pass --resume to go on with it" in capsys.readouterr().err
    assert commands.main(attack_into(place, out, "--resume", "--seed", "1")) == 2
    assert "holds another run: it differs in seed;" in capsys.readouterr().err
    assert commands.main(attack_into(place, out, "--resume", "--dtype", "float16")) == 2
    assert "holds another run: it differs in weights;" in capsys.readouterr().err
    (out / "attack.json").rename(tmp_path / "part.json")  # killed between the two files
    assert commands.main(attack_into(place, out)) == 2
    monkeypatch.setattr(trial, "_attack", killed_at(2))
    capsys.readouterr()
    assert commands.main(attack_into(place, out, "--resume")) == 0
    assert done == ["stresstest", "checklist"]
    assert json.loads(capsys.readouterr().out) == whole == json.loads((out / "attack.json").read_text())
    assert commands.main(attack_into(place, out, "--resume")) == 0  # and again, without a model
    said = capsys.readouterr()
    assert (json.loads(said.out), "loading" in said.err) == (whole, False)
    assert commands.main(attack_into(place, out)) == 2
    assert "attack.json is already there" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "content", "more", "sentence"),
    [
        ("attack-run.json", '{"mine": 1}', ["--overwrite"], "attack-run.json is none that m3jax has written"),
        (
            "attack-run.json",
            '{"identity": {}, "found": {}}',
            ["--resume"],
            "is of no attack that could be gone on with",
        ),
        ("attack.json", '{"complete": false}', ["--resume"], "attack-run.json is not beside it: --overwrite it"),
        ("attack.json", "mine", [], "attack.json is already there"),
        ("none", "", ["--resume", "--overwrite"], "leave one of them out"),
    ],
)
def test_what_is_no_attack_is_not_gone_on_with(place, tmp_path, capsys, file, content, more, sentence):
    (tmp_path / file).write_text(content)
    assert commands.main(attack_into(place, tmp_path, *more)) == 2
    assert sentence in capsys.readouterr().err
    assert (tmp_path / file).read_text() == content


def test_what_needs_no_weights_is_said_before_they_are_loaded(place, tmp_path, capsys, monkeypatch):
    def never(*arguments):
        raise AssertionError("loaded weights for nothing")

    monkeypatch.setattr(models.decoder, "load_params", never)
    base = ["attack", str(place / "expert-a"), "--task", "sst2", "--data", str(place / "rows.jsonl")]
    for arguments, sentence in [
        ([*base, "--attack", "deepbug"], "no attack is called 'deepbug'"),
        ([*base, "--attack", ""], "nothing to try"),
        ([*base, "--attack", "bertattack"], "give a BERT with --masked-lm MODEL"),
        ([*base, "--attack", "textfooler"], "--embeddings FILE"),
        ([*base, "--shift", "typos=7"], "rate above 0 and up to 1"),
        ([*base, "--prompt", "Good?"], "should have {content} in it once"),
        ([*base, "--overflow", "skip"], "--overflow is 'skip', but must be one of error, truncate"),
        ([*base, "--batch-size", "0"], "--batch-size is 0, but must be at least 1"),
        ([*base, "--search-examples", "8"], "leaves none to measure on"),
        ([*base[:4], "--data", "nowhere.jsonl"], "there is no data file nowhere.jsonl"),
        ([*base[:2], "--task", "alpaca_eval", "--data", base[-1]], "is not alpaca_eval data"),
        ([*base[:2], "--task", "humaneval"], "--run-code"),
    ]:
        capsys.readouterr()
        assert commands.main(arguments) == 2, arguments
        assert sentence in capsys.readouterr().err, arguments


@pytest.mark.slow
def test_the_training_script_makes_a_model_that_can_be_attacked(data, tmp_path, capsys):
    lines = (data / "sst2_phrases_train.tsv").read_text().splitlines(keepends=True)[:400]
    (tmp_path / "train.tsv").write_text("".join(lines))
    script = Path(__file__).parents[2] / "scripts" / "train_sst2"
    base = [sys.executable, str(script), "--train", str(tmp_path / "train.tsv"), "--hidden", "16", "--layers", "1"]
    base += ["--vocabulary", "600", "--epochs", "1"]
    for arguments in (["--out", str(tmp_path / "a")], ["--init", str(tmp_path / "a"), "--out", str(tmp_path / "b")]):
        subprocess.run([*base, *arguments], check=True, capture_output=True)
    command = ["attack", str(tmp_path / "b"), "--task", "sst2", "--data", str(data / "sst2_phrases_dev.tsv")]
    command += ["--template", "none", "--limit", "4", "--max-tokens", "2", "--attack", "stresstest", "--json"]
    assert commands.main(command) == 0
    assert json.loads(capsys.readouterr().out)["examples"] == 4
