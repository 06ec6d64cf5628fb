"""'Did you mean': the nearest of the known names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def closest(name: str, known: Iterable[str], *, limit: int = 3) -> list[str]:
    """Up to `limit` known names that look like `name`, nearest first."""
    table = {candidate.lower(): candidate for candidate in known}
    wanted = name.lower()
    longer = sorted((key for key in table if key.startswith(wanted)), key=len)
    alike = difflib.get_close_matches(wanted, table, n=limit, cutoff=0.5)
    inside = [key for key in table if wanted in key]
    # What was typed and goes on is meant more often than what merely looks like it.
    ranked = dict.fromkeys([*longer[:limit], *alike, *inside])
    return [table[key] for key in ranked][:limit]


def did_you_mean(name: str, known: Iterable[str]) -> str | None:
    """A sentence that names the nearest known names, or None."""
    found = closest(name, known)
    return f"Did you mean {' or '.join(repr(item) for item in found)}?" if found else None
