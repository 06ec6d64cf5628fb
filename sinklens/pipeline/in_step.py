"""One run of a model that is spread over processes by a tensor-parallel plan: all of them do everything in step.

Each process runs the same session on all prompts, on its share of the heads and neurons, and has the whole result in
the end. Process 0 alone writes the run folder. There is nothing to hand out: whoever left the path of the others would
let them wait for its share.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from sinklens.analyzers import chosen_analyzers
from sinklens.core.canonical import plain
from sinklens.core.errors import ModelError, SelfCheckError
from sinklens.models.spread import Spread, spread_of
from sinklens.tracers.announced import announced_on
from sinklens.tracers.executor import TracePlan
from sinklens.tracers.selfcheck import Check
from sinklens.tracers.store import RunStore
from sinklens.tracers.team import Elsewhere, Team

from .beside_plan import refuse_beside_plan
from .listener import Listener, Silent
from .options import ProfileOptions
from .prepare import checked_plan, model_request, prepare
from .run import Run
from .session import Session


def profile_spread(
    model: str | None,
    team: Team,
    store: RunStore,
    *,
    force: bool,
    options: ProfileOptions,
    listener: Listener,
    argv: list[str] | None,
    before: dict[str, Any] | None,
) -> Run | None:
    """A run of a model by name, spread over the processes of a team, each of which calls this.

    Returns:
        The run at the leader; None elsewhere.

    Raises:
        SinklensError: As `profile`; a process that is stopped because of another one raises `Elsewhere`.
    """
    try:
        with ExitStack() as stack:
            if team.leads:
                if before is None:
                    stack.enter_context(store.created(force=force))
                stack.enter_context(store.locked())
            run = _run(model, options, listener, argv, store, size=team.size, leads=team.leads, before=before)
        return run if team.leads else None
    except SelfCheckError as error:
        if team.leads:
            raise
        raise Elsewhere(str(error)) from error  # the leader has written down what failed


def spread_in_memory(model: Any) -> Spread | None:
    """The processes over which a caller's own model is spread; None for names, folders and whole models."""
    from torch import nn

    return spread_of(model) if isinstance(model, nn.Module) else None


def profile_in_memory(
    model: Any,
    spread: Spread,
    *,
    out: str | Path | None,
    force: bool,
    options: ProfileOptions,
    listener: Listener,
    argv: list[str] | None,
    tokenizer: Any,
) -> Run:
    """`profile` of a caller's own model that is spread over processes, each of which calls this with the same.

    Returns:
        The same run everywhere; that of process 0 has the folder.
    """
    store = None if out is None else RunStore(out)
    heard = listener if spread.leads else Silent()
    with ExitStack() as stack:
        if store is not None and spread.leads:
            stack.enter_context(store.created(force=force))
            stack.enter_context(store.locked())
        return _run(
            model, options, heard, argv, store, size=spread.size, leads=spread.leads, tokenizer=tokenizer
        )


def _run(
    model: Any,
    options: ProfileOptions,
    listener: Listener,
    argv: list[str] | None,
    store: RunStore | None,
    *,
    size: int,
    leads: bool,
    before: dict[str, Any] | None = None,
    tokenizer: Any = None,
) -> Run:
    refuse_beside_plan(options)
    chosen_analyzers(options.analyzers)
    options = replace(options, tensor_parallel=True, stream="off")
    prepared = prepare(model, tokenizer, options, listener, spread=size)
    request = model if before is not None else model_request(model, prepared.opened)
    session = InStepSession(prepared, options, store if leads else None, listener, argv, request)
    session.refuse_different()
    return session.run(before)


class InStepSession(Session):
    """The session of one process: the same as the others', of which the leader's alone has a folder."""

    @property
    def spread(self) -> Spread:
        spread = self.prepared.opened.spread
        assert spread is not None  # opened so
        return spread

    def refuse_different(self) -> None:
        """All must have the same before they run in step.

        Raises:
            ModelError: They do not, or something changes the model.
        """
        opened, prompts = self.prepared.opened, self.prepared.prompts
        on = announced_on(opened.module, opened.anatomy.main)
        mine = {
            "model": asdict(opened.info),
            "prompts": [prompts.description.get("sha256"), len(prompts)],
            "tracing": self.prepared.plan.describe(),
            "mitigations": on,
        }
        said = self.spread.agree("prepared", plain(mine))
        for rank, theirs in enumerate(said):
            different = [name for name, value in theirs.items() if value != said[0][name]]
            if different:
                raise ModelError(
                    f"Process {rank} does not have the {' and '.join(different)} of process 0.",
                    detail="Processes that hold one model together run all prompts in step.",
                    hint="Give each of them the same model, prompts and options.",
                )
        if on:
            raise ModelError(
                f"A mitigation is on this model ({on[0]['name']}), and each process holds a part of it only.",
                hint="Leave the `with` block first.",
            )

    def _checked(self) -> tuple[TracePlan, list[Check]]:
        """The checks of this process, and those that failed elsewhere: each checks its own heads."""
        plan, checks = checked_plan(self.prepared)
        failed = [plain(check.to_json()) for check in checks if not check.passed]
        others = [
            replace(Check(**check), name=f"process {rank}: {check['name']}")
            for rank, theirs in enumerate(self.spread.agree("checked", failed))
            if rank != self.spread.rank
            for check in theirs
        ]
        return plan, [*checks, *others]

    def _save_untrusted(self, empty: Any, checks: list[Check]) -> None:
        super()._save_untrusted(empty, checks)
        self.spread.agree("written down", None)

    def _sections(self) -> dict[str, Any]:
        processes = {"count": self.spread.size, "plan": "tensor-parallel"}
        return {**super()._sections(), "processes": processes}
