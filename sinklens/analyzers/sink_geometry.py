"""Geometry of a sink: is it the angle between query and key, or the length of the key, and what of its value?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from sinklens.core.counts import counted
from sinklens.core.errors import UsageError
from sinklens.core.figures import Figure, Heatmap, Lines, Series
from sinklens.core.papers import WHEN_SINKS_EMERGE
from sinklens.tracers import signals as sig
from sinklens.tracers.trace import PromptRecord, Trace

from .base import TRUTH, Analyzer, Finding, Status, registry
from .heads import PerHead, Sink, find_sinks, mean, middle, n_heads, norm_ratio, number, reference_slots
from .primary_sinks import PrimarySinks


@dataclass(frozen=True)
class Geometry:
    """One sink, mean over prompts, per head; NaN where the trace does not tell.

    Attributes:
        cosine: Of the queries with the sink's key, and `others` with all other keys.
        key, value, value_out: Norm over the mean norm of the other positions, of the key, of the value, and of the
            value through the output projection.
    """

    sink: Sink
    cosine: PerHead
    others: PerHead
    key: PerHead
    value: PerHead
    value_out: PerHead

    @property
    def contrast(self) -> PerHead:
        return self.cosine - self.others

    @property
    def group(self) -> np.ndarray:
        """The heads to speak of: those that sink on the position, or all where none does consistently."""
        return self.sink.heads if self.sink.heads.any() else np.ones_like(self.sink.heads)


@registry.register("sink-geometry")
@dataclass(frozen=True)
class SinkGeometry(Analyzer):
    """Why queries choose the sink: because its key lies in their direction, or because it is long.

    How it is computed: for every position that primary-sinks calls a sink, per layer and head: the cosine of the
    queries after it with its key, beside the mean cosine with all other keys; the norm of its key, of its value and
    of its value through the head's slice of the output projection, each over the mean norm of all other positions
    (the sink itself is not in the denominator). A logit is the product of two norms and a cosine, so a sink is an
    effect of the angle if the cosine exceeds that with other keys by `angle`, and of the length if the key is
    `long` times as long as the others. Values are drained if the norm through the output projection is below
    `drained` times the others'. Means over prompts per head; the sentence gives the median over the sink's heads.

    Compared with the paper: Gu et al. compare cosine and norms at the first token; here the sink is where it was
    found. They take the plain norm of the value, Guo et al. (2410.13835) the norm through the output projection:
    both are given. The paper has no thresholds; `angle`, `long` and `drained` are ours. Keys are taken as the
    attention sees them, after rotation. Keys at all other positions enter the comparison, also those a query
    cannot see. The official code takes keys and values from the cache, so after rotation too, and averages their norms
    over samples and key-value heads; here they stand per head.

    When not to trust it: only two positions per layer are looked at closely while a prompt runs (the first token
    and the one most attended up to that layer), so a sink that is neither has norms but no cosine in that layer.
    Under a sliding window, queries that no longer see the sink enter its cosine as well.
    Attention with a bias on logits (ALiBi), a soft cap or a learned scale has more in a logit than norms and angle.
    A sink can rest on one channel of key and query that neither measure shows.

    Args:
        angle: Smallest difference of cosines that counts.
        long: Smallest ratio of key norms that counts.
        drained: Largest ratio of value norms that counts as drain.
    """

    angle: float = 0.1
    long: float = 1.25
    drained: float = 0.5

    name = "sink-geometry"
    title = "Sink geometry"
    place = 40
    formula = (
        '<math display="block"><msub><mi>z</mi><mrow><mi>q</mi><mo>,</mo><mi>s</mi></mrow></msub><mo>∝</mo>'
        "<mo>‖</mo><mi>q</mi><mo>‖</mo><mo>‖</mo><msub><mi>k</mi><mi>s</mi></msub><mo>‖</mo><mi>cos</mi><mo>(</mo>"
        "<mi>q</mi><mo>,</mo><msub><mi>k</mi><mi>s</mi></msub><mo>)</mo><mo>,</mo><mspace width='2em'/>"
        "<msub><mi>δ</mi><mi>s</mi></msub><mo>=</mo><mfrac><mrow><mo>‖</mo><msub><mi>v</mi><mi>s</mi></msub>"
        "<msub><mi>W</mi><mi>O</mi></msub><mo>‖</mo></mrow><mrow><munder><mi>mean</mi><mrow><mi>t</mi><mo>≠</mo>"
        "<mi>s</mi></mrow></munder><mo>‖</mo><msub><mi>v</mi><mi>t</mi></msub><msub><mi>W</mi><mi>O</mi></msub>"
        "<mo>‖</mo></mrow></mfrac></math>"
    )
    needs = PrimarySinks.needs | {
        sig.REFERENCE_POSITION,
        sig.QK_COSINE,
        sig.QK_COSINE_OTHERS,
        sig.KEY_NORM,
        sig.KEY_NORM_MEAN,
        sig.VALUE_OUT_NORM,
        sig.VALUE_OUT_NORM_MEAN,
    }
    summarises = (
        "position", "token", "n_sink_heads", "cosine", "cosine_all_heads", "cosine_others",
        "cosine_others_all_heads", "cosine_contrast", "cosine_contrast_all_heads", "key_ratio",
        "key_ratio_all_heads", "value_ratio", "value_ratio_all_heads", "value_out_ratio",
        "value_out_ratio_all_heads", "n_heads_compared", "n_drained", "n_drain_known", "angle_effect",
        "length_effect", "other_sinks",
    )  # fmt: skip
    answers = (("angle_effect", TRUTH), ("length_effect", TRUTH))
    reference = WHEN_SINKS_EMERGE.at("cosine similarity and norms of keys and values at the first token")

    def __post_init__(self) -> None:
        for name in ("angle", "long", "drained"):
            if not getattr(self, name) > 0:
                raise UsageError(f"{name} of sink-geometry must be positive, got {getattr(self, name)}.")

    def analyze(self, trace: Trace) -> Finding:
        sinks, reason = find_sinks(trace)
        if reason is not None:
            return self.not_applicable(reason)
        if not sinks:
            return self.not_applicable(
                "there is no attention sink on these prompts whose geometry could be read."
            )
        measured = [measure(sink) for sink in sinks]
        if all(np.isnan(item.key).all() and np.isnan(item.contrast).all() for item in measured):
            return self.not_applicable("this model's attention does not show its queries and keys.")
        described = [self._describe(item) for item in measured]
        first = described[0]
        found = first["angle_effect"] or first["length_effect"] or first["n_drained"] > 0
        return self.finding(
            Status.FOUND if found else Status.NOT_FOUND,
            self._verdict(first),
            rows=[row for item in measured for row in self._rows(item)],
            summary={**first, "other_sinks": described[1:]},
            units=UNITS,
            labels=LABELS,
            figures=_figures(measured[0]),
            notes=_notes(measured),
        )

    def _describe(self, item: Geometry) -> dict[str, Any]:
        """Medians over the sink's heads, and over all heads, and what they amount to."""
        group = item.group
        described: dict[str, Any] = {
            "position": item.sink.position,
            "token": item.sink.token,
            "n_sink_heads": int(item.sink.heads.sum()),
        }
        for key in ("cosine", "others", "contrast", "key", "value", "value_out"):
            values = getattr(item, key)
            described[_KEYS[key]] = middle(values[group])
            described[f"{_KEYS[key]}_all_heads"] = middle(values)
        drain = _drain(item)[group]
        known = drain[~np.isnan(drain)]
        contrast, key = described["cosine_contrast"], described["key_ratio"]
        return {
            **described,
            "n_heads_compared": int(group.sum()),
            "n_drained": int((known < self.drained).sum()),
            "n_drain_known": len(known),
            "angle_effect": contrast is not None and contrast >= self.angle,
            "length_effect": key is not None
            and key >= self.long
            and described["cosine"] is not None
            and described["cosine"] > 0,
        }

    def _rows(self, item: Geometry) -> list[dict[str, Any]]:
        """One row per head of the sink, largest cosine contrast first."""
        drain = _drain(item)
        rows = [
            {
                "position": item.sink.position,
                "token": item.sink.token,
                "layer": int(layer),
                "head": int(head),
                "cosine": number(item.cosine[layer, head]),
                "cosine_others": number(item.others[layer, head]),
                "key_ratio": number(item.key[layer, head]),
                "value_ratio": number(item.value[layer, head]),
                "value_out_ratio": number(item.value_out[layer, head]),
                "drained": None if np.isnan(drain[layer, head]) else bool(drain[layer, head] < self.drained),
            }
            for layer, head in np.argwhere(item.group)
        ]
        contrast = {(r["layer"], r["head"]): item.contrast[r["layer"], r["head"]] for r in rows}
        rows.sort(key=lambda r: -np.nan_to_num(contrast[r["layer"], r["head"]], nan=-9.0))
        return rows

    def _verdict(self, d: dict[str, Any]) -> str:
        where = f"The sink on position {d['position']} ({d['token']!r})"
        if d["cosine_contrast"] is None:
            cause = f"{where} was not among the positions whose angles are measured"
        elif d["angle_effect"] and d["length_effect"]:
            cause = (
                f"{where} is an effect of angle and length: {_angle_words(d)}, and its key is {_key_words(d)}"
            )
        elif d["angle_effect"]:
            short = (d["key_ratio"] or 1.0) < 1 / self.long
            key = (
                f"although its key is short ({_key_words(d)})" if short else f"and its key is {_key_words(d)}"
            )
            cause = f"{where} is an angle effect: {_angle_words(d)}, {key}"
        elif d["length_effect"]:
            cause = f"{where} is an effect of the key's length: it is {_key_words(d)}, {_angle_words(d)}"
        else:
            cause = (
                f"{where} shows neither in the typical angle nor in the length of its key: {_angle_words(d)}"
            )
        if not d["n_drain_known"]:
            return f"{cause}."
        return f"{cause}; its value is drained in {d['n_drained']} of {d['n_drain_known']} {_group_words(d)}."


_KEYS = {
    "cosine": "cosine",
    "others": "cosine_others",
    "contrast": "cosine_contrast",
    "key": "key_ratio",
    "value": "value_ratio",
    "value_out": "value_out_ratio",
}
UNITS = {
    "cosine": "cosine of query and sink key, mean over queries after it and prompts",
    "cosine_others": "cosine of query and other keys, mean over pairs and prompts",
    "key_ratio": "norm of the sink's key over the mean norm of the other keys",
    "value_ratio": "norm of the sink's value over the mean norm of the other values",
    "value_out_ratio": "the same through the output projection",
    "drained": "whether that ratio is below the threshold",
}
LABELS = {
    "n_sink_heads": "heads that sink on it",
    "cosine": "cosine with its key",
    "cosine_all_heads": "cosine with its key, all heads",
    "cosine_others": "cosine with other keys",
    "cosine_others_all_heads": "cosine with other keys, all heads",
    "cosine_contrast": "difference",
    "cosine_contrast_all_heads": "difference, all heads",
    "key_ratio": "key norm against the others",
    "key_ratio_all_heads": "key norm against the others, all heads",
    "value_ratio": "value norm against the others",
    "value_ratio_all_heads": "value norm against the others, all heads",
    "value_out_ratio": "value norm after the output projection",
    "value_out_ratio_all_heads": "value norm after the output projection, all heads",
    "n_heads_compared": "heads the medians are over",
    "n_drained": "heads with a drained value",
    "n_drain_known": "heads whose value is known",
    "angle_effect": "effect of the angle",
    "length_effect": "effect of the key's length",
    "angle": "least difference of cosines",
    "long": "least ratio of key norms",
    "drained": "drained",
}


def measure(sink: Sink) -> Geometry:
    """Angles and norms at one sink, mean over the prompts that have it."""
    unknown = np.full(sink.heads.shape, np.nan)

    def over_prompts(values: list[PerHead | None]) -> PerHead:
        return mean([unknown if value is None else value for value in values])

    def ratios(norm: sig.Signal, mean_norm: sig.Signal) -> PerHead:
        return over_prompts([norm_ratio(record, norm, mean_norm, sink.position) for record in sink.records])

    angles = [_cosines(record, sink.position) for record in sink.records]
    return Geometry(
        sink,
        over_prompts([cosine for cosine, _ in angles]),
        over_prompts([others for _, others in angles]),
        ratios(sig.KEY_NORM, sig.KEY_NORM_MEAN),
        ratios(sig.VALUE_NORM, sig.VALUE_NORM_MEAN),
        ratios(sig.VALUE_OUT_NORM, sig.VALUE_OUT_NORM_MEAN),
    )


def _cosines(record: PromptRecord, position: int) -> tuple[PerHead | None, PerHead | None]:
    """Cosine with the position's key and with others, NaN in layers where the position was not looked at."""
    if sig.QK_COSINE.name not in record.arrays or sig.REFERENCE_POSITION.name not in record.arrays:
        return None, None
    slots = reference_slots(record, position)
    cosine = np.full((len(slots), n_heads(record)), np.nan)
    for layer, slot in np.argwhere(slots):
        cosine[layer] = record[sig.QK_COSINE][layer, :, slot]
    others = np.where(np.isnan(cosine), np.nan, record[sig.QK_COSINE_OTHERS])
    return cosine, others


def _drain(item: Geometry) -> PerHead:
    """Drain through the output projection; the plain value norm where the projection was not readable."""
    return np.where(np.isnan(item.value_out), item.value, item.value_out)


def _group_words(d: dict[str, Any]) -> str:
    return "sink heads" if d["n_sink_heads"] else "heads"


def _angle_words(d: dict[str, Any]) -> str:
    return f"queries meet its key at a cosine of {d['cosine']:.2f} and other keys at {d['cosine_others']:.2f}"


def _key_words(d: dict[str, Any]) -> str:
    return (
        "of unknown length" if d["key_ratio"] is None else f"{d['key_ratio']:.2f} times as long as the others"
    )


def _figures(item: Geometry) -> list[Figure]:
    where = f"position {item.sink.position}"
    n = len(item.sink.records)
    rings = tuple((int(layer), int(head)) for layer, head in np.argwhere(item.sink.heads))
    common = f"Mean over {counted(n, 'prompt')}. Rings: heads that sink on {where}."
    ratio = f"over the mean of all other positions; below 1 is smaller. {common}"
    maps = [
        ("contrast", f"Angle: queries towards {where} against other keys", item.contrast, "difference of cosines",
         f"Cosine of the queries after {where} with its key, minus their mean cosine with all other keys. {common}"),
        ("key", f"Key norm of {where}", item.key, "ratio", f"Norm of its key {ratio}"),
        ("value_out", f"Value of {where} through the output projection", item.value_out, "ratio",
         f"Norm of v W_O {ratio}"),
    ]  # fmt: skip
    figures: list[Figure] = [
        Heatmap(key, title, caption, values, unit, marks=rings)
        for key, title, values, unit, caption in maps
        if not np.isnan(values).all()
    ]
    if not np.isnan(item.cosine).all():
        figures.append(_by_layer(item))
    return figures


def _by_layer(item: Geometry) -> Lines:
    layers = np.arange(len(item.cosine))

    def line(values: PerHead) -> np.ndarray:
        return np.array([np.nan if (m := middle(row)) is None else m for row in values])

    sinking = np.where(item.sink.heads, item.cosine, np.nan)
    series = [
        Series("its key, all heads", layers, line(item.cosine)),
        Series("other keys", layers, line(item.others)),
    ]
    if item.sink.heads.any():
        series.insert(0, Series("its key, sink heads", layers, line(sinking), emphasis=True))
    return Lines(
        "cosine",
        f"Cosine of queries with the key of position {item.sink.position}, by layer",
        f"Median over heads of the mean over {counted(len(item.sink.records), 'prompt')}; keys after rotation.",
        tuple(series),
        "layer",
        "cosine",
    )


def _notes(measured: list[Geometry]) -> list[str]:
    notes = []
    blind = [item.sink.position for item in measured if np.isnan(item.cosine).all()]
    if blind:
        notes.append(
            f"No cosine for positions {blind}: they were not among the two positions looked at closely."
        )
    if all(np.isnan(item.value_out).all() for item in measured):
        notes.append("The output projection was not readable, so drain is that of the plain value norm.")
    return notes
