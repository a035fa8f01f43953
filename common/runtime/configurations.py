"""The configurations that come with an application, by name: ``--config smoke``.

They are the files of ``configs/APPLICATION``, which is linked into the application's package, so that an installed one
has them too.
"""

import difflib
import sys
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from common.runtime.errors import UsageError
from common.runtime.paths import expanded


def configurations(application: str) -> dict[str, Path]:
    """Return the files of an imported package's own configurations, by name."""
    package = sys.modules.get(application)
    if package is None or not hasattr(package, "__path__"):
        return {}
    return {path.stem: path for path in sorted(Path(str(files(package) / "configs")).glob("*.yaml"))}


def with_own_files(argv: Sequence[str], application: str) -> list[str]:
    """Put the file in the place of each ``--config NAME`` that is no file here, but an application's own by name.

    Raises:
        UsageError: where there is neither, naming those that exist.
    """
    found, own = list(argv), configurations(application)
    for i, argument in enumerate(argv):
        if argument.startswith("--config="):
            found[i] = f"--config={_file(argument.removeprefix('--config='), application, own)}"
        elif argument == "--config" and i + 1 < len(argv):
            found[i + 1] = _file(argv[i + 1], application, own)
    return found


def _file(given: str, application: str, own: dict[str, Path]) -> str:
    path = expanded(given, "config")
    if not own or path.is_file():
        return given
    if given in own:
        return str(own[given])
    if not path.exists():
        near = difflib.get_close_matches(path.stem, own, n=1)
        hint = f"; did you mean --config {near[0]}?" if near else ""
        raise UsageError(f"config: no file {given}; by name {application} has {', '.join(own)}{hint}")
    return given
