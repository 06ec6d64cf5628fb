"""Cutting a prompt after some tokens without cutting a picture."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from .spans import Kind, ModalitySpans
from .spec import Prompt, Visual


def least_length(prompt: Prompt) -> int:
    """Tokens up to and with the last one of a picture and of the marks around it; 1 for text alone."""
    if prompt.visual is None:
        return 1
    parts = np.flatnonzero(prompt.visual.spans.is_(Kind.VISUAL, Kind.DELIMITER))
    return int(parts[-1]) + 1 if len(parts) else 1


def cut_prompt(prompt: Prompt, length: int) -> Prompt:
    """The first `length` tokens of a prompt, or as many more as its pictures need."""
    length = max(length, least_length(prompt))
    if length >= len(prompt):
        return prompt
    visual = None if prompt.visual is None else _cut(prompt.visual, len(prompt), length)
    return replace(prompt, token_ids=prompt.token_ids[:length], pieces=prompt.pieces[:length], visual=visual)


def _cut(visual: Visual, whole: int, length: int) -> Visual:
    spans = ModalitySpans(visual.spans.kinds[:length], visual.spans.pictures, visual.spans.grids)
    inputs = {name: _per_token(value, whole, length) for name, value in visual.inputs.items()}
    return replace(visual, spans=spans, inputs=inputs)


def _per_token(value: Any, whole: int, length: int) -> Any:
    return value[:, :length] if value.ndim == 2 and tuple(value.shape) == (1, whole) else value


def without_pictures(prompt: Prompt, length: int) -> Prompt:
    """The first `length` text tokens of a prompt, as text alone."""
    if prompt.visual is None:
        return cut_prompt(prompt, length)
    text = np.flatnonzero(prompt.visual.spans.is_(Kind.SYSTEM, Kind.QUESTION, Kind.GENERATED))[:length]
    return replace(
        prompt,
        token_ids=tuple(prompt.token_ids[i] for i in text),
        pieces=tuple(prompt.pieces[i] for i in text),
        visual=None,
    )
