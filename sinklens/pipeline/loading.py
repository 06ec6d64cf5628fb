"""Reading what a profile left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .run import Run, load_run


def load(path: str | Path) -> Run | dict[str, Any]:
    """A run folder as a `Run`; of a report (`.html`), which has no trace, the embedded JSON document as a dict.

    Raises:
        DataError: The file or folder is not one that sinklens wrote, or is damaged.
    """
    if str(path).endswith((".html", ".htm")):
        from sinklens.report import read_report

        return read_report(path)
    return load_run(path)
