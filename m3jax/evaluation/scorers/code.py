"""The program in what a model wrote."""

import ast
import html
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from m3jax.evaluation.scorers import slices
from m3jax.evaluation.scorers.spoken import field, spoken

_FENCE = re.compile(r"^(?P<indent>[ \t>]*)(?P<mark>`{3,}|~{3,})(?P<info>[^\n]*)$", re.MULTILINE)
_ONE_LINE = re.compile(r"(?P<mark>`{1,3})(?P<body>[^`\n]+)(?P=mark)")
_TAGGED = re.compile(
    r"\[(?P<tag>BEGIN|PYTHON|CODE|ANSWER|SOLUTION)\](?P<body>.*?)(?:\[(?:DONE|END|/(?P=tag))\]|\Z)"
    r"|<(?P<element>code|pre|python|solution|answer)\b[^>]*>(?P<inside>.*?)</(?P=element)>",
    re.DOTALL,
)
_INNER = re.compile(r"</?(?:code|pre|br)\b[^>]*>")
_DONE = re.compile(r"\[(?:DONE|/PYTHON|/CODE|END|/BEGIN)\]")
_LANGUAGE = re.compile(r"\s*\{?\.?(?:[pP]y(?:thon)?[\d.]*|ipython\d?|PYTHON|[pP]ycon)(?![\w+-])\}?\s*")
_PROMPTED = re.compile(r"^(?:>>>|\.\.\.)(?: |$)", re.MULTILINE)
_NUMBERED = re.compile(r"[ \t]*\d+[:.|]?(?: |$)")
_BEGINS = re.compile(r"^[ \t]*(?:import \w|from [\w.]+ import |def \w|class \w|async def \w|@\w)")
_GLUED = re.compile(r"^(?![ \t>]*```)([^`\n]*[^`\s])[ \t]*(```\w*)[ \t]*$", re.MULTILINE)
_BEGINS_BARE = re.compile(rf"(?:{_BEGINS.pattern})|^[A-Za-z_]\w* *= *\S")
_MARKS = re.compile(r"^[ \t]*(?:`{3,}|~{3,}).*$\n?", re.MULTILINE)
# Three quotation marks for the fence's.
_QUOTED = re.compile(
    r"^(?P<mark>\'{3}|\"{3})(?:python|py)3?[ \t]*(?P<body>\n.*?^)(?P=mark)[ \t]*$", re.DOTALL | re.MULTILINE
)
_NAMES = ("code", "solution", "program", "implementation", "completion", "python", "answer")  # of a JSON object
_MOST_STARTS = 60
_MOST_CLOSINGS = 12


class Stretch(NamedTuple):
    """A stretch of a text that may be a program.

    Attributes:
        text: It.
        is_marked: Whether a fence or tag sets it apart.
    """

    text: str
    is_marked: bool


def is_python(source: str) -> bool:
    """Whether Python can compile the text."""
    return slices.parsed(source) is not None


def defines(source: str, name: str) -> bool:
    """Whether a program binds a name at its outermost level; of a text that does not compile, whether it looks so."""
    tree = slices.parsed(source)
    if tree is not None:
        return name in slices.bound_names(tree)
    pattern = rf"^(?:(?:async\s+)?def|class)\s+{re.escape(name)}\b|^{re.escape(name)}\s*(?::[^=\n]+)?=(?!=)"
    return re.search(pattern, source, re.M) is not None


def extract_code(text: str, name: str | Sequence[str] | None = None, whole: bool = False) -> str | None:
    """The Python program in a chat answer.

    Every stretch of the text that may be a program is tried: fenced, tagged, on one line, or bare between sentences.
    Those that do not compile are dropped. The last that defines the wanted names counts (models that think aloud put
    the final version last), with the imports and helpers it needs from the others, and without what serves none of
    the names (`slices.sliced`). A method of a class without arguments, such as `class Solution`, will do for a
    function. Without a name, the fenced blocks together, else what is bare.

    Args:
        text: What the model wrote.
        name: The name, or names, that the program should define.
        whole: Leave in what seems to serve none of them.

    Returns:
        The program, or None where there is none. Where none compiles, what looks most like one.

    Example:
        >>> extract_code("Sure:\\n```python\\ndef one(): return 1\\n```\\nDone.", "one")
        'def one(): return 1\\n'
    """
    names = (name,) if isinstance(name, str) else tuple(name or ())
    given = field(text, _NAMES)
    text = text if given is None else given
    found = list(
        _stretches(_GLUED.sub(r"\1\n\2", _QUOTED.sub(r"```python\g<body>```", spoken(text))))
    )  # a fence at the end of a line has its own
    programs = [program for program in map(_compiled, found) if program is not None]
    if names and (chosen := _chosen(programs, names, whole)) is not None:
        return chosen
    marked = [program.text for program in programs if program.is_marked]
    if marked:
        return "\n".join(dict.fromkeys(marked))
    bare = [program.text for program in programs]
    if bare:
        return max(bare, key=len) if names else "\n".join(bare)
    return next((stretch.text for stretch in found if stretch.is_marked or _BEGINS.match(stretch.text)), None)


def _chosen(programs: Sequence[Stretch], names: Sequence[str], whole: bool) -> str | None:
    """The program that defines the names, with what it needs from the others."""
    fitting = [place for place, program in enumerate(programs) if _provides(program.text, names)]
    if not fitting:
        return _joined(programs, names, whole)
    complete = [place for place in fitting if not _is_stub(programs[place].text, names)] or fitting
    marked = [place for place in complete if programs[place].is_marked] or complete
    place = marked[-1]
    others = [program.text for program in [*programs[:place][::-1], *programs[place + 1 :]]]
    return _completed(programs[place].text, others, [program.text for program in programs[:place]], names, whole)


def _joined(programs: Sequence[Stretch], names: Sequence[str], whole: bool) -> str | None:
    """Programs that define the names only together."""
    marked = [program.text for program in programs if program.is_marked] or [program.text for program in programs]
    together = "\n".join(dict.fromkeys(marked))
    return _completed(together, [], [], names, whole) if len(names) > 1 and _provides(together, names) else None


def _completed(program: str, others: Sequence[str], before: Sequence[str], names: Sequence[str], whole: bool) -> str:
    program = _with_methods(program, names)
    head = list(dict.fromkeys(line for block in before for line in slices.imports(block)))
    own = slices.imports(program)
    head = [line for line in head if line not in own]
    missing = slices.unresolved(program, names) - {name for line in head for name in _names_of(line)}
    for block in others:
        if missing and (lent := slices.definitions(block, missing)):
            head.append(lent)
            missing = slices.unresolved("\n".join([*head, program]), names)
    together = "\n".join([*head, program])
    kept = together if whole else slices.sliced(together, names)
    return kept if is_python(kept) else together


def _names_of(line: str) -> set[str]:
    tree = slices.parsed(line)
    return slices.bound_names(tree) if tree is not None else set()


def _provides(source: str, names: Sequence[str]) -> bool:
    tree = slices.parsed(source)
    return tree is not None and all(name in slices.bound_names(tree) or slices.methods_of(tree, name) for name in names)


def _is_stub(source: str, names: Sequence[str]) -> bool:
    tree = slices.parsed(source)
    return tree is not None and any(slices.is_stub(tree, name) or slices.is_imported(tree, name) for name in names)


def _with_methods(source: str, names: Sequence[str]) -> str:
    """The program, with names of its own for the methods that are asked for as functions."""
    tree = slices.parsed(source)
    bound = slices.bound_names(tree) if tree is not None else set()
    lines = [
        f"{name} = {holders[-1]}().{name}\n"
        for name in names
        if tree is not None and name not in bound and (holders := slices.methods_of(tree, name))
    ]
    return source.rstrip("\n") + "\n\n" + "".join(lines) if lines else source


def _stretches(text: str) -> Iterator[Stretch]:
    """All that may be a program, in the order of the text, the marked ones first."""
    marked = [(place, block) for place, block in [*_fenced(text), *_tagged(text), *_on_one_line(text)]]
    yield from (Stretch(block, True) for _, block in sorted(marked, key=lambda pair: pair[0]))
    bare = _DONE.split(_MARKS.sub("\n", text))[0] if not marked and _DONE.search(text) else _MARKS.sub("\n", text)
    yield from (Stretch(block, False) for block in _bare(bare))


def _fenced(text: str) -> Iterator[tuple[int, str]]:
    """What stands between fences. A block ends at the first fence at which it compiles, else at the next one."""
    fences = list(_FENCE.finditer(text))
    place = 0
    if (
        fences
        and not fences[0]["info"].strip()
        and len(fences) % 2
        and slices.parsed(text[: fences[0].start()].strip("\n"))
    ):
        yield 0, text[: fences[0].start()]  # the prompt, or the model's beginning, opened it
        place = 1
    while place < len(fences):
        opening = fences[place]
        closings = [index for index in range(place + 1, len(fences)) if fences[index]["mark"][0] == opening["mark"][0]]
        closings = closings[: _MOST_CLOSINGS if len(fences) < 50 else 2]
        bodies = [(index, _body(text, opening, fences[index].start())) for index in closings]
        end, body = next(
            ((index, body) for index, body in bodies if any(map(slices.parsed, _spellings(body)))),
            bodies[0] if bodies else (len(fences), _body(text, opening, len(text))),
        )
        yield opening.start(), body
        place = end + 1


def _body(text: str, opening: re.Match[str], end: int) -> str:
    """What a fence holds, with what stands behind its language on the opening line."""
    rest = text[opening.end() + 1 : end]
    info = opening["info"].strip()
    language = _LANGUAGE.match(info)
    behind = info[language.end() :] if language is not None else info
    return f"{behind}\n{rest}" if behind and _BEGINS_BARE.match(behind) else rest


def _tagged(text: str) -> Iterator[tuple[int, str]]:
    for found in _TAGGED.finditer(text):
        body = found["body"] if found["body"] is not None else html.unescape(_INNER.sub("", found["inside"]))
        if "```" not in body:
            yield found.start(), body


def _on_one_line(text: str) -> Iterator[tuple[int, str]]:
    for found in _ONE_LINE.finditer(text):
        language = _LANGUAGE.match(found["body"])
        body = found["body"][language.end() :] if language is not None else found["body"]
        if _BEGINS.match(body) or ("lambda" in body and "=" in body):
            yield found.start(), body.strip()


def _bare(text: str) -> Iterator[str]:
    """Stretches outside of all fences: from a line that begins a program, as far as it compiles."""
    lines = _unquoted(text).split("\n")
    place = tried = 0
    if (tree := slices.parsed(text)) is not None and any(map(_BEGINS_BARE.match, lines)) and tree.body:
        yield text
        return
    while place < len(lines) and tried < _MOST_STARTS:
        if not _BEGINS_BARE.match(lines[place]):
            place += 1
            continue
        tried += 1
        end = _reach(lines, place)
        if end is None:
            end = next((at for at in range(place + 1, len(lines)) if _BEGINS_BARE.match(lines[at])), len(lines))
            yield "\n".join(lines[place:])
            place = max(end, place + 1)
        else:
            yield "\n".join(lines[place:end]).rstrip() + "\n"
            place = end


def _reach(lines: Sequence[str], start: int) -> int | None:
    """How far the lines from `start` compile together; None where not even the first statement does."""
    end = len(lines)
    while end > start:
        stretch = "\n".join(lines[start:end])
        if any(map(slices.parsed, _spellings(stretch))):
            return end
        wrong = min((line for line in map(_wrong_line, _spellings(stretch)) if line), default=0)
        end = min(end - 1, start + wrong - 1) if wrong > 1 else end - 1
        while end > start and end < len(lines) and lines[end].strip() and lines[end][0].isspace():
            end -= 1  # a statement ends where a line of its outermost level begins
    return None


def _wrong_line(source: str) -> int:
    try:
        ast.parse(source)
    except SyntaxError as error:
        return error.lineno or 0
    except (ValueError, RecursionError, MemoryError):
        pass
    return 0


def _compiled(found: Stretch) -> Stretch | None:
    spelling = next((text for text in _spellings(found.text) if slices.parsed(text) is not None and text.strip()), None)
    return found._replace(text=spelling) if spelling is not None else None


def _spellings(text: str) -> Iterator[str]:
    """The text as Python may take it: as it is, without margin, with spaces for tabs, without a console's prompts."""
    plain = [text, textwrap.dedent(text)]
    spaced = _spaced(text)
    plain += [spaced, textwrap.dedent(spaced)]
    if _PROMPTED.match(textwrap.dedent(text).lstrip()):
        plain.append(_typed(textwrap.dedent(text)))
    if text.lstrip().startswith(">"):
        plain.append(textwrap.dedent(_unquoted(text)))
    if _NUMBERED.match(text.strip("\n")) and all(map(_NUMBERED.match, filter(str.strip, text.split("\n")))):
        plain.append("\n".join(_NUMBERED.sub("", line, count=1) for line in text.split("\n")))
    if all(line[:1] in "+- " for line in text.split("\n")) and "\n+" in f"\n{text}":  # a patch
        plain.append("\n".join(line[1:] for line in text.split("\n") if not line.startswith("-")))
    if "\\_" in text or "\\*" in text:  # Markdown's escapes
        plain.append(textwrap.dedent(text.replace("\\_", "_").replace("\\*", "*")))
    if "&lt;" in text or "&gt;" in text or "&quot;" in text:
        plain.append(textwrap.dedent(html.unescape(text)))
    if "\u00a0" in text or "\u201c" in text or "\u2019" in text:
        plain.append(text.replace("\u00a0", " ").translate(str.maketrans("\u201c\u201d\u2018\u2019", "\"\"''")))
    yield from dict.fromkeys(plain)


def _spaced(text: str) -> str:
    """Tabs of the margins as four spaces."""
    return re.sub(r"^[ \t]*\t[ \t]*", lambda margin: margin.group().replace("\t", "    "), text, flags=re.MULTILINE)


def _typed(text: str) -> str:
    """What was typed into a console, without its prompts and answers."""
    return "\n".join(line[4:] for line in text.split("\n") if _PROMPTED.match(line))


def _unquoted(text: str) -> str:
    """The text without the mark of a quotation before every line."""
    lines = text.split("\n")
    if not all(line.startswith(">") or not line.strip() for line in lines):
        return text
    return "\n".join(re.sub(r"^> ?", "", line) for line in lines)


def continued(prompt: str, name: str, text: str, whole: bool = False) -> str | None:
    """The program of a text that continues a function's header, or that holds only its body.

    Args:
        prompt: Ends in the function's header and docstring.
        name: The function.
        text: What the model wrote.
        whole: Leave in what seems not to serve the function.

    Returns:
        The prompt with the body; None where the text has none.
    """
    text = spoken(text)
    head = _spaced(prompt).rstrip()
    fits: Callable[[str], bool] = lambda body: not slices.is_stub(ast.parse(f"{head}\n{body}\n"), name)  # noqa: E731
    fenced = [body for _, body in _fenced(text)]
    rest = [_MARKS.sub("\n", text), text] if fenced else [text]
    for given in (*fenced, *rest):
        for body in _bodies(given):
            if body.strip() and slices.parsed(f"{head}\n{body}\n") is not None and fits(body):
                return f"{head}\n{body}\n" if whole else slices.sliced(f"{head}\n{body}\n", [name])
    last = fenced[-1] if fenced else text
    return f"{head}\n{continuation(last)}\n" if continuation(last).strip() else None


def _bodies(text: str) -> Iterable[str]:
    """The ways in which a text may be the body of a function."""
    text = _spaced(text).strip("\n")
    lines = text.split("\n")
    margins = [len(line) - len(line.lstrip()) for line in lines if line.strip()]
    if not margins:
        return
    if margins[0] == 0:  # the prompt's last indentation swallowed the first line's, or the margin was left out
        if len(margins) > 1 and min(margins[1:]) >= 4:
            yield f"    {text}"
        yield textwrap.indent(text, "    ")
        yield continuation(text)
    else:
        yield text
        yield continuation(text)
        yield textwrap.indent(textwrap.dedent(text), "    ")
        yield textwrap.indent(textwrap.dedent(continuation(text)), "    ")


def continuation(text: str) -> str:
    """The body that continues a function's header: up to the first line that is no longer indented."""
    lines = _spaced(text.replace("\r\n", "\n")).split("\n")
    first = next((place for place, line in enumerate(lines) if line.strip()), len(lines))
    if first < len(lines) and not lines[first][0].isspace():
        lines[first] = "    " + lines[first]  # the prompt's last indentation swallowed the first line's
    end = next(
        (place for place in range(first, len(lines)) if lines[place].strip() and not lines[place][0].isspace()), None
    )
    return "\n".join(lines[:end])
