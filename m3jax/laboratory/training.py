"""Training small models from scratch and on from there, as ordinary Hugging Face directories."""

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax
from jaxtyping import Array, Bool, Float, Int
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from m3jax import decoder
from m3jax.decoder import DecoderConfig, bind
from m3jax.evaluation.tokens import import_transformers
from m3jax.progress import Tell

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
_LENGTHS = (32, 48, 64, 96, 128)  # texts of like length go together, so that little is padding


class Size(NamedTuple):
    """How large a model is.

    Attributes:
        hidden: Width.
        layers: Transformer blocks.
        heads: Attention heads.
        vocabulary: Tokens.
    """

    hidden: int
    layers: int
    heads: int
    vocabulary: int


class Course(NamedTuple):
    """How a model is trained.

    Attributes:
        steps: Batches.
        batch: Texts in each.
        rate: Adam's learning rate, after a warm-up and before it falls along a cosine.
        seed: Of the order of texts.
        whole: Learn to write the prompts too, not the answers alone.
        pull: How strongly each step also moves back toward where the course began (decoupled from Adam, as its decay
            is); 0 for not at all. It keeps experts of one base near each other, so that they can be merged.
    """

    steps: int
    batch: int
    rate: float
    seed: int = 0
    whole: bool = False
    pull: float = 0.0


class Text(NamedTuple):
    """A lesson in tokens.

    Attributes:
        tokens: The prompt, the answer and the end.
        prompt: How many of them are the prompt's.
    """

    tokens: list[int]
    prompt: int


def make_tokenizer(texts: Sequence[str], vocabulary: int) -> Any:
    """A byte-level BPE tokenizer of transformers that encodes any text without loss, digit by digit.

    Args:
        texts: What it learns its merges from.
        vocabulary: Tokens at most.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    fast = import_transformers().PreTrainedTokenizerFast
    return fast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD)


def make_config(size: Size) -> dict[str, Any]:
    """The config.json of a Llama.

    Args:
        size: How large it is.
    """
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": size.vocabulary,
        "hidden_size": size.hidden,
        "intermediate_size": 2 * size.hidden,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.heads,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "torch_dtype": "float32",
    }


def encode(tokenizer: Any, lessons: Sequence[tuple[str, str]]) -> list[Text]:
    """Lessons in tokens; those that are too long are left out.

    Args:
        tokenizer: A transformers tokenizer.
        lessons: Prompts and answers.
    """
    prompts = tokenizer([prompt for prompt, _ in lessons])["input_ids"]
    answers = tokenizer([answer for _, answer in lessons], add_special_tokens=False)["input_ids"]
    end = [tokenizer.eos_token_id]
    texts = [Text(before + after + end, len(before)) for before, after in zip(prompts, answers, strict=True)]
    return [text for text in texts if len(text.tokens) <= _LENGTHS[-1]]


class LessonBatch(NamedTuple):
    """Texts that are learned from together, padded on the right.

    Attributes:
        tokens: Token ids.
        lengths: Tokens of each text.
        prompts: Tokens of each prompt.
    """

    tokens: npt.NDArray[np.int32]
    lengths: npt.NDArray[np.int32]
    prompts: npt.NDArray[np.int32]


def batches(texts: Sequence[Text], course: Course, lengths: Sequence[int] = _LENGTHS) -> Iterator[LessonBatch]:
    """Batches of like length in random order, as many as the course has steps.

    Args:
        texts: What they are taken from, as often as need be.
        course: How many and how large.
        lengths: To which texts are padded; none is longer.
    """
    chance = np.random.default_rng(course.seed)
    left = course.steps
    while left:
        groups: dict[int, list[int]] = {}
        for index in chance.permutation(len(texts)).tolist():
            groups.setdefault(_padded(len(texts[index].tokens), lengths), []).append(index)
        made = [
            (length, group[start : start + course.batch])
            for length, group in groups.items()
            for start in range(0, len(group), course.batch)
        ]
        for place in chance.permutation(len(made)).tolist()[:left]:
            length, members = made[place]
            missing = course.batch - len(members)  # the last batch of a length takes some of its texts twice
            chosen = [texts[i] for i in [*members, *chance.choice(groups[length], missing).tolist()]]
            yield lesson_batch(chosen, length)
        left -= min(left, len(made))


def _padded(length: int, lengths: Sequence[int]) -> int:
    return next(limit for limit in lengths if length <= limit)


def lesson_batch(texts: Sequence[Text], length: int) -> LessonBatch:
    """Texts as one batch.

    Args:
        texts: None longer than `length`.
        length: To which they are padded.
    """
    tokens = np.zeros((len(texts), length), np.int32)
    for row, text in enumerate(texts):
        tokens[row, : len(text.tokens)] = text.tokens
    lengths, prompts = ([len(t.tokens) for t in texts], [t.prompt for t in texts])
    return LessonBatch(tokens, np.array(lengths, np.int32), np.array(prompts, np.int32))


def cross_entropy(
    params: Any,
    tokens: Int[Array, "rows length"],
    lengths: Int[Array, " rows"],
    prompts: Int[Array, " rows"],
    whole: Bool[Array, ""],
    *,
    config: DecoderConfig,
) -> Float[Array, ""]:
    """Mean cross-entropy of the answers' tokens, or of all.

    Args:
        params: The decoder's parameters.
        tokens: Padded on the right.
        lengths: Tokens of each text.
        prompts: Tokens of each prompt.
        whole: Whether prompts count too.
        config: The decoder.
    """
    places = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]
    model = bind(config, params)
    hidden, _ = model(tokens, jnp.where(places < lengths[:, None], places, decoder.PADDING))
    losses = optax.softmax_cross_entropy_with_integer_labels(model.logits(hidden[:, :-1]), tokens[:, 1:])
    said = places[:, 1:]
    counted = (said < lengths[:, None]) & (whole | (said >= prompts[:, None]))
    return jnp.sum(losses, where=counted) / jnp.sum(counted, dtype=jnp.float32)


# AdamW but for the rate, which is a run-time number so that one program serves all courses.
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(), optax.add_decayed_weights(0.01))


@functools.partial(jax.jit, static_argnames="config", donate_argnums=(0, 1))
def _step(
    params: Any,
    state: Any,
    start: Any,
    rate: Float[Array, ""],
    pull: Float[Array, ""],
    batch: LessonBatch,
    whole: Bool[Array, ""],
    *,
    config: DecoderConfig,
) -> tuple[Any, Any, Float[Array, ""]]:
    loss, slopes = jax.value_and_grad(functools.partial(cross_entropy, config=config))(params, *batch, whole)
    with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer powers
        updates, state = OPTIMIZER.update(slopes, state, params)
    moved = jax.tree.map(lambda p, u, s: p - rate * (u + pull * (p - s)), params, updates, start)
    return moved, state, loss


def train(
    params: Any,
    config: DecoderConfig,
    texts: Sequence[Text],
    course: Course,
    tell: Tell,
    watch: Callable[[int, int], None] | None = None,
) -> Any:
    """Trained parameters.

    Args:
        params: Where to start, float32; not changed.
        config: The decoder.
        texts: The lessons.
        course: How they are taught.
        tell: Told in lines how far it is.
        watch: Told of steps, how many are done and how many there are: of every one after texts of each length were
            met, for which a program is compiled, or after a tenth of the steps.
    """
    rates = optax.warmup_cosine_decay_schedule(0.0, course.rate, min(100, course.steps // 10), course.steps)
    start, params = params, jax.tree.map(jnp.copy, params)
    state: Any = OPTIMIZER.init(params)
    pull = jnp.float32(course.pull)
    begun, total, said = time.perf_counter(), 0.0, 0
    unmet = {_padded(len(text.tokens), _LENGTHS) for text in texts}
    for number, batch in enumerate(batches(texts, course), 1):
        rate, whole = jnp.float32(rates(number - 1)), jnp.bool_(course.whole)
        params, state, loss = _step(params, state, start, rate, pull, batch, whole, config=config)
        total += float(loss)
        unmet.discard(batch.tokens.shape[1])
        if watch is not None and (not unmet or number * 10 >= course.steps):
            watch(number, course.steps)
        if number % max(course.steps // 5, 1) == 0 or number == course.steps:
            spent = time.perf_counter() - begun
            tell(f"step {number} of {course.steps}: loss {total / (number - said):.4f}, {spent:.0f} s")
            said, total = number, 0.0
    return params
