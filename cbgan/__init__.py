"""Generative adversarial networks with cluster-based normalization."""

import importlib.util
import sys
from pathlib import Path

_OURS, _FOUND = Path(__file__).parents[1] / "common" / "__init__.py", importlib.util.find_spec("common")
if (
    _FOUND is None or _FOUND.origin is None or not _OURS.samefile(_FOUND.origin)
):  # checked without running what is there
    _PLACE = "nothing" if _FOUND is None else _FOUND.origin or ", ".join(_FOUND.submodule_search_locations or ())
    _LINE = (
        f"common: {__name__} needs {_OURS.parent}, but import common finds {_PLACE}; rename that, or start elsewhere"
    )
    if sys.argv[0] != "-m":
        raise ImportError(_LINE)
    print(f"error: {_LINE}", file=sys.stderr)
    sys.exit(2)

from typing import Any  # noqa: E402

from common import __version__  # noqa: E402

__all__ = ["__version__", "load_generator"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    """Load `load_generator` when it is asked for: commands answer a mistyped flag without torch."""
    if name == "load_generator":
        from cbgan.export import load_generator  # noqa: PLC0415 - see above

        return load_generator
    raise AttributeError(f"module {__name__} has no attribute {name}")
