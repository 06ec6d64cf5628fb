"""The quantisation probe as one job: find what carries the sink on half of the prompts, measure on the other half."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from sinklens.core.errors import DataError, SelfCheckError
from sinklens.core.manifest import Clock
from sinklens.inputs.spec import Prompt, PromptSet
from sinklens.mitigations.protection import Protection
from sinklens.mitigations.quantise import FakeQuantisation

from .listener import Listener, Silent
from .options import ProfileOptions
from .prepare import Prepared, prepare
from .probe import Probe, at_least, finished, probe_folder
from .quantisation import protection_of, quantisation_probe
from .session import Session

FINDERS = ("primary-sinks", "massive-activations", "super-experts")
"""The analyzers that name what a quantiser could keep."""
PROTECT = "protect.json"
FEWEST = 4
"""Prompts that can be halved: two find, two measure."""


def probe_quantisation(
    model: Any,
    grids: Sequence[FakeQuantisation],
    *,
    options: ProfileOptions,
    protect: str | Path | None = None,
    draws: int = 5,
    tokenizer: Any = None,
    out: str | Path | None = None,
    force: bool = False,
    listener: Listener | None = None,
    argv: list[str] | None = None,
) -> Probe:
    """What each grid costs, and how much of that the parts explain which a sink is made of.

    One half of the prompts, drawn with the seed, finds the parts; the other half is measured.

    Args:
        protect: A file of `Protection.save` that names the parts; then all prompts are measured.
        draws: Random controls per grid.
        out: Folder for `probe.json` and `protect.json`; None keeps everything in memory.

    Returns:
        Results as of `quantisation_probe`, one per grid.

    Raises:
        SelfCheckError: Nothing was found that could be kept, or a self-check failed.
        DataError: Too few prompts.
        SinklensError: The model lacks what a grid is for.
    """
    clock, listener = Clock(), listener or Silent()
    at_least("--draws", draws, 1)
    with probe_folder(out, force) as store:
        options = replace(options, analyzers=FINDERS, verify=False)
        prepared = prepare(model, tokenizer, options, listener)
        opened, measured = prepared.opened, prepared.prompts.prompts
        for grid in grids:
            grid.check(opened.anatomy.main)
        if protect is None:
            finding, measured = halves(prepared.prompts, options.seed)
            kept = _found(replace(prepared, prompts=finding), options, listener, argv)
        else:
            kept = Protection.load(protect, opened)
        results = []
        for number, grid in enumerate(grids, start=1):
            listener.stage(f"Grid {number} of {len(grids)}, {len(measured)} prompts")
            results.append(
                quantisation_probe(
                    opened, measured, grid, kept, draws=draws, seed=options.seed, progress=listener.progress
                )
            )
        if store is not None:
            kept.save(store.folder / PROTECT, opened)
        return finished(
            "quantisation", opened, results, inputs=prepared.prompts.description, seed=options.seed, clock=clock,
            argv=argv, store=store, found_on=len(prepared.prompts) - len(measured), measured_on=len(measured),
        )  # fmt: skip


def halves(prompts: PromptSet, seed: int) -> tuple[PromptSet, tuple[Prompt, ...]]:
    """The prompts that parts are found on, and those that are measured.

    Raises:
        DataError: They cannot be halved.
    """
    if len(prompts) < FEWEST:
        raise DataError(
            f"The probe needs {FEWEST} prompts, half of them to find what to keep; there are {len(prompts)}.",
            hint="Give more prompts (-n), or what to keep: --protect protect.json",
        )
    order = np.random.default_rng(seed).permutation(len(prompts))
    first = set(order[: len(prompts) // 2].tolist())
    chosen = [prompt for i, prompt in enumerate(prompts.prompts) if i in first]
    rest = tuple(prompt for i, prompt in enumerate(prompts.prompts) if i not in first)
    finding = tuple(replace(prompt, index=i) for i, prompt in enumerate(chosen))
    counts = {"n_prompts": len(finding), "n_tokens": sum(map(len, finding))}
    return PromptSet(finding, {**prompts.description, **counts}), rest


def _found(
    prepared: Prepared, options: ProfileOptions, listener: Listener, argv: list[str] | None
) -> Protection:
    run = Session(prepared, options, None, listener, argv, None).run()
    found = protection_of(run.trace, run.findings)
    if found.empty:
        raise SelfCheckError(
            "Nothing was found that a quantiser could keep: no massive dim, sink token or Super Expert.",
            detail="There is nothing to probe, which is not the same as no effect.",
            hint="Quantisation alone: sinklens mitigate --with fake-quantisation:weights=8 --task ppl",
        )
    return found
