"""Perplexity: how well a text is predicted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sinklens.core.errors import UsageError
from sinklens.models.spec import OpenedModel

from ..items import Item
from ..metrics import Metric
from ..running import Progress, Question, text_losses
from .base import Answers, Reader, Task, needs, registry


@registry.register("perplexity")
@dataclass(frozen=True, kw_only=True)
class Perplexity(Task):
    """Texts, predicted token by token; the exponential of the mean loss.

    How it is computed: a text longer than `window` is read in windows that begin `stride` tokens apart; each begins
    with what the tokenizer puts before a text. Every token counts once: where windows overlap, the later one has it
    as context only. With `stride` equal to `window` they do not overlap (fixed windows), and tokens at their
    beginnings have little context. The first token counts only if something (a BOS) stands before it. Losses are
    summed over all tokens before they are divided, so long texts weigh more.

    Args:
        window: Most tokens of a pass, BOS included; by default 1024 or the model's limit.
        stride: Tokens between the beginnings of windows; by default half a window (sliding).
    """

    window: int = 1024
    stride: int | None = None

    kind = "perplexity"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 2:
            raise UsageError(f"window must be at least 2, got {self.window}.")
        if self.stride is not None and not 1 <= self.stride <= self.window:
            raise UsageError(f"stride must be from 1 to window ({self.window}), got {self.stride}.")

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return (
            Metric(
                "perplexity",
                "perplexity",
                "exp of nats per token",
                "nats",
                "tokens",
                better=-1,
                role="primary",
                exponential=True,
            ),
            Metric("loss", "loss", "nats per token", "nats", "tokens", better=-1),
            Metric("entropy", "next-token entropy", "nats per token", "entropy", "tokens", better=0),
        )

    def check_item(self, item: Item) -> None:
        needs(item, text=lambda item: bool(item.prompt))

    def ask(self, opened: OpenedModel, items: Sequence[Item], progress: Progress | None = None) -> Answers:
        windows, owner = self._all_windows(opened, items)
        sums = np.zeros((3, len(items)))
        for place, found in zip(owner, text_losses(opened, windows, progress), strict=True):
            sums[:, place] += found
        nats, tokens, entropy = sums
        mean = -nats / np.maximum(tokens, 1)
        return Answers(
            {"nats": nats, "tokens": tokens, "entropy": entropy},
            tuple(f"{-m:.3f} nats" for m in mean),
            entropy / np.maximum(tokens, 1),
            mean,
            sum(len(ids) for ids, _ in windows),
        )

    def probes(self, opened: OpenedModel, items: Sequence[Item]) -> list[Question]:
        windows = self._all_windows(opened, items)[0]
        return [Question(ids[:-1], evaluated=first - 1) for ids, first in windows]

    def _all_windows(
        self, opened: OpenedModel, items: Sequence[Item]
    ) -> tuple[list[tuple[tuple[int, ...], int]], list[int]]:
        """Windows of all items, and the item each belongs to."""
        reader = Reader(opened)
        windows, owner = [], []
        for place, item in enumerate(items):
            text = isinstance(item.prompt, str)
            body = reader.bare(item.prompt) if isinstance(item.prompt, str) else item.prompt
            prefix = reader.prefix if text else ()
            for window in text_windows(body, prefix, self.window, self.stride or self.window // 2):
                windows.append(window)
                owner.append(place)
        return windows, owner

    def tokens(self, opened: OpenedModel, items: Sequence[Item]) -> int:
        return sum(len(ids) for ids, _ in self._all_windows(opened, items)[0])


def text_windows(
    body: tuple[int, ...], prefix: tuple[int, ...], window: int, stride: int
) -> list[tuple[tuple[int, ...], int]]:
    """Windows over a text, each with `prefix` in front, and the first place in each that counts."""
    room, lead = window - len(prefix), len(prefix)
    if room < 2:
        raise UsageError(f"A window of {window} has no room beside the {lead} tokens put before a text.")
    stride = min(stride, room)
    found, counted = [], 0 if lead else 1
    for start in range(0, max(1, len(body)), stride):
        part = body[start : start + room]
        # A token at the beginning of a window without a prefix has nothing before it.
        first = max(counted - start, 0 if lead else 1)
        if first < len(part):
            found.append(((*prefix, *part), lead + first))
            counted = start + len(part)
        if start + room >= len(body):
            break
    return found
