"""The self-check of prompts with pictures: the vision tower, and whether tokens look where they are said to look."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from itertools import islice, zip_longest
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sinklens.inputs.cutting import without_pictures
from sinklens.inputs.spans import PatchGrid
from sinklens.inputs.spec import Prompt
from sinklens.kernels.spec import AttentionCall
from sinklens.models.spec import OpenedModel
from sinklens.models.sums import states_of

from .attention import AttentionTap, Site, ignore, no_statistics, sites
from .batch import Batch, collate, forward
from .executor import Pass, TracePlan
from .record_vision import OF_ATTENTION, VisionRecorder, vision_tower
from .selfcheck import DENSE_BUDGET, Agreement, Check
from .signals import Source

SPOTS = 4
"""Cells that are painted."""
Spot = tuple[PatchGrid, int, int, tuple[int, int, int, int]]


def picture_batch(prompts: Sequence[Prompt], device: torch.device) -> Batch | None:
    """The prompt with pictures that has fewest tokens, None if none has pictures."""
    visual = [prompt for prompt in prompts if prompt.visual is not None]
    return None if not visual else collate([min(visual, key=len)], device=device)


def dense_batch(batch: Batch, heads: int, device: torch.device) -> Batch:
    """What dense maps are compared on: the batch, or the text of its prompt if maps of it would be too large."""
    (prompt,) = batch.prompts
    text = without_pictures(prompt, 12)
    if len(prompt) ** 2 * heads <= DENSE_BUDGET or len(text) < 2:
        return batch
    return collate([text], device=device)


def vision_checks(opened: OpenedModel, batch: Batch, traced: Pass, plan: TracePlan) -> list[Check]:
    """All checks of the vision tower for a batch with pictures."""
    tower = vision_tower(opened.anatomy)
    if tower is None or Source.VISION not in plan.sources():
        return []
    checks = []
    if tower.routed and plan.signals & OF_ATTENTION:
        expected = sum(block.attention is not None for block in tower.blocks)
        detail = "blocks of the vision tower whose attention was seen over every patch"
        seen = traced.vision_blocks or 0
        checks.append(
            Check("all attention of the vision tower seen", seen == expected, seen, expected, detail)
        )
        checks.append(_agreement(opened, batch, plan))
    return [*checks, _places(traced)]


def _agreement(opened: OpenedModel, batch: Batch, plan: TracePlan) -> Check:
    tower = vision_tower(opened.anatomy)
    assert tower is not None
    agreement = Agreement(VisionRecorder(tower, plan.signals))
    where = sites(opened.plain, tower, "attention")
    tap = AttentionTap(where, agreement.asks, agreement.on_attention, mode=plan.mode, plan=plan.blocks)
    with tap.attached(opened.plain):
        forward(opened.plain, batch)
    limit = 1e-4 if plan.blocks.score_dtype == torch.float32 else 2e-2
    worst = max(agreement.worst, agreement.mass)
    detail = f"largest relative error of received attention, and of its sum, at {agreement.tokens} patches at a time"
    return Check("vision tower: blocked = dense", worst <= limit, worst, limit, detail)


def _places(traced: Pass) -> Check:
    """Every place that a grid of tokens names is one that the tower has, and all but class tokens are named."""
    record = traced.records[0]
    norms = record.arrays.get("vision_norm")
    assert record.spans is not None
    members = [grid.members for grid in record.spans.grids if grid.members is not None]
    largest = max((int(places.max()) + 1 for places in members), default=0)
    count = largest if norms is None else norms.shape[-1]
    detail = f"places in the vision tower that the tokens name, of {count} it has"
    return Check("patches of every token exist", largest <= count, float(largest), float(count), detail)


def painted_check(opened: OpenedModel, batch: Batch) -> Check | None:
    """A spot painted into a picture must change the token that is said to look there, more than any other of its grid.

    First in the model as it is. Where its attention spreads the change too far, with the attention of the vision tower
    silenced, so that a patch depends on itself alone. None if the pictures are not at hand.
    """
    (prompt,) = batch.prompts
    visual = prompt.visual
    if visual is None or visual.painted is None:
        return None
    name = "a painted patch is found in its token"
    spots = list(_spots(prompt))
    if not spots:
        detail = "not decided: the pictures have fewer pixels than tokens, so no pixel belongs to one token"
        return Check(name, True, None, None, detail)
    before = entering(opened, batch)
    found, rest = _found(opened, batch, spots, before, local=False)
    how = "the largest change of what enters the language model is at the token of the painted spot"
    tower = vision_tower(opened.anatomy)
    if rest and tower is not None and tower.routed:
        again, rest = _found(opened, batch, rest, entering(opened, batch, local=True), local=True)
        how += f"; {again} of them only with the vision tower's attention silenced, which spreads the change"
        found += again
    elif rest:
        detail = (
            f"not decided for {len(rest)} of {len(spots)} spots: attention spreads the change, unsilenced"
        )
        return Check(name, True, float(found), float(len(spots)), detail)
    return Check(name, not rest, float(found), float(len(spots)), how)


def _found(
    opened: OpenedModel, batch: Batch, spots: Iterable[Spot], before: Tensor, *, local: bool
) -> tuple[int, list[Spot]]:
    """How many spots are found in their token, and the others."""
    missed = []
    spots = list(spots)
    visual = batch.prompts[0].visual
    assert visual is not None
    assert visual.painted is not None
    for spot in spots:
        grid, row, col, box = spot
        now = entering(opened, _with(batch, visual.painted(grid.picture, box)), local=local)
        change = (now.float() - before.float()).norm(dim=-1).cpu().numpy()
        laid = grid.spread(change, fill=-1.0)
        if np.unravel_index(int(laid.argmax()), laid.shape) != (row, col) or laid.max() <= 0:
            missed.append(spot)
    return len(spots) - len(missed), missed


def _spots(prompt: Prompt) -> Iterator[Spot]:
    """Cells of different views and pictures, each with a spot in its middle that lies inside the picture."""
    assert prompt.visual is not None
    spans = prompt.visual.spans
    rng = np.random.default_rng(0)
    queues = [_of_grid(prompt, spans.grids[i], rng) for i in rng.permutation(len(spans.grids))]
    return islice((spot for spots in zip_longest(*queues) for spot in spots if spot is not None), SPOTS)


def _of_grid(prompt: Prompt, grid: PatchGrid, rng: np.random.Generator) -> Iterator[Spot]:
    assert prompt.visual is not None
    picture, (rows, cols) = prompt.visual.spans.pictures[grid.picture], grid.shape
    for place in rng.permutation(rows * cols):
        row, col = divmod(int(place), cols)
        box = _middle(grid.cell_box(row, col), picture.width, picture.height)
        if box is not None and grid.positions[row, col] >= 0:
            yield grid, row, col, box


def _middle(
    cell: tuple[float, float, float, float], width: int, height: int
) -> tuple[int, int, int, int] | None:
    """The middle half of the whole pixels of a cell; None if it has none, or they are not all in the picture."""
    left, top, right, bottom = cell
    x0, x1 = _inner(left, right)
    y0, y1 = _inner(top, bottom)
    inside = x0 >= 0 and y0 >= 0 and x1 <= width and y1 <= height
    return (x0, y0, x1, y1) if inside and x0 < x1 and y0 < y1 else None


def _inner(start: float, end: float) -> tuple[int, int]:
    first, last = math.ceil(start - 1e-6), math.floor(end + 1e-6)
    inset = max(0, last - first) // 4
    return first + inset, last - inset


def _with(batch: Batch, inputs: Mapping[str, Tensor]) -> Batch:
    device = batch.inputs["input_ids"].device
    return replace(
        batch, inputs={**batch.inputs, **{name: value.to(device) for name, value in inputs.items()}}
    )


def entering(opened: OpenedModel, batch: Batch, *, local: bool = False) -> Tensor:
    """What enters the first block of the language model, `[pos, dim]`.

    Args:
        local: Silence the attention of the vision tower, so that every patch depends on itself alone.
    """
    model, tower = opened.plain, vision_tower(opened.anatomy)
    seen: list[Tensor] = []

    def keep(_: Any, args: Any, kwargs: Any) -> None:
        given = states_of(args, kwargs)
        if given is not None:
            seen.append(given[0].detach().clone())

    def silence(site: Site, call: AttentionCall, output: Tensor) -> Tensor:
        return torch.zeros_like(output)

    with ExitStack() as stack:
        tap = nullcontext()
        if local and tower is not None:
            where = sites(model, tower, "attention")
            tap = AttentionTap(where, no_statistics, ignore, edit=silence).attached(model)
        stack.enter_context(tap)
        first = model.get_submodule(opened.anatomy.main.blocks[0].path)
        stack.callback(first.register_forward_pre_hook(keep, with_kwargs=True).remove)
        forward(model, batch, logits=False)
    return seen[0]
