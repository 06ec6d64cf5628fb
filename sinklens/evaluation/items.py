"""One question of a task, and what makes two of them the same."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from sinklens.inputs.spec import Visual


@dataclass(frozen=True, eq=False)
class Item:
    """One question. Tasks use the fields they need.

    Attributes:
        id: Where it came from, for instance `questions.jsonl:17`.
        prompt: The text the model reads (for perplexity: all of it), or its token ids.
        choices: Answers to choose from.
        answer: The right one: an index into `choices`, or for yes/no questions and labels its text.
        objects: What a caption may name truthfully.
        reference: For a scorer of free answers.
        image: The picture, as the user gave it: a path, an array or a PIL image.
        visual: The picture as the model's processor made it; for items that are made with their inputs.
        group: What the item is about, for instance a label; splits keep its shares.
    """

    id: str
    prompt: str | tuple[int, ...]
    choices: tuple[str, ...] = ()
    answer: int | str | None = None
    objects: tuple[str, ...] = ()
    reference: str = ""
    image: Any = None
    visual: Visual | None = None
    group: str = ""

    @property
    def digest(self) -> str:
        """Of what the model is asked, not of the answer: a question with another answer is still the same question.

        Runs of white space count as one space.
        """
        prompt = " ".join(self.prompt.split()) if isinstance(self.prompt, str) else list(self.prompt)
        asked = json.dumps([prompt, list(self.choices)], ensure_ascii=False)
        digest = hashlib.sha256(asked.encode())
        digest.update(_picture(self))
        return digest.hexdigest()[:16]


def _picture(item: Item) -> bytes:
    if item.visual is not None:
        found = hashlib.sha256()
        for name, value in sorted(item.visual.inputs.items()):
            found.update(name.encode())
            found.update(np.ascontiguousarray(value.detach().float().cpu().numpy()).tobytes())
        return found.digest()
    if item.image is None:
        return b""
    if isinstance(item.image, str):
        from pathlib import Path

        path = Path(item.image)
        return hashlib.sha256(path.read_bytes() if path.is_file() else item.image.encode()).digest()
    return hashlib.sha256(np.ascontiguousarray(np.asarray(item.image)).tobytes()).digest()
