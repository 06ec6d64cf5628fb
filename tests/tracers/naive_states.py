"""The residual stream the plain way: named modules, copies of everything, one prompt and one number at a time."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sinklens.tracers.batch import Batch, forward

# Where the families of the tests keep their blocks, and which modules write: attention, feed-forward part, down
# projection (or the one of shared experts). Written down by hand, so that it can disagree with what is found.
WRITERS: dict[str, tuple[str, str, str, str | None]] = {
    "llama": ("model.layers", "self_attn.o_proj", "mlp.down_proj", "mlp.down_proj"),
    "phi3": ("model.layers", "self_attn.o_proj", "mlp.down_proj", "mlp.down_proj"),
    "gemma2": ("model.layers", "post_attention_layernorm", "post_feedforward_layernorm", "mlp.down_proj"),
    "olmo2": ("model.layers", "post_attention_layernorm", "post_feedforward_layernorm", "mlp.down_proj"),
    "gpt_neox": ("gpt_neox.layers", "attention.dense", "mlp.dense_4h_to_h", "mlp.dense_4h_to_h"),
    "gpt2": ("transformer.h", "attn.c_proj", "mlp.c_proj", "mlp.c_proj"),
    "opt": ("model.decoder.layers", "self_attn.out_proj", "fc2", "fc2"),
    "falcon": ("transformer.h", "self_attention.dense", "mlp.dense_4h_to_h", "mlp.dense_4h_to_h"),
    "bloom": ("transformer.h", "self_attention.dense", "mlp.dense_4h_to_h", "mlp.dense_4h_to_h"),
    "mixtral": ("model.layers", "self_attn.o_proj", "mlp", None),
    "qwen2_moe": ("model.layers", "self_attn.o_proj", "mlp", "mlp.shared_expert.down_proj"),
    "qwen3_moe": ("model.layers", "self_attn.o_proj", "mlp", None),
    "gpt_oss": ("model.layers", "self_attn.o_proj", "mlp", None),
    "deepseek_v3": ("model.layers", "self_attn.o_proj", "mlp", "mlp.shared_experts.down_proj"),
    "bert": ("encoder.layer", "attention.output.LayerNorm", "output.dense", "output.dense"),
}


@dataclass
class NaiveBlock:
    """One block's tensors, `[batch, pos, dim]`; `product` is what the down projection reads."""

    before: Tensor = field(default_factory=lambda: torch.empty(0))
    after: Tensor = field(default_factory=lambda: torch.empty(0))
    attention: Tensor = field(default_factory=lambda: torch.empty(0))
    mlp: Tensor = field(default_factory=lambda: torch.empty(0))
    product: Tensor | None = None
    weight: Tensor | None = None
    """The down projection as `[dim, inner]`."""
    experts: tuple[Any, Tensor, Tensor, Tensor] | None = None
    """The experts module and its inputs: hidden, chosen experts, routing weights."""
    logits: Tensor | None = None
    """What the router computes from its weights alone, `[batch * pos, expert]`."""


@torch.no_grad()
def watch(model: nn.Module, family: str, batch: Batch) -> list[NaiveBlock]:
    """One forward pass with hooks on the modules of `WRITERS`."""
    path, attention, mlp, down = WRITERS[family]
    found: list[NaiveBlock] = []
    with ExitStack() as stack:

        def on(module: nn.Module, see: Callable[[Any, Any], None]) -> None:
            def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
                inputs = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
                made = output[0] if isinstance(output, tuple) else output
                see([value.clone() for value in inputs], made.clone())

            stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)

        for layer in list(model.get_submodule(path)):  # pyright: ignore[reportArgumentType]
            block = NaiveBlock()
            found.append(block)
            _watch_block(layer, block, on, family, attention, mlp, down)
        forward(model, batch)
    for block in found:
        _finish(block, family)
    return found


def _watch_block(
    layer: Any, block: NaiveBlock, on: Any, family: str, attention: str, mlp: str, down: str | None
) -> None:
    def ends(inputs: Any, made: Tensor) -> None:
        block.before = inputs[0]
        if family != "bert":
            block.after = made

    def adds(name: str) -> Any:
        return lambda inputs, made: setattr(block, name, made)

    on(layer, ends)
    on(layer.get_submodule(attention), adds("attention"))
    on(layer.get_submodule(mlp), adds("mlp"))
    if family == "bert":
        on(layer.output.LayerNorm, lambda inputs, made: setattr(block, "after", inputs[0]))
    moe = hasattr(layer, "mlp") and hasattr(layer.mlp, "experts")
    dense = down if moe or "shared" not in (down or "") else "mlp.down_proj"
    if dense is not None:
        module = layer.get_submodule(dense)
        block.weight = module.weight.T if family == "gpt2" else module.weight
        on(module, lambda inputs, made: setattr(block, "product", inputs[0]))
    if moe:
        experts = layer.mlp.experts
        on(experts, lambda inputs, made: setattr(block, "experts", (experts, *inputs)))
        router = layer.mlp.router if hasattr(layer.mlp, "router") else layer.mlp.gate

        def scores(inputs: Any, made: Tensor) -> None:
            hidden = inputs[0].reshape(-1, inputs[0].shape[-1]).float()
            bias = getattr(router, "bias", None)
            block.logits = hidden @ router.weight.float().T + (0 if bias is None else bias)

        on(router, scores)


def _finish(block: NaiveBlock, family: str) -> None:
    if family == "bert":  # what the attention and its LayerNorm make of the input
        block.attention = block.attention - block.before
    block.mlp = block.mlp.reshape(block.before.shape)


def inner_of(module: Any, expert: int, x: Tensor) -> Tensor:
    """What one expert's down projection reads, for one token."""
    gate_up = module.gate_up_proj[expert]
    if hasattr(module, "gate_up_proj_bias"):  # GPT-OSS: transposed, interleaved, clamped, (up + 1) * swish
        inner = gate_up.T @ x + module.gate_up_proj_bias[expert]
        gate, up = inner[0::2].clamp(max=module.limit), inner[1::2].clamp(-module.limit, module.limit)
        return (up + 1) * gate * torch.sigmoid(gate * module.alpha)
    gate, up = (gate_up @ x).chunk(2)
    return module.act_fn(gate) * up


def down_of(module: Any, expert: int) -> tuple[Tensor, Tensor | float]:
    """One expert's down projection, `[dim, inner]`, and its bias."""
    if hasattr(module, "down_proj_bias"):
        return module.down_proj[expert].T, module.down_proj_bias[expert]
    return module.down_proj[expert], 0.0


def strongest(values: Tensor, count: int) -> list[tuple[int, int]]:
    """Places of the largest magnitudes of `[pos, dim]`, strongest first."""
    order = np.argsort(-values.abs().double().numpy().ravel(), kind="stable")[:count]
    return [tuple(int(i) for i in np.unravel_index(place, tuple(values.shape))) for place in order]  # pyright: ignore
