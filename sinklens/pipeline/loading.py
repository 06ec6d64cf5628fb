"""Reading what a profile left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .run import Run, load_run


def load(path: str | Path) -> Run | dict[str, Any]:
    """A run folder as a `Run`, or the JSON document embedded in a report (`.html`).

    Raises:
        DataError: The file or folder is not one that sinklens wrote, or is damaged.
    """
    if str(path).endswith((".html", ".htm")):
        from sinklens.report import read_report

        return read_report(path)
    return load_run(path)
