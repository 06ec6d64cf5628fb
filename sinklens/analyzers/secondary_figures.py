"""What the report draws of secondary sinks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sinklens.core.counts import counted
from sinklens.core.figures import Event, Figure, Heatmap, Life, Lines, Series, Timeline
from sinklens.tracers import signals as sig
from sinklens.tracers.trace import PromptRecord

from .aligned_tokens import SECONDARY, Aligned, Level, Primary

TIMELINE_ROWS = 40


@dataclass(frozen=True)
class Seen:
    """One prompt with its primary sink and the tokens aligned with it."""

    record: PromptRecord
    primary: Primary
    tokens: list[Aligned]


def draw(
    seen: Sequence[Seen], secondary: Sequence[Aligned], levels: Sequence[Level], layers: int
) -> list[Figure]:
    aligned = np.zeros(layers)
    for token in secondary:
        aligned[list(token.layers)] += 1
    norm = np.mean([item.record[sig.RESIDUAL_NORM][:, item.primary.position] for item in seen], axis=0)
    median = np.mean([np.median(item.record[sig.RESIDUAL_NORM], axis=1) for item in seen], axis=0)
    x = np.arange(layers)
    figures: list[Figure] = [
        Lines(
            "strength",
            "Norm of the primary sink against the median token",
            f"L2 norm of the hidden state after each block, mean over {counted(len(seen), 'prompt')}.",
            (Series("primary sink", x, norm, emphasis=True), Series("median token", x, median)),
            "layer",
            "L2 norm",
            log_y=True,
        )
    ]
    if not secondary:
        return figures
    per_thousand = 1000 / sum(len(item.record) for item in seen)
    alive = Series("secondary sinks", x, aligned * per_thousand, emphasis=True)
    return [
        _timeline(secondary, layers),
        _level_map(secondary, levels, layers),
        Lines(
            "alive",
            "Secondary sinks alive by layer",
            f"Tokens aligned with the primary sink per 1000 tokens, over {counted(len(seen), 'prompt')}.",
            (alive,),
            "layer",
            "per 1000 tokens",
            bars=True,
        ),
        _strength(seen, layers),
        _places(seen, secondary),
        *figures,
    ]


def attention_by_layer(seen: Sequence[Seen], layers: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean attention received by the primary sinks and by the secondary sinks alive, `[layer]`; NaN without any.

    Mean over heads, queries that see the token (itself included), tokens and prompts.
    """
    primary: list[list[float]] = [[] for _ in range(layers)]
    others: list[list[float]] = [[] for _ in range(layers)]
    for item in seen:
        received = item.record[sig.ATTENTION_RECEIVED_MEAN]
        for layer in range(item.primary.start, item.primary.end):
            primary[layer].append(float(received[layer, item.primary.position]))
        for token in (token for token in item.tokens if token.kind == SECONDARY):
            for layer in token.layers:
                others[layer].append(float(received[layer, token.position]))
    return _known_means(primary), _known_means(others)


def _known_means(values: list[list[float]]) -> np.ndarray:
    known = [[value for value in row if not np.isnan(value)] for row in values]
    return np.array([np.mean(row) if row else np.nan for row in known])


def _strength(seen: Sequence[Seen], layers: int) -> Lines:
    primary, others = attention_by_layer(seen, layers)
    x = np.arange(layers)
    return Lines(
        "attention",
        "Attention to the primary sink and to secondary sinks, by layer",
        f"Mean attention received over heads and {counted(len(seen), 'prompt')}, while the primary sink is "
        "active and while a "
        "secondary sink is alive; attention to themselves included.",
        (Series("primary sink", x, primary, emphasis=True), Series("a secondary sink", x, others)),
        "layer",
        "share",
    )


def tenths(seen: Sequence[Seen], secondary: Sequence[Aligned]) -> list[int]:
    """How many secondary sinks stand in each tenth of their prompt."""
    length = {item.record.index: len(item.record) for item in seen}
    tenth = [10 * token.position // length[token.prompt] for token in secondary]
    return np.bincount(tenth, minlength=10).tolist() if tenth else [0] * 10


def _places(seen: Sequence[Seen], secondary: Sequence[Aligned]) -> Lines:
    counts = Series("secondary sinks", np.arange(10), np.array(tenths(seen, secondary)), emphasis=True)
    return Lines(
        "places",
        "Where in the prompt secondary sinks stand",
        f"Number of secondary sinks by tenth of their prompt (0: the first), {counted(len(seen), 'prompt')} together.",
        (counts,),
        "tenth of the prompt",
        "tokens",
        bars=True,
    )


def _timeline(secondary: Sequence[Aligned], layers: int) -> Timeline:
    """The secondary sinks that receive most attention, from creation to end."""
    strongest = sorted(secondary, key=lambda t: (-np.nan_to_num(t.score), t.prompt, t.position))[
        :TIMELINE_ROWS
    ]
    rows = tuple(
        Life(
            f"prompt {token.prompt}, position {token.position} {token.piece!r}",
            token.creation,
            token.layers[-1],
            min(1.0, abs(token.cosine)),
            (Event(token.creation, "created", "rise"),),
            tuple(sorted(set(range(token.creation, token.layers[-1])) - set(token.layers))),
            counted(token.lifetime, "layer"),
        )
        for token in sorted(strongest, key=lambda t: (t.creation, -t.lifetime, t.prompt, t.position))
    )
    return Timeline(
        "lives",
        "Secondary sinks from creation to end",
        f"The {len(rows)} of {len(secondary)} that receive most attention, in order of creation. |cosine| with the "
        "primary sink's state: mean over the aligned layers. Gaps: layers not aligned.",
        rows,
        layers,
        "|cosine|",
    )


def _level_map(secondary: Sequence[Aligned], levels: Sequence[Level], layers: int) -> Heatmap:
    counts = np.zeros((layers, max(token.lifetime for token in secondary) + 2))
    for token in secondary:
        counts[token.creation, token.lifetime] += 1
    return Heatmap(
        "levels",
        "Sink levels: creation layer and lifetime",
        "Number of secondary sinks created at a layer (rows) that live for so many layers (columns), all prompts "
        "together. Rings: sink levels.",
        np.where(counts > 0, counts, np.nan),
        "tokens",
        y_label="creation layer",
        x_label="lifetime",
        marks=tuple((level.creation, level.lifetime) for level in levels),
    )
