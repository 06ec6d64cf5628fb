"""What is said of numbers that were estimated from a sample of the query rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from sinklens.tracers import signals as sig
from sinklens.tracers.trace import PromptRecord


def sampled_rows(records: list[PromptRecord]) -> dict[str, int]:
    """How many query rows the median prompt was looked at in, and of how many; nothing if in all."""
    looked = [len(record.arrays.get(sig.SAMPLED_ROWS, record.token_ids)) for record in records]
    if not any(sig.SAMPLED_ROWS in record.arrays for record in records):
        return {}
    return {"rows_sampled": int(np.median(looked)), "rows_in_all": int(np.median([len(r) for r in records]))}


def estimated(summary: Mapping[str, Any]) -> str:
    """The sentence that says that numbers are estimates; empty where they are not."""
    if "rows_sampled" not in summary:
        return ""
    return (
        f" Estimated from {summary['rows_sampled']} of {summary['rows_in_all']} query rows: attention received "
        f"{100 * summary['share']:.1f} ± {196 * summary['share_se']:.1f} %, rate between {summary['rate_low']:.1f} and "
        f"{summary['rate_high']:.1f} % (95 %)."
    )
