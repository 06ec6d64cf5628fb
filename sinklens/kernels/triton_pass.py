"""Calls of the Triton kernels: which attention calls they serve, and from their results to the statistics.

They are chosen by themselves on CUDA where Triton can be imported; `SINKLENS_TRITON=0` leaves the torch path. Before a
kind of call is trusted to them on a device, they must equal the dense reference there once (`trusted`).
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import math
import os
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .reference import attention_reference
from .shapes import Sizes, four_axes, sizes_of
from .spec import AttentionCall, AttentionStatistics, Stat, Want, part_left
from .visibility import keys_seen, tail_rows, visibility

log = logging.getLogger(__name__)

SERVED = frozenset(Stat) - {Stat.GROUP_OUTPUT}
_SUMS = {
    "RECEIVED": Stat.RECEIVED,
    "LOG": Stat.RECEIVED_LOG,
    "SQUARED": Stat.RECEIVED_SQUARED,
    "MAX": Stat.RECEIVED_MAX,
    "TAIL": Stat.RECEIVED_TAIL,
    "PROBE": Stat.RECEIVED_ROWS,
    "BAND": Stat.RECEIVED_BAND,
    "REST": Stat.RECEIVED_BAND_REST,
}
# What is found per row, and what asks for it.
_PER_ROW = {
    "PRODUCT": frozenset({Stat.ENTROPY, Stat.ENTROPY_NORMALISED}),
    "DISTANCE": frozenset({Stat.DISTANCE}),
    "NEAR": frozenset({Stat.DISTANCE_WINDOWED}),
    "OWN": frozenset({Stat.DIAGONAL}),
    "PEAK": frozenset({Stat.ROW_MAX, Stat.TOP1}),
    "MASS": frozenset({Stat.GROUP_MASS, Stat.RECEIVED_BAND_REST}),
}
_MOST_GROUPS = 15  # and one more for the rest beside the first
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LN2 = math.log(2.0)


def installed() -> bool:
    """Whether Triton can be imported and is not switched off."""
    return why_not() is None


def why_not() -> str | None:
    """Why the kernels are not there, in words; None where they are, as far as can be known before they run."""
    if os.environ.get("SINKLENS_TRITON", "1") == "0":
        return "SINKLENS_TRITON=0"
    return None if importlib.util.find_spec("triton") is not None else "Triton is not installed"


def serves(call: AttentionCall, want: Want) -> bool:
    """Whether the kernels take the place of the torch path."""
    return call.query.is_cuda and installed() and fits(call, want) and trusted(_kind(call))


def fits(call: AttentionCall, want: Want) -> bool:
    """Whether the kernels know how, wherever they run."""
    tensors = (call.query, call.key, call.value)
    same = call.query.dtype in _DTYPES and all(t.dtype == call.query.dtype for t in tensors)
    widths = max(call.query.shape[3], call.value.shape[3]) <= 256 and call.value.shape[3] > 0
    groups = 0 if want.groups is None else want.groups.shape[0]
    return same and widths and not call.edits and want.stats <= SERVED and groups <= _MOST_GROUPS


def _kind(call: AttentionCall) -> tuple[torch.device, torch.dtype, int, int]:
    return call.query.device, call.query.dtype, call.query.shape[3], call.value.shape[3]


@functools.cache
def trusted(kind: tuple[torch.device, torch.dtype, int, int]) -> bool:
    """Whether the kernels equal the reference on a device, for a type and two widths; asked once per process."""
    device, dtype, dim, value_dim = kind
    # No random numbers: the caller's generator must not move.
    shapes = ((1, 3, 150, dim), (1, 1, 150, dim), (1, 1, 150, value_dim))
    numbers = [
        torch.linspace(0.0, 900.0, math.prod(s), device=device).sin().view(s).to(dtype) for s in shapes
    ]
    call = AttentionCall(*numbers, scale=2.0 * dim**-0.5)
    groups = torch.zeros(1, 1, 150, dtype=torch.bool, device=device)
    groups[..., :3] = True
    stats = {Stat.RECEIVED, Stat.RECEIVED_LOG, Stat.ENTROPY, Stat.LSE, Stat.ROW_MAX, Stat.GROUP_MASS}
    want = Want(frozenset(stats), groups=groups)
    try:
        output, found = fused(call, want)
        true, truth = attention_reference(call, want, dtype=torch.float64)
        bound = 2e-5 if dtype == torch.float32 else 2e-2
        right = torch.allclose(output.double(), true, atol=bound, rtol=0)
        right = right and all(
            torch.allclose(found[stat].double(), truth[stat], atol=2e-5, rtol=2e-5) for stat in stats
        )
    except Exception as error:  # whatever a compiler or a driver may raise
        log.warning("The Triton kernels of sinklens do not run on %s and are not used: %s", device, error)
        return False
    if not right:
        log.warning("The Triton kernels of sinklens are wrong on %s and are not used.", device)
    return right


def fused(
    call: AttentionCall, want: Want
) -> tuple[Float[Tensor, "batch query head value_dim"], AttentionStatistics]:
    """Output and statistics by the kernels; `fits` has said that they know how."""
    sizes = sizes_of(call, want)
    shape = (sizes.batch, sizes.queries, sizes.heads, sizes.value_dim)
    output = torch.empty(shape, dtype=call.query.dtype, device=call.query.device)
    return output, _Call(call, want).run(output, None)


def sweep(
    call: AttentionCall, want: Want, lse: Float[Tensor, "batch head query"] | None = None
) -> AttentionStatistics:
    """Statistics alone. `lse` is as for `attention_sweep`: it spares the rows where nothing else is asked of them."""
    return _Call(call, want).run(None, lse)


class _Call:
    """One attention call on its way through the two kernels."""

    def __init__(self, call: AttentionCall, want: Want) -> None:
        self.call, self.want, self.stats = call, want, want.stats
        self.sizes = sizes_of(call, want)
        self.device = call.query.device
        self.rows, self.keys = _block_sizes(self.sizes, call.query.dtype)
        self.blocks = [
            (s, min(s + self.rows, self.sizes.queries)) for s in range(0, self.sizes.queries, self.rows)
        ]
        self.view = visibility(call, self.sizes, self.blocks)
        self.live = self._live()
        tensors = (call.query, call.key, call.value)
        self.query, self.key, self.value = (t if t.stride(-1) == 1 else t.contiguous() for t in tensors)

    def run(self, output: Tensor | None, lse: Tensor | None) -> AttentionStatistics:
        """The statistics; the output goes into `output`."""
        asked = {name: bool(stats & self.stats) for name, stats in _PER_ROW.items()}
        if output is not None or lse is None or any(asked.values()):
            found = self._by_row(asked, output)
        else:
            found = {"lse": lse.float() / _LN2}
        values = self._of_rows(found)
        if self.stats & set(_SUMS.values()):
            values |= self._by_key(found)
        values = {stat: values[stat] for stat in self.stats}
        return AttentionStatistics(values, self.view.counts, self.view.rows)

    def _live(self) -> Bool[Tensor, "batch head query"]:
        s, seen = self.sizes, self.view.seen
        live = self.view.rows[:, None] if seen is None else self.view.rows[:, None] & seen
        return live.expand(s.batch, s.heads, s.queries).contiguous()

    def _by_row(self, asked: dict[str, bool], output: Tensor | None) -> dict[str, Tensor]:
        from . import triton_kernels

        by_row: Any = triton_kernels.by_row
        s, empty = self.sizes, functools.partial(torch.empty, device=self.device)
        per_row = (s.batch, s.heads, s.queries)
        groups = self._groups() if asked["MASS"] else None
        found = {"lse": empty(per_row)}
        for name in ("product", "distance", "near", "own"):
            found[name] = empty(per_row) if asked[name.upper()] else found["lse"]
        found["top"] = empty(per_row) if asked["PEAK"] else found["lse"]
        found["place"] = empty(per_row, dtype=torch.int32) if asked["PEAK"] else empty(1, dtype=torch.int32)
        found["mass"] = found["lse"] if groups is None else empty((len(groups), *per_row))
        sinks, mask = self.call.learned_sinks, self._mask()
        members = _bytes(self.live) if groups is None else groups.view(torch.uint8)
        spans = torch.tensor(self.view.spans, dtype=torch.int32, device=self.device)
        by_row[(len(self.blocks), s.batch * s.heads)](
            *(self.query, self.key, self.value),
            self.query if mask is None else mask,
            found["lse"] if sinks is None else sinks.float().contiguous(),
            members,
            spans,
            self.query if output is None else output,
            *(found[n] for n in ("lse", "product", "distance", "near", "own", "top", "place", "mass")),
            *(*self.query.stride()[:3], *self.key.stride()[:3], *self.value.stride()[:3], *_strides(mask)),
            *((0, 0, 0) if groups is None else groups.stride()[:3]),
            *((0, 0, 0) if output is None else output.transpose(1, 2).stride()[:3]),
            *(s.heads, s.group, s.queries, s.keys, 0 if groups is None else len(groups)),
            **self._numbers(mask),
            window=float(min(self.want.window, s.keys)),
            VALUE_DIM=s.value_dim,
            V=_power(s.value_dim),
            G=1 if groups is None else _power(len(groups), 1),
            SINKS=sinks is not None,
            OUTPUT=output is not None,
            **asked,
        )
        return found

    def _by_key(self, found: dict[str, Tensor]) -> dict[Stat, Tensor]:
        from . import triton_kernels

        by_key: Any = triton_kernels.by_key
        s, mask = self.sizes, self._mask()
        asked = {name: stat in self.stats for name, stat in _SUMS.items()}
        into = {
            name: torch.empty(s.batch, s.heads, s.keys, device=self.device)
            for name, on in asked.items()
            if on
        }
        rest = self._part_of_rest(found) if asked["REST"] else found["lse"]
        tail = tail_rows(self.view.rows, self.want.tail) if asked["TAIL"] else self.view.rows
        probe = self.want.probes if asked["PROBE"] and self.want.probes is not None else self.view.rows
        some = next(iter(into.values()))
        by_key[(-(-s.keys // self.keys), s.batch * s.heads)](
            *(
                self.query,
                self.key,
                self.query if mask is None else mask,
                found["lse"].contiguous(),
                _bytes(self.live),
            ),
            *(_bytes(tail), _bytes(probe), rest, self._row_spans()),
            *(into.get(name, some) for name in _SUMS),
            *(*self.query.stride()[:3], *self.key.stride()[:3], *_strides(mask)),
            *(s.heads, s.group, s.queries, s.keys),
            **self._numbers(mask),
            band_first=self.want.band[0],
            band_last=self.want.band[1],
            **asked,
        )
        if "REST" in into and self.want.groups is not None:
            into["REST"].mul_(~_by_head(self.want.groups[0]))
        return {_SUMS[name]: values for name, values in into.items()}

    def _numbers(self, mask: Tensor | None) -> dict[str, Any]:
        """What both kernels are told alike."""
        call, additive = self.call, mask is not None and mask.is_floating_point()
        return {
            "scale": float(call.scale),
            "cap": float(call.softcap or 1.0),
            "lowest": torch.finfo(mask.dtype).min / 2 if additive and mask is not None else 0.0,
            "DIM": self.sizes.dim,
            "D": _power(self.sizes.dim),
            "ROWS": self.rows,
            "KEYS": self.keys,
            "CAUSAL": call.causal and call.mask is None,
            "MASK": 0 if mask is None else 2 if additive else 1,
            "CAPPED": call.softcap is not None,
            "WIDE": call.query.dtype == torch.bfloat16 and os.environ.get("TRITON_INTERPRET") == "1",
        }

    def _mask(self) -> Tensor | None:
        s = self.sizes
        if self.call.mask is None:
            return None
        mask = four_axes(self.call.mask, s.queries, s.keys).expand(s.batch, s.heads, s.queries, s.keys)
        return mask.view(torch.uint8) if mask.dtype == torch.bool else mask

    def _groups(self) -> Bool[Tensor, "group batch head key"]:
        """The key sets, and last, for sums over what is left, the keys outside of the first."""
        s, groups = self.sizes, self.want.groups
        assert groups is not None  # `sizes_of` has refused the call otherwise
        wide = groups if groups.ndim == 4 else groups[:, :, None]
        wide = wide.expand(-1, -1, s.heads, -1)
        return torch.cat([wide, ~wide[:1]]).contiguous()

    def _row_spans(self) -> Tensor:
        """Per block of keys the rows `[first, last)` that see any of them, as far as the row blocks tell."""
        starts = torch.arange(0, self.sizes.keys, self.keys)[:, None]
        first, last = torch.tensor(self.view.spans).unbind(1)
        meets = (first < starts + self.keys) & (starts < last)
        row = torch.tensor(self.blocks)
        begin = torch.where(meets, row[:, 0], self.sizes.queries).amin(1)
        end = torch.where(meets, row[:, 1], 0).amax(1)
        return torch.stack([begin, end], 1).to(torch.int32).to(self.device)

    def _part_of_rest(self, found: dict[str, Tensor]) -> Float[Tensor, "batch head query"]:
        """`part / L` of `RECEIVED_BAND_REST`; L is added up from what is left, the learned sink's share included."""
        left = found["mass"][-1]
        if self.call.learned_sinks is not None:
            left = left + self._sink_mass(found["lse"])
        part = part_left(left)
        return torch.where(self.live & (part > 0), part / left, 0.0).contiguous()

    def _sink_mass(self, lse: Tensor) -> Tensor:
        assert self.call.learned_sinks is not None  # the callers have looked
        return torch.exp2(self.call.learned_sinks[:, None].float() / _LN2 - lse)

    def _of_rows(self, found: dict[str, Tensor]) -> dict[Stat, Tensor]:
        """Statistics per row, 0 in those that do not count; and votes."""
        live, lse = self.live, found["lse"]
        none = torch.zeros_like(lse)
        values = {
            Stat.LSE: lse * _LN2,
            Stat.LEARNED_SINK: none if self.call.learned_sinks is None else self._sink_mass(lse),
        }
        for stat, name in (
            (Stat.DISTANCE, "distance"),
            (Stat.DISTANCE_WINDOWED, "near"),
            (Stat.DIAGONAL, "own"),
            (Stat.ROW_MAX, "top"),
        ):
            if stat in self.stats:
                values[stat] = found[name]
        if "product" in found:
            values[Stat.ENTROPY] = -found["product"]
        if Stat.ENTROPY_NORMALISED in self.stats:
            seen = keys_seen(self.call, self.sizes, self.blocks)
            share = values[Stat.ENTROPY] / seen.clamp(min=2).float().log()
            values[Stat.ENTROPY_NORMALISED] = torch.where(seen > 1, share, 0.0)
        values = {stat: torch.where(live, value, 0.0) for stat, value in values.items()}
        if Stat.GROUP_MASS in self.stats:
            mass = torch.where(live, found["mass"][:-1], 0.0)
            values[Stat.GROUP_MASS] = mass.permute(1, 2, 3, 0).contiguous()
        if Stat.TOP1 in self.stats:
            votes = lse.new_zeros(*lse.shape[:2], self.sizes.keys)
            values[Stat.TOP1] = votes.scatter_add_(-1, found["place"].long(), live.float())
        return values


def _block_sizes(sizes: Sizes, dtype: torch.dtype) -> tuple[int, int]:
    """Rows and keys of a block, by what shared memory and registers hold."""
    wide = max(sizes.dim, sizes.value_dim) > 128
    if dtype == torch.float32 or wide:
        return (32, 32) if wide else (64, 32)
    return 64, 64


def _by_head(group: Tensor) -> Tensor:
    return group if group.ndim == 3 else group[:, None]


def _bytes(flags: Tensor) -> Tensor:
    return flags.contiguous().view(torch.uint8)


def _power(n: int, least: int = 16) -> int:
    """The power of two from `n` on; a matrix product takes at least 16."""
    return max(least, 1 << (n - 1).bit_length())


def _strides(tensor: Tensor | None) -> Sequence[int]:
    return (0, 0, 0, 0) if tensor is None else tensor.stride()
