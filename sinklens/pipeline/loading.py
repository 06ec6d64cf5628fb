"""Reading what a profile left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .mitigation_run import is_mitigation_folder, load_mitigation_run
from .run import Run, load_run


def load(path: str | Path) -> Run | dict[str, Any]:
    """A run folder as a `Run` (of `mitigate`: a `MitigationRun`); of a report (`.html`) the embedded JSON document.

    Raises:
        DataError: The file or folder is not one that sinklens wrote, or is damaged.
    """
    if str(path).endswith((".html", ".htm")):
        from sinklens.report import read_report

        return read_report(path)
    return load_mitigation_run(path) if is_mitigation_folder(Path(path)) else load_run(path)
