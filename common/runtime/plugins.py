"""Code of the user's own, imported before settings are checked: it adds kinds of layers, data sets and metrics by name.

Only by names that ``import`` takes: nothing is imported from a path, or because a checkpoint says so.
"""

import importlib
from collections.abc import Sequence
from importlib.metadata import EntryPoint, entry_points

from common.runtime.errors import UsageError

GROUP = "cluster_based_norm.plugins"
"""The entry points whose modules are imported wherever the distribution that has them is installed."""


class MissingPlugin(UsageError):
    """A plugin is not there, or cannot be imported."""


def load_plugins(modules: Sequence[str]) -> None:
    """Import the modules of installed entry points, then these; what is imported already is not imported again.

    Raises:
        UsageError: if a name is none that ``import`` takes.
        MissingPlugin: if a module cannot be imported, or what it adds is refused.
    """
    for entry in entry_points(group=GROUP):
        _load(entry.module, f"entry point {entry.name} of {_owner(entry)[0]}; repair or remove that")
    for name in modules:
        if not all(part.isidentifier() for part in name.split(".")):
            raise UsageError(f"plugins: expected modules by name, as in import my_layers, got {name}")
        _load(name, "install it, or name its folder in PYTHONPATH")


def installed_plugins() -> dict[str, str]:
    """Return the distributions that have entry points here, with their versions."""
    return dict(_owner(entry) for entry in entry_points(group=GROUP))


def _owner(entry: EntryPoint) -> tuple[str, str]:
    assert entry.dist is not None  # as of every entry point that was found
    return entry.dist.name, entry.dist.version


def _load(module: str, remedy: str) -> None:
    try:
        importlib.import_module(module)
    except (ImportError, SyntaxError, ValueError) as error:  # a registration that is refused is a ValueError
        raise MissingPlugin(
            f"plugins: {module} cannot be imported ({' '.join(str(error).split())}); {remedy}"
        ) from error
