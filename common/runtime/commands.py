"""The commands of a package: ``python -m cbgan`` lists them, ``python -m cbgan train`` starts one."""

import difflib
import re
import runpy
import sys
from importlib.resources import files
from pathlib import Path

from common.runtime.command import run_command
from common.runtime.errors import UsageError

_FIRST_LINE = re.compile(r'"""(.+?): ``python -m ([\w.]+)')
"""A command's module begins with what it does and how it is started."""


def commands(package: str) -> dict[str, str]:
    """Return the commands of an imported package, ``norms.doctor`` or ``train``, with a line each of what they do."""
    root, found = Path(str(files(package))), {}
    for path in sorted(root.rglob("*.py")):
        with path.open(encoding="utf-8") as file:
            match = _FIRST_LINE.match(file.readline())
        name = ".".join([package, *path.relative_to(root).with_suffix("").parts]).removesuffix(".__main__")
        if match and match[2] == name:
            found[name.removeprefix(f"{package}.")] = match[1]
    return found


def main(package: str) -> None:
    """List a package's commands, or start the one that the command line names; does not return.

    Raises:
        SystemExit: with the command's status; 2 if there is no such command.
    """
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    known = commands(package)
    if name in known:
        del sys.argv[1]
        runpy.run_module(f"{package}.{name}", run_name="__main__", alter_sys=True)
    run_command(lambda: _list(package, known, name))


def _list(package: str, known: dict[str, str], name: str) -> None:
    if name not in ("-h", "--help"):
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean python -m {package}.{near[0]}?" if near else ""
        raise UsageError(f"{name}: no such command of python -m {package}; there are {', '.join(known)}{hint}")
    width = max(map(len, known), default=0) + len(f"python -m {package}.")
    for command, what in known.items():
        print(f"{f'python -m {package}.{command}':{width}}  {what}")
    print("Each takes --help.")
