"""What pruning experts did, as the Super-Expert analyzer tells it: by effect beside by size."""

from __future__ import annotations

from typing import Any

from sinklens.tracers.trace import Trace

from .causal_rules import CARRIES, PART, judge_sink, read_evidence

Pair = tuple[int, int]
"""layer, expert"""


def stored_effects(trace: Trace) -> dict[str, Any]:
    """What the run's second look found, {} if there was none."""
    return (trace.manifest.get("experiments") or {}).get("effects") or {}


def _tried(effects: dict[str, Any]) -> dict[frozenset[Pair], dict[str, Any]]:
    """The experiments that prune routed experts, by what they prune."""
    return {
        frozenset((layer, expert) for layer, expert in experiment["target"]["experts"]): experiment
        for experiment in effects.get("experiments", [])
        if "experts" in experiment["target"] and "failed" not in experiment
    }


def removal(effects: dict[str, Any], named: frozenset[Pair]) -> dict[str, Any]:
    """The effect of pruning the experts that were found, together: the sink with all, without them, without others."""
    experiment = _tried(effects).get(named)
    # Where no sink was found, the share of the strongest position is not "the sink's".
    if experiment is None or experiment["effect"]["sink_lost"]["mean"] is None:
        return {}
    ways = {"with_all": effects["base"], "without_them": experiment["effect"]}
    if experiment["controls"]:
        ways["without_others"] = experiment["controls"][0]["effect"]
    return {
        f"{key}_{name}": found[quantity]["mean"]
        for name, found in ways.items()
        for key, quantity in (("sink_rate", "sink_rate"), ("share", "sink_share"))
        if found[quantity]["mean"] is not None
    }


def causal_ranking(effects: dict[str, Any], size: dict[Pair, float]) -> list[dict[str, Any]]:
    """Experts that were pruned alone, by the part of the sink that is lost without them.

    Args:
        size: Largest |output| of each routed expert that had tokens.
    """
    rank = {
        pair: place for place, pair in enumerate(sorted(size, key=lambda pair: (-size[pair], pair)), start=1)
    }
    rows = []
    for pairs, experiment in _tried(effects).items():
        if len(pairs) > 1 or experiment["effect"]["sink_lost"]["mean"] is None:
            continue
        (pair,) = pairs
        rows.append(
            {
                "layer": pair[0],
                "expert": pair[1],
                "size_rank": rank.get(pair),
                "sink_lost": experiment["effect"]["sink_lost"]["mean"],
                "verdict": judge_sink(read_evidence(experiment)),
            }
        )
    return sorted(rows, key=lambda row: (-row["sink_lost"], row["layer"], row["expert"]))


def add_causes(rows: list[dict[str, Any]], effects: dict[str, Any]) -> None:
    """What pruning each found expert alone does, beside its size."""
    tried = _tried(effects)
    for row in rows:
        experiment = tried.get(frozenset([(row["layer"], row["expert"])]))
        if experiment is None:
            continue
        row["sink_lost"] = experiment["effect"]["sink_lost"]["mean"]
        known = row["sink_lost"] is not None
        row["sink_share_change"] = experiment["change"]["sink_share"]["mean"] if known else None
        row["predictions_change"] = experiment["effect"]["kl"]["mean"]
        row["without_it"] = judge_sink(read_evidence(experiment))


def effect_sentence(summary: dict[str, Any]) -> str:
    """What happens without the experts that were found, and which expert carries the sink if it is another."""
    return _together(summary) + carrier_sentence(summary)


def told_together(effects: dict[str, Any]) -> list[tuple[list[list[int]], str, str]]:
    """Sets of experts that were pruned together, with what is said if one, or if several experts are found."""
    told = []
    for pairs in _tried(effects):
        known = removal(effects, pairs)
        one, several = (_together({**known, "n_found": n}) for n in (1, 2))
        told.append(([list(pair) for pair in sorted(pairs)], one, several))
    return told


def _together(summary: dict[str, Any]) -> str:
    if "share_without_them" not in summary:
        return ""
    before, after = (f"{100 * summary[f'share_{way}']:.1f} %" for way in ("with_all", "without_them"))
    one = summary["n_found"] == 1
    text = f" Without {'it' if one else 'them'} the sink's share goes from {before} to {after}"
    if "share_without_others" not in summary:
        return f"{text}."
    control = f"{100 * summary['share_without_others']:.1f} %"
    others = "another expert of the same layer" if one else "as many others of the same layers"
    return f"{text}; without {others} it is {control}."


def carrier_sentence(summary: dict[str, Any]) -> str:
    """Says in words which expert carries the sink, where that is not the largest by magnitude."""
    ranking = summary.get("causal_ranking", [])
    carriers = [row for row in ranking if row["verdict"] in (CARRIES, PART)]
    if not carriers or carriers[0]["size_rank"] == 1:
        return ""
    best = carriers[0]
    largest = next((row for row in ranking if row["size_rank"] == 1), None)
    beside = (
        f", not on the largest, L{largest['layer']}E{largest['expert']} ({100 * largest['sink_lost']:.0f} %)"
        if largest is not None
        else ""
    )
    size = f", number {best['size_rank']} by size" if best["size_rank"] is not None else ""
    return (
        f" By effect the sink hangs on L{best['layer']}E{best['expert']}{size}: without it "
        f"{100 * best['sink_lost']:.0f} % of the sink is lost{beside}."
    )
