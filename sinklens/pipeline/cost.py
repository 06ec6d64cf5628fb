"""What there is and what it takes: free memory, and sizes and times for people."""

from __future__ import annotations

import os
import re

from sinklens.core.errors import UsageError


def available_memory(device: str | None = None) -> int | None:
    """Free memory in bytes of this machine, or of a CUDA device; None where the system does not tell it."""
    if device is not None and device.startswith("cuda"):
        import torch

        return torch.cuda.mem_get_info(device)[0] if torch.cuda.is_available() else None
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None


def parse_size(text: str | int, option: str) -> int:
    """Bytes from `2GB`, `500 MB`, `1.5GiB` or a plain number.

    Raises:
        UsageError: It is none of these.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", str(text), flags=re.IGNORECASE)
    if found is None:
        raise UsageError(f"{option} is a size, not {text!r}.", hint=f"For instance: {option} 2GB")
    number, unit, binary = found.groups()
    return round(float(number) * (1024 if binary else 1000) ** " kmgt".index(unit.lower() or " "))


def size(count: int | None) -> str:
    """Bytes for people: 512 B, 3.1 MB, 61 GB."""
    value = float(count or 0)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def duration(seconds: float) -> str:
    """Seconds for people, with the coarseness of an estimate."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
