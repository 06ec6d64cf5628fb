"""`--sensitivity`: the same measurement under other inputs and precisions, as plain data for the analyzer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from sinklens.analyzers import Finding, PrimarySinks
from sinklens.core.errors import DataError, SinklensError
from sinklens.models.spec import OpenedModel
from sinklens.tracers import signals as sig
from sinklens.tracers.executor import TracePlan, trace
from sinklens.tracers.trace import PromptRecord, Trace

from .options import ProfileOptions
from .prepare import Prepared
from .variants import Material, Prompts, Variant, base_prompts, variants


def sensitivity(
    prepared: Prepared,
    options: ProfileOptions,
    plan: TracePlan,
    seen: Trace,
    findings: Mapping[str, Finding],
    *,
    seed: int,
    progress: Callable[[int, int], None],
) -> dict[str, Any]:
    """Measure the sink of a few prompts again under every variant.

    Raises:
        DataError: The rule of primary sinks does not apply to the run's own prompts.

    Returns:
        `analyzer` (the parameters used), `base` (the measurement of the run's own protocol on these prompts) and
        `variants`: per variant its group, label and note, and either `skipped` (why, as a sentence) or the
        measurement. A measurement has `found`, `position`, `seq_len`, and lists over prompts: `sources`, `rate` (%),
        `share`, `position_rate` (% at the position that is strongest in the base), `lift` (mean share of its own
        strongest position over the uniform one) and `alike` (share of positions whose hidden state is at least half
        as long as the base's strongest).
    """
    found = findings.get("primary-sinks")
    analyzer = PrimarySinks(**found.parameters) if found else PrimarySinks()
    light = replace(plan, signals=PrimarySinks.needs)
    base = base_prompts(prepared.prompts.prompts)
    material = Material(prepared, options, base, seed)
    todo = list(variants(material))
    progress(0, len(todo) + 1)
    measured = measure(_traced(prepared.opened, base, light), analyzer, None)
    entries = []
    for done, variant in enumerate(todo, start=1):
        progress(done, len(todo) + 1)
        entries.append(_entry(variant, prepared.opened, light, analyzer, measured))
    progress(len(todo) + 1, len(todo) + 1)
    return {
        "analyzer": analyzer.parameters,
        "dtype": prepared.opened.info.dtype,
        "base": measured,
        "variants": entries,
    }


def _entry(
    variant: Variant, opened: OpenedModel, plan: TracePlan, analyzer: PrimarySinks, base: dict[str, Any]
) -> dict[str, Any]:
    said = {"group": variant.group, "label": variant.label, "votes": variant.votes, "note": variant.note}
    try:
        model = variant.open() if variant.open is not None else opened
        return {**said, **measure(_traced(model, variant.make(), plan), analyzer, base)}
    except SinklensError as error:
        return {**said, "skipped": error.what}
    except (RuntimeError, NotImplementedError) as error:
        # A precision that this machine's kernels lack is told like that, and ends nothing.
        if variant.open is None:
            raise
        return {**said, "skipped": f"The model does not run in it here: {str(error).splitlines()[0]}"}


def _traced(opened: OpenedModel, prompts: Prompts, plan: TracePlan) -> Trace:
    numbered = [replace(prompt, index=i) for i, prompt in enumerate(prompts)]
    return trace(opened, numbered, plan)


def measure(seen: Trace, analyzer: PrimarySinks, base: dict[str, Any] | None) -> dict[str, Any]:
    """One measurement of `sensitivity`.

    Raises:
        DataError: The analyzer does not apply, most often because the prompts are too short for it.
    """
    finding = analyzer.analyze(seen)
    if finding.reason is not None:
        raise DataError(finding.reason[:1].upper() + finding.reason[1:])
    position = int(finding.summary["strongest_position"])
    reference = position if base is None else int(base["position"])
    records = [r for r in seen if len(r) >= analyzer.min_tokens]
    here = [strength(record, position, analyzer) for record in records]
    there = [strength(record, reference, analyzer) for record in records]
    norm = None if base is None else base["norm"]
    return {
        "found": bool(finding.rows),
        "position": position,
        "token": _token(records, position),
        "seq_len": int(np.median([len(record) for record in records])),
        "sources": [record.source for record in records],
        "rate": [rate for rate, _ in here],
        "share": [share for _, share in here],
        "position_rate": [rate for rate, _ in there],
        "lift": float(finding.summary["share"] / finding.summary["uniform_share"]),
        "norm": _norm(records, position) if norm is None else norm,
        "alike": None if norm is None else [alike(record, norm) for record in records],
    }


def strength(record: PromptRecord, position: int, analyzer: PrimarySinks) -> tuple[float, float]:
    """Sink rate (%) and mean share of one position in one prompt."""
    at = np.flatnonzero(record[sig.KEPT_POSITIONS] == position)
    if not len(at):
        if position >= len(record):
            return 0.0, 0.0
        return 0.0, float(np.nanmean(record[sig.ATTENTION_RECEIVED_MEAN][:, position]))
    alpha = record[sig.ATTENTION_RECEIVED][:, :, at[0]]
    known = alpha[~np.isnan(alpha)]
    return float(100 * (known > analyzer.epsilon).mean()), float(known.mean())


def alike(record: PromptRecord, norm: list[float]) -> float:
    """Share of positions whose state is at least half as long as the base's sink, in the layer of its peak."""
    layer = int(np.argmax(norm))
    return float((record[sig.RESIDUAL_NORM][layer] >= 0.5 * norm[layer]).mean())


def _norm(records: list[PromptRecord], position: int) -> list[float]:
    """Mean norm of the position's state by layer."""
    holders = [record[sig.RESIDUAL_NORM][:, position] for record in records if position < len(record)]
    return np.mean(holders, axis=0).tolist()


def _token(records: list[PromptRecord], position: int) -> str:
    holders = [record.pieces[position] for record in records if position < len(record)]
    return max(set(holders), key=holders.count) if holders else ""
