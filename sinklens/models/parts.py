"""What a module is, judged by what it owns and what its code refers to, not by its name."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from types import CodeType
from typing import Any

from torch import nn

from .reading import ATTENDING, own_methods

HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "num_attn_heads")
KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")


def unwrapped(module: nn.Module) -> nn.Module:
    """The module itself; of a wrapper that stands in its place, what it wraps.

    A wrapper says so by an `original_component`, as those of TransformerLens do.
    """
    while isinstance(inner := getattr(module, "original_component", None), nn.Module):
        module = inner
    return module


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """`(inputs, outputs)` of a Linear, of GPT-2's Conv1D (which stores the transpose), or of a wrapped Linear."""
    for names in (("in_features", "out_features"), ("nx", "nf")):
        sizes = tuple(getattr(module, name, None) for name in names)
        if all(isinstance(size, int) for size in sizes):
            return sizes  # pyright: ignore[reportReturnType]
    return None


def is_norm(module: nn.Module) -> bool:
    """A leaf with an epsilon and no matrices. LayerScale has no epsilon; OLMo's norm has no weight."""
    if any(True for _ in module.children()) or any(p.ndim > 1 for p in module.parameters(recurse=False)):
        return False
    has_epsilon = any(isinstance(getattr(module, name, None), float) for name in ("eps", "variance_epsilon"))
    return has_epsilon or "norm" in type(module).__name__.lower()


def norm_width(module: nn.Module) -> int | None:
    """Features of a norm with a weight, else None."""
    weight = getattr(module, "weight", None)
    return weight.numel() if weight is not None else None


def expert_count(module: nn.Module) -> int:
    """Experts fused in this module: all it owns is per expert, at least two 3-D weights among it. Else 0.

    Recurrent mixers own per-head 3-D weights too, but also per-channel vectors or convolutions.
    """
    owned = [p.shape for p in module.parameters(recurse=False)]
    fused = [shape for shape in owned if len(shape) == 3]
    if len(fused) < 2 or len({shape[0] if shape else 0 for shape in owned}) > 1:
        return 0
    convolves = any(isinstance(child, nn.Conv1d) for child in module.children())
    return 0 if convolves or fused[0][0] < 2 else fused[0][0]


def is_leaf(module: nn.Module) -> bool:
    """Modules that are looked at from outside only."""
    return (
        linear_shape(module) is not None
        or expert_count(module) > 0
        or is_norm(module)
        or not any(True for _ in module.children())
    )


def attention_kind(module: nn.Module) -> str | None:
    """`interface` for a module that calls the attention registry, `softmax` for one with its own softmax.

    A softmax alone is not enough (routers have one): the module must also know how many heads it has and hold
    projections. Cross attention, whose keys are not this sequence's tokens, is neither.
    """
    from transformers import (
        PreTrainedModel,
    )  # its own methods refer to the registry: it is never an attention

    cls = type(module)
    if (
        isinstance(module, PreTrainedModel)
        or "Cross" in cls.__name__
        or getattr(module, "is_cross_attention", False)
    ):
        return None
    if _uses_interface(cls):
        return "interface"
    if not uses_softmax(cls) or first_int(module, HEADS) is None:
        return None
    return "softmax" if any(linear_shape(child) for child in module.modules()) else None


@cache
def _uses_interface(cls: type) -> bool:
    """Whether a method of `cls` refers to transformers' attention registry, under whatever name."""
    from transformers.modeling_utils import AttentionInterface

    return any(
        isinstance(function.__globals__.get(name), AttentionInterface)
        for function in own_methods(cls)
        for name in _names(function.__code__)
    )


@cache
def uses_softmax(cls: type) -> bool:
    """Whether a method of `cls` takes a softmax or calls fused attention."""
    return any(
        name.lower() in ATTENDING for function in own_methods(cls) for name in _names(function.__code__)
    )


@cache
def refers_to(cls: type, part: str) -> bool:
    """Whether a method of `cls` refers to a name that contains `part`, such as a mask builder."""
    return any(part in name for function in own_methods(cls) for name in _names(function.__code__))


def _names(code: CodeType) -> Iterator[str]:
    """Global and attribute names in a code object and in the functions defined inside it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def first_int(owner: Any, names: tuple[str, ...]) -> int | None:
    """The first of these attributes that is an integer."""
    values = (getattr(owner, name, None) for name in names)
    return next((value for value in values if isinstance(value, int) and not isinstance(value, bool)), None)


def head_counts(attention: nn.Module, config: Any) -> tuple[int | None, int | None]:
    """Query heads and key-value heads: what the module says, else what its config says."""
    heads = first_int(attention, HEADS) or first_int(config, HEADS)
    groups = first_int(attention, ("num_key_value_groups",))
    kv = first_int(attention, KV_HEADS)
    if kv is None and groups and heads:
        kv = heads // groups
    return heads, kv or first_int(config, KV_HEADS) or heads
