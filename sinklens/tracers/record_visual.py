"""What text reads from pictures: masses on visual tokens and on sinks, per head and query, and what they contribute.

The statistics come from a sweep of its own over the text queries alone: they are few, and everything else that is
recorded counts all queries. A block's sinks are known before its attention runs (`record_inputs`).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sinklens.inputs.spans import Kind, ModalitySpans
from sinklens.kernels.blocked import attention_sweep
from sinklens.kernels.edits import among
from sinklens.kernels.shapes import four_axes
from sinklens.kernels.spec import AttentionCall, Stat, Want

from . import signals as sig
from .ledger import Ledger
from .prompt_view import PromptView
from .record_inputs import InputsRecorder
from .record_vectors import gram_matrices, projected_norms, projection_matrix
from .signals_visual import KEY_CLASSES, MASS_FLOORS, OF_CONTRIBUTIONS, OF_TEXT_QUERIES, SHARE_BINS

VISUAL, VISUAL_SINK, TEXT_SINK, DELIMITER, TEXT = range(len(KEY_CLASSES))


class TextQueriesRecorder:
    """Collects what the text queries of prompts with pictures read."""

    def __init__(self, ledger: Ledger, inputs: InputsRecorder) -> None:
        self.ledger, self.inputs = ledger, inputs
        self._spans: dict[int, ModalitySpans] = {
            row: prompt.visual.spans
            for row, prompt in enumerate(ledger.batch.prompts)
            if prompt.visual is not None
        }
        self._needed = bool(ledger.wanted & OF_TEXT_QUERIES)
        # Of each prompt, what the output projection of the running block needs: layer, attention received, members
        # of the classes, values.
        self._pending: dict[int, tuple[int, Tensor, Tensor, Tensor]] = {}

    def on_prompt(self, view: PromptView) -> None:
        """One prompt's part of a block's attention."""
        self._pending.pop(view.row, None)
        spans = self._spans.get(view.row)
        if spans is None or not self._needed or not view.knows_vectors:
            return
        queries = text_queries(spans, view.length)
        if not len(queries):
            return
        members = self._members(view, spans)
        call = only_queries(view, queries.to(members.device))
        want = Want(frozenset({Stat.RECEIVED, Stat.GROUP_MASS}), groups=members[:, None])
        found = attention_sweep(call, want)
        assert found.visible is not None
        seen, mass = found.visible[0], found[Stat.GROUP_MASS][0]
        received = found[Stat.RECEIVED][0] / seen.clamp(min=1)
        self._masses(view, mass)
        counts = (members & (seen.amax(0) > 0)).sum(-1)
        self._put(view.row, sig.KEY_CLASS_COUNT, view.layer, counts.to(torch.int32))
        mean = torch.where(seen.amax(0) > 0, received.mean(0), float("nan"))
        self._put(view.row, sig.TEXT_RECEIVED, view.layer, mean)
        if self.ledger.wanted & OF_CONTRIBUTIONS:
            self._pending[view.row] = (view.layer, received, members & (seen.amax(0) > 0), view.value)

    def on_projection(self, layer: int, heads: int, module: nn.Module) -> None:
        """The output projection of the block is about to run: norms of what the keys add."""
        pending, self._pending = self._pending, {}
        if not pending:
            return
        matrix = projection_matrix(module)
        if matrix is None or len(matrix) % heads:
            return
        gram = gram_matrices(matrix, heads)
        for row, (at, received, members, value) in pending.items():
            if at != layer or value.shape[-1] != gram.shape[-1] or heads % len(value):
                continue
            norms = projected_norms(value[None], gram)[0]
            self._put(row, sig.CONTRIBUTION, layer, class_means(received * norms, members))
            self._put(row, sig.CLASS_VALUE_NORM, layer, class_means(norms, members))

    def _members(self, view: PromptView, spans: ModalitySpans) -> Bool[Tensor, "key_class pos"]:
        """Which tokens are of which class in this block; each is of exactly one."""
        device = view.call.key.device
        kinds = torch.as_tensor(spans.kinds, device=device)
        sinks = self.inputs.sinks.get(view.row)
        sink = torch.zeros_like(kinds, dtype=torch.bool) if sinks is None else sinks.to(device)
        visual, delimiter = kinds == Kind.VISUAL, kinds == Kind.DELIMITER
        rest = ~sink & ~visual
        return torch.stack(
            [visual & ~sink, visual & sink, sink & ~visual, rest & delimiter, rest & ~delimiter]
        )

    def _masses(self, view: PromptView, mass: Float[Tensor, "head query key_class"]) -> None:
        visual = mass[..., VISUAL] + mass[..., VISUAL_SINK]
        self._put(view.row, sig.KEY_CLASS_MASS, view.layer, mass.mean(1))
        self._put(view.row, sig.VISUAL_MASS, view.layer, share_histogram(visual))
        self._put(view.row, sig.VISUAL_SINK_MASS, view.layer, share_histogram(mass[..., VISUAL_SINK]))
        ratio = mass[..., VISUAL] / visual
        self._put(view.row, sig.NONSINK_RATIO, view.layer, ratio_histogram(visual, ratio))
        floors = torch.tensor(MASS_FLOORS, device=visual.device)
        taken = ((visual > 0) & (visual >= floors[:, None, None])).float()
        mean = (ratio.nan_to_num(0.0) * taken).sum(-1) / taken.sum(-1)
        self._put(view.row, sig.NONSINK_RATIO_MEAN, view.layer, mean.mT)

    def _put(self, row: int, signal: sig.Signal, layer: int, value: Tensor) -> None:
        if signal in self.ledger.wanted:
            self.ledger.put(row, signal.name, layer, value)


def text_queries(spans: ModalitySpans, length: int) -> Int[Tensor, " query"]:
    """Positions of the text after the first picture."""
    text = spans.is_(Kind.QUESTION, Kind.GENERATED)[:length]
    return torch.as_tensor(text.nonzero()[0])


def only_queries(view: PromptView, queries: Int[Tensor, " query"]) -> AttentionCall:
    """One prompt's attention call with some of its queries only, as a mask over its real keys."""
    call, row = view.call, slice(view.row, view.row + 1)
    all_queries, all_keys = call.query.shape[2], call.key.shape[2]
    places = torch.arange(all_keys, device=call.key.device)[view.span]
    rows = places[queries] - (all_keys - all_queries)
    if call.mask is None:
        causal = places <= places[queries][:, None]
        mask = (causal if call.causal else torch.ones_like(causal))[None, None]
    else:
        whole = four_axes(call.mask, all_queries, all_keys)
        mask = whole[row if len(whole) > 1 else slice(None)][:, :, rows][..., view.span]
    return replace(
        call,
        query=call.query[row][:, :, rows],
        key=call.key[row][:, :, view.span],
        value=call.value[row][:, :, view.span],
        causal=False,
        mask=mask,
        counted=None,
        edits=among(call.edits, view.row, rows, places),
    )


def share_histogram(mass: Float[Tensor, "head query"]) -> Int[Tensor, "head share_bin"]:
    """Counts of masses in [0, 1]."""
    bins = (mass * SHARE_BINS).long().clamp(0, SHARE_BINS - 1)
    counts = torch.zeros(len(mass), SHARE_BINS, dtype=torch.int32, device=mass.device)
    return counts.scatter_add_(1, bins, torch.ones_like(bins, dtype=torch.int32))


def ratio_histogram(
    mass: Float[Tensor, "head query"], ratio: Float[Tensor, "head query"]
) -> Int[Tensor, "head floor share_bin"]:
    """Counts of ratios by the mass they are shares of. Bins begin at k / 20; a query without mass has no ratio."""
    edges = torch.arange(1, SHARE_BINS, device=mass.device, dtype=torch.float32) / SHARE_BINS
    floors = torch.tensor(MASS_FLOORS[1:], device=mass.device)
    bins = torch.bucketize(ratio.nan_to_num(0.0).contiguous(), edges, right=True)
    floor = torch.bucketize(mass.contiguous(), floors, right=True)
    counts = torch.zeros(len(mass), len(MASS_FLOORS) * SHARE_BINS, dtype=torch.int32, device=mass.device)
    known = (mass > 0).to(torch.int32)
    counts.scatter_add_(1, floor * SHARE_BINS + bins, known)
    return counts.unflatten(1, (len(MASS_FLOORS), SHARE_BINS))


def class_means(
    values: Float[Tensor, "head pos"], members: Bool[Tensor, "key_class pos"]
) -> Float[Tensor, "head key_class"]:
    """Mean over the tokens of each class, NaN for one without."""
    member = members.to(values.dtype)
    count = member.sum(-1)
    return (values @ member.mT) / torch.where(count > 0, count, float("nan"))
