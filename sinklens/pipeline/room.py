"""Whether the disk has room for a run, asked before the run begins."""

from __future__ import annotations

import shutil
from pathlib import Path

from sinklens.core.errors import ResourceError
from sinklens.models.opening import ModelDescription
from sinklens.tracers.executor import TracePlan

from .cost import size
from .estimates import record_bytes
from .prepare import Prepared

COPIES = 2
"""The finished batches and the arrays of the whole run exist side by side for a moment, when the run ends."""


def refuse_without_room(folder: Path, prepared: Prepared, plan: TracePlan) -> None:
    """Refuse a run whose records do not fit on the disk.

    Raises:
        ResourceError: Nothing has been run yet.
    """
    opened = prepared.opened
    described = ModelDescription(opened.info, opened.anatomy, 0, 0)
    records = sum(record_bytes(described, prompt, plan) for prompt in prepared.prompts.prompts)
    place = next((path for path in (folder, *folder.resolve().parents) if path.exists()), Path())
    free = shutil.disk_usage(place).free
    if COPIES * records > free:
        raise ResourceError(
            f"There is not enough disk for this run: {size(free)} are free where {folder} is, and it may take "
            f"{size(COPIES * records)}.",
            detail=f"Its records take up to {size(records)}, twice that while they are put together.",
            hint="Choose an --out on another disk, or fewer prompts (-n), or a shorter --seq-len.",
        )
