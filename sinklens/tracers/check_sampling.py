"""The self-check of sampled query rows: two samples that share the rows between them must together give all rows."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from sinklens.kernels.blocked import attention_sweep
from sinklens.kernels.sample import RowSample, Stratum
from sinklens.kernels.sampled import ESTIMABLE, PER_KEY, sampled_sweep
from sinklens.kernels.spec import AttentionCall, AttentionStatistics, Stat, Want
from sinklens.models.spec import OpenedModel

from .attention import Site
from .backends import backend_of
from .batch import Batch
from .executor import TracePlan
from .selfcheck import Check

LIMIT = 1e-4


def sampling_check(opened: OpenedModel, batch: Batch, plan: TracePlan) -> Check:
    """Estimates from both halves of the rows of real calls, averaged, against all rows."""
    seen = _Halves(batch)
    backend = backend_of(opened)
    with backend.attention(opened, batch, seen, replace(plan, sampling=None)):
        backend.forward(opened, batch)
    detail = (
        f"largest relative error of statistics from two halves of the query rows, averaged, against all rows, over "
        f"{seen.layers} layers"
    )
    passed = seen.worst <= LIMIT and seen.layers > 0
    return Check("sampled rows, both halves together = all rows", passed, seen.worst, LIMIT, detail)


def halves(places: np.ndarray) -> tuple[RowSample, RowSample]:
    """Two samples of rows at these places: of every four neighbours each takes two, and both take what is left."""
    whole = len(places) // 4 * 4
    fours = places[:whole].reshape(-1, 4)
    rest = [Stratum(places[whole:], len(places) - whole)] if whole < len(places) else []
    first, second = (RowSample((*(Stratum(four[start::2], 4) for four in fours), *rest)) for start in (0, 1))
    return first, second


@dataclass
class _Halves:
    """Compares both ways inside a running model."""

    batch: Batch
    worst: float = 0.0
    layers: int = 0

    def asks(self, site: Site, call: AttentionCall) -> Want:
        # The last rows are taken by real samples only.
        stats = ESTIMABLE - {Stat.RECEIVED_TAIL}
        return Want(stats if call.off_keys else stats - {Stat.LEARNED_SINK})

    def on_attention(self, site: Site, call: AttentionCall, statistics: AttentionStatistics) -> None:
        want, valid = self.asks(site, call), self.batch.valid
        exact = attention_sweep(call, want)
        rows = torch.ones(len(call.query), call.query.shape[2], dtype=torch.bool) if valid is None else valid
        samples = [halves(np.flatnonzero(row.cpu().numpy())) for row in rows]
        first, second = (sampled_sweep(call, want, [pair[i] for pair in samples]) for i in (0, 1))
        for stat in want.stats:
            if stat in PER_KEY:
                found = (first[stat] + second[stat]) / 2
            else:
                found = torch.where(_drawn(first, rows)[:, None], first[stat], second[stat])
            extent = call.key.shape[2] if stat is Stat.DISTANCE else 1
            scale = exact[stat].abs().max().clamp(min=float(extent))
            error = float((found - exact[stat]).abs().max() / scale)
            self.worst = error if error != error else max(self.worst, error)
        self.layers += 1


def _drawn(statistics: AttentionStatistics, rows: Tensor) -> Tensor:
    found = torch.zeros_like(rows)
    for row, sample in enumerate(statistics.samples or ()):
        if sample is not None:
            found[row, torch.from_numpy(sample.rows).to(found.device)] = True
    return found
