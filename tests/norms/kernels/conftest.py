import os


def pytest_collection_modifyitems(items):
    """Keep one part of the tests, "i/n", where test_kernels.py asks for it."""
    i, n = map(int, os.environ.get("TEST_PART", "0/1").split("/"))
    items[:] = items[i::n]
