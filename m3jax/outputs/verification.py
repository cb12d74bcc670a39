"""Whether an output is still what was made, and its inputs what was read: all faults, a sentence each. Needs no JAX."""

import os
import shlex
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple

from m3jax.checkpoints import (
    Checkpoint,
    TensorInfo,
    digest_checkpoint,
    digest_file,
    digest_tensor,
    open_checkpoint,
    open_safetensors,
)
from m3jax.checkpoints.adapters import open_stored
from m3jax.checkpoints.formats import SAFETENSORS
from m3jax.checkpoints.locate import locate_recorded, named_companions
from m3jax.checkpoints.orbax_tree import COMMITTED, STEP
from m3jax.checkpoints.remote import RemotePath, as_path
from m3jax.checkpoints.standing_in import CONVERSION, STATISTICS
from m3jax.checkpoints.storage import exists, is_dir, is_file, list_names, read_file
from m3jax.documents import FAULTS, parse_json
from m3jax.errors import M3Error
from m3jax.outputs import manifest, mark
from m3jax.outputs.patterns import matcher
from m3jax.outputs.places import is_own
from m3jax.outputs.spent import left_beside
from m3jax.outputs.written import SAVES, digest_save, open_written, varying_patterns
from m3jax.progress import Progress
from m3jax.text import count_text
from m3jax.vocabulary import numbering, read_vocabulary

Report = Callable[[Progress], None]

_GONE, _OTHER = "is missing", "has changed"  # what a file beside the weights may be
_TOOLS = (".git", ".gitattributes", ".gitignore", ".cache", ".DS_Store")  # which no loader of models reads
_DEEPEST = 8  # directories in directories that are looked through
_NAMED = 3  # tensors that went with a file


class Verification(NamedTuple):
    """What comparing a directory with its manifest showed.

    Attributes:
        directory: The model directory.
        digest: BLAKE3 of its weights as they are; None where not all of them were read, or some cannot be.
        tensors: How many tensors were compared.
        files: How many other files were compared.
        differences: One sentence each; empty when all is as recorded.
        notes: What was not held against the directory, or could not be checked, one sentence each.
        inputs: How many tensors of inputs were compared.
        absent: What could not be compared, such as inputs that are not there; each is among `differences`.
        sample: Bytes of weights that were computed again; None where none were to be.
        mend: The command that makes the output again; None where nothing differs.
    """

    directory: Path
    digest: str | None
    tensors: int
    files: int
    differences: tuple[str, ...]
    notes: tuple[str, ...] = ()
    inputs: int = 0
    sample: int | None = None
    mend: str | None = None
    absent: int = 0

    def __repr__(self) -> str:
        told = count_text(len(self.differences), "difference") if self.differences else "as recorded"
        first = f": {self.differences[0]}" if self.differences else ""
        checked = f"{count_text(self.tensors, 'tensor')} and {count_text(self.files, 'other file')}"
        return f"Verification({self.directory}, {checked}, {told}{first})"


class Beside(NamedTuple):
    """What is known of an output without its weights' bytes.

    Attributes:
        directory: The output's.
        recorded: Its manifest, or what a conversion has told.
        differences: As `Verification`.
        notes: As `Verification`.
        intact: Whether what is recorded is as it was written.
    """

    directory: Path
    recorded: Mapping[str, Any]
    differences: tuple[str, ...]
    notes: tuple[str, ...]
    intact: bool


def verify(
    directory: str | os.PathLike[str],
    *,
    inputs: bool = False,
    sources: Mapping[str, str] | None = None,
    progress: Report | None = None,
) -> Verification:
    """Compare a directory with the manifest in it: every tensor, every file, and what is there besides.

    Whatever is at fault, the rest is compared too. A manifest of a version that recorded less is checked as far as it
    goes; notes say what it does not tell.

    Args:
        directory: What `m3jax merge` or `m3jax convert` wrote.
        inputs: Compare what was read, too: each tensor of each model that the manifest names.
        sources: Where these models are now, by the names that the manifest records.
        progress: Called with what is done so far.

    Raises:
        M3Error: There is no manifest, it is damaged, or `sources` has a name that it does not record.
    """
    place = as_path(directory)
    of_conversion = is_of_conversion(place)
    recorded = mark.read(place) if of_conversion else manifest.read_edited(place)[0]
    manifest.check_sources(recorded, sources or {})
    found = (_verify_conversion if of_conversion else _verify_merge)(place, progress)
    intact = manifest.is_intact(recorded) and (of_conversion or not manifest.contradictions(recorded))
    if found.differences and intact:  # an edited manifest replays nothing
        found = found._replace(mend=mend_of(found.directory, recorded))
    return with_inputs(found, recorded, sources or {}, progress) if inputs else found


def is_of_conversion(place: Path) -> bool:
    """Whether a directory, or a file of it, tells of a conversion and not of a merge."""
    if place.name == CONVERSION:
        return True
    return is_dir(place) and is_file(place / CONVERSION) and not is_file(place / manifest.FILE_NAME)


def with_inputs(
    found: Verification, recorded: Mapping[str, Any], sources: Mapping[str, str], progress: Report | None
) -> Verification:
    """A verification with what differs in the inputs.

    Args:
        found: Of the output.
        recorded: Its manifest.
        sources: Where models are now, by recorded name.
        progress: Called with what is done so far.
    """
    differences, count, absent = differing_inputs(recorded, sources, progress)
    return found._replace(differences=(*found.differences, *differences), inputs=count, absent=found.absent + absent)


def mend_of(directory: Path, recorded: Mapping[str, Any]) -> str:
    """The command that makes an output again."""
    place = shlex.quote(str(directory))
    if "recipe" in recorded:
        return f"m3jax replay {place} NEW_DIRECTORY makes it again, from the models that it was made of"
    record = recorded["inputs"][0]
    if STATISTICS in recorded:
        kind = recorded[STATISTICS]["kind"]
        return f"m3jax statistics {shlex.quote(record['name'])} NEW_DIRECTORY --kind {kind} … measures them again"
    rest = " --dequantize" if "dequantised" in record else ""
    return f"m3jax convert {shlex.quote(record['name'])} NEW_DIRECTORY --to {recorded['format']}{rest} makes it again"


# --- Outputs of merges -------------------------------------------------------------------------------------------


def _verify_merge(place: Path, progress: Report | None) -> Verification:
    beside = compare_beside(place)
    recorded = beside.recorded["output"]
    with ExitStack() as stack:
        weights = open_weights(beside, stack)
        total = sum(info.nbytes for checkpoint in weights.opened for info in checkpoint.tensors.values())
        read = _digests(weights.opened, _Counter("verifying", total, progress))
    differences = [*weights.differences, *read.differences]
    lost = weights.lost(recorded["tensors"])
    compared = {name: entry for name, entry in recorded["tensors"].items() if name not in {*lost, *read.unreadable}}
    differences += _differing_tensors(read.found, compared)
    digest = None if lost or read.unreadable else _whole(read.found)
    told = (*beside.differences, *differences)
    return Verification(beside.directory, digest, len(read.found), len(recorded["files"]), told, beside.notes)


def compare_beside(directory: str | os.PathLike[str]) -> Beside:
    """Compare all of a merge's output but its weights: the manifest itself, other files, and what was added.

    Raises:
        M3Error: There is no manifest, or it is damaged.
    """
    told, intact = manifest.read_edited(directory)
    place = manifest.locate(directory).parent
    name, recorded = manifest.FILE_NAME, told["output"]
    differences, notes = [], []
    if not intact:
        differences.append(f"{name}: was changed after it was written")
    elif odd := manifest.contradictions(told):
        differences += [f"{name}: {said}" for said in odd]
        intact = False  # whatever digest it gives itself
    if manifest.version_of(told) == 1:
        notes.append(f"{name}: is of a version that recorded no digest of it: edits of it are not seen")
        notes.append(f"{name}: is of a version that did not list all files: added ones and metadata are not seen")
    else:
        links = recorded.get("links", {})
        differences += _differing_links(place, links)
        known = {*recorded["files"], *recorded["weight_files"], *links, name}
        if "format" in recorded and SAVES not in recorded:
            notes.append(f"{name}: is of a version that told nothing of {STEP} and {COMMITTED}: changes are not seen")
        added, said = _beside(place, known, varying_patterns(recorded))
        differences += added
        notes += said
    left = left_beside(place)
    notes += [left] if left is not None else []
    for file, digest in sorted(recorded["files"].items()):
        fault = _fault_of_file(place / file, digest)
        if fault in (_GONE, _OTHER) and file in manifest.EDITABLE:
            notes.append(f"{file}: {fault}, as people may edit it")
        elif fault is not None:
            differences.append(f"{file}: {fault}")
    for file, digest in sorted(recorded.get(SAVES, {}).items()):
        fault = _fault_of_file(place / file, digest, digest_save)
        differences += [] if fault is None else [f"{file}: {fault}"]
    return Beside(place, told, tuple(differences), tuple(notes), intact)


class OpenedWeights(NamedTuple):
    """The weight files of an output, those that cannot be read left out.

    Attributes:
        opened: All in one checkpoint, or each that can be read in its own.
        differences: What is wrong with files, one sentence each.
        placed: The file of each tensor, as the index of several says; empty where it does not.
        closed: The files that cannot be read.
    """

    opened: tuple[Checkpoint, ...]
    differences: tuple[str, ...]
    placed: Mapping[str, str]
    closed: tuple[str, ...]

    def lost(self, recorded: Mapping[str, Any]) -> list[str]:
        """The recorded tensors that cannot be compared, as their files cannot be read."""
        there = {name for checkpoint in self.opened for name in checkpoint.tensors}
        return [n for n in recorded if n not in there and self.closed and self.placed.get(n, "") in (*self.closed, "")]


def open_weights(beside: Beside, stack: ExitStack) -> OpenedWeights:
    """Open the weights of a merge's output, as far as they can be read.

    Args:
        beside: The output.
        stack: Keeps them open.
    """
    place, recorded = beside.directory, beside.recorded["output"]
    if "format" in recorded:
        return _open_formatted(place, recorded, stack)
    headers: dict[str, str] = {}
    faults: dict[str, str] = {}
    placed: dict[str, str] = {}
    try:
        whole = stack.enter_context(open_safetensors(place))
        headers = {file: told["header_blake3"] for file, told in whole.fingerprint().items()}
        opened = [whole]
    except M3Error as error:
        opened, faults, placed = _open_each(place, recorded, stack)
        for file, checkpoint in zip(
            [f for f in _weight_names(place, recorded) if f not in faults], opened, strict=True
        ):
            headers[file] = next(iter(checkpoint.fingerprint().values()))["header_blake3"]
        if not faults:
            faults = {SAFETENSORS.index_file: str(error)}
    said = [f"{file}: {fault}" for file, fault in faults.items()]
    weights = OpenedWeights(tuple(opened), (), placed, tuple(faults))
    said += _without(weights, recorded)
    if "weight_files" in recorded:
        said += _differing_headers(headers, {k: v for k, v in recorded["weight_files"].items() if k not in faults})
    return weights._replace(differences=tuple(said))


def _open_formatted(place: Path, recorded: Mapping[str, Any], stack: ExitStack) -> OpenedWeights:
    """Weights that are not safetensors, and what is wrong with the small files of their format."""
    opened, faults = [], {}
    try:
        opened.append(stack.enter_context(open_written(place, recorded)))
    except M3Error as error:
        faults[recorded["format"]] = f"cannot be read: {error}"
    weights = OpenedWeights(tuple(opened), (), {}, tuple(faults))
    said = [f"{format}: {fault}" for format, fault in faults.items()]
    said += _without(weights, recorded)
    for name, digest in recorded["weight_files"].items():
        fault = _fault_of_file(place / name, digest)
        said += [] if fault is None else [f"{name}: {fault}"]
    return weights._replace(differences=tuple(said))


def _without(weights: OpenedWeights, recorded: Mapping[str, Any]) -> list[str]:
    """What is to be said of tensors whose files cannot be read."""
    lost = weights.lost(recorded["tensors"])
    some = ", ".join(lost[:_NAMED]) + (", …" if len(lost) > _NAMED else "")
    return [f"{count_text(len(lost), 'tensor')} cannot be compared without it: {some}"] if lost else []


def _weight_names(place: Path, recorded: Mapping[str, Any]) -> list[str]:
    """The weight files that an output has or should have."""
    there = {name for name in list_names(place) if name.endswith(SAFETENSORS.endings)}
    return sorted({*recorded.get("weight_files", ()), *there})


def _open_each(
    place: Path, recorded: Mapping[str, Any], stack: ExitStack
) -> tuple[list[Checkpoint], dict[str, str], dict[str, str]]:
    """Each weight file that can be read; what is wrong with the others; which tensor belongs in which."""
    opened, faults = [], {}
    for file in _weight_names(place, recorded):
        if not is_file(place / file):
            faults[file] = "is missing"
            continue
        try:
            opened.append(stack.enter_context(open_safetensors(place / file)))
        except M3Error as error:
            faults[file] = f"cannot be read: {error}"
    return opened, faults, _placed(place)


def _placed(place: Path) -> dict[str, str]:
    """The file of each tensor, as far as an index tells."""
    with suppress(M3Error, OSError, *FAULTS):
        told = parse_json(read_file(place / SAFETENSORS.index_file))["weight_map"]
        return {name: file for name, file in told.items() if isinstance(file, str)}
    return {}


class _Read(NamedTuple):
    found: dict[str, tuple[TensorInfo, str]]
    unreadable: tuple[str, ...]
    differences: tuple[str, ...]


class _Counter:
    """Counts bytes and tells of them."""

    def __init__(self, label: str, total: int, report: Report | None) -> None:
        self._label, self._total, self._report, self._done = label, total, report, 0

    def add(self, count: int) -> None:
        self._done += count
        if self._report is not None:
            self._report(Progress(self._label, self._done, self._total))


def _digests(opened: Sequence[Checkpoint], counter: _Counter) -> _Read:
    """The tensors of checkpoints with the digests of their bytes, as far as they can be read."""
    found, unreadable, differences = {}, [], []
    for checkpoint in opened:
        for name, info in checkpoint.tensors.items():
            try:
                digest = digest_tensor(checkpoint, name)
            except M3Error as error:
                unreadable.append(name)
                differences.append(f"{name}: cannot be read: {error}")
            else:
                if name in found:
                    differences.append(f"{name}: is in several files")
                found[name] = (info, digest)
            counter.add(info.nbytes)
    return _Read(found, tuple(unreadable), tuple(differences))


def _whole(tensors: manifest.TensorDigests) -> str:
    return digest_checkpoint({name: (info.dtype, info.shape, digest) for name, (info, digest) in tensors.items()})


def _differing_tensors(found: manifest.TensorDigests, recorded: Mapping[str, Any]) -> Iterator[str]:
    for name, (info, digest) in found.items():
        expected = recorded.get(name)
        if expected is None:
            yield f"{name}: is not in the manifest"
        elif (info.dtype, list(info.shape)) != (expected["dtype"], expected["shape"]):
            yield f"{name}: is {info.dtype}{list(info.shape)}, not {expected['dtype']}{expected['shape']}"
        elif digest != expected["digest"]:
            yield f"{name}: its bytes are not those that were written"
    yield from (f"{name}: is missing" for name in recorded if name not in found)


def _differing_headers(found: Mapping[str, str], recorded: Mapping[str, Any]) -> Iterator[str]:
    for name, digest in found.items():
        if name in recorded and recorded[name] != digest:
            yield f"{name}: its header is not the one that was written: its metadata, or the order of its tensors"
    yield from (f"{name}: is missing, or not read as a file of the model" for name in recorded if name not in found)


# --- Files -------------------------------------------------------------------------------------------------------


def _fault_of_file(path: Path, digest: str, taken: Callable[[Path], str] = digest_file) -> str | None:
    """What is wrong with a file beside the weights; None where it is as recorded."""
    if not exists(path):
        return _GONE
    if not is_file(path):
        return "is not a regular file"
    try:
        return None if taken(path) == digest else _OTHER
    except M3Error as error:
        return f"cannot be read: {error}"


def _differing_links(place: Path, links: Mapping[str, str]) -> Iterator[str]:
    """What is said of weight files that are there once more: a link is the same, a copy has the same bytes."""
    for name, file in links.items():
        if not is_file(place / name):
            yield f"{name}: is missing"
        elif is_file(place / file) and not _are_same(place / name, place / file):
            yield f"{name}: is not the same as {file}"


def _are_same(one: Path, other: Path) -> bool:
    if not isinstance(one, RemotePath) and one.samefile(other):
        return True
    return digest_file(one) == digest_file(other)


def _beside(place: Path, known: Container[str], varying: Sequence[str] = ()) -> tuple[list[str], list[str]]:
    """Of what stands beside an output: what differs, and what is only named.

    Args:
        place: The output's directory.
        known: Files that are recorded.
        varying: Patterns of those that are other each time.
    """
    varies = matcher(tuple(varying))
    there = [name for name in _added(place, known) if not varies(name)]
    notes = [f"{name}: is none of the model's, and not looked into" for name in there if name in _TOOLS]
    if manifest.SIGNATURE in there:
        notes.append(f"{manifest.SIGNATURE}: is a signature, and not checked here: model_signing verify does it")
    notes += [f"{name}: is left of a merge that was stopped as it ended, and may go" for name in there if is_own(name)]
    expected = {*_TOOLS, manifest.SIGNATURE}
    return [f"{n}: is not in the manifest" for n in there if n not in expected and not is_own(n)], notes


def _added(place: Path, known: Container[str], above: str = "", depth: int = 0) -> Iterator[str]:
    """The names of files that are not known, also in directories; links and what other tools put there stay closed."""
    for name in sorted(list_names(place)):
        path, full = place / name, f"{above}{name}"
        if full in known:
            continue
        link = not isinstance(path, RemotePath) and os.path.islink(path)
        if full in _TOOLS or link or not is_dir(path):
            yield full
        elif depth == _DEEPEST:
            yield f"{full}/"
        else:
            yield from _added(path, known, f"{full}/", depth + 1)


# --- Inputs ------------------------------------------------------------------------------------------------------


def differing_inputs(
    recorded: Mapping[str, Any], sources: Mapping[str, str], progress: Report | None
) -> tuple[list[str], int, int]:
    """Compare the models that were read with what is recorded of them.

    Args:
        recorded: The manifest.
        sources: Where they are now, by recorded name.
        progress: Called with what is done so far.

    Returns:
        What differs, one sentence each; how many tensors were compared; how many models could not be opened.
    """
    differences: list[str] = []
    known: dict[tuple[str, str], str] = {}
    count = absent = 0
    for record in manifest.inputs_of(recorded):
        try:
            place = locate_recorded(str(record["name"]), sources)
            stored, adapting = open_stored(place)
        except M3Error as error:
            differences.append(str(error))
            absent += 1
            continue
        try:
            with stored as checkpoint:
                if record.get("adapter", {}).get("config") != (None if adapting is None else adapting.config_digest):
                    differences.append(f"{record['name']}: the adapter's configuration has changed since: restore it")
                differences += _differing_input(record, checkpoint, known, progress)
            if "tokens" in record and numbering(read_vocabulary(named_companions(place.path))) != record["tokens"]:
                differences.append(manifest.other_tokens(record))
        except M3Error as error:
            differences.append(str(error))
            continue
        count += len(record["tensors"])
    return differences, count, absent


def _differing_input(
    record: Mapping[str, Any], checkpoint: Checkpoint, known: dict[tuple[str, str], str], progress: Report | None
) -> Iterator[str]:
    name, wanted = record["name"], record["tensors"]
    there = {stored: checkpoint.tensors[stored] for stored in wanted if stored in checkpoint.tensors}
    yield from (f"{name}: {stored} is missing" for stored in wanted if stored not in there)
    counter = _Counter(f"verifying {name}", sum(info.nbytes for info in there.values()), progress)
    right = len(there) == len(wanted)
    for stored, info in there.items():
        place = (checkpoint.location, stored)
        try:
            known[place] = known.get(place) or digest_tensor(checkpoint, stored)
        except M3Error as error:
            right = False
            yield f"{name}: {stored} cannot be read: {error}"
        else:
            if known[place] != wanted[stored]:
                right = False
                yield f"{name}: {stored} has changed since it was read: its bytes are not those of then"
        counter.add(info.nbytes)
    if right and _whole({stored: (info, wanted[stored]) for stored, info in there.items()}) != record["digest"]:
        yield f"{name}: has the bytes of then, but other dtypes or shapes"


# --- Outputs of conversions --------------------------------------------------------------------------------------


def _verify_conversion(place: Path, progress: Report | None) -> Verification:
    """Compare a conversion's output with what it has told: each file, and where one has changed, each tensor."""
    directory = place.parent if place.name == CONVERSION else place
    recorded = mark.read(place)
    output = recorded["output"]
    differences, notes = [], []
    there = {name: directory / name for name in output["files"] if is_file(directory / name)}
    counter = _Counter("verifying", sum(path.stat().st_size for path in there.values()), progress)
    changed = False
    for name, digest in sorted(output["files"].items()):
        fault = _fault_of_file(directory / name, digest)
        if fault is not None:
            differences.append(f"{name}: {fault}")
            changed = True
        counter.add(there[name].stat().st_size if name in there else 0)
    added, said = _beside(directory, {*output["files"], CONVERSION})
    differences += added
    notes += said
    if changed:
        try:
            with open_checkpoint(directory) as checkpoint:
                read = _digests([checkpoint], _Counter("reading tensors", 0, None))
            differences += [*read.differences, *_differing_tensors(read.found, output["tensors"])]
        except M3Error as error:
            differences.append(f"its tensors cannot be read: {error}")
    digest = None if changed else output["digest"]
    return Verification(
        directory, digest, len(output["tensors"]), len(output["files"]), tuple(differences), tuple(notes)
    )
