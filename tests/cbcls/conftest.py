import pytest

TINY = ["--data.size", "8", "--batch_size", "250", "--log_every", "3"]
"""Flags of a run of 4 steps an epoch that takes about a second an epoch."""


@pytest.fixture
def tiny(tmp_path) -> list[str]:
    """Return the flags of a tiny run in this test's own folder."""
    return [*TINY, "--out", str(tmp_path)]
