"""What a mitigation of attention is: a rule for moving it between keys, put on a model for the length of a `with`.

A method says which keys (`sets`) and what becomes of their mass (`factors`). The arithmetic is `kernels.transfer`.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Bool
from torch import Tensor

from sinklens.kernels.key_sets import Factors, Gains, KeySets, Rule, Shares
from sinklens.kernels.transfer import Transferred, transfer

from .attention_method import AttentionMethod
from .attention_method import check_head as check_head
from .method import registry as registry
from .seen import Seen


@dataclass(frozen=True, kw_only=True)
class Mitigation(AttentionMethod):
    """Base of all methods that move attention between keys."""

    @abstractmethod
    def sets(self, seen: Seen) -> KeySets | None:
        """The keys whose mass is moved; None if there are none in this call."""

    @abstractmethod
    def factors(self, seen: Seen, shares: Shares) -> Factors | Gains:
        """What becomes of a block of rows. Heads that are not chosen are left alone by the caller."""

    def rows(self, seen: Seen) -> Bool[Tensor, "batch query"]:
        """Rows that may be edited: real tokens, unless a method says otherwise."""
        return seen.rows

    logits_needed: ClassVar[bool] = False
    """Whether `factors` reads `Shares.logits` or gives `Gains`; all sets are single keys then."""

    def edit(self, seen: Seen, output: Tensor, *, remember: bool) -> Transferred | None:
        with torch.no_grad():
            sets = self.sets(seen)
            rows = self.rows(seen)
        if sets is None:
            return None
        return transfer(
            seen.call,
            output,
            sets,
            self._rule(seen),
            seen.lse,
            rows=rows,
            remember=remember,
            logits=self.logits_needed,
        )

    def _rule(self, seen: Seen) -> Rule:
        def rule(shares: Shares) -> Factors | Gains:
            found = self.factors(seen, shares)
            return replace(found, edited=found.edited & seen.chosen[:, None])

        return rule
