"""What a run finds for its mitigations: Super Experts to prune, means of massive activations, parts to protect."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from sinklens.analyzers import chosen_analyzers
from sinklens.analyzers.base import Status
from sinklens.analyzers.super_experts import ROUTED
from sinklens.core.errors import DataError, ModelError
from sinklens.inputs.spec import Prompt
from sinklens.mitigations import ExpertPruning, FakeQuantisation, MassiveActivations, Method
from sinklens.models.spec import OpenedModel

from .judging import Assignment
from .listener import Listener
from .mitigate_options import MitigateOptions
from .mitigate_setup import Job
from .quantisation import protection_of
from .run import Run
from .scoring import check_fits

SHARED = 32
"""Tokens in a row that make a prompt and a task's item the same text."""


def with_finders(options: MitigateOptions, jobs: Iterable[Job]) -> MitigateOptions:
    """The options with the analyzers that find what the methods are about."""
    asked = options.profile.analyzers
    named = {analyzer.name for analyzer in chosen_analyzers(asked)}
    missing = [name for job in jobs for name in job.method.finders if name not in named]
    profile = replace(options.profile, analyzers=(*asked, *dict.fromkeys(missing)))
    return replace(options, profile=profile) if missing else options


def fits(method: Method, opened: OpenedModel) -> None:
    """Refuse parameters that do not fit the model; of those still open, a model that can have nothing to find.

    Raises:
        UsageError: A head, layer or expert that the model does not have.
        ModelError: A model without experts.
    """
    if not method.wants:
        check_fits(method, opened)
    elif isinstance(method, ExpertPruning) and not opened.anatomy.main.n_experts:
        raise ModelError(
            f"{method.name}: this model has no experts, so there is nothing to edit.",
            detail="Every feed-forward part of it is dense.",
            hint=f"{method.name}:projections=LAYER prunes a dense feed-forward part.",
        )
    elif isinstance(method, FakeQuantisation):
        method.check(opened.anatomy.main)


def with_found(
    jobs: list[Job],
    run: Run,
    opened: OpenedModel,
    prompts: Sequence[Prompt],
    given: Sequence[Assignment],
    listener: Listener,
) -> list[Job]:
    """The jobs with what the run of the unchanged model found; `nothing` says where it found nothing.

    Args:
        prompts: Of the run. Means are taken of those that share no text with an item that is reported.

    Raises:
        DataError: All of them do.
    """
    found = []
    for job in jobs:
        method: Method = job.method
        if isinstance(method, ExpertPruning) and method.wants:
            job = _experts(job, method, run)
        elif isinstance(method, FakeQuantisation) and method.wants:
            job = _protection(job, method, run)
        elif isinstance(method, MassiveActivations) and not method.means:
            listener.stage(f"Means for {job.label}")
            others = unreported(prompts, opened, given)
            job = replace(job, method=method.calibrated(opened, others))
        if not job.nothing:
            check_fits(job.method, opened)
        found.append(job)
    return found


def _experts(job: Job, method: ExpertPruning, run: Run) -> Job:
    finding = run.findings["super-experts"]
    rows = finding.rows if finding.status is Status.FOUND else []
    experts = tuple((row["layer"], row["expert"]) for row in rows if row["kind"] == ROUTED)
    projections = tuple(row["layer"] for row in rows if row["kind"] != ROUTED)
    if not rows:
        return replace(job, nothing=f"there is nothing to edit: {finding.verdict}")
    named = (*projections, *method.projections)
    return replace(job, method=replace(method, experts=experts, projections=named))


def _protection(job: Job, method: FakeQuantisation, run: Run) -> Job:
    found = protection_of(run.trace, run.findings)
    if found.empty:
        nothing = "the run found no massive dim, sink token or Super Expert that could be protected."
        return replace(job, nothing=nothing)
    return replace(job, method=found.applied(method))


def unreported(
    prompts: Sequence[Prompt], opened: OpenedModel, given: Sequence[Assignment]
) -> tuple[Prompt, ...]:
    """The prompts that share no 32 tokens in a row with an item that is reported (shorter ones: as many as they have).

    Raises:
        DataError: There are none.
    """
    wanted = {min(SHARED, len(prompt)) for prompt in prompts}
    reported: set[tuple[int, ...]] = set()
    for one in given:
        for question in one.task.probes(opened, one.split.items):
            ids = tuple(question.context)
            reported.update(ids[at : at + width] for width in wanted for at in range(len(ids) - width + 1))

    def shared(prompt: Prompt) -> bool:
        width = min(SHARED, len(prompt))
        ids = tuple(prompt.token_ids)
        return any(ids[at : at + width] in reported for at in range(len(ids) - width + 1))

    found = tuple(prompt for prompt in prompts if not shared(prompt))
    if not found:
        raise DataError(
            "Every prompt shares text with an item that is reported, so no mean can be taken of other text.",
            detail="Values that come from reported items say nothing about new ones.",
            hint="Give other prompts with --prompts, or fewer items with --report-items.",
        )
    return found
