"""What primary-sinks says: names, units, its sentence and its boxes."""

from __future__ import annotations

from typing import Any

from sinklens.core.counts import counted, verb
from sinklens.core.figures import Tile

from .estimates import estimated
from .evidence import span

UNITS = {
    "sink_rate": "%",
    "first_position_rate": "%",
    "share": "share of attention (0-1), mean over prompts, layers and heads",
    "lift": "ratio to uniform attention",
    "rate": "% of (prompt, layer, head) with share > epsilon",
    "top1_share": "share of queries whose largest weight is here",
    "same_token_share": "share of prompts with this token at this position",
    "share_se": "standard error of the share, at most",
    "rate_low": "% above epsilon by more than 1.96 standard errors",
    "rate_high": "% not below epsilon by more than 1.96 standard errors",
}


LABELS = {
    "sink_rate": "sink rate",
    "strongest_position": "strongest position",
    "share": "attention received",
    "lift": "against uniform",
    "rate": "sink rate",
    "uniform_share": "uniform attention would give",
    "epsilon": "threshold ε",
    "first_position_rate": "sink rate of the first token",
    "first_position_share": "attention to the first token",
    "heads_in_all": "heads in all",
    "seq_len": "median prompt length",
    "seq_len_min": "shortest prompt",
    "seq_len_max": "longest prompt",
    "heads": "heads that sink on it",
    "dormant_heads": "heads dormant on the first token",
    "learned_sink_mass": "attention on learned sink logits",
    "value_drain": "smallest value norm against the others",
    "norm_sink_positions": "positions with a sink's hidden-state norm",
    "agree": "of these, also sinks by attention",
    "attention_only": "sinks by attention only",
    "norm_only": "by hidden-state norm only",
    "share_se": "standard error of the share",
    "rate_low": "sink rate, at least",
    "rate_high": "sink rate, at most",
    "rows_sampled": "query rows looked at, median",
    "rows_in_all": "of query rows, median",
    "n_heads": "heads that sink on it",
    "top1_share": "queries with their largest weight here",
    "same_token_share": "prompts with this token here",
    "min_rate": "rate that makes a row",
    "min_lift": "least times uniform",
    "min_prompts": "least share of prompts",
    "min_visible": "least queries that see it",
    "min_tokens": "shortest prompt used",
    "norm_ratio": "norm ratio of a sink by norm",
    "exclude_diagonal": "without attention to itself",
}


def verdict(rows: list[dict[str, Any]], summary: dict[str, Any]) -> str:
    """The finding's sentence."""
    if not rows:
        return (
            f"No attention sink: the most attended position, {summary['strongest_position']}, gets "
            f"{summary['share']:.3f} of the attention against {summary['uniform_share']:.3f} if it were uniform."
            f"{estimated(summary)}"
        )
    top, more = rows[0], len(rows) - 1
    others = f" {counted(more, 'other position')} {verb(more, 'is a sink', 'are sinks')} too." if more else ""
    layers = span(top["first_layer"], top["last_layer"]) if top["n_heads"] else "no layer consistently"
    return (
        f"Attention sink on position {top['position']} ({top['token']!r}): {top['share']:.3f} of the attention, "
        f"{top['lift']:.1f} times uniform; above {summary['epsilon']:g} in {top['rate']:.1f} % of "
        f"(prompt, layer, head), consistently in {top['n_heads']} of {summary['heads_in_all']} heads ({layers})."
        f"{others}{estimated(summary)}"
    )


def tiles(rows: list[dict[str, Any]], summary: dict[str, Any]) -> list[Tile]:
    """Boxes of the first screen."""
    top = rows[0] if rows else None
    where = f"position {top['position']} · {top['token']}" if top else "no position qualifies"
    varied = summary["seq_len_min"] != summary["seq_len_max"]
    length = f"T up to {summary['seq_len_max']}" if varied else f"T = {summary['seq_len']}"
    how = ", estimated" if "rows_sampled" in summary else ""
    protocol = f"ε = {summary['epsilon']:g}, {length}{how}"
    return [
        Tile("Sink rate", f"{summary['sink_rate']:.1f} %", protocol, link="primary-sinks"),
        Tile(
            "Attention to it",
            f"{summary['share']:.3f}",
            f"uniform {summary['uniform_share']:.3f}",
            link="primary-sinks",
        ),
        Tile(
            "Where",
            where if top else "none",
            f"from layer {top['first_layer']}" if top else where,
            link="primary-sinks",
        ),
    ]
