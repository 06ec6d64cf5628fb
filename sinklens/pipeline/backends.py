"""Which backend runs a model, and what each can give: for refusals, lists, `doctor` and the documentation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sinklens.analyzers import chosen_analyzers
from sinklens.core.errors import UsageError
from sinklens.core.manifest import package_version
from sinklens.models.spec import OpenedModel
from sinklens.tracers.backends import backend_of, backends
from sinklens.tracers.signals import ALL_SIGNALS, Signal

from .options import ProfileOptions


def backend_rows() -> list[dict[str, str]]:
    """One row per backend: what it is, whether it is installed, how many signals it gives."""
    rows = []
    for name, backend in backends.items():
        package = (backend.package or "transformers").replace("_", "-")
        version = package_version(package) if backend.installed else None
        install = "" if backend.extra is None else f"pip install 'sinklens[{backend.extra}]'"
        rows.append(
            {
                "name": name,
                "library": package,
                "installed": version or f"no: {install}",
                "signals": f"{len(ALL_SIGNALS) - len(backend.lacks)} of {len(ALL_SIGNALS)}",
                "about": backend.about,
            }
        )
    return rows


def capability_rows() -> list[dict[str, str]]:
    """One row per signal: which backends give it; why not, where one does not."""
    rows = []
    for signal in ALL_SIGNALS:
        row = {"signal": signal.name, "source": str(signal.source)}
        row |= {name: backend.lacks.get(signal, "yes") for name, backend in backends.items()}
        rows.append(row)
    return rows


def described(opened: OpenedModel) -> dict[str, Any]:
    """The backend of an opened model and what it cannot give for it, for `doctor`."""
    backend = backend_of(opened)
    missing = by_reason(backend.missing(opened))
    return {
        "name": backend.name,
        "library": backend.title,
        "signals": len(ALL_SIGNALS) - sum(map(len, missing.values())),
        "of": len(ALL_SIGNALS),
        "missing": missing,
    }


def by_reason(missing: Mapping[Signal, str]) -> dict[str, list[str]]:
    """Names of missing signals under the reason they share."""
    found: dict[str, list[str]] = {}
    for signal, why in missing.items():
        found.setdefault(why, []).append(signal.name)
    return {why: sorted(names) for why, names in found.items()}


def chosen_backend(options: ProfileOptions) -> str | None:
    """The backend asked for; `remote` means nnsight's.

    Raises:
        UsageError: Unknown, or one that does not run remotely.
    """
    if options.backend is not None:
        backends[options.backend]
    if not options.remote:
        return options.backend
    if options.backend not in (None, "nnsight", "ndif"):
        raise UsageError(
            f"--remote runs through nnsight, not through {options.backend}.",
            hint="Try: --backend nnsight --remote",
        )
    return "ndif"


def refuse_lacking(options: ProfileOptions, opened: OpenedModel) -> None:
    """Refuse an analyzer that was named and needs what the backend cannot give, before anything is run.

    Those that were not named say themselves that they do not apply.

    Raises:
        UsageError: With the signal and the reason.
    """
    missing = {signal.name: why for signal, why in backend_of(opened).missing(opened).items()}
    for analyzer in chosen_analyzers(named) if (named := named_analyzers(options)) else ():
        if lacking := analyzer.lacking(missing):
            raise UsageError(
                f"{analyzer.name} needs {', '.join(lacking[:3])}, which the {opened.backend} backend cannot give.",
                detail=f"The reason: {missing[lacking[0]]}.",
                hint="Run it with --backend hf, or leave this analyzer out with --analyzers.",
            )


def named_analyzers(options: ProfileOptions) -> list[Any]:
    """The analyzers asked for by name."""
    asked = options.analyzers
    items = asked.split(",") if isinstance(asked, str) else asked
    return [item for item in items if item not in ("all", "")]
