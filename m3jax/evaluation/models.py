"""From a decoder and a tokenizer to what evaluation asks for: text that continues prompts, and log-likelihoods."""

import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax

from m3jax import bits, decoder
from m3jax.checkpoints import locate_model
from m3jax.decoder import DecoderConfig
from m3jax.errors import M3Error
from m3jax.evaluation.harness import make_harness_model
from m3jax.evaluation.protocol import Completion, GenerationSettings, Generator, LogLikelihood, Scorer
from m3jax.evaluation.records import digest
from m3jax.evaluation.runner import Summary, evaluate_named

Overflow = Literal["error", "truncate", "skip"]
_VOCABULARIES = ("tokenizer.json", "*.model", "vocab.json", "vocab.txt", "tekken.json", "*.tiktoken")


class LanguageModel(NamedTuple):
    """A model that can be evaluated.

    Attributes:
        name: What it is called in summaries.
        params: The decoder's parameters, on one device or a mesh.
        config: The decoder.
        tokenizer: A transformers tokenizer.
    """

    name: str
    params: Any
    config: DecoderConfig
    tokenizer: Any


def load_model(name: str, dtype: str | None = None, mesh: jax.sharding.Mesh | None = None) -> LanguageModel:
    """Reads a model directory or hub id.

    Args:
        name: As `locate_model` takes it.
        dtype: Of the parameters; each keeps its own if None.
        mesh: Where to put them, see `decoder.load_params`.

    Raises:
        M3Error: It is absent, of an unknown architecture, incomplete, or has no tokenizer.
    """
    place = locate_model(name)
    if not place.path.is_dir():
        raise M3Error(f"{name}: is a weight file without config and tokenizer: give the model's directory")
    config = DecoderConfig.from_directory(place.path)
    tokenizer = _load_tokenizer(name, place.path)
    _check_vocabulary(name, tokenizer, config)
    return LanguageModel(name, decoder.load_params(place.path, config, dtype, mesh), config, tokenizer)


def make_mesh(axes: str) -> jax.sharding.Mesh:
    """A mesh from text such as "fsdp=4,tp=2".

    Raises:
        M3Error: The text is no list of the axes fsdp and tp, or there are not as many devices.
    """
    sizes: dict[str, int] = {}
    for part in axes.split(","):
        name, _, size = part.strip().partition("=")
        if name not in ("fsdp", "tp") or name in sizes or not size.isdecimal() or int(size) < 1:
            raise M3Error(f"--mesh is {axes!r}, but must be such as fsdp=4,tp=2")
        sizes[name] = int(size)
    wanted, there = math.prod(sizes.values()), jax.device_count()
    if wanted > there:
        raise M3Error(f"--mesh {axes} needs {wanted} devices, but there are {there}: make it smaller")
    auto = (jax.sharding.AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=auto, devices=jax.devices()[:wanted])


def _load_tokenizer(name: str, directory: Path) -> Any:
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it need not say that torch is missing
    from transformers import AutoTokenizer

    if not any(path for pattern in _VOCABULARIES for path in directory.glob(pattern)):
        raise M3Error(f"{name}: has no tokenizer: copy tokenizer.json and tokenizer_config.json of its base into it")
    try:
        return AutoTokenizer.from_pretrained(directory)
    except Exception as error:  # the libraries behind it raise every kind, a bare Exception among them
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise M3Error(f"{name}: its tokenizer cannot be read ({said}): copy that of its base") from error


def _check_vocabulary(name: str, tokenizer: Any, config: DecoderConfig) -> None:
    if tokenizer.vocab_size > config.vocab_size:  # added tokens beyond it are refused where a text has them
        raise M3Error(
            f"{name}: its tokenizer has {tokenizer.vocab_size} tokens, but its embedding only {config.vocab_size} "
            "rows: "
            "take the tokenizer that belongs to the weights"
        )


def _encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text, with the beginning-of-text token exactly once where the tokenizer has one."""
    begins = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    return list(tokenizer.encode(text, add_special_tokens=not begins))


def _shortened(tokenizer: Any, text: list[int], length: int) -> list[int]:
    """The right end of a text, behind its beginning-of-text token if it has one."""
    begins = bool(text) and text[0] == tokenizer.bos_token_id
    return text[:1] + text[1 - length :] if begins else text[-length:]


def _stop_tokens(tokenizer: Any, config: DecoderConfig, stops: Sequence[str]) -> tuple[int, ...]:
    """What ends a text: the config's tokens, the tokenizer's own, and stop strings that are special tokens."""
    special = [tokenizer.convert_tokens_to_ids(stop) for stop in stops if stop in tokenizer.all_special_tokens]
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return tuple(sorted({*config.stop_token_ids, *own, *special}))


def fingerprint(model: LanguageModel, overflow: Overflow, told: Any) -> str:
    """Digest of what a run depends on beside its model's name.

    Args:
        model: The model.
        overflow: What becomes of prompts that fill the context.
        told: Anything plain that tells the weights from others, such as their digest.
    """
    stops = _stop_tokens(model.tokenizer, model.config, ())
    dtypes = sorted({str(leaf.dtype) for leaf in jax.tree.leaves(model.params)})
    return digest([told, dtypes, overflow, stops, len(model.tokenizer), str(model.config)])[:16]


def _watch(progress: Callable[[str], None] | None) -> Callable[[decoder.Progress], None] | None:
    """Pass on what is compiled, in words."""
    if progress is None:
        return None
    tell = progress

    def watch(event: decoder.Progress) -> None:
        if event.event == "compile":
            tell(f"compiling {event.stage} for {event.batch} x {event.length} tokens")

    return watch


def _cut(text: str, stops: Sequence[str]) -> str:
    ends = [text.find(stop) for stop in stops if stop in text]
    return text[: min(ends)] if ends else text


def make_generator(
    model: LanguageModel,
    overflow: Overflow = "error",
    progress: Callable[[str], None] | None = None,
    batch_size: int = 8,
    cuts: Counter[str] | None = None,
) -> Generator:
    """The model as a writer.

    Sampled text depends on the seed and the prompt alone, not on the other prompts of its batch.

    Args:
        model: The model.
        overflow: What becomes of a prompt that fills the context: an error, the loss of its left end, or it is
            skipped; the last two are counted in summaries.
        progress: Told what is being compiled.
        batch_size: Rows of a full batch; programs are compiled for it, and for powers of two below it.
        cuts: Counts under "prompts" those that were cut.
    """
    tokenizer, config = model.tokenizer, model.config
    limit = config.context_length

    def decode(tokens: Sequence[int]) -> str:
        return str(tokenizer.decode(list(tokens), skip_special_tokens=True))

    def generator(prompts: Sequence[str], settings: GenerationSettings) -> list[Completion]:
        texts = [_encode(tokenizer, prompt) for prompt in prompts]
        long = [i for i, text in enumerate(texts) if len(text) >= limit]
        if long and overflow == "error":
            raise M3Error(
                f"a prompt has {len(texts[long[0]])} tokens, but the model's context holds {limit}: "
                "say what becomes of such prompts with --overflow truncate or --overflow skip"
            )
        for i in long:
            texts[i] = _shortened(tokenizer, texts[i], max(limit // 2, limit - settings.max_tokens))
        kept = [i for i in range(len(texts)) if overflow != "skip" or i not in long]
        completions = [Completion("", 0, False, skipped=True) for _ in prompts]
        if not kept:
            return completions
        keys = None
        if settings.temperature:
            root = bits.root_key(settings.seed)
            words = [bits.fold_in_name(root, prompts[i]) for i in kept]
            keys = jax.random.wrap_key_data(jax.numpy.stack(words), impl="threefry2x32")
        written = decoder.generate(
            model.params,
            config,
            [texts[i] for i in kept],
            max_new_tokens=settings.max_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            key=keys,
            stop_token_ids=_stop_tokens(tokenizer, config, settings.stop),
            stop_strings=settings.stop,
            detokenize=decode,
            batch_size=batch_size,
            progress=_watch(progress),
        )
        for i, one in zip(kept, written, strict=True):
            finished = one.finish in ("stop_token", "stop_string")
            text = _cut(decode(one.tokens), settings.stop)
            completions[i] = Completion(text, len(one.tokens), finished, prompt_truncated=i in long)
        if cuts is not None:
            cuts["prompts"] += sum(completion.prompt_truncated for completion in completions)
        return completions

    return generator


def make_scorer(
    model: LanguageModel,
    overflow: Overflow = "truncate",
    progress: Callable[[str], None] | None = None,
    batch_size: int = 8,
    cuts: Counter[str] | None = None,
) -> Scorer:
    """The model as a judge of likelihood.

    Args:
        model: The model.
        overflow: What becomes of a context that leaves no room for its continuation: "error", or "truncate".
        progress: Told what is being compiled.
        batch_size: As of `make_generator`.
        cuts: Counts under "contexts" those that were cut.
    """
    tokenizer = model.tokenizer
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id

    def split(context: str, continuation: str) -> tuple[list[int], list[int]]:
        # A space before a continuation belongs to its first token, so it must not end the context.
        tail = len(context) - len(context.rstrip())
        if tail:
            context, continuation = context[:-tail], context[-tail:] + continuation
        if not context:
            whole = list(tokenizer.encode(continuation, add_special_tokens=False))
            return ([begin], whole) if begin is not None else (whole[:1], whole[1:])
        before, whole = _encode(tokenizer, context), _encode(tokenizer, context + continuation)
        # Where a token spans the cut, the texts part before it.
        shared = next((i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), len(before))
        return whole[:shared], whole[shared:]

    def scorer(pairs: Sequence[tuple[str, str]]) -> list[LogLikelihood]:
        cut = [split(context, continuation) for context, continuation in pairs]
        found = [LogLikelihood(0.0, True) for _ in pairs]  # of nothing, which is certain
        scored = [i for i, (before, after) in enumerate(cut) if before and after]
        scores = decoder.log_likelihoods(
            model.params,
            model.config,
            [cut[i] for i in scored],
            batch_size=batch_size,
            overflow="error" if overflow == "error" else "truncate_left",
            progress=_watch(progress),
        )
        for i, score in zip(scored, scores, strict=True):
            found[i] = LogLikelihood(score.log_prob, score.is_greedy)
        if cuts is not None:
            cuts["contexts"] += sum(score.dropped > 0 for score in scores)
        return found

    return scorer


def harness_model(
    model: LanguageModel, cuts: Counter[str], batch_size: int = 8, progress: Callable[[str], None] | None = None
) -> Any:
    """The model as lm-evaluation-harness wants one; texts that do not fit lose their left end, counted in `cuts`."""
    return make_harness_model(
        make_generator(model, "truncate", progress, batch_size, cuts),
        make_scorer(model, "truncate", progress, batch_size, cuts),
        model.tokenizer,
        max_length=model.config.context_length,
        batch_size=batch_size,
    )


def evaluate(
    params: Any,
    config: DecoderConfig | dict[str, Any],
    tokenizer: Any,
    task: str,
    *,
    data: str | Path | None = None,
    overflow: Overflow = "error",
    **options: Any,
) -> Summary:
    """Evaluate parameters that are in memory, such as a merge that was never written.

    Args:
        params: Arrays under Hugging Face's tensor names (flat or nested), as `m3jax.merge` returns them, or the
            decoder's own parameters; on one device or on a mesh.
        config: The decoder's config, or the content of the model's config.json.
        tokenizer: A transformers tokenizer.
        task: A task's name, as in `m3jax evaluate --task`.
        data: Its data file, a hub data set, or None for the task's own on the hub.
        overflow: What becomes of prompts that fill the context.
        **options: As of `evaluation.evaluate_task`: limit, batch_size, out_dir, run_code, ….

    Raises:
        M3Error: The task, the data or the parameters cannot be used.
    """
    if isinstance(config, dict):
        config = DecoderConfig.from_dict(config)
    _check_vocabulary("tokenizer", tokenizer, config)
    own: Any = jax.tree.structure(decoder.abstract_params(config))
    if jax.tree.structure(params) != own:
        params = decoder.params_from_tree(params, config)
    model = LanguageModel("parameters in memory", params, config, tokenizer)
    if options.get("resume") and not options.get("fingerprint"):
        raise M3Error("resume: needs fingerprint=TEXT that identifies these parameters, so that no other run goes on")
    options.setdefault("tokenizer", tokenizer)
    options.setdefault("model", model.name)
    generator = make_generator(model, overflow, batch_size=options.get("batch_size", 8))
    return evaluate_named(task, data, generator, **options)
