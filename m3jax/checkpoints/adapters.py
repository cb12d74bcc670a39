"""Adapters of PEFT: what adapter_config.json and the factors beside it make of the model that they are added to.

Names, shapes and the configuration tell it all; values are left to `views_adapted`. What is not plain LoRA is refused
by name: an adapter that is half understood gives a model that nobody trained.
"""

import math
import re
from collections.abc import Mapping
from contextlib import ExitStack
from filecmp import cmp
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from m3jax.checkpoints.adapter_config import Scales, Scope, StoredAdapter, check_kind, turned_types
from m3jax.checkpoints.adapter_ties import with_ties
from m3jax.checkpoints.files import joined_metadata
from m3jax.checkpoints.formats import MSGPACK, SAFETENSORS
from m3jax.checkpoints.locate import ModelDirectory, read_config
from m3jax.checkpoints.opening import open_checkpoint
from m3jax.checkpoints.protocol import (
    Checkpoint,
    Closing,
    FileFingerprint,
    LocalFingerprint,
    TensorInfo,
    in_natural_order,
    is_sequential,
    room_for,
)
from m3jax.checkpoints.remote import RemotePath
from m3jax.checkpoints.storage import is_dir, is_file, list_names, read_file
from m3jax.checkpoints.trust import read_companion
from m3jax.checkpoints.views_adapted import FLOATS, Adaptation, Factor, Product, adapted
from m3jax.documents import parse_json
from m3jax.errors import M3Error
from m3jax.naming import block_of

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_FILES = (WEIGHTS, "adapter_model.bin")
_WHOLE = (SAFETENSORS.endings[0], MSGPACK.endings[0])  # how files of a whole model end

_TOKENIZERS = ("tokenizer.", "tokenizer_config.", "chat_template.", "added_tokens.")

_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<which>[AB])(?:\.default)?(?P<rest>\.\w+)?")
_WRAPPERS = re.compile(r"\.(?:base_layer|modules_to_save(?:\.default)?)(?=\.)")
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_EXPERT = re.compile(r"\.experts\.\d+\.")  # which transformers may hold as one parameter, of which PEFT makes no module
_BESIDE = re.compile(r"(?:^|\.)mtp\w*\.")  # heads that predict further tokens, which transformers leaves out


class Adapting(NamedTuple):
    """What an adapter does to a model.

    Attributes:
        adaptations: What becomes of the model's tensors, by name.
        dropped: The tensors of the adapter.
        config_digest: BLAKE3 of its adapter_config.json.
    """

    adaptations: Mapping[str, Adaptation]
    dropped: frozenset[str]
    config_digest: str


# --- Opening ---------------------------------------------------------------------------------------------


def open_model(place: ModelDirectory) -> Checkpoint:
    """Opens the weights of a model that was found, with its adapter added if it was named with one.

    Args:
        place: As `locate_model` gives it.

    Returns:
        The checkpoint, or a view of it; use it as a context manager.

    Raises:
        M3Error: As `open_stored`.
    """
    checkpoint, adapting = open_stored(place)
    return checkpoint if adapting is None else seen_adapted(checkpoint, adapting)


def seen_adapted(checkpoint: Checkpoint, adapting: Adapting) -> Checkpoint:
    """A model and its adapter in one checkpoint, seen as the model with the adapter added.

    Args:
        checkpoint: As `open_stored` gives it, or a view of it.
        adapting: With it.

    Raises:
        M3Error: Weights that the adapter adds to are no floats.
    """
    for name, (stored, _) in adapting.adaptations.items():
        for info in (checkpoint.tensors[name], checkpoint.tensors[stored]):
            if info.dtype not in FLOATS:
                raise M3Error(
                    f"{checkpoint.location}: {info.name} is {info.dtype}, and adapters are added to float32, bfloat16"
                    " and float16: convert the base first (m3jax convert --dequantize, where it is float8)."
                )
    return adapted(checkpoint, adapting.adaptations, adapting.dropped)


def open_stored(place: ModelDirectory) -> tuple[Checkpoint, Adapting | None]:
    """Opens the weights of a model that was found, and its adapter's beside them if it was named with one.

    Args:
        place: As `locate_model` gives it.

    Returns:
        The tensors of all files, and what the adapter does; None where there is none.

    Raises:
        M3Error: There are no weights, or they are damaged; or the adapter is of a kind that is not known, incomplete,
            or of another base.
    """
    if place.adapter is None:
        return open_checkpoint(place.path), None
    check_no_adapter(place._replace(name=_base_name(place), adapter=None))
    with ExitStack() as opened:
        adapter = _open_adapter(place.adapter)
        opened.enter_context(adapter.checkpoint)
        base = opened.enter_context(open_checkpoint(place.path))
        found = _Joined(place.name, base, adapter), _adapting(place, base, adapter)
        opened.pop_all()  # which stay open
    return found


def _base_name(place: ModelDirectory) -> str:
    """What a user calls the model that an adapter is added to."""
    return place.name if place.adapter is None else place.name.removesuffix(f"+{place.adapter.name}")


def _directory(place: ModelDirectory) -> Path:
    return place.path if is_dir(place.path) else place.path.parent


def tokenizer_note(place: ModelDirectory) -> str | None:
    """What to say of an adapter with a tokenizer that is not its base's; None where it brings none.

    Raises:
        M3Error: A directory cannot be listed, or a file not read.
    """
    if place.adapter is None or isinstance(place.adapter.path, RemotePath) or isinstance(place.path, RemotePath):
        return None
    directory, base = place.adapter.path, _directory(place)
    own = [name for name in list_names(directory) if name.startswith(_TOKENIZERS)]
    other = sorted(name for name in own if not is_file(base / name) or not cmp(directory / name, base / name, False))
    if not other:
        return None
    return (
        f"{place.name}: {', '.join(other)} beside the adapter {'is' if len(other) == 1 else 'are'} not used, but what"
        " the base has: copy it there if the adapter was trained with it."
    )


def check_no_adapter(place: ModelDirectory) -> None:
    """Raise M3Error if what is named as a model is an adapter alone."""
    if place.adapter is not None or not is_dir(place.path) or not is_file(place.path / CONFIG):
        return
    names = list_names(place.path)
    whole = any((name not in _FILES and name.endswith(_WHOLE)) or name.startswith("pytorch_model") for name in names)
    if not whole and any(name in _FILES for name in names):  # beside them may be an optimizer's state
        raise M3Error(f"{place.name} is an adapter and no model: name it with its base, as BASE+{place.name}.")


def _open_adapter(place: ModelDirectory) -> StoredAdapter:
    file = place.path / CONFIG
    if not is_dir(place.path) or not is_file(file):
        raise M3Error(f"{place.name} is no adapter of PEFT, for it has no {CONFIG}: give the directory that has it.")
    raw = read_file(file) if isinstance(file, RemotePath) else read_companion(file, place.path)
    try:
        config = parse_json(raw)
    except ValueError as error:
        raise M3Error(f"{file} is not JSON ({error}): restore the file.") from None
    if not isinstance(config, dict):
        raise M3Error(f"{file} is not a JSON object: restore the file.")
    check_kind(file, config)
    weights = next((place.path / name for name in _FILES if is_file(place.path / name)), None)
    if weights is None:
        raise M3Error(f"{place.name} has no {WEIGHTS}: get the whole adapter.")
    checkpoint = open_checkpoint(weights)
    return StoredAdapter(place.name, checkpoint, config, file, _print_of(file, raw))


def _print_of(file: Path, raw: bytes) -> FileFingerprint:
    digest, told = blake3(raw).hexdigest(), file.stat()
    if isinstance(file, RemotePath):
        return FileFingerprint(size=len(raw), mtime_ns=0, header_blake3=digest)
    return LocalFingerprint(
        size=len(raw),
        mtime_ns=told.st_mtime_ns,
        header_blake3=digest,
        inode=told.st_ino,
        ctime_ns=told.st_ctime_ns,
    )


class _Joined(Closing):
    """The tensors of a model and of its adapter, as they are stored."""

    def __init__(self, name: str, base: Checkpoint, adapter: StoredAdapter) -> None:
        self._parts, self._config = (base, adapter.checkpoint), adapter.file
        self.location = name
        twice = next(iter(base.tensors.keys() & adapter.checkpoint.tensors.keys()), None)
        if twice is not None:
            raise M3Error(f"{name}: both have a tensor {twice!r}: name a model and an adapter of it.")
        self.tensors: Mapping[str, TensorInfo] = in_natural_order({**base.tensors, **adapter.checkpoint.tensors})
        self.metadata = joined_metadata(part.metadata for part in self._parts)

    def read_into(self, name: str, start: int, out: memoryview | npt.NDArray[np.uint8]) -> None:
        view = room_for(self, name, start, out)
        base, adapter = self._parts
        (base if name in base.tensors else adapter).read_into(name, start, view)

    @property
    def sequential(self) -> bool:
        return any(map(is_sequential, self._parts))

    def files(self) -> tuple[Path, ...]:
        return tuple(dict.fromkeys(file for part in self._parts for file in part.files()))

    def fingerprint(self) -> dict[str, FileFingerprint]:
        base, adapter = self._parts
        config = {CONFIG: _print_of(self._config, read_file(self._config))}
        own = {f"adapter/{file}": told for file, told in {**adapter.fingerprint(), **config}.items()}
        return {**base.fingerprint(), **own}

    def close(self) -> None:
        for part in self._parts:
            part.close()


# --- Tensors ---------------------------------------------------------------------------------------------


class _Pair(NamedTuple):
    """The factors of a module, and what its bias gains."""

    a: TensorInfo
    b: TensorInfo
    embedding: bool
    bias: TensorInfo | None


def _adapting(place: ModelDirectory, checkpoint: Checkpoint, adapter: StoredAdapter) -> Adapting:
    """What an adapter does to the tensors of a base."""
    base, config = checkpoint.tensors, read_config(_directory(place)) or {}
    pairs, replacing = _sorted(adapter)
    wanted = {f"{module}.weight" for module in pairs} | {f"{m}.bias" for m, pair in pairs.items() if pair.bias}
    names = _names_in_base(wanted | replacing.keys(), base, place, adapter)
    _check_named(pairs, replacing, adapter)
    _check_whole(pairs, replacing, _seen_by_peft(names, base, place), adapter)
    adaptations = {
        names[name]: Adaptation(_replacement(base[names[name]], info, adapter).name, None)
        for name, info in replacing.items()
    }
    scales = Scales(adapter.file, adapter.config)
    fans = _Fans(adapter, turned_types(config))
    for module, pair in pairs.items():
        weight = base[names[f"{module}.weight"]]
        left, right = fans.factors(weight, pair)
        scale = scales.of(module, left.shape[1])
        adaptations[weight.name] = _added(adaptations, weight.name, Product(left, right, scale))
        if pair.bias is not None:
            bias = base[names[f"{module}.bias"]]
            if bias.shape != pair.bias.shape:
                raise _misfit(adapter, pair.bias, bias)
            product = Product(Factor(None, (1, 1)), Factor(pair.bias.name, (1, bias.size)), scale)
            adaptations[bias.name] = _added(adaptations, bias.name, product)
    fans.check()
    adaptations = with_ties(adaptations, checkpoint, config, adapter)
    return Adapting(adaptations, frozenset(adapter.checkpoint.tensors), adapter.seen["header_blake3"])


def _check_named(pairs: Mapping[str, _Pair], replacing: Mapping[str, TensorInfo], adapter: StoredAdapter) -> None:
    """Raise M3Error if an adapter has what its configuration does not name, which PEFT would leave aside."""
    scope = Scope(adapter.file, adapter.config)
    tying = bool(adapter.config.get("ensure_weight_tying"))  # then the other of two tied embeddings has factors too
    keys = {module: scope.leaves_out(module) for module in pairs if not (tying and _is_embedding(module))}
    for name, info in replacing.items():
        if ".modules_to_save." in info.name and not scope.saves(name.rpartition(".")[0]):
            keys[name] = "modules_to_save"
    aside = [name for name, key in keys.items() if key is not None]
    if aside:
        raise M3Error(
            f"{adapter.name} changes {_and_more(aside)}, which {keys[aside[0]]} in {adapter.file} leaves out: get both"
            " files of one adapter."
        )


def _check_whole(
    pairs: Mapping[str, _Pair],
    replacing: Mapping[str, TensorInfo],
    model: Mapping[str, TensorInfo],
    adapter: StoredAdapter,
) -> None:
    """Raise M3Error if an adapter lacks what its configuration names of a model, whose tensors have PEFT's names."""
    scope = Scope(adapter.file, adapter.config)
    kinds = {_kind(module) for module in pairs}
    experts = any(_EXPERT.search(module) for module in pairs)
    weights = {name.removesuffix(".weight"): info for name, info in model.items() if name.endswith(".weight")}
    modules = [
        module
        for module, info in weights.items()
        if len(info.shape) > 1 and module not in pairs and (experts or not _EXPERT.search(module))
    ]
    if scope.targets is None:
        modules = []  # PEFT's own choice for each architecture
    elif scope.all_linear:
        modules = [module for module in modules if _kind(module) in kinds]
    missing = [module for module in modules if scope.leaves_out(module) is None]
    if missing:
        raise M3Error(
            f"{adapter.name} has no factors of {_and_more(missing)}, which {adapter.file} names: get the whole adapter,"
            " or name in its exclude_modules what it was never trained on."
        )
    keys = {name: "modules_to_save" for name in model if scope.saves(name.rpartition(".")[0])}
    if adapter.config.get("bias") == "all":
        keys |= {name: "bias" for name in model if name.endswith(".bias")}
    lacking = [name for name in keys if name.endswith((".weight", ".bias")) and name not in replacing]
    if lacking:
        raise M3Error(
            f"{adapter.name} has no {_and_more(lacking)}, which {keys[lacking[0]]} in {adapter.file} names: get the"
            " whole adapter."
        )


def _seen_by_peft(
    names: Mapping[str, str], base: Mapping[str, TensorInfo], place: ModelDirectory
) -> dict[str, TensorInfo]:
    """The tensors of a base that PEFT's model has, by the names that they have there.

    Not those outside the module that the adapter was trained on, nor layers beyond the last (which predict further
    tokens).
    """
    theirs, ours = next(iter(names.items()))
    inner, outer = (ours.removesuffix(theirs), "") if ours.endswith(theirs) else ("", theirs.removesuffix(ours))
    config = read_config(_directory(place)) or {}
    text = config.get("text_config")
    layers = {**config, **(text if isinstance(text, dict) else {})}.get("num_hidden_layers")

    def beside(name: str) -> bool:
        layer = _LAYER.search(name)
        return bool(_BESIDE.search(name)) or (layer is not None and isinstance(layers, int) and int(layer[1]) >= layers)

    return {
        outer + name.removeprefix(inner): info
        for name, info in base.items()
        if name.startswith(inner) and not beside(name)
    }


def _is_embedding(module: str) -> bool:
    return "embed" in module or ".wte." in f".{module}." or module.rpartition(".")[2] == "lm_head"


def _kind(module: str) -> str:
    """A module's name without its numbers."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "#", module)


def _and_more(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} (and {len(names) - 1:,} more)"


def _added(known: Mapping[str, Adaptation], name: str, product: Product) -> Adaptation:
    return Adaptation(known[name].stored if name in known else name, product)


def _sorted(adapter: StoredAdapter) -> tuple[dict[str, _Pair], dict[str, TensorInfo]]:
    """The factors of an adapter by module, and by the base's names the tensors that it has in place of others."""
    found: dict[str, dict[str, TensorInfo]] = {}
    replacing: dict[str, TensorInfo] = {}
    embeddings = set()
    for stored, info in adapter.checkpoint.tensors.items():
        if not stored.startswith(_PREFIX):
            raise M3Error(f"{adapter.name}: {stored} does not begin with {_PREFIX}: give an adapter that PEFT saved.")
        if info.dtype not in FLOATS:
            raise M3Error(f"{adapter.name}: {stored} is {info.dtype}, no float32, bfloat16 or float16: save it as one.")
        name = stored.removeprefix(_PREFIX)
        factor = _FACTOR.fullmatch(name)
        if factor is not None and factor["rest"] in (None, ".weight", ".bias"):
            key = f"{factor['which']}{'.bias' if factor['rest'] == '.bias' else ''}"
            module = _WRAPPERS.sub("", f"{factor['module']}.").removesuffix(".")
            if key in found.setdefault(module, {}) or key == "A.bias":
                raise M3Error(f"{adapter.name}: {stored} is there twice, or no factor: get the adapter again.")
            found[module][key] = info
            if factor["embedding"]:
                embeddings.add(module)
            continue
        plain = _WRAPPERS.sub("", name)
        if "lora_" in plain or "original_module" in plain or "token_adapter" in plain or plain in replacing:
            raise M3Error(f"{adapter.name}: {stored} is of a kind of LoRA that is not known here: merge it in PEFT.")
        replacing[plain] = info
    if not found and not replacing:
        raise M3Error(f"{adapter.name} holds no factors: get the adapter again.")
    return {m: _pair(adapter, m, tensors, m in embeddings) for m, tensors in found.items()}, replacing


def _pair(adapter: StoredAdapter, module: str, tensors: Mapping[str, TensorInfo], embedding: bool) -> _Pair:
    if not {"A", "B"} <= tensors.keys():
        there, missing = ("A", "B") if "A" in tensors else ("B", "A")
        raise M3Error(f"{adapter.name} has lora_{there} of {module} but no lora_{missing}: get the whole adapter.")
    return _Pair(tensors["A"], tensors["B"], embedding, tensors.get("B.bias"))


def _names_in_base(
    wanted: set[str], base: Mapping[str, TensorInfo], place: ModelDirectory, adapter: StoredAdapter
) -> dict[str, str]:
    """What the base calls the tensors that an adapter knows by the names of its modules.

    A base may be stored without its model's first module ("transformer."), or with one more: the same for all.
    """
    absent = next((name for name in sorted(wanted) if name not in base), None)
    if absent is None:
        return {name: name for name in wanted}
    changes = [("", name.removesuffix(absent)) for name in base if name.endswith(f".{absent}")]
    changes += [(absent[: at + 1], "") for at, letter in enumerate(absent) if letter == "."]
    renamings = [
        {name: new + name.removeprefix(old) for name in wanted}
        for old, new in changes
        if all(name.startswith(old) for name in wanted)
    ]
    fitting = [renaming for renaming in renamings if all(name in base for name in renaming.values())]
    if len(fitting) != 1:
        raise M3Error(
            f"{adapter.name} is of another base than {_base_name(place)}, which has no"
            f" tensor {absent!r}: name the base that it was trained on, with the tensors that PyTorch has."
        )
    return fitting[0]


def _replacement(own: TensorInfo, info: TensorInfo, adapter: StoredAdapter) -> TensorInfo:
    if own.shape != info.shape:
        raise _misfit(adapter, info, own)
    return info


def _misfit(adapter: StoredAdapter, info: TensorInfo, own: TensorInfo) -> M3Error:
    return M3Error(
        f"{adapter.name}: {info.name} of shape {list(info.shape)} does not fit {own.name} of shape {list(own.shape)}:"
        " name the base that the adapter was trained on."
    )


class _Fans:
    """How factors lie on weights: as [out, in], or as [in, out] where fan_in_fan_out says so.

    The shape tells it unless it is square. A square in a block lies as its architecture has it where that is known to
    turn weights, whatever is said: so does PEFT. Else, where shapes and the configuration disagree, it is unclear.
    """

    def __init__(self, adapter: StoredAdapter, turned_types: tuple[str, ...]) -> None:
        self._turned_types = turned_types
        self._adapter, self._told = adapter, bool(adapter.config.get("fan_in_fan_out"))
        self._square: str | None = None
        self._other: str | None = None

    def factors(self, weight: TensorInfo, pair: _Pair) -> tuple[Factor, Factor]:
        """The factors of what is added to a weight: as many rows as it has, as many columns as the rest.

        Raises:
            M3Error: They do not fit it.
        """
        a, b = pair.a.shape, pair.b.shape
        if len(a) < 2 or len(b) < 2 or b[1] != a[0] or math.prod(b[2:]) != 1 or len(weight.shape) < 2:
            raise _misfit(self._adapter, pair.b, pair.a if len(weight.shape) > 1 else weight)
        if not a[0]:
            raise M3Error(f"{self._adapter.name}: {pair.a.name} has rank 0: it adds nothing, so leave it out.")
        straight = Factor(pair.b.name, (b[0], a[0])), Factor(pair.a.name, (a[0], math.prod(a[1:])))
        turned = Factor(pair.a.name, (math.prod(a[1:]), a[0]), True), Factor(pair.b.name, (a[0], b[0]), True)
        as_straight, as_turned = weight.shape == (b[0], *a[1:]), weight.shape == (*a[1:], b[0]) and len(a) == 2
        if not as_straight and not as_turned:
            raise _misfit(self._adapter, pair.a, weight)
        if pair.embedding:
            if not as_turned:
                raise _misfit(self._adapter, pair.a, weight)
            return turned
        if as_straight and as_turned and self._turned_types:
            return turned if block_of(weight.name) is not None else straight
        if as_straight and as_turned:
            self._square = weight.name
            return turned if self._told else straight
        if as_turned != self._told and len(a) == 2:  # convolutions lie one way
            self._other = weight.name
        return turned if as_turned else straight

    def check(self) -> None:
        """Raise M3Error if the configuration contradicts a shape, and another shape leaves it to the configuration."""
        if self._square is not None and self._other is not None:
            raise M3Error(
                f"{self._adapter.file} says fan_in_fan_out {str(self._told).lower()}, but {self._other} lies the other"
                f" way, so how {self._square} lies is unclear: merge the adapter in PEFT first."
            )
