"""The self-check of one model, with what sinklens believes its parts are and which versions run."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from sinklens.kernels.choice import statistics_kernel
from sinklens.models.spec import Anatomy, ModelInfo
from sinklens.tracers.batch import device_of
from sinklens.tracers.executor import attention_path
from sinklens.tracers.selfcheck import Check

from .backends import described
from .listener import Listener
from .options import ProfileOptions
from .prepare import checked_plan, prepare


@dataclass(frozen=True)
class Diagnosis:
    """What `doctor` prints."""

    info: ModelInfo
    anatomy: Anatomy
    attention_path: str
    statistics: str
    checks: list[Check]
    versions: dict[str, str]
    backend: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "model": asdict(self.info),
            "anatomy": asdict(self.anatomy),
            "attention_path": self.attention_path,
            "statistics": self.statistics,
            "checks": [check.to_json() for check in self.checks],
            "versions": self.versions,
            "backend": self.backend,
        }

    def __str__(self) -> str:
        tower = self.anatomy.main
        block = tower.blocks[len(tower.blocks) // 2]
        parts = {
            key: value
            for key, value in asdict(block).items()
            if value and key not in ("index", "norms", "sum")
        }
        lines = [
            *_backend_lines(self.backend),
            f"{'Attention':<11}{self.attention_path}",
            f"{'Statistics':<11}{self.statistics}",
            f"{'Towers':<11}{', '.join(map(_tower, self.anatomy.towers))}",
        ]
        lines += [f"{'Block ' + str(block.index):<11}{role}: {path}" for role, path in parts.items()]
        lines += [f"{'':<11}norm {role}: {path}" for role, path in block.norms.items()]
        lines += [_line(check) for check in self.checks]
        lines.append(
            f"{'Versions':<11}{', '.join(f'{name} {version}' for name, version in self.versions.items())}"
        )
        return "\n".join(lines)


def examine(model: Any, options: ProfileOptions, listener: Listener) -> Diagnosis:
    """Open a model and run the self-check."""
    from sinklens.core.manifest import PACKAGES, package_version

    prepared = prepare(model, None, options, listener, streaming=True)
    plan, checks = checked_plan(prepared)
    opened = prepared.opened
    versions = {name: version for name in PACKAGES if (version := package_version(name)) is not None}
    path, backend = attention_path(opened, plan), described(opened)
    statistics = f"float32, {statistics_kernel(device_of(opened))}"
    return Diagnosis(opened.info, opened.anatomy, path, statistics, checks, versions, backend)


def _backend_lines(backend: dict[str, Any]) -> list[str]:
    if not backend:
        return []
    gives = f"{backend['name']} ({backend['library']}) gives {backend['signals']} of {backend['of']} signals"
    lines = [f"{'Backend':<11}{gives}"]
    for why, names in backend["missing"].items():
        lines.append(f"{'':<11}not {', '.join(names)}: {why}")
    return lines


def _tower(tower: Any) -> str:
    kind = "causal" if tower.causal else "bidirectional"
    return (
        f"{tower.name} ({len(tower.blocks)} blocks, {tower.heads} heads, width {tower.hidden_size}, {kind})"
    )


def _line(check: Check) -> str:
    value = "" if check.value is None else f" {check.value:.3g}"
    limit = "" if check.limit is None else f" (limit {check.limit:.3g})"
    return f"{'passed' if check.passed else 'FAILED':<11}{check.name}:{value}{limit}; {check.detail}"
