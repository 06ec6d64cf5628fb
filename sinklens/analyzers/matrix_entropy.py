"""Matrix entropy: how varied the queries of visual tokens are across heads, and where that collapses."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from sinklens.core.counts import counted
from sinklens.core.errors import UsageError
from sinklens.core.figures import Lines, Series
from sinklens.core.reference import Reference
from sinklens.tracers import signals_pictures as pic
from sinklens.tracers.trace import Trace

from .base import Analyzer, Finding, Status, registry
from .pictured import why_none, with_pictures


@registry.register("matrix-entropy")
@dataclass(frozen=True)
class MatrixEntropy(Analyzer):
    """How varied the queries of visual tokens are across heads, and the layer where that collapses.

    How it is computed: for each visual token and layer, the queries of all heads (after rotation), centred across
    heads, make a matrix; its Gram matrix over the number of heads has eigenvalues, clamped at 1e-10. recipe="paper"
    divides them by their sum and takes their entropy over the logarithm of the heads: 0 is one direction, 1 is even.
    The collapse is the layer with the largest drop of the mean over tokens and prompts from the layer before, found if
    it is at least `drop` of that.

    Compared with the paper: recipe="code" follows the published program, which does not divide by the sum, so that the
    number mixes size and spectrum. The paper reads the collapse off the curve (before layer 2 in LLaVA, 1 in
    Qwen2.5-VL); the rule with `drop` is ours. It prunes the tokens of small entropy, which is not done here.

    When not to trust it: heads of few dims or few heads bound the entropy; compare layers of one model. Without the
    division a layer with large queries has a large, possibly negative, number.

    Args:
        recipe: `paper` or `code`.
        drop: Relative fall from one layer to the next that is a collapse.
    """

    recipe: str = "paper"
    drop: float = 0.2

    name = "matrix-entropy"
    title = "Matrix entropy"
    place = 83
    default = False
    of_pictures = True
    formula = (
        "<math "
        'display="block"><mi>H</mi><mo>=</mo><mo>-</mo><mfrac><mn>1</mn><mrow><mi>ln</mi><mi>n</mi></mrow></mfrac>'
        "<munder><mo>∑</mo><mi>i</mi></munder><msub><mi>λ</mi><mi>i</mi></msub><mi>ln</mi><msub><mi>λ</mi><mi>i</mi></msub>"
        "</math>"
    )
    needs = frozenset({pic.QUERY_ENTROPY})
    summarises = ("n_prompts", "collapse_layer", "largest_drop")
    reference = Reference(
        key="entropyprune2026",
        title="EntropyPrune: Matrix Entropy Guided Visual Token Pruning for Multimodal Large Language Models",
        code="https://github.com/YahongWang1/EntropyPrune",
        authors="Yahong Wang and Juncheng Wu and Zhangkai Ni and Chengmei Yang and Yihang Liu and Longzhen Yang "
        "and Yuyin Zhou and Ying Wen and Lianghua He",
        year=2026,
        arxiv="2602.17196",
        section="matrix entropy and the entropy collapse layer",
    )

    def __post_init__(self) -> None:
        if self.recipe not in ("paper", "code"):
            raise UsageError(f"matrix-entropy: recipe must be paper or code, got {self.recipe!r}.")

    def analyze(self, trace: Trace) -> Finding:
        reason = why_none(trace, *self.needs)
        if reason:
            return self.not_applicable(reason)
        if trace.info.heads < 3:
            return self.not_applicable(
                f"{trace.info.heads} heads have no entropy across heads: centred, their queries are one direction."
            )
        records = with_pictures(trace, *self.needs)
        index = 1 if self.recipe == "paper" else 0
        each = np.array(
            [record[pic.QUERY_ENTROPY][:, index].astype(np.float64).mean(-1) for record in records]
        )
        mean = each.mean(0)
        if not np.isfinite(mean).any():
            return self.not_applicable("no layer has queries that could be read.")
        layer, fall = collapse(mean)
        rows = [{"layer": i, "entropy": float(value)} for i, value in enumerate(mean) if np.isfinite(value)]
        collapsed = fall >= self.drop
        level = f"{np.nanmin(mean):.3f} to {np.nanmax(mean):.3f} over the layers"
        said = (
            f"from layer {layer - 1} to {layer} it falls by {100 * fall:.0f} %" if layer else "it never falls"
        )
        return self.finding(
            Status.FOUND if collapsed else Status.NOT_FOUND,
            f"The matrix entropy of the visual tokens' queries is {level}; {said}"
            + ("." if collapsed or not layer else ", which is no collapse."),
            rows=rows,
            summary={
                "n_prompts": len(records),
                "collapse_layer": layer if collapsed else None,
                "largest_drop": fall,
            },
            units={"entropy": "mean over visual tokens and prompts"},
            labels={"largest_drop": "largest fall between layers", "collapse_layer": "collapse layer"},
            figures=[
                Lines(
                    "entropy",
                    "Matrix entropy of visual tokens",
                    f"Mean over visual tokens and {counted(len(records), 'prompt')}.",
                    (Series("entropy", np.arange(len(mean)), mean, emphasis=True),),
                    "layer",
                    "entropy over ln(heads)",
                )
            ],
        )


def collapse(mean: Float[np.ndarray, " layer"]) -> tuple[int, float]:
    """The layer with the largest fall from the one before, and the fall relative to that; (0, 0) without any."""
    before, after = mean[:-1], mean[1:]
    with np.errstate(invalid="ignore", divide="ignore"):
        fall = np.where(np.abs(before) > 0, (before - after) / np.abs(before), 0.0)
    fall = np.nan_to_num(fall)
    if not len(fall) or fall.max() <= 0:
        return 0, 0.0
    return int(fall.argmax()) + 1, float(fall.max())
