"""Rotary position embeddings: what a model's config.json says of them."""

import math
from typing import Any, Literal, NamedTuple, TypeAlias

from m3jax.decoder.entries import Entries

Kind: TypeAlias = Literal["default", "linear", "llama3", "yarn", "dynamic", "longrope"]

_KNOWN = "default, linear, llama3, yarn, dynamic and longrope"


class Rope(NamedTuple):
    """Rotary position embedding: its base, and how its frequencies are stretched for longer contexts.

    Attributes:
        theta: Base of the geometric series of frequencies.
        kind: How frequencies are stretched; see `rotation.frequencies`.
        factor: By how much.
        share: Part of each head that is rotated, from its beginning on.
        original_context: Positions that the model was trained on before stretching.
        magnitude: Factor on what is rotated, queries and keys alike (yarn, longrope).
        low_freq_factor: Llama 3: wavelengths over `original_context / low_freq_factor` are stretched in full.
        high_freq_factor: Llama 3: wavelengths under `original_context / high_freq_factor` are left alone.
        beta_fast: YaRN: frequencies that turn more often than this within the original context are left alone.
        beta_slow: YaRN: those that turn less often are stretched in full.
        truncate: YaRN: whether the ends of the ramp in between are rounded outwards to whole frequencies.
        short_factors: LongRoPE: divisors of the frequencies of texts within the original context.
        long_factors: LongRoPE: those of longer texts.
    """

    theta: float = 10000.0
    kind: Kind = "default"
    factor: float = 1.0
    share: float = 1.0
    original_context: int = 0
    magnitude: float = 1.0
    low_freq_factor: float = 0.0
    high_freq_factor: float = 0.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()

    @property
    def context(self) -> int:
        """Positions that the stretching is made for, where it says so; else 0."""
        return round(self.factor * self.original_context) if self.kind in ("yarn", "dynamic") else 0


def read_rope(
    entries: Entries, head_dim: int, *, partial: bool = False, stated: Any = None, theta: float = 10000.0
) -> Rope:
    """Rotary embedding, in the spelling of transformers 5 (`rope_parameters`) or 4 (`rope_scaling`).

    Args:
        entries: The file.
        head_dim: Width of a head.
        partial: Whether the architecture can rotate a part of each head.
        stated: The parameters, where a file has several sets of them.
        theta: The base where none is stated.

    Raises:
        M3Error: They are of an unknown kind, or a value is missing, impossible or unknown.
    """
    if stated is None:
        stated = _stated(entries)
    if not isinstance(stated, dict):
        raise entries.error(f"has rope parameters {stated!r}, not an object", "get the file from its source")
    rope = Entries(stated, entries.where)
    share = rope.number("partial_rotary_factor", entries.number("partial_rotary_factor", 1.0))
    if share != 1 and not partial:
        raise entries.error(f"rotates {share:g} of each head", "the architecture rotates whole heads only")
    if not share <= 1 or int(head_dim * share) % 2 or int(head_dim * share) < 2:
        fault = f"rotates {int(head_dim * share)} of the {head_dim} entries of each head"
        raise entries.error(fault, "rotary embeddings need an even number, up to all")
    plain = Rope(rope.number("rope_theta", entries.number("rope_theta", theta)), share=share)
    # Both keys may be there; the older one is heard where the newer is silent.
    older = rope.get("type", "default")
    kind = rope.get("rope_type", older)
    if kind in ("su", "yarn") and entries.get("model_type") == "phi3":
        kind = "longrope"  # early names of it in Phi-3's files
    context = entries.count("max_position_embeddings", 2048)
    original = rope.get("original_max_position_embeddings", None if kind == "llama3" else context)
    original = entries.get("original_max_position_embeddings", original)
    if type(original) is not int or original < 2:
        fault = f"has original_max_position_embeddings: {original!r}, not a whole number above 1"
        raise entries.error(fault, "get the file from its source")
    found = _stretched(plain, str(kind), rope, head_dim, context, original)
    if found is None:
        raise entries.error(f"asks for {kind!r} RoPE scaling", f"the decoder knows {_KNOWN}")
    rope.get("finetuned")  # the first YaRN models say that they are
    rope.refuse_unread(f"{kind} RoPE")
    return found


def _stated(entries: Entries) -> Any:
    newer, older = entries.get("rope_parameters"), entries.get("rope_scaling")
    return (older if newer is None else newer) or {}


def _stretched(plain: Rope, kind: str, rope: Entries, head_dim: int, context: int, original: int) -> Rope | None:
    """The same stretched as the parameters say; `None` if they name an unknown kind."""
    pairs = int(head_dim * plain.share) // 2
    match kind:
        case "default":
            return plain
        case "linear":
            return plain._replace(kind="linear", factor=rope.number("factor"))
        case "dynamic":
            if pairs < 2:
                raise rope.error("has dynamic RoPE scaling of a single pair", "it needs at least two")
            return plain._replace(kind="dynamic", factor=rope.number("factor"), original_context=context)
        case "llama3":
            low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
            if not low < high:
                raise rope.error("has low_freq_factor not below high_freq_factor", "swap them")
            return plain._replace(
                kind="llama3",
                factor=rope.number("factor"),
                original_context=original,
                low_freq_factor=low,
                high_freq_factor=high,
            )
        case "yarn":
            factor = rope.number("factor", context / original)
            fast, slow = rope.number("beta_fast", 32.0), rope.number("beta_slow", 1.0)
            if not slow < fast:
                raise rope.error("has beta_slow not below beta_fast", "swap them")
            return plain._replace(
                kind="yarn",
                factor=factor,
                original_context=original,
                magnitude=_yarn_magnitude(rope, factor),
                beta_fast=fast,
                beta_slow=slow,
                truncate=rope.flag("truncate", True),
            )
        case "longrope":
            factor = rope.number("factor", context / original)
            usual = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
            return plain._replace(
                kind="longrope",
                factor=factor,
                original_context=original,
                magnitude=rope.number("attention_factor", usual),
                short_factors=rope.numbers("short_factor", pairs),
                long_factors=rope.numbers("long_factor", pairs),
            )
        case _:
            return None


def _yarn_magnitude(rope: Entries, factor: float) -> float:
    """YaRN's factor on queries and keys: as stated, or by the rule of its paper or of DeepSeek."""

    def rule(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0

    weights = [rope.get(key) for key in ("mscale", "mscale_all_dim")]
    usual = rule(1.0)
    if all(weights):
        above, below = (rule(rope.number(key)) for key in ("mscale", "mscale_all_dim"))
        usual = above / below
    return rope.number("attention_factor", usual)
