"""Who may import whom."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
APPLICATIONS = {"cbgan", "cbda", "cbcls"}


def imported(file: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("package", ["common", *sorted(APPLICATIONS)])
def test_common_imports_no_application_and_applications_not_each_other(package):
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for file in files:
        assert not imported(file) & (APPLICATIONS - {package}), file


def test_every_package_is_installed_and_typed():
    folders = {str(file.parent.relative_to(ROOT)).replace("/", ".") for file in ROOT.glob("c*/**/__init__.py")}
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for package in folders:
        assert f'"{package}"' in text, f"{package} is missing from [tool.setuptools] packages"
    for package in ("common", *APPLICATIONS):
        assert (ROOT / package / "py.typed").exists()
