"""Flax trees of every layout, tiny: linen, NNX, train states, MaxText, Gemma and towers beside each other."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp
import optax
from anatomy.trees import infos, of_tree
from flax import linen, nnx
from flax.training.train_state import TrainState

from m3jax.checkpoints import TensorInfo

WIDTH, DEPTH, WORDS = 8, 3, 40


# --- Models ------------------------------------------------------------------------------------------------


class Block(linen.Module):
    boxed: bool = False

    @linen.compact
    def __call__(self, x, _):
        init = linen.initializers.lecun_normal()
        init = linen.with_partitioning(init, (None, None)) if self.boxed else init
        x = linen.LayerNorm(name="norm")(x)
        x = linen.Dense(12, kernel_init=init, name="up")(x)
        x = linen.BatchNorm(use_running_average=True, name="bn")(x)
        return linen.Dense(WIDTH, name="down")(x), None


class Model(linen.Module):
    axis: int | None = None
    boxed: bool = False

    @linen.compact
    def __call__(self, tokens):
        x = linen.Embed(WORDS, WIDTH, name="embed")(tokens)
        if self.axis is None:
            for i in range(DEPTH):
                x, _ = Block(self.boxed, name=f"layers_{i}")(x, None)
        else:
            scanned = linen.scan(
                Block,
                variable_axes={"params": self.axis, "batch_stats": 0},
                split_rngs={"params": True},
                length=DEPTH,
                metadata_params={linen.PARTITION_NAME: "layers"},
            )
            x, _ = scanned(self.boxed, name="layers")(x, None)
        return linen.Dense(WORDS, name="head")(linen.LayerNorm(name="final")(x))


def linen_variables(axis=None, boxed=False):
    model = Model(axis, boxed)
    return jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32)))


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 12, rngs=rngs)
        self.bn = nnx.BatchNorm(12, rngs=rngs)
        self.drop = nnx.Dropout(0.1, rngs=rngs)
        self.down = nnx.Linear(12, WIDTH, rngs=rngs)


class NnxModel(nnx.Module):
    def __init__(self, rngs, stacked):
        self.embed = nnx.Embed(WORDS, WIDTH, rngs=rngs)
        if stacked:
            create = nnx.split_rngs(splits=DEPTH)(nnx.vmap(NnxBlock, in_axes=0, out_axes=0))
            self.layers = create(rngs)
        else:
            self.layers = nnx.List([NnxBlock(rngs) for _ in range(DEPTH)])
        self.final = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, WORDS, rngs=rngs)


def nnx_tensors(stacked, box=True):
    state = nnx.state(NnxModel(nnx.Rngs(0), stacked))
    flat = {".".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}
    found = {}
    for name, leaf in flat.items():
        found |= of_tree({name: {"value": leaf} if box else leaf})
    return found


# --- MaxText and Gemma ------------------------------------------------------------------------------------

LEAVES = {
    "mlp.wi_0.kernel": (8, 12),
    "mlp.wo.kernel": (12, 8),
    "pre_self_attention_layer_norm.scale": (8,),
    "self_attention.query.kernel": (8, 2, 4),
    "self_attention.out.kernel": (2, 4, 8),
}
OUTER = {
    "decoder.decoder_norm.scale": (8,),
    "token_embedder.embedding": (40, 8),
    "decoder.logits_dense.kernel": (8, 40),
}


def maxtext(lists, prefix="params."):
    """A tree with the leaves of a block below each path; `(path, count, axis)` stacks them, `(path, None, 0)` not."""
    shapes = dict(OUTER)
    for path, count, axis in lists:
        for leaf, shape in LEAVES.items():
            stacked = shape if count is None else (*shape[:axis], count, *shape[axis:])
            shapes[f"decoder.{path}.{leaf}"] = stacked
    return infos({f"{prefix}{name}": shape for name, shape in shapes.items()})


GEMMA = {
    "attn.attn_vec_einsum.w": (2, 4, 8),
    "attn.q_einsum.w": (2, 8, 4),
    "mlp.gating_einsum": (2, 8, 12),
    "mlp.linear": (12, 8),
    "pre_attention_norm.scale": (8,),
}


def gemma(spelled, stacked=None, join="."):
    shapes = {"transformer.embedder.input_embedding": (40, 8), "transformer.final_norm.scale": (8,)}
    for path in spelled:
        for leaf, shape in GEMMA.items():
            shapes[f"transformer.{path}.{leaf}"] = shape if stacked is None else (stacked, *shape)
    if join == "/":
        return infos({"/".join(name.split(".")[:-1]) + "." + name.split(".")[-1]: s for name, s in shapes.items()})
    return infos(shapes)


# --- Train states, and all layouts ----------------------------------------------------------------------


def train_state(axis=None):
    def create():
        variables = Model(axis).init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
        return TrainState.create(apply_fn=None, params=variables["params"], tx=optax.adamw(1e-3))

    state = jax.eval_shape(create)
    return of_tree({"params": state.params, "opt_state": state.opt_state, "step": jnp.zeros((), jnp.int32)})


def nnx_with_optimizer():
    optimizer = nnx.Optimizer(NnxModel(nnx.Rngs(0), stacked=False), optax.adam(1e-3), wrt=nnx.Param)
    tensors = renamed(nnx_tensors(stacked=False, box=True), lambda name: f"model.{name}")
    for path, leaf in nnx.to_flat_state(nnx.state(optimizer)):
        tensors |= of_tree({"optimizer": {".".join(map(str, path)): {"value": leaf.get_value()}}})
    return tensors


def kauldron():
    variables = of_tree(linen_variables())
    tensors = renamed(variables, lambda name: name if name.startswith("params.") else f"collections.{name}")
    for moment in ("mu", "nu"):
        tensors |= renamed(variables, lambda name, moment=moment: f"opt_state.0.{moment}.{name}")
    return tensors | infos({"step": (), "opt_state.0.count": ()}, "I32") | infos({"training_time_hours": ()})


def renamed(tensors, rename):
    return {rename(name): info._replace(name=rename(name)) for name, info in tensors.items()}


def two_towers():
    """A language model and a vision tower as PaliGemma's JAX code has them, each stacked to its own depth."""
    tensors = {}
    for tower, depth in (("llm.layers", 4), ("img.Transformer.encoderblock", 5)):
        tensors |= infos({f"params.{tower}.{leaf}": (depth, *shape) for leaf, shape in GEMMA.items()})
    return tensors | infos(
        {"params.llm.embedder.input_embedding": (40, 8), "params.img.embedding.kernel": (4, 4, 3, 8)}
    )


def maxtext_cycle(axis=1, container="layers", left=2):
    cycle = [(f"{container}.layers_{j}", 4, axis) for j in range(3)]
    return maxtext(cycle + [(f"layers_remainder.layers_{j}", None, 0) for j in range(left)])


LAYOUTS: Mapping[str, Callable[[], dict[str, TensorInfo]]] = MappingProxyType(
    {
        "linen, a module for each block": lambda: of_tree(linen_variables()),
        "linen, `nn.scan` on axis 0": lambda: of_tree(linen_variables(0)),
        "linen, `nn.scan` on axis 1, boxed": lambda: of_tree(linen_variables(1, boxed=True)),
        "NNX, a list of blocks": lambda: nnx_tensors(stacked=False),
        "NNX, `nnx.vmap` of blocks": lambda: nnx_tensors(stacked=True),
        "`TrainState` of Flax": train_state,
        "`nnx.Optimizer` beside its model": nnx_with_optimizer,
        "Kauldron": kauldron,
        "MaxText, unscanned": lambda: maxtext([(f"layers_{i}", None, 0) for i in range(5)]),
        "MaxText, scanned": lambda: maxtext([("layers", 5, 1)]),
        "MaxText, scanned, `param_scan_axis: 0`": lambda: maxtext([("layers", 5, 0)]),
        "MaxText, dense and MoE blocks": lambda: maxtext([("dense_layers", 2, 1), ("moe_layers", 3, 1)]),
        "MaxText, cycles of unlike blocks and a remainder": maxtext_cycle,
        "Gemma, nested": lambda: gemma([f"layer_{i}" for i in range(12)]),
        "Gemma, flat": lambda: gemma([f"layer_{i}" for i in range(12)], join="/"),
        "Gemma, stacked": lambda: gemma([f"stacked_layers.attention_type_{j}" for j in range(6)], stacked=2),
        "PaliGemma, two stacked towers": two_towers,
    }
)
