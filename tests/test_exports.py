"""The public surface is a tested fact."""

import subprocess
import sys

import shallowdeep


def test_all_is_sorted_and_complete():
    assert shallowdeep.__all__ == sorted(shallowdeep._HOME_OF)


def test_every_name_resolves_to_something_documented():
    undocumented = [name for name in shallowdeep.__all__ if not (getattr(shallowdeep, name).__doc__ or "").strip()]
    assert undocumented == []


def test_every_name_is_in_the_reference(repository):
    page = (repository / "docs" / "reference.md").read_text()
    assert [name for name in shallowdeep.__all__ if f"`{name}" not in page] == []


def test_unknown_attribute():
    assert not hasattr(shallowdeep, "overthink")


def modules_after(code: str) -> set[str]:
    """Modules that a fresh interpreter has loaded after some code."""
    found = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules)"], capture_output=True, text=True, check=True
    )
    return set(found.stdout.split())


def test_importing_the_package_imports_no_torch():
    loaded = modules_after("import shallowdeep")
    assert "shallowdeep" in loaded
    assert not loaded & {"torch", "numpy", "rich", "pydantic"}


def test_help_imports_no_torch():
    loaded = modules_after(
        "import sys; from shallowdeep.cli import main; sys.argv = ['shallowdeep', 'fit', '--help']\n"
        "import contextlib, io\n"
        "with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit): main()"
    )
    assert "typer" in loaded
    assert not loaded & {"torch", "numpy", "safetensors"}


def test_the_core_imports_no_torchvision_and_no_extra():
    loaded = modules_after("import shallowdeep\nfor name in shallowdeep.__all__: getattr(shallowdeep, name)")
    assert "torch" in loaded
    assert not loaded & {"torchvision", "timm", "transformers", "sklearn", "pyarrow", "PIL", "huggingface_hub"}
