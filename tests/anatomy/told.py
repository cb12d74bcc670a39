"""Merges of every architecture against an oracle that is told the blocks by hand, not by the anatomy."""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file
from support import oracle

import m3jax

# A tensor's block is what its name begins with, up to the first number behind one of these words.
BLOCK = re.compile(r"^(.*?(?:layers|layer|h|blocks|block|resblocks)\.\d+)\.")
# Where it is not: stages of blocks, blocks that are groups of layers, lists of blocks beside lists that are none.
BLOCKS = {
    "albert": re.compile(r"^(.*?albert_layer_groups\.\d+)\."),
    "funnel": re.compile(r"^(funnel\.(?:encoder\.blocks\.\d+|decoder\.layers)\.\d+)\."),
    "swin": re.compile(r"^(.*?layers\.\d+\.blocks\.\d+)\."),
    "swinv2": re.compile(r"^(.*?layers\.\d+\.blocks\.\d+)\."),
    "convnext": re.compile(r"^(.*?stages\.\d+\.layers\.\d+)\."),
    "resnet": re.compile(r"^(.*?stages\.\d+\.layers\.\d+)\."),
    "regnet": re.compile(r"^(.*?stages\.\d+\.layers\.\d+)\."),
    "segformer": re.compile(r"^(.*?encoder\.block\.\d+\.\d+)\."),
    "poolformer": re.compile(r"^(.*?encoder\.block\.\d+\.\d+)\."),
    "wav2vec2": re.compile(r"^(.*?encoder\.layers\.\d+)\."),
}
SUBLAYERS = re.compile(r"^transformer\.(?:attentions|ffns|layer_norm[12])\.(\d+)\.")  # XLM's
SEED, ALPHA = 11, 0.5


def block_of(architecture: str, name: str) -> str | None:
    """The group of tensors that share a draw by layer; None outside of blocks."""
    if architecture == "xlm":
        found = SUBLAYERS.match(name)
        return None if found is None else f"transformer.attentions.{found.group(1)}"
    found = BLOCKS.get(architecture, BLOCK).match(name)
    return None if found is None else found.group(1)


def _positions(blocks: Mapping[str, str | None], depths: Mapping[str, int]) -> dict[str, float]:
    """Where each block stands in its tower: stages follow each other, other lists are towers of their own."""
    order = sorted({block for block in blocks.values() if block}, key=lambda b: [int(n) for n in re.findall(r"\d+", b)])
    towers: dict[str, list[str]] = {}
    for block in order:
        towers.setdefault("all" if len(depths) == 1 else re.sub(r"(\.\d+)+$", "", block), []).append(block)
    assert sorted(map(len, towers.values())) == sorted(depths.values())
    return {
        block: i / (len(tower) - 1) if len(tower) > 1 else 1.0
        for tower in towers.values()
        for i, block in enumerate(tower)
    }


def _experts(place: Path, kinds: Mapping[str, str]) -> tuple[dict[str, np.ndarray], list[dict[str, np.ndarray]]]:
    """The written model and two near it, which are written beside it; coarse, so that ties are common."""
    base = load_file(place / "base" / "model.safetensors")
    rng = np.random.default_rng(0)
    experts = []
    for i in range(2):
        expert = {
            name: leaf + (np.round(rng.standard_normal(leaf.shape) * 8) / 64).astype(leaf.dtype)
            if leaf.dtype == np.float32 and kinds[name] == "parameter"
            else leaf
            for name, leaf in base.items()
        }
        own = place / f"expert-{i}"
        own.mkdir()
        save_file({name: np.asarray(leaf, leaf.dtype) for name, leaf in expert.items()}, own / "model.safetensors")
        (own / "config.json").write_bytes((place / "base" / "config.json").read_bytes())
        experts.append(expert)
    return base, experts


def _merged(place: Path, **keys: object) -> dict[str, np.ndarray]:
    recipe = {"base_model": str(place / "base"), "dtype": "float32", "seed": SEED} | keys
    m3jax.merge_checkpoint(recipe, place / "out", overwrite=True, chunk_entries=2**16)
    return load_file(place / "out" / "model.safetensors")


def wrong_merges(
    architecture: str, depths: Mapping[str, int], kinds: Mapping[str, str], place: Path
) -> dict[str, list[str]]:
    """Merges that are not what an oracle gives that is told the blocks, by what is merged; empty where all are.

    Args:
        architecture: Its name in the table.
        depths: Of its towers, from its configuration.
        kinds: Of tensors: those of kind "parameter" are merged.
        place: Where the model is written, in `base`; the rest is made beside it.
    """
    base, experts = _experts(place, kinds)
    parameters = [name for name, leaf in base.items() if kinds[name] == "parameter" and leaf.dtype == np.float32]
    ours, theirs = {n: base[n] for n in parameters}, [{n: e[n] for n in parameters} for e in experts]
    blocks = {name: block_of(architecture, name) for name in parameters}
    at = _positions(blocks, depths)
    models = [str(place / f"expert-{i}") for i in range(2)]
    inside = [name for name in parameters if blocks[name]]

    drawn = {name: oracle.draw(SEED, ALPHA, 2, blocks[name] or "outside blocks") for name in parameters}
    sloped = {name: [at[blocks[name]], 1 - at[blocks[name]]] for name in inside}
    gradient = [{"model": m, "parameters": {"weight": w}} for m, w in zip(models, ([0, 1], [1, 0]), strict=True)]
    trim = {"density": 0.3, "trim_scope": "model", "sign_election": "unweighted"}
    cases = {
        "linear": (
            {"merge_method": "linear", "models": models, "parameters": {"weight": 0.5}},
            oracle.merge(theirs, weights=[0.5, 0.5]),
        ),
        "M³ by layer": (
            {"merge_method": "linear", "models": models, "mixup": {"alpha": ALPHA, "granularity": "layer"}},
            oracle.merge(theirs, weights=drawn),
        ),
        "gradient": (
            {"merge_method": "task_arithmetic", "models": gradient},
            oracle.merge(
                [{n: e[n] for n in inside} for e in experts],
                {n: base[n] for n in inside},
                "task_arithmetic",
                sloped,
            ),
        ),
        "TIES of the model": (
            {"merge_method": "ties", "models": models, "parameters": {"weight": 1.0} | trim},
            oracle.merge(theirs, ours, "ties", density=0.3, trim_scope="model", election="unweighted"),
        ),
    }
    wrong = {}
    for what, (keys, want) in cases.items():
        got = _merged(place, **keys)
        names = [name for name, leaf in want.items() if got[name].tobytes() != leaf.tobytes()]
        if names:
            wrong[what] = names
    return wrong


def kinds_by_hand(model: object, names: list[str]) -> dict[str, str]:
    """What tensors are by the model's own lists: buffers, running statistics, and parameters."""
    buffers = {name for name, _ in model.named_buffers()}  # type: ignore[attr-defined]

    def kind(name: str) -> str:
        if name.endswith(("running_mean", "running_var")):
            return "statistics"
        learned = re.search(r"final_logits_bias$|e_score_correction_bias$", name)
        return "buffer" if name in buffers and not learned else "parameter"

    return {name: kind(name) for name in names}
