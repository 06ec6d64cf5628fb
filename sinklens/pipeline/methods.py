"""The methods section of a report, derived from the analyzers themselves: their docstrings, fields and references."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from sinklens.analyzers.base import Analyzer
from sinklens.core.counts import counted

SECTIONS = {
    "how": "How it is computed",
    "compared": "Compared with the paper",
    "not_trust": "When not to trust it",
}


def describe_methods(analyzers: Sequence[Analyzer], document: dict[str, Any]) -> list[dict[str, Any]]:
    """One entry per analyzer, for the report; the first also carries the methods paragraph of the run."""
    entries = [describe_method(analyzer) for analyzer in analyzers]
    for entry in entries:
        entry["methods_paragraph"] = methods_paragraph(analyzers, document)
    return entries


def describe_method(analyzer: Analyzer) -> dict[str, Any]:
    """What one analyzer does, in its own words."""
    cls = type(analyzer)
    reference = {**asdict(cls.reference), "url": cls.reference.url, "bibtex": cls.reference.bibtex}
    return {
        "name": cls.name,
        "title": cls.title,
        "first_line": first_line(cls),
        "formula": cls.formula,
        **docstring_sections(cls),
        "parameters": analyzer.parameters,
        "reference": reference,
        "needs": sorted(signal.name for signal in cls.needs),
        "summarises": list(cls.summarises or ()),
        "source_file": cls.__module__.replace(".", "/") + ".py",
    }


def first_line(cls: type) -> str:
    return (inspect.getdoc(cls) or "").split("\n", 1)[0]


def docstring_sections(cls: type[Analyzer]) -> dict[str, str]:
    """The three sections every analyzer's docstring must have, as plain paragraphs."""
    paragraphs = re.split(r"\n\s*\n", inspect.getdoc(cls) or "")
    found = {}
    for key, heading in SECTIONS.items():
        text = next((p for p in paragraphs if p.startswith(heading + ":")), "")
        found[key] = " ".join(text.removeprefix(heading + ":").split())
    return found


def methods_paragraph(analyzers: Sequence[Analyzer], document: dict[str, Any]) -> str:
    """A paragraph for a paper that says what exactly was run."""
    model, manifest = document["model"], document["manifest"]
    inputs, tracing = manifest.get("inputs", {}), manifest.get("tracing", {})
    versions = manifest.get("versions", {})
    revision = f" (revision {model['revision']})" if model.get("revision") else ""
    did = "; ".join(_sentence(analyzer) for analyzer in analyzers)
    size = f"{model['layers']} layers, {model['heads']} heads, {model['dtype']}"
    return (
        f"We profiled {model['id']}{revision} ({size}) with sinklens {manifest.get('sinklens', {}).get('version', '')} "
        f"on {counted(inputs.get('n_prompts'), 'prompt')} ({inputs.get('n_tokens')} tokens, at most "
        f"{inputs.get('seq_len')} per "
        f"prompt; source: {inputs.get('source')}; BOS: {inputs.get('bos_added')}; chat template: "
        f"{inputs.get('chat_template')}). Attention: {tracing.get('attention_path')}; statistics in float32. {did}."
        f"{_experiments(manifest)} "
        f"Software: torch {versions.get('torch')}, transformers {versions.get('transformers')}."
    )


def _experiments(manifest: dict[str, Any]) -> str:
    """What was run besides the main pass."""
    done = (manifest.get("experiments") or {}).get("run", [])
    said = {
        "effects": " Causes were removed on a few of the prompts, beside matched random controls",
        "sensitivity": " The measurement was repeated on a few of the prompts under other inputs and precisions",
    }
    seed = (manifest.get("seeds") or {}).get("prompts", 0)
    return "".join(f"{said[name]} (seed {seed})." for name in done if name in said)


def _sentence(analyzer: Analyzer) -> str:
    settings = ", ".join(f"{key} = {value}" for key, value in analyzer.parameters.items())
    reference = type(analyzer).reference
    authors = reference.authors.split(" and ")
    who = authors[0].split()[-1] + (" et al." if len(authors) > 1 else "")
    return f"{type(analyzer).title} after {who} ({reference.year}, {reference.label}) with {settings}"
