"""What commands say of a merge: what it would take, what was made, whether it is as recorded, and of conversions."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from m3jax.text import count_text, safe_text, shape_text, share_text, size_text, table, time_text

if TYPE_CHECKING:  # JAX and numpy take longer to import than --help may take
    from m3jax.outputs.conversion import ConvertResult
    from m3jax.outputs.extraction import ExtractResult
    from m3jax.outputs.publishing import PushResult
    from m3jax.outputs.verification import Verification
    from m3jax.streaming.estimate import Estimate
    from m3jax.streaming.merging import MergeResult

_SHOWN_GROUPS = 4


# --- Merges ------------------------------------------------------------------------------------------------------


def merge_lines(result: "MergeResult") -> Iterator[str]:
    """A finished merge: where it is, what it took, what was drawn, and how to have it again."""
    moved = result.bytes_read + result.bytes_written
    rate = f", {size_text(moved / result.seconds)}/s" if result.seconds > 0 else ""
    resumed = f", {count_text(result.resumed_shards, 'shard')} kept from before" if result.resumed_shards else ""
    place = shlex.quote(str(result.directory))
    yield f"merged   {place}"
    yield (
        f"took     {time_text(result.seconds)}: {size_text(result.bytes_read)} read,"
        f" {size_text(result.bytes_written)} written{rate}{resumed}"
    )
    drawn = {name: group["decimal"] for name, group in result.manifest.get("weights", {}).items()}
    count = len(next(iter(drawn.values()), ()))
    yield from _weights(drawn, _expert_names(result.manifest.get("recipe", {}), count))
    yield f"digest   {result.digest}"
    yield f"replay   m3jax replay {place} NEW_DIRECTORY"


def hint_lines(result: "MergeResult") -> Iterator[str]:
    """What to do next with a merge."""
    place = shlex.quote(str(result.directory))
    yield f"next: m3jax inspect {place}; m3jax evaluate {place} --task TASK --data FILE"
    if "format" not in result.manifest.get("output", {}) and "://" not in str(result.directory):
        yield f"      m3jax push {place} ORG/NAME --dry-run   (what would be sent to the hub)"


def push_lines(result: "PushResult") -> Iterator[str]:
    """What was sent to the hub, or would be: every file."""
    rows = [[name, size_text(size)] for name, size in result.files]
    yield from table(["file", "bytes"], rows)
    total = f"{count_text(len(rows), 'file')}, {size_text(sum(size for _, size in result.files))}"
    kind = "private" if result.private else "public unless it is there and private"
    if result.url is None:
        yield f"not sent: {total}, verified, for {result.repository} ({kind}): leave out --dry-run to send them"
    else:
        yield f"sent     {total}, to {safe_text(result.url)}"
    yield f"digest   {result.digest}"


def push_json(result: "PushResult") -> dict[str, Any]:
    """The same as plain data for JSON."""
    files = [{"name": name, "bytes": size} for name, size in result.files]
    return {**result._asdict(), "files": files, "notes": list(result.notes), "sent": result.url is not None}


def _weights(drawn: Mapping[str, Sequence[Any]], experts: Sequence[str]) -> Iterator[str]:
    """The weights drawn: one line for each expert where there is one group, else for each of the first groups."""
    lines = list(_weight_lines(drawn, experts))
    for index, line in enumerate(lines):
        yield f"{'' if index else 'weights':<7}  {line}"


def _weight_lines(drawn: Mapping[str, Sequence[Any]], experts: Sequence[str]) -> Iterator[str]:
    if len(drawn) == 1:
        (weights,) = drawn.values()
        names = experts if len(experts) == len(weights) else [f"expert {index}" for index in range(len(weights))]
        yield from (f"{_decimal(weight)}  {safe_text(name)}" for weight, name in zip(weights, names, strict=True))
        return
    for name, weights in list(drawn.items())[:_SHOWN_GROUPS]:
        yield f"{'  '.join(map(_decimal, weights))}  {safe_text(name)}"
    if len(drawn) > _SHOWN_GROUPS:
        yield f"… and {count_text(len(drawn) - _SHOWN_GROUPS, 'more group')}, in the manifest"


def _decimal(weight: object) -> str:
    return f"{float(str(weight)):.6f}"


def _expert_names(recipe: Mapping[str, Any], count: int) -> list[str]:
    """The experts' names as the recipe lists them, with or without a base among them."""
    models = [str(entry["model"]) for entry in recipe.get("models", ())]
    others = [model for model in models if model != recipe.get("base_model")]
    numbered = [f"expert {index}" for index in range(count)]
    return next((names for names in (models, others) if len(names) == count), numbered)


def merge_json(result: "MergeResult") -> dict[str, Any]:
    """A finished merge as plain data; the whole manifest is in the directory."""
    return {
        **result._asdict(),
        "directory": str(result.directory),
        "manifest": str(result.directory / "m3jax.json"),
        "seed": result.manifest.get("seed"),
        "weights": result.manifest.get("weights", {}),
    }


def verification_lines(found: "Verification") -> Iterator[str]:
    """A directory compared with its manifest."""
    checked = f"{count_text(found.tensors, 'tensor')} and {count_text(found.files, 'other file')}"
    yield from map(safe_text, found.differences)
    yield from (f"note: {safe_text(note)}" for note in found.notes)
    if len(found.differences) > found.absent:
        count = len(found.differences) - found.absent
        yield f"{found.directory}: not as recorded, {count_text(count, 'difference')} in {checked}"
    else:
        so_far = " as far as it could be compared" if found.absent else ""
        yield f"{found.directory}: as recorded{so_far}, {checked}"
    if found.inputs or found.absent:
        gone = f"; {count_text(found.absent, 'model')} not found, of which nothing is known" if found.absent else ""
        yield f"inputs   {count_text(found.inputs, 'tensor')} of them compared{gone}"
    if found.digest is not None:
        yield f"digest   {found.digest}"
    if found.mend is not None:
        yield f"mend     {safe_text(found.mend)}"


def verification_json(found: "Verification") -> dict[str, Any]:
    """The same as plain data for JSON."""
    return {**found._asdict(), "directory": str(found.directory), "as_recorded": not found.differences}


# --- Estimates ---------------------------------------------------------------------------------------------------


def estimate_lines(found: "Estimate", width: int | None = None) -> Iterator[str]:
    """An estimate for people.

    Args:
        found: The estimate.
        width: Of the terminal.
    """
    from m3jax.streaming.estimate import RATES_TEXT  # JAX is there by now, as the estimate is

    for name, within in found.intermediates.items():
        yield f"before it, {safe_text(name)}:"
        yield from estimate_lines(within, width)
        yield ""
    yield found.method
    yield ""
    models = [[safe_text(e.name), e.role, f"{e.parameters:,}", size_text(e.bytes)] for e in found.inputs]
    yield from table(["model", "role", "parameters", "bytes"], models, width, left=2)
    yield ""
    shapes = [
        [shape_text(t.shape), t.dtype, "merged" if t.merged else "copied", f"{t.tensors:,}"] for t in found.tensors
    ]
    yield from table(["shape", "dtype", "is", "tensors"], shapes, width, left=3)
    yield ""
    count = sum(t.tensors for t in found.tensors)
    readings: dict[str, int] = {}
    for entry in found.passes:
        readings[entry.what] = readings.get(entry.what, 0) + entry.bytes
    passes = ", ".join(f"{what} {size_text(size)}" for what, size in readings.items())
    free = "" if found.disk_free is None else f" (free there: {size_text(found.disk_free)})"
    low, high = (time_text(seconds) for seconds in found.seconds)
    span = f"about {low} to {high}" if found.seconds[1] >= 1 else "less than a second, and a second or two to start,"
    workers = "1 process" if found.processes == 1 else f"{found.processes} processes"
    holds = f"{count_text(count, 'tensor')}, {count_text(found.parameters, 'parameter')}"
    kept = "does not take this method"
    if found.resident_memory is not None:
        kept = f"would keep {size_text(found.resident_memory)} on its devices, and what evaluation takes"
    rows = [
        ("reads", f"{size_text(found.bytes_read)}: {passes}"),
        ("writes", f"{size_text(found.bytes_written)} in {count_text(found.files, 'file')}{free}: {holds}"),
        ("memory", f"about {size_text(found.peak_memory)} per process, beside the page cache"),
        ("explore", kept),
        ("time", f"{span} by {workers}, at {RATES_TEXT}, as measured; slower storage decides alone"),
    ]
    for name, said in rows:
        yield f"{name:<9}{said}"
    yield from _weights(found.weights, found.experts)
    yield from (f"note: {safe_text(note)}" for note in found.notes)


# --- Conversions -----------------------------------------------------------------------------------------


def convert_lines(result: "ConvertResult") -> Iterator[str]:
    """A finished conversion in a line."""
    yield (
        f"converted {count_text(result.tensors, 'tensor')}, {size_text(result.bytes)}, to {result.format} in"
        f" {shlex.quote(str(result.directory))} in {time_text(result.seconds)}: digest {result.digest}"
    )


def extraction_lines(result: "ExtractResult") -> Iterator[str]:
    """A finished extraction in a line."""
    share = share_text(int(10**9 * result.share), 10**9)
    yield (
        f"extracted {count_text(result.modules, 'weight')} as factors that hold {share} of the"
        " squares of what differs in these,"
        f" and {count_text(result.saved, 'tensor')} whole, {size_text(result.bytes)}, to"
        f" {shlex.quote(str(result.directory))} in {time_text(result.seconds)}: digest {result.digest}"
    )


def convert_json(result: "ConvertResult | ExtractResult") -> dict[str, Any]:
    """The same as plain data for JSON."""
    return {**result._asdict(), "directory": str(result.directory)}
