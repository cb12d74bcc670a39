"""The house: which room may import which, what starts without JAX, tests by themselves, names that mean one thing."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "m3jax"

# The floors of the house, the lowest first: a room imports from itself and from lower floors, from nothing beside it.
FLOORS = (
    ("errors", "text", "naming"),
    ("progress", "documents"),
    ("arithmetic", "ledger"),
    ("methods",),
    ("recipe",),
    ("checkpoints",),
    ("anatomy",),
    ("vocabulary",),
    ("trees", "cluster", "outputs"),
    ("streaming",),
    ("decoder",),
    ("evaluation",),
    ("exploration",),
    ("laboratory",),
    ("cli",),
)
LEVELS = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}

# Doors: `__main__` starts the command line, whatever room it is in, and the package's own names come from all rooms
# but that one.
DOORS = {"__main__": len(FLOORS), "__init__": LEVELS["cli"]}

# Modules that import no JAX, nor what imports it, until a function of theirs is called.
LIGHT = (
    "m3jax",
    "m3jax.anatomy",
    "m3jax.checkpoints",
    "m3jax.checkpoints.headers",
    "m3jax.checkpoints.inspection",
    "m3jax.cli.commands",
    "m3jax.cli.displays.checkpoints",
    "m3jax.cli.displays.methods",
    "m3jax.documents",
    "m3jax.errors",
    "m3jax.ledger",
    "m3jax.methods.catalogue",
    "m3jax.methods.rows",
    "m3jax.naming",
    "m3jax.outputs.manifest",
    "m3jax.outputs.provenance",
    "m3jax.progress",
    "m3jax.recipe",
    "m3jax.text",
    "m3jax.vocabulary",
)
JAX = frozenset({"chex", "flax", "jax", "jaxlib", "optax", "orbax"})

# Packages whose modules have another name, and those that one that is asked for brings for certain.
PACKAGES = {"yaml": "pyyaml"}
BROUGHT = {"aiohttp": "gcsfs", "fsspec": "huggingface_hub", "pyarrow": "datasets", "tqdm": "lm_eval"}


# --- Reading sources ---------------------------------------------------------------------------------------------


class Import(NamedTuple):
    """A line that imports something, by its full name: that of a module, or of a thing in one."""

    line: int
    name: str


def sources() -> dict[str, str]:
    """The package's files, by path below the checkout."""
    files = sorted((ROOT / PACKAGE).rglob("*.py"))
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in files}


def module_of(file: str) -> str:
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def named(node: ast.AST, file: str) -> Iterator[Import]:
    """What a statement imports."""
    if isinstance(node, ast.Import):
        yield from (Import(node.lineno, alias.name) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        above = file.removesuffix(".py").split("/")[: -node.level] if node.level else []
        module = ".".join([*above, *([node.module] if node.module else [])])
        yield from (Import(node.lineno, f"{module}.{alias.name}") for alias in node.names)


def all_imports(file: str, source: str) -> list[Import]:
    """Every import of a file: also those in functions, and those for type checkers only."""
    return [found for node in ast.walk(ast.parse(source)) for found in named(node, file)]


def imports_at_start(file: str, source: str) -> list[Import]:
    """The imports that are carried out when the module is imported."""

    def walk(node: ast.AST) -> Iterator[Import]:
        yield from named(node, file)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            return
        typing_only = isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for child in node.orelse if isinstance(node, ast.If) and typing_only else ast.iter_child_nodes(node):
            yield from walk(child)

    return list(walk(ast.parse(source)))


# --- Directions --------------------------------------------------------------------------------------------------


def floor_of(file: str) -> tuple[str, int]:
    """The room that a file is in, and its floor."""
    first, *rest = file.removeprefix(f"{PACKAGE}/").removesuffix(".py").split("/")
    door = rest[-1] if rest and rest[-1] == "__main__" else first
    return first, DOORS[door] if door in DOORS else LEVELS[first]


def turned_arrows(files: Mapping[str, str]) -> list[str]:
    """Each import of a room that is not below the one that imports, with its place."""
    found = []
    for file, source in files.items():
        room, floor = floor_of(file)
        for line, name in all_imports(file, source):
            package, _, rest = name.partition(".")
            target = rest.partition(".")[0]
            if package != PACKAGE or target in (room, "__version__"):
                continue
            if target not in LEVELS:
                found.append(f"{file}:{line}: {name} is in no room")
            elif LEVELS[target] >= floor:
                found.append(f"{file}:{line}: {room} imports {target}")
    return found


def test_rooms_import_downwards() -> None:
    assert turned_arrows(sources()) == []


def test_every_room_has_a_floor() -> None:
    rooms = {file.split("/")[1].removesuffix(".py") for file in sources()} - DOORS.keys()
    assert rooms - LEVELS.keys() == set()


@pytest.mark.parametrize(
    ("file", "source", "found"),
    [
        ("m3jax/evaluation/a.py", "from m3jax.cli.shell import main", ["1: evaluation imports cli"]),
        ("m3jax/recipe/a.py", "import os\n\nimport m3jax.streaming.plan as plan", ["3: recipe imports streaming"]),
        ("m3jax/methods/a.py", "def late():\n    from m3jax import trees", ["2: methods imports trees"]),
        ("m3jax/trees/a.py", "if TYPE_CHECKING:\n    from m3jax.outputs import local", ["2: trees imports outputs"]),
        ("m3jax/streaming/deep/a.py", "from ...decoder import generate", ["1: streaming imports decoder"]),
        ("m3jax/streaming/a.py", "from .. import cli", ["1: streaming imports cli"]),
        ("m3jax/text.py", "from m3jax.errors import M3Error", ["1: text imports errors"]),
        ("m3jax/trees/a.py", "from m3jax import merge", ["1: m3jax.merge is in no room"]),
        ("m3jax/trees/a.py", "import m3jax", ["1: m3jax is in no room"]),
        ("m3jax/__init__.py", "from m3jax.cli.shell import main", ["1: __init__ imports cli"]),
        ("m3jax/laboratory/__init__.py", "from m3jax.cli.shell import main", ["1: laboratory imports cli"]),
        ("m3jax/laboratory/__main__.py", "from m3jax.cli.shell import main", []),
        ("m3jax/__main__.py", "from m3jax.cli.commands import run", []),
        ("m3jax/__init__.py", "from m3jax.laboratory import conduct", []),
        ("m3jax/trees/a.py", "from m3jax import __version__\nfrom .b import c\nfrom m3jaxed.cli import d", []),
        ("m3jax/cli/a.py", "from m3jax.errors import M3Error\nfrom m3jax.laboratory import conduct", []),
    ],
)
def test_a_turned_arrow_is_found(file: str, source: str, found: list[str]) -> None:
    assert turned_arrows({file: source}) == [f"{file}:{one}" for one in found]


# --- What starts light -------------------------------------------------------------------------------------------


def packages_of(name: str) -> list[str]:
    """What is imported with a module: the packages that it is in, and itself."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]


def ways_to_jax(module: str, files: Mapping[str, str]) -> list[str]:
    """How JAX comes to be imported with a module, by way of others if so: at most one way to each of these."""
    known = {module_of(file): file for file in files}
    found, waiting = [], [(name, name) for name in packages_of(module) if name in known]
    seen = {name for name, _ in waiting}
    while waiting:
        name, way = waiting.pop()
        for line, imported in imports_at_start(known[name], files[known[name]]):
            if imported.partition(".")[0] in JAX:
                found.append(f"{way} > {imported} ({known[name]}:{line})")
            for inner in packages_of(imported):
                if inner in known and inner not in seen:
                    seen.add(inner)
                    waiting.append((inner, f"{way} > {inner}"))
    return found


@pytest.mark.parametrize("module", LIGHT)
def test_starts_without_jax(module: str) -> None:
    assert ways_to_jax(module, sources()) == []


def test_a_way_to_jax_is_found() -> None:
    files = {
        "m3jax/__init__.py": "",
        "m3jax/recipe/__init__.py": "if TYPE_CHECKING:\n    import jax\nelse:\n    from m3jax.methods import catalogue",
        "m3jax/methods/__init__.py": "try:\n    import flax.nnx\nexcept ImportError:\n    pass",
        "m3jax/methods/catalogue.py": "def rows():\n    import jax",
        "m3jax/ledger.py": "class Ledger:\n    from jax import numpy",
    }
    assert ways_to_jax("m3jax.recipe", files) == [
        "m3jax.recipe > m3jax.methods > flax.nnx (m3jax/methods/__init__.py:2)"
    ]
    assert ways_to_jax("m3jax.ledger", files) == ["m3jax.ledger > jax.numpy (m3jax/ledger.py:2)"]
    assert ways_to_jax("m3jax.methods.catalogue", files) == ["m3jax.methods > flax.nnx (m3jax/methods/__init__.py:2)"]
    assert ways_to_jax("m3jax.methods.catalogue", {**files, "m3jax/methods/__init__.py": ""}) == []


# --- Tests -------------------------------------------------------------------------------------------------------


def imports_of_tests(files: Mapping[str, str]) -> list[str]:
    """Each import of a test by a file of tests, with its place: what tests share is in tests/support."""
    tests = {Path(file).stem for file in files if Path(file).name.startswith("test_")}
    return [
        f"{file}:{line}: {name}"
        for file, source in files.items()
        for line, name in all_imports(file, source)
        if not name.startswith(f"{PACKAGE}.") and tests & set(name.split("."))
    ]


def test_no_test_imports_another() -> None:
    files = sorted((ROOT / "tests").rglob("*.py"))
    assert imports_of_tests({path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in files}) == []


def test_an_import_of_a_test_is_found() -> None:
    files = {
        "tests/trees/test_a.py": "from support import oracle\nfrom m3jax.test_b import c",
        "tests/test_b.py": "def late():\n    from tests.trees.test_a import case",
        "tests/support/c.py": "import test_b",
        "tests/trees/test_d.py": "from .test_a import case\nfrom trees import test_a",
    }
    assert imports_of_tests(files) == [
        "tests/test_b.py:2: tests.trees.test_a.case",
        "tests/support/c.py:1: test_b",
        "tests/trees/test_d.py:1: tests.trees.test_a.case",
        "tests/trees/test_d.py:2: trees.test_a",
    ]


# --- Names -------------------------------------------------------------------------------------------------------


def names_used_twice(files: Mapping[str, str]) -> dict[str, list[str]]:
    """The public names of more classes than one, with where these are."""
    places: dict[str, list[str]] = {}
    for file, source in files.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(f"{file}:{node.lineno}")
    return {name: where for name, where in places.items() if len(where) > 1}


def test_a_class_name_is_used_once() -> None:
    assert names_used_twice(sources()) == {}


def test_a_name_used_twice_is_found() -> None:
    files = {"m3jax/a.py": "class Plan: ...\nclass _Bench: ...", "m3jax/b.py": "\nclass _Bench: ...\nclass Plan: ..."}
    assert names_used_twice(files) == {"Plan": ["m3jax/a.py:1", "m3jax/b.py:3"]}


# --- What is installed -------------------------------------------------------------------------------------------


def asked_for() -> set[str]:
    """The packages that pyproject.toml names, those of extras too, as modules are spelled."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    return {re.split(r"[\[<>=; ]", line)[0].lower().replace("-", "_") for line in lines}


def not_asked_for(files: Mapping[str, str], packages: set[str]) -> list[str]:
    """Each import of a module that nothing installs for certain, with its place."""
    found = []
    for file, source in files.items():
        for line, name in all_imports(file, source):
            module = name.partition(".")[0]
            package = BROUGHT.get(module, PACKAGES.get(module, module)).lower()
            if module not in (PACKAGE, *sys.stdlib_module_names) and package not in packages:
                found.append(f"{file}:{line}: {module}")
    return found


def test_what_is_imported_is_installed() -> None:
    assert not not_asked_for(sources(), asked_for())


def test_an_import_that_nothing_installs_is_found() -> None:
    files = {"m3jax/text.py": "import numpy as np\nfrom yaml import load\nfrom somewhere.deep import thing\n"}
    assert not_asked_for(files, {"numpy", "pyyaml"}) == ["m3jax/text.py:3: somewhere"]
    assert not_asked_for(files, {"pyyaml", "somewhere"}) == ["m3jax/text.py:1: numpy"]
