"""Scratch memory of the blocked kernels, kept between calls.

A block of logits is a few megabytes. Allocating it anew for every block costs more than filling it (the pages
have to be mapped), so each thread keeps one buffer per role. `release` gives them back.
"""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor


class Workspace:
    """Named flat buffers that grow on demand. A tensor is valid until its name is taken again."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """An uninitialised contiguous tensor."""
        key, size = (name, device, dtype), math.prod(shape)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < size:
            self._buffers.pop(key, None)  # freed before the larger one is made
            # A tensor made inside inference mode could not be written to outside of it.
            with torch.inference_mode(False):
                buffer = self._buffers[key] = torch.empty(size, dtype=dtype, device=device)
        return buffer[:size].view(shape)

    def release(self) -> None:
        """Free all buffers."""
        self._buffers.clear()

    @property
    def bytes(self) -> int:
        """Memory held."""
        return sum(buffer.nbytes for buffer in self._buffers.values())


_of_thread = threading.local()


def workspace() -> Workspace:
    """The workspace of this thread."""
    if not hasattr(_of_thread, "workspace"):
        _of_thread.workspace = Workspace()
    return _of_thread.workspace
