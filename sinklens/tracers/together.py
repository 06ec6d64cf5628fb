"""The data-parallel executor: several processes trace the prompts of one run."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sinklens.inputs.spec import Prompt, PromptSet
from sinklens.models.spec import OpenedModel

from .batch import device_of
from .executor import TracePlan, empty_trace, partition, recordable, run_group
from .store import RunStore, packed, unpacked
from .streaming import InStep, trace_streamed
from .team import Team
from .trace import Trace

Progress = Callable[[int, int], None]


def trace_together(
    opened: OpenedModel,
    prompts: PromptSet,
    plan: TracePlan,
    team: Team,
    *,
    store: RunStore | None = None,
    progress: Progress | None = None,
) -> Trace | None:
    """As `trace`, by all processes of a team. Batches are those of one process, so records are the same bit for bit.

    Args:
        store: A folder that all processes see. Each keeps its own batches there; whoever resumes the run reads all.
        progress: Called at the leader with (prompts done by all, prompts in all).

    Returns:
        At the leader all records, in prompt order; None elsewhere.

    Raises:
        ResourceError: Memory ran out here, or another process is gone; finished batches are in the store.
        Elsewhere: Another process gave up.
    """
    plan = recordable(opened, plan)
    result = empty_trace(opened, plan)
    result.records = store.load_records() if store is not None and team.leads else []
    before = set(team.told("traced before", [record.index for record in result.records]))
    groups = partition(prompts.prompts, most=plan.batch_prompts, tokens=plan.batch_tokens)
    left = [group for group in groups if not all(prompt.index in before for prompt in group)]
    if opened.blocks is None:
        mine = _as_they_come(opened, left, plan, team, store, progress, (len(before), len(prompts.prompts)))
    else:
        mine = _in_step(opened, left, plan, team, store, progress)
    pieces = team.collect("records", mine)
    if pieces is None:
        return None
    result.records += [record for piece in pieces for record in unpacked(piece)]
    result.records.sort(key=lambda record: record.index)
    return result


def _as_they_come(
    opened: OpenedModel,
    groups: Sequence[list[Prompt]],
    plan: TracePlan,
    team: Team,
    store: RunStore | None,
    progress: Progress | None,
    counts: tuple[int, int],
) -> list[bytes]:
    """The records of the batches that this process takes, packed; whoever is free takes the next one.

    Args:
        counts: Prompts done before, and prompts in all.
    """
    device, (before, total) = device_of(opened), counts
    mine: list[bytes] = []

    def report(more: int = 0) -> int:
        done = before + team.count("prompts", more)
        if progress is not None and team.leads:
            progress(done, total)
        return done

    for group in team.share("batches", groups):
        records = run_group(opened, group, plan, device, before + team.count("prompts"))
        if store is not None:
            store.append(records)
        mine.append(packed(records))
        report(len(records))
    team.wait(lambda: report() >= total)
    return mine


def _in_step(
    opened: OpenedModel,
    groups: Sequence[list[Prompt]],
    plan: TracePlan,
    team: Team,
    store: RunStore | None,
    progress: Progress | None,
) -> list[bytes]:
    """The same of a model whose blocks are on disk: all processes go through the blocks in step."""
    steps = InStep(team, groups)
    if not steps.mine:
        return []
    told = progress or _not_told  # every process counts what has passed
    records = trace_streamed(opened, groups, plan, store=store, progress=told, steps=steps)
    return [packed([record]) for record in records]


def _not_told(_: int, __: int) -> None:
    """Progress that nobody asked for."""
