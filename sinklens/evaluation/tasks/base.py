"""What a task is: items, how they are asked, and the metrics that come of the answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float

from sinklens.core.errors import DataError, UsageError
from sinklens.core.registry import Registry
from sinklens.inputs.encode import make_encoder
from sinklens.models.spec import OpenedModel

from ..items import Item
from ..metrics import Metric
from ..running import Progress, Question
from ..splits import CalibrationSplit, ReportSplit, split_items


@dataclass(frozen=True)
class Answers:
    """What a model answered.

    Attributes:
        columns: Numbers per item, from which metrics are made.
        answers: What it said, per item, for reading.
        entropy: Mean next-token entropy per item, nats.
        finer: Per item, more is better: decides between two changes whose metric is the same.
        tokens: Tokens of the questions.
    """

    columns: Mapping[str, Float[np.ndarray, " item"]]
    answers: tuple[str, ...]
    entropy: Float[np.ndarray, " item"]
    finer: Float[np.ndarray, " item"]
    tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """Base of all tasks.

    Class attributes: `kind` (registry key), `metrics` (the first is the one a verdict rests on). The docstring's first
    line says what is asked.

    Args:
        name: How results call it.
        items: The questions.
        chat_template: Whether prompts go through the tokenizer's chat template, as a user's message.
    """

    name: str
    items: tuple[Item, ...] = field(repr=False)
    chat_template: bool = False

    kind: ClassVar[str]

    def __post_init__(self) -> None:
        object.__setattr__(self, "items", tuple(self.items))
        if not self.items:
            raise DataError(f"The task {self.name!r} has no item.")
        for item in self.items:
            self.check_item(item)

    @property
    @abstractmethod
    def metrics(self) -> tuple[Metric, ...]:
        """What comes of the answers; the primary one first."""

    @abstractmethod
    def ask(self, opened: OpenedModel, items: Sequence[Item], progress: Progress | None = None) -> Answers:
        """Put the questions to the model as it is now."""

    @abstractmethod
    def tokens(self, opened: OpenedModel, items: Sequence[Item]) -> int:
        """Tokens that one round of asking runs through the model, about."""

    def probes(self, opened: OpenedModel, items: Sequence[Item]) -> list[Question]:
        """Contexts of items, on which predictions of two models can be compared, and which predictions count."""
        return Reader(opened, chat_template=self.chat_template).contexts(items)

    def check_item(self, item: Item) -> None:
        """Refuse an item that cannot be asked."""
        needs(item, prompt=lambda item: bool(item.prompt))

    @property
    def classes(self) -> tuple[str, ...]:
        """What answers stand for, by their number, of tasks whose items all choose among the same few."""
        return ()

    def check_part(self, items: Sequence[Item], what: str) -> None:
        """Refuse a part of the items in which only one class occurs.

        Raises:
            DataError: Naming the part, `what`, and what it could not show.
        """
        if self.classes:
            refuse_one_class(self.name, items, self.classes, f"item of the {what}")

    @property
    def primary(self) -> Metric:
        return self.metrics[0]

    @property
    def settings(self) -> dict[str, Any]:
        """Everything but the items, for manifests."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "items"}

    def describe(self) -> dict[str, Any]:
        settings = {key: value for key, value in self.settings.items() if not callable(value)}
        return {"kind": self.kind, "items": len(self.items), **settings}

    def split(
        self, *, calibration: int | float = 0.4, report: int | None = None, seed: int = 0
    ) -> tuple[CalibrationSplit, ReportSplit]:
        """Draw what to choose on and what to report; see `split_items`."""
        return split_items(self.name, self.items, calibration=calibration, report=report, seed=seed)

    def everything(self) -> ReportSplit:
        """All items to report on, for changes that nobody calibrates."""
        return ReportSplit(self.name, self.items)


registry: Registry[type[Task]] = Registry("kind of task", "sinklens ls tasks")


class Reader:
    """Texts to token ids and back, for one round of asking: what is read twice is tokenised once."""

    def __init__(self, opened: OpenedModel, *, chat_template: bool = False) -> None:
        self.opened, self.chat_template = opened, chat_template
        self._known: dict[str, tuple[int, ...]] = {}

    @cached_property
    def prefix(self) -> tuple[int, ...]:
        """What the tokenizer puts before a text (BOS)."""
        return make_encoder(self.opened.tokenizer, "auto", False).prefix if self.opened.tokenizer else ()

    @cached_property
    def _processor(self) -> Any:
        from ..pictures import task_processor

        return task_processor(self.opened)

    def context(self, item: Item) -> Question:
        """The prompt of an item as token ids, its picture included."""
        if item.image is not None and item.visual is None:
            from ..pictures import question_with_picture

            return question_with_picture(self.opened, self._processor, item, chat_template=self.chat_template)
        if not isinstance(item.prompt, str):
            return Question(item.prompt, visual=item.visual)
        if self.chat_template:
            return Question(self._templated(item.prompt), visual=item.visual)
        return Question((*self.prefix, *self.bare(item.prompt)), visual=item.visual)

    def contexts(self, items: Sequence[Item]) -> list[Question]:
        return [self.context(item) for item in items]

    def bare(self, text: str) -> tuple[int, ...]:
        """Token ids of a text alone, without anything that tokenizers put around it."""
        if text not in self._known:
            ids = self._tokenizer()(text, add_special_tokens=False, verbose=False)["input_ids"]
            self._known[text] = tuple(ids)
        return self._known[text]

    def _templated(self, text: str) -> tuple[int, ...]:
        tokenizer = self._tokenizer()
        if not getattr(tokenizer, "chat_template", None):
            raise DataError("This tokenizer has no chat template.", hint="Ask without chat_template.")
        message = [{"role": "user", "content": text}]
        return self.bare(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))

    def text(self, ids: Sequence[int]) -> str:
        """Text of generated tokens, special ones left out."""
        return str(self._tokenizer().decode(list(ids), skip_special_tokens=True))

    def _tokenizer(self) -> Any:
        if self.opened.tokenizer is None:
            raise DataError(
                "The questions or answers are text, but the model came without a tokenizer.",
                hint="Give tokenizer=...",
            )
        return self.opened.tokenizer


def needs(item: Item, **wanted: Callable[[Item], bool]) -> None:
    """Refuse an item without what a task asks for.

    Raises:
        DataError: Naming the item and the field.
    """
    for name, holds in wanted.items():
        if not holds(item):
            raise DataError(f"{item.id}: {name.replace('_', ' ')} is missing or cannot be used.")


def refuse_one_class(name: str, items: Sequence[Item], words: Sequence[str], what: str = "item") -> None:
    """Refuse items whose right answer is the same everywhere.

    Args:
        words: The classes, by `answer`.

    Raises:
        DataError: With what such items cannot show.
    """
    used = {int(item.answer or 0) for item in items}
    if len(used) > 1:
        return
    only = words[used.pop()]
    raise DataError(
        f"{name}: every {what} has the label {only!r}.",
        detail=f"Always saying {only!r} would be right, so accuracy could not tell a mitigation that helps from one "
        "that shifts all answers towards it.",
        hint="Give items of at least two classes.",
    )


def one_of(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise UsageError(f"{name} must be {' or '.join(known)}, got {value!r}.")
