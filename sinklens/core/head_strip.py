"""What every head attends to in one prompt, for a reader who picks a head on a map."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int


@dataclass(frozen=True, eq=False)
class HeadStrip:
    """Attention that the tokens of a prompt receive, by head.

    Attributes:
        prompt: Place of the prompt in the report's list.
        positions: Those that were kept per head, ascending; of others only their mean over heads is known.
        received: Mean attention from the queries that see the position; NaN in layers without attention.
    """

    prompt: int
    positions: Int[np.ndarray, " kept"]
    received: Float[np.ndarray, "layer head kept"]
