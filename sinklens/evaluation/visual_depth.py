"""Up to which layer the answer needs the picture: tokens leave at every layer in turn, all of them or all but a
window."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sinklens.inputs.spans import ModalitySpans
from sinklens.inputs.spec import Prompt
from sinklens.models.spec import OpenedModel
from sinklens.tracers.chosen import Chosen
from sinklens.tracers.visual_interventions import VisualExit

from .answers import Answers

Progress = Callable[[int, int], None]


def exit_depths(
    opened: OpenedModel, prompts: Sequence[Prompt], progress: Progress | None = None
) -> dict[str, Any]:
    """For every prompt and layer: KL of the answer's predictions when the picture leaves there, and whether the most
    likely tokens stay the same. Layer 0 takes the picture out of the language model altogether.

    Returns:
        Plain JSON: `prompts`, and per prompt `kl`, `agrees` and `loss_ratio` (loss over the unchanged loss), each a
        list by layer.
    """
    layers = range(len(opened.anatomy.main.blocks))
    found: list[dict[str, Any]] = []
    for done, prompt in enumerate(prompts):
        answers = Answers(opened, prompt)
        if answers:
            usual = answers.under()
            each = [answers.under(VisualExit(layer)) for layer in layers]
            found.append(
                {
                    "prompt": prompt.index,
                    "kl": [one.kl_from(usual) for one in each],
                    "agrees": [one.agrees_with(usual) for one in each],
                    "loss_ratio": [one.loss / max(usual.loss, 1e-12) for one in each],
                }
            )
        if progress:
            progress(done + 1, len(prompts))
    return {"prompts": found}


def windows(spans: ModalitySpans, side: int) -> list[list[int]]:
    """Positions of the tokens of each window of `side` x `side` cells, grid by grid; the last ones may be smaller."""
    found = []
    for grid in spans.grids:
        rows, cols = grid.shape
        for top in range(0, rows, side):
            for left in range(0, cols, side):
                cells = grid.positions[top : top + side, left : left + side]
                if (cells >= 0).any():
                    found.append(cells[cells >= 0].tolist())
    return found


def horizon_information(
    opened: OpenedModel,
    prompts: Sequence[Prompt],
    *,
    side: int,
    every: int,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Information of windows of a picture by layer: the probability of the answer when from a layer on only the window
    is left, minus that when nothing of the picture is left.

    Returns:
        Plain JSON: `layers`, and per prompt `information` `[layer][window]`, with the probability of the answer in the
        unchanged model (`full`) and without the picture from each layer on (`without`).
    """
    layers = list(range(0, len(opened.anatomy.main.blocks), every))
    found: list[dict[str, Any]] = []
    for done, prompt in enumerate(prompts):
        answers = Answers(opened, prompt)
        if answers and prompt.visual is not None:
            spans = prompt.visual.spans
            visual = set(spans.visual.nonzero()[0].tolist())
            groups = windows(spans, side)
            without, information = [], []
            for layer in layers:
                nothing = answers.under(VisualExit(layer)).probability
                left = [Chosen.at({prompt.index: visual - set(group)}) for group in groups]
                kept = [answers.under(VisualExit(layer, rest)).probability for rest in left]
                without.append(nothing)
                information.append((np.array(kept) - nothing).tolist())
            full = answers.under().probability
            found.append(
                {"prompt": prompt.index, "full": full, "without": without, "information": information}
            )
        if progress:
            progress(done + 1, len(prompts))
    return {"layers": layers, "prompts": found}
