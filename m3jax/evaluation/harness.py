"""lm-evaluation-harness: its tasks, run on a model of ours.

The harness (the extra `eval`) is imported only when one of these functions is called.
"""

import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from m3jax.errors import M3Error
from m3jax.evaluation.chats import chat_text
from m3jax.evaluation.checks import check_whole
from m3jax.evaluation.harness_tasks import HarnessTasks, harness_class, load_harness_tasks, said, surroundings
from m3jax.evaluation.prompts import has_chat_template
from m3jax.evaluation.protocol import GenerationSettings, Generator, Pair, Scorer
from m3jax.evaluation.records import Reply, RunJournal, digest
from m3jax.progress import Tell, progress_lines

_SHOTS_SEED = 1234  # the harness's own
_METHODS = ("loglikelihood", "loglikelihood_rolling", "generate_until")


class Showing(NamedTuple):
    """How the harness shows its examples to a model.

    Attributes:
        shots: Number of examples shown before each question; each task's own if None.
        chat: Whether the tokenizer's chat template is used.
        system: What the model is told first, as a system message or, without a chat template, before the text.
        multiturn: Whether, in a chat, the examples shown are turns of their own.
    """

    shots: int | None = None
    chat: bool = False
    system: str | None = None
    multiturn: bool = True


def make_harness_model(
    generator: Generator,
    scorer: Scorer,
    tokenizer: Any,
    *,
    max_length: int,
    batch_size: int = 8,
    tell: Tell | None = None,
    cuts: Counter[str] | None = None,
    journal: RunJournal[Reply] | None = None,
) -> Any:
    """An `lm_eval.api.model.LM` of a model.

    Args:
        generator: The model as a writer.
        scorer: The model as a judge of likelihood.
        tokenizer: A transformers tokenizer, to cut long texts and for chat templates.
        max_length: Most tokens that the model can see.
        batch_size: Prompts, or pairs, given to the model at a time.
        tell: Told in lines how far the work is.
        cuts: Counts the "prompts" and "contexts" that did not fit and were cut.
        journal: Holds what is done already, and is given what gets done.

    Raises:
        M3Error: The harness is not installed.
    """
    lm_class = harness_class()
    asking = _Asking(batch_size, tell, Counter() if cuts is None else cuts, journal)
    note = _once(tell)

    class HarnessModel(lm_class):  # type: ignore[misc, valid-type]
        """One model of ours, as the harness wants models."""

        def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            pairs: list[Pair] = [(str(request.args[0]), str(request.args[1])) for request in requests]
            return _scored(scorer, pairs, asking)

        def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
            parts = [_windows(str(request.args[0]), tokenizer, max_length) for request in requests]
            scores = iter(_scored(scorer, [pair for pairs in parts for pair in pairs], asking))
            return [sum(next(scores)[0] for _ in pairs) for pairs in parts]

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            wanted = [(str(request.args[0]), _settings(request.args[1])) for request in requests]
            return _generated(generator, _drawn(wanted), asking)

        def apply_chat_template(
            self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True, **options: Any
        ) -> str:
            return _chat(tokenizer, chat_history, add_generation_prompt, note)

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
    showing: Showing | None = None,
    tell: Tell | None = None,
) -> dict[str, Any]:
    """Run tasks of the harness.

    Args:
        model: From `make_harness_model`.
        tasks: As of `load_harness_tasks`, or what it made of them.
        include_path: A directory with further task files.
        limit: The first so many examples of each task only.
        showing: How examples are shown.
        tell: Told what is loaded; progress bars are shown only with it.

    Returns:
        The harness's results: under "results", by task, its metrics and their standard errors.

    Raises:
        M3Error: The harness is not installed, knows no such task, or fails at it.
    """
    found = tasks if isinstance(tasks, HarnessTasks) else load_harness_tasks(tasks, include_path, tell)
    showing = showing or Showing()
    check_showing(showing)
    from lm_eval.evaluator import evaluate  # type: ignore[import-untyped, import-not-found, unused-ignore]

    with surroundings(tell) as complaints:
        try:
            for name, task in found.loaded["tasks"].items():
                _show(name, task, showing.shots, tell)
            results: dict[str, Any] | None = evaluate(
                lm=model,
                task_dict=found.loaded,
                limit=limit,
                system_instruction=showing.system,
                apply_chat_template=showing.chat,
                fewshot_as_multiturn=showing.chat and showing.multiturn,
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


def check_showing(showing: Showing) -> None:
    """Raise M3Error for a number of examples that cannot be shown."""
    if showing.shots is not None:
        check_whole("--num-fewshot", showing.shots)
        if showing.shots < 0:
            raise M3Error(f"--num-fewshot is {showing.shots}, but must be at least 0")


def check_chat(tokenizer: Any) -> None:
    """Raise M3Error where a tokenizer has no chat template."""
    if not has_chat_template(tokenizer):
        raise M3Error("this model's tokenizer has no chat template: leave --apply-chat-template out")


def _show(name: str, task: Any, shots: int | None, tell: Tell | None) -> None:
    """Set how many examples a task shows, as the harness does: a task that wants none keeps to it."""
    own = task.get_config("num_fewshot")
    if own != 0 and (shots is not None or own is None):
        task.set_config(key="num_fewshot", value=shots or 0)
    elif shots and tell is not None:
        tell(f"note: the task {name} shows no examples, whatever --num-fewshot says")
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


def _once(tell: Tell | None) -> Tell:
    """Tells each line one time, however often it is said."""
    told: set[str] = set()

    def note(line: str) -> None:
        if tell is not None and line not in told:
            tell(line)
        told.add(line)

    return note


def _chat(tokenizer: Any, history: list[dict[str, str]], opens_answer: bool, note: Tell) -> str:
    """A conversation in the tokenizer's words; as the harness does, without a system message that is refused."""
    from jinja2.exceptions import TemplateError

    def written(turns: list[dict[str, str]]) -> str:
        return chat_text(tokenizer, turns, add_generation_prompt=opens_answer, continue_final_message=not opens_answer)

    check_chat(tokenizer)
    try:
        return written(history)
    except M3Error as error:
        turns = [turn for turn in history if turn["role"] != "system"]
        if len(turns) == len(history) or not isinstance(error.__cause__, TemplateError):
            raise
        note("note: the tokenizer's chat template takes no system message, which is left out")
        return written(turns)


class _Asking(NamedTuple):
    """How requests are put to a model.

    Attributes:
        batch_size: So many at a time.
        tell: Told how far the work is.
        cuts: Counts what did not fit and was cut.
        journal: Holds what is done already, and is given what gets done.
    """

    batch_size: int
    tell: Tell | None
    cuts: Counter[str]
    journal: RunJournal[Reply] | None


def _scored(scorer: Scorer, pairs: Sequence[Pair], asking: _Asking) -> list[tuple[float, bool]]:
    """Scores in the order of the pairs."""

    def run(places: Sequence[int]) -> list[tuple[Any, bool]]:
        found = scorer([pairs[place] for place in places])
        return [((float(score.sum), bool(score.is_greedy)), score.cut) for score in found]

    lengths = [len(before) + len(after) for before, after in pairs]
    replies = _in_batches(run, pairs, [range(len(pairs))], lengths, asking, "texts scored")
    asking.cuts["contexts"] += sum(reply.cut for reply in replies)
    return [(total, is_greedy) for total, is_greedy in (reply.answer for reply in replies)]


def _generated(generator: Generator, requests: Sequence[tuple[str, GenerationSettings]], asking: _Asking) -> list[str]:
    """Texts in the order of the requests; only those with the same settings go to the model together."""
    groups: dict[GenerationSettings, list[int]] = {}
    for place, (_, settings) in enumerate(requests):
        groups.setdefault(settings, []).append(place)

    def run(places: Sequence[int]) -> list[tuple[Any, bool]]:
        written = generator([requests[place][0] for place in places], requests[places[0]][1])
        return [(one.text, one.prompt_truncated) for one in written]

    lengths = [len(text) for text, _ in requests]
    replies = _in_batches(run, requests, groups.values(), lengths, asking, "texts written")
    asking.cuts["prompts"] += sum(reply.cut for reply in replies)
    return [reply.answer for reply in replies]


def _in_batches(
    run: Callable[[Sequence[int]], Sequence[tuple[Any, bool]]],
    requests: Sequence[Any],
    groups: Iterable[Sequence[int]],
    lengths: Sequence[int],
    asking: _Asking,
    what: str,
) -> list[Reply]:
    """A reply for each request, in their order; those of a group and of like length run together.

    Args:
        run: Gives answers, and whether the request was cut, for places among the requests.
        requests: What is asked, as JSON data.
        groups: Places of the requests that may run together.
        lengths: How long each request is.
        asking: How they are put.
        what: What progress counts.
    """
    names = [digest([what, request]) if asking.journal else "" for request in requests]
    known = asking.journal.done if asking.journal else {}
    found = {place: known[name] for place, name in enumerate(names) if name in known}
    report = progress_lines(asking.tell, what) or (lambda done, total: None)
    report(len(found), len(requests))
    for group in groups:
        order = sorted((place for place in group if place not in found), key=lambda place: -lengths[place])
        for start in range(0, len(order), asking.batch_size):
            batch = order[start : start + asking.batch_size]
            replies = [Reply(names[place], *gave) for place, gave in zip(batch, run(batch), strict=True)]
            if asking.journal:
                asking.journal.add(replies)
            found |= zip(batch, replies, strict=True)
            report(len(found), len(requests))
    return [found[place] for place in range(len(requests))]
