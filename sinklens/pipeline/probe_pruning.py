"""The pruning probe as one job: read pictures with their answers, fit on a part of them, measure on the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sinklens.core.manifest import Clock
from sinklens.evaluation.pruners import USUAL, Pruner

from .listener import Listener, Silent
from .options import ProfileOptions
from .prepare import prepare
from .probe import Probe, at_least, finished, probe_folder
from .pruning import DRAWS, KEEPS, pruning_probe
from .sinks import dims_asked_for

READER = ("visual-sinks",)
"""Stands for what is read: prompts with pictures, in any number of tokens."""


def probe_pruning(
    model: Any,
    pruners: Sequence[Pruner] = USUAL,
    *,
    options: ProfileOptions,
    keeps: Sequence[float] = KEEPS,
    draws: int = DRAWS,
    tokenizer: Any = None,
    out: str | Path | None = None,
    force: bool = False,
    listener: Listener | None = None,
    argv: list[str] | None = None,
) -> Probe:
    """What each pruner costs at each share of visual tokens kept, see `pruning_probe`.

    Args:
        options: Pictures, sink dims and loading of the model, as of `profile`.
        out: Folder for `probe.json`; None keeps everything in memory.

    Raises:
        DataError: Too few of the prompts have a picture, a question and an answer.
        SinklensError: The model or the pictures cannot be read, or a pruner has no place in the model.
    """
    clock, listener = Clock(), listener or Silent()
    at_least("--draws", draws, 1)
    with probe_folder(out, force) as store:
        options = replace(options, analyzers=READER, verify=False)
        prepared = prepare(model, tokenizer, options, listener)
        opened = prepared.opened
        dims = dims_asked_for(options.sink_dims, opened)
        listener.stage(
            f"Prune {len(prepared.prompts)} prompts in {len(pruners)} ways, at {len(keeps)} shares"
        )
        found = pruning_probe(
            opened, prepared.prompts, pruners, keeps=keeps, sinks="search" if dims is None else dims, draws=draws,
            seed=options.seed, progress=listener.progress,
        )  # fmt: skip
        return finished(
            "pruning", opened, [found], inputs=prepared.prompts.description, seed=options.seed, clock=clock,
            argv=argv, store=store,
        )  # fmt: skip
