"""One attention call as a method that edits it sees it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from sinklens.kernels.key_sets import KeySets
from sinklens.kernels.spec import AttentionCall
from sinklens.tracers.attention import Site

from .effect import Effect
from .tokens import Tokens


@dataclass
class Seen:
    """One attention call as a method sees it.

    Attributes:
        call: The tensors, after RoPE and cache.
        lse: Log-sum-exp of its rows from the model's own kernel, None where that does not tell it.
        tokens: Of the running pass.
        chosen: Query heads that the mitigation is meant for.
        causal: Whether tokens see earlier ones only.
        memory: The method's own notes on this layer; empty at the start of every input.
        config: Of the model.
        watch: What the method's own `watching` gave.
        shared: Notes that all layers share; empty at the start of every input.
        effect: What the mitigation did so far.
    """

    site: Site
    call: AttentionCall
    lse: Tensor | None
    tokens: Tokens
    chosen: Bool[Tensor, " head"]
    causal: bool
    memory: dict[str, Any]
    config: Any = None
    watch: Any = None
    shared: dict[str, Any] = field(default_factory=dict)
    effect: Effect | None = None

    @property
    def first(self) -> bool:
        """Whether this is the first pass over an input (prefill), rather than a continuation from a cache."""
        return self.tokens.past == 0

    @property
    def total(self) -> int:
        """Tokens of the sequence, cached ones and padding included."""
        return self.tokens.past + self.call.query.shape[2]

    @property
    def dropped(self) -> int:
        """Tokens that a sliding cache no longer holds: column `j` is token `j + dropped`."""
        return max(0, self.total - self.call.key.shape[2])

    def nothing(self, why: str) -> None:
        """Say why this call has nothing to edit."""
        if self.effect is not None:
            self.effect.reasons[why] = self.effect.reasons.get(why, 0) + 1

    @property
    def rows(self) -> Bool[Tensor, "batch query"]:
        """Rows of real tokens."""
        return self.tokens.real(self.call)[:, self.tokens.past :]

    def sets_of(self, places: Tensor, valid: Tensor, *, keep_own: bool = False) -> KeySets:
        """Sets of tokens, given by their place among all tokens `[batch, 1|head, group, width]`."""
        columns = places - self.dropped
        own = torch.arange(self.call.query.shape[2], device=columns.device) + self.tokens.past - self.dropped
        return KeySets(columns, valid & (columns >= 0), keep_own, own)

    def one_by_one(self, member: Bool[Tensor, "batch token"]) -> KeySets:
        """Each of some tokens as a set of its own, in their order; at least one is there."""
        width = int(member.sum(1).max())
        found = member.to(torch.uint8).sort(dim=1, descending=True, stable=True)
        places, valid = found.indices[:, :width], found.values[:, :width] > 0
        return self.sets_of(places[:, None, :, None], valid[:, None, :, None])

    def positions(self, positions: tuple[int, ...], *, keep_own: bool = False) -> KeySets:
        """One set: the given positions of each prompt's own tokens, for all heads."""
        places, valid = self.tokens.places(positions, self.call)
        key = "sets", positions, keep_own, self.dropped, places.device
        if key not in self.tokens.memo:
            self.tokens.memo[key] = self.sets_of(
                places[:, None, None], valid[:, None, None], keep_own=keep_own
            )
        return self.tokens.memo[key]
