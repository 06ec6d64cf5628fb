"""How far two models' predictions are apart, and how well they predict, per prompt."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

ROWS = 2048
"""Log-probabilities of this many tokens are alive at a time: large vocabularies make them large."""


def divergence(base: Float[Tensor, "token vocab"], edited: Float[Tensor, "token vocab"]) -> float:
    """Mean over tokens of KL(base || edited) of the next-token distributions, in nats. All given tokens count."""
    total = 0.0
    for rows in _chunks(len(base)):
        p, q = _log_probabilities(base[rows]), _log_probabilities(edited[rows])
        # Tokens that both give no probability at all (-inf logits) add nothing.
        terms = torch.where(p.isneginf(), torch.zeros_like(p), p.exp() * (p - q))
        total += float(terms.sum(-1).double().sum())
    return total / len(base)


def next_token_loss(logits: Float[Tensor, "token vocab"], ids: Int[Tensor, " token"]) -> float:
    """Mean cross-entropy of each token after the first given those before it, in nats per token.

    Returns:
        NaN for a prompt of one token.
    """
    if len(ids) < 2:
        return float("nan")
    total = 0.0
    for rows in _chunks(len(ids) - 1):
        chosen = ids[rows.start + 1 : rows.stop + 1, None].to(logits.device)
        total -= float(_log_probabilities(logits[rows]).gather(-1, chosen).double().sum())
    return total / (len(ids) - 1)


def _log_probabilities(logits: Tensor) -> Tensor:
    return torch.log_softmax(logits.float(), dim=-1)


def _chunks(length: int) -> Iterator[slice]:
    for start in range(0, length, ROWS):
        yield slice(start, min(start + ROWS, length))
