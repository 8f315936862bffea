"""Several modules of this package as one file, for a place where the package is not."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

PACKAGE = __name__.partition(".")[0]


def joined(module: str) -> str:
    """The source of a module, with what it imports from this package in the places of the imports.

    What the modules import from elsewhere is named once, at the top. Their own names must all be different, and are
    imported by ``from … import name`` alone, under no other name.

    Args:
        module: its docstring is the file's.
    """
    imports: dict[str, set[str]] = {}
    bodies = "".join(_bodies(module, imports, set()))
    doc = ast.get_docstring(ast.parse(_source(module)), clean=False)
    plain = sorted(f"import {name}" for name in imports.pop("", ()))
    names = sorted(f"from {place} import {', '.join(sorted(names))}" for place, names in imports.items())
    return "\n".join([f'"""{doc}"""', "", "from __future__ import annotations", "", *plain, *names]) + "\n" + bodies


def _bodies(module: str, imports: dict[str, set[str]], seen: set[str]) -> Iterator[str]:
    """What modules do after their imports, each behind those that it needs."""
    seen.add(module)
    source = _source(module)
    end = 0
    for node in ast.parse(source).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{PACKAGE}."):
            if node.module not in seen:
                yield from _bodies(str(node.module), imports, seen)
        elif isinstance(node, ast.ImportFrom):
            if node.module != "__future__":
                imports.setdefault(str(node.module), set()).update(map(ast.unparse, node.names))
        elif isinstance(node, ast.Import):
            imports.setdefault("", set()).update(map(ast.unparse, node.names))
        elif not (isinstance(node, ast.Expr) and end == 0):
            break
        end = node.end_lineno or 0
    yield "\n\n" + "".join(source.splitlines(keepends=True)[end:]).strip("\n") + "\n"


def _source(module: str) -> str:
    return Path(str(getattr(find_spec(module), "origin", ""))).read_text(encoding="utf-8")
