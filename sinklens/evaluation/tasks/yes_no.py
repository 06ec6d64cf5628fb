"""Yes/no questions, most often about a picture."""

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
from ..running import Progress, likelihoods, written
from .base import Answers, Reader, Task, needs, one_of, refuse_one_class, registry
from .choice import ENTROPY, continued
from .classification import VALID_RATE, WRITING_ENTROPY, label_in

YES, NO = 1, 0
_ACCURACY = Metric("accuracy", "accuracy", "share of items", "right", role="primary", binary=True)
_F1 = Metric("f1", "F1 of yes", "share", "twice_hits", "hits_and_errors")
_YES_RATIO = Metric("yes_ratio", "answers that are yes", "share of items", "yes", better=0, binary=True)


@registry.register("yes-no")
@dataclass(frozen=True, kw_only=True)
class YesNo(Task):
    """Questions to be answered with yes or no: accuracy, F1 of yes, and how often the answer is yes.

    How it is computed: with `by="likelihood"` the more likely of the two words. With `by="generation"` the first of the
    two that stands in what the model writes; an answer with neither is unreadable, and neither right nor a yes. With
    `by="mention"` the model describes, and the answer is yes if what it wrote has the item's `reference` in it, word
    for word: for models that can only describe. The yes-ratio tells a model that always says yes from one that looks.

    Args:
        by: `likelihood`, `generation` or `mention`.
        words: The words for yes and no.
        max_new_tokens: Most tokens written.
    """

    by: Literal["likelihood", "generation", "mention"] = "likelihood"
    words: tuple[str, str] = ("yes", "no")
    max_new_tokens: int = 8
    joint: str = " "

    kind = "yes-no"

    def __post_init__(self) -> None:
        one_of("by", self.by, ("likelihood", "generation", "mention"))
        object.__setattr__(self, "items", tuple(_answered(item, self.words) for item in self.items))
        super().__post_init__()
        refuse_one_class(self.name, self.items, self.classes)

    @property
    def classes(self) -> tuple[str, ...]:
        return self.words[::-1]

    @property
    def metrics(self) -> tuple[Metric, ...]:
        last = ENTROPY if self.by == "likelihood" else WRITING_ENTROPY
        valid = (VALID_RATE,) if self.by == "generation" else ()
        return (_ACCURACY, _F1, _YES_RATIO, *valid, last)

    def check_item(self, item: Item) -> None:
        needs(item, prompt=lambda item: bool(item.prompt))
        if self.by == "mention":
            needs(item, what_the_description_must_mention_in_reference=lambda item: bool(item.reference))

    def ask(self, opened: OpenedModel, items: Sequence[Item], progress: Progress | None = None) -> Answers:
        if self.by == "likelihood":
            return self._by_likelihood(opened, items, progress)
        reader = Reader(opened, chat_template=self.chat_template)
        asked = reader.contexts(items)
        found = written(opened, asked, max_new_tokens=self.max_new_tokens, progress=progress)
        texts = [reader.text(answer.token_ids) for answer in found]
        said = [self._said(text, item) for text, item in zip(texts, items, strict=True)]
        entropy = np.array([answer.entropy for answer in found])
        tokens = sum(len(q.context) for q in asked) + sum(len(answer.token_ids) for answer in found)
        columns = _columns(said, items, entropy)
        return Answers(columns, tuple(texts), entropy, columns["valid"], tokens)

    def _by_likelihood(
        self, opened: OpenedModel, items: Sequence[Item], progress: Progress | None
    ) -> Answers:
        reader = Reader(opened, chat_template=self.chat_template)
        joint = "" if self.chat_template else self.joint
        questions = []
        for item, asked in zip(items, reader.contexts(items), strict=True):
            wholes = [(*asked.context, *reader.bare(joint + word)) for word in self.words]
            questions.append(continued(asked, wholes, replace(item, choices=self.words)))
        found = likelihoods(opened, questions, progress)
        margin = np.array([answer.sums[0] - answer.sums[1] for answer in found])
        said = [None if m == 0 else YES if m > 0 else NO for m in margin]
        right = np.array([1.0 if item.answer == YES else -1.0 for item in items])
        finer = -np.logaddexp(0.0, -right * margin)
        entropy = np.array([answer.entropy for answer in found])
        answers = tuple("" if s is None else self.words[1 - s] for s in said)
        tokens = sum(len(q.context) + sum(len(c) - 1 for c in q.continuations) for q in questions)
        return Answers(_columns(said, items, entropy), answers, entropy, finer, tokens)

    def _said(self, text: str, item: Item) -> int | None:
        if self.by == "mention":
            words = r"\s+".join(map(re.escape, item.reference.split()))
            return YES if re.search(rf"(?<!\w){words}(?!\w)", text, flags=re.IGNORECASE) else NO
        label = label_in(text, self.words)
        return None if label is None else (YES, NO)[label]

    def tokens(self, opened: OpenedModel, items: Sequence[Item]) -> int:
        asked = Reader(opened, chat_template=self.chat_template).contexts(items)
        new = 0 if self.by == "likelihood" else self.max_new_tokens
        return sum(len(q.context) + new for q in asked)


def _columns(said: Sequence[int | None], items: Sequence[Item], entropy: np.ndarray) -> dict[str, np.ndarray]:
    truth = np.array([item.answer == YES for item in items])
    yes = np.array([s == YES for s in said])
    valid = np.array([s is not None for s in said])
    right = valid & (yes == truth)
    hits = yes & truth
    # An unreadable answer to a question whose answer is yes is a miss.
    errors = (yes & ~truth).astype(float) + (truth & ~yes)
    return {
        "right": right.astype(float),
        "yes": yes.astype(float),
        "valid": valid.astype(float),
        "twice_hits": 2.0 * hits,
        "hits_and_errors": 2.0 * hits + errors,
        "entropy": entropy,
    }


def _answered(item: Item, words: tuple[str, str]) -> Item:
    """The item with its answer as 1 for yes and 0 for no."""
    said = item.answer
    if isinstance(said, bool) or (isinstance(said, int) and said in (YES, NO)):
        return replace(item, answer=int(said), group=words[1 - int(said)])
    spelled = {words[0].lower(): YES, words[1].lower(): NO, "true": YES, "false": NO}
    answer = spelled.get(str(said).strip().lower())
    if answer is None:
        raise DataError(f"{item.id}: the answer must be {words[0]!r} or {words[1]!r}, found {said!r}.")
    return replace(item, answer=answer, group=words[1 - answer])
