"""The mass ledger of a mitigation: what each group of keys gets without it and with it, on the same tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from sinklens.analyzers import Analyzer, chosen_analyzers
from sinklens.analyzers.key_groups import GROUPS, KEYS, grouped
from sinklens.analyzers.mass_ledger import MassLedger, ledger_table
from sinklens.core.counts import counted
from sinklens.core.figures import Figure, Lines, Series
from sinklens.tracers.trace import Trace

from .tables import Rows

if TYPE_CHECKING:
    import pandas as pd

NAMES = {**dict(zip(KEYS, GROUPS, strict=True)), "learned_sink": "learned sink"}
UNITS = {
    "layer": "0-based; none: mean over layers",
    "unchanged": "share of a query's attention",
    "mitigated": "share of a query's attention",
    "change": "mitigated minus unchanged",
}


def with_ledger(asked: tuple[Any, ...]) -> tuple[Any, ...]:
    """The analyzers asked for, the ledger among them."""
    if any(analyzer.name == MassLedger.name for analyzer in chosen_analyzers(asked)):
        return asked
    return (*asked, MassLedger.name) if asked else asked


def side_by_side(before: Trace, after: Trace, analyzers: Iterable[Analyzer]) -> dict[str, Any]:
    """The ledger of a mitigation, groups being those of the unchanged model.

    So the same tokens are followed: where a mitigation takes a sink's attention away, the group stays and its mass
    falls.

    Returns:
        `rule, queries, n_prompts`; `total` and each of `layers` with `unchanged`, `mitigated` and `change` by group.
        Where there can be none, `reason`, a sentence.
    """
    ledger = next((one for one in analyzers if isinstance(one, MassLedger)), MassLedger())
    if not any(layer.attention for layer in before.layers):
        return {"reason": "the model has no softmax attention."}
    groups = grouped(before, ledger.rule)
    if isinstance(groups, str):
        return {"reason": groups}
    tables = ledger_table(before, groups), ledger_table(after, groups)
    if not all(table["layers"] for table in tables):
        return {"reason": "no prompt has text after its pictures whose attention could be counted."}
    rows = zip(tables[0]["layers"], tables[1]["layers"], strict=True)
    return {
        "rule": groups.rule,
        "queries": groups.queries,
        "n_prompts": len(groups.members),
        "total": _change(tables[0]["total"], tables[1]["total"]),
        "layers": [{"layer": one["layer"], **_change(one, two)} for one, two in rows],
    }


def _change(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """By group; learned sinks may be there under a mitigation only, which then has put them there."""
    found = {}
    for key in dict.fromkeys((*before, *after)):
        if key != "layer":
            one, two = before.get(key, 0.0), after.get(key, 0.0)
            found[key] = {"unchanged": one, "mitigated": two, "change": two - one}
    return found


class Ledger(Rows):
    """Rows: mitigation, layer (None: all), group, its share without and with the mitigation, and the change."""

    units = UNITS

    def to_frame(self) -> pd.DataFrame:
        frame = super().to_frame()
        if len(frame):
            frame["layer"] = frame["layer"].astype("Int64")
        return frame


def ledger_of(entries: Iterable[Mapping[str, Any]]) -> Ledger:
    """The ledgers of all mitigations of a run as rows."""
    rows = []
    for entry in entries:
        found = entry.get("ledger") or {}
        for layer in [{"layer": None, **found["total"]}, *found["layers"]] if "total" in found else []:
            for key, shares in layer.items():
                if key != "layer":
                    row = {"mitigation": entry["label"], "layer": layer["layer"], "group": NAMES[key]}
                    rows.append(row | dict(shares))
    return Ledger(rows)


def ledger_sentence(ledger: Mapping[str, Any]) -> str:
    """In one line: `text sink 42.2 % -> 13.0 %, other 57.8 % -> 87.0 %`."""
    if "total" not in ledger:
        return f"none: {ledger.get('reason', 'not recorded.')}"
    parts = [
        f"{NAMES[key]} {100 * shares['unchanged']:.1f} % -> {100 * shares['mitigated']:.1f} %"
        for key, shares in ledger["total"].items()
    ]
    return f"{', '.join(parts)} (of the attention of {ledger['queries']})"


def ledger_figures(entries: Iterable[Mapping[str, Any]], slug: Any) -> list[Figure]:
    """By layer, what each group gets with a mitigation (solid) and without it."""
    figures: list[Figure] = []
    for entry in entries:
        ledger = entry.get("ledger") or {}
        if "total" not in ledger:
            continue
        rows = ledger["layers"]
        layers = np.array([row["layer"] for row in rows])
        series = tuple(
            Series(
                f"{NAMES[key]}, {which}",
                layers,
                np.array([row[key][which] for row in rows]),
                emphasis=which == "mitigated",
            )
            for key in ledger["total"]
            for which in ("unchanged", "mitigated")
            if max(row[key]["unchanged"] + row[key]["mitigated"] for row in rows) > 0
        )
        told = (
            "by the state of a token"
            if ledger["rule"] == "states"
            else "by the attention a position receives"
        )
        figures.append(
            Lines(
                f"ledger-{slug(entry['label'])}",
                f"Attention by group of keys: {entry['label']}",
                f"Share of the attention of {ledger['queries']}, mean over queries, heads and "
                f"{counted(ledger['n_prompts'], 'prompt')}. Sinks are those of the unchanged model, told {told}.",
                series,
                "layer",
                "share",
            )
        )
    return figures
