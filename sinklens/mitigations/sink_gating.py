"""Visual sink gating: the attention on visual sinks and on the other visual tokens times a gate each."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from types import MappingProxyType

import torch
from jaxtyping import Bool
from torch import Tensor

from sinklens.core.errors import UsageError
from sinklens.core.papers import VISUAL_SINK_GATING
from sinklens.inputs.spans import Kind
from sinklens.kernels.key_sets import Factors, KeySets, Shares
from sinklens.models.spec import Tower

from .base import Seen, registry
from .kinds import kinds_of
from .visual import VisualSinkMethod

Gate = float | Collection[float]


@registry.register("sink-gating")
@dataclass(frozen=True, kw_only=True)
class SinkGating(VisualSinkMethod):
    """Opens or closes what text reads from visual sinks, and from the other visual tokens, layer by layer.

    How it is computed: a visual token is a sink of a layer if φ of the state that enters it reaches a threshold; sinks
    are found while the prompt is read and kept. In every row of a text token the weights on visual sinks are
    multiplied by `sink`, those on other visual tokens by `rest`, and the row is divided by its new sum, in which a
    learned sink logit takes part. This equals adding ln(gate) to the logits. Rows that would have nothing left stay
    as they are.

    Compared with the paper: there the gates are trained on the next-token loss with the model frozen, and multiply
    the contribution of sinks that came from the vision tower. Here they are given, nothing is trained, sinks are
    those of the language model's own states, and rows add up to 1 again.

    When not to trust it: φ with the sink dims of another model means nothing. With renormalisation a closed gate
    gives its attention to whatever else the row reads, text sinks first of all, so an effect need not come from the
    visual tokens. Gates far from 1 push the model to states it was not trained on.

    Args:
        sink: Gate of visual sinks, at least 0: one number, or one per layer of the model.
        rest: Gate of the other visual tokens, likewise.
    """

    sink: Gate = 1.0
    rest: Gate = 1.0

    name = "sink-gating"
    title = "Visual sink gating"
    formula = (
        '<math display="block"><msub><msup><mi>A</mi><mo>′</mo></msup><mrow><mi>q</mi><mi>k</mi></mrow></msub>'
        "<mo>=</mo><mfrac><mrow><msub><mi>g</mi><mi>k</mi></msub><msub><mi>A</mi><mrow><mi>q</mi><mi>k</mi></mrow></msub>"
        "</mrow><mrow><munder><mo>∑</mo><mi>j</mi></munder><msub><mi>g</mi><mi>j</mi></msub><msub><mi>A</mi><mrow><mi>q</mi>"
        "<mi>j</mi></mrow></msub></mrow></mfrac><mspace width='1em'/><mi>g</mi><mo>∈</mo><mo>{</mo><msub><mi>g</mi>"
        "<mi>s</mi></msub><mo>,</mo><msub><mi>g</mi><mi>r</mi></msub><mo>,</mo><mn>1</mn><mo>}</mo></math>"
    )
    reference = VISUAL_SINK_GATING.at("layer-wise sink gating")
    grid = MappingProxyType({"sink": (0.0, 0.5, 2.0), "rest": (1.0, 1.5)})

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("sink", "rest"):
            value = getattr(self, key)
            gates = (float(value),) if isinstance(value, int | float) else tuple(float(v) for v in value)
            if not gates or any(not math.isfinite(gate) or gate < 0 for gate in gates):
                raise UsageError(
                    f"{self.name}: {key} must be a number of at least 0, or one per layer, got {value}."
                )
            object.__setattr__(self, key, gates[0] if isinstance(value, int | float) else gates)

    @property
    def identity(self) -> bool:
        return all(gate == 1.0 for value in (self.sink, self.rest) for gate in _listed(value))

    def check(self, tower: Tower) -> None:
        super().check(tower)
        for key in ("sink", "rest"):
            value = getattr(self, key)
            if not isinstance(value, float) and len(value) != len(tower.blocks):
                raise UsageError(
                    f"{self.name}: {key} has {len(value)} gates, and the model has {len(tower.blocks)} layers.",
                    hint="Give one number for all layers, or one per layer.",
                )

    def gates(self, layer: int) -> tuple[float, float]:
        """Of visual sinks and of other visual tokens in a layer."""
        sink, rest = (_listed(value) for value in (self.sink, self.rest))
        return sink[layer % len(sink)], rest[layer % len(rest)]

    def rows(self, seen: Seen) -> Bool[Tensor, "batch query"]:
        return self.text_rows(seen)

    def sets(self, seen: Seen) -> KeySets | None:
        """Visual sinks, and the other visual tokens."""
        gates = self.gates(seen.site.layer)
        if gates == (1.0, 1.0):
            return None
        real = seen.tokens.real(seen.call)
        visual = kinds_of(seen.tokens, seen.call, seen.config) == int(Kind.VISUAL)
        sinks = visual & seen.watch.sinks(seen.site.layer, real)
        if not bool(visual.any()):
            seen.nothing("no prompt has visual tokens")
            return None
        if gates[1] == 1.0 and not bool(sinks.any()):
            seen.nothing("no visual token is a sink by its state")
            return None
        seen.memory["gates"] = gates
        return self.placed(seen, [sinks, visual & ~sinks])

    def factors(self, seen: Seen, shares: Shares) -> Factors:
        return gated(shares, seen.memory["gates"])


def gated(shares: Shares, gates: tuple[float, ...]) -> Factors:
    """Each set times its gate, rows divided by their new sum; rows without anything left are left alone."""
    factors = torch.tensor(gates, dtype=shares.mass.dtype, device=shares.mass.device).expand_as(shares.mass)
    divisor = (factors * shares.mass).sum(-1) + shares.rest + shares.learned
    return Factors(factors, divisor, divisor > 0)


def _listed(value: Gate) -> tuple[float, ...]:
    return (value,) if isinstance(value, int | float) else tuple(value)
