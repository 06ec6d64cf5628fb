"""What a testbed shows, read with plain hooks and eager attention: the independent side of every comparison.

Nothing here goes through the tracers, so that a test can hold the tracers against it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from .blocks import Layer, Part, decoder_layers
from .planting.probe import eager

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Reading:
    """One forward pass over sequences of equal length, no padding. Layers are 0-based.

    Attributes:
        attention: Post-softmax weights, `[layer, prompt, head, query, key]`.
        states: Residual stream after each block, before the final norm, `[layer, prompt, position, dim]`.
        values: Norm of each value vector, `[layer, prompt, kv_head, position]`.
        experts: Largest |down_proj output| before the routing weight, `[layer, expert]`; None without
            experts, 0 where an expert got no token.
        expert_positions: Position of that largest entry, `[layer, expert]`.
        loss: Mean next-token loss in nats.
    """

    attention: Float[Tensor, "layer prompt head query key"]
    states: Float[Tensor, "layer prompt position dim"]
    values: Float[Tensor, "layer prompt kv_head position"]
    experts: Float[Tensor, "layer expert"] | None
    expert_positions: Int[Tensor, "layer expert"] | None
    loss: float

    def received(self, position: int = 0) -> Float[Tensor, "layer prompt head"]:
        """Mean attention that `position` receives from the queries that see it, itself included."""
        return self.attention[..., position:, position].mean(-1)

    def sink_rate(self, position: int = 0, epsilon: float = 0.3) -> float:
        """Share of (prompt, layer, head) whose received attention exceeds epsilon (Gu et al., 2410.10781)."""
        return float((self.received(position) > epsilon).float().mean())

    def norm_ratio(self, position: int = 0) -> Float[Tensor, " layer"]:
        """|h| at the position (mean over prompts) over the median |h| of the other tokens, per layer."""
        norms = self.states.norm(dim=-1)
        others = torch.cat([norms[..., :position], norms[..., position + 1 :]], -1)
        return norms[..., position].mean(1) / others.flatten(1).median(1).values

    def largest(self) -> list[tuple[float, int, int, float]]:
        """Per layer: the largest |h|, its position, its dim, and its ratio to the layer's median |h|."""
        found = []
        for state in self.states.abs():
            index = int(state.argmax())
            dim, position = index % state.shape[-1], index // state.shape[-1] % state.shape[-2]
            top = float(state.flatten()[index])
            found.append((top, position, dim, top / float(state.median())))
        return found

    def value_ratio(self, position: int = 0) -> Float[Tensor, "layer kv_head"]:
        """|v| at the position (mean over prompts) over the median |v| of the other tokens."""
        others = torch.cat([self.values[..., :position], self.values[..., position + 1 :]], -1)
        middle = others.transpose(1, 2).flatten(2).median(-1).values
        return self.values[..., position].mean(1) / middle


def expert_outputs(
    experts: Part, hidden: Float[Tensor, "token dim"], chosen: Int[Tensor, "token slot"]
) -> Iterator[tuple[int, Int[Tensor, " routed"], Float[Tensor, "routed dim"]]]:
    """Per expert with tokens: its index, the tokens, its down_proj output before the routing weight."""
    for expert in chosen.unique().tolist():
        tokens = (chosen == expert).any(-1).nonzero().squeeze(-1)
        gate, up = nn.functional.linear(hidden[tokens], experts.gate_up_proj[expert]).chunk(2, -1)
        yield expert, tokens, nn.functional.linear(experts.act_fn(gate) * up, experts.down_proj[expert])


def read(model: PreTrainedModel, ids: Int[Tensor, "prompt position"]) -> Reading:
    """Runs the model once and keeps everything. Meant for tiny models: it stores every attention map."""
    layers = decoder_layers(model)
    states: dict[int, Tensor] = {}
    values: dict[int, Tensor] = {}
    routed: dict[int, tuple[Tensor, Tensor]] = {}
    handles = []

    def keep_state(index: int):
        def hook(_module: nn.Module, _args: object, output: Tensor | tuple[Tensor, ...]) -> None:
            states[index] = output[0] if isinstance(output, tuple) else output

        return hook

    def keep_value(index: int):
        def hook(module: nn.Module, _args: object, output: Tensor) -> None:
            value = output.chunk(3, -1)[2] if module.__class__.__name__ == "Conv1D" else output
            width = layers[index].head_dim
            values[index] = value.unflatten(-1, (-1, width)).norm(dim=-1).transpose(1, 2)

        return hook

    def keep_routing(index: int):
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            routed[index] = (args[0], args[1])

        return hook

    for index, layer in enumerate(layers):
        handles.append(layer.module.register_forward_hook(keep_state(index)))
        handles.append(layer.value_module.register_forward_hook(keep_value(index)))
        if layer.experts is not None:
            handles.append(layer.experts.register_forward_pre_hook(keep_routing(index)))
    try:
        with torch.no_grad(), eager(model):
            output = model(input_ids=ids, labels=ids, output_attentions=True, use_cache=False)
        peaks, places = _expert_peaks(layers, routed, ids.shape[1]) if routed else (None, None)
    finally:
        for handle in handles:
            handle.remove()
    count = range(len(layers))
    return Reading(
        attention=torch.stack([weights.float() for weights in output.attentions]),
        states=torch.stack([states[index].float() for index in count]),
        values=torch.stack([values[index].float() for index in count]),
        experts=peaks,
        expert_positions=places,
        loss=float(output.loss),
    )


def _expert_peaks(
    layers: list[Layer], routed: dict[int, tuple[Tensor, Tensor]], length: int
) -> tuple[Float[Tensor, "layer expert"], Int[Tensor, "layer expert"]]:
    modules = {index: layers[index].experts for index in routed}
    width = max(module.num_experts for module in modules.values() if module is not None)
    peaks = torch.zeros(len(layers), width)
    places = torch.full((len(layers), width), -1)
    with torch.no_grad():
        for index, (hidden, chosen) in routed.items():
            for expert, tokens, output in expert_outputs(modules[index], hidden, chosen):
                size = output.abs().amax(-1)
                peaks[index, expert] = size.max()
                places[index, expert] = tokens[size.argmax()] % length
    return peaks, places


@contextmanager
def without_expert(model: PreTrainedModel, layer: int, expert: int) -> Iterator[None]:
    """The expert writes nothing inside the `with`; routing is untouched. The weights come back afterwards."""
    experts = decoder_layers(model)[layer].experts
    assert experts is not None
    weight = experts.down_proj
    before = weight.detach()[expert].clone()
    with torch.no_grad():
        weight[expert] = 0
    try:
        yield
    finally:
        with torch.no_grad():
            weight[expert] = before
