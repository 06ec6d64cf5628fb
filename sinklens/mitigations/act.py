"""ACT, attention calibration: part of the attention on sinks that are not the first token goes to the other tokens."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Bool
from torch import Tensor

from sinklens.core.errors import ModelError, UsageError
from sinklens.core.reference import Reference
from sinklens.kernels.blocked import attention_sweep
from sinklens.kernels.key_sets import Factors, KeySets, Shares, key_sets
from sinklens.kernels.spec import Stat, Want

from .base import Mitigation, Seen, registry

if TYPE_CHECKING:
    from .calibration import Search

CODE_THRESHOLD = 0.1
"""What the authors' scripts compare with, at every length."""
LEAST_REST = 1e-6
"""Rows with less attention than this outside of the sinks are left alone: there is nowhere to move it to."""


@registry.register("act")
@dataclass(frozen=True, kw_only=True)
class ACT(Mitigation):
    """Takes attention away from sinks inside the prompt, found per input and head, and gives it to all other tokens.

    How it is computed: while the prompt is read, token t is a sink of a head if the mean attention it receives from
    the real queries that see it exceeds alpha / N, N being the prompt's own tokens; the first token is never one. In
    every row the weights on these sinks become beta times themselves, and what is freed goes to all other tokens in
    proportion to what they have. Generated tokens use the sinks found in the prompt. A learned sink logit keeps its
    share. A row with less than 1e-6 outside of the sinks is left alone.

    Compared with the paper: detection, beta and redistribution are those of Yu et al., whose first two layers and
    last layer are left out unless layers or heads are given. They keep the heads that a calibration on about
    a thousand samples did not find harmful; this class edits the heads it is given, by default all;
    `ActSearch` chooses them so. Under sliding
    windows the mean is over the queries that see the key, where the paper has T - t. `recipe="code"` is what the
    authors' program does: a fixed threshold of 0.1, and instead of the first token the first one found is spared, so
    that a head whose first token stays below 0.1 keeps its first true sink. The program treats only the first
    prompt of a batch, and in generation its rule looks at single rows; neither is copied.

    When not to trust it: the last tokens are seen by few queries, so a token that attends to itself passes for a sink
    (`min_visible` leaves such columns out; the paper does not). alpha / N falls with the length, so long prompts
    have more sinks. generate() with a prompt in pieces (`prefill_chunk_size`) is refused; where a program of one's own
    continues from a cache, the sinks of the first pass stay. In a model without sinks inside
    the prompt it does nothing, and says so.

    Args:
        alpha: The paper's alpha.
        beta: Share of their attention that sinks keep, from 0 to 1. 1 is the identity.
        threshold: A fixed threshold in place of alpha / N.
        min_visible: Queries that must see a token before it can be a sink.
        recipe: `paper` or `code`, see above.
    """

    alpha: float = 5.0
    beta: float = 0.4
    threshold: float | None = None
    min_visible: int = 1
    recipe: Literal["paper", "code"] = "paper"

    name = "act"
    title = "ACT (attention calibration)"
    formula = (
        '<math display="block"><msub><mi>a</mi><mi>t</mi></msub><mo>&gt;</mo><mfrac><mi>α</mi><mi>N</mi></mfrac>'
        "<mo>⇒</mo><mi>t</mi><mo>∈</mo><mi>S</mi><mo>;</mo><mspace width='1em'/><msub><msup><mi>A</mi><mo>′</mo></msup>"
        "<mrow><mi>q</mi><mi>s</mi></mrow></msub><mo>=</mo><mi>β</mi><msub><mi>A</mi><mrow><mi>q</mi><mi>s</mi></mrow>"
        "</msub><mo>,</mo><mspace width='1em'/><msub><msup><mi>A</mi><mo>′</mo></msup><mrow><mi>q</mi><mi>k</mi></mrow>"
        "</msub><mo>=</mo><mfrac><mrow><mn>1</mn><mo>−</mo><mi>β</mi><msub><mi>m</mi><mi>q</mi></msub></mrow><mrow>"
        "<mn>1</mn><mo>−</mo><msub><mi>m</mi><mi>q</mi></msub></mrow></mfrac><msub><mi>A</mi><mrow><mi>q</mi><mi>k</mi>"
        "</mrow></msub></math>"
    )
    reference = Reference(
        key="yu2024unveiling",
        title="Unveiling and Harnessing Hidden Attention Sinks: Enhancing Large Language Models without Training "
        "through Attention Calibration",
        authors="Yu, Zhongzhi and Wang, Zheng and Fu, Yonggan and Shi, Huihong and Shaikh, Khalid and "
        "Lin, Yingyan Celine",
        year=2024,
        arxiv="2406.15765",
        section="the attention calibration technique",
        code="https://github.com/GATECH-EIC/ACT",
        venue="ICML 2024",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.beta <= 1.0:
            raise UsageError(f"{self.name}: beta must be from 0 to 1, got {self.beta}.")
        for key, value in {"alpha": self.alpha, "threshold": self.threshold}.items():
            if value is not None and not (math.isfinite(value) and value > 0):
                raise UsageError(f"{self.name}: {key} must be a number above 0, got {value}.")
        if self.recipe not in ("paper", "code"):
            raise UsageError(f"{self.name}: recipe must be 'paper' or 'code', got {self.recipe!r}.")

    def search(self, **settings: Any) -> Search:
        from .act_search import ActSearch

        return ActSearch(**settings)

    @property
    def identity(self) -> bool:
        return self.beta == 1.0

    def own_layers(self, count: int) -> Collection[int]:
        return range(2, count - 1)

    def sets(self, seen: Seen) -> KeySets | None:
        if seen.first:
            if not seen.tokens.whole(seen.call.query.shape[2]):
                raise ModelError(
                    f"{self.title} needs the whole prompt in one pass.",
                    detail="Sinks are found over all of its rows before the first of them is edited.",
                    hint="Generate without prefill_chunk_size.",
                )
            found = key_sets((self.sinks(seen) & seen.chosen[:, None])[None])
            seen.memory["sinks"] = found
        elif "sinks" not in seen.memory:
            raise ModelError(
                f"{self.title} was put on in the middle of an input.",
                detail="The sinks of a prompt are found while it is read, and the cache came from outside.",
                hint="Read the prompt inside of the `with` block too.",
            )
        sinks: KeySets = seen.memory["sinks"]
        if not sinks.columns.shape[-1]:
            seen.nothing("no token but the first receives enough attention to be a sink")
            return None
        return seen.sets_of(sinks.columns, sinks.valid)

    def sinks(self, seen: Seen) -> Bool[Tensor, "batch head key"]:
        """Sinks of every head by the rule above; the keys are those of the first pass, which are its tokens."""
        rows = seen.rows.clone()
        if seen.tokens.prompt:
            rows[:, seen.tokens.prompt :] = False  # an answer that is read along with its prompt
        call = replace(seen.call, counted=rows)
        # Both in one compiled pass, which is faster than one that starts from the kernel's log-sum-exp.
        found = attention_sweep(call, Want(frozenset({Stat.RECEIVED, Stat.LSE})))
        if seen.lse is None and call.query.dtype != torch.float64:
            seen.lse = found[Stat.LSE]
        assert found.visible is not None  # a sweep always counts
        mean = found[Stat.RECEIVED] / found.visible.clamp(min=1)
        sinks = (mean > self._limit(rows)[:, None, None]) & (found.visible >= self.min_visible)
        return self._spared(sinks, seen)

    def _limit(self, rows: Bool[Tensor, "batch query"]) -> Tensor:
        fixed = CODE_THRESHOLD if self.recipe == "code" and self.threshold is None else self.threshold
        if fixed is not None:
            return torch.full((rows.shape[0],), fixed, device=rows.device)
        return self.alpha / rows.sum(1)

    def _spared(self, sinks: Bool[Tensor, "batch head key"], seen: Seen) -> Tensor:
        """Without the first token, or (code) without the first one found."""
        if self.recipe == "code":
            return sinks & (sinks.long().cumsum(-1) > 1)
        place, valid = seen.tokens.places((0,), seen.call)
        key = torch.arange(sinks.shape[-1], device=sinks.device)
        return sinks & ~((key == place) & valid)[:, None]

    def factors(self, seen: Seen, shares: Shares) -> Factors:
        mass = shares.mass[..., 0]
        # rest / (rest + freed): written as sums, so that a mass near 1 keeps its digits.
        divisor = shares.rest / (shares.rest + (1.0 - self.beta) * mass)
        edited = (shares.rest > LEAST_REST) & (mass > 0)
        return Factors((self.beta * divisor)[..., None], divisor, edited, learned=False)
