"""What a mitigate run says to whoever calls it from a script: conditions, and the code for what did not act."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from sinklens.analyzers.base import TRUTH
from sinklens.core.counts import counted
from sinklens.core.errors import SelfCheckError
from sinklens.evaluation.judgement import Judgement

from .gate import check_paths
from .mitigate_options import MitigateOptions
from .mitigate_setup import jobs
from .mitigation_found import with_finders
from .mitigation_run import MitigationRun
from .prepare import analyzers_for


def check_conditions(expressions: Collection[str], options: MitigateOptions) -> None:
    """Refuse conditions that no outcome of this run can meet, before anything is run.

    What can be asked of a mitigation depends on the task's metrics and is checked when they are known.

    Raises:
        UsageError: An expression cannot be read, or its finding or field will not be there.
    """
    if not expressions:
        return
    wanted = jobs(options)
    analyzers = analyzers_for(with_finders(options, wanted).profile)
    words = {"judgement": [str(judgement) for judgement in Judgement], "acted": TRUTH}
    others = {job.method.name: words for job in wanted}
    check_paths(expressions, [analyzer.name for analyzer in analyzers], others)


def gate_document(run: MitigationRun) -> dict[str, Any]:
    """The document with one finding per mitigation, so that `--fail-if` reads it like the others.

    A mitigation's fields: `judgement, acted, rows_edited, kl_mean, read_ms_added, write_ms_added`, of the sink
    `sink_share, sink_rate, sink_lost` and the largest loss under a control, `control_sink_lost`, and of the first task
    each metric as `METRIC`, its change as `METRIC_delta` and its p as `METRIC_p`. Methods are named without their
    parameters; of several of one name the first counts.
    """
    document = run.document
    first = next((row["task"] for row in run.rows), None)
    for entry in run.entries:
        summary = {
            "judgement": entry["verdict"]["judgement"],
            "acted": entry["acted"],
            "rows_edited": entry["effect"].get("rows_edited", 0),
            "kl_mean": entry["effect"].get("kl_mean"),
            **_sink(entry),
            **{key: entry["cost"].get(key) for key in ("read_ms_added", "write_ms_added")},
        }
        for row in run.rows:
            if row["mitigation"] == entry["label"] and row["task"] == first:
                name = row["metric"]
                summary |= {
                    name: row["mitigated"],
                    f"{name}_delta": row["delta"],
                    f"{name}_p": row["p_value"],
                }
        document["findings"].setdefault(entry["name"], {"summary": summary, "status": "found"})
    return document


def _sink(entry: dict[str, Any]) -> dict[str, Any]:
    """What becomes of the sink; a field that is not known is left out, so that a condition on it is refused."""
    sink = entry.get("sink") or {}
    found = {f"sink_{key}": sink.get(key) for key in ("share", "rate", "lost")}
    lost = [(control["sink"] or {}).get("lost") for control in entry.get("controls") or []]
    found["control_sink_lost"] = max((each for each in lost if each is not None), default=None)
    return {key: value for key, value in found.items() if value is not None}


def require_acted(run: MitigationRun) -> None:
    """Refuse silence about a mitigation that edited nothing. One whose calibration kept the model is no such case.

    Raises:
        SelfCheckError: Naming it.
    """
    idle = [e for e in run.entries if not e["acted"] and not e["kept_unchanged"]]
    if not idle:
        return
    entry = idle[0]
    why = entry["effect"].get("text", "").partition("did not act: ")[2] or entry["effect"].get("text", "")
    others = f" {counted(len(idle) - 1, 'other')} did not act either." if len(idle) > 1 else ""
    no_sink = run.findings.get("primary-sinks")
    detail = None
    if no_sink is not None and str(no_sink.status) != "found":
        detail = "The model has no attention sink by its own profile, so there was nothing to edit."
    raise SelfCheckError(
        f"Mitigation {entry['name']!r} edited 0 rows: {why} Not reported as neutral.{others}",
        detail=detail,
        hint="Check heads, layers and thresholds, or leave it out.",
    )
