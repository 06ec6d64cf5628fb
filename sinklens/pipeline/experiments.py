"""Further passes over a few prompts after the main one. Their results are plain data in the manifest, which analyzers
read: what removing the causes does (`effects`), and how far the verdict depends on the input (`sensitivity`)."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

from sinklens.tracers.executor import TracePlan, trace

from .cost import duration
from .listener import Listener
from .options import ProfileOptions
from .prepare import EFFECTS, READERS, SENSITIVITY, Prepared
from .run import Run
from .sensitivity import sensitivity
from .verify import verify

AUTO_SECONDS = 60.0
"""Without --verify or --no-verify the causes are removed if that is predicted to take no longer than this."""
VERIFY_PROMPTS, VERIFY_TOKENS, VERIFY_PASSES = 8, 256, 30
"""What a verification runs: prompts, their longest length, and passes over them with their controls, about."""


@dataclass(frozen=True)
class Setting:
    """What the experiments of a run share. `pace` is seconds per token of the main pass, None if nothing was traced."""

    prepared: Prepared
    plan: TracePlan
    options: ProfileOptions
    listener: Listener
    pace: float | None


def run_experiments(setting: Setting, run: Run) -> Run:
    """The run with the experiments that were asked for, its findings made again where they read one.

    Results are in `trace.manifest["experiments"]`; why one was not run is in `trace.manifest["experiments_skipped"]`.
    """
    results: dict[str, Any] = {}
    skipped: dict[str, str] = {}
    for name, wanted, perform in (
        (EFFECTS, setting.options.verify, _effects),
        (SENSITIVITY, setting.options.sensitivity, _sensitivity),
    ):
        if not {analyzer.name for analyzer in run.analyzers} & set(READERS[name]):
            continue
        reason = why_not(setting, name, wanted)
        if reason:
            skipped[name] = reason
            continue
        setting.listener.stage(name)
        found = perform(setting, run)
        if found:
            results[name] = found
    run.trace.manifest["experiments"] = results
    run.trace.manifest["experiments_skipped"] = skipped
    return Run(run.trace, run.analyzers, run.checks) if results else run


def why_not(setting: Setting, name: str, wanted: bool | None) -> str | None:
    """Why an experiment is not run, as a sentence; None if it is."""
    if wanted:
        return None
    if name == SENSITIVITY:
        return "It was not run; add --sensitivity."
    if wanted is False:
        return "It was switched off with --no-verify."
    seconds = verify_tokens(setting.prepared) * (setting.pace or measured_pace(setting))
    if seconds > AUTO_SECONDS:
        return f"It was not run, because it would take about {duration(seconds)}; add --verify."
    return None


def verify_tokens(prepared: Prepared) -> int:
    """Tokens that pass through the model in a verification, about."""
    lengths = [min(len(prompt), VERIFY_TOKENS) for prompt in prepared.prompts.prompts[:VERIFY_PROMPTS]]
    return VERIFY_PASSES * sum(lengths)


def measured_pace(setting: Setting) -> float:
    """Seconds per token, from one traced prompt: for a resumed run that has nothing left to trace."""
    prompt = setting.prepared.prompts.prompts[0]
    ids, pieces = prompt.token_ids[:VERIFY_TOKENS], prompt.pieces[:VERIFY_TOKENS]
    start = time.perf_counter()
    trace(setting.prepared.opened, [replace(prompt, token_ids=ids, pieces=pieces)], setting.plan)
    return (time.perf_counter() - start) / len(ids)


def _sensitivity(setting: Setting, run: Run) -> dict[str, Any]:
    return sensitivity(
        setting.prepared,
        setting.options,
        setting.plan,
        run.trace,
        run.findings,
        seed=setting.options.seed,
        progress=setting.listener.progress,
    )


def _effects(setting: Setting, run: Run) -> dict[str, Any]:
    return verify(
        setting.prepared.opened,
        setting.prepared.prompts.prompts,
        setting.plan,
        run.trace,
        run.findings,
        seed=setting.options.seed,
        progress=setting.listener.progress,
    )
