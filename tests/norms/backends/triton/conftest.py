import os

import pytest

from common.norms.backends.triton import cluster_ops, ops


@pytest.fixture(autouse=True)
def fresh_plans():
    """Forget how activations were walked over, since tests change the tables that it follows from."""
    plans = ops.planned, ops.channel_planned, cluster_ops.planned
    for planned in plans:
        planned.cache_clear()
    yield
    for planned in plans:
        planned.cache_clear()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """Keep one part of the tests, "i/n", of those that a marker has left, where test_kernels.py asks for it."""
    i, n = map(int, os.environ.get("TEST_PART", "0/1").split("/"))
    items[:] = items[i::n]
