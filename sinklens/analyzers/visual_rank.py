"""Effective rank: in how many directions the tokens of a picture differ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from sinklens.core.counts import counted
from sinklens.core.figures import Figure, Lines, Series
from sinklens.core.reference import Reference
from sinklens.tracers import signals_pictures as pic
from sinklens.tracers.trace import Trace

from .base import Analyzer, Finding, Status, registry
from .pictured import spans_of, why_none, with_pictures


@registry.register("visual-rank")
@dataclass(frozen=True)
class VisualRank(Analyzer):
    """In how many directions the visual tokens of a picture differ where they enter the language model.

    How it is computed: singular values of the matrix of a picture's visual tokens, not centred, in double precision;
    their shares p of the sum; the exponential of the entropy of p. Found means that the mean over pictures is below
    `collapsed` of the largest rank the matrix could have: the tokens are redundant.

    Compared with the paper: p is over singular values and not over their squares, as there. It uses the number to set
    thresholds of a pruner, and takes the features that its pruner left; here all tokens count, so its values for
    pruned sets are no reference. No official code was read. The rule for found is ours.

    When not to trust it: it grows with the number of tokens, so compare pictures of equal size. A few tokens of huge
    norm dominate the spectrum and make the rank small.

    Args:
        collapsed: Share of the largest possible rank below which tokens are called redundant.
    """

    collapsed: float = 0.5

    name = "visual-rank"
    title = "Effective rank"
    place = 78
    default = False
    of_pictures = True
    formula = (
        "<math "
        'display="block"><mi>erank</mi><mo>=</mo><mi>exp</mi><mo>(</mo><mo>-</mo><munder><mo>∑</mo><mi>i</mi></munder>'
        "<msub><mi>p</mi><mi>i</mi></msub><mi>ln</mi><msub><mi>p</mi><mi>i</mi></msub><mo>)</mo></math>"
    )
    needs = frozenset({pic.VISUAL_SPECTRUM})
    summarises = ("n_pictures", "erank", "smallest", "biggest", "share")
    reference = Reference(
        key="agilepruner2026",
        title="AgilePruner: An Empirical Study of Attention and Diversity for Adaptive Visual Token Pruning in "
        "Large Vision-Language Models",
        code="https://github.com/cvsp-lab/AgilePruner",
        authors="Changwoo Baek and Jouwon Song and Sohyeon Kim and Kyeongbo Kong",
        year=2026,
        arxiv="2603.01236",
        section="effective rank of visual features",
    )

    def analyze(self, trace: Trace) -> Finding:
        reason = why_none(trace, *self.needs)
        if reason:
            return self.not_applicable(reason)
        rows: list[dict[str, Any]] = []
        spectra = []
        for record in with_pictures(trace, *self.needs):
            for image, values in enumerate(record[pic.VISUAL_SPECTRUM].astype(np.float64)):
                known = values[~np.isnan(values)]
                if len(known) and known.sum() > 0:
                    spectra.append(known)
                    rank = effective_rank(known)
                    name = spans_of(record).pictures[image].name
                    rows.append(
                        {
                            "prompt": record.index,
                            "image": image,
                            "name": name,
                            "erank": rank,
                            "largest": len(known),
                            "share": rank / len(known),
                        }
                    )
        if not rows:
            return self.not_applicable("no picture has tokens that differ from zero.")
        share = float(np.mean([row["share"] for row in rows]))
        ranks = [row["erank"] for row in rows]
        summary = {
            "n_pictures": len(rows),
            "erank": float(np.mean(ranks)),
            "smallest": float(min(ranks)),
            "biggest": float(max(ranks)),
            "share": share,
        }
        return self.finding(
            Status.FOUND if share < self.collapsed else Status.NOT_FOUND,
            f"The visual tokens of a picture have an effective rank of {summary['erank']:.1f} on average "
            f"({summary['smallest']:.1f} to {summary['biggest']:.1f}), {100 * share:.0f} % of the largest possible.",
            rows=sorted(rows, key=lambda row: row["erank"]),
            summary=summary,
            units=UNITS,
            labels=LABELS,
            figures=_figures(spectra),
        )


def effective_rank(values: Float[np.ndarray, " value"]) -> float:
    """exp of the entropy of singular values divided by their sum; zeros add nothing."""
    p = values / values.sum()
    p = p[p > 0]
    return float(np.exp(-(p * np.log(p)).sum()))


UNITS = {
    "erank": "effective rank",
    "largest": "the smaller of tokens and width",
    "share": "effective rank over the largest possible",
}
LABELS = {
    "erank": "effective rank",
    "image": "picture",
    "share": "of the largest possible",
    "n_pictures": "pictures",
}


def _figures(spectra: list[np.ndarray]) -> list[Figure]:
    width = min(len(values) for values in spectra)
    mean = np.mean([values[:width] / values.sum() for values in spectra], axis=0)
    return [
        Lines(
            "spectrum",
            "Spectrum of the visual tokens",
            f"Singular values over their sum, largest first, mean over {counted(len(spectra), 'picture')}.",
            (Series("share", np.arange(width), mean, emphasis=True),),
            "singular value",
            "share",
            log_y=True,
        )
    ]
