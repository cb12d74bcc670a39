"""The demo: three tiny models made on the spot, merged in five ways, replayed, verified, and λ drawn in a picture.

The weights come from integers and single float32 operations, so they are the same bytes on every machine.
"""

import hashlib
import json
import math
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import ml_dtypes
import numpy as np
import numpy.typing as npt
import yaml

from m3jax import __version__, inspection
from m3jax.checkpoints import ShardWriter, TensorInfo, plan_shards, write_index
from m3jax.console import count_text, size_text, time_text
from m3jax.errors import M3Error

if TYPE_CHECKING:  # JAX, matplotlib and tokenizers are imported where they are first needed
    from matplotlib.axes import Axes
    from tokenizers import Tokenizer

    from m3jax.streaming import MergeResult

Floats: TypeAlias = npt.NDArray[np.float32]
Doubles: TypeAlias = npt.NDArray[np.float64]
Echo: TypeAlias = Callable[[str], None]

BASE, EXPERTS = "base", ("expert-a", "expert-b")
ALPHA, SEED, DRAWS = 0.5, 7, 1000
PICTURE = "lambda.png"

_MARK = ".m3jax-demo"  # in the demo's own directory, whose content may be overwritten
_MADE = "made.json"  # in the directory of the models: what they were made from
_DIGITS = 12  # of a digest, enough to tell by eye


class Size(NamedTuple):
    """How large the demo's models are.

    Attributes:
        vocabulary: Tokens; at least the 256 bytes and three special ones.
        hidden: Width, a multiple of `heads`.
        intermediate: Width of the feed-forward part.
        layers: Transformer blocks.
        heads: Attention heads.
        key_value_heads: Heads of keys and values; divides `heads`.
        shard: Bytes of tensors per file at most.
    """

    vocabulary: int = 512
    hidden: int = 512
    intermediate: int = 1536
    layers: int = 8
    heads: int = 8
    key_value_heads: int = 4
    shard: int = 20_000_000


# --- The tokenizer ---------------------------------------------------------------------------------------

SPECIAL = ("<s>", "</s>", "<pad>")

# What the tokenizer learns its merges from.
PRIMER = """\
Fine-tuning turns one language model into many. One copy learns to follow instructions, another to solve problems in
mathematics, a third to write programs, and all of them started from the same weights. Merging asks whether their
skills can live in one model again, without any training and without the data that the experts were trained on.

The simplest merge is an average: add the weights of the experts, entry by entry, and divide by how many there are. It
works better than it should, because experts that share a base stay close to it. The difference between an expert and
its base is called a task vector, and task arithmetic adds task vectors to the base as if skills were numbers.

Task vectors get in each other's way. Most of their entries are small and hardly matter; where two experts pull the
same entry in opposite directions, their sum helps neither. TIES trims the small entries of every task vector, elects
a sign for each entry that is left, and averages only the experts that agree with the elected sign. DARE goes another
way: it drops entries at random and makes the remaining ones larger, so that on average nothing is lost. A model with
most of its task vector dropped still answers nearly as well, and what was dropped can no longer disturb the others.

Mixup Model Merge leaves the question of how much weight each expert deserves to chance. It draws a ratio from a Beta
distribution and interpolates: the merged weights are lambda times the first expert plus one minus lambda times the
second. When alpha is one, every ratio is equally likely. When alpha is small, most draws lie close to one of the two
experts; when it is large, most lie near the middle. Drawing many ratios, merging with each of them and keeping the
merge that does best explores a line between the experts that an average visits at only one point.

A merge that depends on chance should still be repeatable. Here every random number follows from a seed, the name of a
tensor and the position of an entry in it, and every sum is taken in an order that never changes. The same recipe and
the same seed give the same bytes on a laptop, on a graphics card and on a thousand chips: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9.
"""


def train_tokenizer(vocabulary: int) -> "Tokenizer":
    """A byte-level BPE tokenizer that has read the primer and encodes any text without loss.

    Args:
        vocabulary: How many tokens it is to have.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([PRIMER], trainer)
    return tokenizer


# --- The models ------------------------------------------------------------------------------------------


def _configs(size: Size) -> dict[str, dict[str, Any]]:
    """The small JSON files of a model directory, by name."""
    bos, eos, pad = range(len(SPECIAL))
    special = dict(zip(("bos_token", "eos_token", "pad_token"), SPECIAL, strict=True))
    identifiers = {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": pad}
    return {
        "config.json": {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": size.vocabulary,
            "hidden_size": size.hidden,
            "intermediate_size": size.intermediate,
            "num_hidden_layers": size.layers,
            "num_attention_heads": size.heads,
            "num_key_value_heads": size.key_value_heads,
            "head_dim": size.hidden // size.heads,
            "hidden_act": "silu",
            "max_position_embeddings": 2048,
            "initializer_range": 0.02,
            "rms_norm_eps": 1e-05,
            "rope_theta": 10000.0,
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": False,
            "dtype": "bfloat16",
            **identifiers,
        },
        "generation_config.json": {"do_sample": False, "max_new_tokens": 64, **identifiers},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": 2048,
            "clean_up_tokenization_spaces": False,
            **special,
        },
    }


def _shapes(size: Size) -> dict[str, tuple[int, ...]]:
    """Every tensor of a Llama model of this size."""
    keys = size.hidden // size.heads * size.key_value_heads
    block = {
        "input_layernorm": (size.hidden,),
        "self_attn.q_proj": (size.hidden, size.hidden),
        "self_attn.k_proj": (keys, size.hidden),
        "self_attn.v_proj": (keys, size.hidden),
        "self_attn.o_proj": (size.hidden, size.hidden),
        "post_attention_layernorm": (size.hidden,),
        "mlp.gate_proj": (size.intermediate, size.hidden),
        "mlp.up_proj": (size.intermediate, size.hidden),
        "mlp.down_proj": (size.hidden, size.intermediate),
    }
    layers = {f"model.layers.{i}.{part}.weight": shape for i in range(size.layers) for part, shape in block.items()}
    vocabulary = (size.vocabulary, size.hidden)
    ends = {"model.norm.weight": (size.hidden,), "lm_head.weight": vocabulary}
    return {"model.embed_tokens.weight": vocabulary, **layers, **ends}


def bell(label: str, count: int) -> Floats:
    """Bell-shaped numbers of mean 0 and variance 1: sums of four 16-bit integers, the same on every machine.

    Args:
        label: Names the stream; its digest is the generator's key.
        count: How many.
    """
    key = int.from_bytes(hashlib.sha256(label.encode()).digest()[:16], "big")
    # Raw words: numpy promises them for ever, and its normal deviates call the machine's own logarithm.
    pieces = np.random.Philox(key=key).random_raw(count).view(np.uint16)
    total = pieces[0::4].astype(np.int32)
    for start in (1, 2, 3):
        total += pieces[start::4]
    total -= 2 * 0xFFFF
    return total.astype(np.float32) * np.float32(1 / math.sqrt((2**32 - 1) / 3))


def _base_weights(name: str, shape: tuple[int, ...]) -> Floats:
    """Matrices as they are before training, norms of ones."""
    if len(shape) == 1:
        return np.ones(shape, np.float32)
    return bell(f"{BASE}/{name}", math.prod(shape)).reshape(shape) * np.float32(0.02)


def _direction(label: str, shape: tuple[int, ...]) -> Floats:
    """One thing learned: of rank one, so that few of its entries are large, as TIES and DARE suppose."""
    factors = [bell(f"{label}/{axis}", length) for axis, length in enumerate(shape)]
    return factors[0] if len(shape) == 1 else np.multiply.outer(*factors)


def _task_vector(expert: str, name: str, shape: tuple[int, ...]) -> Floats:
    """What an expert learned: something that both did, and something of its own."""
    scale = np.float32(0.02 if len(shape) == 1 else 0.002)
    shared, own = _direction(f"shared/{name}", shape), _direction(f"{expert}/{name}", shape)
    return (shared * np.float32(0.5) + own) * scale


def _tensors(name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """One tensor in every model, in bfloat16."""
    base = _base_weights(name, shape).astype(ml_dtypes.bfloat16)
    yield BASE, base
    for expert in EXPERTS:
        changed = base.astype(np.float32) + _task_vector(expert, name, shape)
        yield expert, changed.astype(ml_dtypes.bfloat16)


def _origin(size: Size) -> dict[str, Any]:
    """What the models are made from."""
    return {"m3jax": __version__, "size": size._asdict(), "primer": hashlib.sha256(PRIMER.encode()).hexdigest()}


def build_models(directory: Path, size: Size) -> bool:
    """Makes the base and the experts as model directories inside `directory`, unless they are there.

    Args:
        directory: Appears whole, by a rename; its parent exists.
        size: How large the models are to be; models of another size are replaced.

    Returns:
        Whether they had to be made.
    """
    if _read_origin(directory) == _origin(size):
        return False
    partial = directory.with_name(directory.name + ".partial")
    for stale in (partial, directory):
        shutil.rmtree(stale, ignore_errors=True)
    shards = plan_shards([TensorInfo(name, shape, "BF16") for name, shape in _shapes(size).items()], size.shard)
    tokenizer = train_tokenizer(size.vocabulary).to_str(pretty=True)
    for model in (BASE, *EXPERTS):
        (partial / model).mkdir(parents=True)
        for name, content in _configs(size).items():
            _write_json(partial / model / name, content)
        (partial / model / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
        write_index(partial / model, shards, sum(info.nbytes for _, infos in shards for info in infos))
    for file, infos in shards:
        _write_shard(partial, file, infos)
    _write_json(partial / _MADE, _origin(size))
    partial.rename(directory)
    return True


def _read_origin(directory: Path) -> Any:
    try:
        return json.loads((directory / _MADE).read_bytes())
    except (OSError, ValueError):
        return None


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _write_shard(directory: Path, file: str, infos: Sequence[TensorInfo]) -> None:
    """Writes one weight file of every model; the base's tensors are made once for all of them."""
    with ExitStack() as stack:
        writers = {
            model: stack.enter_context(ShardWriter(directory / model / file, infos)) for model in (BASE, *EXPERTS)
        }
        for info in infos:
            for model, tensor in _tensors(info.name, info.shape):
                writers[model].write(info.name, 0, tensor)
        for writer in writers.values():
            writer.finish()


# --- The merges ------------------------------------------------------------------------------------------

_DARE = {"method": "dare", "density": 0.8}
_ARITHMETIC = {"merge_method": "task_arithmetic", "parameters": {"lambda": 0.5}}
_TIES = {
    "merge_method": "ties",
    "parameters": {"density": 0.5, "trim_scope": "model", "sign_election": "unweighted"},
}
_METHODS: dict[str, dict[str, Any]] = {
    "linear": {"merge_method": "linear"},
    "task-arithmetic": _ARITHMETIC,
    "ties": _TIES,
    "dare-task-arithmetic": {**_ARITHMETIC, "sparsify": _DARE},
    "dare-ties": {**_TIES, "sparsify": _DARE},
}


class Merged(NamedTuple):
    """One merge of the demo.

    Attributes:
        name: Of its recipe and its directory.
        result: What the merge did.
        distances: From each expert, as a share of the experts' distance from each other.
    """

    name: str
    result: "MergeResult"
    distances: tuple[float, ...]

    @property
    def weights(self) -> tuple[float, ...]:
        """The weights drawn."""
        (group,) = self.result.manifest["weights"].values()
        return tuple(map(float, group["decimal"]))


def write_recipes(directory: Path, models: Path) -> dict[str, Path]:
    """Writes a recipe for every merge of the demo; they name the models so that they can be run from anywhere.

    Args:
        directory: Where the recipes go; it exists.
        models: Where the models are.

    Returns:
        The files by the merges' names.
    """
    written = {}
    for name, method in _METHODS.items():
        base = {} if method["merge_method"] == "linear" else {"base_model": str(models.resolve() / BASE)}
        recipe = {
            **method,
            **base,
            "models": [str(models.resolve() / expert) for expert in EXPERTS],
            "mixup": {"alpha": ALPHA},
            "seed": SEED,
            "dtype": "bfloat16",
        }
        written[name] = directory / f"{name}.yaml"
        written[name].write_text(yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return written


def _distance(a: Path, b: Path) -> float:
    return inspection.compare(str(a), str(b)).total.distance or 0.0


def _merge_all(recipes: Mapping[str, Path], out: Path, models: Path, shard: int) -> Iterator[Merged]:
    from m3jax.streaming import merge_checkpoint

    first, second = (models / expert for expert in EXPERTS)
    apart = _distance(first, second)
    for name, recipe in recipes.items():
        result = merge_checkpoint(recipe, out / name, overwrite=True, max_shard_size=shard)
        yield Merged(name, result, tuple(_distance(result.directory, expert) / apart for expert in (first, second)))


# --- The draws -------------------------------------------------------------------------------------------


def draw_ratios(count: int = DRAWS) -> Doubles:
    """λ for the seeds 0, 1, …, count − 1."""
    from m3jax.mixing import draw_weights

    return np.array([draw_weights(seed, ALPHA)[0] for seed in range(count)])


def kolmogorov_distance(draws: Doubles) -> float:
    """The largest gap between the distribution of the draws and Beta(α, α): the Kolmogorov–Smirnov statistic."""
    from scipy.special import betainc

    true = betainc(ALPHA, ALPHA, np.sort(draws))
    steps = np.arange(draws.size + 1) / draws.size
    return float(max((steps[1:] - true).max(), (true - steps[:-1]).max()))


def kolmogorov_limit(count: int) -> float:
    """What that distance stays below in 99 of 100 fair samples of `count` (asymptotic)."""
    from scipy.special import kolmogi

    return float(kolmogi(0.01)) / math.sqrt(count)


_INK, _DRAWN, _TRUE, _USED = "#333333", "#9dbfe0", "#1f4e79", "#d1651a"


def save_picture(path: Path, draws: Doubles, used: float) -> None:
    """Draws the λ drawn and the law they are drawn from, as density and as cumulative share.

    Args:
        path: The PNG file to make.
        draws: λ for many seeds.
        used: The λ of the demo's merges.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), dpi=150, layout="constrained")
    density, cumulative = figure.subplots(1, 2, gridspec_kw={"wspace": 0.08})
    _draw_density(density, draws, used)
    _draw_cumulative(cumulative, draws, used)
    for axes in (density, cumulative):
        axes.set_xlim(0, 1)
        axes.set_xlabel("λ, the weight of expert-a", color=_INK)
        axes.tick_params(colors=_INK)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"M³: λ drawn for {draws.size:,} seeds from Beta({ALPHA}, {ALPHA})", color=_INK, fontsize=13)
    figure.savefig(path)


def _draw_density(axes: "Axes", draws: Doubles, used: float) -> None:
    from scipy.special import betaln

    grid = np.linspace(0.001, 0.999, 999)
    curve = np.exp((ALPHA - 1) * (np.log(grid) + np.log1p(-grid)) - betaln(ALPHA, ALPHA))
    heights, _, _ = axes.hist(
        draws, bins=25, range=(0, 1), density=True, color=_DRAWN, edgecolor="white", label="drawn"
    )
    axes.plot(grid, curve, color=_TRUE, linewidth=2, label="true density")
    axes.axvline(used, color=_USED, linestyle="--", linewidth=1.5, label=f"seed {SEED}: λ = {used:.4f}")
    axes.set_ylim(0, 1.15 * float(np.max(heights)))  # the curve itself has no upper end
    axes.set_ylabel("density", color=_INK)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(0.15, 1))


def _draw_cumulative(axes: "Axes", draws: Doubles, used: float) -> None:
    from scipy.special import betainc

    grid = np.linspace(0, 1, 1001)
    curve, limit = betainc(ALPHA, ALPHA, grid), kolmogorov_limit(draws.size)
    axes.fill_between(grid, curve - limit, curve + limit, color=_DRAWN, alpha=0.45, linewidth=0, label="99 % band")
    axes.plot(grid, curve, color=_TRUE, linewidth=2, label="true share")
    axes.ecdf(draws, color=_INK, linewidth=1, label=f"drawn, distance {kolmogorov_distance(draws):.3f}")
    axes.axvline(used, color=_USED, linestyle="--", linewidth=1.5)
    axes.set_ylim(0, 1)
    axes.set_ylabel("share of draws up to λ", color=_INK)
    axes.legend(frameon=False, loc="upper left")


# --- The whole -------------------------------------------------------------------------------------------


def main(directory: Path, echo: Echo, size: Size | None = None) -> dict[str, Any]:
    """Makes models, merges them, and tells what came of it.

    Args:
        directory: Where to work; made if need be. Models of an earlier run are used again, its merges overwritten.
        echo: Is given the account, line by line.
        size: How large the models are to be; tens of millions of parameters if None.

    Returns:
        The same account as plain data for JSON.

    Raises:
        M3Error: The directory cannot be used, or holds something else.
    """
    begun = time.perf_counter()
    size = size or Size()
    models, recipes, merges = (directory / name for name in ("models", "recipes", "merges"))
    _take_over(directory)
    for place in (recipes, merges):
        place.mkdir(exist_ok=True)
    account: dict[str, Any] = {"directory": str(directory), "models": _models(models, size, echo)}
    merged = _merges(write_recipes(recipes, models), merges, models, size.shard, echo)
    account["merges"] = [_merged_json(merge) for merge in merged]
    account["replay"] = _replay(merged[-1].result, merges / "replayed", echo)
    account["draws"] = _draws(directory / PICTURE, merged[0].weights[0], echo)
    account["seconds"] = time.perf_counter() - begun
    _say_next(directory, account["seconds"], echo)
    return account


def _take_over(directory: Path) -> None:
    """Makes the demo's directory, and refuses one that holds anything but an earlier demo."""
    mark = directory / _MARK
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if any(directory.iterdir()) and not mark.is_file():
            raise M3Error(f"{directory}: holds something else than a demo: give a new or an empty directory")
        mark.write_text("Made by m3jax demo, which overwrites what is here.\n", encoding="utf-8")
    except OSError as error:
        raise M3Error(f"{directory}: cannot be used: {error.strerror}: give another directory") from error


def _models(models: Path, size: Size, echo: Echo) -> dict[str, Any]:
    begun = time.perf_counter()
    built = build_models(models, size)
    seconds = time.perf_counter() - begun
    seen = inspection.look_at(str(models / BASE))
    how = f"built in {time_text(seconds)}" if built else "built by an earlier run"
    echo(f"Models in {models}, {how}: {BASE}, {', '.join(EXPERTS)}.")
    echo(
        f"Each is a Llama of {seen.entries / 1e6:.3g} M parameters in bfloat16,"
        f" {size_text(seen.bytes)} in {count_text(len(seen.files), 'file')}."
    )
    return {
        "directory": str(models),
        "names": [BASE, *EXPERTS],
        "built": built,
        "seconds": seconds,
        "parameters": seen.entries,
        "bytes": seen.bytes,
        "files": len(seen.files),
    }


def _merges(recipes: Mapping[str, Path], out: Path, models: Path, shard: int, echo: Echo) -> list[Merged]:
    echo("")
    echo(f"Merged by M³ into {out}, λ ~ Beta({ALPHA}, {ALPHA}) drawn with seed {SEED}, λ for {EXPERTS[0]}:")
    wide = max(map(len, recipes))
    echo(f"  {'':{wide}}  {'λ':>8}  {'time':>6}  {'to a':>5}  {'to b':>5}  digest")
    done = []
    for merge in _merge_all(recipes, out, models, shard):
        done.append(merge)
        to_a, to_b = merge.distances
        echo(
            f"  {merge.name:{wide}}  {merge.weights[0]:8.6f}  {merge.result.seconds:4.1f} s"
            f"  {to_a:5.2f}  {to_b:5.2f}  {merge.result.digest[:_DIGITS]}"
        )
    echo("  (to a, to b: how far from each expert, where the two are 1 apart)")
    return done


def _merged_json(merge: Merged) -> dict[str, Any]:
    return {
        "name": merge.name,
        "directory": str(merge.result.directory),
        "weights": list(merge.weights),
        "seconds": merge.result.seconds,
        "digest": merge.result.digest,
        "distances": list(merge.distances),
    }


def _replay(original: "MergeResult", out: Path, echo: Echo) -> dict[str, Any]:
    """Makes a merge again from its manifest alone, and reads back what was written."""
    from m3jax.manifest import verify
    from m3jax.streaming import replay

    again = replay(original.directory, out, overwrite=True)
    found = verify(out)
    same = again.digest == original.digest == found.digest
    echo("")
    echo(f"Replayed {original.directory.name} from its manifest into {out}:")
    echo(f"  digest {found.digest[:_DIGITS]}, {'the same' if same else f'NOT {original.digest[:_DIGITS]}'}")
    checked = f"{count_text(found.tensors, 'tensor')} and {count_text(found.files, 'other file')}"
    differing = f", {count_text(len(found.differences), 'difference')}" if found.differences else " as recorded"
    echo(f"  verified: {checked}{differing}")
    return {
        "of": str(original.directory),
        "directory": str(out),
        "digest": found.digest,
        "same_digest": same,
        "differences": list(found.differences),
    }


def _draws(picture: Path, used: float, echo: Echo) -> dict[str, Any]:
    draws = draw_ratios()
    distance, limit = kolmogorov_distance(draws), kolmogorov_limit(draws.size)
    save_picture(picture, draws, used)
    echo("")
    echo(f"Drew λ for {draws.size:,} seeds: Kolmogorov–Smirnov distance from Beta({ALPHA}, {ALPHA}) is {distance:.3f}")
    echo(f"  (99 of 100 fair samples stay below {limit:.3f}); picture in {picture}")
    return {
        "seeds": draws.size,
        "alpha": ALPHA,
        "kolmogorov_distance": distance,
        "limit_99": limit,
        "picture": str(picture),
    }


def _say_next(directory: Path, seconds: float, echo: Echo) -> None:
    def path(*parts: str) -> str:
        return shlex.quote(str(directory.joinpath(*parts)))

    # An environment may be in use without being activated, as scripts/demo does.
    command = "m3jax" if shutil.which("m3jax") else shlex.quote(str(Path(sys.executable).with_name("m3jax")))
    echo("")
    echo(f"All in {time_text(seconds)}. Next, try:")
    echo(f"  {command} merge {path('recipes', 'ties.yaml')} {path('mine')} --seed {SEED + 1}")
    echo(f"  {command} inspect {path('merges', 'ties')} {path('models', EXPERTS[0])}")
    echo(f"  {command} verify {path('merges', 'ties')}")
