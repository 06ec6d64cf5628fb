"""What methods share that put one more place beside all keys: of which tokens it is in the place, and company."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sinklens.core.errors import UsageError
from sinklens.kernels.beside import beside
from sinklens.kernels.key_sets import Factors, Shares
from sinklens.kernels.transfer import Transferred, row_lse, transfer

from .attention_method import AttentionMethod
from .scaling import checked_positions, scaled
from .seen import Seen


@dataclass(frozen=True, kw_only=True)
class BesideKeys(AttentionMethod):
    """Base of methods that give rows one more place to attend to.

    Args:
        replaces: Tokens (0-based) whose keys are hidden from other rows, for which the place is there instead. Their
            own rows stay as they are.
    """

    replaces: Collection[int] = ()

    tables: ClassVar[frozenset[str]] = frozenset()
    """Parameters that may be given as a file."""

    def __post_init__(self) -> None:
        super().__post_init__()
        found = checked_positions(self.name, self.replaces) if self.replaces else ()
        object.__setattr__(self, "replaces", found)

    @abstractmethod
    def place(self, seen: Seen) -> Float[Tensor, "#batch #head #query"]:
        """Logit of the place, as the softmax sees logits."""

    def written(self, seen: Seen) -> Float[Tensor, "head value_dim"] | None:
        """What the place writes; None for nothing."""
        return None

    @property
    def conserves(self) -> bool:
        return False

    @property
    def named(self) -> frozenset[int]:
        return frozenset(self.replaces)

    def edit(self, seen: Seen, output: Tensor, *, remember: bool) -> Transferred | None:
        call = seen.call
        if call.edits:
            raise UsageError(
                f"{self.name} changes the softmax, so it must be put on before what edits its result.",
                hint="Put it on first.",
            )
        if torch.is_grad_enabled() and output.requires_grad:
            raise UsageError(f"{self.name} has no gradient here.", hint="Run under torch.no_grad().")
        with torch.no_grad():
            lse = row_lse(call) if seen.lse is None else seen.lse
            rows = self._rows(seen)
            edited = (rows[:, None] & seen.chosen[:, None]).expand(lse.shape)
            hidden = self._hidden(seen, output, lse, rows) if self.replaces else None
            done = beside(
                call,
                output if hidden is None else hidden.output,
                self.place(seen),
                lse,
                edited,
                value=self.written(seen),
                before=None if hidden is None else hidden.edit,
                remember=remember,
            )
        return done if hidden is None else replace(done, again=hidden.again)

    def _rows(self, seen: Seen) -> Bool[Tensor, "batch query"]:
        if not self.replaces:
            return seen.rows
        places, valid = seen.tokens.places(tuple(self.replaces), seen.call)
        token = torch.arange(seen.call.query.shape[2], device=places.device) + seen.tokens.past
        return seen.rows & ~((token[:, None] == places[:, None]) & valid[:, None]).any(-1)

    def _hidden(self, seen: Seen, output: Tensor, lse: Tensor, rows: Tensor) -> Transferred:
        """The replaced tokens taken out of sight."""

        def rule(shares: Shares) -> Factors:
            found = scaled(shares, 0.0)
            return replace(found, edited=found.edited & seen.chosen[:, None])

        sets = seen.positions(tuple(self.replaces))
        return transfer(seen.call, output, sets, rule, lse, rows=rows, remember=True)
