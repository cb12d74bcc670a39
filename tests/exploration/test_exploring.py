"""Many ratios: the same samples anywhere, one compilation, resumable, and the bits of the merge that is written."""

import itertools
import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from safetensors.numpy import load_file, save_file
from support import decoders as tiny

import m3jax
from m3jax.arithmetic import threefry
from m3jax.errors import M3Error
from m3jax.exploration import exploring, resident
from m3jax.exploration.journal import SampleJournal
from m3jax.exploration.samples import Space, drawn
from m3jax.exploration.selection import Result, choose, pareto_front
from m3jax.exploration.strategies import EXTENSIBLE, STRATEGIES, strategy_of
from m3jax.methods.mixup import draw_weights
from m3jax.outputs.verification import verify
from m3jax.recipe import load_recipe

CONFIG = tiny.CONFIGS["llama"]
EVOLVING = ("auto", "cma")  # strategies that compile
GOAL = 0.3  # the ratio that `closeness` likes best


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models")
    base = tiny.weights(CONFIG)
    rng = np.random.default_rng(5)
    for name in ("base", "a", "b", "c"):
        (directory / name).mkdir()
        change = 0.0 if name == "base" else 0.05
        tensors = {
            k: (v + change * rng.standard_normal(v.shape)).astype(tiny.BFLOAT16 if name != "c" else np.float32)
            for k, v in base.items()
        }
        save_file(tensors, directory / name / "model.safetensors")
        (directory / name / "config.json").write_text(json.dumps(CONFIG))
    return directory


def recipe_of(place, method="linear", experts=("a", "b"), **more):
    parts = {"merge_method": method, "models": [str(place / e) for e in experts], "mixup": {"alpha": 0.7}, "seed": 11}
    if method not in ("linear", "slerp"):
        parts["base_model"] = str(place / "base")
    if method == "slerp":
        parts["base_model"] = str(place / experts[0])
    return load_recipe({**parts, **more})


def closeness(place):
    """A score that is best where the merge lies at GOAL between the experts."""
    name = "model.layers.0.mlp.up_proj.weight"
    a, b = (load_file(place / e / "model.safetensors")[name].astype(np.float32) for e in ("a", "b"))

    def score(params, share):
        merged = np.asarray(params[name]).astype(np.float32)
        return {"near": -float(np.abs(merged - (GOAL * a + (1 - GOAL) * b)).mean()), "size": float(merged.std())}

    return score


RECIPES = {
    "linear": {},
    "linear, layers": {"mixup": {"alpha": 0.4, "granularity": "layer"}, "dtype": "float32"},
    "three experts": {"experts": ("a", "b", "c"), "dtype": "bfloat16"},
    "task_arithmetic + dare": {"method": "task_arithmetic", "sparsify": {"method": "dare", "density": 0.6}},
    "magnitude": {"method": "task_arithmetic", "sparsify": {"method": "magnitude", "density": [0.2, 0.9]}},
    "ties of the paper": {
        "method": "ties",
        "parameters": {"density": 0.5, "trim_scope": "model", "sign_election": "unweighted"},
        "sparsify": {"method": "dare", "density": 0.8},
    },
    "ties, tensors": {
        "method": "ties",
        "parameters": {"density": 0.4, "lambda": 0.7},
        "mixup": {"alpha": 2, "granularity": "tensor"},
        "experts": ("a", "b", "c"),
        "exclude": ["embed_tokens"],
    },
    "slerp": {"method": "slerp", "mixup": {"alpha": 1, "granularity": "layer"}},
}


FAST = ("ties of the paper",)


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in RECIPES]
)
def test_what_is_written_has_the_bits_that_were_evaluated(place, tmp_path, name):
    """On a mesh of eight devices in memory, out of core for the output, and again from the manifest."""
    settings = dict(RECIPES[name])
    recipe = recipe_of(place, settings.pop("method", "linear"), **settings)
    seen = []

    def score(params, share):
        seen.append({k: np.asarray(v) for k, v in params.items()})
        return {"s": float(len(seen))}

    mesh = jax.make_mesh((4, 2), ("fsdp", "tp"), axis_types=(AxisType.Auto,) * 2)
    found = m3jax.explore(recipe, tmp_path / "out", score=score, samples=2, mesh=mesh)
    assert found.choice.sample == 1
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == seen[-1].keys()
    for key, array in written.items():
        assert array.dtype == seen[-1][key].dtype
        assert array.tobytes() == seen[-1][key].tobytes(), key
    again = m3jax.replay(tmp_path / "out", tmp_path / "again")
    assert again.digest == found.merge.digest
    assert found.merge.manifest["weights"].keys() == found.choice.weights.keys()


def test_an_expert_that_is_called_base_is_scored_by_itself(place, tmp_path, monkeypatch):
    monkeypatch.chdir(place)
    parts = {"merge_method": "task_arithmetic", "base_model": "c", "models": ["base", "a"], "mixup": {"alpha": 1}}
    name = "model.layers.0.mlp.up_proj.weight"
    for _ in range(2):  # the second time from the journal
        score = lambda params, share: {"s": float(np.asarray(params[name]).astype(np.float32).std())}  # noqa: E731
        how = {"score": score, "samples": 1, "references": True, "overwrite": True}
        found = m3jax.explore(load_recipe(parts), tmp_path / "out", **how)
        stored = [
            load_file(place / each / "model.safetensors")[name].astype(np.float32).std() for each in ("c", "base")
        ]
        assert [result.reference for result in found.references] == ["base", "base", "a", "equal weights"]
        assert [result.scores["s"] for result in found.references[:2]] == pytest.approx(stored)


def test_a_sample_is_drawn_by_itself(place):
    """Sample k uses the key fold_in(fold_in(root, 2), k) where a merge uses its root, whatever else is drawn."""
    root = threefry.root_key(11)
    space = Space(("model",), 3, 0.7, False, root)
    key = jax.random.key(11, impl="threefry2x32")
    theirs = jax.random.fold_in(jax.random.fold_in(key, 2), 5)
    assert drawn(space, 5) == {"model": draw_weights(theirs, 0.7, 3)}
    layers = Space(("model.layers.0", "outside blocks"), 2, 0.7, False, root)
    assert drawn(layers, 5)["model.layers.0"] == draw_weights(theirs, 0.7, 2, "model.layers.0")
    assert len({drawn(space, k)["model"] for k in range(50)}) == 50


def values_of(strategy, value):
    """Runs a strategy to its end."""
    trials = next(strategy)
    every = []
    while True:
        every += trials
        try:
            trials = strategy.send([value(trial) for trial in trials])
        except StopIteration:
            return every


@pytest.mark.parametrize(
    "name", [n if n not in EVOLVING else pytest.param(n, marks=pytest.mark.slow) for n in STRATEGIES]
)
@pytest.mark.parametrize(("count", "groups"), [(2, 1), (3, 1), (2, 3)])
@pytest.mark.parametrize("budget", [1, 7, 32])
def test_strategies_keep_to_the_simplex_and_the_budget(name, count, groups, budget):
    if name in EVOLVING:
        pytest.importorskip("evosax")
        if (count, groups) != (3, 1):
            return  # one compilation is enough
    labels = tuple(f"layers.{i}" for i in range(groups))
    space = Space(labels, count, 0.5, False, threefry.root_key(3))

    def value(trial):
        return -abs(trial.weights[labels[0]][0] - GOAL)

    trials = values_of(strategy_of(name, space, budget), value)
    assert trials == values_of(strategy_of(name, space, budget), value)
    assert 0.8 * budget <= sum(trial.share for trial in trials) <= budget or (name == "grid" and trials)
    for trial in trials:
        assert trial.weights.keys() == set(labels)
        for weights in trial.weights.values():
            assert len(weights) == count
            assert min(weights) >= 0
            assert abs(sum(weights) - 1) < 1e-12
    if name in EXTENSIBLE:
        assert values_of(strategy_of(name, space, budget + 5), value)[:budget] == trials
    other = space._replace(root=threefry.root_key(4))
    alike = name == "grid" or (name, budget) == ("auto", 1)
    assert alike or values_of(strategy_of(name, other, budget), value) != trials


def test_the_grid_is_the_classic_one():
    space = Space(("model",), 2, 0.5, False, threefry.root_key(0))
    ratios = [trial.weights["model"][0] for trial in values_of(strategy_of("grid", space, 11), lambda t: 0.0)]
    assert ratios == [i / 10 for i in range(11)]
    corners = [
        t.weights["model"] for t in values_of(strategy_of("grid", space._replace(num_experts=3), 3), lambda t: 0.0)
    ]
    assert sorted(corners) == [(0, 0, 1), (0, 1, 0), (1, 0, 0)]


def test_sobol_points_are_spread_more_evenly_than_draws():
    """Discrepancy of the cube's points, here those of a uniform Beta, where weights are the points."""
    from scipy.stats import qmc

    space = Space(("x", "y"), 2, 1.0, False, threefry.root_key(1))
    spread = {
        name: qmc.discrepancy(
            [[w[0] for w in t.weights.values()] for t in values_of(strategy_of(name, space, 64), lambda t: 0.0)]
        )
        for name in ("draw", "sobol")
    }
    assert spread["sobol"] < spread["draw"] / 4


def test_halving_tries_more_and_keeps_the_better():
    space = Space(("model",), 2, 1.0, False, threefry.root_key(2))
    trials = values_of(strategy_of("halving", space, 32), lambda t: -abs(t.weights["model"][0] - GOAL))
    shares = [(share, len(list(group))) for share, group in itertools.groupby(trials, key=lambda t: t.share)]
    assert [share for share, _ in shares] == [0.125, 0.25, 0.5, 1.0]
    assert shares[0][1] > 32
    best = min(trials[: shares[0][1]], key=lambda t: abs(t.weights["model"][0] - GOAL))
    assert best.sample in {trial.sample for trial in trials if trial.share == 1.0}


@pytest.mark.slow
def test_cma_closes_in_on_the_goal():
    pytest.importorskip("evosax")
    space = Space(("model",), 3, 1.0, False, threefry.root_key(2))
    goal = np.array([0.2, 0.5, 0.3])

    def off(trial):
        return float(np.abs(np.array(trial.weights["model"]) - goal).max())

    trials = values_of(strategy_of("cma", space, 60), lambda t: -off(t))
    assert min(map(off, trials[-10:])) < 0.05 < min(map(off, trials[:5]))
    alike = values_of(strategy_of("auto", space, 61), lambda t: -off(t))
    assert alike[0].weights == {"model": (1 / 3,) * 3}
    assert [trial.weights for trial in alike[1:]] == [trial.weights for trial in trials]


@pytest.mark.parametrize("name", EVOLVING)
def test_cma_without_its_package_is_a_sentence(name, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "evosax.algorithms", None)
    with pytest.raises(M3Error, match=rf"^{name}: .*pip install 'm3jax\[explore\]'"):
        strategy_of(name, Space(("model",), 2, 1.0, False, threefry.root_key(2)), 4)


def result(sample, **scores):
    return Result(sample, {"model": (0.5, 0.5)}, 1.0, scores, 0.0, "model")


def test_choices():
    results = [result(0, x=0.9, y=0.1), result(1, x=0.6, y=0.5), result(2, x=0.5, y=0.4), result(3, x=0.2, y=0.8)]
    assert [r.sample for r in pareto_front(results)] == [0, 1, 3]
    assert choose(results, "x").sample == 0
    assert choose(results, "y").sample == 3
    assert choose(results, "mean").sample == 1
    assert choose(results, "pareto").sample == 1
    assert choose(results, "3").sample == 3
    assert choose([result(4, x=0.5), result(2, x=0.5)], "x").sample == 2
    part = result(5, x=1.0, y=1.0)._replace(share=0.5)
    assert choose([*results, part], "mean").sample == 1
    with pytest.raises(M3Error, match="there is no sample 9"):
        choose(results, "9")


def test_32_samples_are_one_compilation(place, tmp_path, monkeypatch):
    """Of the merge; scoring is plain numpy here, so that every compilation counted is the merge's."""
    compiled, traced = [], []

    def listen(name, seconds, fun_name=None, **_):
        if name == "/jax/core/compile/backend_compile_duration":
            compiled.append((len(seen), fun_name))

    merged_leaf = resident.merged_leaf
    monkeypatch.setattr(resident, "merged_leaf", lambda *a: traced.append(1) or merged_leaf(*a))
    near, seen = closeness(place), []

    def score(params, share):
        seen.append(1)
        return near(params, share)

    recipe = recipe_of(place, "task_arithmetic", sparsify={"method": "dare", "density": 0.7})
    monkeypatch.setattr(exploring, "merge_checkpoint", lambda *a, **k: SimpleNamespace(directory="", digest=""))
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        m3jax.explore(recipe, tmp_path / "out", score=score, samples=32)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert len(seen) == 32
    assert [entry for entry in compiled if "merge_arrays" in str(entry[1])] == [compiled[-1]]
    assert {done for done, _ in compiled} == {0}  # before the first score; what is compiled besides checks the inputs
    assert len(traced) == len(tiny.shapes(CONFIG))


def test_inputs_that_are_not_finite_are_refused_before_any_sample(tmp_path):
    for name, value in (("one", 1.0), ("two", np.inf)):
        (tmp_path / name).mkdir()
        save_file({"w": np.array([1.0, value], np.float32)}, tmp_path / name / "model.safetensors")
    models = [str(tmp_path / n) for n in ("one", "two")]
    recipe = load_recipe({"merge_method": "linear", "models": models, "mixup": {"alpha": 1}})
    with pytest.raises(M3Error, match=r"w: holds NaN or infinities in .*two"):
        m3jax.explore(recipe, tmp_path / "out", score=lambda params, share: {"s": 1.0}, samples=1)


def test_a_killed_exploration_goes_on(place, tmp_path):
    near, calls = closeness(place), []

    def score(params, share):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return near(params, share)

    arguments = {"samples": 8, "select": "near"}
    whole = m3jax.explore(recipe_of(place), tmp_path / "whole", score=near, **arguments)
    with pytest.raises(KeyboardInterrupt):
        m3jax.explore(recipe_of(place), tmp_path / "out", score=score, **arguments)
    journal = tmp_path / "out.exploration" / "journal.jsonl"
    assert len(journal.read_text().splitlines()) == 5
    journal.write_bytes(journal.read_bytes()[:-20])  # killed while it wrote the fourth
    assert not (tmp_path / "out").exists()
    seen = []
    again = m3jax.explore(
        recipe_of(place), tmp_path / "out", score=score, watch=lambda r, known: seen.append(known), **arguments
    )
    assert seen == [True] * 3 + [False] * 5
    assert len(calls) == 10
    assert again.choice[:4] == whole.choice[:4]
    assert again.merge.digest == whole.merge.digest
    fresh = []
    how = {"score": near, "samples": 12, "watch": lambda result, known: fresh.append(not known)}
    more = m3jax.explore(recipe_of(place), tmp_path / "more", select="size", journal=again.journal, **how)
    assert [r.sample for r in more.results] == list(range(12))
    assert fresh == [False] * 8 + [True] * 4
    alone = m3jax.explore(recipe_of(place), tmp_path / "alone", select="size", score=near, samples=12)
    assert [r[:4] for r in more.results] == [r[:4] for r in alone.results]
    other = m3jax.explore(
        recipe_of(place), tmp_path / "other", score=near, samples=8, select="2", journal=again.journal
    )
    assert other.choice.sample == 2
    for change, sentence in [
        ({"strategy": "sobol"}, "differs in strategy"),
        ({"recipe": recipe_of(place, seed=12)}, "differs in recipe"),
        ({"recipe": recipe_of(place, experts=("a", "c"))}, "differs in models, recipe"),
    ]:
        given = {"recipe": recipe_of(place), "samples": 2, "score": near, "journal": again.journal, **change}
        with pytest.raises(M3Error, match=sentence):
            m3jax.explore(out=tmp_path / "no", **given)
    assert not (tmp_path / "no").exists()


def test_an_exploration_that_was_killed_when_its_merge_was_there_is_finished(place, tmp_path, monkeypatch):
    """By the same command; what is finished is refused, and so is a merge of other weights or another recipe."""
    how = {"score": closeness(place), "samples": 3, "select": "near"}
    whole = m3jax.explore(recipe_of(place), tmp_path / "whole", **how)

    def killed(*arguments):
        raise KeyboardInterrupt

    out, told = tmp_path / "out", tmp_path / "out.exploration" / "exploration.json"
    with monkeypatch.context() as patched:
        patched.setattr(exploring, "write_whole", killed)
        with pytest.raises(KeyboardInterrupt):
            m3jax.explore(recipe_of(place), out, **how)
    assert out.exists()
    assert not told.exists()
    again = m3jax.explore(recipe_of(place), out, **how)
    assert (again.merge.digest, again.choice[:4]) == (whole.merge.digest, whole.choice[:4])
    assert json.loads(told.read_text())["directory"] == str(out)
    assert verify(out).differences == ()
    with pytest.raises(M3Error, match="exists already: pass --overwrite, which keeps the samples"):
        m3jax.explore(recipe_of(place), out, **how)
    other = next(result for result in again.results if result.sample != again.choice.sample)
    told.unlink()
    for change in ({"select": str(other.sample)}, {"recipe": recipe_of(place, seed=12)}):
        with pytest.raises(M3Error, match="exists already"):  # what was written is another merge
            m3jax.explore(out=out, **{"recipe": recipe_of(place), **how, **change})


@pytest.mark.slow
def test_an_adaptive_strategy_goes_on_where_it_was(place, tmp_path):
    near, calls = closeness(place), []

    def score(params, share):
        calls.append(1)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return near(params, share)

    arguments = {"samples": 8, "select": "near", "strategy": "halving"}
    whole = m3jax.explore(recipe_of(place), tmp_path / "whole", score=near, **arguments)
    with pytest.raises(KeyboardInterrupt):
        m3jax.explore(recipe_of(place), tmp_path / "out", score=score, **arguments)
    again = m3jax.explore(recipe_of(place), tmp_path / "out", score=score, **arguments)
    assert [r[:4] for r in again.results] == [r[:4] for r in whole.results]
    assert again.cost <= 8


def test_one_device_and_eight_choose_the_same(place, tmp_path):
    near = closeness(place)
    recipe = recipe_of(place, mixup={"alpha": 1, "granularity": "layer"})
    found = [
        m3jax.explore(recipe, tmp_path / f"{n}", score=near, samples=4, mesh=mesh)
        for n, mesh in enumerate((None, jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))))
    ]
    assert [r[:4] for r in found[0].results] == [r[:4] for r in found[1].results]
    assert found[0].choice[:4] == found[1].choice[:4]
    assert found[0].merge.digest == found[1].merge.digest


def test_what_cannot_be_explored_is_said(place, tmp_path):
    near = closeness(place)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    plain = load_recipe({"merge_method": "linear", "models": [str(place / e) for e in ("a", "b")]})
    broken = tmp_path / "broken.exploration"
    broken.mkdir()
    (broken / "journal.jsonl").write_text("{}\nno\n")
    (tmp_path / "mine.exploration").mkdir()
    (tmp_path / "mine.exploration" / "exploration.json").write_text('{"mine": 1}')
    for recipe, out, options, sentence in [
        (recipe_of(place), "mine", {"score": near}, "exploration.json is none that m3jax has written, and would be"),
        (plain, "x", {"score": near}, "has no mixup"),
        (recipe_of(place), "x", {}, "give at least one --task"),
        (
            recipe_of(place),
            "x",
            {"score": near, "strategy": "best"},
            "strategy is 'best', but must be one of auto, draw, sobol",
        ),
        (recipe_of(place), "x", {"score": near, "samples": 0}, "samples: is 0, but must be"),
        (recipe_of(place), "x", {"score": near, "samples": 2.5}, "the number of samples is 2.5, but must be a whole"),
        (recipe_of(place), "x", {"score": near, "select": 3}, "select is 3, but must be of type str"),
        (recipe_of(place), "x", {"tasks": ["sst2"]}, r"tasks is \['sst2'\], but must be of type Mapping"),
        (recipe_of(place), "x", {"score": near, "optimize": "loss"}, "optimize is 'loss', but must be of type Opt"),
        (recipe_of(place), "x", {"tasks": {"a": None}, "evaluation": {}}, "evaluation is {}, but must be of type Eval"),
        (recipe_of(place), "taken", {"score": near}, "exists already"),
        (recipe_of(place), "broken", {"score": near}, "is no journal of an exploration"),
        (recipe_of(place), "s3://bucket/out", {"score": near}, "--journal DIR"),
    ]:
        with pytest.raises(M3Error, match=sentence):
            m3jax.explore(recipe, out if "://" in out else tmp_path / out, **options)
    with pytest.raises(M3Error, match="recipe has no mixup"):
        m3jax.merge_checkpoint(plain, tmp_path / "x", weights={"model": (1.0, 0.0)})
    with pytest.raises(M3Error, match="not all finite"):
        m3jax.merge_checkpoint(recipe_of(place), tmp_path / "x", weights={"model": (1.0, float("nan"))})
    with pytest.raises(M3Error, match="none given for 'model'"):
        m3jax.merge_checkpoint(recipe_of(place), tmp_path / "x", weights={"w": (1.0, 0.0)})
    with pytest.raises(M3Error, match="3 are given for model where 2 are needed"):
        m3jax.merge_checkpoint(recipe_of(place), tmp_path / "x", weights={"model": (1.0, 0.0, 0.0)})
    for weights in ([1.0, 0.0], {"model": 1.0}, {"model": "ab"}):
        with pytest.raises(M3Error, match="weights: are not numbers by group"):
            m3jax.merge_checkpoint(recipe_of(place), tmp_path / "x", weights=weights)


def test_scores_of_ones_own_are_finite_numbers_by_name(place, tmp_path):
    """Else the choice would be arbitrary, and the journal could not be read again."""
    told = iter([{"s": np.float32(0.5)}, {"s": 0.25}, {"s": np.nan}, {"other": 1.0}, 1.0, {"s": 1}])
    how = {"score": lambda params, share: next(told), "samples": 3}
    for sentence in ("gives {'s': nan}, but must", "gives other, but gave s before", "gives 1.0, but must"):
        with pytest.raises(M3Error, match=sentence):
            m3jax.explore(recipe_of(place), tmp_path / "out", **how)
    found = m3jax.explore(recipe_of(place), tmp_path / "out", **how)
    assert [result.scores for result in found.results] == [{"s": 0.5}, {"s": 0.25}, {"s": 1.0}]
    for select, sentence in (("t", "select is 't', but must be one of mean, pareto, s"), ("3", "no sample 3")):
        with pytest.raises(M3Error, match=sentence):
            m3jax.explore(
                recipe_of(place), tmp_path / f"other-{select}", score=lambda *_: {"s": 1}, samples=1, select=select
            )


def test_a_journal_has_one_writer(tmp_path):
    with SampleJournal(tmp_path / "j", {"a": 1}), pytest.raises(M3Error, match="another exploration is at work there"):
        SampleJournal(tmp_path / "j", {"a": 1})
    with SampleJournal(tmp_path / "j", {"a": 1}) as again:
        assert again.done == []
    with pytest.raises(M3Error, match="No such file"):
        SampleJournal(tmp_path / "no" / "j", {"a": 1})


def test_buffers_that_differ_are_refused(place, tmp_path):
    for name, steps in (("one", 1), ("two", 2)):
        (tmp_path / name).mkdir()
        save_file(
            {"w": np.ones(4, np.float32), "ids": np.array([steps], np.int32)}, tmp_path / name / "model.safetensors"
        )
    recipe = load_recipe(
        {"merge_method": "linear", "models": [str(tmp_path / n) for n in ("one", "two")], "mixup": {"alpha": 1}}
    )
    with pytest.raises(M3Error, match="ids: is a buffer of I32"):
        m3jax.explore(recipe, tmp_path / "out", score=lambda params, share: {"s": 1.0}, samples=1)
