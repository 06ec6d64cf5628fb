"""The self-check of a model whose blocks are on disk: on one block of every kind, which are read once for it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from sinklens.inputs.spec import Prompt
from sinklens.models.spec import OpenedModel
from sinklens.models.streaming import sampled, samples

from ..executor import TracePlan
from ..selfcheck import Check, self_check


def check_streamed(opened: OpenedModel, prompts: Iterable[Prompt], plan: TracePlan) -> list[Check]:
    """All checks on the model with a few of its blocks, the others skipped.

    A dozen passes through every block would read the model a dozen times. What holds for a block holds for those of
    its kind; that every block does in the run what it does in an ordinary pass is checked while they are traced.
    """
    blocks = opened.blocks
    assert blocks is not None
    few, found = list(prompts), []
    checked: set[int] = set()
    pairs = samples(blocks)
    for chosen in pairs:
        with sampled(blocks, opened.anatomy, chosen) as anatomy:
            checked.update(blocks.resident)
            checks = self_check(replace(opened, anatomy=anatomy, blocks=None), few, plan)
        if chosen != pairs[-1]:
            checks = [replace(check, name=f"{check.name} (block {chosen[-1]})") for check in checks]
        found = [*checks, *found]
    names = ", ".join(map(str, sorted(checked)))
    detail = f"streamed: the checks ran on blocks {names} of {len(blocks)}, at least one of every kind"
    return [*found, Check("every kind of block checked", True, float(len(pairs) + 1), None, detail)]
