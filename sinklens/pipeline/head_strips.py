"""The prompts whose attention by head goes into the report: the first ones, as many as stay small."""

from __future__ import annotations

from sinklens.core.head_strip import HeadStrip
from sinklens.tracers import signals as sig
from sinklens.tracers.trace import Trace

MOST_PROMPTS, MOST_VALUES = 8, 250_000
"""Values are single precision: 250,000 of them are 1.3 MB of the report."""


def head_strips(trace: Trace) -> tuple[HeadStrip, ...]:
    """One strip per prompt; the first one also if it alone is larger than that, up to twice the size."""
    strips: list[HeadStrip] = []
    room = MOST_VALUES
    for place, record in enumerate(trace):
        if sig.ATTENTION_RECEIVED.name not in record.arrays:
            continue
        received = record[sig.ATTENTION_RECEIVED]
        room -= received.size
        if len(strips) == MOST_PROMPTS or room < (0 if strips else -MOST_VALUES):
            break
        strips.append(HeadStrip(place, record[sig.KEPT_POSITIONS], received))
    return tuple(strips)
