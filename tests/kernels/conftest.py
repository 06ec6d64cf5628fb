"""The compiled row pass is built afresh for the tests, not taken from or left in the user's cache."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from sinklens.kernels import native


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        native.library.cache_clear()
        yield
        native.library.cache_clear()
