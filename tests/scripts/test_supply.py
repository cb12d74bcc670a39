"""What m3jax needs and promises: the bill of materials, constraints that fit, and tests that SECURITY.md names."""

import importlib.machinery
import importlib.util
import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def script(name):
    loader = importlib.machinery.SourceFileLoader(name, str(ROOT / "scripts" / name))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
    loader.exec_module(module)
    return module


def test_the_bill_names_all_that_is_needed():
    bill = script("sbom").bill()
    known = {each["bom-ref"] for each in bill["components"]} | {bill["metadata"]["component"]["bom-ref"]}
    assert {ref for each in bill["dependencies"] for ref in (each["ref"], *each["dependsOn"])} == known
    names = {each["name"] for each in bill["components"]}
    needed = {canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"]}
    assert needed <= names
    assert "jaxlib" in names  # which jax needs
    assert "pytest" not in names
    assert script("sbom").bill() == bill


def test_constraints_fit_what_is_allowed():
    for file, extras in (("m3jax", []), ("tests", ["test"])):
        text = (ROOT / "constraints" / f"{file}.txt").read_text(encoding="utf-8")
        locked: dict[str, list[str]] = {}
        for line in re.findall(r"^([a-z0-9.-]+)==(\S+)", text, re.MULTILINE):
            locked.setdefault(line[0], []).append(line[1])
        wanted = [*PROJECT["dependencies"], *(line for e in extras for line in PROJECT["optional-dependencies"][e])]
        for requirement in map(Requirement, wanted):
            versions = locked[canonicalize_name(requirement.name)]
            assert all(requirement.specifier.contains(version) for version in versions), requirement


def test_every_promise_names_tests_that_are_there():
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)
    assert len(named) > 10
    for file, test in named:
        assert re.search(rf"^def {test}\(", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE), f"{file}::{test}"
    rows = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith(("| promise", "| ---"))]
    assert all("::" in row for row in rows)
