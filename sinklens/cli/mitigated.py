"""The outcome of `sinklens mitigate` for a human reader."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .console import WIDTH

if TYPE_CHECKING:
    from sinklens.pipeline.mitigation_run import MitigationRun

COLUMNS = ("mitigation", "task", "metric", "baseline", "mitigated", "change (95 %)", "corrected p", "n")


def print_mitigated(run: MitigationRun, report: Path) -> None:
    """Verdicts, the paired table, and where everything is."""
    for entry in run.entries:
        print(f"{entry['label']}: {entry['verdict']['text']}")
        for line in _details(entry):
            print(f"{'':<4}{line}")
    table = [_row(row) for row in run.rows if row["role"] != "other"]
    if table:
        widths = [max(len(line[i]) for line in [list(COLUMNS), *table]) for i in range(len(COLUMNS))]
        print()
        for line in [list(COLUMNS), *table]:
            print("  ".join(f"{text:<{width}}" for text, width in zip(line, widths, strict=True)).rstrip())
        print()
    print(f"{'Recommended':<{WIDTH}}{run.recommendation['text']}")
    if run.recipe is not None and run.folder is not None:
        print(f"{'Recipe':<{WIDTH}}{run.folder / 'recipe.json'}")
    if run.folder is not None:
        print(f"{'Saved':<{WIDTH}}{run.folder}")
    print(f"{'Report':<{WIDTH}}{report}")


def _details(entry: dict[str, Any]) -> list[str]:
    from sinklens.core.counts import counted
    from sinklens.pipeline.mass_ledger import ledger_sentence

    found = []
    calibration = entry["calibration"]
    if calibration:
        passes = counted(calibration["passes"], "pass", "passes")
        found.append(f"calibration: {calibration['text']} ({passes}, {calibration['seconds']:.0f} s)")
    if entry["acted"]:
        kl, over = entry["effect"].get("kl_mean"), entry["effect"].get("kl_positions")
        divergence = (
            ""
            if kl is None
            else f" KL to the unchanged model {kl:.3g} nats, mean over {counted(over, 'prediction')}."
        )
        found.append(f"effect: {entry['effect']['text']}{divergence}")
        if entry.get("sink"):
            found.append(f"sink: {entry['sink']['text']}")
        found += [f"control: {control['text']}" for control in entry.get("controls") or []]
        if entry.get("ledger"):
            found.append(f"ledger: {ledger_sentence(entry['ledger'])}")
        cost = entry["cost"]
        if cost:
            found.append(
                f"cost: {cost['read_ms_added']:+.3g} ms per token read (from {cost['read_ms']:.3g}), "
                f"{cost['write_ms_added']:+.3g} ms per token written (from {cost['write_ms']:.3g})"
            )
    return found


def _row(row: dict[str, Any]) -> list[str]:
    ends = row["ci_low"], row["ci_high"]
    within = f" ({ends[0]:+.3g} to {ends[1]:+.3g})" if None not in ends else ""
    p = "-" if row["p_holm"] is None else f"{row['p_holm']:.3g}"
    return [
        row["mitigation"],
        row["task"],
        row["metric"],
        f"{row['baseline']:.4g}",
        f"{row['mitigated']:.4g}",
        f"{row['delta']:+.3g}{within}",
        p,
        str(row["n"]),
    ]
