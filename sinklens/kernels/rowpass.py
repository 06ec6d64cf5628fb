"""Calls into the compiled kernels: the row pass over a block of logits, and whole attention in tiles.

Both take the same questions (`RowRequest`) and give the same answers; `native.available()` says whether they are there.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from . import native
from .shapes import four_axes
from .spec import AttentionCall, BlockPlan
from .workspace import workspace

# Rows of a tile, multiples of what the C code multiplies at once.
_TILES, _LEAST_TILE = (24, 36, 48), 12
# Numbers that the second-level cache has room for: a tile of logits, and the keys and values that it meets. Where those
# do not fit, they are read anew for each tile, so that tall tiles are worth a tighter fit.
_TILE_LOGITS, _KEYS_AND_VALUES = 400_000, 400_000
# Most heads in a piece.
_HEADS = 12


@dataclass(frozen=True)
class RowResults:
    """What the pass found per row; None where it was not asked."""

    peak: tuple[Int[Tensor, "b h r"], Float[Tensor, "b h r"], Float[Tensor, "b h r"]] | None = None
    """Key, weight and logit of the largest entry."""
    product: Float[Tensor, "b h r"] | None = None
    """Sum of weight times its logarithm (nats)."""
    mean_back: Float[Tensor, "b h r"] | None = None
    near: Float[Tensor, "b h r"] | None = None
    own: Float[Tensor, "b h r"] | None = None
    mass: Float[Tensor, "b h r column"] | None = None


@dataclass(frozen=True)
class RowRequest:
    """What the pass is asked for.

    Attributes:
        known: The logits are logarithms to base 2 of the weights; else they are in nats, to be normalised.
        keep: Turn the logits into weights, in place; else they stay as they are.
        place: Index of the first row's own key.
        peak: Largest logit, its weight and key.
        product: Sum of weight times its logarithm.
        own: Weight of each row's own key.
        window: Sum of weight times `relu(window - distance)`; None for not.
        back: A number per key, whose weighted sum is wanted.
        columns: Keys whose weights are wanted, `[b, h, column]`; those outside of the block weigh 0.
        sums: Sums over rows that are added to `[b, h, key]`, by name (`_PER_KEY`). All have the same strides, with
            heads evenly apart.
        tail, probe: Rows of `received_tail` and `received_rows`, `[b, r]`.
        band: First and last distance of the rows of `band` and `band_rest` from the key.
        other: `[1|b h, key]`, 1 outside of the group that `band_rest` leaves out, 0 inside.
        sink_mass: Mass of each row on a learned sink, `[b, h, r]`, for `band_rest` if `known`; None for 0.
        count: Weight of each row in the sums over rows, `[b, h, r]`; None for 1.
        sinks: Learned sink logit per head `[b, h]`, whose share leaves those sums; only if not `known`.
        half: Contiguous bfloat16 `[b, h, r, k]` that gets the weights too; only if not `known`.
    """

    known: bool = False
    keep: bool = True
    place: int = 0
    peak: bool = False
    product: bool = False
    own: bool = False
    window: int | None = None
    back: Float[Tensor, " k"] | None = None
    columns: Int[Tensor, "b h column"] | None = None
    sums: Mapping[str, Float[Tensor, "b h k"]] = field(default_factory=dict)
    tail: Bool[Tensor, "b r"] | None = None
    probe: Bool[Tensor, "b r"] | None = None
    band: tuple[int, int] = (0, 0)
    other: Float[Tensor, "heads k"] | None = None
    sink_mass: Float[Tensor, "b h r"] | None = None
    count: Float[Tensor, "b h r"] | None = None
    sinks: Float[Tensor, "b h"] | None = None
    half: Float[Tensor, "b h r k"] | None = None


def native_serves(call: AttentionCall, plan: BlockPlan) -> bool:
    """Whether the compiled row pass can take the place of the torch passes."""
    ordinary = call.query.device.type == "cpu" and call.query.dtype != torch.float64
    return plan.native and ordinary and not call.edits and native.available()


def attend_serves(call: AttentionCall, plan: BlockPlan) -> bool:
    """Whether the compiled attention can take the place of products and row pass, if `native_serves`."""
    tensors = (call.query, call.key, call.value)
    mask = call.mask
    lines = mask is None or (mask.dtype == torch.bool and mask.shape[-1] > 1 and mask.stride(-1) == 1)
    plain = lines and call.softcap is None and all(_read(t.dtype) for t in tensors)
    # A single row meets each key once: laying the keys out for it would cost more than it saves.
    return plain and plan.score_dtype == torch.float32 and call.query.shape[2] > 1


def _read(dtype: torch.dtype) -> bool:
    """Whether the compiled attention takes numbers of a type; half-precision ones as float32, which holds them exactly.

    Where the processor multiplies tiles of bfloat16 numbers (AMX), torch's products are faster than that.
    """
    if dtype == torch.bfloat16:
        return not torch.cpu._is_amx_tile_supported()
    return dtype in (torch.float32, torch.float16)


def pass_rows(logits: Float[Tensor, "b h r k"], request: RowRequest) -> RowResults:
    """Take what is asked from contiguous float32 logits, each row while it is in cache."""
    library = native.built()
    b, h, r, k = logits.shape
    asked, results, _held = _ask(logits.shape, request)
    library.sinklens_rows(
        ctypes.c_void_p(logits.data_ptr()),
        *map(ctypes.c_long, (b * h, r, k)),
        int(request.known),
        native.threads(),
        ctypes.byref(asked),
    )
    return results


def attend(
    call: AttentionCall, request: RowRequest, output: Float[Tensor, "b q h value_dim"] | None, scores: int
) -> RowResults:
    """Whole attention, with a boolean mask or none, without a soft cap; in float32 whatever the tensors are.

    Args:
        request: For all rows and keys as one block; `known`, `keep` and `half` have no meaning here.
        scores: Most logits in flight per thread, as far as a tile of the least size allows.
    """
    library, threads = native.built(), native.threads()
    b, h, q, dim = call.query.shape
    kv_heads, keys, value_dim = call.value.shape[1:]
    line = -(-keys // 32) * 32 + 16  # not a power of two, so that the rows of a tile do not share cache sets
    most = min(_TILE_LOGITS, scores) // line
    tall = keys * (dim + value_dim) > _KEYS_AND_VALUES
    tile, pieces = _tiling(b * kv_heads, h // kv_heads, threads, most, tall=tall)
    asked, results, _held = _ask(torch.Size((b, h, q, keys)), request)
    asked.keep = 0 if output is None else 2
    whole = native.Attention(
        causal=call.causal, scale=call.scale, tile=tile, line=line, pieces=pieces, logits_stride=tile * line
    )
    sizes = (b, h, kv_heads, q, keys, dim, value_dim)
    for name, size in zip(
        ("batch", "heads", "kv_heads", "queries", "keys", "dim", "value_dim"), sizes, strict=True
    ):
        setattr(whole, name, size)
    given = {"query": call.query, "key": call.key, "value": call.value}
    given = {name: t.float() for name, t in given.items()}
    given = {name: t if t.stride(-1) == 1 else t.contiguous() for name, t in given.items()}
    if call.mask is not None:
        given["mask"] = four_axes(call.mask, q, keys).expand(b, h, q, keys)
    made = None if output is None else _output(output)
    if made is not None:
        given["output"] = made.transpose(1, 2)
    for name, tensor in given.items():
        setattr(whole, name, tensor.data_ptr())
        setattr(whole, f"{name}_stride", tensor.stride()[:3])
    whole.packed_stride = library.sinklens_packed(ctypes.byref(whole), ctypes.byref(asked))
    space, device = workspace(), call.query.device
    whole.packed = space.take("packed", (threads, whole.packed_stride), torch.float32, device).data_ptr()
    whole.logits = space.take("logits", (threads, tile, line), torch.float32, device).data_ptr()
    library.sinklens_attend(ctypes.byref(whole), threads, ctypes.byref(asked))
    if output is not None and made is not None and made is not output:
        output.copy_(made)
    return results


def _output(output: Float[Tensor, "b q h value_dim"]) -> Float[Tensor, "b q h value_dim"]:
    """Where the compiled attention writes: float32, and rounded from there if the output is narrower."""
    if output.dtype == torch.float32:
        return output
    return workspace().take("output", tuple(output.shape), torch.float32, output.device)


def _tiling(units: int, group: int, threads: int, most: int, *, tall: bool) -> tuple[int, int]:
    """Rows of a tile, and in how many pieces the heads of a key head are shared out among threads."""
    pieces = next(
        n for n in range(1, group + 1) if n == group or (group / n <= _HEADS and units * n >= threads)
    )
    heads = -(-group // pieces)
    fitting = [rows for rows in _TILES if rows <= most] or [_LEAST_TILE]
    # Of several sizes the one whose rows the tile's heads fill best, on ties the smaller, unless it is to be tall.
    return max(fitting, key=lambda rows: (rows // heads * heads / rows, rows if tall else -rows)), pieces


def _ask(shape: torch.Size, request: RowRequest) -> tuple[native.Asked, RowResults, object]:
    """The C structure, where its results go, and what must live as long as it is used."""
    keys, threads, device = shape[3], native.threads(), torch.device("cpu")
    found = _room(shape[:3], request)
    given = {**_given(shape, request), **request.sums, **found}
    # Room for one row of weights and one of their logarithms per thread; rows start at cache lines.
    stride = -(-keys // 16) * 16
    given["scratch"] = workspace().take("rows", (threads, 2, stride), torch.float32, device)
    asked = native.Asked(**{name: tensor.data_ptr() for name, tensor in given.items() if tensor is not None})
    asked.scratch_stride, asked.place, asked.keep = stride, request.place, request.keep
    asked.stride = next((tensor.stride(1) for tensor in request.sums.values()), 0)
    asked.columns = 0 if request.columns is None else request.columns.shape[2]
    asked.window = request.window or 0
    asked.band_first, asked.band_last = request.band
    if request.other is not None:
        asked.other_stride = request.other.stride(0) if request.other.shape[0] > 1 else 0
    peak = (found["index"], found["top"], found["logit"]) if request.peak else None
    rest = (found.get(name) for name in ("product", "mean_back", "near", "own", "mass"))
    return asked, RowResults(peak, *rest), given


def _room(shape: torch.Size, request: RowRequest) -> dict[str, Tensor]:
    """Where the results per row `[b, h, r]` go."""
    asked = {
        "product": request.product,
        "mean_back": request.back is not None,
        "near": request.window is not None,
        "own": request.own,
        **dict.fromkeys(("logit", "top", "index"), request.peak),
    }
    # Type and device are named throughout: the caller's defaults may be others, and C would write past the end.
    cpu = torch.device("cpu")
    found = {
        name: torch.empty(shape, dtype=torch.int64 if name == "index" else torch.float32, device=cpu)
        for name, wanted in asked.items()
        if wanted
    }
    if request.columns is not None:
        found["mass"] = torch.empty(*shape, request.columns.shape[2], dtype=torch.float32, device=cpu)
    if "band_rest" in request.sums:
        found["rest"] = torch.zeros(shape, dtype=torch.float32, device=cpu)
        if request.sink_mass is not None:
            found["rest"].copy_(request.sink_mass)
    return found


def _given(shape: torch.Size, request: RowRequest) -> dict[str, Tensor | None]:
    """What the pass reads besides the logits, laid out as it expects."""
    b, h, r, _ = shape

    def spread(tensor: Tensor | None, *sizes: int) -> Tensor | None:
        return None if tensor is None else tensor.expand(sizes).contiguous()

    return {
        "back": request.back,
        "other": request.other,
        "half": request.half,
        "count": spread(request.count, b, h, r),
        "sink": spread(request.sinks, b, h),
        "column": None if request.columns is None else request.columns.contiguous(),
        "tail": spread(None if request.tail is None else request.tail[:, None], b, h, r),
        "probe": spread(None if request.probe is None else request.probe[:, None], b, h, r),
    }
