"""lm-evaluation-harness: its tasks, run on a model of ours.

The harness (the extra `eval`) is imported only when one of these functions is called.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

from m3jax.errors import M3Error
from m3jax.evaluation.protocol import GenerationSettings, Generator, Scorer

_DEFAULT_MAX_TOKENS = 256  # the harness's own where a task names none


def make_harness_model(
    generator: Generator, scorer: Scorer, tokenizer: Any, *, max_length: int, batch_size: int = 8
) -> Any:
    """An `lm_eval.api.model.LM` of a model.

    Args:
        generator: The model as a writer.
        scorer: The model as a judge of likelihood; an empty context means the beginning of a text.
        tokenizer: A fast transformers tokenizer, to cut long texts and for chat templates.
        max_length: Most tokens that the model can see.
        batch_size: Prompts, or pairs, given to the model at a time.

    Raises:
        M3Error: The harness is not installed.
    """
    lm_class = _harness_class()

    class HarnessModel(lm_class):  # type: ignore[misc, valid-type]
        """One model of ours, as the harness wants models."""

        def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            pairs = [(str(request.args[0]), str(request.args[1])) for request in requests]
            return _scored(scorer, pairs, batch_size)

        def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
            cut = [_windows(str(request.args[0]), tokenizer, max_length) for request in requests]
            scores = iter(_scored(scorer, [pair for pairs in cut for pair in pairs], batch_size))
            return [sum(next(scores)[0] for _ in pairs) for pairs in cut]

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            return _generated(generator, [(str(request.args[0]), request.args[1]) for request in requests], batch_size)

        def apply_chat_template(
            self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True, **options: Any
        ) -> str:
            return str(
                tokenizer.apply_chat_template(
                    chat_history,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=not add_generation_prompt,
                )
            )

        @property
        def tokenizer_name(self) -> str:
            return str(getattr(tokenizer, "name_or_path", "")).replace("/", "__")

    return HarnessModel()


def run_harness(
    model: Any,
    tasks: Sequence[str],
    *,
    include_path: str | None = None,
    limit: int | None = None,
    shots: int | None = None,
    chat: bool = False,
) -> dict[str, Any]:
    """Run tasks of the harness.

    Args:
        model: From `make_harness_model`.
        tasks: Names of tasks or groups.
        include_path: A directory with further task files.
        limit: The first so many examples of each task only.
        shots: Number of examples shown before each question; each task's own if not given.
        chat: Whether to use the tokenizer's chat template.

    Returns:
        The harness's results: under "results", by task, its metrics and their standard errors.

    Raises:
        M3Error: The harness is not installed, knows no such task, or cannot load it.
    """
    _harness_class()
    import lm_eval  # type: ignore[import-untyped, import-not-found, unused-ignore]
    from lm_eval.tasks import TaskManager  # type: ignore[import-untyped, import-not-found, unused-ignore]

    manager = TaskManager(include_path=include_path)
    unknown = [name for name in tasks if name not in manager.all_tasks]
    if unknown:
        raise M3Error(
            f"lm-evaluation-harness has no task called {', '.join(unknown)}; see `lm_eval ls tasks`, "
            "or give the directory of your own task files"
        )
    with _quiet_tokenizers():
        try:
            results: dict[str, Any] | None = lm_eval.simple_evaluate(
                model=model,
                tasks=list(tasks),
                task_manager=manager,
                limit=limit,
                num_fewshot=shots,
                apply_chat_template=chat,
                log_samples=False,
            )
        except (OSError, FileNotFoundError, ConnectionError, ModuleNotFoundError) as error:
            raise M3Error(f"cannot run the harness tasks {', '.join(tasks)}: {error}") from error
    return results or {}


def _harness_class() -> Any:
    try:
        from lm_eval.api.model import LM  # type: ignore[import-untyped, import-not-found, unused-ignore]
    except ImportError as error:
        raise M3Error("running tasks of lm-evaluation-harness needs it installed: pip install 'm3jax[eval]'") from error
    return LM


@contextlib.contextmanager
def _quiet_tokenizers() -> Iterator[None]:
    """Keep the harness from leaving a setting of its own in the environment."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before


def _scored(scorer: Scorer, pairs: Sequence[tuple[str, str]], batch_size: int) -> list[tuple[float, bool]]:
    """Scores in the order of the pairs; pairs of like length go to the model together."""
    order = sorted(range(len(pairs)), key=lambda place: -len(pairs[place][0] + pairs[place][1]))
    scores: dict[int, tuple[float, bool]] = {}
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        found = scorer([pairs[place] for place in batch])
        scores |= {place: (float(score.sum), bool(score.is_greedy)) for place, score in zip(batch, found, strict=True)}
    return [scores[place] for place in range(len(pairs))]


def _windows(text: str, tokenizer: Any, max_length: int) -> list[tuple[str, str]]:
    """A text as pairs of context and continuation that fit, each token scored once.

    Each window after the first sees the last token of the one before, as in the harness's own models.
    """
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    if len(offsets) < max_length:
        return [("", text)]
    step = max_length - 2  # one place for the context's token, one that a cut may add
    starts = [0, *(offsets[place][0] for place in range(step, len(offsets), step)), len(text)]
    befores = [0, *(offsets[place - 1][0] for place in range(step, len(offsets), step))]
    return [
        (text[before:start], text[start:end]) for before, start, end in zip(befores, starts, starts[1:], strict=False)
    ]


def _settings(wanted: dict[str, Any]) -> GenerationSettings:
    """The harness's keyword arguments in our terms."""
    stop = wanted.get("until") or ()
    sample = bool(wanted.get("do_sample", False))
    return GenerationSettings(
        max_tokens=int(wanted.get("max_gen_toks", _DEFAULT_MAX_TOKENS)),
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        temperature=float(wanted.get("temperature", 1.0)) if sample else 0.0,
        top_p=float(wanted.get("top_p", 1.0)) if sample else 1.0,
    )


def _generated(generator: Generator, requests: Sequence[tuple[str, dict[str, Any]]], batch_size: int) -> list[str]:
    """Texts in the order of the requests; those with the same settings and like length go to the model together."""
    by_settings: dict[GenerationSettings, list[int]] = {}
    for place, (_, wanted) in enumerate(requests):
        by_settings.setdefault(_settings(wanted), []).append(place)
    texts: dict[int, str] = {}
    for settings, places in by_settings.items():
        places.sort(key=lambda place: -len(requests[place][0]))
        for start in range(0, len(places), batch_size):
            batch = places[start : start + batch_size]
            completions = generator([requests[place][0] for place in batch], settings)
            texts |= {place: completion.text for place, completion in zip(batch, completions, strict=True)}
    return [texts[place] for place in range(len(requests))]
