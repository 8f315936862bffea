"""Modules of the package as one file."""

import ast
from collections import Counter

import pytest

from shallowdeep.inference.onnx.joined import joined

RUNNER = "shallowdeep.inference.runner.command"


@pytest.fixture(scope="module")
def tree():
    return ast.parse(joined(RUNNER))


def test_no_name_of_one_module_hides_another_ones(tree):
    names = Counter(
        name
        for node in tree.body
        for name in (
            [node.name]
            if isinstance(node, ast.FunctionDef | ast.ClassDef)
            else [target.id for target in getattr(node, "targets", []) if isinstance(target, ast.Name)]
        )
    )
    assert {"Cascade", "Runner", "bench", "main"} <= set(names)
    assert [name for name, count in names.items() if count > 1] == []


def test_nothing_of_the_package_is_imported(tree):
    imported = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    modules = {getattr(node, "module", None) or name.name for node in imported for name in node.names}
    assert "numpy" in modules
    assert not [name for name in modules if name.startswith(("shallowdeep", "torch", "onnx.")) or name == "onnx"]


def test_it_says_what_it_is_and_runs_when_called(tree):
    assert "python run.py" in ast.get_docstring(tree)
    assert ast.unparse(tree.body[-1]).startswith("if __name__ == '__main__'")
