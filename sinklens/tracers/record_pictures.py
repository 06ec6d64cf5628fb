"""Signals that look closely at visual tokens: at the states that enter blocks, at sublayers, and at chosen queries."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sinklens.inputs.spans import Kind, ModalitySpans
from sinklens.kernels.rows import runs, weights_of_rows
from sinklens.kernels.spec import AttentionCall
from sinklens.models.spec import OpenedModel
from sinklens.models.sums import states_of

from . import signals_pictures as pic
from .ledger import Ledger
from .lens import Vocabulary, nearest_tokens, vocabulary
from .prompt_view import PromptView
from .signal import Signal
from .states import first_of


class PicturesRecorder:
    """Collects what one batch shows of `signals_pictures`; prompts without pictures have none of it.

    Attributes:
        lens_every: The lens looks at the states entering every so many blocks; 0 is the first only.
    """

    carried = ("_entered",)

    def __init__(self, ledger: Ledger, lens_every: int = 0) -> None:
        self.ledger, self.lens_every = ledger, lens_every
        self.wanted = ledger.wanted & pic.PICTURE_SIGNALS
        self.spans: dict[int, ModalitySpans] = {
            row: prompt.visual.spans
            for row, prompt in enumerate(ledger.batch.prompts)
            if prompt.visual is not None and bool(prompt.visual.spans.visual.any())
        }
        self.words: Vocabulary | None = None
        self._entered: dict[int, Float[Tensor, "visual dim"]] = {}

    @property
    def active(self) -> bool:
        return bool(self.wanted and self.spans)

    @contextmanager
    def attached(self, opened: OpenedModel) -> Iterator[None]:
        """Hooks on blocks and sublayers, as far as a wanted signal needs them."""
        model, tower = opened.module, opened.anatomy.main
        if self.wanted & pic.LENS:
            self.words = vocabulary(opened)
        with ExitStack() as stack:
            for block in tower.blocks:
                if self.wanted & pic.OF_ENTRY:
                    module = model.get_submodule(block.path)
                    hook = _entering(block.index, self.on_input)
                    stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
                if self.wanted & pic.OF_TRANSITIONS:
                    for part, path in enumerate((block.attention, block.mlp)):
                        if path is not None:
                            hook = _passing(block.index, part, self.on_sublayer)
                            module = model.get_submodule(path)
                            stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
            yield

    def _put(self, row: int, signal: Signal, layer: int, value: Tensor) -> None:
        if signal in self.wanted:
            self.ledger.put(row, signal.name, layer, value)

    def on_input(self, layer: int, state: Tensor) -> None:
        """The state that enters a block."""
        for row, x in self.ledger.rows(state):
            spans = self.spans.get(row)
            if spans is None:
                continue
            mine = torch.from_numpy(spans.visual.nonzero()[0]).to(x.device)
            visual = x[mine].float()
            if layer == 0:
                self._entered[row] = torch.nn.functional.normalize(visual, dim=-1)
                self._at_entry(row, x, spans)
            unit = torch.nn.functional.normalize(visual, dim=-1)
            self._put(row, pic.VISUAL_DRIFT, layer, (unit * self._entered[row]).sum(-1))
            first = first_text(spans)
            if first is not None:
                other = torch.nn.functional.normalize(x[first].float(), dim=-1)
                self._put(row, pic.VISUAL_FIRST_COSINE, layer, unit @ other)
            looked_at = layer == 0 or (self.lens_every > 0 and layer % self.lens_every == 0)
            if self.words is not None and looked_at:
                cosine, ids = nearest_tokens(visual, self.words, pic.LENS_RANKS)
                self._put(row, pic.LENS_COSINE, layer, cosine)
                self._put(row, pic.LENS_ID, layer, ids.int())

    def _at_entry(self, row: int, x: Tensor, spans: ModalitySpans) -> None:
        """What has no layer axis is kept under layer 0 and unstacked at the end."""
        self._put(row, pic.VISUAL_UNIT, 0, self._entered[row].half())
        if pic.LENS_EXCLUDED in self.wanted and self.words is not None:
            self._put(row, pic.LENS_EXCLUDED, 0, torch.tensor(self.words.counts, dtype=torch.int32))
        if pic.VISUAL_SPECTRUM in self.wanted:
            self._put(row, pic.VISUAL_SPECTRUM, 0, spectra(x, spans))

    def on_sublayer(self, layer: int, part: int, given: Tensor, made: Tensor) -> None:
        """What enters and leaves a sublayer; the sublayers of a block are stacked at the end."""
        for (row, x), (_, y) in zip(self.ledger.rows(given), self.ledger.rows(made), strict=True):
            if row in self.spans and x.shape == y.shape:
                x, y = x.float(), y.float()
                sizes = torch.linalg.vector_norm(x, dim=-1), torch.linalg.vector_norm(y, dim=-1)
                cosine = (x * y).sum(-1) / (sizes[0] * sizes[1]).clamp(min=1e-30)
                for signal, value in (
                    (pic.TRANSITION_RATIO, sizes[1] / sizes[0].clamp(min=1e-30)),
                    (pic.TRANSITION_COSINE, cosine),
                ):
                    if signal in self.wanted:
                        seen = self.ledger.seen[row].setdefault(signal.name, {})
                        pair = seen.setdefault(
                            layer, value.new_full((2, len(value)), float("nan")).cpu().numpy()
                        )
                        pair[part] = value.cpu().numpy()

    def on_prompt(self, view: PromptView) -> None:
        """One prompt's part of a block's attention."""
        spans = self.spans.get(view.row)
        if spans is None or not view.knows_vectors:
            return
        visual = torch.from_numpy(spans.visual.nonzero()[0])
        call = _own_call(view)
        if self.wanted & {pic.QUERIES_RECEIVED, pic.QUERIES_VISIBLE, pic.GAZE_SHIFT, pic.HEAD_MAX_RECEIVED}:
            sets = query_sets(spans)
            text = _TextPass(call, visual.to(call.key.device), sets)
            for first, last in runs(sets[0].nonzero()[:, 0].tolist()):
                text.read(first, last)
            self._put(view.row, pic.QUERIES_RECEIVED, view.layer, text.received)
            self._put(view.row, pic.QUERIES_VISIBLE, view.layer, text.visible.int())
            if text.steps:
                self._put(view.row, pic.GAZE_SHIFT, view.layer, gaze(text.shift, text.steps))
            if pic.HEAD_MAX_RECEIVED in self.wanted:
                own = visual_head_max(call, visual.to(call.key.device))
                self._put(view.row, pic.HEAD_MAX_RECEIVED, view.layer, torch.stack([text.head_max(), own]))
        if pic.QUERY_ENTROPY in self.wanted:
            queries = view.query[:, visual.to(view.query.device)].transpose(0, 1)
            both = torch.stack([query_entropy(queries), query_entropy(queries, normalised=True)])
            self._put(view.row, pic.QUERY_ENTROPY, view.layer, both)

    def finish(self, row: int, arrays: dict[str, Any]) -> None:
        """Take the layer axis off what has none."""
        for signal in (pic.VISUAL_UNIT, pic.LENS_EXCLUDED, pic.VISUAL_SPECTRUM):
            if signal.name in arrays:
                arrays[signal.name] = arrays[signal.name][0]


def first_text(spans: ModalitySpans) -> int | None:
    """The first token that is neither visual nor a delimiter; BOS, wherever a model puts it."""
    text = spans.is_(Kind.SYSTEM, Kind.QUESTION, Kind.GENERATED).nonzero()[0]
    return int(text[0]) if len(text) else None


def query_sets(spans: ModalitySpans) -> Bool[Tensor, "query_set pos"]:
    """Members of `QUERY_SETS`. The last token is a set of its own only if it is text."""
    text = spans.is_(Kind.QUESTION, Kind.GENERATED)
    last = text.copy()
    last[:-1] = False
    return torch.from_numpy(
        torch.stack([torch.from_numpy(x) for x in (text, last, spans.is_(Kind.GENERATED))]).numpy()
    )


def spectra(x: Float[Tensor, "pos dim"], spans: ModalitySpans) -> Float[Tensor, "picture value"]:
    """Singular values of each picture's visual tokens, largest first, in double precision; NaN where it has fewer."""
    found = []
    for picture in range(len(spans.pictures)):
        places = sorted(
            {int(at) for grid in spans.of_picture(picture) for at in grid.positions.ravel() if at >= 0}
        )
        found.append(torch.linalg.svdvals(x[places].double()) if places else x.new_zeros(0).double())
    width = max((len(values) for values in found), default=0)
    pad = torch.nn.functional.pad
    return torch.stack([pad(v, (0, width - len(v)), value=float("nan")) for v in found]).float()


class _TextPass:
    """Reductions over the text queries, gathered block by block of rows."""

    def __init__(
        self, call: AttentionCall, visual: Int[Tensor, " visual"], sets: Bool[Tensor, "query_set pos"]
    ) -> None:
        heads, keys, device = call.query.shape[1], call.key.shape[2], call.key.device
        self.call, self.visual, self.sets = call, visual, sets.to(device)
        self.received = torch.zeros(len(sets), keys, device=device)
        self.visible = torch.zeros(len(sets), keys, dtype=torch.long, device=device)
        self.shift = torch.zeros(heads, len(visual), device=device)
        self._largest = torch.zeros(len(visual), device=device)
        self._rows = torch.zeros(len(visual), device=device)
        self.steps = 0

    def read(self, first: int, last: int) -> None:
        """One run of consecutive text queries."""
        before: Tensor | None = None
        for rows, weights, seen in weights_of_rows(self.call, first, last):
            weights, seen = weights[0], seen[0].any(0)
            members = self.sets[:, rows].float()
            self.received += members @ weights.mean(0)
            self.visible += (members @ seen.float()).long()
            here = weights[:, :, self.visual]
            self._largest += here.amax(0).sum(0)
            self._rows += seen[:, self.visual].sum(0)
            earlier = here[:, :-1] if before is None else torch.cat([before, here[:, :-1]], 1)
            later = here[:, 1:] if before is None else here
            self.shift += (later - earlier).clamp(min=0).sum(1)
            self.steps += later.shape[1]
            before = here[:, -1:].clone()

    def head_max(self) -> Float[Tensor, " visual"]:
        return self._largest / self._rows.clamp(min=1)


def gaze(shift: Float[Tensor, "head visual"], steps: int) -> Float[Tensor, " visual"]:
    """Mean rise over queries and over the half of the heads whose rises sum to most."""
    kept = shift.sum(1).argsort(descending=True, stable=True)[: max(1, len(shift) // 2)]
    return shift[kept].mean(0) / steps


def visual_head_max(call: AttentionCall, visual: Int[Tensor, " visual"]) -> Float[Tensor, " visual"]:
    """Largest weight of any head on each visual token, mean over the visual queries that see it."""
    total, rows = (
        torch.zeros(len(visual), device=visual.device),
        torch.zeros(len(visual), device=visual.device),
    )
    for first, last in runs(visual.tolist()):
        for _, weights, seen in weights_of_rows(call, first, last):
            total += weights[0][:, :, visual].amax(0).sum(0)
            rows += seen[0].any(0)[:, visual].sum(0)
    return total / rows.clamp(min=1)


def query_entropy(
    queries: Float[Tensor, "token head dim"], *, normalised: bool = False
) -> Float[Tensor, " token"]:
    """Entropy of the spectrum of each token's queries across heads (arXiv 2602.17196), over the logarithm of the heads.

    Z are the queries centred across heads, G = Z Z^T / heads, and the entropy is -sum l log l over G's eigenvalues,
    clamped at 1e-10. With `normalised` they are first divided by their sum, which makes it an entropy; the authors'
    program does not do that. Double precision.
    """
    heads = queries.shape[1]
    if heads < 2:
        return torch.full((len(queries),), float("nan"))
    centred = queries.double() - queries.double().mean(1, keepdim=True)
    values = torch.linalg.eigvalsh(centred @ centred.mT / heads).clamp(min=1e-10)
    if normalised:
        values = values / values.sum(-1, keepdim=True)
    entropy = -(values * values.log()).sum(-1) / torch.tensor(float(heads)).log().double()
    return entropy.float()


def _own_call(view: PromptView) -> AttentionCall:
    """The call of one prompt alone. Prompts with pictures run alone and without padding."""
    from dataclasses import replace

    call = view.call
    if call.query.shape[0] == 1 and view.length == call.query.shape[2]:
        return call
    row = slice(view.row, view.row + 1)
    mask = call.mask
    if mask is not None and mask.ndim == 4 and mask.shape[0] > 1:
        mask = mask[row]
    edits = tuple(edit.of(row, slice(None)) for edit in call.edits)
    parts = {"query": call.query[row], "key": call.key[row], "value": call.value[row]}
    return replace(call, **parts, mask=mask, counted=None, edits=edits)


def _entering(layer: int, observer: Callable[[int, Tensor], None]) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        state = states_of(args, kwargs)
        if state is not None:
            observer(layer, state)

    return hook


def _passing(
    layer: int, part: int, observer: Callable[[int, int, Tensor, Tensor], None]
) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        given = states_of(args, kwargs)
        if given is not None:
            observer(layer, part, given, first_of(output))

    return hook
