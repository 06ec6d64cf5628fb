"""The vocabulary of a trace: every quantity that can be recorded, with its axes and unit.

Axes: `layer` blocks of the tower; `head` query heads; `pos` all tokens of one prompt, counted from its first
real token; `kept` the positions listed in `kept_positions`; `rank` strongest first; `expert` routed experts;
`slot` the experts chosen for one token; `bin` equal bins of [0, 1]; `reference` the two reference positions;
`entry` traced entries of a block; `birth` alignments in order of layer; `part` see `PARTS`; `row`, `col` the first
tokens; `variant` see the signal; `vision_layer`, `vision_head` blocks and heads of the vision tower; `patch` places in
the vision tower's own sequence, in which `PatchGrid.members` counts (several tiles or pictures follow each other).

Each prompt has its own arrays. Nothing is averaged over prompts before an analyzer asks for it, because
thresholds apply per prompt. A layer that lacks the quantity holds NaN (floats) or -1 (integers), and so does what
has no value: a reference position that does not exist, a mean over no query, tokens beyond a short prompt. Only where
no layer of the model can show a quantity its signal is left out of the records: families that compute attention by
hand (BLOOM, GPT-J) show their weights but no query, key or value, so they have no norms of those, no cosines and no
logits; a quantised output projection has no norms behind it.
"""

from __future__ import annotations

from . import signals_pictures
from .signal import Signal as Signal
from .signal import Source as Source
from .signals_vision import EMBEDDED_NORM as EMBEDDED_NORM
from .signals_vision import OBJECT_SHARE as OBJECT_SHARE
from .signals_vision import VISION_NORM as VISION_NORM
from .signals_vision import VISION_RECEIVED as VISION_RECEIVED
from .signals_vision import VISION_RECEIVED_PEAK as VISION_RECEIVED_PEAK
from .signals_vision import VISION_VISIBLE as VISION_VISIBLE
from .signals_visual import CLASS_VALUE_NORM as CLASS_VALUE_NORM
from .signals_visual import CONTRIBUTION as CONTRIBUTION
from .signals_visual import INPUT_LARGE as INPUT_LARGE
from .signals_visual import INPUT_REFERENCE as INPUT_REFERENCE
from .signals_visual import INPUT_TYPICAL as INPUT_TYPICAL
from .signals_visual import KEY_CLASS_COUNT as KEY_CLASS_COUNT
from .signals_visual import KEY_CLASS_MASS as KEY_CLASS_MASS
from .signals_visual import NONSINK_RATIO as NONSINK_RATIO
from .signals_visual import NONSINK_RATIO_MEAN as NONSINK_RATIO_MEAN
from .signals_visual import PHI as PHI
from .signals_visual import TEXT_RECEIVED as TEXT_RECEIVED
from .signals_visual import VISUAL_MASS as VISUAL_MASS
from .signals_visual import VISUAL_SINK_MASS as VISUAL_SINK_MASS

FIRST_MASS_BINS = 20
SAMPLED_ROWS = "sampled_rows"
"""The array of a record that names the query rows looked at, ascending; absent where all were."""
ERROR = "_se"
"""`<name>_se` is the standard error of a signal that was estimated from a sample of the query rows; see `sampling`."""

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

# Two positions are looked at more closely while a prompt runs, before anyone knows where its sinks are. Slot 0 of the
# `reference` axis is the first real token. Slot 1 is the leader: of the other positions that enough queries see, the
# one that received most attention in the layers before this one, so the first layer has none (without attention: the
# one with the largest norm). Attention, states and experts of a layer share the positions.
REFERENCES = 2
REFERENCE_POSITION = Signal(
    "reference_position", _A, ("layer", "reference"), "position",
    "the first token, and the other position that received most attention in the layers before; -1 if there is none",
)  # fmt: skip
REFERENCE_MASS = Signal(
    "reference_mass", _A, ("layer", "head", "reference", "bin"), "count",
    "histogram over the queries after the reference position of the mass they put on it",
)  # fmt: skip
ATTENTION_ENTROPY_NORMALISED = Signal(
    "attention_entropy_normalised", _A, ("layer", "head"), "ratio",
    "row entropy over the logarithm of the keys the row sees (0 for one key), mean over queries",
)  # fmt: skip
COLUMN_ENTROPY = Signal(
    "column_entropy", _A, ("layer", "head", "kept"), "ratio",
    "entropy of a key's column of weights, normalised to sum 1, over the logarithm of the queries that see it",
)  # fmt: skip
COLUMN_ENTROPY_PEAK = Signal(
    "column_entropy_peak", _A, ("layer", "head"), "ratio",
    "the largest of those over all keys that enough queries see, with its position",
)  # fmt: skip
ATTENTION_TAIL = Signal(
    "attention_tail", _A, ("layer", "head", "kept"), "share", "mean weight on a key over the last 64 queries"
)
TAIL_ENTROPY = Signal(
    "tail_entropy", _A, ("layer", "head"), "nats", "entropy of that mean distribution over all keys"
)
TAIL_PEAK = Signal(
    "tail_peak", _A, ("layer", "head"), "share", "largest entry of that mean distribution, with its position"
)
QK_COSINE = Signal(
    "qk_cosine", _A, ("layer", "head", "reference"), "cosine",
    "cosine of query and reference key as the attention sees them, mean over the queries after the reference",
)  # fmt: skip
QK_COSINE_OTHERS = Signal(
    "qk_cosine_others", _A, ("layer", "head"), "cosine",
    "the same for all keys but the references: mean over all pairs of a query and a key, visible or not",
)  # fmt: skip
KEY_NORM = Signal(
    "key_norm", _A, ("layer", "kv_head", "kept"), "L2 norm",
    "norm of the key states as the attention sees them (after q/k norm and rotation)",
)  # fmt: skip
KEY_NORM_MEAN = Signal(
    "key_norm_mean", _A, ("layer", "kv_head"), "L2 norm", "mean norm of the key states over all positions"
)
VALUE_OUT_NORM = Signal(
    "value_out_norm", _A, ("layer", "head", "kept"), "L2 norm",
    "norm of v W_O: the value state through the head's slice of the output projection",
)  # fmt: skip
VALUE_OUT_NORM_MEAN = Signal(
    "value_out_norm_mean", _A, ("layer", "head"), "L2 norm", "mean of that over all positions"
)
HEAD_OUTPUT_NORM = Signal(
    "head_output_norm", _A, ("layer", "head"), "L2 norm",
    "norm of what the head writes, (A v) W_O, mean over queries",
)  # fmt: skip
PREFIX = 16
PREFIX_MAP = Signal(
    "prefix_map", _A, ("layer", "row", "col"), "share",
    "attention among the first 16 tokens, mean over heads (causal attention only)",
)  # fmt: skip
PREFIX_LOGITS = Signal(
    "prefix_logits",
    _A,
    ("layer", "row", "col"),
    "nats",
    "the logits of that map, mean over heads; NaN where hidden",
)
LOCAL_DISTANCE = Signal(
    "local_distance", _A, ("variant", "pos"), "tokens",
    "WAAD: distance to the attended key, cut at 10 tokens, mean over the 30 % of heads that look back least; "
    "variant 0 as it is, 1 without the first token's column, rows renormalised; a head takes no part in a row in "
    "which it leaves less than 0.0001 beside it",
)  # fmt: skip
FUTURE_INFLUENCE = Signal(
    "future_influence", _A, ("variant", "pos"), "share",
    "FAI: mean attention from the queries 10 to 100 tokens later, over the 30 % of heads that look back farthest; "
    "NaN where no such query exists; variants as in local_distance. In variant 1 a query that leaves less than "
    "0.0001 beside the first token is left out, of the divisor as well (from 0.0002 on it counts in full, between "
    "the two in part); NaN where none is left",
)  # fmt: skip
PROBE_RECEIVED = Signal(
    "probe_received", _A, ("layer", "pos"), "share",
    "mean attention a key receives from the probe queries that see it (the last 5 % and as many others, drawn with "
    "a seed), mean over heads; NaN if none sees it",
)  # fmt: skip
PROBE_VISIBLE = Signal(
    "probe_visible", _A, ("layer", "pos"), "count", "probe queries that see the key: the divisor of that mean"
)
RESIDUAL_COSINE = Signal(
    "residual_cosine", _R, ("layer", "reference", "pos"), "cosine",
    "cosine of a position's state with the reference position's state after the same block",
)  # fmt: skip

# The strongest entries of a block's output and of its input, each traced to what wrote it: `entry` lists the 16
# largest of the output, then the 16 largest of the input (an entry may be in both). after = before + attention + mlp.
# Blocks that end with a LayerNorm: `after` is that norm's input, `before` the block's, and `attention` what the
# attention and the first LayerNorm together make of it. Where the sum does not hold, the two additions are NaN.
ENTRIES = 32
RESIDUAL_AFTER = Signal(
    "residual_after",
    _R,
    ("layer", "entry"),
    "signed value",
    "value after the block, with its position and dim",
)
RESIDUAL_BEFORE = Signal("residual_before", _R, ("layer", "entry"), "signed value", "value before the block")
ATTENTION_WRITE = Signal(
    "attention_write", _R, ("layer", "entry"), "signed value", "what the attention sublayer adds to it"
)
MLP_WRITE = Signal(
    "mlp_write", _R, ("layer", "entry"), "signed value", "what the feed-forward part adds to it"
)
WRITE_EXPERT = Signal(
    "write_expert", _R, ("layer", "entry"), "expert",
    "the routed expert with the largest part in mlp_write; -1 in dense blocks and where the part is small",
)  # fmt: skip
WRITE_EXPERT_VALUE = Signal(
    "write_expert_value", _R, ("layer", "entry"), "signed value", "that part, with its routing weight"
)
WRITE_NEURON = Signal(
    "write_neuron", _R, ("layer", "entry"), "neuron",
    "the input of the down projection (of the expert, in MoE blocks) with the largest part; -1 where not looked up",
)  # fmt: skip
WRITE_NEURON_VALUE = Signal(
    "write_neuron_value", _R, ("layer", "entry"), "signed value",
    "that part, before a norm after the sublayer and before the routing weight",
)  # fmt: skip

# A birth: the block after which a position is first aligned with a reference (|cosine| > 0.9 and a norm of at least
# 3 times the median), not having been before it. Filled up with -1 and NaN.
BIRTHS = 64
BIRTH_COSINE_AT, BIRTH_NORM_RATIO = 0.9, 3.0
PARTS = ("input", "gate", "up", "act", "product", "down")
BIRTH_LAYER = Signal("birth_layer", _R, ("birth",), "layer", "the block after which the position is aligned")
BIRTH_POSITION = Signal("birth_position", _R, ("birth",), "position", "the position")
BIRTH_REFERENCE = Signal("birth_reference", _R, ("birth",), "position", "the position it is aligned with")
BIRTH_COSINE = Signal(
    "birth_cosine", _R, ("birth", "part"), "cosine",
    "cosine with the reference inside the feed-forward part: its input, gate, up, act(gate), product, output; "
    "NaN for parts the block does not have or, in MoE blocks, does not share between the two tokens",
)  # fmt: skip
BIRTH_WRITE_NORM = Signal(
    "birth_write_norm", _R, ("birth",), "L2 norm", "norm of what the feed-forward part adds at the position"
)
EXPERT_NEURON = Signal(
    "expert_neuron", _E, ("layer", "expert"), "neuron",
    "the input of the expert's down projection with the largest part in expert_max; -1 if not looked up",
)  # fmt: skip
ROUTER_SCORE = Signal(
    "router_score", _E, ("layer", "reference", "expert"), "share",
    "router score of every expert at the reference positions, before the choice",
)  # fmt: skip
ROUTER_SCORE_OTHERS = Signal(
    "router_score_others", _E, ("layer", "expert"), "share", "mean of the same over all other positions"
)
ROUTER_FREQUENCY_OTHERS = Signal(
    "router_frequency_others",
    _E,
    ("layer", "expert"),
    "share",
    "how often the other positions choose the expert",
)

ALL_SIGNALS: tuple[Signal, ...] = tuple(
    value for value in [*globals().values(), *vars(signals_pictures).values()] if isinstance(value, Signal)
)
BY_NAME = {signal.name: signal for signal in ALL_SIGNALS}

# A ranked signal is stored as three arrays: `<name>` (values), `<name>_pos` and `<name>_dim`.
PLACED = frozenset({RESIDUAL_TOP, DOWN_PROJ_TOP, EXPERT_MAX, RESIDUAL_AFTER, INPUT_LARGE})
# Of these only the position is stored besides, as `<name>_pos`.
POSITIONED = frozenset({COLUMN_ENTROPY_PEAK, TAIL_PEAK, INPUT_REFERENCE, VISION_RECEIVED_PEAK})
# Lists of no fixed length over all layers; the layer is stored too, as `<name>_layer`.
LISTED = frozenset({INPUT_LARGE})
