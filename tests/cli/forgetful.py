"""Run by torchrun in `test_stream_together.py`: sinklens on a system that keeps no block that a process is done with.

Whoever comes later has to fetch it from the disk again.
"""

from __future__ import annotations

import os

from sinklens.cli.main import run
from sinklens.models.streaming import StreamedBlocks

own = StreamedBlocks.free


def free(self: StreamedBlocks, index: int) -> None:
    own(self, index)
    for key in self.recipes.groups[index].keys:
        path, header = self.recipes.stored.where[key]
        file = os.open(path, os.O_RDONLY)
        os.posix_fadvise(file, header.start, header.nbytes, os.POSIX_FADV_DONTNEED)
        os.close(file)


StreamedBlocks.free = free  # pyright: ignore[reportAttributeAccessIssue]
run()
