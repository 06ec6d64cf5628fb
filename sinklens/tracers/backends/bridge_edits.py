"""Attention mitigations on a TransformerBridge: hook functions for `run_with_hooks` and `hooks`.

A mitigation edits what attention puts out, where the registered function hands it on. A bridge that computes attention
itself has the same place: `hook_z`, the input of its output projection. What the mitigation is told of the call
(queries, keys, values, who sees whom) is put together from the hooks before it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from sinklens.core.errors import ModelError
from sinklens.kernels.spec import AttentionCall
from sinklens.models.parts import unwrapped
from sinklens.models.spec import Block, OpenedModel

from ..attention import rewritten
from .bridge_attention import (
    ROTATIONS,
    VALUES,
    Seam,
    Vectors,
    call_of,
    heads_first,
    read_vectors,
    visible,
)

Hook = tuple[str, Callable[..., Any]]
SCORES = "hook_attn_scores"


def edit_hooks(opened: OpenedModel) -> list[Hook]:
    """`(hook name, function)` pairs that let the mitigations on the bridge act; empty where they act by themselves.

    Raises:
        ModelError: No hook of this bridge shows what a mitigation needs to know.
    """
    held = opened.handle
    if held.seam is Seam.REGISTRY:
        return []
    names = {id(point): name for name, point in held.bridge.hook_dict.items()}
    found: list[Hook] = []
    for block in opened.anatomy.main.blocks:
        if block.attention is None:
            continue
        way = held.vectors.get(block.index) if held.seam is Seam.SCORES else None
        if way is None or block.attention_output is None:
            raise ModelError(
                f"Mitigations cannot be put on this bridge: no hook of block {block.index} shows its queries and keys.",
                hint="Put it on the transformers model instead: with mitigation(model): ...",
            )
        found += _of_block(opened.module, block, way, names)
    return found


def _of_block(root: nn.Module, block: Block, way: Vectors, names: dict[int, str]) -> list[Hook]:
    component: Any = root.get_submodule(block.attention or "")
    projection: Any = getattr(component, "o", None) or root.get_submodule(block.attention_output or "")
    held: dict[str, Tensor] = {}

    def holding(name: str, point: Any) -> Callable[..., None]:
        def hold(value: Tensor, hook: Any) -> None:
            # Hook functions are given the layout of the library's own names; the component itself uses another.
            conversion = point.hook_conversion
            held[name] = value if conversion is None else conversion.revert(value)

        return hold

    def edit(z: Tensor, hook: Any) -> Tensor:
        call = _call(held, way, component)
        held.clear()
        if z.numel() != call.value.shape[-1] * call.query[..., 0].numel():
            raise ModelError(f"The heads of block {block.index} cannot be told apart at {hook.name}.")
        output = z.reshape(*z.shape[:2], call.query.shape[1], -1)
        return rewritten(unwrapped(component), call, output).reshape(z.shape)

    hooks: list[Hook] = []
    for name in (way.query, way.key, VALUES, SCORES, *(ROTATIONS if way.rotated_here else ())):
        point: Any = getattr(component, name)
        hooks.append((names[id(point)], holding(name, point)))
    return [*hooks, (names[id(projection.hook_in)], edit)]


def _call(held: dict[str, Tensor], way: Vectors, component: Any) -> AttentionCall:
    scores = held[SCORES]
    try:
        query, key = read_vectors(way, held, scores)
        value = heads_first(held[VALUES], scores.shape[3], key.shape[1])
    except ValueError as error:
        raise ModelError(
            "The hooks of a bridge do not show keys that are in a cache.",
            hint="Run the bridge on whole sequences, without past_key_values.",
        ) from error
    learned = call_of(scores, component, None).learned_sinks
    return AttentionCall(
        query,
        key,
        value,
        scale=way.scale,
        causal=False,
        mask=visible(scores),
        softcap=way.cap,
        learned_sinks=learned,
    )
