"""Who may import whom, folder by folder, and that folders form no circle."""

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from sources import sources

ROOT = Path(__file__).parents[1]
APPLICATIONS = ("cbgan", "cbda", "cbcls")
LAYERS = {
    "common/norms",
    "common/norms/backends",
    "common/norms/backends/cpu",
    "common/norms/backends/triton",
}
MAY_IMPORT: dict[str, set[str]] = {
    # Everything may import common/registry.py, and but for the layers common/runtime; what is not listed is forbidden.
    "common": set(),
    "common/runtime": set(),
    "common/norms/backends": set(),
    "common/norms/backends/cpu": {"common/norms/backends"},
    "common/norms/backends/triton": {"common/norms/backends"},
    "common/norms": {"common/norms/backends", "common/norms/backends/cpu", "common/norms/backends/triton"},
    "common/data/reading": {"common/data"},
    "common/data/sets": {"common/data", "common/data/reading"},
    "common/data": set(),
    "common/metrics/features": set(),
    "common/metrics": {"common/metrics/features", "common/data"},
    "common/networks": {"common/norms"},
    "common/train": {"common/norms", "common/data"},
    "common/reports": {"common/norms", "common/train", "common/data", "common/data/sets"},
    "common/classification": {"common/train", "common/metrics", "common/reports", "common/data"},
    **{
        application: {
            "common/classification", "common/train", "common/metrics", "common/networks", "common/norms",
            "common/data", "common/data/sets", "common/reports",
        }
        for application in APPLICATIONS
    },
    "cbda/networks": {"common/norms"},
    "cbda/adaptation": {"cbda/networks", "common/train", "common/metrics"},
    "cbgan/networks": {"common/norms"},
    "cbcls/networks": {"common/networks", "common/norms"},
}  # fmt: skip
for application in ("cbda", "cbgan"):
    MAY_IMPORT[application].add(f"{application}/networks")
MAY_IMPORT["cbcls"].add("cbcls/networks")
MAY_IMPORT["cbgan"].add("common/metrics/features")
MAY_IMPORT["cbda"].add("cbda/adaptation")
COMMANDS = {
    **{f"common/{name}.py": {"common/reports"} for name in ("figures", "report", "tables")},
    **{f"common/norms/{name}.py": LAYERS for name in ("bench", "doctor")},
}
"""Commands that use more than the folder they are in."""
ANYWHERE = {"common/registry.py", "common/__init__.py"}
UNDER_BACKENDS = {f"common/norms/{name}.py" for name in ("__init__", "mixture", "seeding")}
"""What backends may import of the folder above theirs: the rules that all of them follow, by name or as modules."""
ENTRANCES = {"__init__.py", "__main__.py"}
"""Of a package: they show its public names from wherever they are, or start its command."""


def folders() -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for application in ("common", *APPLICATIONS):
        for file in sources(application):
            found.setdefault(str(file.parent.relative_to(ROOT)), []).append(file)
    return found


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


@pytest.mark.parametrize("folder", folders())
def test_a_folder_imports_what_it_may(folder):
    for file in folders()[folder]:
        if file.name in ENTRANCES:
            continue
        own = str(file.relative_to(ROOT))
        allowed = {folder, *COMMANDS.get(own, MAY_IMPORT[folder])}
        for target in imported(file):
            place, name = str(target.parent.relative_to(ROOT)), str(target.relative_to(ROOT))
            if name in COMMANDS:
                assert own in COMMANDS or folder in APPLICATIONS, f"{own} imports {name}"
            elif name not in ANYWHERE and not (name in UNDER_BACKENDS and folder.startswith("common/norms/")):
                low = place == "common/runtime" and folder not in LAYERS
                assert low or place in allowed, f"{own} imports {name}"


def test_the_layers_import_nothing_of_the_project_and_themselves_by_no_absolute_name():
    """So that the folder is a package under another name too; but for torch and triton, the standard library is all."""
    for file in sources("common/norms"):
        depth = len(file.relative_to(ROOT / "common" / "norms").parts)
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                assert node.level <= depth, file
                names = [node.module or ""] if not node.level else []
            assert {name.split(".")[0] for name in names} <= {"torch", "triton", *sys.stdlib_module_names}, file


def test_no_circle_between_folders_nor_between_files():
    TopologicalSorter(MAY_IMPORT).prepare()  # raises CycleError
    every = [file for paths in folders().values() for file in paths]
    TopologicalSorter({f: {g for g in imported(f) - {f} if g.name not in ENTRANCES} for f in every}).prepare()


def test_typed_packages_say_so():
    for package in ("common", *APPLICATIONS):
        assert (ROOT / package / "py.typed").exists()
