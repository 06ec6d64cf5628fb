"""The vocabulary of a trace: every quantity that can be recorded, with its axes and unit.

Axes: `layer` blocks of the tower; `head` query heads; `pos` all tokens of one prompt, counted from its first
real token; `kept` the positions listed in `kept_positions`; `rank` strongest first; `expert` routed experts;
`slot` the experts chosen for one token; `bin` equal bins of [0, 1].

Each prompt has its own arrays. Nothing is averaged over prompts before an analyzer asks for it, because
thresholds apply per prompt. A layer that lacks the quantity holds NaN (floats) or -1 (integers).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Source(StrEnum):
    """The tap that a signal needs."""

    ATTENTION = "attention"
    RESIDUAL = "residual"
    DOWN_PROJ = "down_proj"
    EXPERTS = "experts"


@dataclass(frozen=True)
class Signal:
    """One recordable quantity. Signals are compared and stored by name."""

    name: str
    source: Source
    axes: tuple[str, ...]
    unit: str
    meaning: str


FIRST_MASS_BINS = 20

_A, _R, _D, _E = Source.ATTENTION, Source.RESIDUAL, Source.DOWN_PROJ, Source.EXPERTS

ATTENTION_RECEIVED = Signal(
    "attention_received", _A, ("layer", "head", "kept"), "share",
    "mean attention a key receives from the queries that see it (diagonal included)",
)  # fmt: skip
ATTENTION_RECEIVED_MEAN = Signal(
    "attention_received_mean",
    _A,
    ("layer", "pos"),
    "share",
    "the same for every position, averaged over heads",
)
ATTENTION_RECEIVED_PEAK = Signal(
    "attention_received_peak",
    _A,
    ("pos",),
    "share",
    "the same for every position, largest over layers and heads",
)
KEPT_POSITIONS = Signal("kept_positions", _A, ("kept",), "position", "positions stored per head, ascending")
VISIBLE_QUERIES = Signal(
    "visible_queries",
    _A,
    ("layer", "pos"),
    "count",
    "real queries that see the key: the divisor of the means",
)
ATTENTION_SELF = Signal(
    "attention_self", _A, ("layer", "head", "kept"), "share", "attention of a position to itself"
)
ATTENTION_TOP1 = Signal(
    "attention_top1", _A, ("layer", "head", "kept"), "share",
    "share of the queries that see the key whose largest weight is on it",
)  # fmt: skip
ATTENTION_ENTROPY = Signal(
    "attention_entropy",
    _A,
    ("layer", "head"),
    "nats",
    "-sum A log A over keys, mean over queries (a learned sink is no key)",
)
ATTENTION_DISTANCE = Signal(
    "attention_distance", _A, ("layer", "head"), "tokens", "mean distance to the attended key, over queries"
)
ATTENTION_ROW_MAX = Signal(
    "attention_row_max", _A, ("layer", "head"), "share", "largest weight of a row, mean over queries"
)
FIRST_MASS = Signal(
    "first_mass", _A, ("layer", "head", "bin"), "count",
    "histogram over queries (the first token's own row excluded) of the mass on the first token",
)  # fmt: skip
LEARNED_SINK_MASS = Signal(
    "learned_sink_mass", _A, ("layer", "head"), "share", "mass on a learned sink logit, mean over queries"
)
VALUE_NORM = Signal(
    "value_norm",
    _A,
    ("layer", "kv_head", "kept"),
    "L2 norm",
    "norm of the value states of the kept positions",
)
VALUE_NORM_MEAN = Signal(
    "value_norm_mean", _A, ("layer", "kv_head"), "L2 norm", "mean norm of the value states over all positions"
)
RESIDUAL_NORM = Signal(
    "residual_norm", _R, ("layer", "pos"), "L2 norm", "norm of the residual stream after a block"
)
RESIDUAL_MEDIAN = Signal(
    "residual_median", _R, ("layer",), "abs", "lower median of |h| over all real tokens and dims of the layer"
)
RESIDUAL_TOP = Signal(
    "residual_top",
    _R,
    ("layer", "rank"),
    "signed value",
    "largest |h| entries, with their positions and dims",
)
DOWN_PROJ_TOP = Signal(
    "down_proj_top", _D, ("layer", "rank"), "signed value",
    "largest |output| entries of the dense or shared-expert down projection, with positions and dims",
)  # fmt: skip
EXPERT_MAX = Signal(
    "expert_max", _E, ("layer", "expert"), "signed value",
    "largest |down_proj output| over the tokens routed to the expert, before the routing weight",
)  # fmt: skip
EXPERT_FIRST_ROW = Signal(
    "expert_first_row", _E, ("layer", "expert"), "abs-max",
    "the same for the first routed row only (by slot, then token), as a hook on output[0] sees it",
)  # fmt: skip
EXPERT_TOKENS = Signal("expert_tokens", _E, ("layer", "expert"), "count", "tokens routed to the expert")
ROUTER_CHOICE = Signal(
    "router_choice", _E, ("layer", "kept", "slot"), "expert", "experts chosen for the kept positions"
)
ROUTER_WEIGHT = Signal(
    "router_weight", _E, ("layer", "kept", "slot"), "share", "routing weights of the kept positions"
)

ALL_SIGNALS: tuple[Signal, ...] = tuple(
    value for value in list(globals().values()) if isinstance(value, Signal)
)
BY_NAME = {signal.name: signal for signal in ALL_SIGNALS}

# A ranked signal is stored as three arrays: `<name>` (values), `<name>_pos` and `<name>_dim`.
PLACED = frozenset({RESIDUAL_TOP, DOWN_PROJ_TOP, EXPERT_MAX})
