import pytest


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Keep caches of tests apart from the user's."""
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
