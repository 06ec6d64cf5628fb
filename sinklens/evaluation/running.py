"""Asking a causal language model: how likely continuations are, what it writes, how well it predicts a text.

Continuations are read as a user of the model would get them: the context first, into a cache, the continuation from
it. A mitigation that looks at the prompt therefore sees the prompt and not the answers it is compared on.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sinklens.core.errors import DataError, ModelError, ResourceError
from sinklens.inputs.spec import Prompt, Visual
from sinklens.models.spec import OpenedModel
from sinklens.tracers.batch import Batch, collate, forward

from .predictions import ROWS

BATCH_TOKENS, BATCH_ITEMS = 4096, 16
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Question:
    """A context, and the continuations whose likelihood is asked for.

    Attributes:
        evaluated: Place of the context from which on the predictions of the next token count; None for the last alone.
    """

    context: tuple[int, ...]
    continuations: tuple[tuple[int, ...], ...] = ()
    visual: Visual | None = None
    evaluated: int | None = None

    @property
    def first_evaluated(self) -> int:
        return len(self.context) - 1 if self.evaluated is None else self.evaluated


@dataclass(frozen=True)
class Likelihoods:
    """Of one question.

    Attributes:
        sums: Log-probability of each continuation given the context, nats.
        entropy: Of the next-token distribution after the context, nats.
    """

    sums: Float[np.ndarray, " continuation"]
    entropy: float


@dataclass(frozen=True)
class Written:
    """What the model wrote after one context, up to its end token, and its mean next-token entropy meanwhile."""

    token_ids: tuple[int, ...]
    entropy: float


def likelihoods(
    opened: OpenedModel, questions: Sequence[Question], progress: Progress | None = None
) -> list[Likelihoods]:
    """Log-probabilities of all continuations. Contexts are read once, however many continuations they have."""
    require_speaker(opened)
    found: list[Likelihoods | None] = [None] * len(questions)
    done = 0
    for group in _batches([_prompt(i, q.context, q.visual) for i, q in enumerate(questions)]):
        asked = [questions[prompt.index] for prompt in group]
        for prompt, answer in zip(group, _likelihoods(opened, group, asked), strict=True):
            found[prompt.index] = answer
        done += len(group)
        if progress:
            progress(done, len(questions))
    return [answer for answer in found if answer is not None]


def _likelihoods(opened: OpenedModel, group: list[Prompt], asked: list[Question]) -> list[Likelihoods]:
    batch = _left(opened, group)
    longest = max((len(c) for q in asked for c in q.continuations), default=1)
    with torch.no_grad(), _memory(len(group), batch):
        output = opened.module(**batch.inputs, use_cache=longest > 1, **_last_only(opened))
        first = torch.log_softmax(output.logits[:, -1].float(), -1)
        cache = getattr(output, "past_key_values", None)
        if longest > 1 and cache is None:
            raise ModelError(
                f"{type(opened.module).__name__} keeps no cache, so continuations cannot be scored."
            )
        sums = [np.zeros(len(q.continuations)) for q in asked]
        for place in range(max(len(q.continuations) for q in asked)):
            rows = [q.continuations[place] if place < len(q.continuations) else () for q in asked]
            scores = _continued(opened, batch, first, cache, rows)
            for row, (kept, score) in enumerate(zip(sums, scores, strict=True)):
                if rows[row]:
                    kept[place] = score
    entropy = -(first.exp() * first.clamp_min(torch.finfo(first.dtype).min)).sum(-1)
    return [Likelihoods(kept, float(e)) for kept, e in zip(sums, entropy, strict=True)]


def _continued(
    opened: OpenedModel, batch: Batch, first: Tensor, cache: Any, rows: list[tuple[int, ...]]
) -> list[float]:
    """Log-probability of one continuation per row of the batch."""
    scores = [float(first[i, row[0]]) if row else 0.0 for i, row in enumerate(rows)]
    width = max(len(row) for row in rows) - 1
    if width < 1:
        return scores
    assert batch.valid is not None
    device = first.device
    ids = torch.zeros(len(rows), width, dtype=torch.long, device=device)
    for i, row in enumerate(rows):
        ids[i, : max(0, len(row) - 1)] = torch.tensor(row[:-1], dtype=torch.long, device=device)
    # Padding of shorter rows stands on the right, where nothing that is read looks.
    mask = torch.cat([batch.valid.long(), torch.ones_like(ids)], 1)
    positions = batch.valid.long().sum(1, keepdim=True) + torch.arange(width, device=device)
    given: dict[str, Any] = {
        "input_ids": ids,
        "attention_mask": mask,
        "past_key_values": copy.deepcopy(cache),
    }
    if batch.prompts[0].visual is None and "position_ids" in _accepted(opened):
        given["position_ids"] = positions
    logs = torch.log_softmax(opened.module(**given, use_cache=True).logits.float(), -1)
    for i, row in enumerate(rows):
        later = torch.tensor(row[1:], dtype=torch.long, device=device)
        scores[i] += float(logs[i, : len(later)].gather(-1, later[:, None]).double().sum())
    return scores


def text_losses(
    opened: OpenedModel, windows: Sequence[tuple[tuple[int, ...], int]], progress: Progress | None = None
) -> list[tuple[float, int, float]]:
    """How well texts are predicted.

    Args:
        windows: Token ids, and the first place whose token counts (at least 1: the first token has no context).

    Returns:
        Per window the sum of the losses of the counted tokens in nats, how many they are, and the sum of the
        entropies of the distributions that predicted them.
    """
    require_speaker(opened)
    found: dict[int, tuple[float, int, float]] = {}
    for group in _batches([_prompt(i, ids, None) for i, (ids, _) in enumerate(windows)]):
        batch = collate(group, pad_id=_pad(opened), device=_device(opened))
        with torch.no_grad(), _memory(len(group), batch):
            logits = forward(opened.module, batch).logits
            for row, prompt in enumerate(group):
                start = windows[prompt.index][1]
                found[prompt.index] = _losses(logits[row, : len(prompt)], prompt.token_ids, start)
        if progress:
            progress(len(found), len(windows))
    return [found[i] for i in range(len(windows))]


def _losses(logits: Tensor, ids: tuple[int, ...], start: int) -> tuple[float, int, float]:
    loss, entropy = 0.0, 0.0
    wanted = torch.tensor(ids, device=logits.device)
    for low in range(start, len(ids), ROWS):
        high = min(low + ROWS, len(ids))
        logs = torch.log_softmax(logits[low - 1 : high - 1].float(), -1)
        loss -= float(logs.gather(-1, wanted[low:high, None]).double().sum())
        entropy -= float((logs.exp() * logs.clamp_min(torch.finfo(logs.dtype).min)).sum(-1).double().sum())
    return loss, max(0, len(ids) - start), entropy


def written(
    opened: OpenedModel,
    contexts: Sequence[Question],
    *,
    max_new_tokens: int,
    progress: Progress | None = None,
) -> list[Written]:
    """Greedy continuations."""
    require_speaker(opened)
    found: list[Written | None] = [None] * len(contexts)
    done = 0
    for group in _batches([_prompt(i, q.context, q.visual) for i, q in enumerate(contexts)]):
        for prompt, answer in zip(group, _written(opened, group, max_new_tokens), strict=True):
            found[prompt.index] = answer
        done += len(group)
        if progress:
            progress(done, len(contexts))
    return [answer for answer in found if answer is not None]


def _written(opened: OpenedModel, group: list[Prompt], most: int) -> list[Written]:
    module: Any = opened.module
    if not hasattr(module, "generate"):
        raise ModelError(f"{type(module).__name__} cannot generate.", hint="Score by likelihood instead.")
    batch = _left(opened, group)
    ends = end_tokens(opened)
    with torch.no_grad(), _memory(len(group), batch):
        output = module.generate(
            **{key: value for key, value in batch.inputs.items() if key != "position_ids"},
            max_new_tokens=most,
            do_sample=False,
            num_beams=1,
            pad_token_id=_pad(opened),
            return_dict_in_generate=True,
            output_logits=True,
        )
    steps = [torch.log_softmax(step.float(), -1) for step in output.logits]
    width = batch.inputs["input_ids"].shape[1]
    found = []
    for row in range(len(group)):
        new = output.sequences[row, width:].tolist()
        kept = next((i for i, token in enumerate(new) if token in ends), len(new))
        used = steps[: min(kept + 1, len(steps))]
        entropies = [float(-(s[row].exp() * s[row].clamp_min(torch.finfo(s.dtype).min)).sum()) for s in used]
        found.append(Written(tuple(new[:kept]), float(np.mean(entropies)) if entropies else float("nan")))
    return found


def end_tokens(opened: OpenedModel) -> set[int]:
    """Tokens that end an answer."""
    module: Any = opened.module
    given = [getattr(getattr(module, "generation_config", None), "eos_token_id", None)]
    given.append(getattr(opened.tokenizer, "eos_token_id", None))
    flat = [i for item in given for i in (item if isinstance(item, list | tuple) else [item])]
    return {int(i) for i in flat if i is not None}


def require_speaker(opened: OpenedModel) -> None:
    """Refuse a model that predicts no next token.

    Raises:
        ModelError: It is bidirectional, or has no language head.
    """
    module: Any = opened.module
    head = module.get_output_embeddings() if hasattr(module, "get_output_embeddings") else None
    if opened.anatomy.main.causal and head is not None:
        return
    reason = "its attention is not causal" if head is not None else "it has no language head"
    raise ModelError(
        f"{type(module).__name__} predicts no next token ({reason}), so no task can be asked of it.",
        hint="Open it as a causal language model.",
    )


def _prompt(index: int, ids: tuple[int, ...], visual: Visual | None) -> Prompt:
    if not ids:
        raise DataError("A question has no token at all.", hint="Give it a text, or use a model with a BOS.")
    return Prompt(index, ids, (), "", visual=visual)


def _batches(prompts: Sequence[Prompt]) -> list[list[Prompt]]:
    from sinklens.tracers.executor import partition

    return partition(prompts, most=BATCH_ITEMS, tokens=BATCH_TOKENS)


def _left(opened: OpenedModel, group: list[Prompt]) -> Batch:
    batch = collate(group, pad_id=_pad(opened), side="left", device=_device(opened))
    if "position_ids" in batch.inputs and "position_ids" not in _accepted(opened):
        del batch.inputs["position_ids"]
    return batch


def _accepted(opened: OpenedModel) -> set[str]:
    import inspect

    return set(inspect.signature(opened.module.forward).parameters)


def _last_only(opened: OpenedModel) -> dict[str, int]:
    return {"logits_to_keep": 1} if "logits_to_keep" in _accepted(opened) else {}


def _pad(opened: OpenedModel) -> int:
    return int(getattr(opened.tokenizer, "pad_token_id", None) or 0)


def _device(opened: OpenedModel) -> torch.device:
    return next(opened.module.parameters()).device


class _memory:
    """Running out of memory, said in words."""

    def __init__(self, count: int, batch: Batch) -> None:
        self.count, self.width = count, batch.inputs["input_ids"].shape[1]

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: Any, _trace: Any) -> None:
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
            raise ResourceError(
                f"Out of memory with {self.count} questions of up to {self.width} tokens.",
                hint="Use shorter items or windows, or --device-map auto.",
            ) from error
