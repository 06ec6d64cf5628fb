"""The attention of a TransformerBridge, as the kernels see attention calls.

Most bridge components compute attention themselves: scores (scaled, capped, masked, with position biases) at
`hook_attn_scores`, weights at `hook_pattern`. One layer's scores are handed to the kernels as a mask beside a scale
of 0, so what is reduced is exactly what the bridge used, and nothing of it is kept. Queries and keys stand at different
hooks in different families; those are taken whose product is the scores, so what cannot be verified is not used.

Other components leave attention to transformers; the registered function, or the returned weights, show it there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sinklens.core.errors import ModelError
from sinklens.kernels.blocked import attention_sweep
from sinklens.kernels.spec import AttentionCall, BlockPlan
from sinklens.models.parts import unwrapped
from sinklens.models.spec import Block, Tower

from ..attention import AttentionTap, Site, editors_of, ignore, no_statistics, sites
from ..batch import Batch
from ..fallback import weights_as_call
from .base import Seen, counted_rows

QUERIES = ("hook_rot_q", "hook_q_normed", "hook_q")
KEYS = ("hook_rot_k", "hook_k_normed", "hook_k")
ROTATIONS = ("hook_cos", "hook_sin")
VALUES = "hook_v"
TOLERANCE = 1e-3
"""Largest error, relative to the largest score, of queries and keys that are taken for those of the scores. Wrong
ones are off by the size of the scores; half precision rounds both to about a hundredth of that."""


class Seam(StrEnum):
    """Where the attention of a bridge can be seen."""

    SCORES = "scores"
    REGISTRY = "registry"
    WEIGHTS = "weights"


def find_seam(root: nn.Module, tower: Tower, run: Callable[[], Any]) -> Seam:
    """Where the attention of this bridge is computed, found by running it once.

    Args:
        run: One forward pass.
    """
    order: list[str] = []
    tap = AttentionTap(sites(root, tower, "attention"), no_statistics, ignore)
    with ExitStack() as stack:
        for block in tower.blocks:
            for name in ("hook_attn_scores", "hook_pattern"):
                if (point := _point(root, block, name)) is not None:
                    stack.callback(point.register_forward_hook(_noting(order, name)).remove)
        if tower.routed:
            stack.enter_context(tap.attached(root))
        run()
    expected = sum(block.attention is not None for block in tower.blocks)
    if tap.calls == expected:
        return Seam.REGISTRY
    # Components that get weights from transformers fire the pattern first and repeat it at the scores.
    if order == ["hook_attn_scores", "hook_pattern"] * expected:
        return Seam.SCORES
    return Seam.WEIGHTS


def _noting(order: list[str], name: str) -> Callable[..., None]:
    def hook(*_: Any) -> None:
        order.append(name)

    return hook


def _point(root: nn.Module, block: Block, name: str) -> nn.Module | None:
    """A hook point of a block's attention component; None if it has none of that name."""
    if block.attention is None:
        return None
    point = getattr(root.get_submodule(block.attention), name, None)
    return point if isinstance(point, nn.Module) else None


@dataclass(frozen=True)
class Vectors:
    """How queries and keys of a layer are read: hooks, whether they are yet to be rotated, how scores follow."""

    query: str
    key: str
    rotated_here: bool = False
    scale: float = 1.0
    cap: float | None = None


@dataclass
class BridgeTap:
    """Reduces the scores of each layer as they appear; counts the calls it saw.

    Attributes:
        vectors: Per layer, where its queries and keys are; None where no hook has them. Kept between batches.
    """

    root: nn.Module
    tower: Tower
    vectors: dict[int, Vectors | None]
    calls: int = 0
    _held: dict[str, Tensor] = field(default_factory=dict)

    @contextmanager
    def attached(self, batch: Batch, seen: Seen, plan: BlockPlan) -> Iterator[BridgeTap]:
        with ExitStack() as stack:
            for block in self.tower.blocks:
                for name in (*QUERIES, *KEYS, *ROTATIONS, VALUES, "hook_attn_scores"):
                    if (point := _point(self.root, block, name)) is not None:
                        stack.callback(point.register_forward_hook(self._hold(name)).remove)
                point = _point(self.root, block, "hook_pattern")
                if point is not None:
                    hook = self._reduce(block, batch, seen, plan, edited=bool(point._forward_hooks))
                    stack.callback(point.register_forward_hook(hook).remove)
            stack.callback(self._held.clear)
            yield self

    def __post_init__(self) -> None:
        if editors_of(sites(self.root, self.tower, "attention")):
            raise ModelError(
                "A bridge cannot be measured while a mitigation is on it.",
                detail="Its hooks show attention before the edit.",
                hint="Measure the transformers model: with mitigation(model): sinklens.trace(model, prompts)",
            )

    def _hold(self, name: str) -> Callable[..., None]:
        def hook(point: nn.Module, args: Any, value: Any) -> None:
            if isinstance(value, Tensor):
                self._held[name] = value.detach()

        return hook

    def _reduce(self, block: Block, batch: Batch, seen: Seen, plan: BlockPlan, *, edited: bool) -> Any:
        site = Site(self.tower.name, block.index)

        def hook(point: nn.Module, args: Any, pattern: Tensor) -> None:
            held, self._held = self._held, {}
            scores = held.pop("hook_attn_scores", None)
            if scores is None:
                raise ModelError(f"The bridge's attention in layer {block.index} ran without its scores.")
            component: Any = self.root.get_submodule(block.attention or "")
            call = call_of(scores, component, counted_rows(batch))
            if edited:
                call = _of_pattern(call, pattern.detach(), self.tower, batch)
            call = self._with_vectors(call, scores, held, component, block.index)
            self.calls += 1
            want = seen.asks(site, call)
            if want.stats:
                seen.on_attention(site, call, attention_sweep(call, want, None, plan))

        return hook

    def _with_vectors(
        self, call: AttentionCall, scores: Tensor, held: dict[str, Tensor], component: Any, layer: int
    ) -> AttentionCall:
        if layer not in self.vectors:
            self.vectors[layer] = find_vectors(scores, held, component)
        way = self.vectors[layer]
        if way is None:
            return call
        query, key = read_vectors(way, held, scores)
        value = held.get(VALUES)
        value = key[..., :0] if value is None else heads_first(value, scores.shape[-1], key.shape[1])
        return replace(call, query=query, key=key, value=value)


def call_of(
    scores: Float[Tensor, "batch head query key"], component: Any, counted: Tensor | None
) -> AttentionCall:
    """Scores as a call whose softmax they are: a mask beside a scale of 0. Hidden keys are -inf in it."""
    seen = visible(scores)
    mask = scores.float().masked_fill(~seen, float("-inf"))
    nothing = torch.zeros(*scores.shape[:2], max(scores.shape[2:]), 1, device=scores.device)
    query, key = nothing[:, :, : scores.shape[2]], nothing[:, :, : scores.shape[3]]
    learned = getattr(unwrapped(component), "sinks", None)
    # A width of 0 says that the values are not known.
    return AttentionCall(
        query, key, key[..., :0], scale=0.0, causal=False, mask=mask, learned_sinks=learned, counted=counted
    )


def visible(scores: Float[Tensor, "batch head query key"]) -> Bool[Tensor, "batch head query key"]:
    """Keys that are not masked: masks are about the lowest number of the dtype (some scale it too), or -inf."""
    return scores > max(torch.finfo(scores.dtype).min / 2, -1e30)


def _of_pattern(call: AttentionCall, pattern: Tensor, tower: Tower, batch: Batch) -> AttentionCall:
    """The same call with the weights that somebody's hook left at the pattern."""
    if call.learned_sinks is not None:
        raise ModelError(
            "Hooks on hook_pattern cannot be followed in a model with learned sinks.",
            hint="Take them off the bridge: bridge.reset_hooks()",
        )
    edited = weights_as_call(pattern, batch.valid, causal=tower.causal)
    return replace(call, mask=edited.mask)


def find_vectors(scores: Tensor, held: dict[str, Tensor], component: Any) -> Vectors | None:
    """The hooks whose product is these scores, the most processed first; None if there are none."""
    ways = [Vectors(*pair) for pair in zip(QUERIES, KEYS, strict=True)]
    if all(name in held for name in ROTATIONS):
        ways += [replace(way, rotated_here=True) for way in ways[1:]]
    for way in ways:
        if way.query in held and way.key in held:
            try:
                query, key = read_vectors(way, held, scores)
            except (RuntimeError, ValueError):
                continue
            if (found := _factors(query, key, scores, unwrapped(component))) is not None:
                return replace(way, scale=found[0], cap=found[1])
    return None


def read_vectors(way: Vectors, held: dict[str, Tensor], scores: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys `[batch, head, pos, dim]` of a layer."""
    query = heads_first(held[way.query], scores.shape[2], scores.shape[1])
    key = heads_first(held[way.key], scores.shape[3], None, width=query.shape[-1])
    if way.rotated_here:
        cos, sin = (held[name] for name in ROTATIONS)
        query, key = rotated(query, cos, sin), rotated(key, cos, sin)
    return query, key


def heads_first(x: Tensor, length: int, heads: int | None, width: int | None = None) -> Tensor:
    """`[batch, head, pos, dim]`, whatever the hook's layout: heads before, after or inside the last axis."""
    if x.ndim == 3:
        heads = heads or x.shape[-1] // (width or x.shape[-1])
        x = x.unflatten(-1, (heads, -1)).transpose(1, 2)
    elif x.shape[2] != length or (heads is not None and x.shape[1] != heads):
        x = x.transpose(1, 2)
    if x.shape[2] != length:
        raise ValueError("these are no vectors of the running tokens")
    return x


def rotated(x: Float[Tensor, "batch head pos dim"], cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of the first dims, in halves."""
    wide = cos.shape[-1]
    turned, rest = x[..., :wide], x[..., wide:]
    first, second = turned.chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([turned * cos + torch.cat([-second, first], -1) * sin, rest], -1)


def _factors(
    query: Tensor, key: Tensor, scores: Tensor, module: nn.Module
) -> tuple[float, float | None] | None:
    """Scale and cap with which the scores are the product of these; None if they are not."""
    if query.shape[1] % key.shape[1] or query.shape[-1] != key.shape[-1]:
        return None
    seen = visible(scores)
    product = query.float() @ key.float().repeat_interleave(query.shape[1] // key.shape[1], 1).mT
    product, target = product[seen], scores.float()[seen]
    cap = getattr(module, "attn_logit_softcapping", None)
    scale = getattr(module, "scaling", None)
    if not isinstance(scale, float | int):
        scale = float((product * target).sum() / product.square().sum().clamp_min(1e-30))
    found = product * scale if cap is None else cap * torch.tanh(product * scale / cap)
    limit = TOLERANCE if scores.dtype == torch.float32 else 30 * torch.finfo(scores.dtype).eps
    error, size = float((found - target).abs().max()), float(target.abs().max().clamp_min(1e-30))
    return (float(scale), cap) if error <= limit * size else None
