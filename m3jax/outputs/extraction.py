"""extract_lora(): from a fine-tuned model and its base to an adapter that PEFT loads; lossy, and it says how much.

Singular values come from a randomised subspace iteration on the device that JAX has. Its bits are those of this device
and this version of JAX only: a digest of an extracted adapter is no promise, unlike a merge's.
"""

import functools
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from m3jax.anatomy import Anatomy
from m3jax.anatomy.stored import stored_anatomy
from m3jax.checkpoints import (
    DTYPES,
    Checkpoint,
    FileFingerprint,
    ModelDirectory,
    ShardWriter,
    TensorInfo,
    digest_checkpoint,
    digest_tensor,
    locate_model,
    open_safetensors,
)
from m3jax.checkpoints.adapter_config import turned_types
from m3jax.checkpoints.adapters import CONFIG, WEIGHTS, check_no_adapter, open_model
from m3jax.checkpoints.locate import read_config
from m3jax.checkpoints.protocol import without_ctime
from m3jax.checkpoints.remote import is_url
from m3jax.checkpoints.standing_in import CONVERSION
from m3jax.checkpoints.storage import is_dir
from m3jax.checkpoints.views_adapted import FLOATS
from m3jax.errors import M3Error, saying_what_failed
from m3jax.outputs.local import Staging
from m3jax.outputs.manifest import versions
from m3jax.outputs.modes import narrow
from m3jax.outputs.places import check_apart, check_free, exactly
from m3jax.progress import Progress

_PREFIX = "base_model.model."
_MORE = 10  # columns of the subspace beyond the rank, and how often it is multiplied by the matrix and its transpose
_ROUNDS = 4
_NO_LINEAR = re.compile(r"embed|relative_attention_bias|norm|(?:^|\.)(?:ln|wte|wpe)(?:_|\.|$)")
_NAMED = 5  # tensors that a note lists


class ExtractResult(NamedTuple):
    """What an extraction did.

    Attributes:
        directory: Where the adapter is.
        modules: How many weights it has factors of.
        saved: How many tensors it has whole.
        bytes: Of its tensors.
        digest: BLAKE3 of all tensors.
        share: Of the squares of what the weights with factors differ by, how much the factors have; 1 is all.
        notes: What a user should know.
        seconds: Wall time.
    """

    directory: Path
    modules: int
    saved: int
    bytes: int
    digest: str
    share: float
    notes: tuple[str, ...]
    seconds: float


class _Extracted(NamedTuple):
    """The parts of an adapter as they are found."""

    tensors: dict[str, npt.NDArray[np.float32]]
    ranks: dict[str, int]
    saved: list[str]
    left_out: list[str]
    squares: float
    kept: float


def extract_lora(
    model: str | os.PathLike[str],
    base: str | os.PathLike[str],
    out: str | os.PathLike[str],
    rank: int,
    *,
    overwrite: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> ExtractResult:
    """Writes what a model has learned beyond its base as a LoRA adapter, in the format of PEFT.

    The weights of linear modules become the best factors of this rank of what they differ by, up to the iteration's
    precision; norms, embeddings and other whole modules that differ are saved whole, as PEFT's `modules_to_save`.
    Biases beside factors have no place there, and are named in a note. What does not differ is not written.

    Args:
        model: The fine-tuned model: a directory, a weight file or a hub id; or `model+adapter`.
        base: What it was tuned from.
        out: The directory to make; its parent exists.
        rank: Of the factors, at least 1; of a weight with a shorter side, that side.
        overwrite: Replace `out` if m3jax has made it.
        progress: Called after every tensor.

    Raises:
        M3Error: The two differ in names or shapes, or not at all; the weights lie otherwise than in linear modules, or
            are no floats; or the place is at fault.

    References:
        Halko, Martinsson and Tropp, Finding structure with randomness, SIAM Review 53 (2), 2011.
    """
    begun = time.perf_counter()
    place = Path(out)
    if rank < 1:
        raise M3Error(f"rank is {rank}, but factors have at least 1: give a larger one.")
    if is_url(os.fspath(out)):
        raise M3Error(f"{os.fspath(out)!r} is not on this disk: extract to a local directory, then upload it.")
    check_free(place, overwrite)
    names = [os.fspath(model), os.fspath(base)]
    found = [locate_model(name) for name in names]
    for each in found:
        check_no_adapter(each)
    with saying_what_failed(place), ExitStack() as stack:
        tuned, plain = (stack.enter_context(open_model(each)) for each in found)
        for each, opened in zip(found, (tuned, plain), strict=True):
            check_apart(place, each, opened.files())
        before = [tuned.fingerprint(), plain.fingerprint()]
        _check_alike(tuned, plain, names)
        config = _config_beside(found[1].path)
        turned = turned_types(config)
        if turned:
            raise M3Error(f"{names[1]} is {turned[0]}, whose weights lie as [in, out]: extract it in PEFT.")
        extracted = _extracted(tuned, plain, stored_anatomy(plain, found[1].path, config or None), rank, progress)
        if not extracted.tensors:
            raise M3Error(f"{names[0]} has the weights of {names[1]}: there is nothing to extract.")
        _check_at_rest(place, found, (tuned, plain), before, config)
        identity = hashlib.sha256(json.dumps([names, rank, before], sort_keys=True).encode()).hexdigest()
        told = _config(extracted, names[1], config, rank, plain)
        digest = _write(place, extracted.tensors, told, identity, overwrite, [*tuned.files(), *plain.files()])
    share = min(1.0, extracted.kept / extracted.squares) if extracted.squares else 1.0
    return ExtractResult(
        place,
        len(extracted.ranks),
        len(extracted.saved),
        sum(value.nbytes for value in extracted.tensors.values()),
        digest,
        share,
        tuple(_notes(extracted)),
        time.perf_counter() - begun,
    )


def _config_beside(path: Path) -> dict[str, Any]:
    return read_config(path if is_dir(path) else path.parent) or {}


def _check_at_rest(
    out: Path,
    models: Sequence[ModelDirectory],
    opened: Sequence[Checkpoint],
    before: Sequence[Mapping[str, FileFingerprint]],
    config: Mapping[str, Any],
) -> None:
    """Raise M3Error if a model, or the base's configuration, is no more what the adapter was extracted from."""
    seen = zip(opened, before, strict=True)  # of a link or a mode nothing depends
    odd = [without_ctime(own.fingerprint()) != without_ctime(then) for own, then in seen]
    odd[1] |= _config_beside(models[1].path) != config
    if any(odd):
        name = models[odd.index(True)].name
        raise M3Error(f"{out}: {name} changed while it was being read: extract again once it is at rest.")


def _check_alike(tuned: Checkpoint, plain: Checkpoint, names: list[str]) -> None:
    """Raise M3Error unless both have the same tensors."""
    for name in tuned.tensors.keys() | plain.tensors.keys():
        if name not in tuned.tensors or name not in plain.tensors:
            has, lacks = names if name in tuned.tensors else names[::-1]
            raise M3Error(
                f"{has} has a tensor {name!r} that {lacks} lacks: give a model and the base it was tuned from."
            )
        shapes = [list(each.tensors[name].shape) for each in (tuned, plain)]
        if shapes[0] != shapes[1]:
            raise M3Error(
                f"{name} is {shapes[0]} in {names[0]} but {shapes[1]} in {names[1]}: an adapter cannot change shapes."
            )


def _notes(extracted: _Extracted) -> Iterator[str]:
    left_out = extracted.left_out
    if left_out:
        more = f" and {len(left_out) - _NAMED} more" if len(left_out) > _NAMED else ""
        yield (
            f"{', '.join(left_out[:_NAMED])}{more}: differ too, but an adapter of PEFT has no place for a bias beside"
            " factors or a tied embedding, so they stay the base's"
        )


# --- Tensors ---------------------------------------------------------------------------------------------


def _extracted(
    tuned: Checkpoint,
    plain: Checkpoint,
    anatomy: Anatomy,
    rank: int,
    progress: Callable[[Progress], None] | None,
) -> _Extracted:
    """What the tensors of a model make an adapter of."""
    found = _Extracted({}, {}, [], [], 0.0, 0.0)
    total, done = sum(info.nbytes for info in tuned.tensors.values()), 0
    for name, info in tuned.tensors.items():
        if anatomy.parts[name].kind == "parameter":
            found = _with_tensor(found, name, _floats(tuned, name), _floats(plain, name), anatomy, rank)
        done += info.nbytes
        if progress is not None:
            progress(Progress("extracting", done, total))
    modules = {name.removesuffix(".weight") for name in found.ranks}
    tied = _tied_names(anatomy)  # of which PEFT would change one of the two
    beside = [n for n in found.saved if n.rpartition(".")[0] in modules or "." not in n or n in tied]
    for name in beside:
        del found.tensors[_PREFIX + name]
    return found._replace(saved=[n for n in found.saved if n not in beside], left_out=beside)


def _with_tensor(found: _Extracted, name: str, tuned: Any, plain: Any, anatomy: Anatomy, rank: int) -> _Extracted:
    difference = tuned - plain
    if not np.isfinite(difference).all():
        raise M3Error(f"{name} holds NaN or infinite entries in one of the models: mend it first.")
    if not difference.any():
        return found
    if not _is_linear(name, tuned.shape, anatomy):
        return found._replace(tensors=found.tensors | {_PREFIX + name: tuned}, saved=[*found.saved, name])
    rank = min(rank, min(difference.shape))
    left, right, squares, kept = (np.asarray(part) for part in _factorised(difference, rank))
    module = name.removesuffix(".weight")
    factors = {f"{_PREFIX}{module}.lora_A.weight": right, f"{_PREFIX}{module}.lora_B.weight": left}
    return found._replace(
        tensors=found.tensors | factors,
        ranks=found.ranks | {name: rank},
        squares=found.squares + float(squares),
        kept=found.kept + float(kept),
    )


def _tied_names(anatomy: Anatomy) -> set[str]:
    """What is one tensor with another, under all of its names."""
    copies = {name: part.alias_of for name, part in anatomy.parts.items() if part.alias_of is not None}
    own = {anatomy.embedding} if anatomy.ties_embeddings else set()
    return {name for name in (*copies, *copies.values(), *own) if name is not None}


def _is_linear(name: str, shape: tuple[int, ...], anatomy: Anatomy) -> bool:
    """Whether a tensor is the weight of a linear module: of a block, or an output embedding of its own."""
    if len(shape) != 2 or not name.endswith(".weight") or not min(shape):
        return False
    if anatomy.parts[name].alias_of is not None:
        return False
    return name == anatomy.head or (anatomy.parts[name].block is not None and not _NO_LINEAR.search(name))


def _floats(checkpoint: Checkpoint, name: str) -> npt.NDArray[np.float32]:
    info = checkpoint.tensors[name]
    if info.dtype not in FLOATS:
        raise M3Error(
            f"{checkpoint.location}: {name} is {info.dtype}, no float32, bfloat16 or float16: convert it first."
        )
    raw = np.empty(info.nbytes, np.uint8)
    checkpoint.read_into(name, 0, raw)
    return raw.view(DTYPES[info.dtype]).reshape(info.shape).astype(np.float32)


@functools.partial(jax.jit, static_argnames="rank")
def _factorised(matrix: Any, rank: int) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """B [out, rank] and A [rank, in] of about the best rank, with equal lengths; and the squares of all and of them."""
    scale = jnp.max(jnp.abs(matrix))  # differences may be so small that their squares vanish
    matrix = matrix / scale
    columns = min(rank + _MORE, *matrix.shape)
    precise = functools.partial(jnp.matmul, precision="highest")
    subspace = jax.random.normal(jax.random.key(0, impl="threefry2x32"), (matrix.shape[1], columns), jnp.float32)

    def nearer(_: int, columns: jax.Array) -> jax.Array:
        found = jnp.linalg.qr(precise(matrix, columns))[0]
        return jnp.linalg.qr(precise(matrix.T, found))[0]

    found = jnp.linalg.qr(precise(matrix, jax.lax.fori_loop(0, _ROUNDS, nearer, subspace)))[0]
    u, values, v = jnp.linalg.svd(precise(found.T, matrix), full_matrices=False)
    root = jnp.sqrt(values[:rank] * scale)
    left, right = precise(found, u[:, :rank]) * root[None], root[:, None] * v[:rank]
    return left, right, jnp.sum(matrix**2) * scale**2, jnp.sum(values[:rank] ** 2) * scale**2


# --- Writing ---------------------------------------------------------------------------------------------


def _config(
    extracted: _Extracted, base: str, config: Mapping[str, Any], rank: int, plain: Checkpoint
) -> dict[str, Any]:
    """The adapter_config.json."""
    modules = [name.removesuffix(".weight") for name in extracted.ranks]
    short = {f"^{re.escape(n.removesuffix('.weight'))}": r for n, r in extracted.ranks.items() if r != rank}
    architectures = config.get("architectures") or [""]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if str(architectures[0]).endswith("ForCausalLM") else None,
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": short,
        "alpha_pattern": short,
        "target_modules": _shortest(modules, plain),
        "modules_to_save": sorted({name.rpartition(".")[0] for name in extracted.saved}) or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        "use_dora": False,
        "use_rslora": False,
    }


def _shortest(modules: list[str], plain: Checkpoint) -> list[str]:
    """Names that mean these modules to PEFT and no others: the last parts, where all modules that end so are meant."""
    known = [name.removesuffix(".weight") for name in plain.tensors if name.endswith(".weight")]

    def last(name: str) -> str:
        return name.rpartition(".")[2]

    others = {last(name) for name in known} & {last(name) for name in known if name not in modules}
    return sorted({name if last(name) in others else last(name) for name in modules})


def _write(
    out: Path,
    tensors: Mapping[str, npt.NDArray[np.float32]],
    config: Mapping[str, Any],
    identity: str,
    overwrite: bool,
    read: list[Path],
) -> str:
    """Writes an adapter's directory, which appears whole; returns the digest of its tensors."""
    infos = [TensorInfo(name, value.shape, "F32") for name, value in tensors.items()]
    size = sum(info.nbytes for info in infos)
    with Staging(out, identity, size, overwrite, names=exactly([WEIGHTS, CONFIG, CONVERSION])) as staging:
        with ShardWriter(staging.path / WEIGHTS, infos) as shard:
            for name, value in tensors.items():
                shard.write(name, 0, value)
            shard.finish()
        with open_safetensors(staging.path / WEIGHTS) as written:
            told = {n: (i.dtype, i.shape, digest_tensor(written, n)) for n, i in written.tensors.items()}
        (staging.path / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        digest = digest_checkpoint(told)
        mark = {"m3jax": versions()["m3jax"], "format": "peft", "digest": digest, "files": [WEIGHTS, CONFIG]}
        (staging.path / CONVERSION).write_text(json.dumps(mark, indent=2) + "\n", encoding="utf-8")
        narrow(staging.path, read)
        staging.publish()
    return digest
