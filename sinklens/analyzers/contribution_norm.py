"""Contribution norm: what visual sinks add to the text beside what other visual tokens add."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from sinklens.core.counts import counted
from sinklens.core.figures import Figure, Heatmap, Lines, Series, Tile
from sinklens.core.papers import VISUAL_SINKS
from sinklens.tracers import signals as sig
from sinklens.tracers.trace import PromptRecord, Trace

from .base import Analyzer, Finding, Status, registry
from .image_centric_heads import mean_known
from .visual import NO_PICTURES, VISUAL, VISUAL_SINK, no_rule, rule_of, sources_of, with_pictures

PerHead = Float[np.ndarray, "layer head"]


@registry.register("contribution-norm")
@dataclass(frozen=True)
class ContributionNorm(Analyzer):
    """How much visual sinks add to the text tokens, against the attention they get.

    How it is computed: the contribution of key j to query i in a head is the norm of α_ij v_j W_O, where v_j W_O is the
    key's value through the head's slice of the output projection. Per head and token it is averaged over the queries
    of the text after the picture, which needs the mean attention and the norm of v_j W_O and no map; then over the
    visual sinks of the layer, and over the other visual tokens. A prompt's ratios (sinks over others) of attention,
    value norm and contribution are formed per layer and head. Only heads that attend to sinks take part: where the
    ratio of attention is above 1. The median is taken over these heads and the prompts; found means that in the median
    a sink adds less than another visual token, although it gets more attention.

    Compared with the paper: Kang et al. compare the norm of α x W_V W_O of visual sinks and of other visual tokens and
    find the sinks' far smaller although their attention is large; their program does not compute it, so there is one
    recipe. Biases of the value projection are part of v here. The medians, the choice of heads and the rule for
    "found" are ours.

    When not to trust it: contributions of several keys may cancel or add up, norms do not say. Sinks are those of the
    run. A layer's few sinks decide its ratios, so read how many there are. In a model whose output projection is
    quantised there is no norm behind it, and this does not apply.
    """

    name = "contribution-norm"
    title = "Contribution of visual sinks"
    place = 16
    of_pictures = True
    formula = (
        '<math display="block"><msub><mi>c</mi><mrow><mi>i</mi><mi>j</mi></mrow></msub><mo>=</mo><mo>‖</mo><msub><mi>α'
        "</mi><mrow><mi>i</mi><mi>j</mi></mrow></msub><msub><mi>x</mi><mi>j</mi></msub><msub><mi>W</mi><mi>V</mi></msub>"
        "<msub><mi>W</mi><mi>O</mi></msub><mo>‖</mo></math>"
    )
    needs = frozenset({sig.CONTRIBUTION, sig.CLASS_VALUE_NORM, sig.KEY_CLASS_MASS, sig.KEY_CLASS_COUNT})
    summarises = (
        "n_prompts", "n_layers", "attention_ratio", "value_ratio", "contribution_ratio", "attending",
        "less",
    )  # fmt: skip
    reference = VISUAL_SINKS.at("contribution of visual sinks to the residual stream")

    def analyze(self, trace: Trace) -> Finding:
        records = with_pictures(trace)
        if not records:
            return self.not_applicable(NO_PICTURES)
        rule = rule_of(trace)
        reason = no_rule(rule)
        if rule is None or reason is not None:
            return self.not_applicable(reason or "")
        records = [record for record in records if sig.CONTRIBUTION.name in record.arrays]
        if not records:
            return self.not_applicable(
                "no text follows a picture, or the model does not show values and output projection."
            )
        ratios = [_ratios(record) for record in records]
        if not any((~np.isnan(ratio["contribution"])).any() for ratio in ratios):
            return self.not_applicable(
                f"no prompt has a visual sink. Sink {sources_of(rule.dims)}; visual-sinks has the numbers."
            )
        rows = _rows(records, ratios)
        summary = _summary(records, ratios, rows)
        found = summary["attending"] > 0 and (summary["contribution_ratio"] or 0.0) < 1
        return self.finding(
            Status.FOUND if found else Status.NOT_FOUND,
            _verdict(summary, found),
            rows=rows,
            summary=summary,
            units=UNITS,
            labels=LABELS,
            figures=_figures(ratios, rows),
            tiles=[_tile(self.title, self.name, summary)],
        )


UNITS = {
    "attention_ratio": "attention per visual sink over that per other visual token, median over prompts and "
    "heads that attend",
    "value_ratio": "the same of the norm of v W_O",
    "contribution_ratio": "the same of the norm of α v W_O",
    "attending": "share of prompts and heads that attend to visual sinks more than to other visual tokens",
    "less": "share of those in which a visual sink adds less than another visual token",
    "visual_sinks": "visual sinks of the layer, mean over prompts",
    "n_prompts": "prompts with a visual sink in the layer",
}
LABELS = {
    "attention_ratio": "attention, sinks over others",
    "value_ratio": "value norm, sinks over others",
    "contribution_ratio": "contribution, sinks over others",
    "attending": "heads that attend to sinks",
    "less": "of them, heads in which sinks add less",
    "n_layers": "layers with visual sinks",
}


def _ratios(record: PromptRecord) -> dict[str, PerHead]:
    """Sinks over other visual tokens, per head; NaN in layers without a visual sink, or without another token."""
    counts = record[sig.KEY_CLASS_COUNT][:, None, :].astype(np.float64)
    per_token = {
        "attention": record[sig.KEY_CLASS_MASS] / np.where(counts > 0, counts, np.nan),
        "value": record[sig.CLASS_VALUE_NORM],
        "contribution": record[sig.CONTRIBUTION],
    }
    ratios = {}
    for name, values in per_token.items():
        sinks, others = values[..., VISUAL_SINK].astype(np.float64), values[..., VISUAL].astype(np.float64)
        ratios[name] = np.divide(sinks, others, out=np.full_like(sinks, np.nan), where=others > 0)
    return ratios


def _median(values: np.ndarray) -> float | None:
    known = values[~np.isnan(values)]
    return float(np.median(known)) if len(known) else None


def _medians(stacked: dict[str, np.ndarray]) -> dict[str, float | None]:
    """Medians over the heads that attend to sinks, how many of all do, and in how many of them sinks add less."""
    known = ~np.isnan(stacked["attention"])
    attending = known & (np.nan_to_num(stacked["attention"]) > 1)
    added = stacked["contribution"][attending]
    return {
        **{f"{name}_ratio": _median(values[attending]) for name, values in stacked.items()},
        "attending": float(attending.sum() / max(known.sum(), 1)),
        "less": float((added < 1).mean()) if len(added) else None,
    }


def _rows(records: list[PromptRecord], ratios: list[dict[str, PerHead]]) -> list[dict[str, Any]]:
    stacked = {name: np.array([ratio[name] for ratio in ratios]) for name in ratios[0]}
    sinks = np.array([record[sig.KEY_CLASS_COUNT][:, VISUAL_SINK] for record in records])
    rows = []
    for layer in range(sinks.shape[1]):
        known = ~np.isnan(stacked["attention"][:, layer])
        if known.any():
            rows.append(
                {
                    "layer": layer,
                    **_medians({name: values[:, layer] for name, values in stacked.items()}),
                    "visual_sinks": float(sinks[:, layer].mean()),
                    "n_prompts": int(known.any(1).sum()),
                }
            )
    return sorted(
        rows, key=lambda row: (not row["attending"], row["contribution_ratio"] or 0.0, row["layer"])
    )


def _summary(
    records: list[PromptRecord], ratios: list[dict[str, PerHead]], rows: list[dict[str, Any]]
) -> dict[str, Any]:
    pooled = {name: np.array([ratio[name] for ratio in ratios]) for name in ratios[0]}
    return {"n_prompts": len(records), "n_layers": len(rows), **_medians(pooled)}


def _verdict(summary: dict[str, Any], found: bool) -> str:
    layers = f"{summary['n_layers']} layer{'s' * (summary['n_layers'] > 1)} with visual sinks"
    if not summary["attending"]:
        return f"Visual sinks get no more attention than other visual tokens in any head of {layers}."
    begin = (
        "Visual sinks get much attention and add little" if found else "Visual sinks add as much as they get"
    )
    return (
        f"{begin}: in {100 * summary['attending']:.0f} % of the heads of {layers} a visual sink gets more "
        "attention from the "
        f"text than another visual token, in the median {summary['attention_ratio']:.3g} times as much; its value is "
        f"{summary['value_ratio']:.2g} times as long, and it adds {summary['contribution_ratio']:.2g} times as "
        "much. It adds "
        f"less in {100 * summary['less']:.0f} % of these heads."
    )


def _tile(title: str, name: str, summary: dict[str, Any]) -> Tile:
    ratio = summary["contribution_ratio"]
    if ratio is None:
        return Tile(title, "none attended", "no head prefers visual sinks", link=name)
    return Tile(title, f"{ratio:.2g} ×", "another visual token, where attended", link=name)


def _figures(ratios: list[dict[str, PerHead]], rows: list[dict[str, Any]]) -> list[Figure]:
    in_order = sorted(rows, key=lambda row: row["layer"])
    layers = np.array([row["layer"] for row in in_order])
    lines = [
        Series(
            label,
            layers,
            np.array([row[f"{key}_ratio"] for row in in_order], dtype=np.float64),
            emphasis=key == "contribution",
        )
        for key, label in (
            ("contribution", "contribution"),
            ("attention", "attention"),
            ("value", "value norm"),
        )
    ]
    mean = np.exp(
        mean_known([np.log(np.where(r["contribution"] > 0, r["contribution"], np.nan)) for r in ratios])
    )
    return [
        Lines(
            "by_layer",
            "Visual sinks over other visual tokens, by layer",
            f"Per token, from the text after the picture; median over heads and {counted(len(ratios), 'prompt')} "
            "of the "
            "ratio within "
            "each.",
            tuple(lines),
            "layer",
            "ratio",
            log_y=True,
        ),
        Heatmap(
            "contribution",
            "Contribution of visual sinks over that of other visual tokens, by head",
            f"Geometric mean over {counted(len(ratios), 'prompt')} of the ratio within each. Hatched: no visual sink.",
            mean,
            "ratio",
            log=True,
        ),
    ]
