"""The files of the project's packages, without what a build of `common/norms` leaves in that folder."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "common" / "norms" / "build"


def sources(package: str, pattern: str = "*.py") -> list[Path]:
    """Return the files below a folder, ``common`` or ``common/norms``, whose names match a pattern."""
    return sorted(path for path in (ROOT / package).rglob(pattern) if BUILD not in path.parents)
