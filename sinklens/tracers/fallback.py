"""The fallbacks for families whose attention does not go through the registry.

Some call torch's `scaled_dot_product_attention` themselves (Falcon): `DirectTap` stands in that call, and everything
is as good as at the registry. The others multiply and normalise by hand (BLOOM, GPT-J, ...) but return the weights
when asked: `WeightsTap` reduces one layer's weights and drops them before the next layer runs. That is exact, but one
T x T map per head is alive at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from sinklens.core.errors import ModelError
from sinklens.kernels.blocked import attention_sweep
from sinklens.kernels.spec import AttentionCall
from sinklens.models.spec import Tower

from .attention import Site
from .batch import Batch
from .hf_attention import attention_configs

_NEGLIGIBLE = -1e4


@contextmanager
def fallback_tap(model: nn.Module, tower: Tower, batch: Batch, seen: Any) -> Iterator[DirectTap | WeightsTap]:
    """The tap that fits how this family computes attention; everything is put back on exit."""
    attach = direct_tap if calls_kernel_directly(model) else weights_tap
    with attach(model, tower, batch, seen) as tap:
        yield tap


def calls_kernel_directly(model: nn.Module) -> bool:
    """Whether a family outside the registry runs torch's fused attention (its config says so)."""
    return getattr(model.config, "_attn_implementation", None) == "sdpa"


class DirectTap(TorchFunctionMode):
    """Sees calls of `scaled_dot_product_attention` made while an attention module of the tower runs."""

    def __init__(self, tower: Tower, batch: Batch, seen: Any) -> None:
        super().__init__()
        self.tower, self.batch, self.seen = tower, batch, seen
        self.layer: int | None = None
        self.calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not scaled_dot_product_attention or self.layer is None:
            return func(*args, **kwargs)
        call = direct_call(*args, **kwargs, counted=self.batch.valid)
        site = Site(self.tower.name, self.layer)
        output = func(*args, **kwargs)
        self.seen.on_attention(site, call, attention_sweep(call, self.seen.asks(site, call)))
        self.calls += 1
        return output

    def enter(self, layer: int) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            self.layer = layer

        return hook

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.layer = None


@contextmanager
def direct_tap(model: nn.Module, tower: Tower, batch: Batch, seen: Any) -> Iterator[DirectTap]:
    """Stand in the model's calls of torch's attention kernel; the output stays bit-identical."""
    tap = DirectTap(tower, batch, seen)
    handles = []
    try:
        for block in tower.blocks:
            if block.attention is not None:
                module = model.get_submodule(block.attention)
                handles.append(module.register_forward_pre_hook(tap.enter(block.index)))
                handles.append(module.register_forward_hook(tap.leave))
        with tap:
            yield tap
    finally:
        for handle in handles:
            handle.remove()


def direct_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    counted: Tensor | None = None,
) -> AttentionCall:
    """The arguments of torch's `scaled_dot_product_attention` as the kernels see them."""
    return AttentionCall(
        query,
        key,
        value,
        scale=query.shape[-1] ** -0.5 if scale is None else scale,
        causal=is_causal,
        mask=attn_mask,
        counted=counted,
    )


class WeightsTap:
    """Reduces attention weights as modules return them; counts the calls it saw."""

    def __init__(self, tower: Tower, batch: Batch, seen: Any) -> None:
        self.tower, self.batch, self.seen = tower, batch, seen
        self.calls = 0

    def see(self, layer: int, output: Any) -> Any:
        """Reduce the weights in a module's output and return the output without them."""
        if not isinstance(output, tuple):
            raise _refusal(self.tower, layer)
        shapes = [
            isinstance(part, Tensor) and part.ndim == 4 and part.shape[1] == self.tower.heads
            for part in output
        ]
        if True not in shapes:
            raise _refusal(self.tower, layer)
        place = shapes.index(True)
        call = weights_as_call(output[place], self.batch.valid, causal=self.tower.causal)
        site = Site(self.tower.name, layer)
        self.seen.on_attention(site, call, attention_sweep(call, self.seen.asks(site, call)))
        self.calls += 1
        return (*output[:place], None, *output[place + 1 :])


@contextmanager
def weights_tap(model: nn.Module, tower: Tower, batch: Batch, seen: Any) -> Iterator[WeightsTap]:
    """Ask the model for its attention weights and reduce them layer by layer; everything is put back on exit."""
    tap = WeightsTap(tower, batch, seen)
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
    # The values are not known here: a width of 0 says so.
    return AttentionCall(query, key, key[..., :0], scale=1.0, causal=False, mask=mask, counted=valid)


def _hook(tap: WeightsTap, layer: int) -> Any:
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
