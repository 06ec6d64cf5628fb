"""One prompt's part of one attention call: padding is left behind here."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sinklens.kernels.sample import RowSample
from sinklens.kernels.sampled import row_mean
from sinklens.kernels.spec import AttentionCall, AttentionStatistics, Stat


@dataclass(frozen=True)
class PromptView:
    """What one layer's attention shows of one prompt, its real tokens numbered from 0.

    Attributes:
        row, layer: The prompt's row in the batch, and the block.
        span: Where its real tokens are in the padded row.
        length: Their number.
    """

    row: int
    layer: int
    call: AttentionCall
    statistics: AttentionStatistics
    span: slice | Tensor
    length: int

    def has(self, stat: Stat) -> bool:
        return stat in self.statistics.values

    def of(self, stat: Stat) -> Float[Tensor, "head pos ..."]:
        """A statistic per key, or per row: the real ones."""
        return self.statistics[stat][self.row][:, self.span]

    @property
    def visible(self) -> Int[Tensor, "visible_head pos"]:
        """Real queries that see each key; the head axis is 1 unless the mask differs by head."""
        assert self.statistics.visible is not None
        return self.statistics.visible[self.row][:, self.span]

    @property
    def share(self) -> Float[Tensor, "head pos"]:
        """Mean attention that each key receives from the queries that see it."""
        return self.of(Stat.RECEIVED) / self.visible.clamp(min=1)

    @property
    def sample(self) -> RowSample | None:
        """The rows that were looked at, as places in the padded row; None for all."""
        samples = self.statistics.samples
        return None if samples is None else samples[self.row]

    def over_rows(self, stat: Stat) -> tuple[Float[Tensor, " head"], Float[Tensor, " head"] | None]:
        """Mean over the queries, and its standard error where they were sampled."""
        if self.sample is None:
            return self.of(stat).mean(-1), None
        return row_mean(self.statistics[stat][self.row], self.sample)

    def error(self, stat: Stat) -> Float[Tensor, "head pos"]:
        """Standard error of a sum over the queries that was estimated, 0 where all were taken."""
        variances = self.statistics.variances
        if stat not in variances:
            return torch.zeros_like(self.of(stat))
        return variances[stat][self.row][:, self.span].sqrt()

    @property
    def knows_vectors(self) -> bool:
        """Whether q, k, v are the model's; not so where only the weights could be read."""
        return self.call.value.shape[-1] > 0

    @property
    def query(self) -> Float[Tensor, "head pos dim"]:
        return self.call.query[self.row][:, self.span]

    @property
    def key(self) -> Float[Tensor, "kv_head pos dim"]:
        return self.call.key[self.row][:, self.span]

    @property
    def value(self) -> Float[Tensor, "kv_head pos value_dim"]:
        return self.call.value[self.row][:, self.span]
