"""What probes share: experiments beside a profile, each with a JSON document and a folder of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sinklens.core.canonical import dumps, plain
from sinklens.core.errors import UsageError
from sinklens.core.manifest import Clock, build_manifest
from sinklens.models.spec import OpenedModel
from sinklens.tracers.store import RunStore

SCHEMA, FILE = "sinklens/probe/1", "probe.json"


@dataclass(frozen=True)
class Probe:
    """What a probe found.

    Attributes:
        document: Plain JSON: `probe` (its name), `model`, `results` (one per setting, each with a `verdict` in words),
            `manifest`.
        folder: Where it was written.
    """

    document: dict[str, Any]
    folder: Path | None = None

    @property
    def results(self) -> list[dict[str, Any]]:
        return self.document["results"]

    def __repr__(self) -> str:
        return "\n".join(result["verdict"] for result in self.results)


@contextmanager
def probe_folder(out: str | Path | None, force: bool) -> Iterator[RunStore | None]:
    """The folder a probe writes into, kept from others while it does; None if it stays in memory.

    Raises:
        UsageError: It holds a run or a probe already, or cannot be written.
    """
    if out is None:
        yield None
        return
    store = RunStore(out)
    if (store.folder / FILE).exists() and not force:
        raise UsageError(
            f"The folder {store.folder} already holds a probe.",
            hint="Replace it with --force, or choose another --out.",
        )
    with store.created(force=force), store.locked():
        yield store
        (store.folder / "shards").rmdir()  # probes have no records


def finished(
    name: str,
    opened: OpenedModel,
    results: list[dict[str, Any]],
    *,
    inputs: dict[str, Any],
    seed: int,
    clock: Clock,
    argv: list[str] | None,
    store: RunStore | None,
    **said: Any,
) -> Probe:
    """The document of a probe, written if it has a folder."""
    info = asdict(opened.info)
    if Path(info["id"]).is_absolute():
        info["id"] = Path(info["id"]).name  # a document that is passed on does not tell where it was made
    device = str(next(opened.module.parameters()).device)
    manifest = build_manifest(clock=clock, argv=argv, seeds={"prompts": seed}, device=device, inputs=inputs)
    document = plain(
        {"schema": SCHEMA, "probe": name, "model": info, **said, "results": results, "manifest": manifest}
    )
    assert isinstance(document, dict)
    if store is None:
        return Probe(document)
    store.write_text(FILE, dumps(document, indent=1) + "\n")
    return Probe(document, store.folder)


def at_least(flag: str, value: int, least: int) -> None:
    """Refuse a number below what makes sense."""
    if value < least:
        raise UsageError(f"{flag} must be at least {least}, got {value}.")
