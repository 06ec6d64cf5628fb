"""Pictures in which one object fills exactly one patch, for `evaluation.patch_compression`.

They are made in the pixels that the model is given, so no resampling mixes cells.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from sinklens.inputs.spec import Prompt

from .vision import Answer, Scenes, ShapesTask
from .vision_prompts import cell_positions, scene_prompts

STATED = (Answer.COUNT, Answer.COLOUR, Answer.SHAPE)


def single_objects(task: ShapesTask, count: int, rng: np.random.Generator) -> Scenes:
    """`count` pictures with one object each; cell, colour and shape are uniform and independent."""
    drawn: list[Scenes] = []
    have = 0
    while have < count:
        scenes = task.sample(4 * task.most * max(8, count - have), rng)
        rows = np.flatnonzero(scenes.counts == 1)
        drawn.append(
            Scenes(*(getattr(scenes, name)[rows] for name in ("pixels", "cells", "colours", "shapes")))
        )
        have += len(rows)
    fields = (
        np.concatenate([getattr(part, n) for part in drawn])[:count]
        for n in ("pixels", "cells", "colours", "shapes")
    )
    return Scenes(*fields)


def patch_questions(task: ShapesTask, scenes: Scenes) -> Iterator[tuple[Prompt, int, dict[str, list[int]]]]:
    """Prompt with its answer, position of the object's token, and positions of what the answer states by kind."""
    answers = task.encode(scenes).answers
    for place, prompt in enumerate(scene_prompts(task, scenes)):
        kinds = {
            kind.name.lower(): torch.nonzero(answers[place] == int(kind))[:, 0].tolist() for kind in STATED
        }
        yield prompt, cell_positions(task, scenes, place, objects=True)[0], kinds
