from pathlib import Path

import pytest
from applications import APPLICATIONS, Application


@pytest.fixture
def application(request) -> Application:
    """Return the toy application unless a test names another one."""
    return APPLICATIONS[getattr(request, "param", "toy")]


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    """Share trained classifiers between tests."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def tiny(application, tmp_path, cache) -> list[str]:
    """Return the flags of a tiny run in this test's own folder."""
    return application.tiny(tmp_path, cache)
