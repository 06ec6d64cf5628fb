"""The experts seam: one registered function sees every routed expert's `down_proj` output before its routing weight.

transformers keeps the experts of a block fused in two 3-D parameters, so there is no module to hook; its experts
registry is the place to look instead. The loop here is the obvious one, an expert at a time, and on CPU it gives
the same bits as the default grouped kernel; where it does not, `own_output=True` lets the model's kernel compute
the output and runs the loop beside it for the statistics only.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sinklens.core.errors import ModelError

from .attention import Site

NAME = "sinklens_experts"

_attached: dict[int, ExpertsTap] = {}


@dataclass(frozen=True)
class Routed:
    """What each routed row of one experts call put out, before the routing weight.

    A *row* is one (token, slot) pair, `row = token * slots + slot`, in the flattened batch.

    Attributes:
        expert: The expert of each row; `n_experts` marks a row that is routed nowhere.
        weight: Its routing weight.
        value: The signed entry of largest magnitude of the expert's output for that row, float32.
        dim: The dim of that entry.
    """

    n_experts: int
    slots: int
    expert: Int[Tensor, " row"]
    weight: Float[Tensor, " row"]
    value: Float[Tensor, " row"]
    dim: Int[Tensor, " row"]


Observer = Callable[[Site, Routed], None]


class ExpertsTap:
    """Sees, and may switch off, every routed expert of some modules while attached.

    Args:
        sites: Experts modules and where they are.
        observer: Receives the rows of each call.
        ablate: `(layer, expert)` pairs whose output becomes zero. Routing weights are not renormalised: the token
            loses that expert's contribution, exactly as with a zeroed `down_proj`.
        own_output: Let the model's own experts function compute the output (not with `ablate`).
    """

    def __init__(
        self,
        sites: dict[nn.Module, Site],
        observer: Observer | None = None,
        *,
        ablate: Collection[tuple[int, int]] = (),
        own_output: bool = False,
    ) -> None:
        self.sites = {id(module): site for module, site in sites.items()}
        self._modules = list(sites)
        self.observer, self.ablate, self.own_output = observer, frozenset(ablate), own_output
        self._before: dict[int, str | None] = {}
        self.calls = 0

    @contextmanager
    def attached(self) -> Iterator[ExpertsTap]:
        """Route the experts through this tap; everything is put back on exit, also after an error."""
        from transformers.integrations.moe import ExpertsInterface

        if self.sites.keys() & _attached.keys():
            raise ModelError("The experts of this model are already being traced.")
        ExpertsInterface.register(NAME, _entry)
        configs: dict[int, Any] = {id(module.config): module.config for module in self._modules}
        before = {key: config._experts_implementation for key, config in configs.items()}
        self._before = before
        try:
            for config in configs.values():
                config._experts_implementation_internal = NAME
            _attached.update(dict.fromkeys(self.sites, self))
            yield self
        finally:
            for key in self.sites:
                _attached.pop(key, None)
            for key, config in configs.items():
                config._experts_implementation_internal = before[key]
            if not _attached:
                ExpertsInterface._global_mapping.pop(NAME, None)

    def run(self, module: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """One experts call: the layer's routed output; the rows go to the observer."""
        self.calls += 1
        site = self.sites[id(module)]
        output, routed = routed_experts(module, hidden, index, weights, self._ablated(site.layer))
        if self.own_output:
            output = own_experts(module, self._before[id(module.config)])(hidden, index, weights)
        if self.observer is not None:
            self.observer(site, routed)
        return output

    def _ablated(self, layer: int) -> frozenset[int]:
        return frozenset(expert for at, expert in self.ablate if at == layer)


def own_experts(module: Any, implementation: str | None) -> Callable[..., Tensor]:
    """The experts function this module would have called, bound to it."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    original = type(module).forward.__wrapped__
    function = ALL_EXPERTS_FUNCTIONS.get(implementation, original) if implementation else original
    return lambda *args: function(module, *args)


def routed_experts(
    module: Any,
    hidden: Float[Tensor, "token hidden"],
    index: Int[Tensor, "token slot"],
    weights: Float[Tensor, "token slot"],
    ablated: frozenset[int] = frozenset(),
) -> tuple[Float[Tensor, "token hidden"], Routed]:
    """The layer output of a fused experts module, an expert at a time, and the largest entry of every row."""
    tokens, slots = index.shape
    n_experts = int(module.num_experts)
    flat = index.reshape(-1)
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat.clamp(max=n_experts), minlength=n_experts + 1).tolist()
    rows_out = hidden.new_zeros(tokens * slots, hidden.shape[-1])
    value = torch.zeros(tokens * slots, dtype=torch.float32, device=hidden.device)
    dim = torch.zeros(tokens * slots, dtype=torch.long, device=hidden.device)
    start = 0
    for expert, count in enumerate(counts[:n_experts]):
        if not count:
            continue
        rows = order[start : start + count]
        start += count
        y = expert_output(module, expert, hidden[rows // slots])
        dim[rows] = y.abs().argmax(-1)
        value[rows] = y.gather(-1, dim[rows, None]).squeeze(-1).float()
        if expert not in ablated:
            rows_out[rows] = y
    output = (rows_out * weights.reshape(-1, 1)).view(tokens, slots, -1).sum(1).to(hidden.dtype)
    return output, Routed(n_experts, slots, flat, weights.reshape(-1).float(), value, dim)


def expert_output(module: Any, expert: int, x: Float[Tensor, "row hidden"]) -> Float[Tensor, "row hidden"]:
    """`down_proj` output of one fused expert, with the layout flags transformers puts on the module."""
    transposed, biased, gated = module.is_transposed, module.has_bias, module.has_gate
    up, down = (module.gate_up_proj if gated else module.up_proj)[expert], module.down_proj[expert]
    inner = x @ (up if transposed else up.T)
    if biased:
        inner = inner + (module.gate_up_proj_bias if gated else module.up_proj_bias)[expert]
    inner = module._apply_gate(inner) if gated else module.act_fn(inner)
    y = inner @ (down if transposed else down.T)
    if biased:
        y = y + module.down_proj_bias[expert]
    return module.post_expert_norm(y) if module.has_post_expert_norm else y


def _entry(module: Any, hidden: Tensor, index: Tensor, weights: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    tap = _attached.get(id(module))
    if tap is None:
        raise ModelError(
            f"{type(module).__name__} was left pointing at a tracing function that is not attached."
        )
    return tap.run(module, hidden, index, weights)
