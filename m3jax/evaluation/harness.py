"""lm-evaluation-harness: its tasks, run on a model of ours.

The harness (the extra `eval`) is imported only when one of these functions is called.
"""

import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from m3jax.errors import M3Error
from m3jax.evaluation.chats import chat_text
from m3jax.evaluation.harness_tasks import HarnessTasks, harness_class, load_harness_tasks, said, surroundings
from m3jax.evaluation.protocol import GenerationSettings, Generator, Pair, Scorer
from m3jax.progress import Tell, progress_lines

_T = TypeVar("_T")

_SHOTS_SEED = 1234  # the harness's own
_METHODS = ("loglikelihood", "loglikelihood_rolling", "generate_until")


def make_harness_model(
    generator: Generator,
    scorer: Scorer,
    tokenizer: Any,
    *,
    max_length: int,
    batch_size: int = 8,
    tell: Tell | None = None,
) -> Any:
    """An `lm_eval.api.model.LM` of a model.

    Args:
        generator: The model as a writer.
        scorer: The model as a judge of likelihood.
        tokenizer: A transformers tokenizer, to cut long texts and for chat templates.
        max_length: Most tokens that the model can see.
        batch_size: Prompts, or pairs, given to the model at a time.
        tell: Told in lines how far the work is.

    Raises:
        M3Error: The harness is not installed.
    """
    lm_class = harness_class()

    class HarnessModel(lm_class):  # type: ignore[misc, valid-type]
        """One model of ours, as the harness wants models."""

        def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            pairs: list[Pair] = [(str(request.args[0]), str(request.args[1])) for request in requests]
            return _scored(scorer, pairs, batch_size, tell)

        def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
            parts = [_windows(str(request.args[0]), tokenizer, max_length) for request in requests]
            scores = iter(_scored(scorer, [pair for pairs in parts for pair in pairs], batch_size, tell))
            return [sum(next(scores)[0] for _ in pairs) for pairs in parts]

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            wanted = [(str(request.args[0]), _settings(request.args[1])) for request in requests]
            return _generated(generator, _drawn(wanted), batch_size, tell)

        def apply_chat_template(
            self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True, **options: Any
        ) -> str:
            return chat_text(
                tokenizer,
                chat_history,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )

        @property
        def tokenizer_name(self) -> str:
            return str(getattr(tokenizer, "name_or_path", "")).replace("/", "__")

    return HarnessModel()


def run_harness(
    model: Any,
    tasks: Sequence[str] | HarnessTasks,
    *,
    include_path: str | None = None,
    limit: int | None = None,
    shots: int | None = None,
    chat: bool = False,
    tell: Tell | None = None,
) -> dict[str, Any]:
    """Run tasks of the harness.

    Args:
        model: From `make_harness_model`.
        tasks: Names of tasks, groups or tags, or what `load_harness_tasks` made of them.
        include_path: A directory with further task files.
        limit: The first so many examples of each task only.
        shots: Number of examples shown before each question; each task's own if not given.
        chat: Whether to use the tokenizer's chat template.
        tell: Told what is loaded; progress bars are shown only with it.

    Returns:
        The harness's results: under "results", by task, its metrics and their standard errors.

    Raises:
        M3Error: The harness is not installed, knows no such task, or fails at it.
    """
    found = tasks if isinstance(tasks, HarnessTasks) else load_harness_tasks(tasks, include_path, tell)
    from lm_eval.evaluator import evaluate  # type: ignore[import-untyped, import-not-found, unused-ignore]

    with surroundings(tell) as complaints:
        try:
            for task in found.loaded["tasks"].values():
                _show(task, shots)
            results: dict[str, Any] | None = evaluate(
                lm=model,
                task_dict=found.loaded,
                limit=limit,
                apply_chat_template=chat,
                fewshot_as_multiturn=True,
                log_samples=False,
            )
        except M3Error:
            raise
        except Exception as error:  # tasks are programs of many authors
            if _in_model(error):
                raise
            raise M3Error(
                f"lm-evaluation-harness fails at {', '.join(found.names)}: {said(error, complaints)}; leave the task "
                "out, or see where with --debug"
            ) from error
    return results or {}


def _show(task: Any, shots: int | None) -> None:
    """Set how many examples a task shows, as the harness does: a task that wants none keeps to it."""
    own = task.get_config("num_fewshot")
    if own != 0 and (shots is not None or own is None):
        task.set_config(key="num_fewshot", value=shots or 0)
    task.set_fewshot_seed(seed=_SHOTS_SEED)


def _in_model(error: BaseException) -> bool:
    """Whether an error comes from the model, and not from the harness."""
    frames = traceback.extract_tb(error.__traceback__)
    return any(frame.filename == __file__ and frame.name in _METHODS for frame in frames)


# --- Asking the model --------------------------------------------------------------------------------------------


def _windows(text: str, tokenizer: Any, max_length: int) -> list[Pair]:
    """A text as pairs of context and continuation that fit, each token scored once, cut as the harness cuts."""
    from lm_eval.utils import (  # type: ignore[import-untyped, import-not-found, unused-ignore]
        get_rolling_token_windows,
        make_disjoint_window,
    )

    from m3jax.decoder import encode
    from m3jax.evaluation.tokens import first_token

    ids, begin = encode(tokenizer, text), first_token(tokenizer)
    if begin is None:  # the first token stands for what is before it
        begin, ids = (ids[0], ids[1:]) if ids else (0, [])
    windows = get_rolling_token_windows(token_list=ids, prefix_token=begin, max_seq_len=max_length, context_len=1)
    return [make_disjoint_window(window) for window in windows]


def _settings(wanted: dict[str, Any]) -> GenerationSettings:
    """The harness's keyword arguments in our terms."""
    from lm_eval.models.utils import (  # type: ignore[import-untyped, import-not-found, unused-ignore]
        normalize_gen_kwargs,
    )

    given: dict[str, Any] = {**normalize_gen_kwargs(wanted)}
    sample = bool(given.get("do_sample"))
    return GenerationSettings(
        max_tokens=given["max_gen_toks"],
        stop=tuple(str(stop) for stop in given["until"] if stop),
        temperature=float(given.get("temperature", 1.0)) if sample else 0.0,
        top_p=float(given.get("top_p", 1.0)) if sample else 1.0,
    )


def _drawn(requests: Sequence[tuple[str, GenerationSettings]]) -> list[tuple[str, GenerationSettings]]:
    """The requests, with those that recur numbered, so that each gets a sample of its own."""
    seen: Counter[tuple[str, GenerationSettings]] = Counter()
    numbered = []
    for request in requests:
        text, settings = request
        numbered.append((text, settings._replace(draw=seen[request]) if settings.temperature else settings))
        seen[request] += 1
    return numbered


def _scored(scorer: Scorer, pairs: Sequence[Pair], batch_size: int, tell: Tell | None) -> list[tuple[float, bool]]:
    """Scores in the order of the pairs."""

    def run(places: Sequence[int]) -> list[tuple[float, bool]]:
        found = scorer([pairs[place] for place in places])
        return [(float(score.sum), bool(score.is_greedy)) for score in found]

    lengths = [len(before) + len(after) for before, after in pairs]
    return _in_batches(run, [list(range(len(pairs)))], lengths, batch_size, progress_lines(tell, "texts scored"))


def _generated(
    generator: Generator, requests: Sequence[tuple[str, GenerationSettings]], batch_size: int, tell: Tell | None
) -> list[str]:
    """Texts in the order of the requests; only those with the same settings go to the model together."""
    groups: dict[GenerationSettings, list[int]] = {}
    for place, (_, settings) in enumerate(requests):
        groups.setdefault(settings, []).append(place)

    def run(places: Sequence[int]) -> list[str]:
        return [one.text for one in generator([requests[place][0] for place in places], requests[places[0]][1])]

    lengths = [len(text) for text, _ in requests]
    return _in_batches(run, groups.values(), lengths, batch_size, progress_lines(tell, "texts written"))


def _in_batches(
    run: Callable[[Sequence[int]], Sequence[_T]],
    groups: Any,
    lengths: Sequence[int],
    batch_size: int,
    progress: Callable[[int, int], None] | None,
) -> list[_T]:
    """What `run` gives for each place, in their order; those of a group and of like length run together."""
    found: dict[int, _T] = {}
    report = progress or (lambda done, total: None)
    report(0, len(lengths))
    for group in groups:
        order = sorted(group, key=lambda place: -lengths[place])
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            found |= zip(batch, run(batch), strict=True)
            report(len(found), len(lengths))
    return [found[place] for place in range(len(lengths))]
