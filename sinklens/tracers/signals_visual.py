"""The part of the vocabulary that speaks of sink dims and of what text reads from pictures (see `signals`).

States are those that *enter* a block. Text queries are the tokens after the first picture that are neither visual nor
delimiters: the question and what the model has generated. Which tokens are sinks of a block is decided from the
state that enters it, by the sink dims and the threshold of the run (`tracing["sinks"]`).
"""

from __future__ import annotations

from .signal import Signal, Source

_A, _R = Source.ATTENTION, Source.RESIDUAL

LEAST_ENERGY = 0.02
"""Share of a state's energy from which an entry is listed in `input_large`.

Every entry with at least this share is listed, however many there are (at most 50 per state). So any threshold of 2 %
of the energy or more is decided exactly on a saved run, for any choice of dims: VAR's share of 9.8 %, and its tau of 20
in models of up to 20000 dims. At 4096 dims these are all entries above 9.05 in units of the root mean square.
"""

INPUT_LARGE = Signal(
    "input_large", _R, ("large",), "ratio",
    "x / RMS(x) of every entry that has at least 2 % of the energy of the state that enters a block",
)  # fmt: skip
INPUT_TYPICAL = Signal(
    "input_typical", _R, ("layer", "dim"), "ratio",
    "lower median of |x| / RMS(x) over the tokens (over 256 of them, evenly spread, in longer prompts)",
)  # fmt: skip
INPUT_REFERENCE = Signal(
    "input_reference", _R, ("layer", "reference", "dim"), "ratio",
    "|x| / RMS(x) of the reference tokens, with their positions",
)  # fmt: skip
PHI = Signal(
    "phi", _R, ("layer", "pos"), "ratio", "largest |x| / RMS(x) of a token over the sink dims of the run"
)

SHARE_BINS = 20
MASS_FLOORS = (0.0, 0.1, 0.2, 0.3, 0.5)
KEY_CLASSES = ("visual", "visual sink", "text sink", "delimiter", "text")
"""Sinks are counted as such and in no other class; a delimiter is a sink of the text."""

VISUAL_MASS = Signal(
    "visual_mass", _A, ("layer", "head", "share_bin"), "count",
    "histogram over the text queries of the mass they put on visual tokens",
)  # fmt: skip
VISUAL_SINK_MASS = Signal(
    "visual_sink_mass", _A, ("layer", "head", "share_bin"), "count",
    "histogram over the text queries of the mass they put on visual sinks",
)  # fmt: skip
NONSINK_RATIO = Signal(
    "nonsink_ratio", _A, ("layer", "head", "floor", "share_bin"), "count",
    "histogram over the text queries, by mass on visual tokens (from 0, 0.1, 0.2, 0.3, 0.5 on), of the share of that "
    "mass on visual tokens that are no sinks; queries that put nothing on visual tokens are left out",
)  # fmt: skip
NONSINK_RATIO_MEAN = Signal(
    "nonsink_ratio_mean", _A, ("layer", "head", "floor"), "share",
    "the same share, mean over the text queries that put at least this much on visual tokens; NaN if none does",
)  # fmt: skip
KEY_CLASS_MASS = Signal(
    "key_class_mass", _A, ("layer", "head", "key_class"), "share",
    "mean mass of the text queries on visual tokens, visual sinks, text sinks, delimiters, other text",
)  # fmt: skip
KEY_CLASS_COUNT = Signal(
    "key_class_count",
    _A,
    ("layer", "key_class"),
    "count",
    "tokens of each class that some text query sees",
)
TEXT_RECEIVED = Signal(
    "text_received", _A, ("layer", "pos"), "share",
    "attention a key receives from the text queries that see it, mean over them and over heads; NaN if none sees it",
)  # fmt: skip
CONTRIBUTION = Signal(
    "contribution", _A, ("layer", "head", "key_class"), "L2 norm",
    "norm of A v W_O, what a key adds to a text query, mean over text queries and the tokens of the class; NaN "
    "without such a token",
)  # fmt: skip
CLASS_VALUE_NORM = Signal(
    "class_value_norm", _A, ("layer", "head", "key_class"), "L2 norm",
    "norm of v W_O, mean over the tokens of the class",
)  # fmt: skip

OF_INPUTS = frozenset({INPUT_LARGE, INPUT_TYPICAL, INPUT_REFERENCE, PHI})
OF_TEXT_QUERIES = frozenset({
    VISUAL_MASS, VISUAL_SINK_MASS, NONSINK_RATIO, NONSINK_RATIO_MEAN, KEY_CLASS_MASS, KEY_CLASS_COUNT, TEXT_RECEIVED,
    CONTRIBUTION, CLASS_VALUE_NORM,
})  # fmt: skip
OF_CONTRIBUTIONS = frozenset({CONTRIBUTION, CLASS_VALUE_NORM})
OF_PICTURES = OF_TEXT_QUERIES | {INPUT_LARGE, PHI}
"""Recorded of prompts with pictures only."""
