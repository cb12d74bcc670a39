"""merge_seeds(): one recipe, many seeds, a whole merge for each, in a directory of its own.

Every merge is as the same recipe with `seed: k` alone makes it. They are planned together, from models that are opened
once; those that are finished when the same call is made again are kept.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jax.sharding import Mesh

from m3jax.arithmetic import SCHEME
from m3jax.checkpoints import ModelDirectory, digest_file, locate_model, sketch_model
from m3jax.checkpoints.locate import read_config
from m3jax.checkpoints.remote import RemotePath, as_path
from m3jax.cluster.processes import Processes, share
from m3jax.errors import M3Error
from m3jax.outputs import manifest
from m3jax.outputs.places import check_free, check_place, partial_directory
from m3jax.outputs.verification import verify
from m3jax.progress import Progress
from m3jax.recipe import Recipe, load_seeds
from m3jax.streaming.estimate import Estimate, estimate_recipe
from m3jax.streaming.explaining import Explanation, explain, explain_recipe
from m3jax.streaming.intermediates import outlined
from m3jax.streaming.jobs import DEFAULT_SHARD_SIZE, Ready, prepared
from m3jax.streaming.lanes import lane_count
from m3jax.streaming.merging import MergeResult, merge_checkpoint, together
from m3jax.streaming.plan import DrawnWeights, MergePlan, make_plan
from m3jax.streaming.steps import with_steps
from m3jax.text import count_text, size_text

_Progress = Callable[[Progress], None] | None


class SeedMerge(NamedTuple):
    """The merge of one seed.

    Attributes:
        seed: The seed.
        directory: Where it is.
        kept: Whether an earlier call had finished it.
        digest: Of its weights.
        manifest: The content of its m3jax.json.
        result: What making it took; None where it was kept.
    """

    seed: int
    directory: Path
    kept: bool
    digest: str
    manifest: dict[str, Any]
    result: MergeResult | None


class SeedPlan(NamedTuple):
    """The merge of one seed before it is made.

    Attributes:
        seed: The seed.
        directory: Where it would go.
        finished: Whether something is there already, which the merge would look at.
        weights: What is drawn, by group.
    """

    seed: int
    directory: Path
    finished: bool
    weights: DrawnWeights


class SeedsEstimate(NamedTuple):
    """Many merges before they are made.

    Attributes:
        first: What the first of them takes; the others take as much.
        seeds: Each of them.
        bytes_written: Of the weights of those that are not there.
        disk_free: Where they go.
    """

    first: Estimate
    seeds: tuple[SeedPlan, ...]
    bytes_written: int
    disk_free: int

    def to_json(self) -> list[dict[str, Any]]:
        """As plain data: a list with an entry for each seed."""
        return [
            {
                **self.first._replace(weights=each.weights).to_json(),
                "seed": each.seed,
                "directory": str(each.directory),
                "finished": each.finished,
            }
            for each in self.seeds
        ]


class SeedsExplanation(NamedTuple):
    """What many merges do to each group of tensors.

    Attributes:
        first: What the first of them does; the others differ in what is drawn.
        each: What each does.
    """

    first: Explanation
    each: Mapping[int, Explanation]

    def to_json(self) -> list[dict[str, Any]]:
        """As plain data: a list with an entry for each seed."""
        return [{"seed": seed, **explained.to_json()} for seed, explained in self.each.items()]


def places_of(out: str | os.PathLike[str], seeds: Sequence[int]) -> dict[int, Path]:
    """Where the merge of each seed goes.

    Args:
        out: The directory for all of them.
        seeds: The seeds.

    Raises:
        M3Error: `out` is in remote storage.

    Example:
        >>> [path.name for path in places_of("out", [0, 31]).values()]
        ['seed-00', 'seed-31']
    """
    place = as_path(out)
    if isinstance(place, RemotePath):
        raise M3Error(f"{out}: merges of several seeds are made on this disk: give a directory here, then copy them")
    digits = max(2, len(str(max(seeds))))
    return {seed: place / f"seed-{seed:0{digits}}" for seed in seeds}


def _stepped(recipes: Mapping[int, Recipe]) -> tuple[dict[int, Recipe], tuple[str, ...]]:
    """The recipes with the steps of runs written out, so that all merges read the same."""
    found = {seed: with_steps(recipe) for seed, recipe in recipes.items()}
    return {seed: recipe for seed, (recipe, _) in found.items()}, next(iter(found.values()))[1]


def _plans(
    recipes: Mapping[int, Recipe], places: Mapping[int, Path], locate: Callable[[str], ModelDirectory]
) -> dict[int, SeedPlan]:
    """What each seed draws, from models that are opened once.

    Raises:
        M3Error: The merges cannot be made, or all would be the same.
    """
    first = next(iter(recipes.values()))
    with prepared(first, _planned_in(places), writes=False, locate=locate, readying=outlined) as ready:
        plans = {seed: _replanned(ready, recipe) for seed, recipe in recipes.items()}
        random = any(plan.weights or _drops(plan) for plan in plans.values())
    if not random and not first.needed:
        raise M3Error("seeds: nothing is drawn here, as all is kept (density 1): all merges would be the same")
    return {
        seed: SeedPlan(seed, places[seed], os.path.lexists(places[seed]), plan.weights) for seed, plan in plans.items()
    }


def _planned_in(places: Mapping[int, Path]) -> Path:
    """A place to plan for: that of the first merge, if there can be one yet."""
    first = next(iter(places.values()))
    return first if first.parent.is_dir() else first.parent


def _drops(plan: MergePlan) -> bool:
    return any(tensor.pipeline is not None and tensor.pipeline.random for tensor in plan.tensors)


def _replanned(ready: Ready, recipe: Recipe) -> MergePlan:
    """The plan of the same merge with another seed."""
    models = ready.models[: len(ready.models) - len(ready.statistics.models)]
    base = models[-1].input if models[-1].role != "expert" else None
    experts = [model.input for model in models if model.role == "expert"]
    statistics = [model.input for model in ready.statistics.models]
    stacked = ready.picked is not None
    names = [name for source in ready.sources for name in source.checkpoint.tensors] if stacked else []
    return make_plan(recipe, experts, base, None, names, statistics)


def _check_out(out: Path) -> None:
    """Raise M3Error where no directory of merges can be."""
    check_place(out)
    if os.path.lexists(out) and not out.is_dir():
        raise M3Error(f"{out}: is no directory, and merges of several seeds go into one: choose another place")
    if (out / manifest.FILE_NAME).exists():
        raise M3Error(f"{out}: is itself a merge, and each seed's goes into a directory in OUT: choose another OUT")


def _check_room(out: Path, places: Sequence[Path], each: int) -> tuple[int, int]:
    """The bytes that some merges write, and those that are free.

    Raises:
        M3Error: The disk has less room.
    """
    begun = sum(_size(partial_directory(place)) for place in places)
    needed, free = max(each * len(places) - begun, 0), shutil.disk_usage(out if out.is_dir() else out.parent).free
    if needed > free:
        raise M3Error(
            f"{out}: {count_text(len(places), 'merge')} of {size_text(each)} take {size_text(needed)}, and the disk has"
            f" {size_text(free)} free: free space, choose another place or fewer seeds"
        )
    return each * len(places), free


def _size(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file()) if directory.is_dir() else 0


def estimate_seeds(
    recipes: Mapping[int, Recipe],
    out: str | os.PathLike[str],
    max_shard_size: int | str | None = None,
    processes: int = 1,
    format: str | None = None,
    lanes: int | None = None,
) -> SeedsEstimate:
    """What merges of several seeds will read, write and take; no weights are read.

    Args:
        recipes: By seed, as `load_seeds` gives them.
        out: The directory for all of them.
        max_shard_size: Bytes per file at most.
        processes: How many share the work.
        format: As in `merge_checkpoint`.
        lanes: Likewise.

    Raises:
        M3Error: The merges cannot be made, or the disk has no room for them.
    """
    told, _ = _stepped(recipes)
    places = places_of(out, list(told))
    _check_out(Path(out))
    plans = _plans(told, places, sketch_model)
    one = next(iter(told.values()))
    first = estimate_recipe(one, _planned_in(places), (), None, max_shard_size, processes, format, lanes)
    missing = [plan.directory for plan in plans.values() if not plan.finished]
    written, free = _check_room(Path(out), missing, first.bytes_written)
    return SeedsEstimate(first, tuple(plans.values()), written, free)


def explain_seeds(
    recipes: Mapping[int, Recipe], out: str | os.PathLike[str], format: str | None = None
) -> SeedsExplanation:
    """What merges of several seeds will do to each group of tensors; no weights are read.

    Args:
        recipes: By seed, as `load_seeds` gives them.
        out: The directory for all of them.
        format: As in `merge_checkpoint`.

    Raises:
        M3Error: The merges cannot be made, for the reason that they would give themselves.
    """
    told, said = _stepped(recipes)
    places, first = places_of(out, list(told)), next(iter(told.values()))
    _check_out(Path(out))
    _plans(told, places, sketch_model)
    place = _planned_in(places)
    if first.needed:  # which may draw too
        each = {seed: explain_recipe(recipe, place, format=format) for seed, recipe in told.items()}
    else:
        with prepared(first, place, writes=False, locate=sketch_model, format=format) as ready:
            plans = {seed: ready._replace(plan=_replanned(ready, recipe)) for seed, recipe in told.items()}
            each = {seed: explain(plan, told[seed], {}) for seed, plan in plans.items()}
    each = {seed: one._replace(notes=tuple(dict.fromkeys((*said, *one.notes)))) for seed, one in each.items()}
    return SeedsExplanation(next(iter(each.values())), each)


# --- Merges that are there ---------------------------------------------------------------------------------------


class _Identity(NamedTuple):
    """Which merge a directory is, as a file beside it says, in two lines.

    Attributes:
        merge: Of the recipe, which models with which headers, files beside them, versions and options.
        seen: Of the weight files as the operating system tells them from others. Where these are not as they were,
            what is in them may be: digests say so.
    """

    merge: str
    seen: str


def _common(recipe: Recipe, out: Path, options: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """What the bytes of all merges depend on beside their recipes, as `_Identity` divides it."""
    needed = recipe.needed
    alone = [each.model_copy(update={"intermediates": needed[:number]}) for number, each in enumerate(needed)]
    told: list[Any] = [SCHEME, *options]
    fingerprints: list[Any] = []
    documents = {str(each.name) for each in needed}
    for each in (*alone, recipe):
        with prepared(each, out, writes=False, readying=outlined) as ready:
            real = [source for source in ready.sources if source.input.name not in documents]
            places = {source.place.path for source in real}
            beside = {n: digest_file(path) for n, path in ready.companions.items() if path.parent in places}
            looks = [source.checkpoint.fingerprint() for source in real]
            heads = [{file: [look["size"], look["header_blake3"]] for file, look in own.items()} for own in looks]
            models = [[s.input.name, str(s.place.path), read_config(s.place.path)] for s in real]
            told.append([manifest.versions(each.merge_method), models, heads, beside])
            fingerprints.append(looks)
    return told, fingerprints


def _identity(recipe: Recipe, common: Sequence[Any], fingerprints: Sequence[Any]) -> _Identity:
    return _Identity(_hashed([recipe.resolved(), *common]), _hashed(fingerprints))


def _hashed(told: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()


def _told(place: Path) -> Path:
    """The file that says of which merge a directory is."""
    return place.with_name(f".{place.name}.identity")


def _is_made(place: Path, identity: _Identity, known: list[Any], progress: _Progress) -> bool:
    """Whether a merge is there as it would be made, every byte as recorded.

    Args:
        place: Where it would be.
        identity: Which it would be.
        known: Inputs as manifests record them that are so now; found ones are added.
        progress: Called with what is done so far.
    """
    try:
        said = _Identity(*_told(place).read_text(encoding="utf-8").splitlines())
        if said.merge != identity.merge:
            return False
        inputs = manifest.inputs_of(manifest.read(place))
        as_then = said.seen == identity.seen or inputs in known
        if verify(place, inputs=not as_then, progress=progress).differences:
            return False
    except (OSError, ValueError, TypeError, M3Error):
        return False
    if said != identity:
        known.append(inputs)
        _tell(place, identity)
    return True


def _finished(
    recipes: Mapping[int, Recipe],
    places: Mapping[int, Path],
    identities: Mapping[int, _Identity],
    overwrite: bool,
    progress: _Progress,
) -> list[int]:
    """The seeds whose merges are there; all else is free, or to be replaced.

    Raises:
        M3Error: In the place of one is something else.
    """
    kept: list[int] = []
    known: list[Any] = []
    for seed in recipes:
        report = _of_seed(progress, seed)
        if os.path.lexists(places[seed]) and _is_made(places[seed], identities[seed], known, report):
            kept.append(seed)
        elif places[seed].parent.is_dir():
            check_free(places[seed], overwrite)
    return kept


def _tell(place: Path, identity: _Identity) -> None:
    _told(place).write_text("\n".join(identity), encoding="utf-8")


def _announce(place: Path, identity: _Identity) -> None:
    """Say of which merge a directory will be, where nothing is there yet that it could be said of."""
    if os.path.lexists(place):
        _told(place).unlink(missing_ok=True)
    else:
        _tell(place, identity)


def _of_seed(progress: _Progress, seed: int) -> _Progress:
    """Progress that says of which seed it is."""
    if progress is None:
        return None
    report = progress
    return lambda step: report(step._replace(stage=f"seed {seed}: {step.stage}"))


def merge_seeds(
    recipe: Mapping[int, Recipe] | Recipe | str | os.PathLike[str] | Mapping[str, Any],
    out: str | os.PathLike[str],
    *,
    seeds: str | Sequence[int] | None = None,
    overwrite: bool = False,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    allow_nonfinite: bool = False,
    chunk_entries: int | None = None,
    mesh: Mesh | None = None,
    lanes: int | None = None,
    distributed: bool = False,
    progress: _Progress = None,
    format: str | None = None,
    tell: Callable[[str], None] | None = None,
) -> list[SeedMerge]:
    """Merge one recipe with many seeds, each into a model directory `OUT/seed-<k>` of its own.

    Each has the bytes and the manifest of the same recipe with `seed: k` alone, and is replayed alone. Those that an
    earlier call has finished, from the same models with the same recipe, are kept once their bytes have been checked.

    Args:
        recipe: With `seeds`: a `Recipe`, its YAML file, or its content as a mapping; or what `load_seeds` gives.
        out: The directory for all of them; its parent exists.
        seeds: Several that win over those of the recipe, such as "0..31", each in all of its documents.
        overwrite: Replace what m3jax has made in the place of one of the merges.
        max_shard_size: As in `merge_checkpoint`, as the following.
        allow_nonfinite: Merge inputs that hold NaN or infinities.
        chunk_entries: Entries per chunk.
        mesh: Over whose local devices every chunk is spread.
        lanes: How many tensors are merged at the same time.
        distributed: Share the work with the other processes of `jax.distributed`.
        progress: Called after every chunk, with the seed before the stage.
        format: Of the weights.
        tell: Told in lines which merges are kept.

    Returns:
        The merges, in the order of the seeds.

    Raises:
        M3Error: The recipe is of one merge, or cannot be merged; a place is taken, or the disk has no room for all.

    Example:
        >>> merge_seeds("recipe.yaml", "merges", seeds="0..31")[3].digest  # doctest: +SKIP
    """
    lane_count(lanes)
    recipes, said = _stepped(_by_seed(recipe, seeds))
    places, place = places_of(out, list(recipes)), Path(out)
    _check_out(place)
    first = next(iter(recipes.values()))
    _plans(recipes, places, locate_model)
    options = [max_shard_size, format, allow_nonfinite]
    common, fingerprints = _common(first, _planned_in(places), options)
    identities = {seed: _identity(each, common, fingerprints) for seed, each in recipes.items()}
    with together(distributed) as processes:
        kept = _agreed(processes, lambda: _finished(recipes, places, identities, overwrite, progress))
        left = [places[seed] for seed in recipes if seed not in kept]
        if processes.index == 0:
            if left:
                told = estimate_recipe(first, _planned_in(places), (), None, max_shard_size, 1, format)
                _check_room(place, left, told.bytes_written)
            place.mkdir(exist_ok=True)
        share(processes, None)  # which waits for it
    if kept and tell is not None:
        tell(f"{count_text(len(kept), 'merge')} of {len(recipes)} finished before and kept")
    how: dict[str, Any] = {"max_shard_size": max_shard_size, "allow_nonfinite": allow_nonfinite}
    how |= {"chunk_entries": chunk_entries, "mesh": mesh, "lanes": lanes, "distributed": distributed, "format": format}
    made = []
    for seed, each in recipes.items():
        if seed in kept:
            record = manifest.read(places[seed])
            made.append(SeedMerge(seed, places[seed], True, record["output"]["digest"], record, None))
            continue
        if processes.index == 0:
            _announce(places[seed], identities[seed])
        result = merge_checkpoint(each, places[seed], overwrite=overwrite, progress=_of_seed(progress, seed), **how)
        if processes.index == 0:
            _tell(places[seed], identities[seed])
        result = result._replace(notes=tuple(dict.fromkeys((*said, *result.notes))))
        made.append(SeedMerge(seed, places[seed], False, result.digest, result.manifest, result))
    return made


def _by_seed(recipe: Any, seeds: str | Sequence[int] | None) -> Mapping[int, Recipe]:
    """The recipes by seed.

    Raises:
        M3Error: There is one merge only.
    """
    if seeds is None and isinstance(recipe, Mapping) and all(isinstance(each, Recipe) for each in recipe.values()):
        found: Mapping[int, Recipe] = recipe
    else:
        found = load_seeds(recipe, seeds=seeds)
    if not found:
        raise M3Error("seeds: the recipe has none, so it is of one merge: write such as seeds: 0..31, or give them")
    return found


def _agreed(processes: Processes, find: Callable[[], list[int]]) -> list[int]:
    """What process 0 finds, on all of them."""
    found: list[int] = share(processes, find() if processes.index == 0 else None)
    return found
