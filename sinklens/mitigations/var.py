"""VAR: attention that visual and text sinks hold goes to the other visual tokens, in heads that look at pictures."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Bool
from torch import Tensor

from sinklens.core.errors import UsageError
from sinklens.core.papers import VISUAL_SINKS
from sinklens.kernels.key_sets import Factors, KeySets, Shares

from .base import Seen, registry
from .kinds import picture_of
from .visual import VisualSinkMethod

if TYPE_CHECKING:
    from .calibration import Search

Sinks = Literal["all", "visual", "text"]
Budget = Literal["visual", "text", "all"]


@registry.register("var")
@dataclass(frozen=True, kw_only=True)
class VAR(VisualSinkMethod):
    """Recycles the attention on sinks into visual tokens that are none, where a head already looks at the picture.

    How it is computed: a token is a sink of a layer if φ of the state that enters it reaches a threshold; sinks are
    found while the prompt is read and kept. For every head and text query, m_v is the attention on visual tokens and
    r the part of it on visual tokens that are no sinks. Where m_v reaches `floor` and r reaches `rho`, sinks lose the
    share `p` of their attention, and visual non-sinks get it in proportion to what they have. Every row keeps its
    sum; nothing is renormalised. The last layer is left out unless layers or heads are given.

    Compared with the paper: this is the redistribution of Kang et al. with their values; `rho` is 0.8 unless given,
    theirs for general tasks (0.5 for hallucination, 0.9 for vision-centric ones). With `recipe="code"` parameters
    mean what they mean in the authors' program: `p` is what sinks keep, `rho` the largest part of m_v on visual
    *sinks* (0.5), φ must exceed the threshold, the first two layers are left out and the last is not (the program
    means to, and does not), and nothing is done in a layer without visual sinks. The program reuses the sinks of the
    first picture for all later ones, rewrites only the first of a batch, and adds 1e-6 to every visual weight before
    the comparison with rho; none of that is copied.

    When not to trust it: gains in the paper are small, and others who ran it found losses as well. With selection of
    heads switched off (`floor=0, rho=0`) the paper's models fail. φ with the sink dims of another model means nothing.
    Where layers have no visual sink, the formula still moves what text sinks hold: `need_visual_sink` changes that.

    Args:
        p: Share of the sinks' attention that is moved (`code`: that is kept), 0 to 1.
        rho: Least part of the visual attention on non-sinks (`code`: largest part on sinks); None for the recipe's.
        floor: Least attention on visual tokens.
        sinks: Whose attention is moved.
        budget: Who gets it: visual non-sinks, text that is no sink, or all tokens that are no sinks.
        per_image: Compare and redistribute picture by picture. Text sinks then give to all pictures that pass.
        need_visual_sink: Leave layers (pictures) without visual sinks alone; None for the recipe's way.
        recipe: `paper` or `code`, see above.
    """

    p: float = 0.6
    rho: float | None = None
    floor: float = 0.2
    sinks: Sinks = "all"
    budget: Budget = "visual"
    per_image: bool = False
    need_visual_sink: bool | None = None
    recipe: Literal["paper", "code"] = "paper"

    name = "var"
    title = "VAR (visual attention redistribution)"
    formula = (
        '<math display="block"><msub><mi>Ω</mi><mi>q</mi></msub><mo>=</mo><mi>p</mi><munder><mo>∑</mo><mrow><mi>s</mi>'
        "<mo>∈</mo><mi>S</mi></mrow></munder><msub><mi>A</mi><mrow><mi>q</mi><mi>s</mi></mrow></msub><mo>,</mo>"
        "<mspace width='1em'/><msub><msup><mi>A</mi><mo>′</mo></msup><mrow><mi>q</mi><mi>s</mi></mrow></msub><mo>=</mo>"
        "<mo>(</mo><mn>1</mn><mo>−</mo><mi>p</mi><mo>)</mo><msub><mi>A</mi><mrow><mi>q</mi><mi>s</mi></mrow></msub>"
        "<mo>,</mo><mspace width='1em'/><msub><msup><mi>A</mi><mo>′</mo></msup><mrow><mi>q</mi><mi>k</mi></mrow></msub>"
        "<mo>=</mo><msub><mi>A</mi><mrow><mi>q</mi><mi>k</mi></mrow></msub><mo>+</mo><msub><mi>Ω</mi><mi>q</mi></msub>"
        "<mfrac><msub><mi>A</mi><mrow><mi>q</mi><mi>k</mi></mrow></msub><mrow><munder><mo>∑</mo><mrow><mi>j</mi>"
        "<mo>∈</mo><mi>V</mi><mo>∖</mo><mi>S</mi></mrow></munder><msub><mi>A</mi><mrow><mi>q</mi><mi>j</mi></mrow></msub>"
        "</mrow></mfrac><mspace width='1em'/><mo>(</mo><mi>k</mi><mo>∈</mo><mi>V</mi><mo>∖</mo><mi>S</mi><mo>)</mo>"
        "</math>"
    )
    reference = VISUAL_SINKS.at("visual attention redistribution")

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("p", "rho", "floor"):
            value = getattr(self, key)
            if value is not None and not 0.0 <= value <= 1.0:
                raise UsageError(f"{self.name}: {key} must be from 0 to 1, got {value}.")
        choices = {
            "sinks": ("all", "visual", "text"),
            "budget": ("visual", "text", "all"),
            "recipe": ("paper", "code"),
        }
        for key, allowed in choices.items():
            if getattr(self, key) not in allowed:
                raise UsageError(f"{self.name}: {key} must be one of {allowed}, got {getattr(self, key)!r}.")

    def search(self, **settings: Any) -> Search:
        from .var_search import VarSearch

        return VarSearch(**settings)

    @property
    def moved(self) -> float:
        """Share of the sinks' attention that goes elsewhere."""
        return self.p if self.recipe == "paper" else 1.0 - self.p

    @property
    def least_rest(self) -> float:
        """Least part of the visual attention on non-sinks."""
        if self.recipe == "code":
            return 1.0 - (0.5 if self.rho is None else self.rho)
        return 0.8 if self.rho is None else self.rho

    @property
    def strict(self) -> bool:
        return self.recipe == "code"

    @property
    def identity(self) -> bool:
        return self.moved == 0.0

    def own_layers(self, count: int) -> Collection[int]:
        return range(2, count) if self.recipe == "code" else range(count - 1)

    def rows(self, seen: Seen) -> Bool[Tensor, "batch query"]:
        return self.text_rows(seen)

    def sets(self, seen: Seen) -> KeySets | None:
        """Text sinks; then, per picture, its sinks and its other tokens."""
        found = self.groups(seen)
        if found is None:
            return None
        visual, sinks = found
        pictures = picture_of(visual) if self.per_image else torch.zeros_like(visual, dtype=torch.long)
        members = [sinks & ~visual]
        for picture in range(int(pictures.max()) + 1 if self.per_image else 1):
            mine = visual & (pictures == picture)
            members += [mine & sinks, mine & ~sinks]
        needed = self.need_visual_sink
        if self.recipe == "code" if needed is None else needed:
            seen.memory["pictures"] = torch.stack([own.any(-1) for own in members[1::2]], -1)
        return self.placed(seen, members)

    def factors(self, seen: Seen, shares: Shares) -> Factors:
        return redistributed(
            shares,
            moved=self.moved,
            least_rest=self.least_rest,
            floor=self.floor,
            sinks=self.sinks,
            budget=self.budget,
            eligible=seen.memory.get("pictures"),
        )


def redistributed(
    shares: Shares,
    *,
    moved: float,
    least_rest: float,
    floor: float,
    sinks: Sinks = "all",
    budget: Budget = "visual",
    eligible: Bool[Tensor, "batch picture"] | None = None,
) -> Factors:
    """VAR's factors.

    Args:
        shares: Masses of the text sinks, then of each picture's sinks and other tokens; the rest is other text.
        moved: Share of the sinks' mass that goes elsewhere.
        eligible: Pictures that may take part; None for all.
    """
    text, visual, other = shares.mass[..., :1], shares.mass[..., 1::2], shares.mass[..., 2::2]
    whole = visual + other
    # r >= rho, as a comparison of products: no division by a mass of 0.
    chosen = (whole >= floor) & (other >= least_rest * whole) & (other > 0)
    if eligible is not None:
        chosen = chosen & eligible[:, None, None]
    anywhere = chosen.any(-1, keepdim=True)
    zero = torch.zeros_like(text)
    from_visual = torch.where(chosen, visual, 0.0).sum(-1, keepdim=True) if sinks != "text" else zero
    from_text = torch.where(anywhere, text, 0.0) if sinks != "visual" else zero
    to_visual = torch.where(chosen, other, 0.0).sum(-1, keepdim=True) if budget != "text" else zero
    to_text = shares.rest[..., None] if budget != "visual" else zero
    target = to_visual + to_text
    edited = anywhere & (target > 0) & (from_visual + from_text > 0)
    gain = 1.0 + moved * (from_visual + from_text) / torch.where(edited, target, 1.0)
    one = torch.ones_like(gain)
    text_factor = torch.full_like(text, 1.0 - moved) if sinks != "visual" else one
    visual_factor = 1.0 - moved * chosen.to(visual.dtype) if sinks != "text" else torch.ones_like(visual)
    other_factor = torch.where(chosen, gain, 1.0) if budget != "text" else torch.ones_like(other)
    pairs = torch.stack([visual_factor, other_factor], -1).flatten(-2)
    # What is in no set is divided by D, so it gains by 1 / D, and the sets' factors must undo it.
    divisor = one if budget == "visual" else one / gain
    factors = torch.cat([text_factor, pairs], -1) * divisor
    return Factors(factors, divisor[..., 0], edited[..., 0], learned=False)
