"""Further passes over a few prompts after the main one. Their results are plain data in the manifest, which analyzers
read: what removing the causes does (`effects`), and how far the verdict depends on the input (`sensitivity`)."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from sinklens.analyzers import PrimarySinks
from sinklens.core.errors import DataError, ModelError, ResourceError
from sinklens.inputs.cutting import cut_prompt
from sinklens.tracers.executor import TracePlan, trace

from . import visual_experiments as visual
from .cost import duration
from .listener import Listener
from .options import ProfileOptions
from .picture_prompts import has_pictures
from .prepare import EFFECTS, READERS, SENSITIVITY, Prepared
from .run import Run
from .sensitivity import sensitivity
from .verify import planned_passes, verify

AUTO_SECONDS = 60.0
"""Without --verify or --no-verify the causes are removed if that is predicted to take no longer than this."""
PROBE_TOKENS = 256


@dataclass(frozen=True)
class Setting:
    """What the experiments of a run share."""

    prepared: Prepared
    plan: TracePlan
    options: ProfileOptions
    listener: Listener


def run_experiments(setting: Setting, run: Run) -> Run:
    """The run with the experiments that were asked for, its findings made again where they read one.

    Results are in `trace.manifest["experiments"]`; why one was not run is in `trace.manifest["experiments_skipped"]`.
    """
    results: dict[str, Any] = {}
    skipped: dict[str, str] = {}
    for name, wanted, perform in (
        (EFFECTS, setting.options.verify, _effects),
        (SENSITIVITY, setting.options.sensitivity, _sensitivity),
        *((name, setting.options.verify, partial(visual.perform, name=name)) for name in visual.PROMPTS),
    ):
        if not {analyzer.name for analyzer in run.analyzers} & set(READERS[name]):
            continue
        reason = why_not(setting, run, name, wanted)
        if reason:
            skipped[name] = reason
            continue
        setting.listener.stage(name)
        try:
            results[name] = perform(setting, run)
        except ResourceError as error:
            # The main pass is done; what it found is not given up for a look that did not fit.
            skipped[name] = f"It was stopped: {error.what}"
        except (DataError, ModelError) as error:
            skipped[name] = error.what
    run.trace.manifest["experiments"] = results
    run.trace.manifest["experiments_skipped"] = skipped
    return Run(run.trace, run.analyzers, run.checks) if results or skipped else run


def without_experiments(run: Run, why: str) -> Run:
    """The run, saying why no experiment was made.

    Args:
        why: A sentence.
    """
    run.trace.manifest["experiments"] = {}
    run.trace.manifest["experiments_skipped"] = {EFFECTS: why, SENSITIVITY: why}
    return Run(run.trace, run.analyzers, run.checks)


def why_not(setting: Setting, run: Run, name: str, wanted: bool | None) -> str | None:
    """Why an experiment is not run, as a sentence; None if it is."""
    why = _unasked_or_long(setting, run, name, wanted)
    if why is None and name in visual.PROMPTS:
        return visual.why_meaningless(setting, name)
    return why


def _unasked_or_long(setting: Setting, run: Run, name: str, wanted: bool | None) -> str | None:
    if name == SENSITIVITY and has_pictures(setting.prepared.prompts):
        return "Its variants (without BOS, random tokens, other lengths) are of texts, and these prompts have pictures."
    ahead = visual.planned(setting, run, name) if name in visual.PROMPTS else None
    if ahead is not None and ahead.nothing:
        return ahead.nothing
    if wanted:
        return None
    if name == SENSITIVITY:
        return "It was not run; add --sensitivity."
    if wanted is False:
        return "It was switched off with --no-verify."
    prompts = setting.prepared.prompts.prompts
    opened, seed = setting.prepared.opened, setting.options.seed
    if opened.blocks is not None:
        return (
            "It was not run, because each of its passes would read the model from disk again; add --verify."
        )
    if ahead is not None:
        passes, tokens = ahead.passes, ahead.tokens
    else:
        passes, tokens = planned_passes(opened, prompts, run.trace, run.findings, seed=seed)
    seconds = passes * tokens * measured_pace(setting)
    if seconds > AUTO_SECONDS:
        return f"It was not run, because it would take about {duration(seconds)}; add --verify."
    return None


def measured_pace(setting: Setting) -> float:
    """Seconds per token of a pass that records as little as an experiment does: the best of two over one prompt.

    Of wall and processor time the smaller counts: the first is too long on a busy machine, the second where several
    threads work. Elsewhere than on a CPU it is the wall time.
    """
    prompt = setting.prepared.prompts.prompts[0]
    short = cut_prompt(prompt, PROBE_TOKENS)
    light = replace(setting.plan, signals=PrimarySinks.needs)
    seconds = []
    for _ in range(2):
        wall, processor = time.perf_counter(), time.process_time()
        trace(setting.prepared.opened, [short], light)
        wall = time.perf_counter() - wall
        on_cpu = next(setting.prepared.opened.module.parameters()).device.type == "cpu"
        seconds.append(min(wall, time.process_time() - processor) if on_cpu else wall)
    return min(seconds) / len(short)


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
