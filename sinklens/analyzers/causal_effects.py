"""Causal effects: what happens to the sink and to the predictions when a cause is taken away."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from sinklens.core.counts import counted, verb
from sinklens.core.figures import Estimate, Figure, Intervals, Lines, Series, Tile
from sinklens.core.papers import MASSIVE_ACTIVATIONS
from sinklens.tracers.trace import Trace

from .base import TRUTH, Analyzer, Finding, Status, registry
from .causal_rules import (
    CARRIES,
    CHANGE,
    DID_NOT_ACT,
    HOLDS_BACK,
    NEED,
    ON_PREDICTIONS,
    PART,
    effect_rows,
    strongest_control,
)
from .causal_words import LABELS, UNITS
from .expert_effects import stored_effects


@registry.register("causal-effects")
@dataclass(frozen=True)
class CausalEffects(Analyzer):
    """What taking a cause away does: to the sink, and to the predictions, beside controls of equal size.

    How it is computed: a few prompts run again, each time with one change that matches a finding: massive entries set
    to zero where they first appear, once or in every later block, or to the signed mean of other prompts (of all
    prompts, where the run has no others); experts pruned (routing weights not renormalised); the sink's key hidden from
    later queries; the strongest sink heads silenced; what the feed-forward part or the attention of one block writes on
    the sink token set to zero. Controls of equal count, drawn with a seed: shifts of equal size on other dims of the
    same tokens (held in the same blocks, where the change is held), entries of median size, other experts of the same
    block, the key of another position, other heads, the same write on another token. Everything is compared within a
    prompt. "Sink lost" is the drop of the sink's share relative to what it has beyond even attention: 1 takes it down
    to even attention, a blocked key falls below that and loses more than 1. It is measured only where primary-sinks
    found a sink. D_sink is one minus the mean over heads of the ratio of attention after to attention before, over the
    queries behind the sink, without heads that gave less than 0.01, mean over the blocks with sink heads. KL is taken
    from the unchanged to the changed prediction, over all tokens of the prompt. A row counts as an effect only if its
    interval excludes 0 and it exceeds every control of its own; the words follow a fixed table. What remains of massive
    entries is measured with its sign, in later blocks that have them without the change. Predictions "need" what they
    change without, beyond every control and with a rise of the loss, where there is one.

    Compared with the paper: Sun et al. set entries to zero or to their mean at one block and measure perplexity; here
    the same is done with values found in the model at hand, and the sink is measured too. D_sink follows equations 7
    and 9 of arXiv 2507.23279, which leave the averaging over queries open; the layers that enter are ours, the values
    of all layers are in the run. Shifts of equal size on other dims, what remains after a change, and the rule table
    are ours. There is no published code for D_sink. The published code for the zeroing changes constants at fixed
    tokens of two models.

    When not to trust it: few prompts, cut to 256 tokens. What is taken away leaves a state the model never saw, so
    damage may come from that; hence the controls. Causes that stand in for each other show no effect one by one.
    "Not removed" means that later blocks restored what was cleared: such a row says nothing about need.

    Args:
        most_rows: Rows drawn in each figure.
    """

    most_rows: int = 16

    name = "causal-effects"
    title = "Causal effects"
    place = 80
    formula = (
        '<math display="block"><msub><mi>D</mi><mtext>sink</mtext></msub><mo>=</mo><mn>1</mn><mo>-</mo>'
        "<mfrac><mn>1</mn><mi>H</mi></mfrac><munder><mo>∑</mo><mi>h</mi></munder><mfrac><msub><msup><mi>p</mi><mo>′</mo></msup><mi>h</mi>"
        "</msub><msub><mi>p</mi><mi>h</mi></msub></mfrac><mo>,</mo><mspace width='2em'/><mtext>lost</mtext><mo>=</mo>"
        "<mfrac><mrow><mi>p</mi><mo>-</mo><msup><mi>p</mi><mo>′</mo></msup></mrow><mrow><mi>p</mi><mo>-</mo><msub><mi>p</mi>"
        "<mtext>even</mtext></msub></mrow></mfrac></math>"
    )
    needs = frozenset()
    summarises = (
        "position", "sink_share", "uniform_share", "sink_rate", "base_loss", "carriers", "interventions",
        "n_prompts", "tokens", "seed", "faint_heads", "calibration_prompts", "held_out",
    )  # fmt: skip
    answers = (("held_out", TRUTH),)
    reference = MASSIVE_ACTIVATIONS.at(
        "3, massive activations set to zero and to their mean; D_sink: arXiv 2507.23279, equations 7 and 9"
    )

    def analyze(self, trace: Trace) -> Finding:
        effects = stored_effects(trace)
        if not effects:
            skipped = (trace.manifest.get("experiments_skipped") or {}).get("effects")
            return self.not_applicable(skipped or "not run, add --verify.")
        if not effects["experiments"]:
            return self.not_applicable(f"{effects['reason']}.")
        rows = effect_rows(effects)
        if not rows:
            return self.not_applicable(f"no change could be made: {effects['skipped'][0]}.")
        rows.sort(key=lambda row: _ORDER.index(row["kind"]))
        return self.finding(
            Status.FOUND if any(_matters(row) for row in rows) else Status.NOT_FOUND,
            _verdict(rows, effects),
            rows=rows,
            summary=_summary(rows, effects),
            units=UNITS,
            labels=LABELS,
            figures=self._figures(rows, effects),
            tiles=[_tile(rows)] if _judged_by_sink(rows) else [],
            notes=_notes(rows, effects),
        )

    def _figures(self, rows: list[dict[str, Any]], effects: dict[str, Any]) -> list[Figure]:
        figures: list[Figure] = []
        lost = [row for row in rows if row["sink_lost"] is not None and row["kind"] != "key"]
        if lost:
            figures.append(_bars(lost[: self.most_rows], effects, "sink_lost", 100, *_SINK_TEXT))
        costs = [row for row in rows if row["kl"] is not None]
        if costs:
            figures.append(_bars(costs[: self.most_rows], effects, "kl", 1, *_KL_TEXT))
        decay = _decay_by_layer(rows, effects)
        return [*figures, decay] if decay is not None else figures


_ORDER = ("massive", "massive-mean", "expert", "write", "key", "heads")
_GROUPS = {
    "massive": "Strong entries",
    "massive-mean": "Strong entries",
    "expert": "Experts",
    "write": "Writes on the sink token",
    "key": "The sink's key",
    "heads": "Sink heads",
}
_SINK_TEXT = (
    "Sink lost when a cause is taken away",
    "Drop of the sink's share of attention, relative to what it has beyond even attention: 100 % is down to even "
    "attention, more is below it. Mean over the prompts and 95 % interval; hollow: the strongest control.",
    "sink lost (%)",
)
_KL_TEXT = (
    "Change of the predictions",
    "KL divergence from the unchanged to the changed next-token distribution, mean over all tokens and prompts, with "
    "95 % interval; hollow: the strongest control.",
    "KL (nats per token)",
)


def _matters(row: dict[str, Any]) -> bool:
    return row["verdict"] in (CARRIES, PART, HOLDS_BACK, NEED, CHANGE)


def _judged_by_sink(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows that say what makes the sink."""
    return [row for row in rows if row["kind"] not in ON_PREDICTIONS and row["sink_lost"] is not None]


def _summary(rows: list[dict[str, Any]], effects: dict[str, Any]) -> dict[str, Any]:
    calibration = effects.get("calibration") or {}
    ran = [experiment for experiment in effects["experiments"] if "failed" not in experiment]
    return {
        "position": effects["position"],
        "sink_share": effects["base"]["sink_share"]["mean"],
        "uniform_share": effects["base"]["uniform"]["mean"],
        "sink_rate": effects["base"]["sink_rate"]["mean"],
        "base_loss": effects["base"]["loss"]["mean"],
        "carriers": [row["short"] for row in rows if row["verdict"] == CARRIES],
        "interventions": len(rows),
        "n_prompts": effects["n_prompts"],
        "tokens": effects["tokens"],
        "seed": effects["seed"],
        "faint_heads": max(experiment["faint_heads"] for experiment in ran),
        "calibration_prompts": calibration.get("prompts"),
        "held_out": calibration.get("held_out"),
    }


def _percent(value: float | None) -> str:
    return "not known" if value is None else f"{round(100 * value)} %"


def _on_sink(row: dict[str, Any]) -> str:
    interval = (
        f", 95 % interval {100 * row['sink_lost_low']:.0f} to {100 * row['sink_lost_high']:.0f}"
        if row["sink_lost_low"] is not None
        else ""
    )
    below = "; over 100 % is below even attention" if row["sink_lost"] >= 1.005 else ""
    return (
        f"with {row['intervention']}, {_percent(row['sink_lost'])} of the sink is lost{interval} "
        f"(control: {_percent(row['control_sink_lost'])}{below})"
    )


def _verdict(rows: list[dict[str, Any]], effects: dict[str, Any]) -> str:
    """The strongest carrier first, else why there is none; then what the predictions say."""
    sink = _judged_by_sink(rows)
    on_sink = _sink_sentence(sink) if sink else _no_sink_sentence(rows, effects)
    return " ".join(filter(None, [on_sink, _cost_sentence(rows)]))


def _no_sink_sentence(rows: list[dict[str, Any]], effects: dict[str, Any]) -> str:
    """Why nothing is said of a sink; nothing where attention was not measured or only other things were tried."""
    if effects["position"] is None or all(row["kind"] in ON_PREDICTIONS for row in rows):
        return ""
    if effects.get("sink_found"):
        return (
            "The sink is too weak to measure a loss: over all heads its share does not exceed even attention."
        )
    return "There is no sink to lose: no position is an attention sink here."


def _sink_sentence(rows: list[dict[str, Any]]) -> str:
    carriers = [row for row in rows if row["verdict"] in (CARRIES, PART)]
    if carriers:
        best = max(carriers, key=lambda row: (row["verdict"] == CARRIES, _says(row), row["sink_lost"]))
        word = "What carries the sink" if best["verdict"] == CARRIES else "What carries part of the sink"
        more = len([row for row in carriers if row["verdict"] == best["verdict"]]) - 1
        others = f"; {more} other change{'s' * (more > 1)} did the like" if more else ""
        return f"{word}: {_on_sink(best)}{others}."
    rows = _settled(rows)
    stayed = next((row for row in rows if row["verdict"].startswith("not removed")), None)
    if stayed is not None:
        return (
            f"Nothing that was taken away ended the sink, but {stayed['intervention']} did not last "
            f"({_percent(stayed['remains'])} came back in later blocks), so whether the sink needs it is open."
        )
    top = max(rows, key=lambda row: row["sink_lost"])
    return f"Nothing that was taken away ended the sink: {_on_sink(top)}, {top['verdict']}."


def _settled(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without the changes that did not last, where the same entries held at zero in every later block were gone."""
    held = next((row for row in rows if row["name"] == "massive-held"), None)
    if held is None or held["verdict"] == DID_NOT_ACT or held["verdict"].startswith("not removed"):
        return rows
    return [row for row in rows if not row["verdict"].startswith("not removed")]


_SINGLE = {"expert": 2, "massive": 1, "massive-mean": 0, "write": 1}
"""A named expert says more than its block or the entries it writes."""


def _says(row: dict[str, Any]) -> int:
    """How much a carrier says: one expert more than several, of which some may have no part in it."""
    return 1 if row["name"] == "super-experts" else _SINGLE[row["kind"]]


def _cost_sentence(rows: list[dict[str, Any]]) -> str:
    known = [row for row in rows if row["kl"] is not None]
    moved = [row for row in known if row["predictions"] in (NEED, CHANGE)]
    if not known:
        return "The model has no language head, so KL and loss do not apply."
    if not moved:
        return "The predictions change no more than in the controls."
    # Ranked by the excess, not by the change: a change as large as its control says nothing of its cause.
    top = max(moved, key=lambda row: row["kl"] - (row["control_kl"] or 0.0))
    among = "Of the changes that exceed their controls, the predictions move furthest beyond them"
    said = among if len(moved) > 1 else "The predictions change beyond the controls only"
    text = f"{said} with {top['intervention']}: KL {top['kl']:.2g} nats per token{_beside(top['control_kl'], '.2g')}"
    if top["loss_change"] is None:
        return f"{text}."
    if abs(top["loss_change"]) < LEAST_SAID:
        return f"{text}, while the loss stays as it is to within {LEAST_SAID} nats."
    return f"{text}, the loss by {top['loss_change']:+.2f}{_beside(top['control_loss_change'], '+.2f')}."


LEAST_SAID = 0.005
"""Change of the loss, in nats per token, that two decimals can show."""


def _beside(control: float | None, form: str) -> str:
    """The control in brackets; a number that two decimals cannot tell from none has no sign."""
    if control is None:
        return ""
    said = "0.00" if form == "+.2f" and abs(control) < LEAST_SAID else format(control, form)
    return f" (control: {said})"


def _tile(rows: list[dict[str, Any]]) -> Tile:
    carriers = [row for row in rows if row["verdict"] == CARRIES]
    if not carriers:
        return Tile(
            "Sink carried by", "not shown", "nothing that was taken away ended it", link="causal-effects"
        )
    best = max(carriers, key=lambda row: (_says(row), row["sink_lost"]))
    value = {"expert": best["short"].removesuffix(" pruned"), "write": best["short"]}
    lost = "all" if best["sink_lost"] >= 0.995 else _percent(best["sink_lost"])
    return Tile(
        "Sink carried by",
        value.get(best["kind"], "strong entries"),
        f"{lost} of it lost without",
        link="causal-effects",
    )


def _notes(rows: list[dict[str, Any]], effects: dict[str, Any]) -> list[str]:
    notes = [f"Not tried: {text}." for text in effects["skipped"]]
    if effects["n_prompts"] < 5:
        notes.append(
            f"Only {counted(effects['n_prompts'], 'prompt')} {verb(effects['n_prompts'], 'was', 'were')} looked "
            "at; intervals are wide or missing."
        )
    if any(row["verdict"].startswith("not removed") for row in rows):
        notes.append(
            "Where something remains, the change did not last: such a row does not show that the cause is irrelevant."
        )
    means = [row for row in rows if row["kind"] == "massive-mean"]
    if any(row["verdict"] == DID_NOT_ACT for row in means):
        notes.append(
            "The mean of the entries over prompts is the value they have, so setting them to it changes nothing."
        )
    elif means and not (effects.get("calibration") or {}).get("held_out"):
        notes.append(
            "The means of the entries include the tried prompts: the run has no other prompts with these entries. "
            "That a constant does as well is shown less strictly so."
        )
    if any(row["control"] == "none was possible" for row in rows):
        notes.append("Some changes have no control, because nothing else of their kind was left to change.")
    if rows and rows[0]["kl"] is not None and rows[0]["loss_change"] is None:
        notes.append("The model does not predict the next token, so the change of the loss does not apply.")
    return notes


def _bars(
    rows: list[dict[str, Any]],
    effects: dict[str, Any],
    quantity: str,
    factor: float,
    title: str,
    caption: str,
    x_label: str,
) -> Intervals:
    by_name = {experiment["name"]: experiment for experiment in effects["experiments"]}
    estimates = []
    for row in rows:
        control = strongest_control(by_name[row["name"]], quantity) or {}
        known = (row[quantity], row[f"{quantity}_low"], row[f"{quantity}_high"])
        hollow = (control.get("mean"), control.get("low"), control.get("high"))
        values = [math.nan if value is None else factor * value for value in (*known, *hollow)]
        note = row["verdict"] if quantity == "sink_lost" else row["predictions"]
        estimates.append(Estimate(row["short"], *values, note=note, group=_GROUPS[row["kind"]]))
    said = f"{caption} {counted(effects['n_prompts'], 'prompt')} of up to {effects['tokens']} tokens."
    return Intervals(quantity, title, said, tuple(estimates), x_label, "95 % interval over prompts")


def _decay_by_layer(rows: list[dict[str, Any]], effects: dict[str, Any]) -> Lines | None:
    """D_sink by layer of the strongest changes."""
    by_name = {experiment["name"]: experiment for experiment in effects["experiments"]}
    ranked = [row for row in rows if row["kind"] not in ON_PREDICTIONS and row["d_sink"] is not None]
    ranked = sorted(ranked, key=lambda row: -row["d_sink"])[:4]
    if not ranked:
        return None
    series = []
    for place, row in enumerate(ranked):
        y = np.array([math.nan if v is None else v for v in by_name[row["name"]]["d_sink_by_layer"]])
        series.append(Series(row["short"], np.arange(len(y)), y, emphasis=place == 0))
    return Lines(
        "decay",
        "Attention lost by layer (D_sink)",
        "One minus the mean over heads of attention after over attention before, queries behind the sink, heads that "
        "gave it at least 0.01; mean over prompts. The changes with the largest mean are shown.",
        tuple(series),
        "layer",
        "D_sink",
    )
