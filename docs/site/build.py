"""Makes the site: pages of docs/ as they are, pages made of the catalogue, the schema, commands and docstrings.

    python docs/site/build.py DIRECTORY

Every link has to lead somewhere, or nothing is made.
"""

import base64
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import typer
from safetensors.numpy import save_file

import m3jax
from m3jax.cli import commands
from m3jax.cli.displays import methods as displayed
from m3jax.errors import M3Error
from m3jax.methods import catalogue
from m3jax.methods.rows import MethodRow, SparsifierRow
from m3jax.recipe.editors import recipe_schema

ROOT = Path(__file__).resolve().parents[2]
_SIDE = 96  # entries along a side of a method's picture


# --- pages as they are --------------------------------------------------------------------------------------------


def _adapted(text: str, page: Path) -> str:
    """A page of docs/ as one of the site: links are called as their pages, other files by their names."""

    def link(found: re.Match[str]) -> str:
        text, target = found.groups()
        if "://" in target or target.startswith("#"):
            return found[0]
        path = (page.parent / target.partition("#")[0]).resolve()
        if not path.exists():
            raise SystemExit(f"{page}: {target} is not there")
        if path.is_relative_to(ROOT / "docs") and path.suffix == ".md" and text.endswith(path.name):
            return f"[{path.read_text(encoding='utf-8').partition(chr(10))[0].lstrip('# ')}]({target})"
        if path.is_relative_to(ROOT / "docs") and path.suffix in (".md", ".png", ".json", ".jsonl"):
            return found[0]
        named = str(path.relative_to(ROOT))
        return f"`{named}`" if text.strip("`") == named else f"{text} (`{named}`)"

    return re.sub(r"(?<!!)\[([^\]]+)\]\(([^)\s]+)\)", link, text)


def copied_pages(pages: Path) -> None:
    """All of docs/ but the site's own files, the README as the start, and the changelog."""
    for source in sorted((ROOT / "docs").rglob("*")):
        place = source.relative_to(ROOT / "docs")
        if source.is_dir() or place.parts[0] in ("site", "benchmarks", "notebooks"):
            continue
        (pages / place).parent.mkdir(parents=True, exist_ok=True)
        if source.suffix == ".md":
            (pages / place).write_text(_adapted(source.read_text(encoding="utf-8"), source), encoding="utf-8")
        else:
            shutil.copyfile(source, pages / place)
    for name, page in (("index.md", ROOT / "README.md"), ("changelog.md", ROOT / "CHANGELOG.md")):
        text = _adapted(page.read_text(encoding="utf-8"), page)
        (pages / name).write_text(text.replace("](docs/", "]("), encoding="utf-8")
    shutil.copyfile(ROOT / "docs" / "site" / "extra.css", pages / "extra.css")


def notebook_pages(pages: Path) -> None:
    """Notebooks as pages: texts, code, and the outputs that scripts/notebooks keeps in them."""
    (pages / "notebooks").mkdir()
    for source in sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")):
        lines: list[str] = []
        for number, cell in enumerate(json.loads(source.read_text(encoding="utf-8"))["cells"]):
            text = "".join(cell["source"])
            lines += [_adapted(text, source)] if cell["cell_type"] == "markdown" else ["```python", text, "```"]
            for output in cell.get("outputs", ()):
                data = output.get("data", {"text/plain": output.get("text")})
                if "image/png" in data:
                    name = f"{source.stem}-{number}.png"
                    (pages / "notebooks" / name).write_bytes(base64.b64decode(data["image/png"]))
                    lines += ["", f"![What the cell draws]({name})"]
                else:
                    lines += ["", "``` {.text .output}", "".join(data["text/plain"]).rstrip(), "```"]
            lines.append("")
        named = f"This page is `docs/notebooks/{source.name}`, which the tests run on eight devices of a CPU."
        (pages / "notebooks" / f"{source.stem}.md").write_text("\n".join([*lines, named, ""]), encoding="utf-8")


# --- methods ------------------------------------------------------------------------------------------------------


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for row in rows:
        yield f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in row)} |"
    yield ""


def _yaml(content: Mapping[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True).strip()


_STATISTICS = {
    "fisher": "Their Fisher information is taken to be the entries squared.",
    "gram": "Expert a's inputs are taken to be the larger the farther its entry is from the base's, b's to be alike.",
}
"""By kind of statistics, what those of the pictures are."""


def _models(place: Path, count: int) -> None:
    """Experts whose task vectors are, over a square, each entry of one with each of the other; further ones are 0.

    Their Fisher information is as if data said the more of an entry the farther it is from the base; as a weight
    [out, in], expert a has a column for each of its entries, whose input is as large as they are.
    """
    ramp = np.linspace(-1, 1, _SIDE, dtype=np.float32)
    across, down = np.meshgrid(ramp, ramp)
    vectors = {"base": 0 * across, "expert-a": across, "expert-b": down}
    alike = np.full(_SIDE, np.mean(ramp**2), np.float32)
    for name in ("base", *(f"expert-{chr(ord('a') + i)}" for i in range(count))):
        tensor = np.ascontiguousarray(vectors.get(name, 0 * across))
        gram = np.diag(ramp**2 if name == "expert-a" else alike)
        for directory, entries in ((name, tensor), (f"{name}-fisher", tensor**2), (f"{name}-gram", gram)):
            (place / directory).mkdir(exist_ok=True)
            save_file({"model.layers.0.mlp.up_proj.weight": entries}, place / directory / "model.safetensors")


def _merged_square(content: dict[str, Any], place: Path) -> np.ndarray:
    """What the example of a method makes of that square."""
    from safetensors.numpy import load_file

    text = json.dumps(content).replace('"org/', f'"{place}/')
    (place / "recipe.json").write_text(text)
    out = place / "out"
    shutil.rmtree(out, ignore_errors=True)
    m3jax.merge_checkpoint(place / "recipe.json", out)
    (merged,) = load_file(out / "model.safetensors").values()
    return merged.astype(np.float32)


def _picture(merged: np.ndarray, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.4, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    most = max(float(np.abs(merged).max()), 1e-6)
    drawn = axes.imshow(merged, cmap="RdBu_r", origin="lower", extent=(-1, 1, -1, 1), vmin=-most, vmax=most)
    figure.colorbar(drawn, ax=axes, label="merged entry, less the base's")
    axes.set(xlabel="entry of expert a, less the base's", ylabel="of expert b")
    figure.savefig(path, dpi=110)


def _method_page(row: MethodRow, pages: Path, place: Path) -> str:
    content = displayed.example(row)
    told = displayed.method_json(row.name)["method"]
    lines = [f"# {row.name}", "", f"{row.summary[0].upper()}{row.summary[1:]}.", ""]
    lines += ["``` {.text .formula}", row.formula, "```", ""]
    lines += [f"Needs {', '.join(told['needs'])}. Paper: {row.paper}.", "", '<div class="method" markdown>', ""]
    try:
        _models(place, len(content["models"]))
        _picture(_merged_square(content, place), pages / "methods" / f"{row.name}.png")
        lines += [f"![What {row.name} makes of two entries]({row.name}.png)", ""]
        lines += ["What the example below makes of each pair of entries of two experts (further ones are the base)."]
        if row.statistics:
            lines += [_STATISTICS[row.statistics]]
    except M3Error as error:
        print(f"{row.name} is not drawn: {error}", file=sys.stderr)
    lines += ["", "</div>", "", "```yaml", _yaml(content), "```", ""]
    rows = [
        [f"`{p.name}`", _shown(p.default), displayed.range_text(p), displayed.level_text(p, False), p.help]
        for p in row.parameters
    ]
    lines += _table(["parameter", "default", "range", "one value for", "what it does"], rows)
    return "\n".join(lines)


def _shown(value: Any) -> str:
    return "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def method_pages(pages: Path) -> list[str]:
    """A page for each method, and one that lists them; returns their names."""
    (pages / "methods").mkdir()
    rows = [row for row in catalogue.rows() if isinstance(row, MethodRow)]
    with tempfile.TemporaryDirectory() as place:
        for row in rows:
            page = _method_page(row, pages, Path(place))
            (pages / "methods" / f"{row.name}.md").write_text(page, encoding="utf-8")
    head = ["method", "what it does", "paper"]
    lines = ["# Methods", "", "`merge_method` of a recipe is one of these, as in `m3jax methods NAME`.", ""]
    lines += _table(head, [[f"[{row.name}]({row.name}.md)", row.summary, row.paper] for row in rows])
    lines += ["## Sparsifiers", "", "`sparsify: {method: …}` goes before any method that works on task vectors.", ""]
    lines += _table(head, [[f"`{row.name}`", row.summary, row.paper] for row in catalogue.SPARSIFIERS])
    (pages / "methods" / "index.md").write_text("\n".join(lines), encoding="utf-8")
    return [row.name for row in rows]


# --- keys, commands, functions ------------------------------------------------------------------------------------


_TITLES = {
    "model": "A model",
    "slice": "A slice",
    "source": "A source of a slice",
    "module": "A module",
    "mixup": "mixup",
    "anatomy": "anatomy",
    "tokenizer": "tokenizer",
}
_SETTING = """What is for each tensor is a number (`0.5`, `1e-3`), a formula of depth (`linear(0, 1)`, `cosine(0, 1)`),
a list of points over the layers (`[0, 0.5, 1]`), or filters by name (`[{filter: mlp, value: 1}, {value: 0.5}]`); what
is for the merge is one value ([recipes](recipes.md#parameters))."""


def _kind_of(told: Mapping[str, Any]) -> str:
    """What values a schema takes, in words."""
    if "$ref" in told:
        name = told["$ref"].rsplit("/", 1)[-1]
        title = _TITLES.get(name)
        plain = {"number": "number", "setting": "[value](#parameters)", "parameters": "[mapping](#parameters)"}
        return f"[{title.lower()}](#{title.lower().replace(' ', '-')})" if title else plain.get(name, "recipe")
    either = told.get("anyOf") or told.get("oneOf")
    if either:
        if all("const" in one for one in either):
            return "[its name](methods/index.md)"
        kinds = [_kind_of(one) for one in either if one.get("type") != "null"]
        return " or ".join(dict.fromkeys(kinds))
    if "enum" in told:
        return ", ".join(f"`{_shown(one)}`" for one in told["enum"] if one is not None)
    if told.get("type") == "array":
        return f"list of {_kind_of(told['items'])}"
    if told.get("type") == "object" and isinstance(told.get("additionalProperties"), dict):
        return f"mapping to {_kind_of(told['additionalProperties'])}"
    plain = {"string": "text", "integer": "whole number", "boolean": "`true`, `false`", "object": "mapping"}
    return plain.get(str(told.get("type")), str(told.get("type")))


def _key_rows(part: Mapping[str, Any], place: str = "") -> Iterator[list[str]]:
    """Of every key its name, values, default and meaning; keys of mappings inside follow theirs."""
    for name, told in part["properties"].items():
        default = "must be given" if name in part.get("required", ()) else _shown(told.get("default"))
        value = "[below](#sparsify)" if name == "sparsify" else _kind_of(told)
        yield [f"`{place}{name}`", value, default, told.get("description", "")]
        for inner in (told, *told.get("anyOf", ())):
            each = inner.get("additionalProperties")
            if isinstance(each, dict) and "properties" in each:
                yield from _key_rows(each, f"{place}{name}.TOKEN.")


def _parameter_rows(rows: Sequence[MethodRow | SparsifierRow]) -> Iterator[list[str]]:
    """Of every parameter name, default, range, level, meaning and owners; those that mean the same share a row."""
    seen: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        of_sparsifier = isinstance(row, SparsifierRow)
        for p in row.parameters:
            default = "must be given" if p.default is None else _shown(p.default)
            told = (p.name, default, displayed.range_text(p), displayed.level_text(p, of_sparsifier), p.help)
            seen.setdefault(told, []).append(
                f"`{row.name}`" if of_sparsifier else f"[{row.name}](methods/{row.name}.md)"
            )
    for (name, *told), owners in sorted(seen.items()):
        yield [f"`{name}`", *told, ", ".join(owners)]


def keys_page(pages: Path) -> None:
    """Every key of a recipe from its schema, every parameter from the catalogue."""
    schema = recipe_schema()
    head = ["key", "value", "default", "what it does"]
    lines = [
        "# Keys of a recipe",
        "",
        "A recipe has one of `models`, `slices` and `modules`, and a `merge_method`. Editors",
    ]
    lines += ["know all this from `m3jax recipe schema`; [recipes](recipes.md) explains it.", "", "## At the top", ""]
    lines += _table(head, list(_key_rows(schema)))
    for name, title in _TITLES.items():
        told = schema["$defs"][name]
        told = next((one for one in told.get("anyOf", ()) if "properties" in one), told)
        lines += [f"## {title}", "", *_table(head, list(_key_rows(told)))]
    columns = ["parameter", "default", "range", "one value for", "what it does", "of"]
    lines += [
        "## sparsify",
        "",
        "`method` is one of the names in the last column, `target` is `delta` (the default: task",
    ]
    lines += ["vectors) or `weights`; the parameters of the method stand beside them.", ""]
    lines += _table(columns, list(_parameter_rows(catalogue.SPARSIFIERS)))
    lines += ["## Parameters", "", _SETTING, ""]
    lines += _table(columns, list(_parameter_rows([row for row in catalogue.rows() if isinstance(row, MethodRow)])))
    (pages / "keys.md").write_text("\n".join(lines), encoding="utf-8")


def commands_page(pages: Path) -> None:
    """Every command with its options, from what `--help` shows."""
    lines = ["# Commands", ""]
    top = typer.main.get_command(commands.app)

    def told(name: str, command: Any) -> Iterator[str]:
        if hasattr(command, "commands"):
            for inner, each in command.commands.items():
                yield from told(f"{name} {inner}", each)
            return
        arguments = " ".join((p.metavar or p.name.upper()) for p in command.params if p.param_type_name == "argument")
        yield from [f"## {name}", "", f"```sh\n{name} {arguments} [OPTIONS]\n```", "", (command.help or "").strip(), ""]
        rows = [
            [", ".join(f"`{o}`" for o in p.opts + p.secondary_opts), getattr(p, "help", "") or ""]
            for p in command.params
            if p.param_type_name == "option" and not getattr(p, "hidden", False)
        ]
        yield from _table(["option", "what it does"], rows)

    lines += told("m3jax", top)
    (pages / "commands.md").write_text("\n".join(lines), encoding="utf-8")


def functions_page(pages: Path) -> None:
    """Every public name, from its docstring."""
    lines = ["# Functions", "", "What `import m3jax` gives.", ""]
    homes = {name: f"m3jax.{home}.{name}" for name, home in m3jax._HOMES.items()}
    small = sorted(name for name in homes if name[0].islower())
    for title, names in (("To use", small), ("To extend", sorted(set(homes) - set(small)))):
        lines += [f"## {title}", ""]
        for name in names:
            found = getattr(m3jax, name)
            lines += [f"::: {found.__module__}.{found.__qualname__}", ""]
    (pages / "api.md").write_text("\n".join(lines), encoding="utf-8")


def main(out: Path) -> None:
    """Write the site.

    Args:
        out: Where; what is there is replaced if a site was made there before.
    """
    if out.exists() and not (out / "sitemap.xml").exists():
        raise SystemExit(f"{out}: holds something else than a site: give another directory")
    with tempfile.TemporaryDirectory() as place:
        pages = Path(place) / "pages"
        pages.mkdir()
        copied_pages(pages)
        notebook_pages(pages)
        names = method_pages(pages)
        keys_page(pages)
        commands_page(pages)
        functions_page(pages)
        methods = ["index", *names]
        listed = "\n".join(["      - Methods:", *(f"          - methods/{name}.md" for name in methods)])
        settings = (ROOT / "docs" / "site" / "mkdocs.yml").read_text(encoding="utf-8")
        settings = settings.replace("      - Methods: methods/", listed)
        (Path(place) / "mkdocs.yml").write_text(settings, encoding="utf-8")
        command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out.resolve())]
        if subprocess.run(command, cwd=place).returncode:
            raise SystemExit("the site has faults, which stand above")
    print(f"{out}/index.html")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
