"""One run by several processes (`torchrun -m sinklens profile`): who does what.

Every process opens the model, reads the prompts and checks itself, since a device may be broken while the others are
not. Batches are shared out; where the model's blocks are on disk, all processes go through the blocks in step, so that
the disk is read once where the system keeps what was read. Process 0 leads: it alone owns the run folder's manifest and
result, runs the experiments after the main pass, and talks.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sinklens.analyzers import chosen_analyzers
from sinklens.core.canonical import plain
from sinklens.core.errors import InterruptedRun, ModelError, ResourceError, SinklensError, UsageError
from sinklens.models.spread import lost
from sinklens.tracers.executor import TracePlan
from sinklens.tracers.selfcheck import Check
from sinklens.tracers.store import RunStore
from sinklens.tracers.team import Gone, Team
from sinklens.tracers.together import trace_together
from sinklens.tracers.trace import Trace

from .beside_plan import refuse_beside_plan
from .in_step import profile_spread
from .listener import Listener, Silent
from .options import ProfileOptions
from .prepare import Prepared, checked_plan, model_request, prepare
from .reads import Reads
from .resuming import asked_before, how_far
from .run import Run, load_run
from .session import Session
from .streamed_blocks import Choice, choose, sharing_memory


def profile_together(
    model: str | None,
    team: Team,
    *,
    out: Path | None = None,
    force: bool = False,
    resume: Path | None = None,
    listener: Listener | None = None,
    argv: list[str] | None = None,
    options: ProfileOptions | None = None,
) -> Run | None:
    """As `profile`, by all processes of a team, each of which calls this with the same arguments.

    Returns:
        The run at the leader; None elsewhere. Its findings are those of one process, bit for bit, if each process has
        as many threads as that one; of a model that the processes hold together, to rounding.

    Raises:
        SinklensError: As `profile`; a process that is stopped because of another one raises `Elsewhere`.
    """
    listener = (listener if team.leads else None) or Silent()
    folder = resume or Path(team.told("folder", None if out is None else str(out)))
    store, before = RunStore(folder), None
    if resume is not None:
        before = team.told("before", store.read_manifest() if team.leads else None)
        if before.get("status") == "complete":
            return load_run(folder) if team.leads else None
        model, options = asked_before(folder, before)
    options = options or ProfileOptions()
    if options.tensor_parallel:
        try:
            return profile_spread(
                model, team, store, force=force, options=options, listener=listener, argv=argv, before=before
            )
        except (KeyboardInterrupt, InterruptedRun, RuntimeError, ResourceError) as error:
            if isinstance(error, RuntimeError | ResourceError) and not lost(error):
                raise
            raise stopped(team, store, None, error, number="as many processes") from None
    refuse_alone(options, team)
    chosen_analyzers(options.analyzers)
    task = _Task(model, team, store, options, listener, argv, before)
    if not team.leads:
        return task.help_out()
    if resume is not None:
        with store.locked():
            return task.lead()
    with store.created(force=force), store.locked():
        return task.lead()


def refuse_alone(options: ProfileOptions, team: Team) -> None:
    """Refuse what only one process can do.

    Raises:
        UsageError: The model would be spread over the devices of all processes, or is elsewhere.
    """
    if options.tensor_parallel:
        refuse_beside_plan(options)
        return
    if options.device_map is not None:
        raise UsageError(
            f"--device-map {options.device_map} spreads one model over all devices, and each of the {team.size} "
            "processes would do so.",
            hint="Leave out either --device-map or torchrun.",
        )
    if options.remote:
        raise UsageError(
            "A remote model is run by NDIF, not here: several processes would only wait for it.",
            hint="Start it without torchrun.",
        )


class _Task:
    """One process's part of a run."""

    def __init__(
        self,
        model: str | None,
        team: Team,
        store: RunStore,
        options: ProfileOptions,
        listener: Listener,
        argv: list[str] | None,
        before: dict[str, Any] | None,
    ) -> None:
        self.model, self.team, self.store, self.options = model, team, store, options
        self.listener, self.argv, self.before = listener, argv, before
        self.total: int | None = None
        self.reads = Reads()

    def lead(self) -> Run:
        """Everything a run of one process does, with the others' help in the main pass."""
        try:
            prepared = self.prepared()
            request = self.model if self.before is not None else model_request(self.model, prepared.opened)
            session = TogetherSession(
                prepared, self.options, self.store, self.listener, self.argv, request, self.team, self.reads
            )
            return session.run(self.before)
        except (KeyboardInterrupt, Gone) as error:
            raise stopped(self.team, self.store, self.total, error) from None

    def help_out(self) -> None:
        """Check, trace, hand over."""
        try:
            prepared = self.prepared()
            plan, checks = agreed_plan(prepared, self.team)
            if not all(check.passed for check in checks):
                # The leader writes down and says what failed.
                self.team.wait(lambda: False)
            self.team.told("tracing begins")
            self._sees_folder()
            trace_together(prepared.opened, prepared.prompts, plan, self.team, store=self.store)
            self.reads.agreed(prepared.opened, self.team)
        except (KeyboardInterrupt, Gone) as error:
            raise stopped(self.team, self.store, self.total, error) from None

    def prepared(self) -> Prepared:
        options = self.options
        own = replace(options, device=own_device(options.device, self.team.local_rank))
        choice = self._choice(own, sharing_memory(options, self.team.local_size))
        resumed = None if self.before is None else self.store
        prepared = prepare(
            self.model, None, own, self.listener, streaming=True, choice=choice, resumed=resumed
        )
        self.total = len(prepared.prompts)
        return prepared

    def _choice(self, options: ProfileOptions, processes: int) -> Choice:
        """Whether blocks are streamed: everywhere, if one process has no memory for all of them."""
        mine = choose(self.model, options, processes)
        said = self.team.agree("streams", [mine.on, mine.why])
        on, why = next((theirs for theirs in said if theirs[0]), said[0])
        return Choice(on, why)

    def _sees_folder(self) -> None:
        if not self.store.manifest_path.is_file():
            raise ResourceError(
                f"{self.team!r} does not see the run folder {self.store.folder}.".capitalize(),
                detail="Each process keeps its finished batches there, so that an interrupted run can go on.",
                hint="Choose an --out on a file system that all machines share.",
            )


class TogetherSession(Session):
    """The leader's session: checks of all processes, the main pass by all, everything else as in one process."""

    def __init__(
        self,
        prepared: Prepared,
        options: ProfileOptions,
        store: RunStore | None,
        listener: Listener,
        argv: list[str] | None,
        request: str | None,
        team: Team,
        reads: Reads,
    ) -> None:
        super().__init__(prepared, options, store, listener, argv, request)
        self.team, self.reads = team, reads

    def _checked(self) -> tuple[TracePlan, list[Check]]:
        return agreed_plan(self.prepared, self.team)

    def _traced(self, plan: TracePlan) -> Trace:
        self.team.told("tracing begins", True)
        opened, prompts = self.prepared.opened, self.prepared.prompts
        found = trace_together(
            opened, prompts, plan, self.team, store=self.store, progress=self.listener.progress
        )
        assert found is not None  # the leader's
        self.reads.agreed(opened, self.team)
        return found

    def _sections(self) -> dict[str, Any]:
        processes = {"count": self.team.size, "transport": "gloo", **self.reads.section}
        return {**super()._sections(), "processes": processes}

    def _interrupted(self) -> SinklensError:
        assert self.store is not None  # a run by several processes has a folder
        return stopped(self.team, self.store, len(self.prepared.prompts))


def agreed_plan(prepared: Prepared, team: Team) -> tuple[TracePlan, list[Check]]:
    """The plan after the self-check of every process, with this one's checks and the failed ones of the others.

    Raises:
        ModelError: The processes do not have the same model, prompts or way of tracing.
    """
    plan, checks = checked_plan(prepared)
    alike = {
        "model": prepared.opened.info,
        "prompts": prepared.prompts.description.get("sha256"),
        "tracing": plan.describe(),
    }
    failed = [check.to_json() for check in checks if not check.passed]
    said = team.agree("checked", {"alike": plain(alike), "failed": plain(failed)})
    for rank, theirs in enumerate(said):
        different = [name for name, value in theirs["alike"].items() if value != said[0]["alike"][name]]
        if different:
            raise ModelError(
                f"Process {rank} does not have the {' and '.join(different)} of process 0.",
                detail="All processes must run on the same files, with the same libraries.",
            )
    others = [
        replace(Check(**check), name=f"process {rank}: {check['name']}")
        for rank, theirs in enumerate(said)
        if rank != team.rank
        for check in theirs["failed"]
    ]
    return plan, [*checks, *others]


def own_device(asked: str | None, local_rank: int) -> str | None:
    """The device of one of several processes on a machine: each its own accelerator where there are several."""
    import torch

    if asked not in (None, "cuda") or not torch.cuda.is_available():
        return asked
    return f"cuda:{local_rank % torch.cuda.device_count()}"


def stopped(
    team: Team,
    store: RunStore,
    total: int | None,
    error: BaseException | None = None,
    *,
    number: str = "any number of processes",
) -> SinklensError:
    """What to say when this process was told to stop: by somebody, or because another process is gone.

    Args:
        number: How many processes may go on.
    """
    ranks = error.ranks if isinstance(error, Gone) else _gone(team, error is not None and lost(error))
    if store.manifest_path.is_file():
        total = total or store.read_manifest().get("inputs", {}).get("n_prompts")
        saved = how_far(store, total)
        again = f"torchrun --nproc-per-node {team.size} -m sinklens profile --resume {store.folder}"
        hint = f"Continue, with {number}: {again}"
    else:
        saved, hint = "Nothing was saved.", "Start it again."
    if ranks:
        return Gone(ranks, team.size, saved, hint)
    return InterruptedRun(f"Stopped. {saved}", hint=hint)


def _gone(team: Team, someone: bool) -> Sequence[int]:
    """Processes that are gone without a word.

    Args:
        someone: One is for sure, because it cannot be reached; it may take the system a moment to end it.
    """
    until = time.monotonic() + (2.0 if someone else 0.0)
    while True:
        try:
            found = team.missing()
            if found or time.monotonic() > until:
                return found
            time.sleep(0.05)
        except KeyboardInterrupt:  # the launcher stops the others meanwhile
            continue
        except RuntimeError:  # the store went with the launcher
            return ()
