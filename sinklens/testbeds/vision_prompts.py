"""The pictures of a vision testbed as prompts, captions included, so that a run can measure how well they are read."""

from __future__ import annotations

from hashlib import sha256

import numpy as np
import torch

from sinklens.inputs.spans import Kind, ModalitySpans, PatchGrid, Picture
from sinklens.inputs.spec import Prompt, Visual

from .vision import Answer, Scenes, ShapesTask


def scene_prompts(
    task: ShapesTask, scenes: Scenes, *, answered: bool = True, first: int = 0
) -> tuple[Prompt, ...]:
    """One prompt per picture: BOS, the picture, the question and, if `answered`, the true caption as `GENERATED`.

    Args:
        first: `Prompt.index` of the first one.
    """
    encoded, words = task.encode(scenes), task.vocabulary
    prompts = []
    for place in range(len(scenes)):
        answer = encoded.answers[place] != Answer.NONE
        length = int((encoded.input_ids[place] != words.index("<pad>")).sum())
        length -= 0 if answered else int(answer.sum())
        ids = tuple(encoded.input_ids[place, :length].tolist())
        kinds = np.full(length, Kind.QUESTION)
        kinds[: task.image_slice.start] = Kind.SYSTEM
        kinds[task.image_slice] = Kind.VISUAL
        kinds[answer[:length].numpy()] = Kind.GENERATED
        spans = ModalitySpans(kinds, (_picture(task, scenes, place),), (_grid(task),))
        pixels = {"pixel_values": encoded.pixel_values[place : place + 1]}
        thumbnail = scenes.pixels[place].transpose(1, 2, 0).copy()
        visual = Visual(spans, pixels, (thumbnail,))
        pieces = tuple(words[token] for token in ids)
        prompts.append(Prompt(first + place, ids, pieces, f"scene:{place}", "shapes", visual))
    return tuple(prompts)


def cell_positions(task: ShapesTask, scenes: Scenes, place: int, *, objects: bool) -> list[int]:
    """Token positions of the cells of one picture that hold an object, or of those that do not."""
    empty = torch.from_numpy(task.background(scenes)[place])
    return (task.image_slice.start + (~empty if objects else empty).nonzero()[:, 0]).tolist()


def _picture(task: ShapesTask, scenes: Scenes, place: int) -> Picture:
    pixels = scenes.pixels[place]
    return Picture(f"scene-{place}.png", task.side, task.side, sha256(pixels.tobytes()).hexdigest())


def _grid(task: ShapesTask) -> PatchGrid:
    cells = np.arange(task.patches).reshape(task.grid, task.grid)
    # The vision tower reads its class token first.
    box = (0.0, 0.0, float(task.side), float(task.side))
    return PatchGrid(0, "whole", cells + task.image_slice.start, box, (cells + 1)[:, :, None])
