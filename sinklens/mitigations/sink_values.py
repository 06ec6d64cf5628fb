"""A learned sink, or a key and value bias, that takes the place of a token: its values per head, read off a model.

with learned_sink_for(opened, prompts)(opened) as effect:
    ...
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sinklens.core.errors import DataError, UsageError
from sinklens.inputs.spec import Prompt, PromptSet
from sinklens.kernels.shapes import four_axes
from sinklens.kernels.spec import AttentionCall
from sinklens.kernels.transfer import row_lse, rows_of_call
from sinklens.models.spec import OpenedModel
from sinklens.tracers.attention import AttentionTap, Site, ignore, no_statistics, sites
from sinklens.tracers.batch import Batch, collate, device_of, forward
from sinklens.tracers.executor import partition

from .kv_bias import KVBias
from .learned_sink import LearnedSink

MOST = 1.0 - 1e-6
"""Largest share of attention that a sink is asked to take: 1 would need an infinite logit."""
FAR = 40.0
"""How far below all rows, in nats, the logit of a sink lies that shall take nothing."""


def learned_sink_for(
    opened: OpenedModel, prompts: PromptSet | Iterable[Prompt], *, position: int = 0
) -> LearnedSink:
    """The learned sink that takes over the attention of a token, head by head.

    For every head it is the logit with which the mean mass on the sink, over the rows behind the token, is the mean
    mass that the token has in the model, the token's key being hidden from them. Heads that give the token nothing get
    a logit `FAR` below their rows; a share above `MOST` counts as `MOST`.

    Raises:
        DataError: No prompt is longer than `position` + 1 tokens.
    """
    tower = opened.anatomy.main
    logits = torch.zeros(len(tower.blocks), tower.heads, dtype=torch.float64)
    for layer, (rest, mass) in _gathered(opened, prompts, position, _rows_without).items():
        logits[layer] = solved(rest, mass.mean(0))
    return LearnedSink(logit=logits.tolist(), replaces=(position,))


def kv_bias_for(opened: OpenedModel, prompts: PromptSet | Iterable[Prompt], *, position: int = 0) -> KVBias:
    """The key and value bias that stands for a token: the mean of its keys and of its values over the prompts.

    In a causal model a token that always comes first has the same ones in every prompt, and the bias is exact.

    Raises:
        DataError: No prompt is longer than `position` + 1 tokens.
        UsageError: The model has layers without attention, or with heads of different widths.
    """
    found = _gathered(opened, prompts, position, _vectors)
    layers = range(len(opened.anatomy.main.blocks))
    widths = {(a.shape[1:], b.shape[1:]) for a, b in found.values()}
    if len(widths) > 1 or set(found) != set(layers):
        raise UsageError(
            "A key and value bias needs the same heads in every layer.",
            detail=f"{len(found)} of {len(layers)} layers have attention, with heads of {len(widths)} shapes.",
        )
    key, value = (torch.stack([found[layer][part].mean(0) for layer in layers]) for part in (0, 1))
    return KVBias(key=key.tolist(), value=value.tolist(), replaces=(position,))


def solved(rest: Float[Tensor, "row head"], share: Float[Tensor, " head"]) -> Float[Tensor, " head"]:
    """The logit whose mean mass beside rows with these log-sum-exps is `share`, by bisection."""
    low, high = rest.amin(0) - FAR, rest.amax(0) + FAR
    wanted = share.clamp(max=MOST)
    for _ in range(100):
        middle = (low + high) / 2
        above = torch.sigmoid(middle - rest).mean(0) > wanted
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return (low + high) / 2


Read = Callable[[AttentionCall, Bool[Tensor, "batch query"], Tensor], tuple[Tensor, Tensor]]


def _rows_without(
    call: AttentionCall, real: Bool[Tensor, "batch query"], at: Tensor
) -> tuple[Tensor, Tensor]:
    """Of the rows behind the token: log-sum-exp of all other keys, and mass on the token, `[row head]` each."""
    queries, keys = call.query.shape[2], call.key.shape[2]
    place = torch.arange(queries, device=real.device)
    hidden = (torch.arange(keys, device=real.device) == at[:, None])[:, None, None]
    others = rows_of_call(call, place)
    mask = four_axes(others.mask, queries, keys)  # pyright: ignore[reportArgumentType]
    mask = mask & ~hidden if mask.dtype == torch.bool else torch.where(hidden, float("-inf"), mask)
    rest, whole = (row_lse(one).double() for one in (replace(others, mask=mask), others))
    behind = real & (place > at[:, None])
    mass = -torch.expm1((rest - whole).clamp(max=0.0))
    return rest.transpose(1, 2)[behind], mass.transpose(1, 2)[behind]


def _vectors(call: AttentionCall, real: Bool[Tensor, "batch query"], at: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of the token, `[prompt head dim]` each."""
    row = torch.arange(len(at), device=at.device)
    return call.key[row, :, at].double(), call.value[row, :, at].double()


@dataclass
class _Gathering:
    """What attention calls say of a token, by layer."""

    read: Read
    position: int
    found: dict[int, tuple[list[Tensor], list[Tensor]]]
    batch: Batch | None = None

    def __call__(self, site: Site, call: AttentionCall, output: Tensor) -> Tensor:
        assert self.batch is not None  # set before every pass
        assert self.batch.valid is not None  # prompts of text say which tokens are real
        real = self.batch.valid
        at = ((real.long().cumsum(1) == self.position + 1) & real).int().argmax(1)
        kept = self.found.setdefault(site.layer, ([], []))
        for part, value in zip(kept, self.read(call, real, at), strict=True):
            part.append(value.cpu())
        return output


def _gathered(
    opened: OpenedModel, prompts: PromptSet | Iterable[Prompt], position: int, read: Read
) -> dict[int, tuple[Tensor, Tensor]]:
    model, tower = opened.module, opened.anatomy.main
    gathering = _Gathering(read, position, {})
    tap = AttentionTap(sites(model, tower, "attention"), no_statistics, ignore, edit=gathering)
    with tap.attached(model):
        for batch in _batches(opened, prompts, position):
            gathering.batch = batch
            forward(model, batch, logits=False)
    return {layer: (torch.cat(one), torch.cat(two)) for layer, (one, two) in gathering.found.items()}


def _batches(opened: OpenedModel, prompts: PromptSet | Iterable[Prompt], position: int) -> Iterator[Batch]:
    everything = prompts.prompts if isinstance(prompts, PromptSet) else tuple(prompts)
    long = [prompt for prompt in everything if len(prompt) > position + 1]
    if not long:
        raise DataError(f"No prompt has a token behind position {position}.", hint="Give longer prompts.")
    pad = getattr(opened.tokenizer, "pad_token_id", None) or 0
    for group in partition(long, most=16, tokens=4096):
        yield collate(group, pad_id=pad, device=device_of(opened))
