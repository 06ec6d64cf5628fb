"""Free answers, scored by the caller's own function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from sinklens.core.errors import DataError, UsageError
from sinklens.models.spec import OpenedModel

from ..items import Item
from ..metrics import Metric
from ..running import Progress, written
from .base import Answers, Reader, Task, needs, registry
from .classification import WRITING_ENTROPY

Scorer = Callable[[str, Item], float]


def exact(text: str, item: Item) -> float:
    """1 if the answer is the reference, apart from white space and case."""
    return float(" ".join(text.lower().split()) == " ".join(item.reference.lower().split()))


def contains(text: str, item: Item) -> float:
    """1 if the reference stands in the answer, apart from white space and case."""
    return float(" ".join(item.reference.lower().split()) in " ".join(text.lower().split()))


SCORERS: dict[str, Scorer] = {"exact": exact, "contains": contains}


@registry.register("generation")
@dataclass(frozen=True, kw_only=True)
class Generation(Task):
    """Prompts that the model answers freely; each answer gets a number from a scorer.

    Args:
        scorer: `exact` or `contains` (against the item's `reference`), or a function of text and `Item` that returns a
            number.
        better: 1 if a larger number is better, -1 if a smaller one is.
        max_new_tokens: Most tokens written.
    """

    scorer: str | Scorer = "exact"
    better: Literal[1, -1] = 1
    max_new_tokens: int = 64

    kind = "generation"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.scorer, str) and self.scorer not in SCORERS:
            raise UsageError(
                f"There is no scorer {self.scorer!r}.",
                detail=f"There are: {', '.join(SCORERS)}, or a function.",
            )
        if isinstance(self.scorer, str):
            for item in self.items:
                needs(item, reference=lambda item: bool(item.reference))

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return (
            Metric("score", "score", "mean of the scorer", "score", better=self.better, role="primary"),
            Metric("length", "length", "tokens per answer", "length", better=0),
            WRITING_ENTROPY,
        )

    def ask(self, opened: OpenedModel, items: Sequence[Item], progress: Progress | None = None) -> Answers:
        reader = Reader(opened, chat_template=self.chat_template)
        asked = reader.contexts(items)
        found = written(opened, asked, max_new_tokens=self.max_new_tokens, progress=progress)
        texts = [reader.text(answer.token_ids) for answer in found]
        score = np.array([self._score(text, item) for text, item in zip(texts, items, strict=True)])
        entropy = np.array([answer.entropy for answer in found])
        lengths = np.array([float(len(answer.token_ids)) for answer in found])
        columns = {"score": score, "length": lengths, "entropy": entropy}
        tokens = sum(len(q.context) for q in asked) + int(lengths.sum())
        return Answers(columns, tuple(texts), entropy, self.better * score, tokens)

    def _score(self, text: str, item: Item) -> float:
        scorer = SCORERS[self.scorer] if isinstance(self.scorer, str) else self.scorer
        try:
            value = float(scorer(text, item))
        except (TypeError, ValueError) as error:
            raise DataError(f"{item.id}: the scorer returned no number: {error}.") from error
        if not np.isfinite(value):
            raise DataError(f"{item.id}: the scorer returned {value}.")
        return value

    def tokens(self, opened: OpenedModel, items: Sequence[Item]) -> int:
        asked = Reader(opened, chat_template=self.chat_template).contexts(items)
        return sum(len(q.context) + self.max_new_tokens for q in asked)
