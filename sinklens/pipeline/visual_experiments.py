"""Experiments on prompts with pictures: found tokens taken out, and up to which layer the answer needs the picture."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from sinklens.analyzers import VisualTokens
from sinklens.analyzers.base import Analyzer, Finding
from sinklens.evaluation.answers import answer_positions, sees_answer
from sinklens.evaluation.removal import DRAWS, TokenSet, planned_passes, removal_effects
from sinklens.evaluation.visual_depth import exit_depths, horizon_information, windows
from sinklens.inputs.spec import Prompt, PromptSet
from sinklens.tracers import signals as sig
from sinklens.tracers.trace import Trace

if TYPE_CHECKING:
    from .experiments import Setting
    from .run import Run

REMOVAL, EXIT, HORIZON = "visual_effects", "visual_exit", "visual_horizon"
PROMPTS = {REMOVAL: 32, EXIT: 16, HORIZON: 4}
"""Prompts with pictures that an experiment looks at, the first ones."""


@dataclass(frozen=True)
class Planned:
    """What an experiment would do.

    Attributes:
        passes, tokens: Forward passes in all, and the tokens of the longest one.
        nothing: Why there is nothing to do, a sentence; None if there is.
    """

    passes: int
    tokens: int
    nothing: str | None = None


USUAL_SETS = 2
"""Sets of tokens that a prompt has, about, before it is known what is found: one of a class, and objects or sinks."""


def pictured(prompts: PromptSet, name: str) -> list[Prompt]:
    return [prompt for prompt in prompts.prompts if prompt.visual is not None][: PROMPTS[name]]


def passes_before(prompts: PromptSet, layers: int, analyzers: Sequence[Analyzer], name: str) -> int:
    """Passes an experiment will make, about, before anything is found."""
    chosen = pictured(prompts, name)
    if name == REMOVAL:
        return len(chosen) * (1 + USUAL_SETS * (1 + DRAWS))
    if name == EXIT:
        return len(chosen) * (layers + 1)
    reader: Any = _reader(analyzers, "information-horizon")
    groups = sum(len(windows(p.visual.spans, reader.window)) for p in chosen if p.visual is not None)
    return (groups + 2 * len(chosen)) * -(-layers // reader.every)


def token_sets(prompts: Sequence[Prompt], trace: Trace, findings: Mapping[str, Finding]) -> list[TokenSet]:
    """What the findings name, by prompt: visual sinks, sink and dead tokens; and objects, where pictures have masks."""
    rows = {name: finding.rows for name, finding in findings.items()}
    chosen = {
        "visual-sinks": ("visual sinks", "visual-sinks", rows.get("visual-sinks", ())),
        "sink-tokens": ("sink tokens", "visual-tokens", _of_class(rows, "sink")),
        "dead-tokens": ("dead tokens", "visual-tokens", _of_class(rows, "dead")),
    }
    known = {prompt.index for prompt in prompts}
    sets = []
    for name, (label, source, named) in chosen.items():
        positions: dict[int, list[int]] = defaultdict(list)
        for row in named:
            if row["prompt"] in known and row["position"] not in positions[row["prompt"]]:
                positions[row["prompt"]].append(row["position"])
        positions = {prompt: places for prompt, places in positions.items() if places}
        if positions:
            sets.append(TokenSet(name, label, positions, source))
    return [*sets, *_objects(known, trace)]


def every_token(run: Run) -> dict[str, Finding]:
    """The findings, with the tokens of all prompts in the table of `visual-tokens`, which lists a few for readers."""
    readers = [analyzer for analyzer in run.analyzers if isinstance(analyzer, VisualTokens)]
    return {
        **run.findings,
        **{a.name: replace(a, pictures=len(run.trace)).analyze(run.trace) for a in readers},
    }


def _of_class(rows: Mapping[str, list[dict[str, Any]]], cls: str) -> list[dict[str, Any]]:
    return [row for row in rows.get("visual-tokens", ()) if row["cls"] == cls]


def _objects(known: set[int], trace: Trace) -> list[TokenSet]:
    """Cells that show an object by the masks of the pictures: taking them out must hurt."""
    positions = {}
    for record in trace:
        if record.index in known and sig.OBJECT_SHARE.name in record.arrays:
            shown = np.flatnonzero(np.nan_to_num(record[sig.OBJECT_SHARE]) > 0.5)
            if len(shown):
                positions[record.index] = shown.tolist()
    return [TokenSet("objects", "tokens that show an object", positions, "masks")] if positions else []


def planned(setting: Setting, run: Run, name: str) -> Planned:
    """How much an experiment would have to do."""
    prompts = pictured(setting.prepared.prompts, name)
    longest = max(map(len, prompts), default=0)
    if not prompts:
        return Planned(0, 0, "No prompt has pictures.")
    if name == REMOVAL:
        sets = token_sets(prompts, run.trace, every_token(run))
        if not sets:
            return Planned(0, longest, "No finding names visual tokens that could be taken out.")
        return Planned(planned_passes(prompts, sets), longest)
    layers = len(setting.prepared.opened.anatomy.main.blocks)
    return Planned(passes_before(setting.prepared.prompts, layers, run.analyzers, name), longest)


def why_meaningless(setting: Setting, name: str) -> str | None:
    """Why the predictions of the prompts' answers say nothing in this model, a sentence; None if they do."""
    opened = setting.prepared.opened
    asked = [prompt for prompt in pictured(setting.prepared.prompts, name) if len(answer_positions(prompt))]
    if not asked or not sees_answer(opened, asked[0]):
        return None
    return (
        f"{type(opened.module).__name__} reads its text both ways, so it sees an answer that is a part of the prompt "
        "before it gives it; what it predicts there says nothing."
    )


def perform(setting: Setting, run: Run, name: str) -> dict[str, Any]:
    """Run one; plain JSON for the manifest."""
    opened, prompts = setting.prepared.opened, pictured(setting.prepared.prompts, name)
    progress: Callable[[int, int], None] = setting.listener.progress
    if name == REMOVAL:
        sets = token_sets(prompts, run.trace, every_token(run))
        return removal_effects(opened, prompts, sets, seed=setting.options.seed, progress=progress)
    if name == EXIT:
        return exit_depths(opened, prompts, progress)
    reader = _reader(run.analyzers, "information-horizon")
    return horizon_information(opened, prompts, side=reader.window, every=reader.every, progress=progress)


def _reader(analyzers: Sequence[Analyzer], name: str) -> Any:
    return next(analyzer for analyzer in analyzers if analyzer.name == name)
