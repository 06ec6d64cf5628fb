"""The fallback for families whose attention does not go through the registry (BLOOM, Falcon, ...).

Their attention modules return the weights when asked for them. A hook reduces one layer's weights and drops them
before the next layer runs, so one T x T map per head is alive at a time: exact, but quadratic in length.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sinklens.core.errors import ModelError
from sinklens.kernels.blocked import attention_sweep
from sinklens.kernels.spec import AttentionCall, BlockPlan
from sinklens.models.spec import Tower

from .attention import Site, attention_configs
from .batch import Batch
from .recorder import Recorder

_NEGLIGIBLE = -1e4


class EagerTap:
    """Reduces attention weights as modules return them; counts the calls it saw."""

    def __init__(self, tower: Tower, batch: Batch, recorder: Recorder) -> None:
        self.tower, self.batch, self.recorder = tower, batch, recorder
        self.calls = 0

    def see(self, layer: int, output: Any) -> Any:
        """Reduce the weights in a module's output and return the output without them."""
        if not isinstance(output, tuple):
            raise _refusal(self.tower, layer)
        shapes = [isinstance(part, Tensor) and part.ndim == 4 and part.shape[1] == self.tower.heads for part in output]
        if True not in shapes:
            raise _refusal(self.tower, layer)
        place = shapes.index(True)
        call = weights_as_call(output[place], self.batch.valid, causal=self.tower.causal)
        site = Site(self.tower.name, layer)
        self.recorder.on_attention(site, call, attention_sweep(call, self.recorder.asks(site, call), None, BlockPlan()))
        self.calls += 1
        return (*output[:place], None, *output[place + 1 :])


@contextmanager
def eager_tap(model: nn.Module, tower: Tower, batch: Batch, recorder: Recorder) -> Iterator[EagerTap]:
    """Ask the model for its attention weights and reduce them layer by layer; everything is put back on exit."""
    tap = EagerTap(tower, batch, recorder)
    configs = [(config, config._attn_implementation) for config in attention_configs(model)]
    handles = []
    asked = "output_attentions" in batch.inputs
    try:
        for config, _ in configs:
            config._attn_implementation_internal = "eager"
        batch.inputs["output_attentions"] = True
        for block in tower.blocks:
            if block.attention is not None:
                hook = _hook(tap, block.index)
                handles.append(model.get_submodule(block.attention).register_forward_hook(hook))
        yield tap
    finally:
        for handle in handles:
            handle.remove()
        if not asked:
            batch.inputs.pop("output_attentions", None)
        for config, implementation in configs:
            config._attn_implementation_internal = implementation


def weights_as_call(weights: Tensor, valid: Tensor | None, *, causal: bool) -> AttentionCall:
    """Attention weights `[batch, head, query, key]` as a call whose softmax gives them back.

    Zero queries and keys leave only the mask, which is log A. A row sees the keys that causality and padding allow
    and that some head gives weight to: a key that is 0 in every head lies outside a local window, while under
    ALiBi far keys underflow in the steep heads only.
    """
    batch, heads, queries, keys = weights.shape
    seen = torch.ones(queries, keys, dtype=torch.bool, device=weights.device)
    if causal:
        seen = seen.tril(keys - queries)
    seen = seen.expand(batch, 1, queries, keys)
    if valid is not None:
        seen = seen & valid[:, None, None, :]
    seen = seen & (weights > 0).any(1, keepdim=True)
    mask = weights.float().log().clamp(min=_NEGLIGIBLE).masked_fill(~seen, float("-inf"))
    zeros = torch.zeros(batch, heads, max(queries, keys), 1, device=weights.device)
    query, key = zeros[:, :, :queries], zeros[:, :, :keys]
    return AttentionCall(query, key, key, scale=1.0, causal=False, mask=mask, counted=valid)


def _hook(tap: EagerTap, layer: int) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        return tap.see(layer, output)

    return hook


def _refusal(tower: Tower, layer: int) -> ModelError:
    return ModelError(
        "This family's attention is not traceable.",
        detail=f"Layer {layer} of the {tower.name} tower neither goes through transformers' attention registry nor "
        f"returns attention weights of {tower.heads} heads.",
        hint="Only its hidden states can be read: --analyzers massive-activations",
    )
