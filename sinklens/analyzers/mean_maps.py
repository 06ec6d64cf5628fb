"""Mean attention maps of the first tokens, as in the figure that made attention sinks known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from sinklens.core.counts import counted, verb
from sinklens.core.errors import UsageError
from sinklens.core.figures import Figure, Heatmap, Lines, Series
from sinklens.tracers import signals as sig
from sinklens.tracers.trace import PromptRecord, Trace

from .base import Analyzer, Finding, Reference, Status, registry
from .heads import average, mean, usable


@registry.register("mean-maps")
@dataclass(frozen=True)
class MeanMaps(Analyzer):
    """Attention among the first 16 tokens of every prompt, averaged over heads and prompts, layer by layer.

    How it is computed: the first 16 rows and columns of the attention map, mean over heads, then over the prompts
    with at least 16 tokens. `of` says what is drawn: the logits before the softmax (hidden keys left blank), or the
    probabilities. Per layer the table gives what the rows after the first put on the first token and on themselves,
    beside what uniform attention would put on the first.

    Compared with the paper: Xiao et al. show mean logits of Llama-2-7B over 256 sentences of 16 tokens, per layer.
    Neither the paper nor its repository defines a detector; `found` here means that in some layer the first token
    gets `lift` times the uniform share, which is ours. Prompts are cut to their first 16 tokens; a causal model
    cannot know what follows.

    When not to trust it: at 16 tokens every row sees few keys and the uniform share of the first is 0.16 over these
    rows. Averaging over heads hides that some are sinks and others are not, and mean logits are not the logits of
    mean probabilities: heads with large logits dominate. Where a sliding window is shorter than 16 tokens, late rows
    do not see the first token: their share of it is 0, and only rows that see it enter its mean logit.

    Args:
        of: `logits` as in the paper, or `probabilities`.
        shown: Number of layers drawn, spread evenly from the first to the last.
    """

    of: Literal["logits", "probabilities"] = "logits"
    shown: int = 6
    lift: float = 2.0

    name = "mean-maps"
    title = "Mean attention maps"
    place = 66
    default = False
    formula = (
        '<math display="block"><msub><mover><mi>M</mi><mo>¯</mo></mover><mrow><mi>q</mi><mo>,</mo><mi>k</mi></mrow>'
        "</msub><mo>=</mo><munder><mi>mean</mi><mrow><mtext>prompts, heads</mtext></mrow></munder>"
        "<mspace width='0.2em'/><msub><mi>z</mi><mrow><mi>q</mi><mo>,</mo><mi>k</mi></mrow></msub><mo>,</mo>"
        "<mspace width='1em'/><mi>k</mi>"
        "<mo>≤</mo><mi>q</mi><mo>&lt;</mo><mn>16</mn></math>"
    )
    needs = frozenset({sig.PREFIX_MAP, sig.PREFIX_LOGITS})
    optional = frozenset({sig.PREFIX_LOGITS})
    summarises = ("n_prompts", "drawn", "largest_first_share", "layer", "uniform_share")
    answers = (("drawn", ("logits", "probabilities")),)
    reference = Reference(
        key="xiao2023efficient",
        title="Efficient Streaming Language Models with Attention Sinks",
        authors="Guangxuan Xiao and Yuandong Tian and Beidi Chen and Song Han and Mike Lewis",
        year=2024,
        arxiv="2309.17453",
        section="figure of average attention logits over 256 sentences of 16 tokens",
        code="https://github.com/mit-han-lab/streaming-llm",
        venue="International Conference on Learning Representations",
    )

    def __post_init__(self) -> None:
        if self.of not in ("logits", "probabilities"):
            raise UsageError(f"Unknown of {self.of!r} of mean-maps.", detail="It has: logits, probabilities.")
        if self.shown < 1:
            raise UsageError(f"shown of mean-maps must be at least 1, got {self.shown}.")

    def analyze(self, trace: Trace) -> Finding:
        records, reason = usable(trace, {sig.PREFIX_MAP}, sig.PREFIX)
        if reason is not None:
            return self.not_applicable(reason)
        shares = mean([record[sig.PREFIX_MAP] for record in records])
        logits = _logits(records)
        use_logits = self.of == "logits" and logits is not None
        drawn = logits if use_logits and logits is not None else shares
        rows = [row for layer in range(len(shares)) if (row := _row(layer, shares, logits)) is not None]
        if not rows:
            return self.not_applicable("no layer has causal attention among the first tokens.")
        top = max(rows, key=lambda row: row["first_share"])
        notes = []
        if self.of == "logits" and not use_logits:
            notes.append("The logits were not visible on this model, so probabilities are drawn.")
        skipped = len(trace) - len(records)
        if skipped:
            notes.append(
                f"{counted(skipped, 'prompt')} shorter than {sig.PREFIX} tokens {verb(skipped, 'was', 'were')} "
                "left out."
            )
        return self.finding(
            Status.FOUND if top["first_share"] >= self.lift * top["uniform_share"] else Status.NOT_FOUND,
            f"Among the first {sig.PREFIX} tokens the first one gets at most {100 * top['first_share']:.0f} % of a "
            f"row, in layer {top['layer']}; uniform attention would give {100 * top['uniform_share']:.0f} %.",
            rows=rows,
            summary={
                "n_prompts": len(records),
                "drawn": "logits" if use_logits else "probabilities",
                "largest_first_share": top["first_share"],
                "layer": top["layer"],
                "uniform_share": top["uniform_share"],
            },
            units=UNITS,
            labels=LABELS,
            figures=self._figures(drawn, rows, logits=use_logits, n=len(records)),
            notes=notes,
        )

    def _figures(self, maps: np.ndarray, rows: list[dict[str, Any]], *, logits: bool, n: int) -> list[Figure]:
        layers = [row["layer"] for row in rows]
        chosen = sorted({layers[int(i)] for i in np.linspace(0, len(layers) - 1, self.shown).round()})
        hidden = np.triu(np.ones((sig.PREFIX, sig.PREFIX), dtype=bool), 1)
        what, unit = ("logits", "nats") if logits else ("probabilities", "share")
        figures: list[Figure] = [
            Heatmap(
                f"layer_{layer}",
                f"Mean attention {what} of the first tokens, layer {layer}",
                f"Mean {what} over the heads of layer {layer} and {counted(n, 'prompt')}; rows are queries, "
                "columns keys. Keys "
                "after the query are hidden.",
                np.where(hidden, np.nan, maps[layer]),
                unit,
                y_label="query",
                x_label="key",
                limits=None if logits else (0.0, 1.0),
            )
            for layer in chosen
        ]
        x = np.array(layers)
        figures.append(
            Lines(
                "first",
                "Attention of the first tokens to the very first",
                f"Mean over the rows after it, heads and {counted(n, 'prompt')}, beside the diagonal and uniform "
                "attention.",
                (
                    Series("first token", x, np.array([r["first_share"] for r in rows]), emphasis=True),
                    Series("itself", x, np.array([r["self_share"] for r in rows])),
                    Series("uniform", x, np.array([r["uniform_share"] for r in rows])),
                ),
                "layer",
                "share",
            )
        )
        return figures


UNITS = {
    "first_share": "share of attention on the first token, mean over rows 1 to 15, heads and prompts",
    "self_share": "the same on the query's own token",
    "uniform_share": "the same if every row were uniform",
    "first_logit": "nats, mean over rows 1 to 15, heads and prompts",
    "other_logit": "nats, mean over the other keys those rows see",
}
LABELS = {
    "first_share": "attention to the first token",
    "self_share": "attention to itself",
    "uniform_share": "uniform attention to the first token",
    "first_logit": "logit of the first token",
    "other_logit": "logit of other tokens",
    "largest_first_share": "largest attention to the first token",
    "of": "what is drawn",
    "shown": "layers drawn",
    "lift": "least times uniform",
}


def _logits(records: list[PromptRecord]) -> Float[np.ndarray, "layer row col"] | None:
    if any(sig.PREFIX_LOGITS.name not in record.arrays for record in records):
        return None
    logits = mean([record[sig.PREFIX_LOGITS] for record in records])
    return None if np.isnan(logits).all() else logits


def _row(layer: int, shares: np.ndarray, logits: np.ndarray | None) -> dict[str, Any] | None:
    """One layer's numbers; None for a layer without attention."""
    share = shares[layer]
    if np.isnan(share).all():
        return None
    seen = np.tril(np.ones(share.shape, dtype=bool)) if logits is None else ~np.isnan(logits[layer])
    row = {
        "layer": layer,
        "first_share": float(share[1:, 0].mean()),
        "self_share": float(np.diagonal(share)[1:].mean()),
        "uniform_share": float((seen[1:, 0] / seen[1:].sum(1)).mean()),
    }
    if logits is not None:
        row["first_logit"] = average(logits[layer][1:, 0])
        row["other_logit"] = average(logits[layer][1:, 1:])
    return row
