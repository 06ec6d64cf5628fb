"""One run from the self-check to the saved result, and how an interrupted one goes on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from sinklens.core.errors import InterruptedRun, SelfCheckError, SinklensError
from sinklens.core.manifest import Clock, build_manifest
from sinklens.models.fingerprint import weights_hash
from sinklens.tracers.backends import backend_of
from sinklens.tracers.executor import TracePlan, empty_trace, trace
from sinklens.tracers.selfcheck import Check
from sinklens.tracers.store import RunStore
from sinklens.tracers.trace import Trace

from .experiments import Setting, run_experiments, without_experiments
from .listener import Listener
from .memory import memory_told
from .options import ProfileOptions
from .prepare import Prepared, checked_plan, prepare
from .query_blocks import described_blocks
from .resuming import asked_before, how_far, same_run
from .room import refuse_without_room
from .run import Run, load_run, stored_manifest, write_run
from .streamed_blocks import weights_section
from .words import note_words


class Session:
    """One run from the self-check to the saved result."""

    def __init__(
        self,
        prepared: Prepared,
        options: ProfileOptions,
        store: RunStore | None,
        listener: Listener,
        argv: list[str] | None,
        request: str | None,
    ) -> None:
        self.prepared, self.store, self.listener, self.argv = prepared, store, listener, argv
        self.options, self.clock = options, Clock()
        # Decided once: an interrupted run goes on as it began, whatever memory is free then.
        stream = "off" if prepared.opened.blocks is None else "on"
        self.request = {"model": request, **options.request(), "stream": stream}

    def run(self, before: dict[str, Any] | None = None) -> Run:
        """Check, trace, analyze, save.

        Args:
            before: The manifest of the interrupted run that this one continues.
        """
        held = self.prepared.opened.blocks is None
        with memory_told("the model was run", self.prepared.model, self.options, streams=held):
            return self._run(before)

    def _run(self, before: dict[str, Any] | None) -> Run:
        plan, checks = self._checked()
        self.listener.checked(checks)
        empty = empty_trace(self.prepared.opened, plan)
        if before is not None:
            same_run(before, self.prepared, empty)
        failed = [check for check in checks if not check.passed]
        if failed:
            self._save_untrusted(empty, checks)
            raise _untrusted(failed, self.store)
        if self.store is not None:
            refuse_without_room(self.store.folder, self.prepared, plan)
        self._describe(empty, checks, "running")
        try:
            run = self._measured(plan, checks)
        except KeyboardInterrupt:
            raise self._interrupted() from None
        if self.store is not None:
            write_run(run, self.store)
        return run

    def _checked(self) -> tuple[TracePlan, list[Check]]:
        return checked_plan(self.prepared)

    def _traced(self, plan: TracePlan) -> Trace:
        opened, prompts = self.prepared.opened, self.prepared.prompts
        return trace(opened, prompts, plan, store=self.store, progress=self.listener.progress)

    def _measured(self, plan: TracePlan, checks: list[Check]) -> Run:
        """The main pass, then the experiments."""
        result = self._traced(plan)
        self._describe(result, checks, "complete")
        note_words(result, self.prepared.opened.tokenizer)
        run = Run(result, self.prepared.analyzers, checks)
        opened = self.prepared.opened
        changed = backend_of(opened).for_experiments(opened)
        if isinstance(changed, str):
            run = without_experiments(run, changed)
        else:
            prepared = replace(self.prepared, opened=changed)
            exact = replace(plan, sampling=None)  # experiments run on short cuts of a few prompts
            run = run_experiments(Setting(prepared, exact, self.options, self.listener), run)
        run.trace.manifest["time"]["wall_s"] = round(self.clock.seconds, 3)
        return run

    def _interrupted(self) -> SinklensError:
        if self.store is None:
            return InterruptedRun("Stopped. Nothing was saved, because the run has no folder.")
        return InterruptedRun(
            f"Stopped. {how_far(self.store, len(self.prepared.prompts))}",
            hint=f"Continue: sinklens profile --resume {self.store.folder}",
        )

    def _sections(self) -> dict[str, Any]:
        """What the manifest says of this run besides."""
        tower, longest = self.prepared.opened.anatomy.main, max(map(len, self.prepared.prompts.prompts))
        return {"query_blocks": described_blocks(tower, self.prepared.plan.blocks, longest)}

    def _describe(self, described: Trace, checks: list[Check], status: str) -> None:
        """Put the manifest on a trace and, while the run is going, on disk."""
        described.manifest = build_manifest(
            clock=self.clock,
            argv=self.argv,
            seeds={"prompts": self.request["seed"]},
            device=str(next(self.prepared.opened.module.parameters()).device),
            status=status,
            request=self.request,
            inputs=self.prepared.prompts.description,
            tracing=described.tracing,
            **self._sections(),
            **weights_section(self.prepared.opened),
        )
        if not self.prepared.opened.info.files_sha256:
            described.manifest["weights"] = weights_hash(self.prepared.opened.plain)
        if self.store is not None and status == "running":
            self.store.write_manifest(stored_manifest(described, self.prepared.analyzers, checks))

    def _save_untrusted(self, empty: Trace, checks: list[Check]) -> None:
        self._describe(empty, checks, "untrusted")
        if self.store is not None:
            write_run(Run(empty, self.prepared.analyzers, checks, findings={}), self.store)


def _untrusted(failed: list[Check], store: RunStore | None) -> SelfCheckError:
    check = failed[0]
    value = "" if check.value is None else f"found {check.value:g}"
    limit = "" if check.limit is None else f", limit {check.limit:g}"
    others = f" {len(failed) - 1} other checks failed too." if len(failed) > 1 else ""
    return SelfCheckError(
        f"Self-check failed: {check.name}. No verdict is given.{others}",
        detail=f"{value}{limit}: {check.detail[:160]}",
        hint=f"All checks: {store.folder / 'summary.json'}"
        if store
        else "See all checks: sinklens doctor -m MODEL",
    )


def resume_run(
    folder: Path,
    model: Any,
    tokenizer: Any,
    listener: Listener,
    argv: list[str] | None,
    processor: Any = None,
) -> Run:
    """Continue an interrupted run with the model and options of its manifest."""
    store = RunStore(folder)
    before = store.read_manifest()
    if before.get("status") == "complete":
        return load_run(folder)
    asked, options = asked_before(folder, before, model)
    with store.locked():
        opens = model if model is not None else asked
        prepared = prepare(opens, tokenizer, options, listener, processor, streaming=True, resumed=store)
        return Session(prepared, options, store, listener, argv, asked).run(before)
