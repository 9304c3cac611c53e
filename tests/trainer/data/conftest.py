import pytest


@pytest.fixture(autouse=True)
def _cache_of_its_own(tmp_path_factory, monkeypatch):
    """For marks in streams."""
    monkeypatch.setenv("ATTN_SAES_CACHE", str(tmp_path_factory.mktemp("cache")))
