"""Who may import whom, folder by folder, and that folders form no circle."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
APPLICATIONS = ("cbgan", "cbda", "cbcls")
LAYERS = {
    "common/norms",
    "common/norms/estimation",
    "common/norms/backends",
    "common/norms/native",
    "common/norms/kernels",
}
MAY_IMPORT = {
    # Everything may import common/errors.py and common/registry.py; what is not listed here is forbidden.
    "common/cli": {"common/machine"},
    "common/machine": set(),
    "common/norms/backends": set(),
    "common/norms/native": {"common/norms/backends"},
    "common/norms/kernels": {"common/norms/backends"},
    "common/norms/estimation": {"common/norms/backends", "common/norms/native"},
    "common/norms": {
        "common/norms/estimation", "common/norms/backends", "common/norms/native", "common/norms/kernels",
    },
    "common/norms/surgery": {"common/norms", "common/norms/estimation"},
    "common/norms/tools/timing": {*LAYERS, "common/norms/tools", "common/cli", "common/machine"},
    "common/norms/tools": {*LAYERS, "common/cli", "common/machine", "common/runs"},
    "common/data/reading": {"common/data", "common/machine"},
    "common/data/sets": {"common/data", "common/data/reading", "common/machine"},
    "common/data": {"common/cli", "common/machine"},
    "common/metrics/features": {"common/machine"},
    "common/metrics": {"common/metrics/features", "common/data", "common/machine"},
    "common/networks": set(),
    "common/runs": {"common/cli", "common/machine"},
    "common/training": {
        "common/norms", "common/data", "common/data/sets", "common/runs", "common/cli", "common/machine",
    },
    "common/reports": {
        "common/norms", "common/runs", "common/data", "common/data/sets", "common/cli", "common/machine",
    },
    "common/reports/paper": {"common/reports", "common/cli", "common/machine"},
    "common/classification": {
        "common/training", "common/metrics", "common/reports", "common/data", "common/runs", "common/cli",
        "common/machine",
    },
    **{
        application: {
            "common/classification", "common/training", "common/metrics", "common/networks", "common/norms",
            "common/data", "common/data/sets", "common/runs", "common/reports", "common/cli", "common/machine",
        }
        for application in APPLICATIONS
    },
    "cbda/networks": {"common/norms", "common/machine"},
    "cbda/adaptation": {"cbda/networks", "common/training", "common/metrics", "common/machine"},
    "cbgan/networks": {"common/norms", "common/machine"},
    "cbgan/reports": {
        "common/metrics", "common/metrics/features", "common/reports", "common/data", "common/cli", "common/machine",
    },
    "cbcls/networks": {"common/networks", "common/norms", "common/machine"},
}  # fmt: skip
for application in ("cbda", "cbgan"):
    MAY_IMPORT[application].add(f"{application}/networks")
MAY_IMPORT["cbcls"].add("cbcls/networks")
MAY_IMPORT["cbgan"] |= {"cbgan/reports", "common/norms/tools"}  # whose benchmark its own is like
MAY_IMPORT["cbda"].add("cbda/adaptation")
ENTRANCES = {"__init__.py", "__main__.py"}
"""Of a package: they show its public names from wherever they are, or start its command."""


def folders() -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for application in ("common", *APPLICATIONS):
        for file in sorted((ROOT / application).rglob("*.py")):
            found.setdefault(str(file.parent.relative_to(ROOT)), []).append(file)
    return found


def starts(file: Path) -> bool:
    """Say whether a file of common does nothing but start a command that lives elsewhere."""
    return (
        file.parts[-2] != "cli" and "start(" in (text := file.read_text(encoding="utf-8")) and len(text.split("\n")) < 8
    )


def imported(file: Path) -> set[Path]:
    """Return the project's files that a file imports, packages as their __init__.py."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = file.relative_to(ROOT).parent.parts
                base = ".".join([*parents[: len(parents) - node.level + 1], *filter(None, [base])])
            names.update([base, *(f"{base}.{alias.name}" for alias in node.names)])
    found = set()
    for name in names:
        path = ROOT / name.replace(".", "/")
        found.update(p for p in (path.with_suffix(".py"), path / "__init__.py") if name and p.exists())
    return found


@pytest.mark.parametrize("folder", sorted(set(folders()) - {"common"}))
def test_a_folder_imports_what_it_may(folder):
    for file in folders()[folder]:
        if file.name in ENTRANCES:
            continue
        own = str(file.relative_to(ROOT))
        allowed = {folder, *MAY_IMPORT[folder], *(["common/cli"] if starts(file) else [])}
        for target in imported(file):
            place = str(target.parent.relative_to(ROOT))
            if place != "common":
                assert place in allowed, f"{own} imports {target.relative_to(ROOT)}"
            else:
                assert target.name in ("errors.py", "registry.py", "__init__.py"), (
                    f"{own} imports {target.relative_to(ROOT)}"
                )


def test_no_circle_between_folders_nor_between_files():
    TopologicalSorter(MAY_IMPORT).prepare()  # raises CycleError
    every = [file for paths in folders().values() for file in paths]
    TopologicalSorter({f: {g for g in imported(f) - {f} if g.name not in ENTRANCES} for f in every}).prepare()


def test_commands_in_common_are_entrances_only():
    for file in folders()["common"]:
        if file.name not in ("__init__.py", "errors.py", "registry.py"):
            assert {str(target.relative_to(ROOT)) for target in imported(file)} <= {
                "common/cli/command.py", "common/cli/commands.py", "common/cli/__init__.py", "common/__init__.py",
            }  # fmt: skip


def test_a_room_has_about_eight_files():
    for folder, files in folders().items():
        assert sum(file.name not in ENTRANCES and not starts(file) for file in files) <= 9, folder


def test_typed_packages_say_so():
    for package in ("common", *APPLICATIONS):
        assert (ROOT / package / "py.typed").exists()
