"""What the processes of a streamed run have read, and how much of it the system fetched from the disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sinklens.models.spec import OpenedModel
from sinklens.tracers.team import Team

COUNTERS = Path("/proc/self/io")


class Reads:
    """What this process has caused to be fetched since this object was made, and the same of the others.

    Attributes:
        section: For the manifest, once all have said it: per process `bytes_read` from the files of the model and
            `bytes_from_disk`, which counts everything that the process read or mapped and the system did not hold
            already. The latter is None where the system does not tell it.
    """

    def __init__(self) -> None:
        self.before, self.section = fetched(), {}

    def agreed(self, opened: OpenedModel, team: Team) -> None:
        """Tell the others of a team and hear them. All must ask; nothing is said of a model in memory."""
        if opened.blocks is None:
            return
        now = fetched()
        disk = None if now is None or self.before is None else now - self.before
        said = team.agree("reads", [opened.blocks.recipes.stored.total_read, disk])
        read: dict[str, Any] = {
            "bytes_read": [theirs[0] for theirs in said],
            "bytes_from_disk": [theirs[1] for theirs in said],
        }
        self.section = read


def fetched() -> int | None:
    """Bytes that this process has caused to be fetched from storage; None where the system does not count them."""
    try:
        lines = COUNTERS.read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes:"))
    except (OSError, StopIteration, ValueError, IndexError):
        return None
