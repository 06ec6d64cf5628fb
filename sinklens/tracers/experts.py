"""The experts seam: one registered function sees every routed expert's `down_proj` output before its routing weight.

transformers keeps the experts of a block fused in two 3-D parameters, so there is no module to hook; its experts
registry is the place to look instead. The loop here is the obvious one, an expert at a time, and on CPU it gives
the same bits as the default grouped kernel; where it does not, `own_output=True` lets the model's kernel compute
the output and runs the loop beside it for the statistics only.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sinklens.core.errors import ModelError
from sinklens.models.spec import Tower
from sinklens.models.spread import Share, distributed, own_part, share_of

from .attention import Site

NAME = "sinklens_experts"
# In half precision on the CPU, experts are given multiples of this many rows.
_EVEN = 32
# Tokens whose outputs are weighted at once.
_TOKENS = 256

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
        neuron: The input of `down_proj` with the largest part in that entry; -1 where nobody asked.
        module, hidden: The experts and what they read, `[token, hidden]`: references, not copies.
        ablated: Experts whose output was set to zero afterwards.
        share: The part of every expert's neurons that this process holds, None for all of them.
    """

    n_experts: int
    slots: int
    expert: Int[Tensor, " row"]
    weight: Float[Tensor, " row"]
    value: Float[Tensor, " row"]
    dim: Int[Tensor, " row"]
    neuron: Int[Tensor, " row"]
    module: Any
    hidden: Float[Tensor, "token hidden"]
    ablated: frozenset[int] = frozenset()
    share: Share | None = None

    @property
    def index(self) -> Int[Tensor, "token slot"]:
        return self.expert.view(-1, self.slots)


Observer = Callable[[Site, Routed], None]
RouterObserver = Callable[[int, Tensor], None]
Lookup = Callable[[Tensor, int, Tensor], Tensor]
"""`(tokens, all tokens, values) -> places`: those of one expert's rows whose neuron shall be found."""


class ExpertsTap:
    """Sees, and may switch off, every routed expert of some modules while attached.

    Args:
        sites: Experts modules and where they are.
        observer: Receives the rows of each call.
        ablate: `(layer, expert)` pairs whose output becomes zero. Routing weights are not renormalised: the token
            loses that expert's contribution, exactly as with a zeroed `down_proj`.
        own_output: Let the model's own experts function compute the output (not with `ablate`).
        lookup: Which rows' neurons to find; None finds none.
    """

    def __init__(
        self,
        sites: dict[nn.Module, Site],
        observer: Observer | None = None,
        *,
        ablate: Collection[tuple[int, int]] = (),
        own_output: bool = False,
        lookup: Lookup | None = None,
    ) -> None:
        self.sites = {id(module): site for module, site in sites.items()}
        self.modules = list(sites)
        self.observer, self.ablate, self.own_output = observer, frozenset(ablate), own_output
        self.lookup = lookup
        self.before: dict[int, str | None] = {}
        self.shares = {id(module): neuron_share(module) for module in self.modules}
        self.calls = 0

    @contextmanager
    def attached(self) -> Iterator[ExpertsTap]:
        """Route the experts through this tap; everything is put back on exit, also after an error."""
        from transformers.integrations.moe import ExpertsInterface

        if self.sites.keys() & _attached.keys():
            raise ModelError("The experts of this model are already being traced.")
        for module in self.modules:
            if not hasattr(module, "has_gate"):
                raise ModelError(
                    f"{type(module).__name__} computes its experts itself, so they cannot be seen one by one.",
                    detail="Expected experts that go through transformers' experts interface.",
                    hint="Try: --analyzers primary-sinks,massive-activations",
                )
        ExpertsInterface.register(NAME, _entry)
        configs: dict[int, Any] = {id(module.config): module.config for module in self.modules}
        before = {key: config._experts_implementation for key, config in configs.items()}
        self.before = before
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
        output, routed = routed_experts(
            module, hidden, index, weights, self._ablated(site.layer), self.lookup, self.shares[id(module)]
        )
        if self.own_output:
            output = own_experts(module, self.before[id(module.config)])(hidden, index, weights)
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
    lookup: Lookup | None = None,
    share: Share | None = None,
) -> tuple[Float[Tensor, "token hidden"], Routed]:
    """The layer output of a fused experts module, an expert at a time, and the largest entry of every row.

    Of experts whose neurons are spread over processes the output is this one's part of the sum, and entries are whole.
    """
    tokens, slots = index.shape
    n_experts = int(module.num_experts)
    flat = index.reshape(-1)
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat.clamp(max=n_experts), minlength=n_experts + 1).tolist()
    rows_out = hidden.new_zeros(tokens * slots, hidden.shape[-1])
    value = torch.zeros(tokens * slots, dtype=torch.float32, device=hidden.device)
    dim = torch.zeros(tokens * slots, dtype=torch.long, device=hidden.device)
    neuron = torch.full_like(dim, -1)
    start = 0
    for expert, count in enumerate(counts[:n_experts]):
        if not count:
            continue
        rows = order[start : start + count]
        start += count
        inner = expert_inner(module, expert, _evenly(hidden[rows // slots]))
        mine = expert_outer(module, expert, inner)[:count]
        inner = inner[:count]
        y = mine if share is None else share.spread.summed(mine)
        dim[rows] = y.abs().argmax(-1)
        value[rows] = y.gather(-1, dim[rows, None]).squeeze(-1).float()
        if lookup is not None:
            asked = lookup(rows // slots, tokens, value[rows])
            found = strongest_inputs(module, expert, inner[asked], dim[rows[asked]], share)
            neuron[rows[asked]] = found[0]
        if expert not in ablated:
            rows_out[rows] = mine
    output = _mixed(rows_out.view(tokens, slots, -1), weights)
    weight = weights.reshape(-1).float()
    return output, Routed(n_experts, slots, flat, weight, value, dim, neuron, module, hidden, ablated, share)


def _evenly(x: Float[Tensor, "row hidden"]) -> Float[Tensor, "padded hidden"]:
    """With rows of zeros up to a multiple of `_EVEN`, where torch compiles for each number of rows and keeps that."""
    if x.device.type != "cpu" or x.dtype.itemsize > 2 or len(x) % _EVEN == 0:
        return x
    return torch.cat([x, x.new_zeros(-len(x) % _EVEN, x.shape[1])])


def _mixed(
    outputs: Float[Tensor, "token slot hidden"], weights: Float[Tensor, "token slot"]
) -> Float[Tensor, "token hidden"]:
    """The weighted sum over slots, some tokens at a time: the products are as large as all that experts put out."""
    parts = zip(outputs.split(_TOKENS), weights.split(_TOKENS), strict=True)
    return torch.cat([(part * weight[..., None]).sum(1).to(outputs.dtype) for part, weight in parts])


def expert_output(module: Any, expert: int, x: Float[Tensor, "row hidden"]) -> Float[Tensor, "row hidden"]:
    """`down_proj` output of one fused expert, with the layout flags transformers puts on the module."""
    return expert_outer(module, expert, expert_inner(module, expert, x))


def expert_inner(module: Any, expert: int, x: Float[Tensor, "row hidden"]) -> Float[Tensor, "row inner"]:
    """What the expert's `down_proj` reads."""
    inner = _projected(module, expert, x)
    return module._apply_gate(inner) if module.has_gate else module.act_fn(inner)


def expert_outer(
    module: Any, expert: int, inner: Float[Tensor, "row inner"], share: Share | None = None
) -> Float[Tensor, "row hidden"]:
    """What the expert makes of that; with a share the sum over all processes, each of which gives its `inner`."""
    down = own_part(module.down_proj)[expert]
    y = inner @ (down if module.is_transposed else down.T)
    if share is not None:
        y = share.spread.summed(y)
    if module.has_bias:
        y = y + module.down_proj_bias[expert]
    return module.post_expert_norm(y) if module.has_post_expert_norm else y


def expert_parts(
    module: Any, expert: int, x: Float[Tensor, "row hidden"]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gate, up and act(gate) of an expert; None where it has none, or where they cannot be told apart.

    The two halves are taken at their word only if `act(gate) * up` is what the module makes of them.
    """
    inner = _projected(module, expert, x)
    if not module.has_gate:
        return None, inner, None
    product = module._apply_gate(inner)
    for gate, up in (inner.chunk(2, -1), (inner[..., 0::2], inner[..., 1::2])):
        act = getattr(module, "act_fn", None)
        if act is not None and torch.allclose(act(gate) * up, product, rtol=1e-3, atol=1e-6):
            return gate, up, act(gate)
    return None, None, None


def strongest_inputs(
    module: Any,
    expert: int,
    inner: Float[Tensor, "row inner"],
    dim: Int[Tensor, " row"],
    share: Share | None = None,
) -> tuple[Int[Tensor, " row"], Float[Tensor, " row"]]:
    """The input of the expert's `down_proj` with the largest part in output `dim` of each row, and that part."""
    down = own_part(module.down_proj)[expert]
    rows = down[:, dim].T if module.is_transposed else down[dim]
    parts = inner.float() * rows.float()  # the bias belongs to no input
    parts = parts if share is None else share.joined(parts)
    neuron = parts.abs().argmax(-1)
    return neuron, parts.gather(-1, neuron[:, None]).squeeze(-1)


def _projected(module: Any, expert: int, x: Float[Tensor, "row hidden"]) -> Float[Tensor, "row wide"]:
    """The expert's first projection, gate and up together where it has a gate."""
    gated = module.has_gate
    up = own_part(module.gate_up_proj if gated else module.up_proj)[expert]
    inner = x @ (up if module.is_transposed else up.T)
    if module.has_bias:
        inner = inner + (module.gate_up_proj_bias if gated else module.up_proj_bias)[expert]
    return inner


def neuron_share(module: Any) -> Share | None:
    """The part of every expert's neurons that this process holds; None where it holds all of them.

    Raises:
        ModelError: Whole experts are spread, or parts that cannot be added up again.
    """
    down = getattr(module, "down_proj", None)
    if not isinstance(down, Tensor) or not distributed(down):
        return None
    share = share_of(down, 1 if module.is_transposed else 2)
    if share is not None and (module.has_bias or module.has_post_expert_norm):
        raise ModelError(
            f"{type(module).__name__} is spread over processes, and its outputs are more than a sum over neurons."
        )
    return share


@contextmanager
def router_tap(model: nn.Module, tower: Tower, observer: RouterObserver) -> Iterator[None]:
    """`observer(layer, scores)` with what each router says of every expert, `[token, expert]`, before the choice."""

    def hook(layer: int) -> Callable[..., None]:
        def see(module: nn.Module, args: Any, output: Any) -> None:
            parts = output if isinstance(output, tuple | list) else (output,)
            for part in parts:
                if (
                    isinstance(part, Tensor)
                    and part.is_floating_point()
                    and part.shape[-1] == tower.n_experts
                ):
                    observer(layer, part.reshape(-1, part.shape[-1]))
                    return

        return see

    with ExitStack() as stack:
        for block in tower.blocks:
            if block.experts and block.router:
                handle = model.get_submodule(block.router).register_forward_hook(hook(block.index))
                stack.callback(handle.remove)
        yield


def router_scores(
    raw: Float[Tensor, "token expert"], index: Int[Tensor, "token slot"], weights: Float[Tensor, "token slot"]
) -> Float[Tensor, "token expert"] | None:
    """The scores that the routing weights were made of: softmax or sigmoid of what the router put out, or itself.

    Routing weights are the chosen experts' scores up to a factor per token (normalisation, scaling), so the right
    function is the one that gives weights and scores the same ratio in every slot. None if none does.
    """
    # The router's own type: its weights were rounded to it, whatever type they come in here.
    limit = 4 * max(torch.finfo(kind).eps for kind in (raw.dtype, weights.dtype, torch.float32))
    raw = raw.float()
    sample = torch.linspace(0, len(raw) - 1, min(len(raw), 32), device=raw.device).long().unique()
    index, given = index[sample], weights[sample].float()
    routed = (index >= 0) & (index < raw.shape[-1])
    best, least = None, max(limit, 1e-4)
    # A router that has no slot to compare with must give the weights themselves.
    alone = index.shape[-1] == 1
    for function in _score_functions(raw):
        scores = function(raw[sample]).gather(-1, index.clamp(0, raw.shape[-1] - 1))
        ratio = torch.where(routed, given / scores.clamp_min(1e-30), torch.nan)
        middle = ratio.nanmean(-1, keepdim=True)
        error = float(
            ((ratio - (torch.ones_like(middle) if alone else middle)).abs() / middle).nan_to_num(0).max()
        )
        if error < least:
            best, least = function, error
    return best(raw) if best is not None else None


def _score_functions(raw: Tensor) -> tuple[Callable[[Tensor], Tensor], ...]:
    shares = bool((raw >= 0).all()) and bool(((raw.sum(-1) - 1).abs() < 1e-2).all())
    softmax, sigmoid = (lambda x: torch.softmax(x, -1)), torch.sigmoid
    roots = lambda x: torch.nn.functional.softplus(x).sqrt()  # noqa: E731
    return (lambda x: x, softmax, sigmoid) if shares else (softmax, sigmoid, roots)


def _entry(module: Any, hidden: Tensor, index: Tensor, weights: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    tap = _attached.get(id(module))
    if tap is None:
        raise ModelError(
            f"{type(module).__name__} was left pointing at a tracing function that is not attached."
        )
    return tap.run(module, hidden, index, weights)
