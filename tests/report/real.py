"""Pages made by the bundled checkpoints, each once per session: what readers really open."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import sinklens as sl

ANALYZERS = {
    "dense-ind": {"sensitivity": True, "verify": True},
    "moe-ind": {"verify": True},
    "vlm-shapes": {"verify": False},
}
NAMES = (*ANALYZERS, "comparison", "comparison-pictures", "dynamics", "mitigations")


@cache
def run(name: str) -> Any:
    """A run of a bundled checkpoint on a few prompts."""
    return sl.profile(f"bundled:{name}", n=9 if name == "vlm-shapes" else 4, **ANALYZERS[name])  # type: ignore[arg-type]


@cache
def compared(name: str) -> Any:
    """Runs side by side: two models, pictures read with two definitions, and one model over steps."""
    if name == "comparison":
        return sl.compare(run("dense-ind"), run("moe-ind"))
    if name == "comparison-pictures":
        other = sl.profile("bundled:vlm-shapes", n=4, seed=3, verify=False)
        return sl.compare(run("vlm-shapes"), other)
    folder = Path(tempfile.mkdtemp())
    for step in (100, 20):
        run("dense-ind").analyze(f"primary-sinks:epsilon={step / 200}").save(folder / f"step-{step}")
    return sl.compare(folder / "step-100", folder / "step-20")


@cache
def html(name: str) -> str:
    """The page as it is written to disk."""
    target = Path(tempfile.mkdtemp()) / "page.html"
    if name in ANALYZERS:
        run(name).report(target)
    elif name == "mitigations":
        given: dict[str, Any] = {"n": 2, "n_items": 8, "verify": False}
        sl.mitigate("bundled:dense-ind", "zero-tuning:gamma=0.5,knock-out", **given).report(target)
    else:
        compared(name).report(target)
    return target.read_text(encoding="utf-8")


def themed(name: str, theme: str) -> str:
    return html(name).replace('<html lang="en">', f'<html lang="en" data-theme="{theme}">', 1)
