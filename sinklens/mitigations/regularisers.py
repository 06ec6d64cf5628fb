"""Losses that keep sinks from growing, as modules that a trainer adds to its own loss."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sinklens.core.errors import DataError, ModelError, UsageError
from sinklens.kernels.shapes import four_axes, visible_of
from sinklens.kernels.spec import AttentionCall
from sinklens.models.anatomy import find_anatomy
from sinklens.models.spec import Tower
from sinklens.tracers.attention import Attended, AttentionTap, Site, ignore, no_statistics, sites

from .tokens import Tokens

ROWS = 128
"""Query rows whose logits are held at a time."""


class Decorrelation(nn.Module):
    """Squared cosine between each token's state and that of the first token (Cappellazzo et al., arXiv 2510.22603).

    `mean over l = 1 ... L-1, mean over t of cos^2(h_0^l, h_t^l)`, of the L + 1 entries that transformers lists as
    `hidden_states`: the embeddings and the last entry, which is normalised, are left out. t are the tokens asked for,
    the first one never. The means over t are taken within a prompt, then over the prompts that have such a token.
    The paper multiplies it by 10000 and takes the tokens that are no part of the answer; its models are adapted by
    LoRA, and training from scratch needs far less.

    Args:
        among: `all` tokens, or those of the `prompt`, whose label is -100. Used by `Regularised`.
    """

    def __init__(self, among: Literal["all", "prompt"] = "all") -> None:
        super().__init__()
        if among not in ("all", "prompt"):
            raise UsageError(f"Decorrelation: among must be 'all' or 'prompt', got {among!r}.")
        self.among = among

    def forward(
        self,
        hidden_states: Sequence[Float[Tensor, "batch token dim"]],
        real: Bool[Tensor, "batch token"] | None = None,
        tokens: Bool[Tensor, "batch token"] | None = None,
    ) -> Float[Tensor, ""]:
        """The loss, 0 to 1.

        Args:
            hidden_states: `output.hidden_states`, embeddings first.
            real: What is not padding; all if None. The first real token of a row is its first token.
            tokens: Which tokens are held against the first; all real ones if None.

        Raises:
            DataError: No prompt has such a token.
            UsageError: Fewer than three states.
        """
        states = torch.stack(_inner(hidden_states))
        real = _real_or_all(real, states)
        first = _first(real)
        others = real if tokens is None else real & tokens
        others = others & (torch.arange(real.shape[1], device=real.device) != first[:, None])
        has = others.any(1)
        if not bool(has.any()):
            raise DataError("No prompt has a token beside its first one to hold against it.")
        start = states[:, torch.arange(len(first), device=first.device), first]
        square = torch.nn.functional.cosine_similarity(states, start[:, :, None], dim=-1).square()
        weight = (others[has] / others[has].sum(1, keepdim=True)).to(square.dtype)
        return (square[:, has] * weight).sum(-1).mean()


class MassivePenalty(nn.Module):
    """Keeps entries of the residual stream below a multiple of the median entry.

    `sum over entries of max(0, ln(|h| / (bound m)))^2`, over the tokens of a prompt divided by their number, mean over
    layers and prompts; m is the median |h| of the prompt's real tokens in that layer and takes no part in the gradient,
    so that it does not pay to raise it. Logarithms keep one entry a thousand times too large from ruling every step.
    This penalty is the project's own; layers are those of `Decorrelation`.

    Args:
        bound: Multiple of the median that costs nothing.
    """

    def __init__(self, bound: float = 20.0) -> None:
        super().__init__()
        if not (math.isfinite(bound) and bound > 0):
            raise UsageError(f"MassivePenalty: bound must be a number above 0, got {bound}.")
        self.bound = bound

    def forward(
        self,
        hidden_states: Sequence[Float[Tensor, "batch token dim"]],
        real: Bool[Tensor, "batch token"] | None = None,
        median: Float[Tensor, "layer batch"] | None = None,
    ) -> Float[Tensor, ""]:
        """The penalty; 0 where nothing exceeds the bound.

        Args:
            median: Measured if None.
        """
        states = torch.stack(_inner(hidden_states))
        real = _real_or_all(real, states)
        size = states.abs()
        if median is None:
            median = torch.stack([size[:, row, real[row]].detach().flatten(1).median(1).values
                                  for row in range(len(real))], 1)  # fmt: skip
        limit = (self.bound * median).clamp_min(torch.finfo(size.dtype).tiny)[..., None, None]
        # Below the limit the logarithm is that of 1, so that entries of 0 have a gradient of 0 and not none.
        over = torch.where(size > limit, size / limit, torch.ones_like(size)).log().square()
        return ((over.sum(-1) * real).sum(-1) / real.sum(1)).mean()


class SinkMass(nn.Module):
    """Attention that the first token gets from the tokens behind it, from queries and keys.

    `mean over heads and real queries of max(0, A[q, first] - allowed)` within a prompt, then over prompts. Logits are
    made for a block of rows at a time and made again for the gradient, so memory grows with the length and not with
    its square. The first token is the first real one. This regulariser is the project's own.

    Args:
        allowed: Mass that costs nothing.
    """

    def __init__(self, allowed: float = 0.0) -> None:
        super().__init__()
        if not 0 <= allowed < 1:
            raise UsageError(f"SinkMass: allowed must be at least 0 and below 1, got {allowed}.")
        self.allowed = allowed

    def forward(
        self,
        query: Float[Tensor, "batch head token dim"],
        key: Float[Tensor, "batch kv_head token dim"],
        real: Bool[Tensor, "batch token"] | None = None,
        *,
        scale: float | None = None,
    ) -> Float[Tensor, ""]:
        """The loss of one layer with plain causal attention, 0 to 1.

        Args:
            query, key: After rotary embedding.
            scale: Of the logits, `dim ** -0.5` if None.
        """
        mask = None
        if real is not None:
            count = real.shape[1]
            mask = real[:, None, None] & torch.ones(count, count, dtype=torch.bool, device=real.device).tril()
        call = AttentionCall(query, key, key, query.shape[-1] ** -0.5 if scale is None else scale, mask=mask)
        return self.of_call(call, real)

    def of_call(
        self, call: AttentionCall, real: Bool[Tensor, "batch token"] | None = None
    ) -> Float[Tensor, ""]:
        """The same for any attention: masks, windows, soft-capping, learned sinks."""
        batch, _, queries, _ = call.query.shape
        if call.key.shape[2] != queries:
            raise DataError("Sink mass is of whole sequences; these queries come with keys from a cache.")
        if real is None:
            real = torch.ones(batch, queries, dtype=torch.bool, device=call.query.device)
        first = _first(real)
        counted = real & (torch.arange(queries, device=real.device) > first[:, None])
        has = counted.any(1)
        if not bool(has.any()):
            raise DataError("No prompt has a token behind its first one that could attend to it.")
        over = (column_mass(call, first) - self.allowed).clamp_min(0).mean(1)
        weight = (counted / counted.sum(1, keepdim=True).clamp_min(1)).to(over.dtype)
        return (over * weight).sum(1)[has].mean()


def column_mass(call: AttentionCall, column: Int[Tensor, " batch"]) -> Float[Tensor, "batch head query"]:
    """What each row gives to one key of its prompt; a block of rows at a time, in the gradient too."""
    queries, heads = call.query.shape[2], call.query.shape[1]
    key = call.key.repeat_interleave(heads // call.key.shape[1], 1)
    found = []
    for start in range(0, queries, ROWS):
        rows = slice(start, min(start + ROWS, queries))
        found.append(checkpoint(_column, call.query[:, :, rows], key, call.learned_sinks, column, call, rows,
                                use_reentrant=False))  # fmt: skip
    return torch.cat(found, -1)  # type: ignore[arg-type]


def _column(
    query: Tensor, key: Tensor, learned: Tensor | None, column: Tensor, call: AttentionCall, rows: slice
) -> Tensor:
    wide = query if query.dtype == torch.float64 else query.float()
    logits = wide @ key.to(wide.dtype).mT * call.scale
    if call.softcap is not None:
        logits = call.softcap * (logits / call.softcap).tanh()
    lowest = torch.finfo(logits.dtype).min
    if call.mask is not None:
        mask = four_axes(call.mask, call.query.shape[2], key.shape[2])[:, :, rows]
        if mask.dtype != torch.bool:
            logits = logits + mask.to(logits.dtype).clamp_min(lowest)
        logits = logits.masked_fill(~visible_of(mask), lowest)
    elif call.causal:
        place = torch.arange(key.shape[2], device=query.device)
        logits = logits.masked_fill(place > place[rows, None], lowest)
    total = logits.logsumexp(-1)
    if learned is not None:
        total = torch.logaddexp(total, learned.to(total.dtype)[:, None])
    mine = logits.gather(-1, column[:, None, None, None].expand(*logits.shape[:3], 1))[..., 0]
    return (mine - total).exp()


Term = Decorrelation | MassivePenalty | SinkMass


class Regularised(nn.Module):
    """A causal language model whose loss has further terms, for any trainer that calls `model(**batch).loss`.

    Args:
        model: Of transformers; its attention is `sdpa` or `eager`.
        terms: What is added, with its factor.

    Attributes:
        penalties: The terms of the last forward pass, before their factors, by class name.
        task_loss: The model's own loss of that pass.

    Example:
        >>> trained = Regularised(model, {SinkMass(): 0.1, Decorrelation(): 1.0})
        >>> trained(input_ids=ids, labels=ids).loss.backward()
    """

    def __init__(self, model: nn.Module, terms: Mapping[Term, float]) -> None:
        super().__init__()
        if not terms:
            raise UsageError("Regularised: no terms are given.")
        for term, factor in terms.items():
            if not isinstance(term, Term):
                raise UsageError(f"Regularised: {type(term).__name__} is none of its terms.")
            if not math.isfinite(factor):
                raise UsageError(f"Regularised: the factor of {type(term).__name__} is {factor}.")
        self.model = model
        self.terms, self.factors = nn.ModuleList(terms), tuple(terms.values())
        self.penalties: dict[str, Tensor] = {}
        self.task_loss: Tensor | None = None

    def forward(self, **given: Any) -> Any:
        """The model's output, its `loss` with the terms added.

        Raises:
            UsageError: There are no labels.
            ModelError: No gradient would reach the attention.
        """
        if given.get("labels") is None:
            raise UsageError("Regularised: the batch has no labels, so the model has no loss to add to.")
        tower = find_anatomy(self.model).main
        masses = [term for term in self.terms if isinstance(term, SinkMass)]
        with _masses(self.model, tower, masses) as seen:
            output = self.model(**given, output_hidden_states=True)
        mask = given.get("attention_mask")
        real = None if mask is None else mask.bool()
        prompt = given["labels"] == -100
        total = self.task_loss = output.loss
        self.penalties = {}
        for term, factor in zip(self.terms, self.factors, strict=True):
            if isinstance(term, SinkMass):
                value = torch.stack(seen[id(term)]).mean()
            elif isinstance(term, Decorrelation):
                value = term(output.hidden_states, real, prompt if term.among == "prompt" else None)
            else:
                value = term(output.hidden_states, real)
            self.penalties[type(term).__name__] = value.detach()
            total = total + factor * value
        output.loss = total
        return output


@contextmanager
def _masses(model: nn.Module, tower: Tower, terms: list[SinkMass]) -> Iterator[dict[int, list[Tensor]]]:
    """The sink mass of every layer of the passes inside the `with`, by term."""
    seen: dict[int, list[Tensor]] = {id(term): [] for term in terms}
    with ExitStack() as stack:
        if terms:
            tokens = stack.enter_context(Tokens().watched(model, tower))
            stack.enter_context(
                _MassTap(sites(model, tower, "attention"), terms, seen, tokens).attached(model)
            )
        yield seen
    if terms and not all(seen.values()):
        raise ModelError(
            "The attention of this model was not seen, so its sink has no mass to regularise.",
            hint="Load the model with attn_implementation='sdpa'.",
        )


class _MassTap(AttentionTap):
    def __init__(
        self,
        where: dict[nn.Module, Site],
        terms: list[SinkMass],
        seen: dict[int, list[Tensor]],
        tokens: Tokens,
    ) -> None:
        super().__init__(where, no_statistics, ignore)
        self.terms, self.seen, self.tokens = terms, seen, tokens
        self.training = torch.is_grad_enabled() and any(module.training for module in where)

    def measure(self, site: Site, attended: Attended) -> None:
        call = attended.call
        if self.training and not (call.query.requires_grad or call.key.requires_grad):
            raise ModelError(
                f"No gradient reaches the attention of layer {site.layer} while the model trains.",
                detail="Checkpointing that is reentrant runs it without gradients first.",
                hint="Use gradient_checkpointing_kwargs={'use_reentrant': False}, or train its queries or keys.",
            )
        real = self.tokens.real(call)
        for term in self.terms:
            self.seen[id(term)].append(term.of_call(call, real))


def _inner(states: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Without the embeddings and the last, normalised one."""
    if len(states) < 3:
        raise UsageError(
            "There are no states between the embeddings and the last one.",
            detail=f"Expected the hidden_states of a model with at least two layers, found {len(states)} entries.",
        )
    return tuple(states[1:-1])


def _real_or_all(real: Tensor | None, states: Tensor) -> Tensor:
    return torch.ones(states.shape[1:3], dtype=torch.bool, device=states.device) if real is None else real


def _first(real: Bool[Tensor, "batch token"]) -> Int[Tensor, " batch"]:
    return real.int().argmax(1)
