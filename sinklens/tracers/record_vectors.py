"""Signals of the queries, keys and values themselves: norms, cosines, what heads write, the first tokens' map.

Norms behind the output projection come from its Gram matrix: |v W| for the slice W of a head is sqrt(v W W^T v^T), and
W W^T is only as wide as a value. The projection is read when it runs, so its input is what the heads really write,
also where a model puts a gate in between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sinklens.kernels.edits import among, edited
from sinklens.kernels.shapes import four_axes, visible_of
from sinklens.kernels.spec import AttentionCall
from sinklens.models.parts import unwrapped
from sinklens.models.spec import Tower
from sinklens.models.spread import whole, whole_input

from . import signals as sig
from .attention import Site
from .ledger import Ledger
from .prompt_view import PromptView

_TINY = 1e-30
_HEADS_AT_ONCE = 8

OF_PROJECTION = frozenset({sig.VALUE_OUT_NORM, sig.VALUE_OUT_NORM_MEAN, sig.HEAD_OUTPUT_NORM})
_COSINES = frozenset({sig.QK_COSINE, sig.QK_COSINE_OTHERS})
_KEY_NORMS = frozenset({sig.KEY_NORM, sig.KEY_NORM_MEAN})
_VALUE_NORMS = frozenset({sig.VALUE_NORM, sig.VALUE_NORM_MEAN})
_VALUES_OUT = frozenset({sig.VALUE_OUT_NORM, sig.VALUE_OUT_NORM_MEAN})
_PREFIXES = frozenset({sig.PREFIX_MAP, sig.PREFIX_LOGITS})
OF_VECTORS = _COSINES | _KEY_NORMS | _VALUE_NORMS | _VALUES_OUT | {sig.PREFIX_LOGITS}
"""Signals that are left out where queries, keys and values are not known."""


class VectorsRecorder:
    """Collects what one batch shows in the queries, keys and values."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        # The values of the block whose output projection has yet to run.
        self._pending: tuple[int, Tensor] | None = None

    def begin(self, site: Site, call: AttentionCall) -> None:
        """Remember the values for the output projection that follows."""
        self._pending = (site.layer, call.value) if self.ledger.wanted & _VALUES_OUT else None

    def on_prompt(self, view: PromptView) -> None:
        """Everything but what needs the output projection."""
        wanted, put = self.ledger.wanted, self._put
        if wanted & _PREFIXES:
            weights, logits = prefix_maps(view)
            put(view, sig.PREFIX_MAP, weights)
            if view.knows_vectors:
                put(view, sig.PREFIX_LOGITS, logits)
        if not view.knows_vectors:
            return
        if wanted & _VALUE_NORMS:
            norms = _norms(view.value)
            put(view, sig.VALUE_NORM, norms)
            put(view, sig.VALUE_NORM_MEAN, norms.mean(-1))
        if wanted & (_KEY_NORMS | _COSINES):
            norms = _norms(view.key)
            put(view, sig.KEY_NORM, norms)
            put(view, sig.KEY_NORM_MEAN, norms.mean(-1))
            if wanted & _COSINES:
                places = self.ledger.references[view.row]
                cosines, others = query_key_cosines(view.query, view.key, norms, places)
                put(view, sig.QK_COSINE, cosines)
                put(view, sig.QK_COSINE_OTHERS, others)

    def on_projection(self, layer: int, heads: int, module: nn.Module, x: Tensor) -> None:
        """Norms behind the output projection, whose input `[batch, pos, head * value_dim]` is at hand."""
        pending, self._pending = self._pending, None
        matrix = projection_matrix(module)
        if matrix is None or len(matrix) != x.shape[-1] or len(matrix) % heads:
            return
        gram = gram_matrices(matrix, heads)
        if sig.HEAD_OUTPUT_NORM in self.ledger.wanted:
            written = x.detach().reshape(self.ledger.batch.size, -1, heads, gram.shape[-1])
            norms = projected_norms(written.transpose(1, 2), gram)
            for row, span in enumerate(self.ledger.spans(norms.shape[2], x.device)):
                self.ledger.put(row, sig.HEAD_OUTPUT_NORM.name, layer, norms[row][:, span].mean(-1))
        if pending is None or pending[0] != layer:
            return
        value = pending[1]
        if value.shape[-1] != gram.shape[-1] or heads % value.shape[1]:
            return
        norms = projected_norms(value, gram)
        for row, span in enumerate(self.ledger.spans(value.shape[2], value.device)):
            self.ledger.put(row, sig.VALUE_OUT_NORM.name, layer, norms[row][:, span])
            self.ledger.put(row, sig.VALUE_OUT_NORM_MEAN.name, layer, norms[row][:, span].mean(-1))

    def _put(self, view: PromptView, signal: sig.Signal, value: Tensor) -> None:
        if signal in self.ledger.wanted:
            self.ledger.put(view.row, signal.name, view.layer, value)


Projection = Callable[[int, int, nn.Module, Tensor], None]


@contextmanager
def projection_tap(model: nn.Module, tower: Tower, observer: Projection) -> Iterator[None]:
    """`observer(layer, heads, module, input)` for each block's attention output projection, before it runs."""
    with ExitStack() as stack:
        for block in tower.blocks:
            if block.attention_output is not None:
                module = model.get_submodule(block.attention_output)
                stack.callback(
                    module.register_forward_pre_hook(_hook(block.index, tower.heads, observer)).remove
                )
        yield


def _hook(layer: int, heads: int, observer: Projection) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any) -> None:
        if args and isinstance(args[0], Tensor):
            observer(layer, heads, unwrapped(module), whole_input(module, args[0]))

    return hook


def projection_matrix(module: nn.Module) -> Float[Tensor, "in out"] | None:
    """The matrix of a Linear or Conv1D as its input meets it; None if it is quantised, adapted or not in memory."""
    from transformers.pytorch_utils import Conv1D

    if not isinstance(module, (nn.Linear, Conv1D)):
        return None
    weight = module.weight
    plain = weight.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    if weight.ndim != 2 or not plain or weight.device.type == "meta":
        return None
    weight = whole(weight.detach())
    return weight if isinstance(module, Conv1D) else weight.T


def gram_matrices(matrix: Float[Tensor, "in out"], heads: int) -> Float[Tensor, "head dim dim"]:
    """`W W^T` of each head's slice W of the projection; float32, a few heads at a time."""
    slices = matrix.unflatten(0, (heads, -1))
    parts = (part.float() for part in slices.split(_HEADS_AT_ONCE))
    return torch.cat([part @ part.mT for part in parts])


def projected_norms(
    x: Float[Tensor, "batch given pos dim"], gram: Float[Tensor, "head dim dim"]
) -> Float[Tensor, "batch head pos"]:
    """`|x W|` for each head; `given` heads of x are shared evenly (GQA)."""
    group = len(gram) // x.shape[1]
    found = torch.empty(x.shape[0], len(gram), x.shape[2], dtype=torch.float32, device=x.device)
    for head in range(len(gram)):
        mine = x[:, head // group].float()
        # Rounding may leave a tiny negative number where the projection all but annihilates x.
        found[:, head] = (mine @ gram[head]).mul_(mine).sum(-1).clamp_(min=0).sqrt_()
    return found


def _norms(x: Float[Tensor, "head pos dim"]) -> Float[Tensor, "head pos"]:
    return torch.linalg.vector_norm(x, dim=-1, dtype=torch.promote_types(x.dtype, torch.float32)).float()


def query_key_cosines(
    query: Float[Tensor, "head pos dim"],
    key: Float[Tensor, "kv_head pos dim"],
    key_norms: Float[Tensor, "kv_head pos"],
    references: list[int],
) -> tuple[Float[Tensor, "head reference"], Float[Tensor, " head"]]:
    """Mean cosine of queries with each reference key, and with all other keys.

    A mean of cosines is the cosine's inner product of means of unit vectors, so no pair is ever formed.

    Returns:
        For each reference the mean over the queries after it (NaN without one), and the mean over all pairs of a query
        and a key that is no reference (NaN if all are).
    """
    heads, length, _ = query.shape
    group, nan = heads // len(key), float("nan")
    after = torch.zeros(len(references) + 1, length, device=query.device)
    for slot, place in enumerate(references):
        if 0 <= place < length - 1:
            after[slot, place + 1 :] = 1.0 / (length - 1 - place)
    after[-1] = 1.0 / length
    per_query = after[None] / _norms(query)[:, None].clamp_(min=_TINY)
    means = per_query @ query.float()
    rest = torch.ones(length, device=key.device)
    chosen = [place for place in references if 0 <= place < length]
    rest[chosen] = 0.0
    inverse = 1.0 / key_norms.clamp(min=_TINY)
    others = ((rest * inverse)[:, None] @ key.float()).repeat_interleave(group, 0)[:, 0]
    left = int(rest.sum())
    cosines = torch.full((heads, len(references)), nan, device=query.device)
    for slot, place in enumerate(references):
        if 0 <= place < length - 1:
            unit = (key[:, place].float() * inverse[:, place, None]).repeat_interleave(group, 0)
            cosines[:, slot] = (means[:, slot] * unit).sum(-1)
    return cosines, (means[:, -1] * others).sum(-1) / (left or nan)


def prefix_maps(view: PromptView) -> tuple[Float[Tensor, "row col"], Float[Tensor, "row col"]]:
    """Attention among the first tokens and its logits, both as means over heads; logits as before any edit.

    A causal row of the first 16 sees no key beyond them, so its softmax is complete here. Rows and columns beyond a
    short prompt are NaN, and everything is where a row sees a later token.
    """
    call, count = view.call, min(sig.PREFIX, view.length)
    nothing = torch.full((sig.PREFIX, sig.PREFIX), float("nan"), device=call.query.device)
    places = torch.arange(call.key.shape[2], device=call.query.device)[view.span][:count]
    seen, bias = _prefix_mask(view, places)
    if seen is None:
        return nothing, nothing
    query, key = (x[view.row][:, places].float() for x in (call.query, call.key))
    logits = query @ key.repeat_interleave(len(query) // len(key), 0).mT * call.scale
    if call.softcap is not None:
        logits = call.softcap * torch.tanh(logits / call.softcap)
    logits = (logits + bias).masked_fill(~seen, float("-inf"))
    norm = logits.logsumexp(-1)
    if call.learned_sinks is not None:
        norm = torch.logaddexp(norm, call.learned_sinks.float()[:, None])
    weights = (logits - norm[..., None]).exp().nan_to_num(0.0)  # a row that sees nothing gives nothing
    offset, here = call.key.shape[2] - call.query.shape[2], slice(0, count)
    edits = among(call.edits, view.row, places - offset, places)
    weights = edited(weights[None], weights[None, ..., 0], edits, here, here)[0][0]
    found = nothing.clone(), nothing.clone()
    found[0][:count, :count] = weights.mean(0)
    found[1][:count, :count] = torch.where(seen.all(0), logits.mean(0), float("nan"))
    return found


def _prefix_mask(view: PromptView, places: Tensor) -> tuple[Tensor | None, Tensor | float]:
    """Who sees whom among the first tokens, `[head, row, col]`, and what the mask adds; None if one looks ahead."""
    call = view.call
    if call.mask is None:
        causal = call.causal or view.length == 1
        return (places <= places[:, None])[None] if causal else None, 0.0
    mask = four_axes(call.mask, call.query.shape[2], call.key.shape[2])
    mask = mask[view.row if len(mask) > 1 else 0][:, places]
    seen = visible_of(mask)
    ahead = torch.arange(seen.shape[-1], device=seen.device) > places[:, None]
    if bool((seen & ahead).any()):
        return None, 0.0
    inner = mask[..., places]
    bias = 0.0 if mask.dtype == torch.bool else inner.float().masked_fill(~seen[..., places], 0.0)
    return seen[..., places], bias
