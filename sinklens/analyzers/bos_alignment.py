"""BOS alignment: how much all tokens' hidden states share the first token's direction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from sinklens.core.counts import counted
from sinklens.core.figures import Figure, Lines, Series
from sinklens.tracers import signals as sig
from sinklens.tracers.trace import PromptRecord, Trace

from .base import Analyzer, Finding, Reference, Status, registry

FIRST = 0


@registry.register("bos-alignment")
@dataclass(frozen=True)
class BosAlignment(Analyzer):
    """How closely the states of all other tokens follow the first token's, layer by layer.

    How it is computed: after every block, the squared cosine of each token's state with the first token's state,
    averaged over the tokens after the first, then over prompts; and the share of tokens whose cosine exceeds `aligned`
    in size, either sign. The mean over layers leaves out the last block. Sink-like are aligned tokens whose norm is
    also at least `norm_gate` times the layer's median; found means that in some layer `min_share` of the tokens are.

    Compared with the paper: Cappellazzo et al. use the mean squared cosine as a training loss, over layers 1 to L - 1
    of L (embedding and last left out) and over the tokens that are not the answer; here all tokens of the prompt take
    part, nothing is trained, and the same layers enter the mean. The share of aligned tokens uses the 0.9 by which
    they and the paper on secondary sinks recognise further sinks. The norm gate and the rule for "found" are ours.
    The official code computes the same squared cosine as the text, so there is one recipe.

    When not to trust it: without a BOS token the first token is a word and the figure speaks of that word. In late
    layers, and in encoders everywhere, all states can share a narrow cone, and then everything is aligned with
    everything: read the sink-like tokens beside the aligned ones. A repeated first token is aligned with itself.

    Args:
        aligned: |cosine| above which a token counts as aligned.
        norm_gate: In units of the layer's median norm.
        min_share: Share of sink-like tokens that makes it found.
    """

    aligned: float = 0.9
    norm_gate: float = 3.0
    min_share: float = 0.001

    name = "bos-alignment"
    title = "BOS alignment"
    place = 65
    default = False
    formula = (
        '<math display="block"><msub><mi>b</mi><mi>l</mi></msub><mo>=</mo><munder><mi>mean</mi><mrow><mi>t</mi>'
        "<mo>≠</mo><mn>0</mn></mrow></munder><msup><mi>cos</mi><mn>2</mn></msup><mo>(</mo><msub><mi>h</mi><mrow><mi>l</mi>"
        "<mo>,</mo><mn>0</mn></mrow></msub><mo>,</mo><msub><mi>h</mi><mrow><mi>l</mi><mo>,</mo><mi>t</mi></mrow></msub>"
        "<mo>)</mo></math>"
    )
    needs = frozenset({sig.RESIDUAL_COSINE, sig.REFERENCE_POSITION, sig.RESIDUAL_NORM})
    summarises = (
        "cos2_mean", "cos2_max", "cos2_max_layer", "aligned_max", "aligned_max_layer", "sink_like_max",
        "sink_like_max_layer", "random_level", "token", "same_token_share", "n_prompts",
    )  # fmt: skip
    reference = Reference(
        key="cappellazzo2025mitigating",
        title="Mitigating Attention Sinks and Massive Activations in Audio-Visual Speech Recognition with LLMs",
        authors="Umberto Cappellazzo and others",
        year=2025,
        arxiv="2510.22603",
        section="decorrelation loss",
    )

    def analyze(self, trace: Trace) -> Finding:
        records = [record for record in trace if len(record) > 1]
        if not records:
            return self.not_applicable("it needs prompts of at least two tokens.")
        if any(sig.RESIDUAL_COSINE.name not in record.arrays for record in records):
            return self.not_applicable(
                "the trace does not compare states with the first token's; profile again."
            )
        squared = mean_known([(_cosines(record) ** 2).mean(1) for record in records])
        share = mean_known([self._aligned(record, 0.0) for record in records])
        large = mean_known([self._aligned(record, self.norm_gate) for record in records])
        if np.isnan(squared).all():
            return self.not_applicable("no layer was compared with the first token.")
        rows = [
            {
                "layer": layer,
                "cos2": float(squared[layer]),
                "aligned": float(share[layer]),
                "sink_like": float(large[layer]),
                "n_prompts": len(records),
            }
            for layer in np.flatnonzero(~np.isnan(squared)).tolist()
        ]
        rows.sort(key=lambda row: (-row["cos2"], row["layer"]))
        summary = _summary(trace, records, squared, share, large)
        found = summary["sink_like_max"] >= self.min_share
        return self.finding(
            Status.FOUND if found else Status.NOT_FOUND,
            _verdict(summary, found, self.aligned),
            rows=rows,
            summary=summary,
            units=UNITS,
            labels=LABELS,
            figures=_figures(squared, share, len(records), self.aligned),
            notes=_notes(records),
        )

    def _aligned(self, record: PromptRecord, gate: float) -> Float[np.ndarray, " layer"]:
        """Share of the tokens after the first that are aligned and large, NaN in layers without a comparison."""
        cosine, norm = _cosines(record), record[sig.RESIDUAL_NORM]
        large = norm[:, 1:] >= gate * np.median(norm, axis=1, keepdims=True)
        return np.where(np.isnan(cosine).any(1), np.nan, ((np.abs(cosine) > self.aligned) & large).mean(1))


UNITS = {
    "cos2": "squared cosine with the first token's state, mean over tokens and prompts",
    "aligned": "share of the tokens with |cosine| above the threshold, mean over prompts",
    "sink_like": "share of the tokens that are aligned and have a large norm, mean over prompts",
}

LABELS = {
    "cos2": "mean squared cosine",
    "aligned": "tokens aligned",
    "cos2_mean": "mean squared cosine, all layers but the last",
    "cos2_max": "largest of a layer",
    "cos2_max_layer": "in layer",
    "aligned_max": "largest share of aligned tokens",
    "aligned_max_layer": "in layer",
    "sink_like_max": "largest share of sink-like tokens",
    "sink_like_max_layer": "in layer",
    "random_level": "mean squared cosine of random directions",
    "same_token_share": "prompts that begin with this token",
}


def _cosines(record: PromptRecord) -> Float[np.ndarray, "layer pos"]:
    """Cosines of all tokens but the first with the first; NaN in layers that were not compared with it."""
    cosine = record[sig.RESIDUAL_COSINE][:, FIRST, 1:].astype(np.float64)
    # Layers without attention record no position (-1), but the first token's state is compared there too.
    return np.where(record[sig.REFERENCE_POSITION][:, FIRST, None] <= 0, cosine, np.nan)


def mean_known(values: list[Float[np.ndarray, " layer"]]) -> Float[np.ndarray, " layer"]:
    """Mean over prompts of what is known, NaN where nothing is."""
    stacked = np.array(values)
    known = ~np.isnan(stacked)
    total = np.where(known, stacked, 0.0).sum(0)
    return np.where(known.any(0), total / np.maximum(known.sum(0), 1), np.nan)


def _summary(
    trace: Trace,
    records: list[PromptRecord],
    squared: Float[np.ndarray, " layer"],
    share: Float[np.ndarray, " layer"],
    large: Float[np.ndarray, " layer"],
) -> dict[str, Any]:
    inner = squared[:-1] if len(squared) > 1 else squared
    token = records[0].pieces[0]
    return {
        "cos2_mean": float(np.nanmean(inner)) if not np.isnan(inner).all() else None,
        "cos2_max": float(np.nanmax(squared)),
        "cos2_max_layer": int(np.nanargmax(squared)),
        "aligned_max": float(np.nanmax(share)),
        "aligned_max_layer": int(np.nanargmax(share)),
        "sink_like_max": float(np.nanmax(large)),
        "sink_like_max_layer": int(np.nanargmax(large)),
        "random_level": 1 / trace.info.hidden_size,
        "token": token,
        "same_token_share": sum(record.pieces[0] == token for record in records) / len(records),
        "n_prompts": len(records),
    }


def _verdict(summary: dict[str, Any], found: bool, aligned: float) -> str:
    first = f"the first token ({summary['token']!r})"
    level = (
        f"mean squared cosine {summary['cos2_mean'] or 0:.3f} over the layers, at most {summary['cos2_max']:.3f} "
        f"(layer {summary['cos2_max_layer']}), {summary['random_level']:.3f} for random directions"
    )
    aligned_max, sink_like = 100 * summary["aligned_max"], 100 * summary["sink_like_max"]
    if not found:
        return (
            f"No other token becomes like {first}: {level}; at most {aligned_max:.1f} % of the tokens are aligned "
            f"above {aligned:g}, and {sink_like:.2g} % with a large norm."
        )
    return (
        f"Up to {sink_like:.2g} % of the tokens (layer {summary['sink_like_max_layer']}) have a large norm and are "
        f"aligned with {first} above {aligned:g}: {level}."
    )


def _notes(records: list[PromptRecord]) -> list[str]:
    firsts = {record.pieces[0] for record in records}
    return [f"The prompts begin with {len(firsts)} different tokens."] if len(firsts) > 1 else []


def _figures(
    squared: Float[np.ndarray, " layer"], share: Float[np.ndarray, " layer"], prompts: int, aligned: float
) -> list[Figure]:
    x = np.arange(len(squared))
    return [
        Lines(
            "alignment",
            "Alignment with the first token by layer",
            f"Mean squared cosine of the other tokens' states with the first token's, and share of tokens with "
            f"|cosine| above {aligned:g}; mean over {counted(prompts, 'prompt')}.",
            (
                Series("mean squared cosine", x, squared, emphasis=True),
                Series("share of tokens aligned", x, share),
            ),
            "layer",
            "mean",
        )
    ]
