"""measure_statistics(): what the data of a model says of its parameters, for methods that merge by it.

Of kind "fisher", the diagonal of the empirical Fisher information: for each example the gradient of the log probability
of its answer (the one that the data gives), squared, and the mean of these over examples. Of kind "gram", the Gram
matrices of what comes into each linear layer (`grams`). Both are sums of this machine: unlike a merge by the
statistics, which anybody can repeat, measuring them is repeated to a few digits only.

References:
    Matena & Raffel, Merging models with Fisher-weighted averaging, 2021, arXiv 2111.09832.
"""

import functools
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from m3jax.checkpoints import adapters, parse_size
from m3jax.checkpoints.standing_in import SHARED
from m3jax.cluster.meshes import spread
from m3jax.decoder import DecoderConfig
from m3jax.decoder.batching import length_bucket, pad
from m3jax.decoder.modeling import abstract_decoder
from m3jax.decoder.params import StoredParameter, match_tensors, nested_params
from m3jax.decoder.running import ModelFunctions, model_of
from m3jax.decoder.weight_map import Path as ParameterPath
from m3jax.errors import M3Error
from m3jax.evaluation import tokens
from m3jax.evaluation.checks import check_count
from m3jax.evaluation.data import load_rows, source_text
from m3jax.evaluation.grams import Inputs, inputs_of, measure_grams, widths_of
from m3jax.evaluation.models import StoredModel, make_mesh, open_model
from m3jax.evaluation.options import Evaluation, check_evaluation
from m3jax.evaluation.prompts import render
from m3jax.evaluation.records import digest
from m3jax.evaluation.runner import find_source, read_examples
from m3jax.evaluation.tasks import get_task
from m3jax.methods import regmean
from m3jax.methods.fisher import KIND
from m3jax.outputs.places import check_apart, check_free, check_space
from m3jax.outputs.statistics import INPUTS_FIRST, measured_before, measured_of, read_record, write_statistics
from m3jax.progress import Tell, progress_lines
from m3jax.trees import loading

OVERFLOWS = ("error", "skip")
KINDS = (KIND, regmean.KIND)
_FLOATS = ("BF16", "F16", "F32")


class StatisticsResult(NamedTuple):
    """What measuring did.

    Attributes:
        directory: Where the statistics are.
        kind: Which they are.
        examples: How many were measured.
        skipped: How many were left out, as the model does not see as many tokens.
        tensors: Of how many tensors they are.
        bytes: Of these.
        digest: BLAKE3 of all tensors.
        reused: Whether they were there already, so that nothing was measured.
        seconds: Wall time.
        notes: What a user should know.
    """

    directory: Path
    kind: str
    examples: int
    skipped: int
    tensors: int
    bytes: int
    digest: str
    reused: bool
    seconds: float
    notes: tuple[str, ...]


class Texts(NamedTuple):
    """What is measured on.

    Attributes:
        pairs: Of each example what the model is shown, and what it is to say.
        source: Where they are from, as people write it.
        template: The prompt template.
    """

    pairs: list[tuple[str, str]]
    source: str
    template: str | None


def measure_statistics(
    model: str,
    out: str | Path,
    *,
    data: str | None = None,
    task: str | None = None,
    examples: int | None = None,
    template: str | None = None,
    overflow: str = "error",
    dtype: str | None = None,
    mesh: str | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    tell: Tell | None = None,
    kind: str = KIND,
) -> StatisticsResult:
    """Measure statistics of a model on examples, and write them as a checkpoint of their own.

    It has the model's names, in float32, appears whole, and tells of which model and data it is. Where it is there
    already, measured of the same model on the same data in the same way, nothing is done.

    Of kind "fisher" it is the diagonal of the Fisher information, in the model's shapes: memory holds the parameters, a
    gradient of their dtype, a float32 sum for each parameter, and what one example takes. Of kind "gram" it is the Gram
    matrix of what comes into each linear layer, float32[in, in]: memory holds the parameters and all of these.

    Args:
        model: A model directory or hub id that the decoder runs; or `model+adapter`.
        out: The directory to make; its parent exists.
        data: Of a task, its data file or a hub data set. Else rows with `text`, of which every token is foretold, or
            with `prompt` and `completion`.
        task: Whose prompts and right answers are taken, as in `m3jax evaluate`.
        examples: Use the first N only.
        template: The prompt template; the task's own if None.
        overflow: What becomes of examples that are longer than the model sees: "error" or "skip".
        dtype: Of the parameters; each keeps its own if None.
        mesh: Such as "fsdp=4,tp=2"; one device if None.
        max_shard_size: Bytes of tensors per file at most.
        overwrite: Replace `out` if it is a directory that m3jax has made.
        tell: Told in lines what is done.
        kind: "fisher" or "gram".

    Raises:
        M3Error: The model, the data, an option or the place cannot be used, or what is measured is not finite.

    References:
        Matena & Raffel, 2021, arXiv 2111.09832; Jin et al., 2022, arXiv 2212.09849.
    """
    if kind not in KINDS:
        raise M3Error(f"--kind is {kind!r}, but must be one of {', '.join(KINDS)}")
    begun, place, size = time.perf_counter(), Path(out), parse_size(max_shard_size)
    check_evaluation(Evaluation(template=template, overflow=overflow), dtype, OVERFLOWS)
    check_count("--examples", examples, optional=True)
    kept = read_record(place, of_model=True) if place.is_dir() else None
    there_already = kept is not None  # perhaps just these, as is seen below
    if not there_already and not Path(model).resolve().is_relative_to(place.resolve()):  # which has its own sentence
        check_free(place, overwrite)
    texts = read_texts(task, data, examples, template)
    stored = open_model(model, dtype, make_mesh(mesh))
    check_apart(place, stored.place)
    pairs, skipped = _encode(texts, stored, overflow)
    if tell is not None:
        tell(f"reading {model}")
    seen = measured_of(stored.place, stored.name)
    check_apart(place, stored.place, seen.files)
    measured: dict[str, Any] = {
        "data": {"source": texts.source, "digest": digest(texts.pairs)},
        "task": task,
        "template": texts.template,
        "examples": len(pairs),
        "skipped": skipped,
        "dtype": dtype,
    }
    inputs = inputs_of(_matched(stored), abstract_decoder(stored.config)) if kind == regmean.KIND else {}
    if inputs:
        measured[SHARED] = {name: own.name for own in inputs.values() for name in own.names if name != own.name}
        measured[INPUTS_FIRST] = sorted(name for own in inputs.values() for name in own.first)
    there = measured_before(place, seen.record, kind, measured)
    if there is None:
        check_free(place, overwrite)
        check_space(place, _bytes_of(stored, inputs))
        if kind == regmean.KIND:
            whole = [[*text.before, *text.after] for text in pairs]
            found = measure_grams(_load(stored), stored.config, inputs, whole, stored.mesh, tell)
        else:
            found = _fisher(stored, pairs, tell)
        stored.check_unchanged()
        written = write_statistics(place, seen, kind, measured, found, size, overwrite)
        sizes = [value.nbytes for value in found.values()]
    else:
        written, sizes = there.digest, [info.nbytes for info in there.written.values()]
    return StatisticsResult(
        place,
        kind,
        len(pairs),
        skipped,
        len(sizes),
        sum(sizes),
        written,
        there is not None,
        time.perf_counter() - begun,
        stored.notes,
    )


def read_texts(task: str | None, data: str | None, examples: int | None = None, template: str | None = None) -> Texts:
    """The texts to measure on.

    Args:
        task: As for `measure_statistics`; and so are the others.
        data: Where they are.
        examples: How many at most.
        template: The prompt template.

    Raises:
        M3Error: There are none, or they cannot be read.
    """
    if task is None:
        return _read_plain(data, examples, template)
    known = get_task(task)
    found, asked = read_examples(known, data)[:examples], template or known.template
    lacking = next((example.id for example in found if not example.gold), None)
    if lacking is not None:
        raise M3Error(f"{task}: {lacking} has no right answer in the data: take a task whose data has them")
    pairs = [(example.instruction, f" {example.gold}") for example in found]
    return _some(Texts(pairs, source_text(find_source(known, data)), asked))


def _read_plain(data: str | None, examples: int | None, template: str | None) -> Texts:
    if data is None:
        raise M3Error("give --data FILE, with --task NAME for prompts and answers of a task")
    pairs = []
    for number, row in enumerate(load_rows(data)[:examples]):
        before, after = row.get("prompt"), row.get("completion", row.get("text"))
        if not isinstance(after, str) or not after or not isinstance(before, str | None):
            raise M3Error(
                f"{data}: row {number} has neither `text` nor `prompt` and `completion`, as texts: rename its fields, "
                "or say with --task how it is read"
            )
        pairs.append((before or "", after))
    return _some(Texts(pairs, source_text(data), template))


def _some(texts: Texts) -> Texts:
    if not texts.pairs:
        raise M3Error(f"{texts.source}: there are no examples to measure on")
    return texts


class Foretold(NamedTuple):
    """An example as the model reads it.

    Attributes:
        before: Tokens that it is shown.
        after: Tokens that it is to say.
    """

    before: list[int]
    after: list[int]


def _encode(texts: Texts, model: StoredModel, overflow: str) -> tuple[list[Foretold], int]:
    """The examples that the model sees whole, and how many others there are."""
    found, limit = [], model.config.context_length
    for number, (before, after) in enumerate(texts.pairs):
        shown = before if texts.template is None or not before else render(texts.template, before, model.tokenizer)
        text = Foretold(*tokens.split(model.tokenizer, shown, after))
        if not text.after:
            raise M3Error(f"{texts.source}: example {number} is one token, before which nothing is: leave it out")
        length = len(text.before) + len(text.after) - 1  # the last is foretold only
        if length <= limit:
            found.append(text)
        elif overflow == "error":
            raise M3Error(
                f"{texts.source}: example {number} has {length:,} tokens, but {model.name} sees {limit:,}: shorten it, "
                "or leave such examples out with --overflow skip"
            )
    if not found:
        raise M3Error(f"{texts.source}: no example is as short as {model.name} sees: take shorter ones")
    return found, len(texts.pairs) - len(found)


# --- Fisher information -------------------------------------------------------------------------------------------


def _fisher(stored: StoredModel, texts: Sequence[Foretold], tell: Tell | None) -> dict[str, np.ndarray]:
    """The mean over examples of squared gradients, float32, by tensor."""
    arrays = _load(stored)
    model, mesh = model_of(arrays, stored.config, None)
    sums = {name: jnp.zeros_like(value, jnp.float32) for name, value in arrays.items()}
    report = progress_lines(tell)
    if report is not None:
        report(0, len(texts))
    for done, text in enumerate(texts, 1):
        whole = [*text.before, *text.after]
        length = length_bucket(len(whole), stored.config.context_length + 1)
        counted = np.zeros((1, length), np.float32)
        counted[0, len(text.before) - 1 : len(whole) - 1] = 1
        sums = _with_squares(sums, arrays, *pad([whole], 1, length, mesh), counted, model=model, config=stored.config)
        if report is not None:
            jax.block_until_ready(sums)  # type: ignore[no-untyped-call]
            report(done, len(texts))
    found = {name: np.asarray(value) / np.float32(len(texts)) for name, value in sums.items()}
    odd = next((name for name, value in found.items() if not np.isfinite(value).all()), None)
    if odd is not None:
        raise M3Error(f"{odd}: a gradient of {stored.name} is not finite: measure in float32 (--dtype float32)")
    return found


def _matched(stored: StoredModel) -> dict[ParameterPath, StoredParameter]:
    """The stored tensors of every parameter."""
    with adapters.open_model(stored.place) as checkpoint:
        there = {name: (info.shape, info.dtype in _FLOATS) for name, info in checkpoint.tensors.items()}
    return match_tensors(there, stored.config, stored.name)


def _bytes_of(stored: StoredModel, inputs: Mapping[ParameterPath, Inputs]) -> int:
    """What will be written: a number for each parameter, or the Gram matrix of each of the inputs."""
    with adapters.open_model(stored.place) as checkpoint:
        shapes = {
            part.name: jax.ShapeDtypeStruct(checkpoint.tensors[part.name].shape, jnp.float32)  # type: ignore[no-untyped-call]
            for parameter in _matched(stored).values()
            for part in parameter.parts
        }
    if not inputs:
        return sum(4 * math.prod(each.shape) for each in shapes.values())
    return sum(4 * width * width for width in widths_of(shapes, stored.config, inputs).values())


def _load(stored: StoredModel) -> dict[str, Array]:
    """The tensors that the decoder is made of."""
    matched = _matched(stored)
    with adapters.open_model(stored.place) as checkpoint:
        names = dict.fromkeys(part.name for parameter in matched.values() for part in parameter.parts)
        arrays = loading.load_checkpoint(checkpoint, names, lambda name, shape: spread(stored.mesh, shape))
    return arrays if stored.dtype is None else {name: x.astype(stored.dtype) for name, x in arrays.items()}


@functools.partial(jax.jit, static_argnames=("model", "config"), donate_argnums=0)
def _with_squares(
    sums: Mapping[str, Array],
    arrays: Mapping[str, Array],
    texts: Int[Array, "1 length"],
    lengths: Int[Array, "1"],
    counted: Float[Array, "1 length"],
    *,
    model: ModelFunctions,
    config: DecoderConfig,
) -> dict[str, Array]:
    """Sums with the squares of the gradient of one example's log probability."""

    def log_prob(arrays: Mapping[str, Array]) -> Array:
        found, _ = model.score(nested_params(arrays, config, "the model"), None, texts, lengths)
        return jnp.sum(found * counted)

    slopes = jax.grad(log_prob)(arrays)
    return {name: value + jnp.square(slopes[name].astype(jnp.float32)) for name, value in sums.items()}
