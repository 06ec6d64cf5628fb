"""Signals of the vision tower and of what the language model is given of it, in the same pass as everything else.

A tower may read several pictures or tiles side by side (`[view, patch, dim]`) or one after the other (`[patch, dim]`),
and may attend within windows, in one call each. Everything is laid out along one axis, the tower's own sequence.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sinklens.kernels.spec import AttentionCall, AttentionStatistics, Stat, Want
from sinklens.models.spec import Anatomy, OpenedModel, Tower
from sinklens.models.sums import states_of

from . import signals as sig
from .attention import AttentionTap, Site, sites
from .batch import Batch
from .ledger import Arrays, join
from .signals import Signal, Source
from .states import residual_tap

if TYPE_CHECKING:
    from .executor import TracePlan

OF_ATTENTION = frozenset({sig.VISION_RECEIVED, sig.VISION_VISIBLE, sig.VISION_RECEIVED_PEAK})


def vision_tower(anatomy: Anatomy) -> Tower | None:
    """The tower that reads pictures for the main one, None if there is none."""
    return next(
        (tower for tower in anatomy.towers if tower.name == "vision" and tower is not anatomy.main), None
    )


def shows_pictures(batch: Batch) -> bool:
    """Whether a batch is one prompt with pictures; of several in one batch nobody can tell the patches apart."""
    return batch.size == 1 and any(prompt.visual is not None for prompt in batch.prompts)


class VisionRecorder:
    """Collects what one prompt's pictures show in the vision tower."""

    def __init__(self, tower: Tower, wanted: frozenset[Signal]) -> None:
        self.tower, self.wanted = tower, wanted
        self._received: dict[int, list[Tensor]] = defaultdict(list)
        self._visible: dict[int, list[Tensor]] = defaultdict(list)
        self._norm: dict[int, Tensor] = {}
        self._embedded: Tensor | None = None

    def asks(self, site: Site, call: AttentionCall) -> Want:
        return Want(frozenset({Stat.RECEIVED}))

    def on_attention(self, site: Site, call: AttentionCall, statistics: AttentionStatistics) -> None:
        """One call: all views at once, or one window or picture; calls of a block follow each other."""
        visible = statistics.visible
        assert visible is not None
        share = statistics[Stat.RECEIVED] / visible.clamp(min=1)
        self._received[site.layer].append(along_patches(share).cpu())
        self._visible[site.layer].append(
            along_patches(visible.amax(1, keepdim=True))[0].to(torch.int32).cpu()
        )

    def on_block(self, layer: int, state: Tensor) -> None:
        norm = torch.linalg.vector_norm(state.detach(), dim=-1, dtype=torch.float32)
        self._norm[layer] = norm.flatten().cpu()

    def on_input(self, _: nn.Module, args: Any, kwargs: Any) -> None:
        """What enters the first block of the language model."""
        given = states_of(args, kwargs)
        if given is not None and self._embedded is None:
            self._embedded = torch.linalg.vector_norm(given[0].detach(), dim=-1, dtype=torch.float32).cpu()

    @property
    def blocks_seen(self) -> int:
        """Blocks whose attention was seen over every one of their patches."""
        return sum(
            sum(part.shape[-1] for part in self._received[layer]) == len(norm)
            for layer, norm in self._norm.items()
        )

    def arrays(self, objects: Any = None) -> Arrays:
        """The arrays of the prompt by signal name.

        Args:
            objects: `Visual.objects`, stored as it is.
        """
        layers = len(self.tower.blocks)
        received = {layer: torch.cat(parts, -1) for layer, parts in self._received.items()}
        found: dict[str, dict[int, Tensor]] = {
            sig.VISION_NORM.name: self._norm,
            sig.VISION_RECEIVED.name: {layer: share.mean(0) for layer, share in received.items()},
            sig.VISION_VISIBLE.name: {layer: torch.cat(parts) for layer, parts in self._visible.items()},
            sig.VISION_RECEIVED_PEAK.name: {layer: share.amax(-1) for layer, share in received.items()},
            f"{sig.VISION_RECEIVED_PEAK.name}_pos": {
                layer: share.argmax(-1).to(torch.int32) for layer, share in received.items()
            },
        }
        names = {signal.name for signal in self.wanted}
        arrays = {
            name: join({layer: value.numpy() for layer, value in by_layer.items()}, layers)
            for name, by_layer in found.items()
            if by_layer and name.removesuffix("_pos") in names
        }
        if self._embedded is not None and sig.EMBEDDED_NORM in self.wanted:
            arrays[sig.EMBEDDED_NORM.name] = self._embedded.numpy()
        if objects is not None and sig.OBJECT_SHARE in self.wanted:
            arrays[sig.OBJECT_SHARE.name] = objects
        return arrays


def along_patches(values: Float[Tensor, "view head patch"]) -> Float[Tensor, "head sequence"]:
    """Views one after the other."""
    return values.movedim(1, 0).flatten(1)


@contextmanager
def vision_tap(opened: OpenedModel, batch: Batch, plan: TracePlan) -> Iterator[VisionRecorder | None]:
    """Record the vision tower while attached; None where the batch has no pictures or nothing of it is asked for."""
    tower = vision_tower(opened.anatomy)
    wanted = frozenset(signal for signal in plan.signals if signal.source is Source.VISION)
    if tower is None or not wanted or not shows_pictures(batch):
        yield None
        return
    model, recorder = opened.module, VisionRecorder(tower, wanted)
    with ExitStack() as stack:
        if tower.routed and wanted & OF_ATTENTION:
            where = sites(model, tower, "attention")
            tap = AttentionTap(where, recorder.asks, recorder.on_attention, mode=plan.mode, plan=plan.blocks)
            stack.enter_context(tap.attached(model))
        stack.enter_context(residual_tap(model, tower, recorder.on_block))
        first = model.get_submodule(opened.anatomy.main.blocks[0].path)
        stack.callback(first.register_forward_pre_hook(recorder.on_input, with_kwargs=True).remove)
        yield recorder
