"""What of a program its callers need: definitions, and the statements that these are made by."""

import ast
import builtins
import functools
import symtable
import sys
import warnings
from collections.abc import Collection, Iterable
from typing import NamedTuple

_DYNAMIC = {"eval", "exec", "globals", "locals", "vars", "__import__"}
_READS = {"input", "raw_input", "exit", "quit"}
_SETTINGS = {"setrecursionlimit", "set_int_max_str_digits", "seed", "filterwarnings", "simplefilter"}
_OWN_SCOPE = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
_BUILTINS = frozenset(dir(builtins))


@functools.lru_cache(maxsize=256)
def parsed(source: str) -> ast.Module | None:
    """The syntax tree of a text that Python can compile, None of one that it cannot; not to be changed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a stray "\d" is the model's business
            tree = ast.parse(source)
            compile(tree, "program", "exec", dont_inherit=True)
            return tree
    except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError):
        return None


class CodePart(NamedTuple):
    """A statement of a program's outermost level.

    Attributes:
        node: Its syntax tree.
        binds: The names that it gives a value.
        changes: The names whose values it may change in place.
        uses: The names that it reads, or that a function in it reads when called.
    """

    node: ast.stmt
    binds: frozenset[str]
    changes: frozenset[str]
    uses: frozenset[str]


def statements(tree: ast.Module) -> list[CodePart]:
    """The statements of a program's outermost level."""
    return [
        CodePart(node, frozenset(_bound(node)), frozenset(_changed(node)), frozenset(_read(node))) for node in tree.body
    ]


def bound_names(tree: ast.Module) -> set[str]:
    """The names that a program gives a value at its outermost level."""
    return {name for node in tree.body for name in _bound(node)}


@functools.lru_cache(maxsize=1024)
def called_names(tests: str) -> tuple[str, ...]:
    """The names that tests ask a program for: what they call, or else use, and neither define nor import.

    A builtin's name counts where there is no other: a program may be asked for a function called `sum`.

    Example:
        >>> called_names("import math\\nassert math.isclose(sorted(area(3))[0], 9)")
        ('area',)
    """
    tree = parsed(tests)
    if tree is None:
        return ()
    own = bound_names(tree) | {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and not _is_load(node)}
    called = [node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    used = [node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and _is_load(node)]
    for names in (called, used):
        wanted = [name for name in names if name not in own and name not in _BUILTINS]
        if wanted:
            return tuple(dict.fromkeys(wanted))
    return tuple(dict.fromkeys(name for name in called if name not in own))


def methods_of(tree: ast.Module, name: str) -> list[str]:
    """The classes of the outermost level that have a method of this name and can be made without arguments."""
    return [
        node.name
        for node in tree.body
        if isinstance(node, ast.ClassDef) and _has_method(node, name) and not _wants_arguments(node)
    ]


def needed(parts: list[CodePart], wanted: Collection[str]) -> set[int]:
    """The places of the statements that bind or change the wanted names, or what these need in turn."""
    names, kept = set(wanted), set[int]()
    while True:
        more = {
            place
            for place, part in enumerate(parts)
            if place not in kept and not _is_never_kept(part.node) and _serves(part, parts, names)
        }
        if not more:
            return kept
        kept |= more
        names |= {name for place in more for name in parts[place].uses | parts[place].binds}


def sliced(source: str, wanted: Collection[str]) -> str:
    """The program without what runs on loading and serves none of the wanted names.

    Left out are asserts, a `__main__` block, input and output, calls for show, stray words, and imports of packages
    that nothing wanted needs. A program that reads its own names by text (`eval`, `globals`) keeps all but
    the first two.

    Args:
        source: A program that compiles.
        wanted: The names that will be asked for.

    Example:
        >>> sliced("def one(): return 1\\nn = int(input())\\nprint(one())\\nassert one() == 2\\n", ["one"])
        'def one(): return 1\\n'
    """
    tree = parsed(source)
    if tree is None:
        return source
    parts = statements(tree)
    dynamic = any(isinstance(node, ast.Name) and node.id in _DYNAMIC for node in ast.walk(tree))
    kept = needed(parts, wanted)
    if not set(wanted) <= {name for part in parts for name in part.binds}:
        dynamic = True  # bound in a way that is not seen here
    dropped = [
        part.node
        for place, part in enumerate(parts)
        if place not in kept and (_is_never_kept(part.node) if dynamic else not _is_harmless(part.node))
    ]
    return _without(source, tree, dropped) if dropped else source


def unresolved(source: str, wanted: Collection[str]) -> set[str]:
    """The names that what serves the wanted ones reads, and that neither the program nor Python defines."""
    tree = parsed(source)
    if tree is None:
        return set()
    parts = statements(tree)
    read = {name for place in needed(parts, wanted) for name in parts[place].uses}
    return read - bound_names(tree) - _BUILTINS - {"__name__", "__file__", "__doc__"}


def imports(source: str) -> list[str]:
    """The imports of the standard library at the outermost level of a program, a line each."""
    tree = parsed(source)
    nodes = tree.body if tree is not None else []
    return [ast.unparse(node) for node in nodes if isinstance(node, ast.Import | ast.ImportFrom) and _is_standard(node)]


def definitions(source: str, names: Collection[str]) -> str:
    """The statements of a program that bind these names, and what they need in turn, as text."""
    tree = parsed(source)
    if tree is None:
        return ""
    parts = statements(tree)
    return "\n".join(ast.unparse(parts[place].node) for place in sorted(needed(parts, names)))


def is_stub(tree: ast.Module, name: str) -> bool:
    """Whether the function of this name has no body: only a docstring, `pass` or `...`."""
    found = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == name
    ]
    return bool(found) and all(
        isinstance(node, ast.Pass) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
        for node in found[-1].body
    )


def is_imported(tree: ast.Module, name: str) -> bool:
    """Whether a program only imports what has this name."""
    binding = [node for node in tree.body if name in _bound(node)]
    return bool(binding) and all(isinstance(node, ast.Import | ast.ImportFrom) for node in binding)


def _is_load(node: ast.Name) -> bool:
    return isinstance(node.ctx, ast.Load)


def _bound(node: ast.stmt) -> Iterable[str]:
    """Names that a statement of the outermost level binds there."""
    for inner in _here(node):
        if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield inner.name
        elif isinstance(inner, ast.Name) and not _is_load(inner):  # what is deleted is bound to nothing
            yield inner.id
        elif isinstance(inner, ast.Import | ast.ImportFrom):
            yield from ((alias.asname or alias.name).partition(".")[0] for alias in inner.names)


def _here(node: ast.AST) -> Iterable[ast.AST]:
    """A statement and what is in it, without the insides of functions and classes, which have names of their own."""
    yield node
    if not isinstance(node, _OWN_SCOPE):
        for child in ast.iter_child_nodes(node):
            yield from _here(child)


def _changed(node: ast.stmt) -> Iterable[str]:
    """Names whose values a statement may change in place, when it runs."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return
    yield from _changes(_here(node))


def _changes(nodes: Iterable[ast.AST]) -> Iterable[str]:
    for inner in nodes:
        if isinstance(inner, ast.Attribute | ast.Subscript) and not isinstance(inner.ctx, ast.Load):
            yield from _root(inner)
        elif isinstance(inner, ast.Expr) and isinstance(inner.value, ast.Call):
            if isinstance(inner.value.func, ast.Attribute):
                yield from _root(inner.value.func)
        elif isinstance(inner, ast.Global):
            yield from inner.names
        elif isinstance(inner, ast.AugAssign):
            yield from _root(inner.target)


def _root(node: ast.expr) -> Iterable[str]:
    while isinstance(node, ast.Attribute | ast.Subscript | ast.Call):
        node = node.func if isinstance(node, ast.Call) else node.value
    if isinstance(node, ast.Name):
        yield node.id


def _read(node: ast.stmt) -> Iterable[str]:
    """Names of the outermost level that a statement reads, or that functions in it read when called."""
    try:
        yield from _global_reads(symtable.symtable(ast.unparse(node), "program", "exec"), outermost=True)
    except (SyntaxError, ValueError, RecursionError):
        yield from (inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name) and _is_load(inner))


def _global_reads(table: symtable.SymbolTable, outermost: bool) -> Iterable[str]:
    for symbol in table.get_symbols():
        if symbol.is_referenced() if outermost else symbol.is_global():
            yield symbol.get_name()
    for inner in table.get_children():
        yield from _global_reads(inner, outermost=False)


def _serves(part: CodePart, parts: list[CodePart], names: set[str]) -> bool:
    if part.binds & names:
        return True
    changed = part.changes & names
    if isinstance(part.node, ast.Expr) and isinstance(part.node.value, ast.Call):
        call = part.node.value
        if isinstance(call.func, ast.Attribute) and changed:
            return not _is_module(changed, parts) or call.func.attr in _SETTINGS
        if isinstance(call.func, ast.Name) and not _contains(call, _READS):  # a call that fills a table
            return _fills(call.func.id, parts, names)
        return False
    return bool(changed)


def _is_module(names: Iterable[str], parts: list[CodePart]) -> bool:
    modules = {name for part in parts if isinstance(part.node, ast.Import) for name in part.binds}
    return set(names) <= modules


def _fills(function: str, parts: list[CodePart], names: set[str]) -> bool:
    """Whether a function of the program changes one of the program's names that are needed."""
    bodies = [part.node for part in parts if isinstance(part.node, ast.FunctionDef) and part.node.name == function]
    outer = {name for part in parts if not isinstance(part.node, ast.Import | ast.ImportFrom) for name in part.binds}
    for body in bodies:
        local = {node.arg for node in ast.walk(body) if isinstance(node, ast.arg)}
        local |= {node.id for node in ast.walk(body) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        local -= {name for node in ast.walk(body) if isinstance(node, ast.Global) for name in node.names}
        if (set(_changes(ast.walk(body))) - local) & names & outer and not _contains(body, _READS):
            return True
    return False


def _contains(node: ast.AST, names: Collection[str]) -> bool:
    return any(isinstance(inner, ast.Name) and inner.id in names for inner in ast.walk(node))


def _is_never_kept(node: ast.stmt) -> bool:
    """An assert of the program's own, or its `__main__` block."""
    return isinstance(node, ast.Assert) or (isinstance(node, ast.If) and _contains(node.test, {"__name__"}))


def _is_harmless(node: ast.stmt) -> bool:
    """Whether a statement that nothing needs may stay: loading it does nothing and cannot fail."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        return _is_standard(node)
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        said = [*node.decorator_list, *node.args.defaults, *(default for default in node.args.kw_defaults if default)]
        notes = [arg.annotation for arg in ast.walk(node.args) if isinstance(arg, ast.arg) and arg.annotation]
        return not any(map(_may_fail, [*said, *notes, *([node.returns] if node.returns else [])]))
    if isinstance(node, ast.Assign | ast.AnnAssign):
        plain = isinstance(node, ast.Assign) and all(isinstance(target, ast.Name) for target in node.targets)
        return plain and node.value is not None and not _may_fail(node.value)
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _may_fail(node: ast.expr) -> bool:
    names = {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}
    plain = (ast.Constant, ast.Name, ast.Load, ast.List, ast.Tuple, ast.Dict, ast.Set, ast.UnaryOp, ast.USub)
    return not names <= _BUILTINS or not all(isinstance(inner, plain) for inner in ast.walk(node))


def _is_standard(node: ast.Import | ast.ImportFrom) -> bool:
    modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
    level = node.level if isinstance(node, ast.ImportFrom) else 0
    return level == 0 and all(module.partition(".")[0] in sys.stdlib_module_names for module in modules)


def _has_method(node: ast.ClassDef, name: str) -> bool:
    return any(isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef) and inner.name == name for inner in node.body)


def _wants_arguments(node: ast.ClassDef) -> bool:
    makers = [inner for inner in node.body if isinstance(inner, ast.FunctionDef) and inner.name == "__init__"]
    return any(len(maker.args.args) - 1 > len(maker.args.defaults) for maker in makers)


def _without(source: str, tree: ast.Module, dropped: list[ast.stmt]) -> str:
    """The text without some statements: whole lines where they have lines of their own."""
    lines = source.split("\n")
    gone = set(map(id, dropped))
    kept = {line for node in tree.body if id(node) not in gone for line in _lines(node)}
    if any(line in kept for node in dropped for line in _lines(node)):  # two statements on one line
        return "\n".join(ast.unparse(node) for node in tree.body if id(node) not in gone) + "\n"
    out = {line for node in dropped for line in _lines(node)}
    return "\n".join(line for number, line in enumerate(lines, 1) if number not in out)


def _lines(node: ast.stmt) -> range:
    decorators = getattr(node, "decorator_list", [])
    return range(min([node.lineno, *(item.lineno for item in decorators)]), (node.end_lineno or node.lineno) + 1)
