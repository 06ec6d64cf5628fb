"""How far a mitigation moves a model's predictions: KL(unchanged || mitigated), with its exact definition."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import nan

import numpy as np
import torch
from torch import Tensor

from sinklens.evaluation.predictions import divergence
from sinklens.evaluation.running import Question
from sinklens.inputs.spec import Prompt
from sinklens.mitigations import Method
from sinklens.models.spec import OpenedModel
from sinklens.tracers.batch import Batch, collate, forward

from .scoring import put_on

QUESTIONS = 64
"""Questions of a run, shared among its tasks, whose predictions are compared."""
_HELD = 1 << 26
"""Logits of the unchanged model that are held at a time, so that a mitigation is put on once for many questions."""


@dataclass(frozen=True)
class Divergence:
    """Mean over the evaluated next-token positions of KL(unchanged || mitigated), in nats.

    An evaluated position is one whose prediction a task reads first: of a question the end of its context, of a text
    every token that counts. Each position weighs the same, whatever question it belongs to.

    Attributes:
        mean: NaN without a position.
        positions: Their number.
    """

    mean: float
    positions: int


def kl_to_unchanged(opened: OpenedModel, method: Method, questions: Sequence[Question]) -> Divergence:
    """The divergence on at most `QUESTIONS` questions; each is read alone and whole, without a cache."""
    total, positions = 0.0, 0
    for group in _groups(questions[:QUESTIONS], opened):
        plain = [_logits(opened, question) for question in group]
        with put_on(method, opened):
            for question, before in zip(group, plain, strict=True):
                total += divergence(before, _logits(opened, question)) * len(before)
                positions += len(before)
    return Divergence(total / positions if positions else nan, positions)


def _groups(questions: Sequence[Question], opened: OpenedModel) -> Iterator[list[Question]]:
    """Questions whose logits may be held together; at least one."""
    vocabulary = int(getattr(opened.module.config.get_text_config(), "vocab_size", 0) or 1)  # type: ignore[union-attr]
    group: list[Question] = []
    held = 0
    for question in questions:
        size = (len(question.context) - question.first_evaluated) * vocabulary
        if group and held + size > _HELD:
            yield group
            group, held = [], 0
        group.append(question)
        held += size
    if group:
        yield group


def _logits(opened: OpenedModel, question: Question) -> Tensor:
    with torch.no_grad():
        return forward(opened.module, as_batch(opened, question)).logits[0, question.first_evaluated :]


def as_batch(opened: OpenedModel, question: Question) -> Batch:
    """A question's context as a batch of one."""
    prompt = Prompt(0, question.context, (), "", visual=question.visual)
    return collate([prompt], device=next(opened.module.parameters()).device)


def of_prompt(prompt: Prompt) -> Question:
    """A prompt whose every next token is evaluated; with pictures, from the last visual token on."""
    first = 0
    if prompt.visual is not None:
        visual = np.flatnonzero(prompt.visual.spans.visual[: len(prompt)])
        first = int(visual[-1]) if len(visual) else 0
    return Question(prompt.token_ids, visual=prompt.visual, evaluated=first)
