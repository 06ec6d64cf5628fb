"""Attention as transformers configures and calls it: configs, the functions behind their names, and their arguments."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from sinklens.core.errors import ModelError
from sinklens.kernels.spec import AttentionCall


def attention_call(
    args: tuple[Any, ...], kwargs: dict[str, Any], *, eager: bool, counted: Tensor | None
) -> AttentionCall:
    """What a transformers attention function was given, as the kernels see it."""
    names = ("module", "query", "key", "value", "attention_mask")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    module, query, key, value = (given[name] for name in names[:4])
    mask, scale, is_causal = given.get("attention_mask"), given.get("scaling"), given.get("is_causal")
    if given.get("position_bias") is not None:
        raise ModelError(
            f"{type(module).__name__} adds a position bias to its logits, which is not supported."
        )
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    # Without a mask the eager functions attend to everything; the others build the causal triangle themselves.
    causal = causal and not eager and mask is None and query.shape[2] > 1
    if causal and key.shape[2] > query.shape[2]:
        # transformers crops the empty tail of a static cache in this case; the triangle is upper-left.
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
    if mask is not None and mask.shape[-1] > key.shape[2]:
        mask = mask[..., : key.shape[2]]
    rows_known = counted is not None and counted.shape == (query.shape[0], query.shape[2])
    return AttentionCall(
        query,
        key,
        value,
        scale=float(query.shape[-1] ** -0.5 if scale is None else scale),
        causal=causal,
        mask=mask,
        softcap=given.get("softcap"),
        learned_sinks=given.get("s_aux"),
        counted=counted if rows_known else None,
    )


def attention_configs(model: nn.Module) -> list[Any]:
    """Every config object that decides an attention implementation in this model, once each."""
    found: dict[int, Any] = {}
    pending: list[Any] = [module.config for module in model.modules() if hasattr(module, "config")]
    while pending:
        config = pending.pop()
        if id(config) in found or not hasattr(config, "_attn_implementation"):
            continue
        found[id(config)] = config
        pending += [sub for key in config.sub_configs if (sub := getattr(config, key, None)) is not None]
    return list(found.values())


class StandIn(str):
    """A name of attention that also equals the name of the implementation it stands for."""

    implementation: str

    def __eq__(self, other: object) -> bool:
        return str.__eq__(self, other) is True or other == self.implementation

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__


def standing_in(config: Any, name: str, implementation: str) -> str:
    """The name to write into a config in place of that of an implementation.

    Sparse attention puts the keys that its indexer chose into the mask only where it finds a name that it knows.
    """
    if not any("index" in field and "topk" in field for field in vars(config)):
        return name
    made = StandIn(name)
    made.implementation = implementation
    return made


def own_kernel(module: nn.Module, implementation: str) -> Callable[..., Any]:
    """The function this module would have called under `implementation`."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if implementation != "eager":
        return ALL_ATTENTION_FUNCTIONS[implementation]
    for cls in type(module).__mro__:
        eager = getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
        if eager is not None:
            return eager
    raise ModelError(f"{type(module).__name__} has no eager attention function.")
