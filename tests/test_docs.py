"""Documents: their examples run, commands and recipes are read; docs/architecture.md has the enforced floors."""

import ast
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import jax
import pytest
import typer
import yaml
from support.outside import forget
from support.stand_ins import write_stand_ins

from m3jax.anatomy import families
from m3jax.anatomy.libraries import LIBRARIES
from m3jax.checkpoints import formats
from m3jax.cli.commands import app, main
from m3jax.evaluation.tasks import TASKS
from m3jax.recipe import Recipe

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


@pytest.mark.slow
def test_notebooks_run():
    subprocess.run([sys.executable, ROOT / "scripts" / "notebooks", "--check"], check=True)


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


def commands(code):
    """What follows `m3jax` in the lines of a shell's block."""
    for line in code.replace("\\\n", " ").splitlines():
        found = re.match(r"\s*(?:srun |\w+=\S* )*m3jax (\S.*)", line)
        if found:
            words = shlex.split(re.sub(r"\$\w+", "1", found[1]), comments=True)
            yield words[: words.index(">")] if ">" in words else words


def test_commands_of_all_pages_are_read():
    top, read = typer.main.get_command(app), 0
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        fenced = [code for language, code in blocks(text) if language == "sh"]
        for code in [*fenced, *re.findall(r"(?:^ {4}m3jax .*\n)+", text, re.MULTILINE)]:
            for words in commands(code):
                command, left = top, list(words)
                while hasattr(command, "commands"):
                    command = command.commands[left.pop(0)]
                command.make_context("m3jax", left)  # raises on what it does not know
                read += 1
    assert read > 60


def test_recipes_of_all_pages_are_read():
    read = 0
    for page in PAGES:
        for language, code in blocks(page.read_text(encoding="utf-8")):
            if language == "yaml" and re.search("^merge_method:", code, re.MULTILINE):
                Recipe.model_validate(yaml.safe_load(code))
                read += 1
    assert read >= 4


README_LIMITS = {
    "evaluate": ["--limit", "1", "--max-tokens", "1"],
    "attack": ["--limit", "1", "--max-tokens", "1", "--budget", "2"],
    "explore": ["--limit", "1", "--max-tokens", "1", "--samples", "2"],
}


@pytest.mark.slow
def test_the_readme_runs(folder):
    write_stand_ins(folder, layers=1, width=16, shards=1)  # a relative path is looked for before the hub
    for name in ("dev.jsonl", "test.jsonl"):
        (folder / name).write_text('{"question": "What is 2 + 2?", "answer": "#### 4"}\n')
    done = []
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for language, code in blocks((ROOT / "README.md").read_text(encoding="utf-8")):
            if language == "yaml":
                (folder / "recipe.yaml").write_text(code, encoding="utf-8")
            elif language == "python":
                exec(compile(code, "README.md", "exec"), {"__name__": "example"})
            for words in commands(code) if language == "sh" else ():
                assert main([*words, *README_LIMITS.get(words[0], [])]) == 0, words
                done.append(words[0])
    assert done == ["merge", "merge", "replay", "verify", "push", "recipe", "evaluate", "attack", "explore"]


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
    pages += [f"notebooks/{notebook.stem}.md" for notebook in (ROOT / "docs" / "notebooks").glob("*.ipynb")]
    assert [page for page in pages if not page.startswith("site/") and page not in settings] == []
