"""The attention tap of a mitigation: what the model's own kernel made, edited, and counted as an effect."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sinklens.core.errors import ModelError
from sinklens.kernels.edits import edited_map
from sinklens.kernels.spec import AttentionCall
from sinklens.tracers.attention import Attended, AttentionTap, Site, ignore, no_statistics

from .effect import Effect
from .seen import Seen
from .tokens import Tokens

if TYPE_CHECKING:
    from .attention_method import AttentionMethod


class EditTap(AttentionTap):
    """Lets a method edit every call of some attention modules.

    Args:
        chosen: Heads per layer that the method is meant for.
        watch: What the method's own `watching` gave.
    """

    edits_map = True

    def __init__(
        self,
        mitigation: AttentionMethod,
        where: dict[nn.Module, Site],
        chosen: dict[int, Tensor],
        tokens: Tokens,
        effect: Effect,
        watch: Any,
        *,
        config: Any,
        causal: bool,
    ) -> None:
        super().__init__(where, no_statistics, ignore)
        self.mitigation, self.tokens, self.effect, self.chosen = mitigation, tokens, effect, chosen
        self.watch, self.config, self.causal = watch, config, causal
        self.heads = {layer: int(heads.sum()) for layer, heads in chosen.items()}
        self._memory: dict[int, tuple[int, dict[str, Any]]] = {}

    def rewrite(self, site: Site, attended: Attended) -> Attended:
        self.effect.calls += 1
        if attended.dropout:
            raise ModelError(
                "A mitigation needs attention without dropout.",
                detail=f"Layer {site.layer} drops {attended.dropout:.0%} of its attention: it is in training mode.",
                hint="Call model.eval() first.",
            )
        seen = self._seen(site, attended)
        remember = attended.remember or attended.weights is not None
        done = self.mitigation.edit(seen, attended.output, remember=remember)
        if done is None:
            return attended
        self.effect.add(site.layer, done, seen.rows.sum() * self.heads[site.layer])
        if done.edit is None:
            return replace(attended, output=done.output)
        weights = None if attended.weights is None else edited_map(attended.weights, done.edit)
        call = replace(attended.call, edits=(*attended.call.edits, done.edit))
        return replace(attended, call=call, output=done.output, weights=weights)

    def _seen(self, site: Site, attended: Attended) -> Seen:
        call, kernel = attended.call, attended.kernel
        # The kernel's own is float32 at best.
        lse = None if kernel is None or call.query.dtype == torch.float64 else kernel.lse_for(call)
        return Seen(
            site,
            call,
            lse,
            self.tokens,
            self._heads(site, call),
            self.causal,
            self._notes(site.layer),
            self.config,
            self.watch,
            self._notes(-1),
            self.effect,
        )

    def _heads(self, site: Site, call: AttentionCall) -> Tensor:
        heads = self.chosen[site.layer] = self.chosen[site.layer].to(call.query.device)
        return heads

    def _notes(self, layer: int) -> dict[str, Any]:
        """The method's notes on a layer, or with -1 on all of them; begun anew with every input."""
        begun, notes = self._memory.get(layer, (0, {}))
        if begun != self.tokens.inputs:
            notes = {}
            self._memory[layer] = (self.tokens.inputs, notes)
        return notes
