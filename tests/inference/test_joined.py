"""Modules of the package as one file."""

import ast
from collections import Counter

import pytest

from shallowdeep.inference.onnx.joined import joined

RUNNER = "shallowdeep.inference.runner.command"


@pytest.fixture(scope="module")
def tree():
    return ast.parse(joined(RUNNER))


def bound(node):
    """The names that a statement gives something to."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.Import | ast.ImportFrom):
        return [one.asname or one.name for one in node.names]
    targets = [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [])
    return [target.id for target in targets if isinstance(target, ast.Name)]


def test_no_name_of_one_module_hides_another_ones(tree):
    names = Counter(name for node in tree.body for name in bound(node))
    assert {"Cascade", "Runner", "MOVERS", "replace", "main"} <= set(names)
    assert [name for name, count in names.items() if count > 1] == []


def test_nothing_of_the_package_is_imported(tree):
    imported = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    modules = {getattr(node, "module", None) or name.name for node in imported for name in node.names}
    assert "numpy" in modules
    assert not [name for name in modules if name.startswith(("shallowdeep", "torch", "onnx.")) or name == "onnx"]


def test_it_says_what_it_is_and_runs_when_called(tree):
    assert "python run.py" in ast.get_docstring(tree)
    assert ast.unparse(tree.body[-1]).startswith("if __name__ == '__main__'")
