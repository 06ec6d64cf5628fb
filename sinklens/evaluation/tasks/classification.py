"""Classification, by the likelihood of the labels or by what the model writes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from sinklens.core.errors import DataError
from sinklens.models.spec import OpenedModel

from ..items import Item
from ..metrics import Metric
from ..running import Progress, written
from .base import Answers, Reader, one_of, refuse_one_class, registry
from .choice import ACCURACY, Choice

VALID_RATE = Metric(
    "valid_rate", "answers that can be read", "share of items", "valid", role="other", binary=True
)
AMONG_VALID = Metric(
    "accuracy_among_valid", "accuracy among the answers that can be read", "share of valid", "right", "valid"
)
WRITING_ENTROPY = Metric("entropy", "mean next-token entropy while writing", "nats", "entropy", better=0)


@registry.register("classification")
@dataclass(frozen=True, kw_only=True)
class Classification(Choice):
    """Texts with a label out of a few.

    How it is computed: with `by="likelihood"` as multiple choice over all labels. With `by="generation"` the model
    writes, and the first label that stands in what it wrote, as a whole word, is its answer (of two that begin at
    the same place the longer one). What has no label in it is unreadable: a class of its own, apart from wrong
    answers. `accuracy` counts it as not right, `accuracy_among_valid` leaves it out, `valid_rate` says how many are
    left. A gain of accuracy that is a gain of `valid_rate` alone is one of format.

    Args:
        by: `likelihood` or `generation`.
        max_new_tokens: Most tokens written.
    """

    by: Literal["likelihood", "generation"] = "likelihood"
    max_new_tokens: int = 8

    kind = "classification"

    def __post_init__(self) -> None:
        one_of("by", self.by, ("likelihood", "generation"))
        labels = {item.choices for item in self.items}
        if len(labels) > 1:
            raise DataError(f"{self.name}: all items of a classification must have the same labels.")
        refuse_one_class(self.name, self.items, self.classes)
        super().__post_init__()

    @property
    def classes(self) -> tuple[str, ...]:
        return self.items[0].choices

    @property
    def metrics(self) -> tuple[Metric, ...]:
        if self.by == "likelihood":
            return super().metrics
        return (ACCURACY, VALID_RATE, AMONG_VALID, WRITING_ENTROPY)

    def ask(self, opened: OpenedModel, items: Sequence[Item], progress: Progress | None = None) -> Answers:
        if self.by == "likelihood":
            return super().ask(opened, items, progress)
        return ask_in_writing(self, opened, items, progress)

    def tokens(self, opened: OpenedModel, items: Sequence[Item]) -> int:
        if self.by == "likelihood":
            return super().tokens(opened, items)
        asked = Reader(opened, chat_template=self.chat_template).contexts(items)
        return sum(len(q.context) + self.max_new_tokens for q in asked)


def ask_in_writing(
    task: Classification, opened: OpenedModel, items: Sequence[Item], progress: Progress | None
) -> Answers:
    """The labels found in what the model writes."""
    reader = Reader(opened, chat_template=task.chat_template)
    asked = reader.contexts(items)
    answers = written(opened, asked, max_new_tokens=task.max_new_tokens, progress=progress)
    texts = [reader.text(answer.token_ids) for answer in answers]
    found = [label_in(text, item.choices) for text, item in zip(texts, items, strict=True)]
    valid = np.array([float(label is not None) for label in found])
    right = np.array([float(label == item.answer) for label, item in zip(found, items, strict=True)])
    entropy = np.array([answer.entropy for answer in answers])
    return Answers(
        {"right": right, "valid": valid, "entropy": entropy},
        tuple(texts),
        entropy,
        valid,
        sum(len(q.context) for q in asked) + sum(len(answer.token_ids) for answer in answers),
    )


def label_in(text: str, labels: Sequence[str]) -> int | None:
    """Index of the label that stands first in a text as a whole word; None if there is none."""
    places = []
    for index, label in enumerate(labels):
        found = re.search(rf"(?<!\w){re.escape(label.strip())}(?!\w)", text, flags=re.IGNORECASE)
        if found:
            places.append((found.start(), -len(label.strip()), index))
    return min(places)[2] if places else None


def with_labels(items: Sequence[Item], where: str) -> tuple[Item, ...]:
    """Items whose answers are texts, with all labels that occur as their choices."""
    labels = tuple(sorted({str(item.answer) for item in items}))
    if any(item.answer is None for item in items):
        missing = next(item.id for item in items if item.answer is None)
        raise DataError(f"{missing}: the label is missing.", detail=f"Every item of {where} needs one.")
    return tuple(
        replace(item, choices=labels, answer=labels.index(str(item.answer)), group=str(item.answer))
        for item in items
    )
