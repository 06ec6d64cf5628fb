"""What is fed in, after tokenisation: the contract between inputs and tracers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Prompt:
    """One tokenised prompt, without padding.

    Attributes:
        index: Its place in the set; the key under which its results are merged.
        token_ids: As the model sees them, BOS included if one was added.
        pieces: One display string per token (may hold any text, `<script>` too; escape it when shown).
        source: Where it came from: `corpus:mixed#3`, `data.jsonl:17`.
        domain: `prose`, `code`, `mathematics`, `dialogue`, ... or "".
    """

    index: int
    token_ids: tuple[int, ...]
    pieces: tuple[str, ...]
    source: str
    domain: str = ""

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
