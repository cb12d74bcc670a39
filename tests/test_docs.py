"""Documents: examples of docs/extend.md and docs/functional.md run; docs/architecture.md has the enforced floors."""

import ast
import re
import tomllib
from pathlib import Path

import jax
import pytest
from support.outside import forget

from m3jax.anatomy import families
from m3jax.anatomy.libraries import LIBRARIES
from m3jax.checkpoints import formats
from m3jax.evaluation.tasks import TASKS

ROOT = Path(__file__).parent.parent
EXTEND = (ROOT / "docs" / "extend.md").read_text(encoding="utf-8")
SECTIONS = {part.split("\n")[0]: part for part in EXTEND.split("\n## ")[1:]}


def blocks(text):
    """The code of a section: language and text of each block."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def file_of(code):
    """The file that a block is the content of, as its first line says; None if it is to be run."""
    named = re.match(r"# (\S+\.\w+)\n", code)
    return named[1] if named else None


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """A working directory that is on the path; what examples add to tables is taken away again."""
    for module, name in ((formats, "FORMATS"), (families, "_UNTIED"), (families, "_PECULIAR")):
        monkeypatch.setattr(module, name, getattr(module, name))
    before = dict(TASKS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    monkeypatch.undo()
    TASKS.clear()
    TASKS.update(before)
    forget("m3jax_capped")


def install(folder, project):
    """What pip makes of a pyproject.toml: the entry points, beside the modules."""
    told = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    told.mkdir()
    (told / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    lines = [
        line
        for group, entries in project["entry-points"].items()
        for line in (f"[{group}]", *(f"{name} = {target}" for name, target in entries.items()))
    ]
    (told / "entry_points.txt").write_text("\n".join(lines) + "\n")
    forget()


@pytest.mark.parametrize("title", SECTIONS)
def test_examples_run(folder, title):
    found = blocks(SECTIONS[title])
    assert [code for language, code in found if language == "python" and "assert" in code] != []
    namespace = {"__name__": "example"}
    for language, code in found:
        file = file_of(code)
        if file is None:
            assert language == "python"
            exec(compile(code, f"docs/extend.md, {title}", "exec"), namespace)
            continue
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text(code, encoding="utf-8")
        if file == "pyproject.toml":
            install(folder, tomllib.loads(code)["project"])


def test_the_program_of_functional_pipelines_runs(folder):
    text = (ROOT / "docs" / "functional.md").read_text(encoding="utf-8")
    namespace = {"__name__": "example"}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # as users have them
        for part in text.split("\n## "):
            found = blocks(part)
            assert found != []
            for language, code in found:
                assert language == "python"
                exec(compile(code, f"docs/functional.md, {part.splitlines()[0]}", "exec"), namespace)


def test_sections_are_those_that_the_page_promises():
    assert list(SECTIONS) == ["A method", "A format of checkpoints", "A task", "A family of tensor names"]


def test_architecture_is_what_is_enforced():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)(?:/|\.py)` \| (\d+) \|", page, re.MULTILINE)
    tree = ast.parse((ROOT / "tests" / "test_architecture.py").read_text(encoding="utf-8"))
    (enforced,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "FLOORS"
    )
    assert {room: int(floor) for room, floor in rows} == {
        room: floor for floor, rooms in enumerate(enforced) for room in rooms
    }


def test_the_page_of_libraries_names_what_maps():
    page = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    table = page.partition("## What maps")[2].partition("\n\nThe config")[0]
    for library in LIBRARIES:
        named = re.findall(rf"^\| `{library.name}` \| ([^|]*) \|", table, re.MULTILINE)
        assert set(re.findall(r"\w+", " ".join(named))) - {"untied"} == set(library.models), library.name
    for language, code in blocks(page):
        if language == "python":
            exec(compile(code, "docs/families.md", "exec"), {})


PAGES = [*(ROOT / "docs").glob("**/*.md"), *ROOT.glob("*.md")]


@pytest.mark.parametrize("page", sorted(str(page.relative_to(ROOT)) for page in PAGES if page.parent.name != "site"))
def test_links_and_files_that_pages_name_are_there(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    links = {link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link}
    assert [link for link in links if link and not ((ROOT / page).parent / link).exists()] == []
    named = set(re.findall(r"`((?:m3jax|tests|scripts|docs|configs)/[\w/.]*)`", text))
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_site_has_every_page():
    settings = (ROOT / "docs" / "site" / "mkdocs.yml").read_text(encoding="utf-8")
    pages = [str(page.relative_to(ROOT / "docs")) for page in PAGES if page.is_relative_to(ROOT / "docs")]
    assert [page for page in pages if not page.startswith("site/") and page not in settings] == []
