"""Which warnings fail a test."""

import warnings

import pytest


def warn(module: str, category: type[Warning]) -> None:
    """Warn as a module of that name would."""
    exec(
        "warnings.warn('made', category)",
        {"__name__": module, "warnings": warnings, "category": category},
    )


@pytest.mark.parametrize("module", ["common", "cbgan.train", "cbda.config", "cbcls", "docs.tour", "conftest", __name__])
@pytest.mark.parametrize("category", [UserWarning, DeprecationWarning])
def test_one_that_we_cause_does(module, category):
    with pytest.raises(category, match="made"):
        warn(module, category)


@pytest.mark.parametrize("module", ["torch", "torch._dynamo.guards", "commonmark", "sklearn.common"])
@pytest.mark.parametrize("category", [UserWarning, DeprecationWarning, FutureWarning])
def test_one_of_another_library_does_not(module, category):
    with warnings.catch_warnings(record=True) as seen:
        warn(module, category)
    assert [str(warning.message) for warning in seen] == ["made"]
