"""'Did you mean': the nearest of the known names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def closest(name: str, known: Iterable[str], *, limit: int = 3) -> list[str]:
    """Up to `limit` known names that look like `name`, nearest first."""
    table = {candidate.lower(): candidate for candidate in known}
    found = difflib.get_close_matches(name.lower(), table, n=limit, cutoff=0.5)
    inside = [key for key in table if name.lower() in key and key not in found]
    return [table[key] for key in [*found, *inside][:limit]]


def did_you_mean(name: str, known: Iterable[str]) -> str | None:
    """A sentence that names the nearest known names, or None."""
    found = closest(name, known)
    return f"Did you mean {' or '.join(repr(item) for item in found)}?" if found else None
