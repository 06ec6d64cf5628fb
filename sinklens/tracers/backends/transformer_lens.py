"""TransformerLens: a `TransformerBridge` handed over as it is, or a bridge of our own around any model.

Everything but attention is read as in transformers, because the bridge's components stand at the paths of the parts
they wrap and give out what those give. A bridge changes the model it is made from, so one is only ever made around a
copy that nobody else holds.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sinklens.core.errors import ModelError
from sinklens.kernels.spec import AttentionCall, AttentionStatistics, BlockPlan, Want
from sinklens.models.opening import open_model
from sinklens.models.spec import OpenedModel

from ..attention import Edit, Site
from ..batch import Batch, first_tensor, forward
from ..fallback import weights_tap
from ..signals import Signal
from .base import Backend, Counter, Seen, attention_tap, in_memory
from .bridge_attention import BridgeTap, Seam, Vectors, find_seam
from .bridge_twin import check_parts, twin_of

if TYPE_CHECKING:
    from ..executor import TracePlan
    from ..selfcheck import Check

NO_INSTALLS = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "/nonexistent", "UV_OFFLINE": "1", "UV_NO_INDEX": "1"}
"""The library calls pip or uv when a processor fails to load; these make both find nothing to install."""
AGREEMENT = 1e-4
"""Largest difference between a bridge and transformers, relative to the largest output."""


@dataclass
class Held:
    """A bridge and what was found out about it."""

    bridge: Any
    seam: Seam
    vectors: dict[int, Vectors | None] = field(default_factory=dict)


class TransformerLens(Backend):
    """Signals from the hook points of a TransformerBridge."""

    name = "transformer-lens"
    title = "TransformerLens"
    about = (
        "A TransformerBridge as it is: its own attention (one T x T map alive at a time), hooks left alone."
    )
    package = "transformer_lens"
    extra = "transformer-lens"

    def owns(self, model: Any) -> bool:
        return any(cls.__module__.partition(".")[0] == "transformer_lens" for cls in type(model).__mro__)

    def module_of(self, model: Any) -> nn.Module | None:
        return getattr(model, "original_model", None)

    def open(self, model: Any, tokenizer: Any = None, **source: Any) -> OpenedModel:
        if self.owns(model):
            refuse_unfit(model)
            return held_bridge(model, tokenizer if tokenizer is not None else model.tokenizer, **source)
        opened = open_model(model, tokenizer=tokenizer, **source)
        module = copy.deepcopy(opened.module) if in_memory(model) else opened.module
        found = held_bridge(bridge_around(module), opened.tokenizer)
        return replace(
            found,
            info=opened.info,
            default_prompts=opened.default_prompts,
            processor=opened.processor,
            load_processor=opened.load_processor,
        )

    def attention(
        self, opened: OpenedModel, batch: Batch, seen: Seen, plan: TracePlan
    ) -> AbstractContextManager[Counter]:
        held: Held = opened.handle
        refuse_left_padding(opened, batch)
        if held.seam is Seam.REGISTRY:
            return attention_tap(opened, batch, seen, plan)
        if held.seam is Seam.WEIGHTS:
            return weights_tap(opened.module, opened.anatomy.main, batch, seen)
        return BridgeTap(opened.module, opened.anatomy.main, held.vectors).attached(batch, seen, plan.blocks)

    def edited(self, opened: OpenedModel, batch: Batch, edit: Edit) -> Any:
        """As for every backend, but the edit stands before the output projection and is shown no call."""
        handles = []
        tower = opened.anatomy.main

        def hook(layer: int) -> Any:
            def change(module: nn.Module, args: tuple[Any, ...]) -> Any:
                return (edit(Site(tower.name, layer), None, args[0]), *args[1:])  # pyright: ignore[reportArgumentType]

            return change

        try:
            for block in tower.blocks:
                if block.attention_output is not None:
                    module = opened.module.get_submodule(block.attention_output)
                    handles.append(module.register_forward_pre_hook(hook(block.index)))
            return self.forward(opened, batch)
        finally:
            for handle in handles:
                handle.remove()

    def attention_path(self, opened: OpenedModel, plan: TracePlan) -> str:
        held: Held = opened.handle
        if held.seam is Seam.REGISTRY:
            return f"TransformerLens leaves it to transformers; {super().attention_path(opened, plan)}"
        what = "scores" if held.seam is Seam.SCORES else "weights"
        return f"the bridge's own attention; statistics from its {what}, one layer at a time"

    def missing(self, opened: OpenedModel) -> Mapping[Signal, str]:
        from ..record_vectors import OF_VECTORS

        held: Held = opened.handle
        if held.seam is Seam.REGISTRY or not opened.anatomy.routed:
            return {}  # what transformers does not show either is told by the analyzers themselves
        if held.seam is Seam.SCORES and None not in held.vectors.values():
            return {}
        why = "no hook of this bridge shows the queries and keys that its scores are made of"
        return dict.fromkeys(OF_VECTORS, why)

    def checks(self, opened: OpenedModel, batch: Batch) -> list[Check]:
        return [bridge_agrees(opened, batch)]

    def for_experiments(self, opened: OpenedModel) -> OpenedModel | str:
        """The twin: experiments change parts by their paths, and compare only with themselves."""
        if hooks := own_hooks(opened.handle.bridge):
            return (
                f"The bridge was measured with hooks on {hooks} of its hook points, and experiments run on the "
                "model without them."
            )
        return replace(opened, module=opened.plain, backend="hf", handle=None, twin=None)


def bridge_around(module: Any) -> Any:
    """A bridge around a model that nobody else holds: it is changed in place.

    Raises:
        ModelError: TransformerLens has no adapter for this family, or the adapter fails on it.
    """
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    family = type(module).__name__
    try:
        with no_installs():
            return build_bridge_from_module(module, family, hf_config=module.config)
    except Exception as error:  # whatever an adapter raises: its types and words differ by family
        raise ModelError(
            f"TransformerLens cannot wrap {family}: {type(error).__name__}: {str(error).splitlines()[0][:160]}",
            hint="Profile it without the bridge: --backend hf",
        ) from error


@contextmanager
def no_installs() -> Iterator[None]:
    """Whatever runs inside cannot install packages; the environment is put back on exit."""
    before = {name: os.environ.get(name) for name in NO_INSTALLS}
    os.environ.update(NO_INSTALLS)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def refuse_unfit(model: Any) -> None:
    """Refuse what is not a bridge, or one whose weights are no longer those of the model.

    Raises:
        ModelError: With what to do instead.
    """
    if not isinstance(getattr(model, "original_model", None), nn.Module) or not hasattr(model, "adapter"):
        raise ModelError(
            f"A {type(model).__name__} of TransformerLens cannot be profiled.",
            detail="Expected a TransformerBridge (TransformerLens 4) around a transformers model.",
            hint="TransformerBridge.boot_transformers(name) gives one.",
        )
    if getattr(model, "_weights_processed", False):
        raise ModelError(
            "The weights of this bridge were rewritten (folded layer norms, centred or folded weights), so its "
            "hidden states are not those of the model.",
            detail="Norms, medians and written values would be those of another basis.",
            hint="Boot it again without enable_compatibility_mode(), or with no_processing=True.",
        )


def held_bridge(bridge: Any, tokenizer: Any, **source: Any) -> OpenedModel:
    """A bridge, described by its twin."""
    root = bridge.original_model.eval()
    twin = twin_of(root)
    opened = open_model(twin, tokenizer=tokenizer, **source)
    check_parts(root, opened.anatomy)
    tower = opened.anatomy.main
    ids = torch.arange(8, device=next(twin.parameters()).device)[None]
    batch = Batch({"input_ids": ids}, torch.ones_like(ids, dtype=torch.bool))
    held = Held(bridge, find_seam(root, tower, lambda: forward(root, batch)))
    if held.seam is Seam.SCORES:
        with BridgeTap(root, tower, held.vectors).attached(batch, Nobody(), BlockPlan()):
            forward(root, batch)
    return replace(opened, module=root, twin=twin, backend=TransformerLens.name, handle=held)


class Nobody:
    """Asks for no statistics."""

    def asks(self, site: Site, call: AttentionCall) -> Want:
        return Want(frozenset())

    def on_attention(self, site: Site, call: AttentionCall, statistics: AttentionStatistics) -> None:
        return None


def refuse_left_padding(opened: OpenedModel, batch: Batch) -> None:
    """Refuse left-padded batches of bidirectional models: a bridge counts their positions in its own way.

    Raises:
        ModelError: The bridge would give other numbers than transformers.
    """
    if opened.anatomy.main.causal or batch.valid is None or bool(batch.valid[:, 0].all()):
        return
    raise ModelError(
        f"A bridge counts the positions of left-padded {opened.info.family} inputs from the first real token; "
        "transformers counts padding too, so the two disagree.",
        hint="Pad on the right, or profile without the bridge: --backend hf",
    )


def own_hooks(bridge: Any) -> int:
    """Hooks that somebody put on the bridge's hook points."""
    return sum(bool(point.fwd_hooks) for point in bridge.hook_dict.values() if not _library_made(point))


def _library_made(point: Any) -> bool:
    return all(getattr(hook, "is_permanent", False) for hook in point.fwd_hooks)


def bridge_agrees(opened: OpenedModel, batch: Batch) -> Check:
    """Whether the bridge computes what transformers computes with the same weights."""
    from ..selfcheck import Check

    name = "bridge = transformers"
    if hooks := own_hooks(opened.handle.bridge):
        return Check(name, True, detail=f"not compared: {hooks} hook points of the bridge have hooks on them")
    ours, theirs = (first_tensor(forward(model, batch)) for model in (opened.module, opened.plain))
    if batch.valid is not None and ours.shape[:2] == batch.valid.shape:
        ours, theirs = ours[batch.valid], theirs[batch.valid]
    largest = float(theirs.float().abs().max())
    error = float((ours.float() - theirs.float()).abs().max()) / max(largest, 1e-30)
    limit = max(AGREEMENT, 8 * torch.finfo(theirs.dtype).eps)
    detail = (
        "max |difference of the output| between the bridge and transformers, relative to the largest output"
    )
    return Check(name, error <= limit, error, limit, detail)
