"""GIFT: attention to what the question turned to, and to the question, amplified where the next token is chosen."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Self

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import pad

from sinklens.core.errors import UsageError
from sinklens.core.papers import GAZE_SHIFTS
from sinklens.inputs.spans import Kind
from sinklens.kernels.key_sets import Factors, KeySets, Shares
from sinklens.models.spec import OpenedModel, Tower

from .base import Mitigation, Seen, check_head, registry
from .gaze import GazeWatch, stretched
from .kinds import choosing_rows, kinds_of, needs_pictures
from .scaling import checked_positions
from .tokens import Tokens

DEPTH, FIRST, LAST = 11 / 32, 12 / 32, 22 / 32
MOST = 50.0


@registry.register("gift")
@dataclass(frozen=True, kw_only=True)
class GIFT(Mitigation):
    """Looks harder at what the question turned to while it was read, and as much harder at the question itself.

    How it is computed: while the prompt is read, the rise of the attention to every visual token from one word of the
    question to the next is averaged over words, over the half of the heads whose rises sum to most, and over the
    saliency layers, clamped to three standard deviations around its mean, and stretched to g from 0 to 1. Then, in
    the rows that choose a token, the half of the heads with most attention on visual tokens have it multiplied by
    exp(alpha·g). s is by how much that multiplies their visual attention as a whole. The half of the heads with most
    attention on the question have that multiplied by s. Every row is divided by its new sum, in which a learned sink
    logit takes part.

    Compared with the paper: this is the method of Qi et al. as in their program. Its layers are those of
    LLaVA-1.5-7B (saliency from layer 11, amplified in 12 to 22, alpha 5) as parts of the depth; it has 10 and 14-20
    for LLaVA-1.5-13B, 14 and 5-18 with alpha 4 for Qwen2-VL-7B: `saliency=14:layers=5-18:alpha=4`. It counts
    content words only, by a tagger; here every token of the question that follows another one counts, or those at
    `words`. It finds the question by offsets into two templates and leaves the last tokens of the template out;
    here it is the text behind the first picture. It takes one prompt at a time, and divides by zero where a map is
    flat or nothing looks at the picture: here nothing is amplified then.

    When not to trust it: the saliency of a question of one or two words is noise, and a stretched map makes even
    small differences e^alpha large. Where layers are given that do not all lie above the saliency layers, the prompt
    is read twice, first by the model as it is, which costs a second prefill; a saliency found in the same pass is
    that of the model with whatever mitigations were put on before this one. Report coverage beside hallucination.

    Args:
        alpha: Logarithm of the largest factor, 0 to 50. 0 is the identity.
        saliency: Layers in which the question is watched; None for layer 11 of 32 and the like.
        words: Positions (0-based) of the words that count; None for the whole question.
    """

    alpha: float = 5.0
    saliency: int | Collection[int] | None = None
    words: Collection[int] | None = None

    name = "gift"
    title = "GIFT (gaze shift amplification)"
    formula = (
        '<math display="block"><msub><msup><mi>A</mi><mo>′</mo></msup><mrow><mi>n</mi><mi>v</mi></mrow></msub>'
        "<mo>∝</mo><msup><mi>e</mi><mrow><mi>α</mi><msub><mi>g</mi><mi>v</mi></msub></mrow></msup><msub><mi>A</mi><mrow>"
        "<mi>n</mi><mi>v</mi></mrow></msub><mo>,</mo><mspace width='1em'/><msub><msup><mi>A</mi><mo>′</mo></msup><mrow>"
        "<mi>n</mi><mi>q</mi></mrow></msub><mo>∝</mo><mi>s</mi><msub><mi>A</mi><mrow><mi>n</mi><mi>q</mi></mrow></msub>"
        "</math>"
    )
    reference = GAZE_SHIFTS.at("gaze shift-guided cross-modal fusion enhancement")
    grid = MappingProxyType({"alpha": (1.0, 3.0, 5.0)})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.alpha <= MOST:
            raise UsageError(f"{self.name}: alpha must be from 0 to {MOST:g}, got {self.alpha}.")
        if self.saliency is not None:
            given = (self.saliency,) if isinstance(self.saliency, int) else self.saliency
            layers = tuple(sorted({int(layer) for layer in given}))
            if not layers:
                raise UsageError(f"{self.name}: saliency names no layer.")
            object.__setattr__(self, "saliency", layers)
        if self.words is not None:
            words = (self.words,) if isinstance(self.words, int) else self.words
            object.__setattr__(self, "words", checked_positions(self.name, words))

    @property
    def identity(self) -> bool:
        return self.alpha == 0.0

    def own_layers(self, count: int) -> Collection[int]:
        last = min(count, round(LAST * count) + 1)
        return range(min(max(round(FIRST * count), max(self.watched(count)) + 1), last - 1), last)

    def watched(self, count: int) -> tuple[int, ...]:
        """Saliency layers of a model of `count` layers."""
        if self.saliency is None:
            return (min(count - 1, round(DEPTH * count)),)
        assert isinstance(self.saliency, tuple)  # since __post_init__
        return self.saliency

    def check(self, tower: Tower) -> None:
        super().check(tower)
        for layer in self.watched(len(tower.blocks)):
            check_head(self.name, tower, layer)

    def fitted(self, model: nn.Module | OpenedModel, tower: Tower) -> Self:
        needs_pictures(self.title, model)
        return self

    def watching(self, model: nn.Module, tower: Tower, tokens: Tokens) -> AbstractContextManager[Any]:
        count = len(tower.blocks)
        layers = self.watched(count)
        edited = [layer for layer in range(count) if bool(self.chosen(layer, tower).any())]
        words = None if self.words is None else tuple(self.words)
        ahead = min(edited, default=count) <= max(layers)
        return GazeWatch(model, tower, tokens, layers, words, ahead).attached()

    def rows(self, seen: Seen) -> Bool[Tensor, "batch query"]:
        return choosing_rows(seen)

    def sets(self, seen: Seen) -> KeySets | None:
        """Every visual token and every token of the question as a set of its own."""
        kinds = kinds_of(seen.tokens, seen.call, seen.config)
        visual = kinds == int(Kind.VISUAL)
        if not bool(visual.any()):
            seen.nothing("no prompt has visual tokens")
            return None
        gain = self._gain(seen, visual)
        if not bool((gain != 1.0).any()):
            seen.nothing(
                "no two words of a question follow each other behind a picture, or none turns anywhere"
            )
            return None
        question = (kinds == int(Kind.QUESTION)) & seen.tokens.real(seen.call)
        sets = seen.one_by_one(visual | question)
        places = sets.columns[:, 0, :, 0] + seen.dropped
        seen.memory["gift"] = tuple(part.gather(1, places) for part in (gain, visual, question))
        return sets

    def _gain(self, seen: Seen, visual: Bool[Tensor, "batch token"]) -> Float[Tensor, "batch token"]:
        """exp(alpha g) on visual tokens, 1 elsewhere and where nothing is known."""
        if "gift" not in seen.shared:
            rises, known = seen.watch.saliency()
            gain = torch.ones_like(rises)
            for row in known.nonzero()[:, 0].tolist():
                own = visual[row, : rises.shape[1]]
                gain[row, own] = torch.exp(self.alpha * stretched(rises[row, own]))
            seen.shared["gift"] = gain
        gain: Tensor = seen.shared["gift"].to(visual.device)
        return pad(gain, (0, visual.shape[1] - gain.shape[1]), value=1.0)

    def factors(self, seen: Seen, shares: Shares) -> Factors:
        return amplified(shares, *seen.memory["gift"])


def amplified(
    shares: Shares,
    gain: Float[Tensor, "batch group"],
    visual: Bool[Tensor, "batch group"],
    question: Bool[Tensor, "batch group"],
) -> Factors:
    """GIFT's factors: each set is a key, visual or of the question."""
    mass, gain = shares.mass, gain.to(shares.mass)[:, None, None]
    visual, question = visual[:, None, None], question[:, None, None]
    before, after = (mass * visual).sum(-1), (mass * gain * visual).sum(-1)
    lookers = top_half(before)
    whole = (before * lookers).sum(1, keepdim=True)
    grown = (after * lookers).sum(1, keepdim=True)
    scale = torch.where(whole > 0, grown / torch.where(whole > 0, whole, 1.0), 1.0)
    readers = top_half((mass * question).sum(-1))
    one = torch.ones((), dtype=mass.dtype, device=mass.device)
    factors = torch.where(visual & lookers[..., None], gain, one)
    factors = torch.where(question & readers[..., None], scale[..., None], factors)
    divisor = (factors * mass).sum(-1) + shares.rest + shares.learned
    return Factors(factors, divisor, divisor > 0)


def top_half(values: Float[Tensor, "batch head row"]) -> Bool[Tensor, "batch head row"]:
    """The half of the heads with the largest values, row by row; the first ones on ties."""
    order = values.argsort(dim=1, descending=True, stable=True)[:, : max(1, values.shape[1] // 2)]
    return torch.zeros_like(values, dtype=torch.bool).scatter(1, order, True)
