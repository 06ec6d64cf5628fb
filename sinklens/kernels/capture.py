"""The log-sum-exp that a model's own attention kernel has computed anyway.

Fused kernels return it beside the output, for a backward pass that tracing never runs. Catching it there
leaves the output as it is, bit for bit, and spares the statistics one pass over the logits. On doubt nothing
is returned: the sweep then computes the value itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .spec import AttentionCall

_KERNELS = frozenset(
    {
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
        "aten::_scaled_dot_product_fused_attention_overrideable",
    }
)
_COMPOSITE = "aten::scaled_dot_product_attention"
_OTHERS = frozenset(
    {"aten::_scaled_dot_product_attention_math", "aten::_safe_softmax", "aten::_softmax", "aten::softmax"}
)


@dataclass(frozen=True)
class KernelCall:
    """What one fused kernel was given, as far as its log-sum-exp depends on it."""

    lse: Float[Tensor, "..."]
    queries: tuple[int, ...]
    keys: tuple[int, ...]
    scale: float
    causal: bool
    masked: bool


@dataclass
class Captured:
    """The attention kernels that ran in a `captured_lse` block."""

    calls: list[KernelCall] = field(default_factory=list)
    others: int = 0
    """Softmaxes by other means; with any of them, it is unclear whose log-sum-exp was caught."""

    @property
    def lse(self) -> Float[Tensor, "batch head query"] | None:
        """Log-sum-exp (nats) of the only attention that ran, in the kernel's own shape, else None."""
        if len(self.calls) != 1 or self.others:
            return None
        call = self.calls[0]
        # Kernels that were not asked for it return an empty tensor, some a padded one.
        return call.lse if tuple(call.lse.shape) == call.queries[:3] else None

    def lse_for(self, call: AttentionCall) -> Float[Tensor, "batch head query"] | None:
        """Log-sum-exp of the rows of `call`, if what ran was that call and nothing else; ready for the sweep.

        Key heads may have been repeated, and the heads of a single-row call packed as rows of their key head.
        Rows without a visible key carry no meaning.
        """
        lse = self.lse
        if lse is None or call.softcap is not None or call.learned_sinks is not None:
            return None
        ran, (batch, heads, queries, _) = self.calls[0], call.query.shape
        kv_heads, keys = call.key.shape[1:3]
        packed = queries == 1 and tuple(lse.shape) == (batch, kv_heads, heads // kv_heads)
        if not packed and tuple(lse.shape) != (batch, heads, queries):
            return None
        if ran.keys[0] != batch or ran.keys[2] != keys or ran.masked != (call.mask is not None):
            return None
        if not math.isclose(ran.scale, call.scale, rel_tol=1e-6):
            return None
        # torch's causal triangle starts at the upper left, the one of AttentionCall ends at the lower right.
        causal = call.causal and call.mask is None and queries > 1
        if ran.causal != causal or (causal and keys != queries):
            return None
        return lse.reshape(batch, heads, queries).float()


class _Watch(TorchDispatchMode):
    def __init__(self, captured: Captured) -> None:
        super().__init__()
        self.captured = captured

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        if name == _COMPOSITE:
            # Under inference mode the composite arrives whole. Taken apart here, it chooses the kernel it
            # would have chosen anyway, and that kernel arrives in turn.
            with self:
                return func.decompose(*args, **kwargs)
        result = func(*args, **kwargs)
        if name in _KERNELS:
            self.captured.calls.append(_kernel_call(func._schema, args, kwargs, result))
        elif name in _OTHERS:
            self.captured.others += 1
        return result


def _kernel_call(schema: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> KernelCall:
    names = [argument.name for argument in schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    query, key, scale = given["query"], given["key"], given.get("scale")
    return KernelCall(
        lse=result[1],
        queries=tuple(query.shape),
        keys=tuple(key.shape),
        scale=query.shape[-1] ** -0.5 if scale is None else float(scale),
        causal=bool(given.get("is_causal", False)),
        masked=given.get("attn_mask") is not None or given.get("attn_bias") is not None,
    )


@contextmanager
def captured_lse() -> Iterator[Captured]:
    """Watch the attention kernels that run inside the block.

    Example:
        >>> with captured_lse() as captured:
        ...     output = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        >>> statistics = attention_sweep(call, want, captured.lse_for(call))
    """
    captured = Captured()
    with _Watch(captured):
        yield captured
