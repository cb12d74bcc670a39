"""A recipe to start from, with a comment to each line."""

from collections.abc import Iterator

from m3jax.errors import M3Error
from m3jax.methods.rows import MethodRow, Parameter
from m3jax.recipe.settings import RecipeError
from m3jax.recipe.values import read_method

_COLUMN = 40  # where comments begin


def new_recipe(method: str) -> str:
    """A recipe of a method, in YAML with comments; it can be read as it is, once its models are there.

    Args:
      method: its name.

    Raises:
      M3Error: there is no such method.

    Example:
      >>> print(new_recipe("linear").splitlines()[0])
      # linear: weighted average of parameters; with mixup, M³
    """
    try:
        row = read_method(method)
    except RecipeError as fault:
        raise M3Error(f"METHOD: {fault}") from None
    lines = [f"# {row.name}: {row.summary}", f"#   {row.formula}", f"# {row.paper}", "#"]
    lines += ["# m3jax recipe check FILE           reads it"]
    lines += ["# m3jax merge FILE OUT --explain    says what it would do"]
    return "\n".join([*lines, "", *_body(row)]) + "\n"


def _body(row: MethodRow) -> Iterator[str]:
    yield f"merge_method: {row.name}"
    if row.base == "task_vectors":
        yield _line("base_model: org/base", "what the experts were trained from: a directory, or a hub id (@revision)")
    yield "models:"
    fewest, most = row.experts
    count = max(fewest, 2) if most is None else min(max(fewest, 2), most)
    own = next((parameter for parameter in row.parameters if parameter.level == "expert"), None)
    for number in range(count):
        yield f"  - model: org/expert-{chr(ord('a') + number)}"
        if row.statistics:
            measured = "what m3jax statistics has measured of it" if number == 0 else "and of this one"
            yield _line(f"    statistics: org/expert-{chr(ord('a') + number)}-{row.statistics}", measured)
        if own is not None and number == 0:
            yield _line(f"    # parameters: {{{own.name}: {_value(own)}}}", "for this model alone")
    parameters = [parameter for parameter in row.parameters if not parameter.only]
    if parameters:
        yield "parameters:"
    for parameter in parameters:
        yield _line(f"  {parameter.name}: {_value(parameter)}", _help(parameter))
    if any(parameter.level != "merge" for parameter in row.parameters):
        yield "  # a number; over the layers [0, 1] or cosine(0, 1); by name [{filter: mlp, value: 0.5}, {value: 1}]"
    if row.weighting != "none":
        drawn = next(parameter.name for parameter in row.parameters if parameter.sets == "weights")
        yield _line("# mixup: {alpha: 0.5}", f"M³: {drawn} is drawn, not given; granularity: model, layer or tensor")
    if row.sparsifies and row.sparsifier is None and row.base == "task_vectors":
        yield _line("# sparsify: {method: dare, density: 0.8}", "drop a share of each expert's changes before")
    yield _line("seed: 0", "of all that is random; seeds: 0..31 in its place makes as many merges")
    yield _line("dtype: bfloat16", "that is written; sums are made in float32")
    if not row.statistics:
        yield _line("# tokenizer_source: union", "union, base, or one of the models")
    yield _line("# exclude: ['.*rotary.*']", "copied, not merged: regular expressions of names")


def _line(text: str, comment: str) -> str:
    return f"{text:<{_COLUMN - 2}}  # {comment}"


def _help(parameter: Parameter) -> str:
    if parameter.kind == "choice":
        return f"{parameter.help}: {' or '.join(parameter.choices)}"
    ends = [end for end in (parameter.low, parameter.high) if abs(end) != float("inf")]
    within = f", from {ends[0]:g} to {ends[1]:g}" if len(ends) == 2 else ""
    return f"{parameter.help}{within}"


def _value(parameter: Parameter) -> str:
    """The default, or something in the middle where there is none."""
    if parameter.default is None:
        middle = (parameter.low + parameter.high) / 2
        return f"{middle:g}" if abs(middle) != float("inf") and middle == middle else "0.5"
    if isinstance(parameter.default, bool):
        return str(parameter.default).lower()
    return str(parameter.default)
