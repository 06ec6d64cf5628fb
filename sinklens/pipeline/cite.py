"""How to cite exactly what was run: BibTeX of the methods and the program, and a paragraph for a methods section."""

from __future__ import annotations

from typing import Any

from sinklens.core.errors import UsageError

from .methods import methods_paragraph
from .run import Run

STYLES = ("bibtex", "methods")


def cite(run: Run, style: str = "bibtex") -> str:
    """Citations of a run.

    Args:
        style: `bibtex`: one entry per paper whose method gave a result, and one for the program at its version.
            `methods`: a paragraph with model, prompts, protocol, parameters and versions.

    Raises:
        UsageError: Another style, or a run without a result.
    """
    if style not in STYLES:
        raise UsageError(f"Unknown style {style!r}.", detail=f"There are: {', '.join(STYLES)}.")
    applied = [a for a in run.analyzers if a.name in run.findings and run.findings[a.name].reason is None]
    if not applied:
        raise UsageError(
            "This run has no result to cite.",
            detail=run.verdict.text,
            hint="See the checks in its report.",
        )
    if style == "methods":
        return methods_paragraph(applied, run.document)
    entries = {type(analyzer).reference.key: type(analyzer).reference.bibtex for analyzer in applied}
    return "\n\n".join([*entries.values(), software_entry(run.trace.manifest)])


def software_entry(manifest: dict[str, Any]) -> str:
    """The BibTeX entry of the program as it ran."""
    made = manifest.get("sinklens") or {}
    version, commit = made.get("version"), made.get("commit")
    note = f"commit {commit[:12]}" + (" with changes" if made.get("modified") else "") if commit else ""
    started = (manifest.get("time") or {}).get("start_utc") or ""
    fields = {
        "title": "sinklens: attention sinks and massive activations in transformers",
        "author": "{The sinklens authors}",
        "version": version,
        "year": started[:4],
        "note": note,
    }
    lines = [f"  {key:<7} = {{{value}}}," for key, value in fields.items() if value]
    return "\n".join(["@software{sinklens,", *lines, "}"])
