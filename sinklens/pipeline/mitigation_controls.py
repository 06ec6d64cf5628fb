"""Controls of structural mitigations: as many other experts, entries or parts, judged on the same items."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from sinklens.core.counts import counted, verb
from sinklens.core.errors import UsageError
from sinklens.evaluation.metrics import Metric
from sinklens.evaluation.statistics import interval
from sinklens.mitigations import ExpertPruning, FakeQuantisation, MassiveActivations, Method
from sinklens.mitigations.protection import Protection
from sinklens.tracers import signals as sig
from sinklens.tracers.executor import trace

from .judging import Assignment, ask_under
from .scoring import put_on
from .sink_change import change_of, mean_sink, sink_of

if TYPE_CHECKING:
    from .mitigation_stages import Setting


@dataclass(frozen=True)
class Control:
    """Changes of the same size elsewhere.

    Attributes:
        kind: One word for tables.
        what: In words that complete "with ...".
        draws: The changes.
        lacking: Why there are none.
    """

    kind: str
    what: str
    draws: tuple[Method, ...] = ()
    lacking: str = ""


@dataclass
class JudgedControl:
    """A control with what came of each draw that acted.

    Attributes:
        columns: Per draw and task the answers' columns.
        sinks: Per draw what the sink is under it, see `sink_change`.
    """

    kind: str
    what: str
    draws: int
    lacking: str = ""
    parameters: list[dict[str, Any]] = field(default_factory=list)
    columns: list[dict[str, dict[str, list[float]]]] = field(default_factory=list)
    sinks: list[dict[str, Any]] = field(default_factory=list)


def controls_of(method: Method, setting: Setting) -> list[Control]:
    """The controls that fit a method; none for one that moves attention.

    Experts are drawn from those that tokens of the run were routed to.
    """
    draws, seed = setting.options.controls, setting.options.seed
    if draws < 1:
        return []
    if isinstance(method, ExpertPruning) and method.pairs:
        among = routed(setting)
        many = "another expert" if len(method.pairs) == 1 else f"{len(method.pairs)} other experts"
        found = []
        for kind, where, draw in (
            ("random", "drawn from the whole model", method.random_controls),
            ("layer-matched", "drawn from the same layers", method.layer_matched_controls),
        ):
            what = f"{many} pruned, {where}"
            try:
                found.append(Control(kind, what, draw(setting.opened, draws=draws, seed=seed, among=among)))
            except UsageError as error:
                found.append(Control(kind, what, lacking=error.what))
        return found
    if isinstance(method, MassiveActivations) and method.means and not method.control:
        return [Control("median", "as many entries of median size set to zero", method.controls())]
    if isinstance(method, FakeQuantisation) and method.protects:
        shortest = min(len(prompt) for prompt in setting.prepared.prompts.prompts)
        kept = Protection.of(method)
        others = kept.controls(setting.opened, tokens=shortest, draws=draws, seed=seed)
        what = "the same grid, as many other dims, tokens, blocks and experts protected"
        return [Control("other parts", what, tuple(other.applied(method) for other in others))]
    return []


def routed(setting: Setting) -> list[tuple[int, int]] | None:
    """Experts that tokens of the run's prompts were routed to; None where that was not recorded."""
    records = setting.run.trace.records
    if not len(records) or sig.EXPERT_TOKENS not in setting.run.trace.signals:
        return None
    tokens = np.sum([record[sig.EXPERT_TOKENS].clip(0) for record in setting.run.trace], axis=0)
    return [(int(layer), int(expert)) for layer, expert in np.argwhere(tokens > 0)]


def judge_controls(setting: Setting, label: str, method: Method) -> list[dict[str, Any]]:
    """Every draw of every control on the tasks, and the sink under it, as plain data."""
    found = []
    for control in controls_of(method, setting):
        judged = JudgedControl(control.kind, control.what, len(control.draws), control.lacking)
        for number, draw in enumerate(control.draws, start=1):
            setting.listener.stage(f"Control of {label}: {control.kind} {number} of {len(control.draws)}")
            answers = {one.task.name: ask_under(setting.opened, draw, one, None) for one in setting.given}
            if not any(each.outcome["acted"] for each in answers.values()):
                continue
            with put_on(draw, setting.opened):
                traced = trace(setting.opened, setting.prepared.prompts, setting.prepared.plan)
            judged.parameters.append(dict(draw.parameters))
            judged.columns.append({name: dict(each.columns) for name, each in answers.items()})
            sink = sink_of(traced, setting.run)
            if sink is not None:
                judged.sinks.append(sink)
        found.append(asdict(judged))
    return found


def told(
    controls: Sequence[Mapping[str, Any]],
    given: Sequence[Assignment],
    baseline: Mapping[str, Mapping[str, list[float]]],
    judged: Mapping[str, Any],
    before: Mapping[str, Any] | None,
    seed: int,
) -> list[dict[str, Any]]:
    """The controls of one mitigation for the document, one per kind.

    Draws are averaged within an item (of a perplexity: its loss), so intervals are over items. `beyond` is the paired
    difference between the mitigation and its control.

    Args:
        judged: The mitigation's own answers by task.
        before: The sink of the unchanged model.
    """
    found = []
    for control in controls:
        acted = len(control["columns"])
        row: dict[str, Any] = {
            key: control[key] for key in ("kind", "what", "draws", "lacking", "parameters")
        }
        sinks = control["sinks"]
        sink = change_of(before, mean_sink(sinks)) if before is not None and sinks else None
        row |= {"acted": acted, "sink": sink, "metrics": []}
        for one in given if acted else ():
            after = _mean_columns([draw[one.task.name] for draw in control["columns"]])
            plain, own = (
                {name: np.asarray(column, dtype=np.float64) for name, column in columns.items()}
                for columns in (baseline[one.task.name], judged[one.task.name].columns)
            )
            for metric in one.task.metrics:
                if metric.role != "other":
                    row["metrics"].append(
                        {"task": one.task.name, "metric": metric.name}
                        | {"change": _change(metric, plain, after, seed)}
                        | {"beyond": _change(metric, after, own, seed)}
                    )
        row["text"] = _sentence(row)
        found.append(row)
    return found


def _mean_columns(draws: Sequence[Mapping[str, list[float]]]) -> dict[str, np.ndarray]:
    return {name: np.mean([draw[name] for draw in draws], axis=0) for name in draws[0]}


def _change(metric: Metric, before: Mapping[str, Any], after: Mapping[str, Any], seed: int) -> dict[str, Any]:
    _, low, high, kind = interval(metric, metric.parts(before), metric.parts(after), seed=seed)
    first, second = metric.value(before), metric.value(after)
    return {
        "from": first,
        "to": second,
        "delta": second - first,
        "ci_low": low,
        "ci_high": high,
        "interval": kind,
    }


def _sentence(row: Mapping[str, Any]) -> str:
    if row["lacking"]:
        return f"With {row['what']}: not drawn. {row['lacking']}"
    draws = counted(row["acted"], "draw")
    if not row["acted"]:
        return f"With {row['what']}: none of {counted(row['draws'], 'draw')} changed anything, so there is no control."
    parts = []
    for one in row["metrics"]:
        name, task = one["metric"].replace("_", " "), one["task"]
        name = name if task == one["metric"] else f"{name} on {task}"
        beyond = _within(one["beyond"])
        parts.append(f"{name} changes by {_within(one['change'])}, the mitigation by {beyond} beyond that")
    if row["sink"] is not None:
        parts.append(row["sink"]["text"][0].lower() + row["sink"]["text"][1:-1])
    idle = row["draws"] - row["acted"]
    are = verb(idle, "is", "are")
    more = f" {idle} of {counted(row['draws'], 'draw')} changed nothing and {are} left out." if idle else ""
    return f"With {row['what']} ({draws}): {'; '.join(parts)}.{more}"


def _within(found: Mapping[str, Any]) -> str:
    ends = found["ci_low"], found["ci_high"]
    return f"{found['delta']:+.3g}" + ("" if None in ends else f" ({ends[0]:+.3g} to {ends[1]:+.3g})")
