"""The part of the vocabulary that looks closely at the tokens of pictures: what they mean when they enter the language
model, how they change there, and what they give each other (see `signals`).

Axes: `visual` the visual tokens of a prompt in order; `rank` nearest first; `reason` see `REASONS`; `query_set` see
`QUERY_SETS`; `sublayer` attention, feed-forward part; `trace` as it is, and divided by its sum. States are those that
*enter* a block. Recorded of prompts with pictures only.
"""

from __future__ import annotations

from .signal import Signal, Source

_A, _R = Source.ATTENTION, Source.RESIDUAL

LENS_RANKS = 10
REASONS = ("pad", "placeholder", "beyond the tokenizer", "untrained")
"""Why a row of the vocabulary is no neighbour: it pads; it stands for a picture; no token has it; other rows are equal
to it to the last bit, so it was never trained (or it is zero)."""
QUERY_SETS = ("text", "last", "generated")
"""The text after the first picture; the last token of the prompt; what the model has generated."""
PAIR_SETS = ("text", "visual")

LENS_ID = Signal(
    "lens_id", _R, ("layer", "visual", "rank"), "token",
    "tokens of the vocabulary whose input embedding has the largest cosine with a visual token's state",
)  # fmt: skip
LENS_COSINE = Signal("lens_cosine", _R, ("layer", "visual", "rank"), "cosine", "those cosines")
LENS_EXCLUDED = Signal(
    "lens_excluded",
    _R,
    ("reason",),
    "count",
    "rows of the vocabulary that were left out, by the first reason",
)
VISUAL_UNIT = Signal(
    "visual_unit", _R, ("visual", "dim"), "ratio",
    "direction of a visual token's state where it enters the first block (half precision)",
)  # fmt: skip
VISUAL_DRIFT = Signal(
    "visual_drift", _R, ("layer", "visual"), "cosine",
    "cosine of a visual token's state entering a block with its state entering the first",
)  # fmt: skip
VISUAL_FIRST_COSINE = Signal(
    "visual_first_cosine", _R, ("layer", "visual"), "cosine",
    "cosine of a visual token's state with that of the first token that is not visual, entering a block",
)  # fmt: skip
VISUAL_SPECTRUM = Signal(
    "visual_spectrum", _R, ("picture", "value"), "singular value",
    "singular values of the visual tokens of a picture where they enter the first block, not centred",
)  # fmt: skip
TRANSITION_RATIO = Signal(
    "transition_ratio", _R, ("layer", "sublayer", "pos"), "ratio",
    "norm of a sublayer's output over that of its (normalised) input",
)  # fmt: skip
TRANSITION_COSINE = Signal(
    "transition_cosine", _R, ("layer", "sublayer", "pos"), "cosine", "cosine of a sublayer's input and output"
)
QUERIES_RECEIVED = Signal(
    "queries_received", _A, ("layer", "query_set", "pos"), "mass",
    "attention a key receives from a set of queries, summed over them, mean over heads",
)  # fmt: skip
QUERIES_VISIBLE = Signal(
    "queries_visible", _A, ("layer", "query_set", "pos"), "count", "queries of the set that see the key"
)
HEAD_MAX_RECEIVED = Signal(
    "head_max_received", _A, ("layer", "pair_set", "visual"), "share",
    "largest attention of any head to a visual token, mean over the text (visual) queries",
)  # fmt: skip
GAZE_SHIFT = Signal(
    "gaze_shift", _A, ("layer", "visual"), "share",
    "rise of the attention to a visual token from one text query to the next, mean over queries and over the half of "
    "the heads with the largest rises",
)  # fmt: skip
QUERY_ENTROPY = Signal(
    "query_entropy", _A, ("layer", "trace", "visual"), "ratio",
    "entropy of the spectrum of a visual token's queries across heads, over the logarithm of the heads",
)  # fmt: skip

LENS = frozenset({LENS_ID, LENS_COSINE, LENS_EXCLUDED})
OF_ENTRY = LENS | {VISUAL_UNIT, VISUAL_DRIFT, VISUAL_FIRST_COSINE, VISUAL_SPECTRUM}
OF_TRANSITIONS = frozenset({TRANSITION_RATIO, TRANSITION_COSINE})
OF_QUERIES = frozenset({QUERIES_RECEIVED, QUERIES_VISIBLE, HEAD_MAX_RECEIVED, GAZE_SHIFT, QUERY_ENTROPY})
PICTURE_SIGNALS = OF_ENTRY | OF_TRANSITIONS | OF_QUERIES
