"""Packages outside that bring merge methods by entry points, installed as folders on the path."""

import importlib
import sys
from pathlib import Path

from m3jax.methods import catalogue

ROWS = """
from m3jax import MethodRow, Parameter

CLIPPED = MethodRow(
    name="toy_clip",
    method="m3jax_toy.clipping:clipped",
    summary="weighted sum of task vectors, outliers clipped",
    formula="p + λ·Σ wᵢ·clip(δᵢ, ±limitᵢ·max|δᵢ|)",
    paper="made up for a test, 2026",
    parameters=(
        Parameter("portion", "weights", "the expert's weight", 1.0, level="expert"),
        Parameter("limit", "method.limit", "share of the largest magnitude", 0.5, low=0.0, high=1.0, level="expert"),
        Parameter("strength", "scale", "factor of the whole task vector", 1.0, level="tensor"),
        Parameter("one_sided", "method.one_sided", "clip positive entries only", False, "flag"),
    ),
)
"""

CLIPPING = """
import jax
import jax.numpy as jnp
import numpy as np

from m3jax import Measure, Method, Round
from m3jax.arithmetic import exact
from m3jax.methods.linear import fold_weights, stack, weighted_sum


def _count(options, values, known, state, valid):
    bits = [exact.magnitude_bits(value) for value in values]
    bits = bits if valid is None else [jnp.where(valid, b, 0) for b in bits]
    return jnp.stack([jnp.max(b, initial=np.uint32(0)) for b in bits])


def _conclude(options, state, settings):
    return jax.lax.bitcast_convert_type(state, jnp.float32) * np.array(settings.method["limit"], np.float32)


LARGEST = Measure(
    name="caps",
    label="finding outliers",
    scope="tensor",
    needed=lambda options, numbers: min(numbers["limit"]) < 1.0,
    begin=lambda options, numbers, extent: np.zeros(extent.experts, np.uint32),
    rounds=lambda place: (Round("largest", _count, "max"),),
    advance=lambda options, name, state, totals: totals,
    conclude=_conclude,
)


def _fold(options, settings):
    return stack(fold_weights(settings, tuple(range(len(settings.weights))), False))


def _combine(one_sided, values, known):
    caps = known.found.get("caps")
    if caps is not None:
        floors = [None if one_sided else -caps[i] for i in range(len(values))]
        values = [jnp.clip(value, floors[i], caps[i]) for i, value in enumerate(values)]
    return weighted_sum(known.scalars, values, known.zero)


def clipped(limit=0.5, one_sided=False, scale=1.0):
    return Method(
        "toy_clip",
        _fold,
        _combine,
        measures=(LARGEST,),
        options=one_sided,
        parameters=(("limit", limit),),
        uses_base=True,
        scale=scale,
    )
"""

TOY = {"__init__.py": "", "rows.py": ROWS, "clipping.py": CLIPPING}
TOY_ENTRIES = {"toy_clip": "m3jax_toy.rows:CLIPPED"}


def lay_out(place: Path, package: str, version: str, entries: dict[str, str], files: dict[str, str]) -> Path:
    """A package as an installer leaves it: a module and a .dist-info; to be put on the path.

    Args:
        place: The folder to make.
        package: The distribution's name.
        version: Its version.
        entries: Of the group `m3jax.methods`: "module:object" by name.
        files: Of its module, by name.
    """
    module = place / package.replace("-", "_")
    module.mkdir(parents=True)
    for name, text in files.items():
        (module / name).write_text(text, encoding="utf-8")
    told = place / f"{package.replace('-', '_')}-{version}.dist-info"
    told.mkdir()
    (told / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    lines = [f"{name} = {target}" for name, target in entries.items()]
    (told / "entry_points.txt").write_text("\n".join(["[m3jax.methods]", *lines, ""]))
    return place


def lay_out_toy(place: Path, version: str = "1.0", **files: str) -> Path:
    """The toy package: a method with parameters and a measure of its own.

    Args:
        place: The folder to make.
        version: Its version.
        files: What is another text than usual, by the name of the file without its ending.
    """
    changed = {f"{name}.py": text for name, text in files.items()}
    return lay_out(place, "m3jax-toy", version, TOY_ENTRIES, TOY | changed)


def forget(*modules: str) -> None:
    """Have the catalogue look for packages again, and Python import their modules again."""
    for name in [name for name in sys.modules if name.partition(".")[0] in modules]:
        del sys.modules[name]
    importlib.invalidate_caches()
    catalogue._entry_points.cache_clear()
    catalogue._row_from_outside.cache_clear()
