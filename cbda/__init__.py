"""Unsupervised domain adaptation with cluster-based normalization."""

from typing import Any

__all__ = ["load_model"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    """Load `load_model` when it is asked for: commands answer a mistyped flag without torch."""
    if name == "load_model":
        from cbda.export import load_model  # noqa: PLC0415 - see above

        return load_model
    raise AttributeError(f"module {__name__} has no attribute {name}")
