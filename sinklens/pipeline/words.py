"""Display strings of vocabulary entries that a run names, for analyzers, which have no tokenizer."""

from __future__ import annotations

from typing import Any

import numpy as np

from sinklens.inputs.pieces import display_pieces
from sinklens.tracers import signals_pictures as pic
from sinklens.tracers.trace import Trace

NAMED = 3
"""Nearest vocabulary tokens of each visual token whose words are kept."""


def note_words(trace: Trace, tokenizer: Any) -> None:
    """Put `words` (id to display string) into the manifest, if the trace names vocabulary entries."""
    ids: set[int] = set()
    for record in trace:
        if pic.LENS_ID.name in record.arrays:
            ids |= set(np.unique(record[pic.LENS_ID][..., :NAMED]).tolist())
    named = sorted(ids - {-1})
    if named:
        pieces = display_pieces(tokenizer, named)
        trace.manifest["words"] = {str(token): piece for token, piece in zip(named, pieces, strict=True)}
