"""Massive activations: a few entries of the residual stream that dwarf all others."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from sinklens.core.counts import counted
from sinklens.core.errors import UsageError
from sinklens.core.figures import Figure, Lines, Series, Tile
from sinklens.core.papers import MASSIVE_ACTIVATIONS
from sinklens.tracers import signals as sig
from sinklens.tracers.trace import PromptRecord, Trace

from .adjustable import of_massive
from .base import Analyzer, Finding, Status, registry
from .evidence import span

Place = tuple[int, int, int]
"""layer, position, dim"""


@registry.register("massive-activations")
@dataclass(frozen=True)
class MassiveActivations(Analyzer):
    """Entries of the residual stream that exceed both an absolute floor and a multiple of the layer's median.

    How it is computed: after every block, |h[t, j]| is compared with `absolute` and with `relative` times the lower
    median of |h| over all real tokens and dims of that layer and prompt. Both must hold. A place (layer, position,
    dim) becomes a row if that happens in `min_prompts` of the prompts that have the position. The last block is
    read before the final norm. In post-LayerNorm models (BERT) the input of the block's last LayerNorm is read,
    because its output hides the size. The writer is the first layer whose residual holds the entry; the down
    projection's own output at that place is given beside it.

    Compared with the paper: Sun et al. state "larger than 100 and at least or around 1000 times the median".
    `recipe="paper"` uses "greater than 100, at least 1000 times"; `recipe="code"` is strict in both, as the only
    published code form of the rule. The official repository of the paper logs magnitudes and has no rule.

    When not to trust it: the rule is boolean and misses clear spikes below it; read `max_ratio`. In narrow models
    (a few hundred dims) a thousandfold median is out of reach. Whether entries are massive depends on BOS and on
    the prompt. Zeroing them is harmless in some models: massive does not mean needed.

    Args:
        absolute: Floor of |h|. (100 is this floor, not a multiple of the median.)
        relative: Multiple of the whole-layer median.
    """

    absolute: float = 100.0
    relative: float = 1000.0
    recipe: Literal["paper", "code"] = "paper"
    min_prompts: float = 0.1

    name = "massive-activations"
    title = "Massive activations"
    place = 20
    headline = True
    formula = (
        '<math display="block"><mrow><mo>|</mo><msub><mi>h</mi><mrow><mi>l</mi><mo>,</mo><mi>t</mi><mo>,</mo><mi>j</mi>'
        "</mrow></msub><mo>|</mo></mrow><mo>&gt;</mo><mn>100</mn><mo>∧</mo><mrow><mo>|</mo><msub><mi>h</mi><mrow>"
        "<mi>l</mi><mo>,</mo><mi>t</mi><mo>,</mo><mi>j</mi></mrow></msub><mo>|</mo></mrow><mo>≥</mo><mn>1000</mn>"
        "<mo>·</mo><munder><mi>median</mi><mrow><mi>t</mi><mo>,</mo><mi>j</mi></mrow></munder><mrow><mo>|</mo><msub>"
        "<mi>h</mi><mi>l</mi></msub><mo>|</mo></mrow></math>"
    )
    needs = frozenset({sig.RESIDUAL_NORM, sig.RESIDUAL_MEDIAN, sig.RESIDUAL_TOP, sig.DOWN_PROJ_TOP})
    summarises = (
        "dims", "positions", "first_layer", "last_layer", "n_prompts", "max_abs", "max_ratio", "max_layer",
        "max_position", "max_token", "max_dim", "largest_abs", "max_written_at", "max_down_proj_output",
    )  # fmt: skip
    reference = MASSIVE_ACTIVATIONS.at("2, definition of massive activations")

    def __post_init__(self) -> None:
        if self.recipe not in ("paper", "code"):
            raise UsageError(
                f"Unknown recipe {self.recipe!r} of massive-activations.", detail="It has: paper, code."
            )

    def analyze(self, trace: Trace) -> Finding:
        if not trace.records:
            return self.not_applicable("there are no prompts.")
        per_prompt = [self._entries(record) for record in trace]
        rows = self._rows(trace, per_prompt)
        summary = _summary(trace, rows)
        return self.finding(
            Status.FOUND if rows else Status.NOT_FOUND,
            self._verdict(rows, summary),
            rows=rows,
            summary=summary,
            units=UNITS,
            labels=LABELS,
            figures=_figures(trace, rows, summary),
            tiles=[_tile(rows, summary)],
            notes=self._notes(trace, per_prompt),
            adjustable=lambda: of_massive(self, trace, self._verdict([], summary)),
        )

    def is_massive(self, value: np.ndarray, median: np.ndarray) -> np.ndarray:
        """The rule, elementwise."""
        size = np.abs(value)
        ratio_holds = (
            size >= self.relative * median if self.recipe == "paper" else size > self.relative * median
        )
        return (size > self.absolute) & ratio_holds

    def _entries(self, record: PromptRecord) -> dict[Place, tuple[float, float]]:
        """Massive entries of one prompt: place to (signed value, ratio to the layer's median)."""
        value, median = record[sig.RESIDUAL_TOP], record[sig.RESIDUAL_MEDIAN][:, None]
        position, dim = record["residual_top_pos"], record["residual_top_dim"]
        with np.errstate(invalid="ignore", divide="ignore"):
            hits = np.argwhere(self.is_massive(value, median))
            ratio = np.abs(value) / median
        return {
            (int(i), int(position[i, r]), int(dim[i, r])): (float(value[i, r]), float(ratio[i, r]))
            for i, r in hits
        }

    def _rows(self, trace: Trace, per_prompt: list[dict[Place, tuple[float, float]]]) -> list[dict[str, Any]]:
        found: dict[Place, list[tuple[PromptRecord, float, float]]] = defaultdict(list)
        for record, entries in zip(trace, per_prompt, strict=True):
            for place, (value, ratio) in entries.items():
                found[place].append((record, value, ratio))
        lengths = np.array([len(record) for record in trace])
        rows = [
            _row(place, hits)
            for place, hits in found.items()
            if len(hits) >= max(1.0, self.min_prompts * int((lengths > place[1]).sum()))
        ]
        _attribute(rows, trace)
        return sorted(rows, key=lambda row: (-abs(row["value"]), row["layer"], row["position"], row["dim"]))

    def _verdict(self, rows: list[dict[str, Any]], summary: dict[str, Any]) -> str:
        if not rows:
            where = (
                f"layer {summary['max_layer']}, position {summary['max_position']} ({summary['max_token']!r})"
            )
            return (
                f"No massive activation by the published rule; nearest comes {summary['max_abs']:.3g} at {where}, dim "
                f"{summary['max_dim']}, {summary['max_ratio']:.0f} times its layer's median, {_written(summary)}."
            )
        top = rows[0]
        dims = ", ".join(map(str, summary["dims"][:6])) + (", ..." if len(summary["dims"]) > 6 else "")
        return (
            f"{len(summary['dims'])} massive dim{'s' * (len(summary['dims']) > 1)} ({dims}) in "
            f"{span(summary['first_layer'], summary['last_layer'])}; the largest is {top['value']:.4g} on position "
            f"{top['position']} ({top['token']!r}), {top['ratio_to_median']:.0f} times the median, written at "
            f"layer {top['written_at']}."
        )

    def _notes(self, trace: Trace, per_prompt: list[dict[Place, tuple[float, float]]]) -> list[str]:
        notes = []
        ranks = trace.records[0][sig.RESIDUAL_TOP].shape[1]
        full = max(
            (sum(place[0] == layer.index for place in e) for e in per_prompt for layer in trace.layers),
            default=0,
        )
        if full >= ranks:
            notes.append(
                f"Some layers have {ranks} massive entries or more in one prompt; only {ranks} are kept."
            )
        if any(layer.residual != "block output" for layer in trace.layers):
            notes.append("Post-LayerNorm model: the input of each block's last LayerNorm is measured.")
        return notes


UNITS = {
    "value": "activation (signed, mean over prompts)",
    "ratio_to_median": "ratio to the whole-layer median of |h|",
}

LABELS = {
    "absolute": "floor of |h|",
    "relative": "least ratio to the median",
    "written_at": "appears in layer",
    "down_proj_output": "written by its down projection",
    "dims": "massive dimensions",
    "positions": "positions",
    "max_abs": "largest against its layer: |value|",
    "max_ratio": "its ratio to the median",
    "max_layer": "its layer",
    "max_position": "its position",
    "max_token": "its token",
    "max_dim": "its dimension",
    "max_written_at": "it appears in layer",
    "max_down_proj_output": "what the down projection wrote there",
    "largest_abs": "largest |value| of all",
}


def _written(summary: dict[str, Any]) -> str:
    layer, output = summary["max_written_at"], summary["max_down_proj_output"]
    by = f" (down projection: {output:.3g})" if output is not None else ""
    return f"written at layer {layer}{by}"


def _row(place: Place, hits: list[tuple[PromptRecord, float, float]]) -> dict[str, Any]:
    layer, position, dim = place
    record = hits[0][0]
    return {
        "layer": layer,
        "position": position,
        "token": record.pieces[position],
        "dim": dim,
        "value": float(np.mean([value for _, value, _ in hits])),
        "ratio_to_median": float(np.mean([ratio for *_, ratio in hits])),
        "n_prompts": len(hits),
    }


def _attribute(rows: list[dict[str, Any]], trace: Trace) -> None:
    """Add to each row the first layer with this (position, dim), and what the down projection wrote there."""
    first: dict[tuple[int, int], int] = {}
    for row in rows:
        key = (row["position"], row["dim"])
        first[key] = min(first.get(key, row["layer"]), row["layer"])
    for row in rows:
        row["written_at"] = first[row["position"], row["dim"]]
        row["down_proj_output"] = _down_proj_value(trace, row["written_at"], row["position"], row["dim"])


def _down_proj_value(trace: Trace, layer: int, position: int, dim: int) -> float | None:
    """Mean down-projection output at a place, if it is among the strongest kept; None otherwise (or for experts)."""
    values = []
    for record in trace:
        if sig.DOWN_PROJ_TOP.name not in record.arrays:
            return None
        at = (record["down_proj_top_pos"][layer] == position) & (record["down_proj_top_dim"][layer] == dim)
        values += record[sig.DOWN_PROJ_TOP][layer][at].tolist()
    return float(np.mean(values)) if values else None


def _summary(trace: Trace, rows: list[dict[str, Any]]) -> dict[str, Any]:
    layers = sorted({row["layer"] for row in rows})
    best = _largest(trace)
    return {
        "dims": sorted({row["dim"] for row in rows}),
        "positions": sorted({row["position"] for row in rows}),
        "first_layer": layers[0] if layers else None,
        "last_layer": layers[-1] if layers else None,
        "n_prompts": len(trace),
        **best,
        **_writer(trace, best),
    }


def _writer(trace: Trace, best: dict[str, Any]) -> dict[str, Any]:
    """Where the largest entry of the run is written: the first layer that holds half of it or more."""
    if "max_dim" not in best:
        return {"max_written_at": None, "max_down_proj_output": None}
    position, dim = best["max_position"], best["max_dim"]
    first = best["max_layer"]
    for record in trace:
        at = (record["residual_top_pos"] == position) & (record["residual_top_dim"] == dim)
        holds = np.where(at, np.abs(record[sig.RESIDUAL_TOP]), 0.0).max(1) >= best["max_abs"] / 2
        first = min(first, int(np.argmax(holds))) if holds.any() else first
    return {"max_written_at": first, "max_down_proj_output": _down_proj_value(trace, first, position, dim)}


def _largest(trace: Trace) -> dict[str, Any]:
    """The entry that stands out most of its layer (`max_*`, by ratio to the median), massive or not.

    `largest_abs` is the largest |h| of all prompts and layers, which may be another entry.
    """
    best: dict[str, Any] = {"max_abs": 0.0, "max_ratio": 0.0}
    largest = max(float(np.nanmax(np.abs(record[sig.RESIDUAL_TOP][:, 0]))) for record in trace)
    for record in trace:
        value, median = record[sig.RESIDUAL_TOP][:, 0], record[sig.RESIDUAL_MEDIAN]
        with np.errstate(over="ignore"):  # a median of 0 has no ratio: infinite
            ratio = np.abs(value) / np.maximum(median, np.finfo(np.float32).tiny)
        layer = int(np.nanargmax(ratio))
        if ratio[layer] > best["max_ratio"]:
            position = int(record["residual_top_pos"][layer, 0])
            best = {
                "max_abs": float(abs(value[layer])),
                "max_ratio": float(ratio[layer]),
                "max_layer": layer,
                "max_position": position,
                "max_token": record.pieces[position],
                "max_dim": int(record["residual_top_dim"][layer, 0]),
            }
    return {**best, "largest_abs": largest}


def _tile(rows: list[dict[str, Any]], summary: dict[str, Any]) -> Tile:
    if rows:
        return Tile(
            "Massive dims",
            str(len(summary["dims"])),
            f"{rows[0]['ratio_to_median']:.0f}× median",
            link="massive-activations",
        )
    return Tile(
        "Massive dims", "none", f"largest {summary['max_ratio']:.0f}× median", link="massive-activations"
    )


def _figures(trace: Trace, rows: list[dict[str, Any]], summary: dict[str, Any]) -> list[Figure]:
    layers = np.arange(len(trace.layers))
    position = rows[0]["position"] if rows else summary["max_position"]
    holders = [record for record in trace if len(record) > position]
    norm_at = np.mean([record[sig.RESIDUAL_NORM][:, position] for record in holders], axis=0)
    norm_median = np.mean([np.median(record[sig.RESIDUAL_NORM], axis=1) for record in holders], axis=0)
    top = np.mean([np.abs(record[sig.RESIDUAL_TOP][:, :3]) for record in trace], axis=0)
    median = np.mean([record[sig.RESIDUAL_MEDIAN] for record in trace], axis=0)
    marks = tuple(sorted({(float(row["written_at"]), f"dim {row['dim']} written") for row in rows}))[:4]
    figures: list[Figure] = [
        Lines(
            "norms",
            f"Hidden-state norm: position {position} against the median token",
            f"L2 norm of the {trace.layers[0].residual} per layer, mean over {counted(len(holders), 'prompt')}.",
            (
                Series(f"position {position}", layers, norm_at, emphasis=True),
                Series("median token", layers, norm_median),
            ),
            "layer",
            "L2 norm",
            log_y=True,
            marks=marks,
        ),
        Lines(
            "magnitudes",
            "Largest entries and the median of |h|",
            "Per prompt and layer: the three largest |h| and the median of |h| over all tokens and dims; mean over "
            "prompts (the layout of Sun et al.).",
            (
                *(Series(f"top {r + 1}", layers, top[:, r], emphasis=r == 0) for r in range(top.shape[1])),
                Series("median", layers, median),
            ),
            "layer",
            "|h|",
            log_y=True,
        ),
    ]
    if all(sig.DOWN_PROJ_TOP.name in record.arrays for record in trace):
        written = np.max([np.abs(record[sig.DOWN_PROJ_TOP][:, 0]) for record in trace], axis=0)
        figures.append(
            Lines(
                "down_proj",
                "Largest down-projection output by layer",
                "Maximum over prompts, tokens and dims of |output| of the dense (or shared-expert) down projection.",
                (Series("down_proj", layers, written, emphasis=True),),
                "layer",
                "abs-max",
                log_y=True,
                bars=True,
            )
        )
    return figures
