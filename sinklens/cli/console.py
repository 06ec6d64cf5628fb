"""Telling the user how far a run is, on stderr, and what came out, on stdout."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

from sinklens.core.stages import STAGES

if TYPE_CHECKING:
    from pathlib import Path

    from sinklens.analyzers import Analyzer
    from sinklens.inputs.spec import PromptSet
    from sinklens.models.spec import OpenedModel
    from sinklens.pipeline.run import Run
    from sinklens.tracers.selfcheck import Check

WIDTH = 12


class ConsoleListener:
    """Draws a run on stderr; the bar only where stderr is a terminal."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self._bar: Any = None
        self._task: Any = None
        self._stage = "Profiling"

    def line(self, name: str, text: str) -> None:
        if not self.quiet:
            print(f"{name:<{WIDTH}}{text}", file=sys.stderr, flush=True)

    def opened(self, opened: OpenedModel) -> None:
        info = opened.info
        experts = f" · {info.experts} experts" if info.experts else ""
        heads = f"{info.layers} layers x {info.heads} heads ({info.kv_heads} KV)"
        revision = f" @ {info.revision[:12]}" if info.revision else ""
        self.line("Model", f"{info.id}{revision}  {info.family} · {heads}{experts} · {info.dtype}")
        if opened.blocks is not None:
            self.line("Stream", f"blocks are read from disk one at a time ({opened.blocks.why})")

    def planned(self, prompts: PromptSet, analyzers: tuple[Analyzer, ...]) -> None:
        said = prompts.description
        self.line("Plan", " · ".join(analyzer.name for analyzer in analyzers))
        digest = f", sha {said['sha256'][:8]}" if said.get("sha256") else ""
        self.line(
            "Inputs", f"{said['source']} ({said['n_prompts']} prompts, {said['n_tokens']} tokens{digest})"
        )
        for warning in said.get("warnings", []):
            self.line("Note", warning)

    def checked(self, checks: list[Check]) -> None:
        passed = sum(check.passed for check in checks)
        self.line("Self-check", f"{passed} of {len(checks)} passed")
        for check in checks:
            if not check.passed:
                self.line("  failed", f"{check.name}: {check.value} (limit {check.limit}); {check.detail}")

    def stage(self, name: str) -> None:
        self.close()
        self._stage = STAGES.get(name, name)
        first, _, rest = self._stage.partition(" ")
        self.line(first, rest)

    def progress(self, done: int, total: int) -> None:
        if self.quiet or not sys.stderr.isatty():
            return
        if self._bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            console = Console(stderr=True, no_color="NO_COLOR" in os.environ)
            columns = (
                TextColumn(f"{self._stage.split()[0]:<{WIDTH}}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=console)
            self._bar.start()
            self._task = self._bar.add_task("", total=total)
        self._bar.update(self._task, completed=done)
        if done >= total:
            self.close()

    def close(self) -> None:
        """Take the bar down, so that messages start on a line of their own."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def print_run(run: Run, report: Path | None) -> None:
    """The outcome for a human reader."""
    print(f"{'Verdict':<{WIDTH}}{run.verdict.text}")
    told = {line.analyzer for line in run.verdict.lines}
    for name, finding in run.findings.items():
        said = finding.verdict if name in told or finding.reason else finding.status
        print(f"{'':<{WIDTH}}{finding.title}: {said}")
        for note in finding.notes:
            print(f"{'':<{WIDTH}}  note: {note}")
    if run.folder is not None:
        print(f"{'Saved':<{WIDTH}}{run.folder}")
    if report is not None:
        print(f"{'Report':<{WIDTH}}{report}")


def print_json(document: dict[str, Any]) -> None:
    """Exactly one JSON document on stdout."""
    import json

    print(json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False))
