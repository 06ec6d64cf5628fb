"""The browser, if there is one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from .chromium import Browser


@pytest.fixture
def browser(tmp_path: Path) -> Browser:
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("no Chromium is installed on this machine")
    return Browser(program, tmp_path)
