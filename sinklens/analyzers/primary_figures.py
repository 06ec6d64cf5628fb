"""What primary-sinks draws, and the arrays behind it."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from sinklens.core.adjustable import epsilons
from sinklens.core.counts import counted
from sinklens.core.figures import Figure, Heatmap, Lines, Samples, Series
from sinklens.tracers import signals as sig
from sinklens.tracers.trace import PromptRecord

from .evidence import Column, SinkEvidence


def draw(
    evidence: list[SinkEvidence],
    strongest: Column,
    heads: list[tuple[int, int, float]],
    epsilon: float,
    min_prompts: float,
) -> list[Figure]:
    """Everything that is drawn of the strongest position.

    Args:
        heads: Layer, head and share of prompts of those that sink on it.
    """
    where = f"position {strongest.position}"
    n = len(strongest.alpha)
    figures: list[Figure] = [
        Heatmap(
            "received",
            f"Attention received by {where}",
            f"Mean over {counted(n, 'prompt')} of the mean attention from all queries that see {where} (diagonal "
            "included). "
            f"Rings: above {epsilon:g} on at least {100 * min_prompts:.0f} % of the prompts.",
            strongest.alpha.mean(0),
            "share",
            marks=tuple((layer, head) for layer, head, _ in heads),
            limits=(0.0, 1.0),
        ),
        Samples(
            "rate",
            f"Sink rate of {where} by threshold",
            "Share of (prompt, layer, head) whose mean attention to the position exceeds the threshold.",
            strongest.alpha,
            epsilon,
            grid=epsilons(epsilon),
        ),
        _profile(evidence),
    ]
    drain = value_drain(evidence, strongest.position)
    if drain is not None:
        figures.append(
            Heatmap(
                "drain",
                f"Value norm of {where} against the other positions",
                f"Mean over prompts of the norm of the value states of {where} over the mean norm of all others; "
                "below 1 is value drain.",
                drain,
                "ratio",
                x_label="key-value head",
            )
        )
    if strongest.position == 0 and all(sig.FIRST_MASS.name in item.record.arrays for item in evidence):
        figures.append(_dormancy(evidence, strongest))
    return figures


def value_drain(evidence: list[SinkEvidence], position: int) -> Float[np.ndarray, "layer kv_head"] | None:
    """Norm of the position's value states over the mean norm of the others; None if values were not seen."""
    ratios = []
    for item in evidence:
        at = np.flatnonzero(item.positions == position)
        if sig.VALUE_NORM.name not in item.record.arrays or not len(at):
            continue
        here, mean = item.record[sig.VALUE_NORM][:, :, at[0]], item.record[sig.VALUE_NORM_MEAN]
        others = (mean * item.length - here) / (item.length - 1)
        ratios.append(here / np.maximum(others, np.finfo(np.float32).tiny))
    return np.mean(ratios, axis=0) if ratios else None


def upper_half(records: list[PromptRecord]) -> Float[np.ndarray, "layer head"]:
    """Share of the queries that give the first token more than half of their mass."""
    counts = np.sum([record[sig.FIRST_MASS].clip(0) for record in records], axis=0)
    return counts[:, :, sig.FIRST_MASS_BINS // 2 :].sum(-1) / counts.sum(-1).clip(1)


def _dormancy(evidence: list[SinkEvidence], strongest: Column) -> Heatmap:
    upper = upper_half([item.record for item in evidence])
    return Heatmap(
        "dormancy",
        "Queries that give the first token more than half of their attention",
        "Share of all queries after the first, over all prompts. A head can be dormant on some queries and active on "
        "others; its mean alone would hide that.",
        np.where(np.isnan(strongest.alpha.mean(0)), np.nan, upper),
        "share of queries",
        limits=(0.0, 1.0),
    )


def _profile(evidence: list[SinkEvidence]) -> Lines:
    """Mean attention received by position against the uniform baseline, over the prompts that have it."""
    length = max(item.length for item in evidence)
    shown = min(length, 64)
    total, uniform, n = np.zeros(shown), np.zeros(shown), np.zeros(shown)
    for item in evidence:
        m = min(shown, item.length)
        total[:m] += np.nanmean(item.record[sig.ATTENTION_RECEIVED_MEAN], axis=0)[:m]
        uniform[:m] += item.uniform[:m]
        n[:m] += 1
    x = np.arange(shown)
    return Lines(
        "profile",
        "Attention received by position",
        "Mean over prompts, layers and heads of the attention a position receives from the queries that see it, "
        "beside what uniform attention would give. The last positions have few queries.",
        (Series("model", x, total / n, emphasis=True), Series("uniform", x, uniform / n)),
        "position",
        "share",
    )
