"""Multiple choice by likelihood."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from sinklens.core.errors import DataError
from sinklens.models.spec import OpenedModel

from ..items import Item
from ..metrics import Metric
from ..running import Progress, Question, likelihoods
from .base import Answers, Reader, Task, needs, registry

ACCURACY = Metric("accuracy", "accuracy", "share of items", "right", role="primary", binary=True)
PER_TOKEN = Metric(
    "accuracy_per_token",
    "accuracy by mean log-probability per token",
    "share of items",
    "right_per_token",
    binary=True,
)
CONFIDENCE = Metric(
    "log_probability",
    "log-probability of the right answer among the choices",
    "nats",
    "log_probability",
)
ENTROPY = Metric("entropy", "next-token entropy at the answer", "nats", "entropy", better=0)


@registry.register("choice")
@dataclass(frozen=True, kw_only=True)
class Choice(Task):
    """Questions with several answers to choose from; the one the model finds most likely counts as its answer.

    How it is computed: every answer is set behind the prompt and read as the tokenizer reads the whole, so that a
    token across the seam is no problem; what follows the tokens that all of them share with the prompt is scored, over
    all its tokens. `accuracy` takes the largest sum of log-probabilities, `accuracy_per_token` the largest mean. Two
    answers that are equally likely count as wrong, whichever comes first.

    Args:
        joint: What stands between prompt and answer.
    """

    joint: str = " "

    kind = "choice"

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return (ACCURACY, PER_TOKEN, CONFIDENCE, ENTROPY)

    def check_item(self, item: Item) -> None:
        needs(
            item,
            prompt=lambda item: bool(item.prompt),
            at_least_two_choices=lambda item: len(item.choices) > 1,
            the_index_of_the_right_choice_in_answer=lambda item: (
                isinstance(item.answer, int) and 0 <= item.answer < len(item.choices)
            ),
        )

    def ask(self, opened: OpenedModel, items: Sequence[Item], progress: Progress | None = None) -> Answers:
        questions = self.questions(opened, items)
        found = likelihoods(opened, questions, progress)
        right = np.array([int(item.answer or 0) for item in items])
        sums = [answer.sums for answer in found]
        means = [
            answer.sums / [len(c) for c in question.continuations]
            for answer, question in zip(found, questions, strict=True)
        ]
        confidence = np.array([_log_share(s, r) for s, r in zip(sums, right, strict=True)])
        entropy = np.array([answer.entropy for answer in found])
        columns = {
            "right": _wins(sums, right),
            "right_per_token": _wins(means, right),
            "log_probability": confidence,
            "entropy": entropy,
        }
        answers = tuple(item.choices[int(np.argmax(s))] for item, s in zip(items, sums, strict=True))
        return Answers(columns, answers, entropy, confidence, self._size(questions))

    def questions(self, opened: OpenedModel, items: Sequence[Item]) -> list[Question]:
        """Contexts and continuations as token ids."""
        reader = Reader(opened, chat_template=self.chat_template)
        return [self._question(reader, item) for item in items]

    def _question(self, reader: Reader, item: Item) -> Question:
        asked = reader.context(item)
        if isinstance(item.prompt, str) and asked.visual is None and not self.chat_template:
            wholes = [
                (*reader.prefix, *reader.bare(item.prompt + self.joint + choice)) for choice in item.choices
            ]
        else:
            # Nothing can join across the end of a template, of a prompt with a picture, or of given token ids.
            joint = "" if self.chat_template else self.joint
            wholes = [(*asked.context, *reader.bare(joint + choice)) for choice in item.choices]
        return continued(asked, wholes, item)

    def tokens(self, opened: OpenedModel, items: Sequence[Item]) -> int:
        return self._size(self.questions(opened, items))

    @staticmethod
    def _size(questions: Sequence[Question]) -> int:
        return sum(len(q.context) + sum(len(c) - 1 for c in q.continuations) for q in questions)


def continued(asked: Question, wholes: Sequence[tuple[int, ...]], item: Item) -> Question:
    """A question from its context and the whole token ids with each answer."""
    shared = len(asked.context)
    for whole in wholes:
        pairs = zip(asked.context[:shared], whole, strict=False)
        shared = next((i for i, (a, b) in enumerate(pairs) if a != b), min(shared, len(whole)))
    answers = tuple(whole[shared:] for whole in wholes)
    for choice, answer in zip(item.choices, answers, strict=True):
        if not answer:
            raise DataError(f"{item.id}: the choice {choice!r} has no token of its own.")
    if len(set(answers)) < len(answers):
        twice = [c for c, a in zip(item.choices, answers, strict=True) if answers.count(a) > 1]
        raise DataError(
            f"{item.id}: the tokenizer reads the choices {twice[0]!r} and {twice[1]!r} as the same tokens.",
            hint="Choose other words for them.",
        )
    return replace(asked, context=asked.context[:shared], continuations=answers)


def _wins(scores: Sequence[np.ndarray], right: np.ndarray) -> np.ndarray:
    """1 where the right answer has the only largest score."""
    return np.array(
        [
            float(s[r] == s.max() and int((s == s.max()).sum()) == 1)
            for s, r in zip(scores, right, strict=True)
        ]
    )


def _log_share(sums: np.ndarray, right: int) -> float:
    top = sums.max()
    return float(sums[right] - top - np.log(np.exp(sums - top).sum()))
