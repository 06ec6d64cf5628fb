"""Visual sinks: visual tokens that carry a sink's mark, and where in their pictures they look."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float

from sinklens.core.counts import counted
from sinklens.core.errors import UsageError
from sinklens.core.figures import Tile
from sinklens.core.papers import VISUAL_SINKS
from sinklens.tracers import signals as sig
from sinklens.tracers.sink_dims import TAU, Cut, Provenance, SinkRule, cut_for, published
from sinklens.tracers.trace import Trace

from .adjustable import of_visual
from .base import Analyzer, Finding, Status, registry
from .evidence import span
from .visual import (
    NO_PICTURES,
    Pictured,
    cells,
    chance_per_token,
    chosen_rule,
    decided,
    n_pictures,
    no_rule,
    parse_dims,
    rule_of,
    sources_of,
    with_pictures,
)
from .visual_figures import draw

BY_CHANCE = 0.05


@registry.register("visual-sinks")
@dataclass(frozen=True)
class VisualSinks(Analyzer):
    """Visual tokens whose state is large in the model's sink dims, with their place in the picture.

    How it is computed: in the state that enters a layer, φ is the largest |x_d| / RMS(x) over the sink dims, and a
    token whose φ reaches tau is a sink of the layer; it is a visual sink if it is a part of a picture. The sink dims
    are found on the model before the run, on a few texts and pictures (dims that are large at the token that receives
    most attention and not at the others), unless published or other ones are named. Rows are visual tokens that are a
    sink of some layer, with the layer of their largest φ; `share` is the attention that the text after the picture
    gives the token there, mean over these queries and the heads. Tau is absolute; where a model is too narrow for it
    ever to be reached, the same share of a state's energy is used, and a note says so.

    Compared with the paper: recipe="paper" takes φ of at least tau, in every layer; recipe="code" is the official
    program, which takes φ above tau, and from layer 2 on. The paper and the code know the dims of a few base models;
    their search is ours, and so is the rule for "found": the largest φ is one that as many states of normal random
    numbers would show with a probability below 0.05, which matters in narrow models only.

    When not to trust it: φ depends on which dims are taken, so read where they come from, and compare with published
    ones where there are any. A model without massive activations (learned sink logits, gated attention) has no sink
    dims, and may still have visual tokens that many queries attend to. Dims that all tokens have in common must not be
    given: then everything is a sink. One token can look at several patches where the model merges them.

    Args:
        dims: Sink dims to use in place of the run's, as in `1415+2533`.
        tau: Least φ of a sink.
        tau_energy: Least share of the state's energy in one sink dim; above 0 it replaces tau.
    """

    dims: str = ""
    tau: float = TAU
    tau_energy: float = 0.0
    recipe: Literal["paper", "code"] = "paper"

    name = "visual-sinks"
    title = "Visual sinks"
    place = 14
    of_pictures = True
    formula = (
        '<math display="block"><mi>φ</mi><mo>(</mo><mi>x</mi><mo>)</mo><mo>=</mo><munder><mi>max</mi><mrow><mi>d</mi>'
        "<mo>∈</mo><mi>D</mi></mrow></munder><mfrac><mrow><mo>|</mo><msub><mi>x</mi><mi>d</mi></msub><mo>|</mo></mrow>"
        "<msqrt><mrow><mi>mean</mi><mo>(</mo><msup><mi>x</mi><mn>2</mn></msup><mo>)</mo></mrow></msqrt></mfrac>"
        "<mo>≥</mo><mi>τ</mi></math>"
    )
    needs = frozenset({sig.PHI, sig.INPUT_LARGE, sig.INPUT_TYPICAL, sig.TEXT_RECEIVED})
    summarises = (
        "n_prompts", "n_pictures", "n_visual", "dims", "provenance", "source", "tau", "energy", "n_sinks",
        "first_layer", "last_layer", "most_layer", "most_per_picture", "by_chance_per_picture",
        "largest_by_chance", "part_of_visual", "part_of_attention", "text_sinks_per_prompt", "largest_phi",
        "largest_phi_layer", "published", "searched_on",
    )  # fmt: skip
    answers = (("provenance", get_args(Provenance)),)
    reference = VISUAL_SINKS.at("visual attention sink: sink dims and φ; Figure of sink tokens per layer")

    def __post_init__(self) -> None:
        if self.recipe not in ("paper", "code"):
            raise UsageError(
                f"Unknown recipe {self.recipe!r} of visual-sinks.", detail="It has: paper, code."
            )
        cut_for(4096, self.tau, self.tau_energy or None)
        parse_dims(self.dims)

    @property
    def strict(self) -> bool:
        return self.recipe == "code"

    def analyze(self, trace: Trace) -> Finding:
        records = with_pictures(trace)
        if not records:
            return self.not_applicable(NO_PICTURES)
        recorded = rule_of(trace)
        if recorded is None:
            return self.not_applicable(no_rule(None) or "")
        rule = chosen_rule(recorded, self.dims, self.tau, self.tau_energy, strict=self.strict)
        if not rule.dims:
            return self._without_dims(trace, rule, n_pictures(records))
        if any(sig.INPUT_LARGE.name not in record.arrays for record in records):
            return self.not_applicable(
                "the trace does not hold the states that enter the layers; profile again."
            )
        seen = [self._without_first(decided(record, rule, recorded)) for record in records]
        rows = [row for item in seen for row in _rows(item)]
        rows.sort(key=lambda row: (-row["phi"], row["prompt"], row["position"]))
        summary = _summary(trace, seen, rule, n_pictures(records))
        found = bool(rows) and summary["largest_by_chance"] < BY_CHANCE
        return self.finding(
            Status.FOUND if found else Status.NOT_FOUND,
            _verdict(summary, rule, found),
            rows=rows,
            summary=summary,
            units=UNITS,
            labels=LABELS,
            figures=draw(seen, rule.cut, summary["most_layer"]),
            tiles=[_tile(summary, found)],
            notes=_notes(trace, rule, summary),
            adjustable=lambda: of_visual(
                [decided(record, rule, recorded) for record in records],
                rule,
                summary,
                code=self.strict,
                by_chance=BY_CHANCE,
            ),
        )

    def _without_first(self, item: Pictured) -> Pictured:
        """The official code leaves the first two layers out."""
        if self.recipe == "paper":
            return item
        sinks = item.sinks.copy()
        sinks[:2] = False
        return Pictured(item.record, item.spans, item.phi, sinks)

    def _without_dims(self, trace: Trace, rule: SinkRule, pictures: int) -> Finding:
        why = rule.dims.failed or "none were given."
        if rule.dims.standing_out:
            return self.not_applicable(f"the sink dims of this model cannot be told apart: {why}")
        summary = {
            "n_prompts": len(with_pictures(trace)),
            "n_pictures": pictures,
            "dims": "none",
            "searched_on": rule.dims.source,
        }
        return self.finding(
            Status.NOT_FOUND,
            f"No visual sink in {counted(pictures, 'picture')}: the model has no sink dims that a token "
            f"could be large in. Searched on {rule.dims.source}: {why}",
            summary=summary,
            labels=LABELS,
            tiles=[Tile(self.title, "none", "no sink dims", link=self.name)],
            notes=_notes(trace, rule, {}),
        )


UNITS = {
    "prompt": "index of the prompt",
    "image": "which picture of the prompt",
    "layer": "where φ is largest; the state that enters it",
    "row": "of the grid of tokens",
    "col": "of the grid of tokens",
    "position": "token position",
    "phi": "|x_d| / RMS(x), largest over the sink dims",
    "share": "attention from the text after the picture, mean over queries and heads",
    "lift": "that over the mean of all visual tokens",
    "first_layer": "first layer that has it as a sink",
    "last_layer": "last layer that has it as a sink",
    "n_layers": "layers that have it as a sink",
}
LABELS = {
    "image": "picture",
    "phi": "φ",
    "lift": "share over that of all visual tokens",
    "n_pictures": "pictures",
    "n_visual": "visual tokens",
    "tau": "τ",
    "tau_energy": "τ as a share of the energy",
    "energy": "energy",
    "most_layer": "layer with the most visual sinks",
    "most_per_picture": "visual sinks per picture there",
    "by_chance_per_picture": "of normal random states",
    "largest_phi": "largest φ of a visual token",
    "largest_phi_layer": "in layer",
    "largest_by_chance": "as large in normal random states",
    "part_of_visual": "part of the visual tokens",
    "part_of_attention": "part of the attention on the pictures",
    "searched_on": "sink dims searched on",
}


def _rows(item: Pictured) -> list[dict[str, Any]]:
    """One row for each visual token that is a sink of some layer."""
    sinks, record = item.visual_sinks(), item.record
    received = record[sig.TEXT_RECEIVED] if sig.TEXT_RECEIVED.name in record.arrays else None
    rows = []
    for picture, grid, row, col, position in cells(item.spans):
        layers = np.flatnonzero(sinks[:, position])
        if not len(layers):
            continue
        layer = int(layers[item.phi[layers, position].argmax()])
        share = None if received is None else float(received[layer, position])
        mean = None if received is None else float(np.nanmean(received[layer, item.visual]))
        value = float(item.phi[layer, position])
        rows.append(
            {
                "prompt": record.index,
                "image": picture,
                "name": item.spans.pictures[picture].name,
                "view": grid.view,
                "layer": layer,
                "row": row,
                "col": col,
                "position": position,
                "phi": value,
                "share": share,
                "lift": share / mean if share is not None and mean else None,
                "first_layer": int(layers[0]),
                "last_layer": int(layers[-1]),
                "n_layers": len(layers),
            }
        )
    return rows


def per_layer(seen: list[Pictured]) -> Float[np.ndarray, " layer"]:
    """Visual sinks of each layer, over all prompts."""
    return np.sum([item.visual_sinks().sum(1) for item in seen], axis=0).astype(np.float64)


def _summary(trace: Trace, seen: list[Pictured], rule: SinkRule, pictures: int) -> dict[str, Any]:
    counts, cut = per_layer(seen), rule.cut
    visual = sum(int(item.visual.sum()) for item in seen)
    most = int(counts.argmax())
    tops = np.array([np.nanmax(np.nan_to_num(item.phi[:, item.visual]), axis=1) for item in seen])
    layers = np.flatnonzero(counts)
    dims = rule.dims
    return {
        "n_prompts": len(seen),
        "n_pictures": pictures,
        "n_visual": visual,
        "dims": ", ".join(map(str, dims.indices)),
        "provenance": dims.provenance,
        "source": dims.source,
        "tau": cut.tau,
        "energy": cut.energy,
        "n_sinks": int(sum(item.visual_sinks().any(0).sum() for item in seen)),
        "first_layer": int(layers[0]) if len(layers) else None,
        "last_layer": int(layers[-1]) if len(layers) else None,
        "most_layer": most,
        "most_per_picture": float(counts[most] / pictures),
        "by_chance_per_picture": chance_per_token(cut, len(dims.indices)) * visual / pictures,
        "largest_by_chance": _by_chance(float(tops.max()), len(dims.indices), visual * len(counts)),
        "part_of_visual": float(counts[most] / visual),
        "part_of_attention": _held(seen, most),
        "text_sinks_per_prompt": float(np.mean([item.text_sinks()[most].sum() for item in seen])),
        "largest_phi": float(tops.max()),
        "largest_phi_layer": int(tops.max(0).argmax()),
        "published": _published(trace),
    }


def _by_chance(phi: float, dims: int, states: int) -> float:
    """How many of so many states of normal random numbers would have at least this φ."""
    return states * chance_per_token(Cut(phi, 1.0), dims) if phi > 0 else float(states)


def _held(seen: list[Pictured], layer: int) -> float | None:
    """Part of the attention on visual tokens that the visual sinks of a layer receive, mean over prompts."""
    parts = []
    for item in seen:
        if sig.TEXT_RECEIVED.name not in item.record.arrays:
            return None
        received = np.nan_to_num(item.record[sig.TEXT_RECEIVED][layer].astype(np.float64))
        total = received[item.visual].sum()
        if total > 0:
            parts.append(received[item.visual_sinks()[layer]].sum() / total)
    return float(np.mean(parts)) if parts else None


def _published(trace: Trace) -> str | None:
    entry = published(trace.info.id)
    return None if entry is None else f"{', '.join(map(str, entry.dims))} ({entry.status}; {entry.source})"


def _verdict(summary: dict[str, Any], rule: SinkRule, found: bool) -> str:
    pictures = counted(summary["n_pictures"], "picture")
    where = f"Sink {sources_of(rule.dims)}."
    if not summary["n_sinks"]:
        return (
            f"No visual sink: none of the {summary['n_visual']} visual tokens of {pictures} reaches φ = "
            f"{rule.cut.tau:.3g} in any layer; the largest is {summary['largest_phi']:.3g} (layer "
            f"{summary['largest_phi_layer']}). {where}"
        )
    if not found:
        return (
            f"No visual sink beyond chance: {summary['most_per_picture']:.3g} per picture in layer "
            f"{summary['most_layer']} have a φ of at least {rule.cut.tau:.3g}, but the largest is "
            f"{summary['largest_phi']:.3g}, and of as many normal random states of this width "
            f"{summary['largest_by_chance']:.2g} would have that. {where}"
        )
    held = summary["part_of_attention"]
    attention = "" if held is None else f" and hold {100 * held:.1f} % of the attention on the pictures"
    layers = span(summary["first_layer"], summary["last_layer"])
    return (
        f"{counted(summary['n_sinks'], 'visual sink')} in {pictures} ({layers}); most in layer "
        f"{summary['most_layer']}, where {summary['most_per_picture']:.3g} per picture are "
        f"{100 * summary['part_of_visual']:.2g} % of the visual tokens{attention}. {where}"
    )


def _tile(summary: dict[str, Any], found: bool) -> Tile:
    value = f"{summary['most_per_picture']:.3g} per picture" if found else "none"
    return Tile(
        "Visual sinks", value, f"φ ≥ {summary['tau']:.3g}, layer {summary['most_layer']}", link="visual-sinks"
    )


def _notes(trace: Trace, rule: SinkRule, summary: dict[str, Any]) -> list[str]:
    cut: Cut = rule.cut
    notes = [] if cut.note is None else [_sentence(cut.note)]
    entry = published(trace.info.id)
    if entry is not None and rule.dims.provenance != "published":
        same = set(entry.dims) & set(rule.dims.indices)
        listed = ", ".join(map(str, entry.dims))
        notes.append(
            f"Published sink dims of {entry.model}: {listed} ({entry.status}: {entry.source}); {len(same)} of them are "
            "among those used here."
        )
    if rule.dims.also:
        others = "; ".join(", ".join(map(str, dims)) for dims in rule.dims.also)
        notes.append(f"Other notes on this model give: {others}.")
    expected = summary.get("by_chance_per_picture", 0.0)
    if expected > 0.05:
        notes.append(
            f"In a model of {rule.dims.hidden_size} dims normal random states reach this φ too: about {expected:.2g} "
            "tokens per picture."
        )
    return notes


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]
