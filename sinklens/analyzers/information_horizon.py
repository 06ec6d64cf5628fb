"""Information horizon: the layer behind which no part of the picture tells the answer anything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from sinklens.core.counts import counted
from sinklens.core.errors import UsageError
from sinklens.core.figures import Figure, Lines, Series
from sinklens.core.papers import RANDOM_VISUAL_TOKENS
from sinklens.tracers.trace import Trace

from .base import Analyzer, Finding, Status, registry


@registry.register("information-horizon")
@dataclass(frozen=True)
class InformationHorizon(Analyzer):
    """The layer from which on no window of the picture adds to the probability of the answer.

    How it is computed: the visual tokens are cut into windows of `window` x `window` cells. The information of a window
    at a layer is the mean probability of the answer's tokens when from that layer on only this window of the picture is
    left, minus that when nothing of it is left. The horizon of a prompt is the first layer from which mean and
    standard deviation over the windows stay below `small` to the end. Positions are kept.

    Compared with the paper: it keeps one 2 x 2 window of a 24 x 24 grid at a time and reads the horizon off the curve;
    the rule with `small` is ours. The published README speaks of removing the window, the published code keeps it, and
    so does this. The code looks up the ids of Yes and No; here it is the probability of the whole answer, mean over its
    tokens. Its information mode keeps positions too; its random pruning renumbers them.

    When not to trust it: it needs prompts with their answers; without them the text after the picture stands in.
    Windows that only together tell the answer have no information one by one. The cost is a pass per window and layer.

    Args:
        window: Cells per side of a window.
        every: Layers between two looks.
        small: Probability that counts as none.
    """

    window: int = 2
    every: int = 1
    small: float = 0.01

    name = "information-horizon"
    title = "Information horizon"
    place = 85
    default = False
    of_pictures = True
    formula = (
        "<math "
        'display="block"><msub><mi>I</mi><mi>ℓ</mi></msub><mo>(</mo><mi>g</mi><mo>)</mo><mo>=</mo><mi>p</mi><mo>(</mo><mi>y</mi>'
        "<mo>|</mo><mi>g</mi><mo>)</mo><mo>-</mo><mi>p</mi><mo>(</mo><mi>y</mi><mo>|</mo><mo>∅</mo><mo>)</mo></math>"
    )
    needs = frozenset()
    summarises = ("n_prompts", "n_windows", "horizon_median", "never", "full")
    reference = RANDOM_VISUAL_TOKENS.at("information of token groups and the information horizon")

    def __post_init__(self) -> None:
        if self.window < 1 or self.every < 1:
            raise UsageError("information-horizon: window and every must be at least 1.")

    def analyze(self, trace: Trace) -> Finding:
        found = (trace.manifest.get("experiments") or {}).get("visual_horizon")
        if not found:
            skipped = (trace.manifest.get("experiments_skipped") or {}).get("visual_horizon")
            return self.not_applicable(skipped or "it was not run, add --verify.")
        if not found["prompts"]:
            return self.not_applicable("no prompt has text after its picture.")
        layers = np.array(found["layers"])
        information = [np.array(one["information"]) for one in found["prompts"]]
        mean = np.array([each.mean(1) for each in information])
        spread = np.array([each.std(1) for each in information])
        quiet = (np.abs(mean) < self.small) & (spread < self.small)
        lasting = np.cumprod(quiet[:, ::-1], axis=1)[:, ::-1].astype(bool)
        horizon = [int(layers[row.argmax()]) if row.any() else None for row in lasting]
        rows = [
            {
                "layer": int(layer),
                "information": float(mean[:, i].mean()),
                "spread": float(spread[:, i].mean()),
                "largest": float(max(each[i].max() for each in information)),
                "without": float(np.mean([one["without"][i] for one in found["prompts"]])),
                "behind": float(lasting[:, i].mean()),
            }
            for i, layer in enumerate(layers)
        ]
        known = [layer for layer in horizon if layer is not None]
        summary = {
            "n_prompts": len(horizon),
            "n_windows": float(np.mean([each.shape[1] for each in information])),
            "horizon_median": float(np.median(known)) if known else None,
            "never": len(horizon) - len(known),
            "full": float(np.mean([one["full"] for one in found["prompts"]])),
        }
        return self.finding(
            Status.FOUND if known else Status.NOT_FOUND,
            _verdict(summary, rows, self.small),
            rows=rows,
            summary=summary,
            units=UNITS,
            labels=LABELS,
            figures=_figures(layers, mean, spread),
        )


UNITS = {
    "layer": "from which on only a window is left",
    "information": "probability that a window adds, mean over windows and prompts",
    "spread": "standard deviation over windows, mean over prompts",
    "without": "probability of the answer when nothing of the picture is left from there on",
    "behind": "prompts whose horizon is not after this layer",
}
LABELS = {
    "largest": "largest of a window",
    "horizon_median": "median horizon",
    "never": "prompts without a horizon",
    "full": "probability of the answer, unchanged model",
    "n_windows": "windows per prompt",
}


def _verdict(summary: dict[str, Any], rows: list[dict[str, Any]], small: float) -> str:
    last = rows[-1]
    if summary["horizon_median"] is None:
        return (
            f"No horizon: windows of the picture add {last['information']:+.3f} (spread {last['spread']:.3f}) to the "
            f"probability of the answer up to layer {last['layer']}."
        )
    never = (
        f"; {summary['never']} of {counted(summary['n_prompts'], 'prompt')} have none"
        if summary["never"]
        else ""
    )
    return (
        f"From layer {summary['horizon_median']:g} on (median) no window of the picture changes the probability "
        "of the answer "
        f"by {small:g}{never}."
    )


def _figures(layers: np.ndarray, mean: np.ndarray, spread: np.ndarray) -> list[Figure]:
    return [
        Lines(
            "information",
            "What windows of the picture tell, by layer",
            "Probability of the answer when one window is left from a layer on, minus that with none; "
            f"{counted(len(mean), 'prompt')}.",
            (
                Series("mean over windows", layers, mean.mean(0), emphasis=True),
                Series("standard deviation over windows", layers, spread.mean(0)),
            ),
            "layer",
            "probability",
        )
    ]
