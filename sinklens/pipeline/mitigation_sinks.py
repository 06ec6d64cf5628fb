"""Sink dims for the mitigations that need them: the run's own, else searched for on the model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sinklens.mitigations.kinds import visual_ids
from sinklens.mitigations.visual import VisualSinkMethod
from sinklens.tracers.calibrate_dims import search_sink_dims
from sinklens.tracers.sink_dims import SinkDims

from .listener import Listener
from .mitigate_setup import Job
from .prepare import Prepared
from .sinks import SEARCHED, dims_asked_for, texts

NOTHING = "there is nothing to edit: the model has no sink dims, in which sinks would be large."


def with_dims(jobs: list[Job], prepared: Prepared, asked: str | None, listener: Listener) -> list[Job]:
    """The jobs with sink dims filled in where a method has none; `nothing` says where the model has none either.

    The dims are those by which the run's own prompts are read, so that what is moved and what is measured are the same
    tokens. A run whose prompts have no pictures reads none; then they are searched for here.

    Args:
        asked: As `sink_dims` of `ProfileOptions`.

    Raises:
        UsageError: Published dims that are not known or not this model's.
    """
    lacking = [job for job in jobs if isinstance(job.method, VisualSinkMethod) and job.method.dims is None]
    config: Any = prepared.opened.module.config
    if not lacking or not visual_ids(config):
        return jobs
    dims = _dims(prepared, asked, listener)
    found = []
    for job in jobs:
        if job in lacking:
            why = "" if dims else f"{NOTHING} Searched on {dims.source}: {dims.failed}"
            method: Any = replace(job.method, dims=dims) if dims else job.method  # type: ignore[type-var]
            job = replace(job, method=method, nothing=why)
        found.append(job)
    return found


def _dims(prepared: Prepared, asked: str | None, listener: Listener) -> SinkDims:
    if prepared.plan.sinks is not None:
        return prepared.plan.sinks.dims
    named = dims_asked_for(asked, prepared.opened)
    if named is not None:
        return named
    pictured = [prompt for prompt in prepared.prompts.prompts if prompt.visual is not None]
    listener.stage("Search for sink dims")
    return search_sink_dims(prepared.opened, [*texts(prepared.opened), *pictured[:SEARCHED]], prepared.plan)
