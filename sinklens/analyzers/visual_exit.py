"""Exit layer: from which layer on the answer no longer needs the picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from sinklens.core.counts import counted
from sinklens.core.figures import Figure, Lines, Series
from sinklens.core.reference import Reference
from sinklens.tracers.trace import Trace

from .base import Analyzer, Finding, Status, registry


@registry.register("visual-exit")
@dataclass(frozen=True)
class VisualExitLayer(Analyzer):
    """From which layer on all visual tokens can leave without changing the answer.

    How it is computed: for every layer, the prompt runs with its visual tokens hidden from all others from that layer
    on. A prompt's exit layer is the smallest one where KL from the unchanged to the changed prediction, mean over the
    tokens of the answer (without one, the text after the picture), is below `epsilon` and the most likely tokens are
    the same. It need not hold in later layers; `stable` is the smallest from which it does.

    Compared with the paper: DyVTE trains a router per layer, with labels from an oracle: the layer qualifies if over
    99 % of the most likely tokens agree and the loss is below 1.03 times the unchanged one. Nothing is trained here;
    the KL rule is ours, and the oracle's share of prompts (`oracle`) is given beside it, layer by layer. The published
    code trains and runs the router; it has no untrained rule.

    When not to trust it: answers that the text alone gives away leave at layer 0, whatever the picture. Each layer
    costs a pass. A model that was never trained to lose its picture half-way may break for that reason alone.

    Args:
        epsilon: KL in nats per token.
        loss_ratio: Of the oracle.
    """

    epsilon: float = 0.01
    loss_ratio: float = 1.03

    name = "visual-exit"
    title = "Visual exit layer"
    place = 84
    default = False
    of_pictures = True
    formula = (
        "<math "
        'display="block"><msup><mi>ℓ</mi><mo>*</mo></msup><mo>=</mo><mi>min</mi><mo>{</mo><mi>ℓ</mi><mo>:</mo><mi>KL</mi>'
        "<mo>(</mo><mi>p</mi><mo>‖</mo><msub><mi>p</mi><mrow><mtext>exit</mtext><mi>ℓ</mi></mrow></msub><mo>)</mo><mo>&lt;</mo>"
        "<mi>ε</mi><mo>}</mo></math>"
    )
    needs = frozenset()
    summarises = ("n_prompts", "layers", "exit_median", "stable_median", "never")
    reference = Reference(
        key="wu2024accelerating",
        title="Accelerating Multimodal Large Language Models via Dynamic Visual-Token Exit and the Empirical Findings",
        authors="Qiong Wu and others",
        year=2024,
        arxiv="2411.19628",
        section="labels of the exit router",
        code="https://github.com/DoubtedSteam/DyVTE",
    )

    def analyze(self, trace: Trace) -> Finding:
        found = (trace.manifest.get("experiments") or {}).get("visual_exit")
        if not found:
            skipped = (trace.manifest.get("experiments_skipped") or {}).get("visual_exit")
            return self.not_applicable(skipped or "it was not run, add --verify.")
        if not found["prompts"]:
            return self.not_applicable("no prompt has text after its picture.")
        kl = np.array([one["kl"] for one in found["prompts"]])
        agrees = np.array([one["agrees"] for one in found["prompts"]])
        ratio = np.array([one["loss_ratio"] for one in found["prompts"]])
        qualifies = (kl < self.epsilon) & agrees
        layers = kl.shape[1]
        # One more layer stands for "not before the end".
        first = np.where(qualifies.any(1), qualifies.argmax(1), layers)
        stable = layers - np.cumprod(qualifies[:, ::-1], axis=1).sum(1)
        oracle = (agrees & (ratio < self.loss_ratio)).mean(0)
        rows = [
            {
                "layer": layer,
                "kl": float(kl[:, layer].mean()),
                "kl_largest": float(kl[:, layer].max()),
                "agrees": float(agrees[:, layer].mean()),
                "qualifies": float(qualifies[:, layer].mean()),
                "oracle": float(oracle[layer]),
            }
            for layer in range(layers)
        ]
        summary = {
            "n_prompts": len(kl),
            "layers": layers,
            "exit_median": float(np.median(first)),
            "stable_median": float(np.median(stable)),
            "never": int((first == layers).sum()),
        }
        early = int((first < layers).sum())
        return self.finding(
            Status.FOUND if summary["exit_median"] < layers else Status.NOT_FOUND,
            _verdict(summary, early, self.epsilon),
            rows=rows,
            summary=summary,
            units=UNITS,
            labels=LABELS,
            figures=_figures(kl, qualifies),
        )


UNITS = {
    "layer": "the first layer without visual tokens",
    "kl": "KL from the unchanged prediction, nats per token, mean over prompts",
    "agrees": "prompts whose most likely tokens are the same",
    "qualifies": "prompts in which both hold",
    "oracle": "prompts that the published labels let leave there",
}
LABELS = {
    "kl_largest": "largest KL of a prompt",
    "exit_median": "median exit layer",
    "stable_median": "median layer from which it holds to the end",
    "never": "prompts that need the picture in every layer",
}


def _verdict(summary: dict[str, Any], early: int, epsilon: float) -> str:
    if not early:
        return (
            f"Every prompt needs its picture in all {summary['layers']} layers (KL below {epsilon:g} is never "
            f"reached)."
        )
    if summary["exit_median"] >= summary["layers"]:
        return (
            f"Most prompts need their picture in every layer; {early} of {summary['n_prompts']} could do without it "
            f"before the end (KL below {epsilon:g} and the same most likely tokens)."
        )
    never = (
        f"; {summary['never']} of {summary['n_prompts']} need it in every layer" if summary["never"] else ""
    )
    return (
        f"The answer no longer needs the picture from layer {summary['exit_median']:g} of {summary['layers']} on "
        "(median "
        f"over {counted(summary['n_prompts'], 'prompt')}; KL below {epsilon:g} and the same most likely tokens){never}."
    )


def _figures(kl: np.ndarray, qualifies: np.ndarray) -> list[Figure]:
    x = np.arange(kl.shape[1])
    return [
        Lines(
            "exit",
            "Change of the answer when the picture leaves",
            f"KL from the unchanged prediction when visual tokens are hidden from a layer on, mean over "
            f"{counted(len(kl), 'prompt')}.",
            (
                Series("KL", x, kl.mean(0), emphasis=True),
                Series("prompts that may leave", x, qualifies.mean(0)),
            ),
            "first layer without visual tokens",
            "nats per token; share",
        )
    ]
