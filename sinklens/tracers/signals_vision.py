"""The part of the vocabulary that speaks of the vision tower, and of what the language model is given of it.

Only prompts with pictures have these. `patch` counts places in the tower's own sequence, as `PatchGrid.members` does:
class token and registers included, several tiles or pictures one after the other. So `values[..., grid.members]` lays
them out on a grid of tokens, whatever order the tower reads its patches in.
"""

from __future__ import annotations

from .signal import Signal, Source

_V = Source.VISION

VISION_NORM = Signal(
    "vision_norm", _V, ("vision_layer", "patch"), "L2 norm",
    "norm of a patch's state after a block of the vision tower (class token and registers included)",
)  # fmt: skip
VISION_RECEIVED = Signal(
    "vision_received", _V, ("vision_layer", "patch"), "share",
    "mean attention a patch receives from the patches that see it (those of its own view, picture or window), mean "
    "over heads",
)  # fmt: skip
VISION_VISIBLE = Signal(
    "vision_visible", _V, ("vision_layer", "patch"), "count", "patches that see it: the divisor of that mean"
)
VISION_RECEIVED_PEAK = Signal(
    "vision_received_peak", _V, ("vision_layer", "vision_head"), "share",
    "the largest mean attention that a patch receives in a head, with its place",
)  # fmt: skip
EMBEDDED_NORM = Signal(
    "embedded_norm", _V, ("pos",), "L2 norm",
    "norm of what enters the first block: projected features at visual tokens, embeddings elsewhere",
)  # fmt: skip
OBJECT_SHARE = Signal(
    "object_share", _V, ("pos",), "share",
    "part of a visual token's cell that shows an object by the mask of its picture; NaN without a mask, for other "
    "tokens, and for cells outside the picture",
)  # fmt: skip
