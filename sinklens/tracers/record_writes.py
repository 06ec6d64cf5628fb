"""Signals of what writes: the strongest entries before and after a block, each traced to what added it.

after = before + attention + mlp holds entry by entry, so the largest entries need a few dozen numbers per block and
no copy of any state. Neurons and experts are looked up only where the feed-forward part matters to the entry.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sinklens.kernels.magnitudes import Largest, largest_magnitudes
from sinklens.models.spec import Write
from sinklens.models.spread import rows_of, whole_input

from . import signals as sig
from .experts import Routed, expert_inner, expert_outer, strongest_inputs
from .ledger import Ledger
from .states import BlockPass

ENTRY_SIGNALS = frozenset(signal for signal in sig.ALL_SIGNALS if "entry" in signal.axes)
LOOKED_UP = 0.1
"""The share of max(|before|, |after|) that the feed-forward part must add before anyone asks who in it did."""

HALF = sig.ENTRIES // 2


@dataclass(frozen=True)
class Entries:
    """Traced entries of one prompt in one block. Values are float32; places count real tokens.

    Attributes:
        place: Rows of the entries in the padded batch, all prompts flattened.
    """

    pos: Int[Tensor, " entry"]
    dim: Int[Tensor, " entry"]
    place: Int[Tensor, " entry"]
    after: Float[Tensor, " entry"]
    before: Float[Tensor, " entry"]
    attention: Float[Tensor, " entry"]
    mlp: Float[Tensor, " entry"]

    def looked_up(self) -> Int[Tensor, " found"]:
        """Entries to which the feed-forward part adds much."""
        much = self.mlp.abs() >= LOOKED_UP * torch.maximum(self.after.abs(), self.before.abs())
        return (much & (self.mlp != 0)).nonzero().squeeze(-1)


@dataclass
class Found:
    """Who in the feed-forward part wrote an entry: expert -1 is a dense part or a shared expert."""

    expert: Int[Tensor, " entry"]
    expert_value: Float[Tensor, " entry"]
    neuron: Int[Tensor, " entry"]
    neuron_value: Float[Tensor, " entry"]

    @classmethod
    def nothing(cls, count: int) -> Found:
        unknown, nan = torch.full((count,), -1, dtype=torch.int32), torch.full((count,), float("nan"))
        return cls(unknown, nan, unknown.clone(), nan.clone())


class WritesRecorder:
    """Traces the strongest entries of each block of one batch."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self._last: tuple[weakref.ref[Tensor], int, dict[int, Largest]] | None = None
        self._now: dict[int, Largest] = {}

    def see(self, row: int, passed: BlockPass, top: Largest) -> None:
        """Record prompt `row` of a block whose largest entries afterwards are `top`."""
        before_top = self._before(row, passed)
        self._remember(row, passed, top)
        picked = [_first(top, HALF), *([_first(before_top, HALF)] if before_top is not None else [])]
        pos = torch.cat([largest.pos for largest in picked])
        dim = torch.cat([largest.dim for largest in picked])
        entries = self._entries(row, passed, pos, dim)
        found = Found.nothing(len(pos))
        if self.ledger.wanted & {
            sig.WRITE_NEURON,
            sig.WRITE_NEURON_VALUE,
            sig.WRITE_EXPERT,
            sig.WRITE_EXPERT_VALUE,
        }:
            look_up(entries, passed, self.ledger.routed.get(passed.block.index), found)
        self._put(row, passed.block.index, [len(largest.pos) for largest in picked], entries, found)

    def _before(self, row: int, passed: BlockPass) -> Largest | None:
        """The largest entries of the block's input; known already if it is what the last block put out."""
        if passed.before is None:
            return None
        if self._last is not None:
            state, version, tops = self._last
            if state() is passed.before and _version(passed.before) == version and row in tops:
                return tops[row]
        return largest_magnitudes(self.ledger.row(row, passed.before), HALF)

    def _remember(self, row: int, passed: BlockPass, top: Largest) -> None:
        assert passed.after is not None
        if row == 0:
            self._now = {}
        self._now[row] = _first(top, HALF)
        version = _version(passed.after)
        if row == self.ledger.batch.size - 1:
            self._last = None if version is None else (weakref.ref(passed.after), version, self._now)

    def _entries(self, row: int, passed: BlockPass, pos: Tensor, dim: Tensor) -> Entries:
        assert passed.after is not None
        total, width = passed.block.sum, passed.after.shape[-1]
        length = passed.after.numel() // width // self.ledger.batch.size
        place = row * length + self.ledger.places(length, pos.device)[row][pos]

        def at(tensor: Tensor) -> Tensor:
            return tensor.detach().reshape(-1, tensor.shape[-1])[place, dim].float()

        nan = torch.full(pos.shape, float("nan"), device=pos.device)
        before = at(passed.before) if passed.before is not None else nan
        attention = mlp = nan
        if total.exact:
            made = passed.made
            attention = added(
                at(made[write.path]) * write.scale for write in total.attention if write.path in made
            )
            attention = torch.zeros_like(before) if attention is None else attention
            if total.middle is not None:
                attention = at(made[total.middle]) - before
            mlp = added(at(made[write.path]) * write.scale for write in total.mlp)
            mlp = torch.zeros_like(before) if mlp is None else mlp
        return Entries(pos, dim, place, at(passed.after), before, attention, mlp)

    def _put(self, row: int, layer: int, counts: list[int], entries: Entries, found: Found) -> None:
        """Every half of the entry axis is filled up where a prompt has fewer entries."""
        values = {
            sig.RESIDUAL_AFTER.name: entries.after,
            f"{sig.RESIDUAL_AFTER.name}_pos": entries.pos,
            f"{sig.RESIDUAL_AFTER.name}_dim": entries.dim,
            sig.RESIDUAL_BEFORE.name: entries.before,
            sig.ATTENTION_WRITE.name: entries.attention,
            sig.MLP_WRITE.name: entries.mlp,
            sig.WRITE_EXPERT.name: found.expert,
            sig.WRITE_EXPERT_VALUE.name: found.expert_value,
            sig.WRITE_NEURON.name: found.neuron,
            sig.WRITE_NEURON_VALUE.name: found.neuron_value,
        }
        wanted = {signal.name for signal in self.ledger.wanted}
        for name, value in values.items():
            if name.removesuffix("_pos").removesuffix("_dim") in wanted:
                self.ledger.put(row, name, layer, _halves(value, counts))


def _version(state: Tensor) -> int | None:
    """How often a tensor was changed in place; None where torch does not count."""
    return None if state.is_inference() else state._version


def added(terms: Iterable[Tensor]) -> Tensor | None:
    """The sum of the terms, None if there are none."""
    total = None
    for term in terms:
        total = term if total is None else total + term
    return total


def _first(top: Largest, count: int) -> Largest:
    return Largest(top.value[:count], top.pos[:count], top.dim[:count])


def _halves(value: Tensor, counts: list[int]) -> Tensor:
    """`[entry]` with the output's entries first and the input's from the middle on."""
    fill = float("nan") if value.is_floating_point() else -1
    out = torch.full((sig.ENTRIES,), fill, dtype=value.dtype if value.is_floating_point() else torch.int32)
    start = 0
    for half, count in enumerate(counts):
        out[half * HALF : half * HALF + count] = value[start : start + count].cpu()
        start += count
    return out


def look_up(entries: Entries, passed: BlockPass, routed: Routed | None, found: Found) -> None:
    """Fill in expert and neuron of the entries to which the feed-forward part adds much."""
    block = passed.block
    which = entries.looked_up()
    if not len(which):
        return
    if block.experts is not None:
        if routed is not None and not elsewhere(routed.module):
            _look_in_experts(entries, which, passed, routed, found)
        return
    weight = down_weight(passed, block.down_proj)
    if weight is None or block.down_proj not in passed.given:
        return
    neuron, value = _neurons(passed, block.down_proj, weight, entries.place[which], entries.dim[which])
    found.neuron[which.cpu()], found.neuron_value[which.cpu()] = neuron.int().cpu(), value.cpu()


def elsewhere(module: Any) -> bool:
    """Whether a module's weights are on disk now: an offloaded one has them only while it runs."""
    return any(parameter.is_meta for parameter in module.parameters(recurse=False))


def down_weight(passed: BlockPass, path: str | None) -> Float[Tensor, "dim inner"] | None:
    """The down projection as a matrix that acts from the left; None if its weights are not plain numbers."""
    module = passed.modules.get(path or "")
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point() or weight.is_meta:
        return None
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if None not in sizes:
        return weight if tuple(weight.shape) == sizes[::-1] else None
    # GPT-2's Conv1D stores the transpose.
    return weight.T if weight.shape[1] == getattr(module, "nf", None) else None


def _neurons(
    passed: BlockPass,
    path: str,
    weight: Float[Tensor, "dim inner"],
    place: Int[Tensor, " entry"],
    dim: Int[Tensor, " entry"],
) -> tuple[Int[Tensor, " entry"], Float[Tensor, " entry"]]:
    """The input of the down projection with the largest part in each entry, and that part."""
    product = passed.given[path].detach()
    rows = whole_input(passed.modules[path], product.reshape(-1, product.shape[-1])[place])
    parts = rows.float() * rows_of(weight.detach(), dim).float()
    neuron = parts.abs().argmax(-1)
    return neuron, parts.gather(-1, neuron[:, None]).squeeze(-1)


def _look_in_experts(
    entries: Entries, which: Int[Tensor, " found"], passed: BlockPass, routed: Routed, found: Found
) -> None:
    """The routed expert with the largest part in each entry, or the shared one, and its neuron.

    The few tokens are run through their experts again: the same numbers as in the pass, without keeping any.
    """
    place, dim, slots = entries.place[which], entries.dim[which], routed.slots
    chosen = routed.index[place]
    weight = routed.weight.view(-1, slots)[place]
    best, total = torch.zeros_like(entries.mlp[which]), torch.zeros_like(entries.mlp[which])
    expert = torch.full(best.shape, -1, dtype=torch.long, device=best.device)
    neuron, value = expert.clone(), torch.full_like(best, float("nan"))
    for index in chosen.unique().tolist():
        if index >= routed.n_experts or index in routed.ablated:
            continue
        entry, slot = (chosen == index).nonzero(as_tuple=True)
        inner = expert_inner(routed.module, index, routed.hidden[place[entry]])
        y = (
            expert_outer(routed.module, index, inner, routed.share)
            .gather(-1, dim[entry, None])
            .squeeze(-1)
            .float()
        )
        part = y * weight[entry, slot]
        total.index_add_(0, entry, part)
        better = part.abs() > best[entry].abs()
        entry = entry[better]
        best[entry], expert[entry] = part[better], index
        found_in = strongest_inputs(routed.module, index, inner[better], dim[entry], routed.share)
        neuron[entry], value[entry] = found_in
    _prefer_shared(entries, which, passed, best, total, expert, neuron, value)
    scale = _scale(passed.block.sum.mlp, passed.block.mlp)
    place_of = which.cpu()
    found.expert[place_of], found.expert_value[place_of] = expert.int().cpu(), (best * scale).cpu()
    found.neuron[place_of], found.neuron_value[place_of] = neuron.int().cpu(), value.cpu()


def _prefer_shared(
    entries: Entries,
    which: Tensor,
    passed: BlockPass,
    best: Tensor,
    total: Tensor,
    expert: Tensor,
    neuron: Tensor,
    value: Tensor,
) -> None:
    """Where the shared experts add more than any routed one, they are named: expert -1 and their own neuron.

    What they add is what the mixture put out less what was routed, so a gate on them is counted.
    """
    block = passed.block
    path = block.shared_down_proj or block.down_proj
    if path is None or path not in passed.given:
        return
    place, dim = entries.place[which], entries.dim[which]

    def at(name: str) -> Tensor:
        made = passed.made[name]
        return made.detach().reshape(-1, made.shape[-1])[place, dim].float()

    beside = next((write.path for write in block.sum.mlp if path.startswith(write.path)), None)
    if beside is not None and beside != block.mlp:
        shared = at(beside)
    elif block.mlp in passed.made and path.startswith(f"{block.mlp}."):
        shared = at(block.mlp) - total
    else:
        return
    more = (shared.abs() > best.abs()).nonzero().squeeze(-1)
    weight = down_weight(passed, path)
    if not len(more):
        return
    best[more], expert[more], neuron[more], value[more] = shared[more], -1, -1, float("nan")
    if weight is not None:
        neuron[more], value[more] = _neurons(passed, path, weight, place[more], dim[more])


def _scale(writes: tuple[Write, ...], mixture: str | None) -> float:
    """The factor between what the mixture puts out and what is added; 1 where a norm stands between."""
    return next((write.scale for write in writes if write.path == mixture), 1.0)
