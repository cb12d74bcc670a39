"""What adapter_config.json says: its kind of adapter, its modules, and the rank and scale of each, as PEFT reads it."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from m3jax.checkpoints.protocol import Checkpoint, FileFingerprint
from m3jax.documents import pattern
from m3jax.errors import M3Error

_MOST = 1e30  # of r and lora_alpha, beyond which float32 ends
_ALL_LINEAR = "all-linear"
_TURNED = frozenset({"decision_transformer", "gpt2", "imagegpt", "openai-gpt"})  # whose blocks' weights are [in, out]

# What a configuration says beside what is read here, and which changes nothing of how factors are added to weights.
_OF_TRAINING = frozenset(
    {
        *("auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config"),
        *("inference_mode", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_core", "peft_version"),
        *("qalora_group_size", "revision", "runtime_config", "task_type", "velora_config"),
    }
)
_READ = frozenset(
    {
        *("peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "fan_in_fan_out"),
        *("bias", "lora_bias", "init_lora_weights", "target_modules", "exclude_modules", "layers_to_transform"),
        *("layers_pattern", "modules_to_save"),
    }
)
_REFUSED = {"use_dora": "DoRA", "use_qalora": "QALoRA", "use_bdlora": "BD-LoRA", "target_parameters": "of parameters"}
_PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")  # which leave the base as it was


class StoredAdapter(NamedTuple):
    """An opened adapter.

    Attributes:
        name: What a user calls it.
        checkpoint: Its tensors.
        config: Its adapter_config.json.
        file: Where that is.
        seen: What tells that file from another.
    """

    name: str
    checkpoint: Checkpoint
    config: Mapping[str, Any]
    file: Path
    seen: FileFingerprint


def check_kind(file: Path, config: Mapping[str, Any]) -> None:
    """Raise M3Error if a configuration is not of plain LoRA, or says what is not known."""
    kind = str(config.get("peft_type"))
    if kind.upper() != "LORA":
        raise M3Error(f"{file} is of {kind}, and only LoRA can be added to weights here: merge it in PEFT first.")
    for key, told in config.items():
        if key in _OF_TRAINING or key in _READ or not told:
            continue
        what = f"LoRA {_REFUSED[key]}" if key in _REFUSED else f"of a kind of LoRA that is not known here ({key})"
        raise M3Error(f"{file} is {what}: merge it in PEFT first (merge_and_unload), and name the merged model.")
    start = config.get("init_lora_weights", True)
    if start not in _PLAIN_STARTS:
        raise M3Error(
            f"{file} has init_lora_weights {start!r}, which changes the base too: save it once more in PEFT with"
            " path_initial_model_for_weight_conversion, or merge it there first."
        )


class Scales:
    """The rank and the scale of each module, as a configuration says."""

    def __init__(self, file: Path, config: Mapping[str, Any]) -> None:
        self._file, self._rslora = file, bool(config.get("use_rslora"))
        self._rank, self._alpha = config.get("r", 8), config.get("lora_alpha", 8)
        self._ranks, self._alphas = (config.get(key) or {} for key in ("rank_pattern", "alpha_pattern"))
        for key, told in (("rank_pattern", self._ranks), ("alpha_pattern", self._alphas)):
            if not isinstance(told, dict):
                raise M3Error(f"{file}: {key} is no object of numbers by pattern: restore the file.")

    def of(self, module: str, rank: int) -> float:
        """What the product of a module's factors, of this rank, is multiplied by.

        Raises:
            M3Error: The factors have another rank than the configuration says, or it says no numbers.
        """
        wanted, alpha = self._found("rank_pattern", module), self._found("alpha_pattern", module)
        if wanted != rank:
            raise M3Error(
                f"{self._file} says rank {wanted:g} of {module}, whose factors have rank {rank}: get both files of one"
                " adapter."
            )
        return alpha / math.sqrt(rank) if self._rslora else alpha / rank

    def _found(self, key: str, module: str) -> float:
        """What holds of a module: of the first pattern that its name ends with, as in PEFT, else of all."""
        patterns, general = (self._ranks, self._rank) if key == "rank_pattern" else (self._alphas, self._alpha)
        try:
            told = next((n for p, n in patterns.items() if pattern(rf"^(?:.*\.)?(?:{p})$").search(module)), general)
        except ValueError as error:
            raise M3Error(f"{self._file}: {key} holds what is no regular expression ({error}): mend it.") from None
        if isinstance(told, bool) or not isinstance(told, int | float) or not abs(told) < _MOST:
            raise M3Error(f"{self._file}: {module} has {told!r} for a number (r, lora_alpha, {key}): restore the file.")
        return float(told)


class Scope:
    """Which modules of a model a configuration names, as PEFT reads it."""

    def __init__(self, file: Path, config: Mapping[str, Any]) -> None:
        self._file, self._config = file, config
        targets = config.get("target_modules")
        self.targets = targets if isinstance(targets, str) else self._texts("target_modules")
        self.all_linear = isinstance(self.targets, str) and self.targets.lower() == _ALL_LINEAR
        excluded = config.get("exclude_modules")
        self._excluded = excluded if isinstance(excluded, str) else self._texts("exclude_modules")
        self._saved = self._texts("modules_to_save") or ()
        told = config.get("layers_to_transform")
        layers = told if isinstance(told, list) else [] if told is None else [told]
        if not all(isinstance(layer, int) for layer in layers):
            raise M3Error(f"{file}: layers_to_transform is {told!r:.100}, no numbers of layers: restore the file.")
        self._layers = frozenset(layers)
        lists = config.get("layers_pattern") or []
        self._lists = (lists,) if isinstance(lists, str) else self._texts("layers_pattern") or ()

    def _texts(self, key: str) -> tuple[str, ...] | None:
        told = self._config.get(key)
        if told is None:
            return None
        if not isinstance(told, list) or not all(isinstance(text, str) for text in told):
            raise M3Error(f"{self._file}: {key} is {told!r:.100}, no list of names of modules: restore the file.")
        return tuple(told)

    def _found(self, key: str, text: str, module: str) -> Any:
        try:
            return pattern(text).search(module)
        except ValueError as error:
            raise M3Error(f"{self._file}: {key} holds what is no regular expression ({error}): mend it.") from None

    def _among(self, key: str, names: str | tuple[str, ...], module: str) -> bool:
        """Whether a module is one of these names or ends with one as its last parts, or is all of what they match."""
        if isinstance(names, str):
            return bool(self._found(key, rf"\A(?:{names})\Z", module))
        return any(f".{module}".endswith(f".{name}") for name in names)

    def leaves_out(self, module: str) -> str | None:
        """The key that keeps a module without factors; None where it has them, or where nothing tells."""
        if self._excluded and self._among("exclude_modules", self._excluded, module):
            return "exclude_modules"
        if any(self._found("modules_to_save", rf"^(?:.*\.)?{name}(?:$|\.)", module) for name in self._saved):
            return "modules_to_save"
        known = self.targets is not None and not self.all_linear
        if known and not self._among("target_modules", self.targets or (), module):
            return "target_modules"
        if self._layers and not isinstance(self.targets, str) and module not in (self.targets or ()):
            starts = [rf"(?:^|.*?\.)(?:{each})" for each in self._lists] or [r".*?\.[^.]*"]
            found = (self._found("layers_pattern", rf"^{each}\.(?P<layer>\d+)\.", module) for each in starts)
            layer = next((int(match["layer"]) for match in found if match), None)
            if layer not in self._layers:
                return "layers_to_transform"
        return None

    def saves(self, module: str) -> bool:
        """Whether a module, or one that it is part of, is saved whole."""
        parts = module.split(".")
        outer = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
        return any(each.endswith(name) for each in outer for name in self._saved)


def turned_types(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The architectures in a config.json, its own first, that keep the weights of their blocks as [in, out].

    Example:
        >>> turned_types({"model_type": "gpt2"}), turned_types({"model_type": "llama"})
        (('gpt2',), ())
    """
    parts = (config, *(each for each in config.values() if isinstance(each, dict)))
    return tuple(str(each["model_type"]) for each in parts if each.get("model_type") in _TURNED)
