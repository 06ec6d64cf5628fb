"""When an interrupted run may go on: only with the same model, prompts and way of tracing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from sinklens.core.canonical import plain
from sinklens.core.counts import counted
from sinklens.core.errors import DataError, SinklensError, UsageError
from sinklens.core.manifest import manifest_diff
from sinklens.models.fingerprint import weights_hash
from sinklens.tracers.store import RunStore
from sinklens.tracers.trace import Trace

from .options import ProfileOptions
from .prepare import Prepared

_REQUEST = ("model", "prompts_given", *(field.name for field in fields(ProfileOptions)))
NAMED = 3
"""Differences that the message names."""


def asked_before(
    folder: Path, before: dict[str, Any], model: Any = None
) -> tuple[str | None, ProfileOptions]:
    """The model and the options of an interrupted run, from its manifest.

    Args:
        model: The model in memory, if its owner gives it again.

    Raises:
        UsageError: The run was of objects in memory that are not given again.
    """
    request = before.get("request")
    if not isinstance(request, dict) or not {"model", "analyzers"} <= request.keys() <= {*_REQUEST}:
        raise DataError(
            f"{folder / 'manifest.json'} does not say what the run was asked to do: damaged, or of another version.",
            hint="Start the run again, with --force to replace this folder.",
        )
    request = dict(request)
    asked = request.pop("model")
    given = request.pop("prompts_given", None)
    if given is not None or (model is None and asked is None):
        raise UsageError(
            f"The run in {folder} was started from objects in memory ({given or 'the model'}).",
            hint="Start it again from Python.",
        )
    request["analyzers"] = tuple(request["analyzers"])
    return asked, ProfileOptions(**request)


def analyzers_before(folder: Path) -> list[str]:
    """Names of the analyzers of an interrupted run.

    Raises:
        DataError: It is not a run folder.
    """
    return [name for name, _ in RunStore(folder).read_manifest().get("analyzers", [])]


def how_far(store: RunStore, total: int | None) -> str:
    """How far an interrupted run came, as a sentence.

    Args:
        total: Prompts in all, if it is known.
    """
    try:
        done = len(store.load_records())
    except SinklensError:  # of two errors the first one is told
        done = 0
    half_way = store.passed_blocks() if total is None or done < total else None
    through = f"; the others have passed {counted(half_way, 'block')} or more" if half_way else ""
    return f"{done}/{'? prompts' if total is None else counted(total, 'prompt')} saved{through}."


def same_run(before: dict[str, Any], prepared: Prepared, now: Trace) -> None:
    """Refuse to mix two runs: the model's files, the prompts and the tracing must be those of the manifest.

    Raises:
        DataError: Something changed; it is named with what it was and what it is.
    """
    parts = {
        "the model": (before["model"], plain(asdict(prepared.opened.info))),
        "the prompts": (_prompts(before["inputs"]), _prompts(prepared.prompts.description)),
        "the tracing": (before["tracing"], plain(now.tracing)),
    }
    if "weights" in before:  # of a model in memory, which has no files
        parts["the weights"] = (
            {"weights": before["weights"]},
            {"weights": weights_hash(prepared.opened.plain)},
        )
    changed = [what for what, (then, today) in parts.items() if then != today]
    if not changed:
        return
    named = [
        f"{name} was {short(old)} and is {short(new)}"
        for what in changed
        for name, (old, new) in manifest_diff(parts[what][0], parts[what][1], ignore=()).items()  # type: ignore[arg-type]
    ]
    more = f"; and {len(named) - NAMED} more" if len(named) > NAMED else ""
    raise DataError(
        f"The run cannot be resumed: {' and '.join(changed)} changed since it was started.",
        detail=f"{'; '.join(named[:NAMED])}{more}.",
        hint="Put back what it was, or start the run again into another folder with --out.",
    )


def _prompts(description: Mapping[str, Any]) -> dict[str, Any]:
    """What tells prompts apart, by tokens, and what shows how they differ."""
    digest = description.get("sha256")
    told = ("n_prompts", "n_tokens")
    return {"sha256": digest, **{name: description.get(name) for name in told if name in description}}


def short(value: Any) -> str:
    """A value for a message: hashes and long texts by their beginning."""
    text = "absent" if value is None else str(value)
    return f"{text[:12]}..." if len(text) > 24 else text
