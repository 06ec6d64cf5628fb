"""A finished run: trace, findings, checks and verdict, with its JSON document and report."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sinklens.analyzers import chosen_analyzers
from sinklens.analyzers.base import Analyzer, Finding
from sinklens.core.adjustable import Adjustable
from sinklens.core.counts import counted
from sinklens.core.errors import UsageError
from sinklens.core.figures import Figure, Tile
from sinklens.core.suggest import did_you_mean
from sinklens.tracers.selfcheck import Check
from sinklens.tracers.store import SCHEMA, RunStore, describe_trace
from sinklens.tracers.trace import Trace

from .references import references
from .shown import RunFinding, Shown, show_picture, show_prompt
from .swept import judged
from .verdict import Verdict, judge

# What a document that is passed on says of its run; the folder's own manifest also has what resuming needs.
SHARED_SECTIONS = (
    "sinklens",
    "command",
    "versions",
    "platform",
    "device",
    "stream",
    "seeds",
    "time",
    "memory",
    "status",
    "inputs",
    "tracing",
    "query_blocks",
    "processes",
    "mitigation",
)
MODEL_FIELDS = ("id", "revision", "family", "layers", "heads", "kv_heads", "hidden_size", "experts", "dtype")


@dataclass
class Run:
    """What `sinklens.profile` returns. Findings are attributes: `run.primary_sinks.to_frame()`."""

    trace: Trace
    analyzers: tuple[Analyzer, ...]
    checks: list[Check]
    folder: Path | None = None
    findings: dict[str, Finding] = None  # type: ignore[assignment]  # computed below unless given
    """By analyzer name; an untrusted run has none."""

    def __post_init__(self) -> None:
        if self.findings is None:
            self.findings = {analyzer.name: analyzer.read(self.trace) for analyzer in self.analyzers}

    @property
    def verdict(self) -> Verdict:
        return judge(self.findings, self.checks)

    def __getattr__(self, name: str) -> RunFinding:
        findings = self.__dict__.get("findings", {})
        key = name.replace("_", "-")
        if key in findings:
            return RunFinding.of(findings[key], self.pictures)
        known = did_you_mean(key, findings) or f"Its findings are: {', '.join(findings) or 'none'}."
        raise AttributeError(f"A run has no {name!r}. {known}")

    def __dir__(self) -> Iterable[str]:
        return [*super().__dir__(), *(name.replace("-", "_") for name in self.findings)]

    def __repr__(self) -> str:
        info, verdict = self.trace.info, self.verdict
        passed = sum(check.passed for check in self.checks)
        head = f"{info.id}: {info.layers} layers x {info.heads} heads, {counted(len(self.trace), 'prompt')}"
        lines = [head, verdict.text, *(repr(finding) for finding in self.findings.values())]
        return "\n".join([*lines, f"{passed}/{len(self.checks)} checks passed"])

    def analyze(self, *analyzers: Analyzer | str) -> Run:
        """The same trace under other definitions, without the model."""
        return Run(self.trace, chosen_analyzers(analyzers), self.checks, self.folder)

    @property
    def document(self) -> Any:
        """The `sinklens/run/1` JSON document, a plain dict."""
        from sinklens.core.canonical import plain

        info = asdict(self.trace.info)
        if os.path.isabs(info["id"]):
            info["id"] = Path(info["id"]).name  # a document that is passed on does not tell where it was made
        return plain(
            {
                "schema": SCHEMA,
                "model": {key: info[key] for key in MODEL_FIELDS},
                "verdict": self.verdict.to_json(),
                "checks": [check.to_json() for check in self.checks],
                "findings": {name: finding.to_json() for name, finding in self.findings.items()},
                "references": references(self),
                "manifest": self._shared_manifest(),
            }
        )

    def _shared_manifest(self) -> dict[str, Any]:
        """What a document that is passed on says of its run; of experiments their names, results are findings."""
        manifest = self.trace.manifest
        shared = {key: part for key, part in manifest.items() if key in SHARED_SECTIONS}
        if "experiments" in manifest:
            run, skipped = list(manifest["experiments"]), manifest.get("experiments_skipped", {})
            shared["experiments"] = {"run": run, "skipped": skipped}
        return shared

    @property
    def figures(self) -> dict[str, list[Figure]]:
        return {name: finding.figures for name, finding in self.findings.items()}

    @property
    def tiles(self) -> list[Tile]:
        return [tile for finding in self.findings.values() for tile in finding.tiles]

    @property
    def adjustable(self) -> dict[str, Adjustable]:
        """What a report needs to let thresholds be moved, by analyzer."""
        made = {name: f.adjustable() for name, f in self.findings.items() if f.adjustable is not None}
        swept = {
            name: judged(name, self.findings, self.checks) for name, f in self.findings.items() if f.swept
        }
        return {name: found for name, found in {**made, **swept}.items() if found is not None}

    @property
    def pictures(self) -> dict[str, np.ndarray]:
        """Small RGB copies of the prompts' pictures, by the `sha256` of the original's pixels."""
        found: dict[str, np.ndarray] = {}
        for record in self.trace:
            for place, picture in enumerate(record.spans.pictures if record.spans is not None else ()):
                copy = record.arrays.get(f"thumbnail_{place}")
                if copy is not None:
                    found.setdefault(picture.sha256, copy)
        return found

    def view(self, prompt: int = 0) -> Shown:
        """A prompt to look at in a notebook: its tokens with the attention they receive, and its pictures.

        Args:
            prompt: Its index.

        Raises:
            UsageError: There is no such prompt.
        """
        return show_prompt(self, prompt)

    def picture(self, prompt: int = 0, image: int = 0, finding: str | None = None) -> Shown:
        """A picture of a prompt to look at in a notebook, with what was measured on its patches.

        Args:
            prompt, image: Which picture of which prompt.
            finding: The analyzer that draws, `visual-sinks` for instance; by default the first that has this picture,
                else the attention that the patches receive.

        Raises:
            UsageError: There is no such prompt or picture, or the finding draws nothing on it.
        """
        return show_picture(self, prompt, image, finding)

    def report(self, path: str | Path | None = None, *, include_text: bool = True) -> Path:
        """Write the HTML report, by default into the run folder.

        Args:
            include_text: With False, tokens and pictures are left out: hashes and counts only.
        """
        from sinklens.report import write_report

        from .head_strips import head_strips
        from .methods import describe_methods

        if path is None and self.folder is None:
            raise UsageError(
                "This run has no folder.", hint='Give the report a path: run.report("report.html")'
            )
        target = Path(path) if path is not None else Path(str(self.folder)) / "report.html"
        write_report(
            target,
            self.document,
            self.figures,
            self.tiles,
            [record.describe() for record in self.trace],
            describe_methods(self.analyzers, self.document),
            include_text=include_text,
            pictures=self.pictures,
            adjustable=self.adjustable,
            heads=head_strips(self.trace),
        )
        return target

    def save(self, folder: str | Path, *, force: bool = False) -> Path:
        """Save the run as a run folder that `sinklens.load` reads."""
        store = RunStore(folder)
        store.create(force=force)
        write_run(self, store)
        return store.folder

    def _repr_html_(self) -> str:
        from sinklens.report.notebook import run_repr_html

        return run_repr_html(self.document, self.figures, self.tiles)


def write_run(run: Run, store: RunStore) -> None:
    """Everything of a finished run into its folder: arrays, tables, document, report."""
    import json

    store.finish(run.trace)
    for name, finding in run.findings.items():
        if finding.rows:
            (store.folder / "tables").mkdir(exist_ok=True)
            finding.to_frame().to_parquet(store.folder / "tables" / f"{name}.parquet")
    run.folder = store.folder
    store.write_text("summary.json", json.dumps(run.document, indent=1, ensure_ascii=False) + "\n")
    run.report()
    store.write_manifest(stored_manifest(run.trace, run.analyzers, run.checks))


def stored_manifest(trace: Trace, analyzers: Iterable[Analyzer], checks: Iterable[Check]) -> Any:
    """The manifest of a run with what is needed to read its arrays again."""
    from sinklens.core.canonical import plain

    return plain(
        {
            **trace.manifest,
            **describe_trace(trace),
            "schema": SCHEMA,
            "checks": [check.to_json() for check in checks],
            "analyzers": [[analyzer.name, analyzer.parameters] for analyzer in analyzers],
        }
    )


def load_run(path: str | Path) -> Run:
    """Read a run folder.

    Raises:
        DataError: It is not a run folder, a part is damaged, or it was written by a newer version.
    """
    from sinklens.analyzers.base import registry

    store = RunStore(path)
    manifest = store.read_manifest()
    trace = store.load()
    analyzers = tuple(registry[name](**parameters) for name, parameters in manifest.get("analyzers", []))
    checks = [Check(**check) for check in manifest.get("checks", [])]
    untrusted = {} if manifest.get("status") == "untrusted" else None
    return Run(trace, analyzers or chosen_analyzers(()), checks, store.folder, untrusted)  # type: ignore[arg-type]
