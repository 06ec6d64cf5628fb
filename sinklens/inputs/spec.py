"""What is fed in, after tokenisation: the contract between inputs and tracers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .spans import ModalitySpans

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Visual:
    """The pictures of one prompt, as the model's processor made them.

    Attributes:
        spans: What each token is, and where in its picture.
        inputs: What the model's forward needs besides `input_ids` and `attention_mask`, for this prompt alone
            (`pixel_values`, `image_grid_thw`, `token_type_ids`, ...). Inputs per token are `[1, token]`.
        thumbnails: Each picture, small, RGB, for reports.
        objects: Per token the part of its cell that shows an object, by the masks of the pictures; NaN where there is
            no mask, for tokens that are no part of a picture, and for cells outside theirs. None without any mask.
        question, answer: What is asked, and what is known to be right; `answer` is not fed unless the text has it.
        painted: `painted(picture, box)` gives `inputs` again with that box of the picture inverted (left, top, right,
            bottom, in pixels of the original). None where the pictures are not at hand any more.
    """

    spans: ModalitySpans
    inputs: Mapping[str, Tensor]
    thumbnails: tuple[np.ndarray, ...] = ()
    objects: np.ndarray | None = None
    question: str | None = None
    answer: str | None = None
    painted: Callable[[int, tuple[int, int, int, int]], Mapping[str, Tensor]] | None = None


@dataclass(frozen=True)
class Prompt:
    """One tokenised prompt, without padding.

    Attributes:
        index: Its place in the set; the key under which its results are merged.
        token_ids: As the model sees them, BOS included if one was added.
        pieces: One display string per token (may hold any text, `<script>` too; escape it when shown).
        source: Where it came from: `corpus:mixed#3`, `data.jsonl:17`.
        domain: `prose`, `code`, `mathematics`, `dialogue`, ... or "".
        visual: Its pictures; None for text alone.
    """

    index: int
    token_ids: tuple[int, ...]
    pieces: tuple[str, ...]
    source: str
    domain: str = ""
    visual: Visual | None = None

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True)
class PromptSet:
    """Prompts and how they were made; `description` goes into the manifest as it is.

    `description` has: `source, n_prompts, n_tokens, shortest, longest, domains, seq_len, min_tokens, truncated,
    dropped_short, packed, leftover_tokens, seed, bos, bos_added, first_tokens, chat_template, tokenizer, sha256`
    and `warnings` (sentences that change how numbers are read).
    """

    prompts: tuple[Prompt, ...]
    description: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.prompts)
