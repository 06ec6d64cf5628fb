"""The section of a mitigate run: what each mitigation did, the paired table, and the maps side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sinklens.core.counts import counted
from sinklens.core.figures import Figure

from . import tables, views
from .numbers import number
from .views import FigureView

SECTION = "mitigations"
_LABELS = {
    "delta": "change",
    "p_value": "p",
    "p_holm": "corrected p",
    "n": "items",
    "changed": "items that differ",
    "detectable": "detectable change",
}
_UNITS = {
    "p_holm": "Holm, over all verdicts of the run",
    "detectable": "smallest true change that would have been seen with 80 % power",
}


@dataclass(frozen=True)
class Told:
    """One mitigation in words.

    Attributes:
        judgement: Its class in the style sheet is `judgement` with dashes.
        facts: Name and value: effect, sink, controls, cost, calibration.
    """

    label: str
    judgement: str
    text: str
    recommended: bool
    facts: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Mitigated:
    """What the template prints."""

    recommendation: str
    told: tuple[Told, ...]
    table: tables.Table | None
    ledger: tables.Table | None
    ledger_layers: tables.Table | None
    figures: tuple[FigureView, ...]


def view(document: Mapping[str, Any], figures: Sequence[Figure], data: dict[str, Any]) -> Mitigated | None:
    """The section, or None for a run without mitigations."""
    entries = document.get(SECTION) or []
    if not entries:
        return None
    return Mitigated(
        str((document.get("recommended") or {}).get("text") or ""),
        tuple(_told(entry) for entry in entries),
        tables.table([_row(row) for row in document.get("evaluation") or []], _UNITS, _LABELS),
        *_ledgers(entries),
        tuple(views.draw_all(SECTION, figures, data)),
    )


def _ledgers(entries: Sequence[Mapping[str, Any]]) -> tuple[tables.Table | None, tables.Table | None]:
    """What groups of keys get, over all layers and by layer."""
    total: list[dict[str, Any]] = []
    layers: list[dict[str, Any]] = []
    for entry in entries:
        ledger = entry.get("ledger") or {}
        for row in [{"layer": None, **ledger["total"]}, *ledger["layers"]] if "total" in ledger else []:
            for group, shares in row.items():
                if group == "layer":
                    continue
                line = {"mitigation": entry.get("label"), "group": group.replace("_", " ")}
                if row["layer"] is None:
                    total.append(line | dict(shares))
                else:
                    layers.append(
                        {"mitigation": line.pop("mitigation"), "layer": row["layer"], **line, **shares}
                    )
    return tables.table(total, {}), tables.table(layers, {})


def _row(row: Mapping[str, Any]) -> dict[str, Any]:
    keys = (
        "mitigation",
        "task",
        "metric",
        "baseline",
        "mitigated",
        "delta",
        "p_value",
        "p_holm",
        "n",
        "changed",
    )
    found = {key: row.get(key) for key in keys}
    found["delta_ci_low"], found["delta_ci_high"] = row.get("ci_low"), row.get("ci_high")
    return found | {key: row.get(key) for key in ("detectable", "test", "interval", "verdict")}


def _told(entry: Mapping[str, Any]) -> Told:
    verdict = entry.get("verdict") or {}
    effect, cost = entry.get("effect") or {}, entry.get("cost") or {}
    facts = []
    if effect.get("text") and entry.get("acted"):
        facts.append(("effect", str(effect["text"])))
    if entry.get("acted") and isinstance(effect.get("kl_mean"), int | float):
        over = effect.get("kl_positions")
        over = counted(over, "next-token prediction")
        kl = f"{number(effect['kl_mean'])} nats, mean over {over} of the tasks"
        facts.append(("KL to the unchanged model", kl))
    if (entry.get("ledger") or {}).get("reason"):
        facts.append(("attention by group of keys", f"none: {entry['ledger']['reason']}"))
    if (entry.get("sink") or {}).get("text"):
        facts.append(("sink", str(entry["sink"]["text"])))
    for control in entry.get("controls") or []:
        facts.append((f"control ({control.get('kind')})", str(control.get("text"))))
    for name, what in (("read", "per token read"), ("write", "per token written")):
        if isinstance(cost.get(f"{name}_ms_added"), int | float):
            added, before = cost[f"{name}_ms_added"], cost[f"{name}_ms"]
            facts.append(
                (f"added ms {what}", f"{number(added)}, from {number(before)} (median of paired rounds)")
            )
    calibration = entry.get("calibration") or {}
    if calibration.get("text"):
        passes = counted(calibration.get("passes"), "pass", "passes")
        items = counted(calibration.get("split", {}).get("items"), "item")
        facts.append(("calibration", f"{calibration['text']} {passes} over {items}."))
    return Told(
        str(entry.get("label") or ""),
        str(verdict.get("judgement") or ""),
        str(verdict.get("text") or ""),
        bool(entry.get("recommended")),
        tuple(facts),
    )
