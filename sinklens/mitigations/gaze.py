"""Which visual tokens the question turns to, found while the prompt is read: the saliency that GIFT amplifies by."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sinklens.core.errors import ModelError
from sinklens.inputs.spans import Kind
from sinklens.kernels.rows import runs, weights_of_rows
from sinklens.kernels.spec import AttentionCall
from sinklens.models.spec import Tower
from sinklens.tracers.aside import aside
from sinklens.tracers.attention import Attended, AttentionTap, Site, ignore, no_statistics, sites
from sinklens.tracers.record_pictures import gaze

from .kinds import kinds_of
from .tokens import Tokens


def _square(mask: Any) -> Any:
    """A prepared mask without the room that a static cache has for later tokens."""
    if isinstance(mask, dict):
        return {name: _square(part) for name, part in mask.items()}
    return mask[..., : mask.shape[-2]] if isinstance(mask, Tensor) and mask.ndim == 4 else mask


@dataclass
class GazeWatch:
    """Saliency of the tokens of the running input.

    Attributes:
        layers: Layers whose rises are averaged.
        words: Positions of the words that count; None for every token of the question.
        ahead: Whether the model must be run once before every prompt, because a layer to be edited comes too early.
    """

    model: nn.Module
    tower: Tower
    tokens: Tokens
    layers: tuple[int, ...]
    words: tuple[int, ...] | None
    ahead: bool
    _input: int = -1
    _rises: dict[int, Float[Tensor, "batch token"]] = field(default_factory=dict)
    _known: Bool[Tensor, " batch"] | None = None

    @contextmanager
    def attached(self) -> Iterator[GazeWatch]:
        """Watch every prompt that is read."""
        with ExitStack() as stack:
            if self.ahead:
                hook = self.model.register_forward_pre_hook(self._run_ahead, with_kwargs=True)
                stack.callback(hook.remove)
            else:
                stack.enter_context(self._tap().attached(self.model))
            yield self

    def saliency(self) -> tuple[Float[Tensor, "batch token"], Bool[Tensor, " batch"]]:
        """Saliency of every token of the prompt, 0 to 1 over the visual ones, and which prompts have any.

        Raises:
            ModelError: The prompt was not read while the watch was on.
        """
        if self._input != self.tokens.inputs or self._known is None or len(self._rises) < len(self.layers):
            raise ModelError(
                "What the question turns to is not known: it was not read inside of the `with` block.",
                detail="It is found while the prompt is read, and the cache came from outside.",
                hint="Read the prompt inside of the `with` block too.",
            )
        return torch.stack(list(self._rises.values())).mean(0), self._known

    def _tap(self) -> AttentionTap:
        where = {
            module: site
            for module, site in sites(self.model, self.tower, "attention").items()
            if site.layer in self.layers
        }
        if len(where) < len(self.layers):
            raise ModelError(
                f"Layers {self.layers} are asked what the question turns to, and not all have softmax attention."
            )
        return _GazeTap(where, self._see)

    def _run_ahead(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if self.tokens.past:
            return
        given = {**kwargs, "past_key_values": None, "use_cache": False}
        if (mask := given.get("attention_mask")) is not None:
            given["attention_mask"] = _square(mask)
        with aside(module), torch.no_grad(), self._tap().attached(module):
            module(*args, **given)

    def _see(self, site: Site, call: AttentionCall) -> None:
        if self.tokens.past:
            return
        if not self.tokens.whole(call.query.shape[2]):
            raise ModelError(
                "What a question turns to is found over the whole prompt, and this one is read in pieces.",
                hint="Generate without prefill_chunk_size.",
            )
        if self._input != self.tokens.inputs:
            self._input = self.tokens.inputs
            self._rises.clear()
        config: Any = self.model.config
        kinds = kinds_of(self.tokens, call, config)
        real = self.tokens.real(call)
        found = torch.zeros(real.shape, device=real.device)
        known = torch.zeros(len(real), dtype=torch.bool, device=real.device)
        for row in range(len(real)):
            visual = (kinds[row] == int(Kind.VISUAL)).nonzero()[:, 0]
            pairs = self._pairs(kinds[row], real[row])
            if len(visual) and pairs:
                found[row, visual] = gaze(*_rises(_one(call, row), visual, pairs))
                known[row] = True
        self._rises[site.layer] = found
        self._known = known

    def _pairs(self, kinds: Tensor, real: Tensor) -> list[int]:
        """Rows of the question that count and follow another one of it."""
        question = (kinds == int(Kind.QUESTION)) & real
        counted = question.clone()
        counted[1:] &= question[:-1]
        counted[0] = False
        if self.words is not None:
            place = real.long().cumsum(0) - 1
            counted &= torch.isin(place, torch.tensor(self.words, device=place.device))
        return counted.nonzero()[:, 0].tolist()


class _GazeTap(AttentionTap):
    """Among what edits the map, so that it sees what those before it left; it edits nothing."""

    edits_map = True

    def __init__(self, where: dict[nn.Module, Site], see: Any) -> None:
        super().__init__(where, no_statistics, ignore)
        self.see = see

    def rewrite(self, site: Site, attended: Attended) -> Attended:
        with torch.no_grad(), torch.autocast(attended.output.device.type, enabled=False):
            self.see(site, attended.call)
        return attended


def _one(call: AttentionCall, row: int) -> AttentionCall:
    """The call of one prompt of a batch."""
    mine = slice(row, row + 1)
    mask = call.mask
    if mask is not None and mask.ndim == 4 and mask.shape[0] > 1:
        mask = mask[mine]
    edits = tuple(edit.of(mine, slice(None)) for edit in call.edits)
    parts = {"query": call.query[mine], "key": call.key[mine], "value": call.value[mine]}
    return replace(call, **parts, mask=mask, counted=None, edits=edits)


def _rises(
    call: AttentionCall, visual: Tensor, rows: Collection[int]
) -> tuple[Float[Tensor, "head visual"], int]:
    """Rises of the attention to visual tokens from the row before to each of some rows, summed, and how many rows."""
    wanted = set(rows)
    total = torch.zeros(call.query.shape[1], len(visual), device=visual.device)
    for first, last in runs(sorted(wanted | {row - 1 for row in wanted})):
        before: Tensor | None = None
        for block, weights, _ in weights_of_rows(call, first, last):
            now = weights[0][:, :, visual]
            steps = now if before is None else torch.cat([before, now], 1)
            own = torch.arange(block.stop - steps.shape[1] + 1, block.stop)
            keep = torch.tensor([row in wanted for row in own.tolist()], device=now.device)
            total += (steps[:, 1:] - steps[:, :-1]).clamp(min=0.0)[:, keep].sum(1)
            before = now[:, -1:].clone()
    return total, len(wanted)


def stretched(values: Float[Tensor, " visual"]) -> Float[Tensor, " visual"]:
    """Clamped to three standard deviations around the mean, then to 0 to 1; 0 where nothing differs."""
    if len(values) < 2:
        return torch.zeros_like(values)
    mean, spread = values.mean(), values.std()
    values = values.clamp(mean - 3 * spread, mean + 3 * spread)
    extent = values.max() - values.min()
    return (values - values.min()) / extent if extent > 0 else torch.zeros_like(values)
