"""explore(): many ratios, merged in memory, evaluated, compared; the best one written as `m3jax merge` writes."""

import functools
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jax.sharding import Mesh

from m3jax.anatomy.libraries import HUGGINGFACE, library_of, theirs_of
from m3jax.anatomy.stored import Home, find_home, step_metadata
from m3jax.checkpoints import digest_tensor
from m3jax.checkpoints.locate import CONFIG, scratch
from m3jax.checkpoints.remote import is_url
from m3jax.checkpoints.views_permuted import Permuted
from m3jax.decoder import ApplyFn, DecoderConfig, check_vocabulary
from m3jax.errors import M3Error
from m3jax.evaluation import tokens
from m3jax.evaluation.checks import check_count, check_type, check_whole
from m3jax.evaluation.ownership import check_entries
from m3jax.evaluation.records import digest, write_whole
from m3jax.evaluation.report import EXPLORATION_FILE
from m3jax.exploration import optimizing
from m3jax.exploration.finishing import check_chosen, made_before
from m3jax.exploration.journal import SEEN, SampleJournal, first_line
from m3jax.exploration.optimizing import Optimization
from m3jax.exploration.pictures import Drawn
from m3jax.exploration.references import Reference, expert_names, references_of
from m3jax.exploration.remarks import remarks_on
from m3jax.exploration.resident import Params, Resident, check_inputs, load_resident
from m3jax.exploration.samples import Space, space_of
from m3jax.exploration.scoring import (
    Dev,
    Evaluation,
    Hopeless,
    Score,
    Scorer,
    as_scorer,
    make_score,
    own_params,
    read_devs,
)
from m3jax.exploration.selection import MEAN, PARETO, Result, check_select, choose, dominates, pareto_front, value
from m3jax.exploration.strategies import EXTENSIBLE, RANKING, Trial, pursue, strategy_of
from m3jax.methods.mixup import GRANULARITIES
from m3jax.outputs.copies import write_copy
from m3jax.outputs.places import check_apart
from m3jax.progress import Progress, Tell
from m3jax.recipe import MixupSettings, Recipe, load_recipe
from m3jax.streaming.jobs import DEFAULT_SHARD_SIZE, Ready, prepared, read_beside
from m3jax.streaming.merging import MergeResult, merge_checkpoint
from m3jax.streaming.steps import with_steps

Watch = Callable[[Result, bool], None]
"""Called with each result, and whether an earlier run had it."""


class Exploration(NamedTuple):
    """What an exploration found.

    Attributes:
        choice: The chosen sample.
        results: All that were evaluated, in order.
        front: The numbers of the samples that no other one beats in every task.
        cost: Evaluations on all dev examples that the trials amount to; what was stopped counts for what it was shown.
        losses: Of learning, before each step; empty where nothing was learned in this run.
        journal: The directory that holds the samples.
        merge: The output directory that was written.
        seconds: Wall time.
        references: The base, every expert and equal weights, on the same examples; they are never chosen.
        experts: What the recipe calls the experts, in the order of weights.
        examples: By task, how many a whole evaluation is on; empty for a score of one's own.
        strategy: How it looked.
    """

    choice: Result
    results: tuple[Result, ...]
    front: tuple[int, ...]
    cost: float
    losses: tuple[float, ...]
    journal: Path
    merge: MergeResult
    seconds: float
    references: tuple[Result, ...]
    experts: tuple[str, ...]
    examples: Mapping[str, int]
    strategy: str

    @property
    def drawn(self) -> Drawn:
        """What `picture` draws."""
        return Drawn(self.choice, self.results, self.references, self.experts, self.examples)

    def to_json(self) -> dict[str, Any]:
        """The same as plain data for JSON."""
        return {
            "directory": str(self.merge.directory),
            "digest": self.merge.digest,
            "journal": str(self.journal),
            "strategy": self.strategy,
            "choice": self.choice.to_json(),
            "front": list(self.front),
            "cost": self.cost,
            "losses": list(self.losses),
            "seconds": self.seconds,
            "experts": list(self.experts),
            "examples": dict(self.examples),
            "references": [result.to_json() for result in self.references],
            "remarks": list(self.remarks),
            "samples": [result.to_json() for result in self.results],
        }

    @property
    def remarks(self) -> tuple[str, ...]:
        """What the scores cannot tell, in sentences."""
        return remarks_on(self.choice, self.results, self.references, self.examples, self.experts)


class _Work(NamedTuple):
    """What one exploration works with."""

    recipe: Recipe
    space: Space
    resident: Callable[[], Resident]
    score: Scorer
    journal: SampleJournal
    watch: Watch | None

    def evaluate(
        self,
        trial: Trial,
        granularity: str,
        optimized: int | None = None,
        learning: str | None = None,
        hopeless: Hopeless | None = None,
    ) -> Result:
        """The result of a trial, from the journal or by merging and evaluating."""
        unscored = Result(trial.sample, trial.weights, trial.share, {}, 0.0, granularity, optimized, learning)
        known = self.journal.find(trial.sample, trial.share, trial.weights, hopeless)
        twin = self.journal.twin(trial.share, trial.weights) if known is None else None
        if twin is not None:  # such as equal weights, which samples are measured against
            known = unscored._replace(scores=twin.scores)
            self.journal.note(known)
        return self._said(known, unscored, lambda: self.resident().merge(trial.weights), hopeless)

    def measure(self, number: int, reference: Reference, granularity: str) -> Result:
        """The result of a reference, likewise."""
        known = self.journal.find(-number, 1.0, reference.weights)
        unscored = Result(-number, reference.weights, 1.0, {}, 0.0, granularity, reference=reference.name)
        return self._said(known, unscored, reference.params)

    def _said(
        self,
        known: Result | None,
        unscored: Result,
        params: Callable[[], Params],
        hopeless: Hopeless | None = None,
    ) -> Result:
        """What is known, or else scored and noted now; whoever watches is told."""
        result = known
        if result is None:
            begun = time.perf_counter()
            found = self.score(params(), unscored.share, hopeless)
            scores, seconds = self._checked(found.scores), time.perf_counter() - begun
            result = unscored._replace(scores=scores, seconds=seconds, share=found.share, most=found.most)
            self.journal.note(result)
        if self.watch is not None:
            self.watch(result, known is not None)
        return result

    def _checked(self, scores: Any) -> dict[str, float]:
        """Scores as numbers that a journal keeps.

        Raises:
            M3Error: They are no finite numbers by name, or of other names than those before.
        """
        try:
            found = {str(name): float(score) for name, score in scores.items()}
        except (AttributeError, TypeError, ValueError):
            found = {}
        if not found or not all(map(math.isfinite, found.values())):
            raise M3Error(f"score: gives {scores!r}, but must give finite numbers by name, such as {{'accuracy': 0.5}}")
        before = next((result.scores for result in self.journal.done), found)
        if found.keys() != before.keys():
            raise M3Error(f"score: gives {', '.join(found)}, but gave {', '.join(before)} before: give the same names")
        return found


def _journal_directory(out: str | os.PathLike[str], journal: str | os.PathLike[str] | None) -> Path:
    """Where the samples are kept: beside the output, unless said otherwise."""
    if journal is not None:
        return Path(journal)
    if is_url(os.fspath(out)):
        raise M3Error(f"{out}: samples are kept on a local disk: say where with --journal DIR")
    place = Path(out)
    return place.with_name(f"{place.name}.exploration")


def _identity(
    recipe: Recipe,
    ready: Ready,
    scores: "_Prepared",
    samples: int,
    select: str,
    strategy: str,
    before: Mapping[str, Any],
) -> dict[str, Any]:
    """What the results in a journal depend on, and no more: independent draws can be gone on with.

    Args:
        recipe: The recipe.
        ready: What is merged.
        scores: How samples are scored.
        samples: The budget.
        select: What values are by.
        strategy: How it is looked.
        before: What the journal is of that is there; where the models' files look as they did, they are not read again.
    """
    seen = digest([list(ready.fingerprints), [s.checkpoint.fingerprint() for s in ready.sources]])
    models = before.get("models") if before.get(SEEN) == seen else None
    identity: dict[str, Any] = {
        "recipe": digest(recipe.resolved()),
        "models": models or _content(ready),
        SEEN: seen,
        "files beside weights": digest(
            [[told[1:] for told in read_beside(ready.sources)], ready.tokens, scores.beside]
        ),
        "tasks": dict(scores.told),
        "strategy": strategy,
    }
    ranked = MEAN if select == PARETO or select.isdecimal() else select  # what values are by
    identity["samples"] = None if strategy in EXTENSIBLE else samples
    identity["select"] = ranked if strategy in RANKING else None
    return identity


def _content(ready: Ready) -> str:
    """Digest of the models by their bytes: a file's times and number may be set back, or change without it."""
    told: dict[str, Any] = {}
    for source in ready.sources:
        checkpoint, name = source.checkpoint, source.input.name
        looks = checkpoint.fingerprint()
        if all("tag" in file for file in looks.values()):  # a remote file's, which nobody can set back
            told[name] = looks
        else:
            told[name] = {tensor: digest_tensor(checkpoint, tensor) for tensor in checkpoint.tensors}
    return digest([[model.input.name for model in ready.models], told])


def _run(work: _Work, strategy: str, samples: int, select: str, early_stopping: bool) -> list[Result]:
    """All trials of a strategy.

    A sample is stopped as soon as one before it would be at least as good in every task, and better in one, even if all
    that is left were right. So whatever is selected, and the front, are the same as if none were stopped; a strategy
    that ranks all values would go other ways.
    """
    assert work.recipe.mixup is not None
    granularity = work.recipe.mixup.granularity
    results: list[Result] = []

    def hopeless(most: Mapping[str, float]) -> bool:
        return any(result.share == 1.0 and dominates(result.scores, most) for result in results)

    def worth(trial: Trial) -> float:
        stops = early_stopping and strategy not in RANKING and str(trial.sample) != select
        results.append(work.evaluate(trial, granularity, hopeless=hopeless if stops else None))
        check_select(select, tuple(results[-1].scores))  # the names of a score of one's own are known from here on
        return value(results[-1], select)

    pursue(strategy_of(strategy, work.space, samples), worth)
    return results


def _learn(
    given: "_Circumstances", work: _Work, how: Optimization, start: Result, number: int
) -> tuple[Result, tuple[float, ...]]:
    """The learned weights, evaluated as one more sample, and the losses on the way to them."""
    granularity, tell = how.granularity or start.granularity, given.tell
    learning = digest([how._asdict(), granularity, start.sample])
    before = next((result for result in given.book.done if result.learning == learning), None)
    if before is not None:  # an earlier run learned this
        return work.evaluate(Trial(before.sample, before.weights), granularity)._replace(sample=number), ()
    if tell is not None:
        tell(f"learning {granularity} weights from sample {start.sample}: {how.steps} steps")

    def watch(step: int, now: float) -> None:
        if tell is not None and (step % max(how.steps // 10, 1) == 0 or step == how.steps - 1):
            tell(f"step {step + 1} of {how.steps}: loss {now:.4g}")

    scores, resident = given.scores, work.resident()
    batches = optimizing.dev_batches(scores.devs, how, scores.tokenizer, given.mesh)
    params = own_params(resident.merge(start.weights), scores.config, given.mesh, given.apply_fn, scores.theirs)
    loss = optimizing.dev_loss(how, scores.config, params, given.apply_fn, scores.theirs)
    del params  # learning needs the room
    learned = optimizing.learn(resident, start.weights, granularity, loss, batches, how.steps, how.learning_rate, watch)
    result = work.evaluate(Trial(number, learned.weights), granularity, start.sample, learning)
    return result, learned.losses


def _tokenizer_place(ready: Ready) -> Path:
    """The directory of the tokenizer that the output will have."""
    if _is_united(ready):
        return _as_written(ready)
    chosen = (path for name, path in ready.companions.items() if name.startswith(("tokenizer.", "vocab", "tekken")))
    return next(chosen, _home_of(ready).directory / CONFIG).parent


def _config_of(ready: Ready) -> DecoderConfig:
    if _is_united(ready):
        return DecoderConfig.from_directory(_as_written(ready))
    return DecoderConfig.from_directory(_home_of(ready).directory)


def _home_of(ready: Ready) -> Home:
    """Where the output's configuration is from: the model that gives it its names; or the first that has one, where a
    JAX library stored that, as none writes it.
    """
    template = ready.models[ready.plan.template]
    own = find_home(template.place.path)
    if library_of(template.input.anatomy) in (None, HUGGINGFACE):
        return own
    homes = [own, *(find_home(model.place.path) for model in ready.models)]
    return next((home for home in homes if home.config is not None), own)


def _theirs_of(ready: Ready) -> Mapping[str, Permuted] | None:
    """How Hugging Face's arrays are made of an output's; None where it has their names."""
    template = ready.models[ready.plan.template]
    if library_of(template.input.anatomy) in (None, HUGGINGFACE):
        return None
    metadata = {**template.checkpoint.metadata, **step_metadata(template.place.path)}
    name, config = template.input.name, _home_of(ready).config
    return theirs_of(template.checkpoint.tensors, template.input.anatomy, config, metadata, name).tensors


def _is_united(ready: Ready) -> bool:
    """Whether configuration and tokenizer of the output are not those of one model."""
    return ready.vocabulary is not None and len({path.parent for path in ready.companions.values()}) > 1


def _as_written(ready: Ready) -> Path:
    """A directory with what stands beside the output's weights."""
    place = Path(tempfile.mkdtemp(dir=scratch()))
    for name, path in ready.companions.items():
        write_copy(path, place, name, ready.digests[path])
    return place


class _Prepared(NamedTuple):
    """How samples are scored, and what learning needs of it."""

    score: Scorer
    told: dict[str, Any]
    tasks: tuple[str, ...]
    beside: str = ""
    devs: tuple[Dev, ...] = ()
    config: DecoderConfig | None = None
    tokenizer: Any = None
    theirs: Mapping[str, Permuted] | None = None


def _prepare_scores(
    ready: Ready,
    tasks: Mapping[str, str | Path | None],
    how: Evaluation,
    space: Space,
    mesh: Mesh | None,
    apply_fn: ApplyFn | None,
    tell: Tell | None,
) -> _Prepared:
    devs = read_devs(tasks, how, space.root)
    config = _config_of(ready) if apply_fn is None else None
    tokenizer_place = _tokenizer_place(ready)
    tokenizer = tokens.load_tokenizer(ready.models[ready.plan.template].place.name, tokenizer_place)
    note = check_vocabulary(ready.models[ready.plan.template].input.name, tokenizer, config) if config else None
    if tell is not None:
        for said in (*([note] if note is not None else []), *ready.notes):
            tell(f"note: {said}")
    told = {}
    for dev in devs:
        prompts = dev.prompts(tokenizer)  # a template that cannot be followed is said before weights are loaded
        limits = how.execution.limits._asdict() if dev.task.runs_code else None
        told[dev.task.name] = digest([dev.identity(), how.overflow, prompts, limits])
    theirs = _theirs_of(ready) if config is not None else None
    score = make_score(devs, how, config, tokenizer, mesh, apply_fn, tell, theirs)
    beside = digest([str(config), tokens.file_digests(tokenizer_place)])
    return _Prepared(score, told, tuple(told), beside, tuple(devs), config, tokenizer, theirs)


def _largest_number(strategy: str, samples: int, optimize: Optimization | None) -> int | None:
    """Of a sample; what is learned is one more. Halving has more samples than its budget, as most are cheap."""
    return None if strategy == "halving" else samples - 1 + (optimize is not None)


def _check_optimization(how: Optimization, recipe: Recipe, space: Space, has_devs: bool) -> None:
    check_count("--batch-size", how.batch_size)
    check_whole("--steps", how.steps)
    optimizing.check_optimization(how, space.position)
    assert recipe.mixup is not None
    order = GRANULARITIES.index
    if how.granularity is not None and order(how.granularity) < order(recipe.mixup.granularity):
        raise M3Error(
            f"--granularity {how.granularity} is coarser than the recipe's {recipe.mixup.granularity}, from whose best "
            "draw learning starts: take the same or a finer one"
        )
    if not has_devs:
        raise M3Error("optimize: needs dev examples of tasks, not a score of your own: give tasks")


def explore(
    recipe: Recipe | str | os.PathLike[str] | Mapping[str, Any],
    out: str | os.PathLike[str],
    *,
    tasks: Mapping[str, str | Path | None] | None = None,
    samples: int = 32,
    select: str = "mean",
    strategy: str = "draw",
    early_stopping: bool = True,
    evaluation: Evaluation | None = None,
    score: Score | None = None,
    apply_fn: ApplyFn | None = None,
    optimize: Optimization | None = None,
    mesh: Mesh | None = None,
    journal: str | os.PathLike[str] | None = None,
    references: bool | None = None,
    overwrite: bool = False,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    tell: Tell | None = None,
    watch: Watch | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Exploration:
    """Try many merging ratios and write the best merge.

    The experts stay in memory; a sample is one run of a compiled merge, its weights being run-time arguments, and one
    evaluation. Nothing is written per sample but a line of the journal, from which the same call goes on after a kill.
    The chosen weights are then merged out of core: the output's bytes are those that were evaluated. What was found is
    left beside the journal, in `exploration.json`, for `m3jax report`.

    Args:
        recipe: A `Recipe` with a `mixup`, its YAML file, or its content as a mapping.
        out: The directory to make, as in `merge_checkpoint`.
        tasks: By name of task, its dev data: a file, a hub data set, or None for the task's own on the hub.
        samples: The budget: evaluations on all dev examples.
        select: "mean" of the tasks' accuracies, one task's name, "pareto" (of the front, the sample whose worst task
            is best), or the number of a sample to take.
        strategy: "draw" (independent draws of the recipe's Beta or Dirichlet, the first of them that of
            `m3jax merge`), "auto" (equal weights, then CMA-ES; needs evosax), "sobol" (Sobol points of the same
            distribution alone), "grid" (even weights, the same everywhere), "halving" (many draws on a quarter or an
            eighth of the examples, the better half goes on) or "cma" (CMA-ES alone).
        early_stopping: Stop a sample as soon as one before it would be at least as good in every task, and better in
            one, even if all examples that are left were right: which is chosen does not change. Of tasks, and not for
            "auto", "cma" and "halving", which go by the order of all.
        evaluation: Its options.
        score: A function of your own in place of tasks, from merged arrays by tensor name and a share of the dev
            examples to scores by name, larger being better.
        apply_fn: A model of your own, run in place of the decoder as in `m3jax.evaluate`, given the merged arrays.
        optimize: Refine the best sample's weights by gradients of a dev loss; the result is one more sample.
        mesh: Over which experts and merges are spread, with axes fsdp and tp; one device without it.
        journal: Directory of the samples; by default OUT.exploration.
        references: Also score the base, every expert and equal weights, beside the budget; by default where tasks are
            given.
        overwrite: Replace `out` if it exists.
        max_shard_size: As in `merge_checkpoint`.
        tell: Told in lines what is going on.
        watch: Called with each result.
        progress: As in `merge_checkpoint`, for the final merge.

    Returns:
        What was found and written.

    Raises:
        M3Error: The recipe, the models, the data, an option or a place cannot be used.

    Example:
        >>> explore(recipe, "best", tasks={"gsm8k": "dev.jsonl"}, samples=32)  # doctest: +SKIP

    References:
        Zhou et al., Mixup Model Merge, arXiv 2502.15434, 2025.
    """
    begun = time.perf_counter()
    check_type("select", select, str)
    check_type("tasks", tasks, Mapping, optional=True)
    check_type("evaluation", evaluation, Evaluation, optional=True)
    check_type("optimize", optimize, Optimization, optional=True)
    check_type("mesh", mesh, Mesh, optional=True)
    read = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    if read.seeds is not None:
        raise M3Error(
            "seeds: asks m3jax merge for several merges, while explore draws its samples from one seed: write seed"
        )
    loaded, _ = with_steps(read)
    if (score is None) == (not tasks):
        raise M3Error("tasks: give at least one --task NAME=FILE to compare samples by, or a score function instead")
    place = _journal_directory(out, journal)
    check_entries(place / EXPLORATION_FILE, ("choice", "front", "samples"))
    made = None if overwrite else made_before(out, place, loaded)
    how_written: dict[str, Any] = {"overwrite": overwrite, "max_shard_size": max_shard_size}
    with prepared(loaded, out, **how_written, writes=made is None) as ready:
        for source in ready.sources:
            check_apart(place, source.place)
        space = space_of(loaded, ready.plan)
        strategy_of(strategy, space, samples)
        if score is not None:
            scores = _Prepared(as_scorer(score), {"score": "a function"}, ())
        else:
            how = evaluation or Evaluation()
            scores = _prepare_scores(ready, tasks or {}, how, space, mesh, apply_fn, tell)
            check_select(select, scores.tasks, _largest_number(strategy, samples, optimize))
        if optimize is not None:
            _check_optimization(optimize, loaded, space, bool(scores.devs))
        identity = _identity(loaded, ready, scores, samples, select, strategy, first_line(place))
        with SampleJournal(place, identity) as book:
            beside = references if references is not None else score is None
            given = _Circumstances(
                loaded, space, ready, scores, book, mesh, apply_fn, tell, watch, beside, early_stopping
            )
            choice, results, losses, measured = _search(given, strategy, samples, select, optimize)
        experts = expert_names(ready)
        chosen = _with_granularity(loaded, choice.granularity)
        if made is None:
            check_inputs(ready)
            merge = merge_checkpoint(chosen, out, **how_written, progress=progress, weights=choice.weights)
        else:
            check_chosen(made, chosen, choice.weights, place)
            merge = made
        check_inputs(ready)  # what was merged is what was scored
    whole = [result for result in results if result.share == 1.0]
    found = Exploration(
        choice,
        tuple(results),
        tuple(sorted(result.sample for result in pareto_front(whole))),
        sum(result.share for result in results),
        losses,
        place,
        merge,
        time.perf_counter() - begun,
        tuple(measured),
        experts,
        {dev.task.name: len(dev.examples) for dev in scores.devs},
        strategy,
    )
    write_whole(place / EXPLORATION_FILE, json.dumps(found.to_json(), indent=2) + "\n")
    return found


class _Circumstances(NamedTuple):
    """What a search is given."""

    recipe: Recipe
    space: Space
    ready: Ready
    scores: _Prepared
    book: SampleJournal
    mesh: Mesh | None
    apply_fn: ApplyFn | None
    tell: Tell | None
    watch: Watch | None
    references: bool
    early_stopping: bool


def _search(
    given: _Circumstances, strategy: str, samples: int, select: str, optimize: Optimization | None
) -> tuple[Result, list[Result], tuple[float, ...], list[Result]]:
    """Measure references, evaluate, learn and choose; the experts leave memory with it."""

    @functools.cache  # and never, where the journal has all that is asked for
    def resident() -> Resident:
        if given.tell is not None:
            given.tell("loading the experts")
        return load_resident(given.ready, given.recipe.seed, given.mesh)

    work = _Work(given.recipe, given.space, resident, given.scores.score, given.book, given.watch)
    assert given.recipe.mixup is not None
    beside = references_of(given.ready, given.space, resident) if given.references else []
    measured = [work.measure(n, each, given.recipe.mixup.granularity) for n, each in enumerate(beside, 1)]
    results = _run(work, strategy, samples, select, given.early_stopping)
    losses: tuple[float, ...] = ()
    if optimize is not None:
        there = not select.isdecimal() or int(select) in {result.sample for result in results}
        start = choose(results, select if there else MEAN)  # the number may be that of what is learned here
        number = 1 + max(result.sample for result in results)
        learned, losses = _learn(given, work, optimize, start, number)
        results = [*results, learned]
    return choose(results, select), results, losses, measured


def _with_granularity(recipe: Recipe, granularity: str) -> Recipe:
    """The recipe whose weights have this granularity."""
    assert recipe.mixup is not None
    return recipe.model_copy(update={"mixup": MixupSettings(alpha=recipe.mixup.alpha, granularity=granularity)})
