"""Captions held against lists of objects: what is named that is not there, and what is there and not named."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from sinklens.core.errors import DataError
from sinklens.models.spec import OpenedModel

from ..items import Item
from ..metrics import Metric
from ..running import Progress, written
from .base import Answers, Reader, Task, needs, registry
from .classification import WRITING_ENTROPY


@registry.register("captions")
@dataclass(frozen=True, kw_only=True)
class Captions(Task):
    """Descriptions of pictures of which the objects are known: CHAIR, coverage and length.

    How it is computed: objects are looked for in what the model writes, as whole words, longest names first, an
    English plural included; `synonyms` count as the object they stand for. CHAIR_i is mentions of objects that are not
    in the picture over all mentions, CHAIR_s captions with at least one such mention over captions, coverage the
    picture's objects that are mentioned over all of them. A shorter caption has less to be wrong about, so coverage
    must not fall and length is shown. Only objects of `vocabulary` can be hallucinated; by default these are the
    objects of all items.

    Args:
        vocabulary: Objects that can be named.
        synonyms: Other words for an object, word to object.
        max_new_tokens: Most tokens written.
    """

    vocabulary: tuple[str, ...] = ()
    synonyms: Mapping[str, str] = field(default_factory=dict)
    max_new_tokens: int = 64

    kind = "captions"

    def __post_init__(self) -> None:
        super().__post_init__()
        known = self.vocabulary or tuple(sorted({name for item in self.items for name in item.objects}))
        object.__setattr__(self, "vocabulary", tuple(known))
        unknown = [(item.id, name) for item in self.items for name in item.objects if name not in known]
        if unknown:
            raise DataError(f"{unknown[0][0]}: the object {unknown[0][1]!r} is not in the vocabulary.")
        strange = [word for word, name in self.synonyms.items() if name not in known]
        if strange:
            raise DataError(
                f"{self.name}: the synonym {strange[0]!r} stands for {self.synonyms[strange[0]]!r}, "
                "which is not in the vocabulary."
            )
        if len(known) < 2:
            raise DataError(f"{self.name}: with one object in all nothing could be hallucinated.")

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return (
            Metric(
                "chair_i",
                "CHAIR_i",
                "share of mentions",
                "hallucinated",
                "mentions",
                better=-1,
                role="primary",
            ),
            Metric("chair_s", "CHAIR_s", "share of captions", "any_hallucinated", better=-1, binary=True),
            Metric(
                "coverage", "coverage of the objects", "share of objects", "covered", "objects", role="guard"
            ),
            Metric("length", "length", "tokens per caption", "length", better=0),
            WRITING_ENTROPY,
        )

    def check_item(self, item: Item) -> None:
        needs(item, prompt=lambda item: bool(item.prompt), objects=lambda item: bool(item.objects))

    def ask(self, opened: OpenedModel, items: Sequence[Item], progress: Progress | None = None) -> Answers:
        reader = Reader(opened, chat_template=self.chat_template)
        asked = reader.contexts(items)
        found = written(opened, asked, max_new_tokens=self.max_new_tokens, progress=progress)
        texts = [reader.text(answer.token_ids) for answer in found]
        named = [self.mentions(text) for text in texts]
        wrong = [
            [name for name in names if name not in item.objects]
            for names, item in zip(named, items, strict=True)
        ]
        covered = [len(set(names) & set(item.objects)) for names, item in zip(named, items, strict=True)]
        entropy = np.array([answer.entropy for answer in found])
        lengths = np.array([float(len(answer.token_ids)) for answer in found])
        columns = {
            "mentions": np.array([float(len(names)) for names in named]),
            "hallucinated": np.array([float(len(names)) for names in wrong]),
            "any_hallucinated": np.array([float(bool(names)) for names in wrong]),
            "covered": np.array(covered, dtype=float),
            "objects": np.array([float(len(set(item.objects))) for item in items]),
            "length": lengths,
            "entropy": entropy,
        }
        finer = columns["covered"] / np.maximum(1, columns["objects"])
        tokens = sum(len(q.context) for q in asked) + int(lengths.sum())
        return Answers(columns, tuple(texts), entropy, finer, tokens)

    def mentions(self, text: str) -> list[str]:
        """Objects in the order they are named, each time they are."""
        table = {name.lower(): name for name in self.vocabulary}
        table |= {word.lower(): name for word, name in self.synonyms.items()}
        longest = sorted(table, key=lambda word: (-len(word), word))
        pattern = "|".join(r"\s+".join(map(re.escape, word.split())) for word in longest)
        found = re.finditer(rf"(?<!\w)({pattern})(?:e?s)?(?!\w)", text, flags=re.IGNORECASE)
        return [table[" ".join(match[1].lower().split())] for match in found]

    def tokens(self, opened: OpenedModel, items: Sequence[Item]) -> int:
        asked = Reader(opened, chat_template=self.chat_template).contexts(items)
        return sum(len(q.context) + self.max_new_tokens for q in asked)
