"""How far a model reaches: the longest prompt and the tokens that it has embeddings for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from sinklens.core.errors import DataError
from sinklens.inputs.spans import Kind
from sinklens.inputs.spec import Prompt, PromptSet
from sinklens.models.spec import OpenedModel

DEFAULT_SEQ_LEN = 512
RESERVED_POSITIONS = 2
"""RoBERTa and OPT keep the first two entries of their position table for padding."""


def refuse_beyond_reach(opened: OpenedModel, prompts: PromptSet) -> None:
    """Refuse prompts with tokens or positions that the model has no embedding for, before it fails on them."""
    module: Any = opened.plain
    tokens = module.get_input_embeddings() if hasattr(module, "get_input_embeddings") else None
    largest = max(max(looked_up(prompt)) for prompt in prompts.prompts)
    if isinstance(tokens, nn.Embedding) and largest >= tokens.num_embeddings:
        raise DataError(
            f"The prompts have token id {largest}, but the model has embeddings for {tokens.num_embeddings} tokens.",
            detail="The tokenizer does not belong to this model, or the token ids do not.",
            hint="Give the model's own tokenizer.",
        )
    limit = position_limit(opened.plain.config)
    longest = max(len(prompt) for prompt in prompts.prompts)
    if limit is not None and longest > limit and _learns_positions(opened.plain, tokens, limit):
        raise DataError(
            f"The longest prompt has {longest} tokens; this model has learned positions for {limit}.",
            hint=f"Cut the prompts: --seq-len {limit - RESERVED_POSITIONS}",
        )


def looked_up(prompt: Prompt) -> Sequence[int]:
    """The ids that a model looks up: those that stand for pictures are replaced, and may lie beyond its table."""
    if prompt.visual is None:
        return prompt.token_ids
    pairs = zip(prompt.token_ids, prompt.visual.spans.kinds, strict=True)
    return [token_id for token_id, kind in pairs if kind not in (Kind.VISUAL, Kind.DELIMITER)] or [0]


def _learns_positions(model: nn.Module, tokens: Any, limit: int) -> bool:
    """Whether the model looks positions up in a table (rotary models compute them and go on beyond their limit)."""
    tables = (m for m in model.modules() if isinstance(m, nn.Embedding) and m is not tokens)
    return any(limit <= table.num_embeddings <= limit + RESERVED_POSITIONS for table in tables)


def position_limit(config: Any) -> int | None:
    """The longest input the config allows, None if it names none."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    return limit if isinstance(limit, int) and limit > RESERVED_POSITIONS else None


def longest_input(opened: OpenedModel) -> int | None:
    """The longest prompt the model is made for, None if its config names none."""
    module: Any = opened.plain
    limit = position_limit(module.config)
    tokens = module.get_input_embeddings() if hasattr(module, "get_input_embeddings") else None
    learned = limit is not None and _learns_positions(module, tokens, limit)
    return limit - RESERVED_POSITIONS if limit is not None and learned else limit


def default_length(config: Any) -> int:
    """The default sequence length, or the longest the model's learned positions allow."""
    limit = position_limit(config)
    return DEFAULT_SEQ_LEN if limit is None else min(DEFAULT_SEQ_LEN, limit - RESERVED_POSITIONS)
