"""Every script finds what it imports of m3jax and of the tests; no checker of types looks at them."""

import ast
import importlib.util
from pathlib import Path

SCRIPTS = Path(__file__).parents[2] / "scripts"


def test_what_scripts_import_is_there() -> None:
    found, absent = 0, []
    for path in [path for path in sorted(SCRIPTS.iterdir()) if path.is_file() and b"python" in path.read_bytes()[:40]]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in ("m3jax", "support"):
                module = importlib.import_module(node.module or "")
                names = [alias.name for alias in node.names if not hasattr(module, alias.name)]
                absent += [(path.name, name) for name in names if not is_module(f"{node.module}.{name}")]
                found += len(node.names)
    assert absent == []
    assert found > 50


def is_module(name: str) -> bool:
    """Whether a name is a module's."""
    return importlib.util.find_spec(name) is not None
