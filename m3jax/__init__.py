"""m3jax: Mixup Model Merge in JAX, exact, sharded and out of core.

Functions in small letters merge, evaluate and explore. What they are made of has capitals, and is what extends them:
`Method`, `Sparsifier`, `Measure` and its `Round`s, the `MethodRow` and `Parameter`s by which recipes know a method,
`Checkpoint` and `Task`.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from m3jax.checkpoints.protocol import Checkpoint as Checkpoint
    from m3jax.errors import M3Error as M3Error
    from m3jax.evaluation.measuring import measure_statistics as measure_statistics
    from m3jax.evaluation.models import evaluate as evaluate
    from m3jax.evaluation.robustness import attack as attack
    from m3jax.evaluation.tasks.base import Task as Task
    from m3jax.exploration import explore as explore
    from m3jax.exploration.in_memory import explore_trees as explore_trees
    from m3jax.methods.base import Measure as Measure
    from m3jax.methods.base import Method as Method
    from m3jax.methods.base import Round as Round
    from m3jax.methods.base import Sparsifier as Sparsifier
    from m3jax.methods.breadcrumbs import breadcrumbs as breadcrumbs
    from m3jax.methods.consensus import consensus as consensus
    from m3jax.methods.dare import dare as dare
    from m3jax.methods.della import della as della
    from m3jax.methods.fisher import fisher as fisher
    from m3jax.methods.karcher import karcher as karcher
    from m3jax.methods.linear import linear as linear
    from m3jax.methods.linear import task_arithmetic as task_arithmetic
    from m3jax.methods.magmax import magmax as magmax
    from m3jax.methods.magnitude import magnitude as magnitude
    from m3jax.methods.mixup import draw_weights as draw_weights
    from m3jax.methods.mixup import mixup as mixup
    from m3jax.methods.mixup import mixup_weights as mixup_weights
    from m3jax.methods.model_stock import model_stock as model_stock
    from m3jax.methods.multislerp import multislerp as multislerp
    from m3jax.methods.nearswap import nearswap as nearswap
    from m3jax.methods.nuslerp import nuslerp as nuslerp
    from m3jax.methods.passthrough import passthrough as passthrough
    from m3jax.methods.pcb import pcb as pcb
    from m3jax.methods.ram import ram as ram
    from m3jax.methods.ram import ramplus_tl as ramplus_tl
    from m3jax.methods.regmean import regmean as regmean
    from m3jax.methods.rows import MethodRow as MethodRow
    from m3jax.methods.rows import Parameter as Parameter
    from m3jax.methods.sce import sce as sce
    from m3jax.methods.slerp import slerp as slerp
    from m3jax.methods.ties import ties as ties
    from m3jax.outputs.conversion import convert as convert
    from m3jax.outputs.extraction import extract_lora as extract_lora
    from m3jax.outputs.publishing import push as push
    from m3jax.outputs.verification import verify as verify
    from m3jax.recipe import load_recipe as load_recipe
    from m3jax.streaming.differences import diff as diff
    from m3jax.streaming.merging import merge_checkpoint as merge_checkpoint
    from m3jax.streaming.merging import replay as replay
    from m3jax.streaming.sampling import verify_sample as verify_sample
    from m3jax.streaming.seeds import merge_seeds as merge_seeds
    from m3jax.trees.adapters import with_lora as with_lora
    from m3jax.trees.digests import digest as digest
    from m3jax.trees.loading import load as load
    from m3jax.trees.merging import merge as merge
    from m3jax.trees.running import RunningMerge as RunningMerge
    from m3jax.trees.running import soup as soup

# Public names are imported when first used, so that commands that need no JAX start without it.
_HOMES = {
    "M3Error": "errors",
    # For extending; docs/extend.md.
    "Checkpoint": "checkpoints.protocol",
    "Measure": "methods.base",
    "Method": "methods.base",
    "MethodRow": "methods.catalogue",
    "Parameter": "methods.catalogue",
    "Round": "methods.base",
    "Sparsifier": "methods.base",
    "Task": "evaluation.tasks.base",
    # For using.
    "convert": "outputs.conversion",
    "attack": "evaluation.robustness",
    "breadcrumbs": "methods.breadcrumbs",
    "della": "methods.della",
    "consensus": "methods.consensus",
    "fisher": "methods.fisher",
    "magmax": "methods.magmax",
    "model_stock": "methods.model_stock",
    "nearswap": "methods.nearswap",
    "pcb": "methods.pcb",
    "ram": "methods.ram",
    "ramplus_tl": "methods.ram",
    "regmean": "methods.regmean",
    "sce": "methods.sce",
    "karcher": "methods.karcher",
    "multislerp": "methods.multislerp",
    "nuslerp": "methods.nuslerp",
    "passthrough": "methods.passthrough",
    "dare": "methods.dare",
    "digest": "trees.digests",
    "draw_weights": "methods.mixup",
    "diff": "streaming.differences",
    "evaluate": "evaluation.models",
    "explore": "exploration",
    "explore_trees": "exploration.in_memory",
    "extract_lora": "outputs.extraction",
    "linear": "methods.linear",
    "load": "trees.loading",
    "load_recipe": "recipe",
    "magnitude": "methods.magnitude",
    "measure_statistics": "evaluation.measuring",
    "merge": "trees.merging",
    "merge_checkpoint": "streaming.merging",
    "merge_seeds": "streaming.seeds",
    "mixup": "methods.mixup",
    "mixup_weights": "methods.mixup",
    "replay": "streaming.merging",
    "RunningMerge": "trees.running",
    "push": "outputs.publishing",
    "slerp": "methods.slerp",
    "soup": "trees.running",
    "task_arithmetic": "methods.linear",
    "ties": "methods.ties",
    "verify": "outputs.verification",
    "verify_sample": "streaming.sampling",
    "with_lora": "trees.adapters",
}
__all__ = sorted(_HOMES)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'm3jax' has no attribute {name!r}")
    return getattr(importlib.import_module(f"m3jax.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
