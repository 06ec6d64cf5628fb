"""The data-parallel executor: several processes trace the prompts of one run."""

from __future__ import annotations

from collections.abc import Callable

from sinklens.inputs.spec import PromptSet
from sinklens.models.spec import OpenedModel

from .batch import device_of
from .executor import TracePlan, empty_trace, partition, recordable, run_group
from .store import RunStore, packed, unpacked
from .team import Team
from .trace import Trace


def trace_together(
    opened: OpenedModel,
    prompts: PromptSet,
    plan: TracePlan,
    team: Team,
    *,
    store: RunStore | None = None,
    progress: Callable[[int, int], None] | None = None,
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
    device, total = device_of(opened), len(prompts.prompts)
    mine: list[bytes] = []

    def report(more: int = 0) -> int:
        done = len(before) + team.count("prompts", more)
        if progress is not None and team.leads:
            progress(done, total)
        return done

    for group in team.share("batches", left):
        records = run_group(opened, group, plan, device, len(before) + team.count("prompts"))
        if store is not None:
            store.append(records)
        mine.append(packed(records))
        report(len(records))
    team.wait(lambda: report() >= total)
    pieces = team.collect("records", mine)
    if pieces is None:
        return None
    result.records += [record for piece in pieces for record in unpacked(piece)]
    result.records.sort(key=lambda record: record.index)
    return result
