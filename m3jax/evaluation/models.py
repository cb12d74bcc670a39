"""From a decoder and a tokenizer to what evaluation asks for: text that continues prompts, and log-likelihoods."""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax

from m3jax import decoder
from m3jax.anatomy import anatomy_of
from m3jax.anatomy.libraries import HUGGINGFACE, WantedLayout, library_of, seen_as
from m3jax.anatomy.stored import Home, find_home, step_metadata
from m3jax.arithmetic import threefry
from m3jax.checkpoints import (
    Checkpoint,
    ModelDirectory,
    adapters,
    companions,
    digest_checkpoint,
    digest_tensor,
    locate_model,
)
from m3jax.checkpoints.locate import CONFIG
from m3jax.checkpoints.orbax_tree import is_orbax
from m3jax.checkpoints.protocol import DTYPES, FileFingerprint, check_unchanged
from m3jax.checkpoints.trust import remarks
from m3jax.cluster.meshes import parse_mesh
from m3jax.decoder import ApplyFn, DecoderConfig
from m3jax.errors import M3Error
from m3jax.evaluation import tokens
from m3jax.evaluation.checks import check_choice
from m3jax.evaluation.harness import make_harness_model
from m3jax.evaluation.protocol import (
    OVERFLOWS,
    Completion,
    GenerationSettings,
    Generator,
    LogLikelihood,
    Overflow,
    Pair,
    Scorer,
)
from m3jax.evaluation.records import Reply, RunJournal, digest
from m3jax.evaluation.runner import Summary, evaluate_named
from m3jax.progress import Tell, progress_lines
from m3jax.text import size_text

_AGAIN = "evaluated: evaluate"


class LanguageModel(NamedTuple):
    """A model that can be evaluated.

    Attributes:
        name: What it is called in summaries.
        params: The decoder's parameters, on one device or a mesh, or what `apply_fn` takes.
        config: The decoder; None where only `apply_fn` knows, and then no text is too long.
        tokenizer: A transformers tokenizer.
        apply_fn: A function to run in place of the decoder, as `decoder.generate` takes it.
    """

    name: str
    params: Any
    config: DecoderConfig | None
    tokenizer: Any
    apply_fn: ApplyFn | None = None


class StoredModel(NamedTuple):
    """A model directory that was looked into, but whose weights are not loaded.

    Attributes:
        name: What it is called in summaries.
        place: The directory, and that of its adapter.
        home: Where its configuration is.
        config: The decoder.
        tokenizer: A transformers tokenizer.
        dtype: Of the parameters, once they are loaded; each keeps its own if None.
        mesh: Where they will lie.
        weight_bytes: Size of the weights on disk.
        notes: What is worth knowing of it.
        seen: What tells its weight files from others, as they were when it was looked into.
    """

    name: str
    place: ModelDirectory
    home: Home
    config: DecoderConfig
    tokenizer: Any
    dtype: str | None
    mesh: jax.sharding.Mesh | None
    weight_bytes: int
    notes: tuple[str, ...]
    seen: dict[str, FileFingerprint]

    def load(self, tell: Tell | None = None) -> LanguageModel:
        """Loads the weights.

        Args:
            tell: Told what is loaded, and what is worth knowing of it.

        Raises:
            M3Error: They are incomplete, do not fit the config, or are not those that were looked into.
        """
        if tell is not None:
            for note in self.notes:
                tell(f"note: {note}")
            tell(f"loading {self.name} ({size_text(self.weight_bytes)})")
        with _open_weights(self.place, self.home) as (checkpoint, _):
            params = decoder.load_params(checkpoint, self.config, self.dtype, self.mesh)
            check_unchanged(checkpoint, self.seen, _AGAIN)
        return LanguageModel(self.name, params, self.config, self.tokenizer)

    def check_unchanged(self) -> None:
        """Raise M3Error if the weights are not those that were looked into."""
        with _open_weights(self.place, self.home) as (checkpoint, _):
            check_unchanged(checkpoint, self.seen, _AGAIN)

    def fingerprint(self, overflow: Overflow) -> str:
        """Digest of what a run depends on beside the model's name; reads all weights.

        Args:
            overflow: What becomes of prompts that leave no room for their answer.

        Raises:
            M3Error: The weights are not those that were looked into.
        """
        with _open_weights(self.place, self.home) as (checkpoint, _):
            infos = checkpoint.tensors.items()
            weights = digest_checkpoint({n: (i.dtype, i.shape, digest_tensor(checkpoint, n)) for n, i in infos})
            check_unchanged(checkpoint, self.seen, _AGAIN)
            dtypes = [self.dtype] if self.dtype else sorted({str(DTYPES[info.dtype]) for _, info in infos})
        stops = tokens.stop_tokens(self.tokenizer, self.config, ())
        beside = tokens.file_digests(self.home.directory)
        return digest([weights, dtypes, overflow, stops, beside, str(self.config)])[:16]


@contextmanager
def _open_weights(place: ModelDirectory, home: Home) -> Iterator[tuple[Checkpoint, tuple[str, ...]]]:
    """The weights of a model under Hugging Face's names, whatever library stored them, and notes on how they are read.

    Where a layout multiplies entries, they are rounded once, as that library's own conversion does.
    """
    with adapters.open_model(place) as checkpoint:
        metadata = {**checkpoint.metadata, **step_metadata(place.path)}
        own = library_of(anatomy_of(checkpoint.tensors, home.config, metadata))
        if own in (None, HUGGINGFACE):
            yield checkpoint, ()
            return
        seen = seen_as(checkpoint, WantedLayout(HUGGINGFACE), home.config, metadata, place.name, rounded=True)
        yield seen.checkpoint, (f"{place.name}: its names and layout are {own}'s", *seen.notes)


def open_model(
    name: str,
    dtype: str | None = None,
    mesh: jax.sharding.Mesh | None = None,
    config: str | os.PathLike[str] | None = None,
) -> StoredModel:
    """Looks into a model directory or hub id: everything but the weights themselves.

    Args:
        name: As `locate_model` takes it; with an adapter, config and tokenizer are those of the base.
        dtype: Of the parameters; each keeps its own if None.
        mesh: Where to put them, see `decoder.load_params`.
        config: Its config.json, or the directory that has it and a tokenizer, where they are not beside its weights.

    Raises:
        M3Error: It is absent, of an unknown architecture, lacks weights or a tokenizer, or has files that are not its
            own; see `check_companion`.
    """
    place = locate_model(name)
    adapters.check_no_adapter(place)
    if not place.path.is_dir():
        raise M3Error(f"{name}: is a weight file without config and tokenizer: give the model's directory")
    companions(place.path)  # before any of them is opened
    home = find_home(place.path, None if config is None else Path(config))
    if home.file is None and is_orbax(place.path):
        raise M3Error(
            f"{name}: there is no config.json beside its weights or above its steps: give Hugging Face's of this model,"
            " and its tokenizer beside it, by --config"
        )
    if home.file is not None and home.file.name != CONFIG:
        own_config = DecoderConfig.from_dict(home.config or {}, str(home.file))
    else:
        own_config = DecoderConfig.from_directory(home.directory)
    tokenizer = tokens.load_tokenizer(name, home.directory)
    note = decoder.check_vocabulary(name, tokenizer, own_config)
    with _open_weights(place, home) as (checkpoint, said):
        size, seen = sum(info.nbytes for info in checkpoint.tensors.values()), checkpoint.fingerprint()
        own = (each for each in (note, adapters.tokenizer_note(place)) if each is not None)
        notes = (*said, *own, *remarks(name, place.path, checkpoint))
    return StoredModel(name, place, home, own_config, tokenizer, dtype, mesh, size, notes, seen)


def load_model(
    name: str,
    dtype: str | None = None,
    mesh: jax.sharding.Mesh | None = None,
    config: str | os.PathLike[str] | None = None,
) -> LanguageModel:
    """Reads a model directory or hub id.

    Args:
        name: As `locate_model` takes it.
        dtype: Of the parameters; each keeps its own if None.
        mesh: Where to put them, see `decoder.load_params`.
        config: As for `open_model`.

    Raises:
        M3Error: It is absent, of an unknown architecture, incomplete, or has no tokenizer.
    """
    return open_model(name, dtype, mesh, config).load()


def make_mesh(axes: str | None) -> jax.sharding.Mesh | None:
    """A mesh from text such as "fsdp=4,tp=2", the axes over which the decoder is sharded; None from None.

    Raises:
        M3Error: The text is no list of the axes fsdp and tp, or there are not as many devices.
    """
    return parse_mesh(axes, names=("fsdp", "tp")) if axes else None


def _compile_lines(tell: Tell | None) -> Callable[[decoder.DecoderProgress], None] | None:
    """What a decoder reports, as lines about what it compiles; nothing without someone to tell."""
    if tell is None:
        return None
    say = tell

    def watch(event: decoder.DecoderProgress) -> None:
        if event.event == "compile":
            say(f"compiling {event.stage} for {event.batch} x {event.length} tokens")

    return watch


def make_generator(
    model: LanguageModel,
    overflow: Overflow = "error",
    tell: Tell | None = None,
    batch_size: int = 8,
    share: bool = True,
) -> Generator:
    """The model as a writer.

    Sampled text depends on the seed, the draw and the prompt, and on the other prompts of its batch by rounding alone.

    Args:
        model: The model.
        overflow: What becomes of a prompt that leaves no room for its answer: an error, the loss of its left end, or
            it is skipped; the last two are counted in summaries.
        tell: Told what is being compiled.
        batch_size: Rows of a full batch; programs are compiled for it, and for powers of two below it.
        share: Read once what neighbouring prompts begin with, as shots, or the words of a template, are.
    """
    tokenizer, config = model.tokenizer, model.config
    decode = decoder.detokenizer(tokenizer)

    def generator(prompts: Sequence[str], settings: GenerationSettings) -> list[Completion]:
        texts = [decoder.encode(tokenizer, prompt) for prompt in prompts]
        long = _fit(tokenizer, texts, config, settings.max_tokens, overflow)
        kept = [i for i in range(len(texts)) if overflow != "skip" or i not in long]
        completions = [Completion("", 0, False, skipped=True) for _ in prompts]
        if not kept:
            return completions
        written = decoder.generate(
            model.params,
            config,
            [texts[i] for i in kept],
            max_new_tokens=settings.max_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            key=_keys([prompts[i] for i in kept], settings),
            stop_token_ids=tokens.stop_tokens(tokenizer, config, settings.stop),
            stop_strings=settings.stop,
            detokenize=decode,
            batch_size=batch_size,
            share=share,
            progress=_compile_lines(tell),
            apply_fn=model.apply_fn,
        )
        for i, one in zip(kept, written, strict=True):
            finished = one.finish in ("stop_token", "stop_string")
            text = tokens.cut(decode(one.tokens), settings.stop)
            completions[i] = Completion(text, len(one.tokens), finished, prompt_truncated=i in long)
        return completions

    return generator


def check_prompts(
    stored: StoredModel, prompts: Sequence[str], settings: GenerationSettings, overflow: Overflow
) -> None:
    """Raise M3Error for a prompt that `make_generator` would refuse, before weights are loaded.

    Args:
        stored: The model.
        prompts: Its prompts.
        settings: How it will generate.
        overflow: As of `make_generator`.
    """
    if overflow == "error":
        texts = [decoder.encode(stored.tokenizer, prompt) for prompt in prompts]
        _fit(stored.tokenizer, texts, stored.config, settings.max_tokens, overflow)


def _fit(
    tokenizer: Any, texts: list[list[int]], config: DecoderConfig | None, max_tokens: int, overflow: Overflow
) -> set[int]:
    """Shortens the prompts that leave no room for an answer; returns which they are."""
    if config is None:
        return set()
    limit = config.context_length
    room = decoder.prompt_room(limit, max_tokens)
    long = [i for i, text in enumerate(texts) if len(text) > room]
    if long and overflow == "error":
        raise M3Error(
            f"a prompt has {len(texts[long[0]])} tokens, which with an answer of {max_tokens} do not fit where the "
            f"model sees {limit}: take a smaller --max-tokens, or say what becomes of such prompts with "
            "--overflow truncate or --overflow skip"
        )
    for i in long:
        texts[i] = tokens.shorten(tokenizer, texts[i], room)
    return set(long)


def _keys(prompts: Sequence[str], settings: GenerationSettings) -> jax.Array | None:
    """The key of each prompt's sample; none where nothing is drawn."""
    if not settings.temperature:
        return None
    root = threefry.root_key(settings.seed)
    words = jax.numpy.stack([threefry.fold_in_name(root, prompt) for prompt in prompts])
    return jax.vmap(jax.random.fold_in, (0, None))(jax.random.wrap_key_data(words, impl="threefry2x32"), settings.draw)


def deferred(make: Callable[[], Generator]) -> Generator:
    """A writer that is made when it is first asked, so that what needs no weights can fail before they are loaded.

    Args:
        make: Makes it.
    """
    made: list[Generator] = []

    def generator(prompts: Sequence[str], settings: GenerationSettings) -> Sequence[Completion]:
        if not made:
            made.append(make())
        return made[0](prompts, settings)

    return generator


def make_scorer(
    model: LanguageModel,
    overflow: Overflow = "truncate",
    tell: Tell | None = None,
    batch_size: int = 8,
    share: bool = True,
) -> Scorer:
    """The model as a judge of likelihood, of texts cut as lm-evaluation-harness cuts them.

    Args:
        model: The model.
        overflow: What becomes of a context that leaves no room for its continuation: "error", or "truncate".
        tell: Told what is being compiled.
        batch_size: As of `make_generator`.
        share: As of `make_generator`; what several continuations of one context have is read once.
    """

    def split(pair: Pair) -> tuple[Sequence[int], Sequence[int]]:
        before, after = pair
        if isinstance(before, str) and isinstance(after, str):
            return tokens.split_as_harness(model.tokenizer, before, after)
        return [int(token) for token in before], [int(token) for token in after]

    def scorer(pairs: Sequence[Pair]) -> list[LogLikelihood]:
        parts = [split(pair) for pair in pairs]
        found = [LogLikelihood(0.0, True) for _ in pairs]  # of nothing, which is certain
        scored = [i for i, (before, after) in enumerate(parts) if before and after]
        scores = decoder.log_likelihoods(
            model.params,
            model.config,
            [parts[i] for i in scored],
            batch_size=batch_size,
            overflow="error" if overflow == "error" else "truncate_left",
            share=share,
            progress=_compile_lines(tell),
            apply_fn=model.apply_fn,
        )
        for i, score in zip(scored, scores, strict=True):
            found[i] = LogLikelihood(score.log_prob, score.is_greedy, score.dropped > 0)
        return found

    return scorer


def harness_model(
    model: LanguageModel,
    cuts: Counter[str],
    batch_size: int = 8,
    tell: Tell | None = None,
    journal: RunJournal[Reply] | None = None,
) -> Any:
    """The model as lm-evaluation-harness wants one; texts that do not fit lose their left end, counted in `cuts`.

    Args:
        model: A model with a config.
        cuts: Counts the "prompts" and "contexts" that were cut.
        batch_size: As of `make_generator`.
        tell: Told what is compiled and how far the work is.
        journal: Holds what is done already, and is given what gets done.
    """
    assert model.config is not None
    return make_harness_model(
        make_generator(model, "truncate", tell, batch_size),
        make_scorer(model, "truncate", tell, batch_size),
        model.tokenizer,
        max_length=model.config.context_length,
        batch_size=batch_size,
        tell=tell,
        cuts=cuts,
        journal=journal,
    )


def evaluate(
    params: Any,
    config: DecoderConfig | dict[str, Any] | None,
    tokenizer: Any,
    task: str,
    *,
    data: str | Path | None = None,
    apply_fn: ApplyFn | None = None,
    overflow: Overflow = "error",
    tell: Tell | None = None,
    **options: Any,
) -> Summary:
    """Evaluate parameters that are in memory, such as a merge that was never written.

    Args:
        params: Arrays under Hugging Face's tensor names (flat or nested), as `m3jax.merge` returns them, or the
            decoder's own parameters; on one device or on a mesh. With an `apply_fn`, whatever that takes.
        config: The decoder's config, or the content of the model's config.json. With an `apply_fn` it may be None,
            and then no prompt is too long and only the tokenizer's end-of-text token ends an answer.
        tokenizer: A transformers tokenizer.
        task: A task's name, as in `m3jax evaluate --task`.
        data: Its data file, a hub data set, or None for the task's own on the hub.
        apply_fn: A model of your own, run in place of the decoder: `apply_fn(params, tokens, lengths)` with int32
            tokens [batch, length], padded on the right, and int32 lengths [batch] gives logits [batch, length, vocab]
            of the token behind each position. It is traced by jit and compiled once per function object and shape.
        overflow: What becomes of prompts that leave no room for their answer: "error", "truncate" or "skip".
        tell: Told in lines what is compiled and how far the run is, such as `print`; nothing is printed without it.
        **options: As of `evaluation.evaluate_named` and `evaluate_task`: max_tokens, template, limit, batch_size,
            out_dir, run_code, ….

    Raises:
        M3Error: The task, the data, an option or the parameters cannot be used.
    """
    check_choice("overflow", overflow, OVERFLOWS)
    if options.get("resume") and not options.get("fingerprint"):
        raise M3Error("resume: needs fingerprint=TEXT that identifies these parameters, so that no other run goes on")
    options.setdefault("tokenizer", tokenizer)
    options.setdefault("model", "parameters in memory")
    options.setdefault("progress", progress_lines(tell))
    load = in_memory(params, config, tokenizer, apply_fn, options["model"], tell)
    generator = deferred(lambda: make_generator(load(), overflow, tell, options.get("batch_size", 8)))
    return evaluate_named(task, data, generator, **options)


def in_memory(
    params: Any,
    config: DecoderConfig | dict[str, Any] | None,
    tokenizer: Any,
    apply_fn: ApplyFn | None,
    name: str,
    tell: Tell | None = None,
) -> Callable[[], LanguageModel]:
    """Checks what is given of a model in memory.

    Args:
        params: As of `evaluate`.
        config: As of `evaluate`.
        tokenizer: As of `evaluate`.
        apply_fn: As of `evaluate`.
        name: What it is called in summaries.
        tell: Told what is worth knowing of it.

    Returns:
        A function that gives the model; only then are its parameters looked into.

    Raises:
        M3Error: There is neither a config nor an `apply_fn`, or the tokenizer does not fit the config.
    """
    known = DecoderConfig.from_dict(config) if isinstance(config, dict) else config
    if known is None and apply_fn is None:
        raise M3Error("config is None: give the content of the model's config.json, or an apply_fn to run instead")
    note = None if known is None else decoder.check_vocabulary("tokenizer", tokenizer, known)
    if note is not None and tell is not None:
        tell(f"note: {note}")

    def load() -> LanguageModel:
        own = params if known is None or apply_fn is not None else _own_params(params, known)
        return LanguageModel(name, own, known, tokenizer, apply_fn)

    return load


def _own_params(params: Any, config: DecoderConfig) -> Any:
    """The decoder's parameters, from those or from arrays under Hugging Face's names."""
    own: Any = jax.tree.structure(decoder.abstract_params(config))
    return params if jax.tree.structure(params) == own else decoder.params_from_tree(params, config)
