"""What there is and what it takes: free memory, and sizes and times for people."""

from __future__ import annotations

import os


def available_memory() -> int | None:
    """Free memory of this machine in bytes, None where the system does not tell it."""
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None


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
