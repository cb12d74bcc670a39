"""The entries of a model's configuration file, read with checks and with a record of what was read."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from m3jax.documents import LARGEST_FILE, parse_json, read_bounded
from m3jax.errors import M3Error

_NOTHING: Mapping[str, Any] = {}

# What transformers, training and serving write into config.json, and what no model computes anything with.
_HARMLESS = re.compile(
    r"_.*|.*dropout.*|.*(?:pdrop|_drop|drop_rate)|.*version|.*token_ids?|.*token_index|attn_implementation|auto_map"
    r"|architectures|begin_suppress_tokens|bad_words_ids|cache_implementation|chunk_size_feed_forward"
    r"|custom_pipelines|diversity_penalty|do_sample|dtype|early_stopping|encoder_no_repeat_ngram_size"
    r"|exponential_decay_length_penalty|finetuning_task|gradient_checkpointing|id2label|init_std|initializer_.*"
    r"|is_llama_config|label2id|length_penalty|make_vocab_size_divisible_by|max_length|max_seq(?:uence)?_len(?:gth)?"
    r"|min_length|model_max_length|model_type|name_or_path|neftune_noise_alpha|no_repeat_ngram_size"
    r"|num_beam_groups|num_beams|num_labels|num_return_sequences|output_.*|prefix|pretraining_tp|problem_type"
    r"|remove_invalid_values|repetition_penalty|return_dict.*|router_aux_loss_coef|router_jitter_noise"
    r"|sep_token|summary_.*|suppress_tokens|task_specific_params|temperature|tf_legacy_loss|tokenizer_class"
    r"|top_k|top_p|torch_dtype|torchscript|typical_p|unsloth_.*|use_bfloat16|use_cache"
)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Args:
        path: The file.

    Raises:
        M3Error: It is absent, cannot be read or holds something else.
    """
    try:
        entries = parse_json(read_bounded(path, LARGEST_FILE))
    except FileNotFoundError as error:
        raise M3Error(f"{path} does not exist: give a model directory that has one.") from error
    except OSError as error:
        raise M3Error(f"{path} cannot be read: {error.strerror}; check the path and its mode.") from error
    except ValueError as error:
        raise M3Error(f"{path} is not valid JSON ({error}): get the file again from its source.") from error
    if not isinstance(entries, dict):
        raise M3Error(f"{path} is not a JSON object: get the file again from its source.")
    return entries


class Entries:
    """Entries of a configuration file; `null` counts as absent."""

    def __init__(
        self,
        entries: Mapping[str, Any],
        where: str,
        names: Mapping[str, str] = _NOTHING,
        defaults: Mapping[str, Any] = _NOTHING,
    ) -> None:
        """Wraps the parsed file.

        Args:
            entries: The parsed file, or an object in it.
            where: What to call it in errors.
            names: What the file calls entries that others call by the key.
            defaults: Values of entries that the file does not state, by key.
        """
        self.entries = entries
        self.where = where
        self._names = names
        self._defaults = defaults
        self._read: set[str] = set()

    def states(self, key: str) -> bool:
        """Whether the file has the key, be it with `null`."""
        return self._called(key) in self.entries

    def get(self, key: str, default: Any = None) -> Any:
        """The entry, or else the architecture's default, or else the one given."""
        name = self._called(key)
        self._read.add(name)
        value = self.entries.get(name)
        return self._defaults.get(key, default) if value is None else value

    def flag(self, key: str, default: bool = False) -> bool:
        """True or false."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.error(
                f"has {self._called(key)}: {value!r}, neither true nor false", "get the file from its source"
            )
        return value

    def sequence(self, key: str, default: Sequence[Any] = ()) -> Sequence[Any]:
        """A list of anything."""
        value = self.get(key, default)
        if not isinstance(value, list | tuple):
            raise self.error(f"has {self._called(key)}: {value!r}, not a list", "get the file from its source")
        return value

    def count(self, key: str, default: int | None = None) -> int:
        """A positive whole number."""
        value = self.get(key, default)
        if type(value) is not int or value < 1:
            fault = f"has {self._called(key)}: {value!r}, not a positive whole number"
            raise self.error(fault, "get the file from its source")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number."""
        value = self.get(key, default)
        if type(value) not in (int, float) or not 0 < value < float("inf"):
            fault = f"has {self._called(key)}: {value!r}, not a positive number"
            raise self.error(fault, "get the file from its source")
        return float(value)

    def numbers(self, key: str, length: int) -> tuple[float, ...]:
        """So many positive numbers."""
        value = self.get(key)
        if not isinstance(value, list) or len(value) != length:
            raise self.error(f"has {key}: {value!r}, not {length} numbers", "get the file from its source")
        one_by_one = Entries({f"{key}[{i}]": number for i, number in enumerate(value)}, self.where)
        return tuple(one_by_one.number(name) for name in one_by_one.entries)

    def refuse(self, key: str, known: Any, mend: str) -> None:
        """Refuses any other value than one, or none, of an entry.

        Args:
            key: The entry.
            known: The value that the decoder computes with.
            mend: What to do.
        """
        value = self.get(key, known)
        if value != known:
            raise self.error(f"has {self._called(key)}: {value!r}, which the decoder does not know", mend)

    def refuse_unread(self, what: str) -> None:
        """Refuses entries that nobody has read and that may mean something.

        Args:
            what: What the entries describe, for the error.

        Raises:
            M3Error: There is one.
        """
        for name, value in self.entries.items():
            means_nothing = value is None or value is False or value in ("", [], {})
            if name not in self._read and not means_nothing and not _HARMLESS.fullmatch(name):
                shown = repr(value) if len(repr(value)) < 40 else "…"
                raise self.error(
                    f"has {name}: {shown}, which the decoder's {what} does not know",
                    "take the entry out if the model computes the same without it",
                )

    def _called(self, key: str) -> str:
        """What the file calls an entry."""
        return self._names.get(key, key)

    def error(self, fault: str, mend: str) -> M3Error:
        """The sentence for a fault of this file."""
        return M3Error(f"{self.where} {fault}: {mend}.")
