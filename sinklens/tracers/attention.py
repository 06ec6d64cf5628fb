"""The attention seam: one registered function sees post-RoPE q, k, v of every softmax attention of a model.

transformers looks the attention function up by the name in a module's config, and the mask function by the same
name. The tap registers both under its own names and, while attached, writes the name into the model's configs.
Registering only the function would silently drop masks, so the two always go together.

Modes. *Faithful*: the model's own kernel computes the output, bit for bit, and the statistics follow in a second
sweep over q and k. *Fused*: one pass gives output and statistics; logits are equal to rounding.

Fused kernels return the log-sum-exp of every row, which would spare the sweep its normaliser. It is not used for
that: measured, it saves no time, and on the CPU it is exact to 6e-5 only in half precision, while the sweep's own is
exact to float32 rounding. It is the best witness there is, though: the self-check holds the sweep against it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor, nn

from sinklens.core.errors import ModelError
from sinklens.kernels.blocked import attention_fused, attention_sweep
from sinklens.kernels.capture import Captured, captured_lse
from sinklens.kernels.spec import AttentionCall, AttentionStatistics, BlockPlan, Want
from sinklens.models.parts import unwrapped
from sinklens.models.spec import Tower


class Mode(StrEnum):
    """Who computes the attention output."""

    FAITHFUL = "faithful"
    FUSED = "fused"


@dataclass(frozen=True)
class Site:
    """Where a call comes from: a block of a tower."""

    tower: str
    layer: int


def sites(model: nn.Module, tower: Tower, role: str) -> dict[nn.Module, Site]:
    """The modules of a role (`attention`, `experts`) and the blocks they belong to."""
    paths = ((block.index, getattr(block, role)) for block in tower.blocks)
    return {
        unwrapped(model.get_submodule(path)): Site(tower.name, index)
        for index, path in paths
        if path is not None
    }


Observer = Callable[[Site, AttentionCall, AttentionStatistics], None]
Asks = Callable[[Site, AttentionCall], Want]
Edit = Callable[[Site, AttentionCall, Tensor], Tensor]
Witness = Callable[[Site, AttentionCall, Tensor | None], None]

# Own name -> the implementation whose kernel and mask it stands in for. transformers treats names that contain
# "sdpa", "flash" or "/" specially, so these contain none.
STANDS_FOR = {"sinklens": "sdpa", "sinklens_dense": "eager"}
_NAME_OF = {implementation: name for name, implementation in STANDS_FOR.items()}

# Attached taps by id of the attention module. Several models may be traced at once; a module has one tap.
_attached: dict[int, AttentionTap] = {}


class AttentionTap:
    """Sees, and may edit, every softmax attention of some modules while attached.

    Args:
        sites: Attention modules and where they are. Modules not listed run as without the tap.
        asks: Which statistics to compute for a call. `Want(frozenset())` computes none.
        observer: Receives the statistics of each call, in order.
        edit: Replaces the output `[batch, query, head, value_dim]`, for checks and mitigations.
        witness: Receives the log-sum-exp `[batch, head, query]` that the model's own kernel computed (faithful mode),
            None where the kernel does not tell it.
    """

    def __init__(
        self,
        sites: dict[nn.Module, Site],
        asks: Asks,
        observer: Observer,
        *,
        mode: Mode = Mode.FAITHFUL,
        plan: BlockPlan | None = None,
        edit: Edit | None = None,
        witness: Witness | None = None,
    ) -> None:
        self.sites = {id(module): site for module, site in sites.items()}
        self.asks, self.observer, self.mode, self.edit, self.witness = asks, observer, mode, edit, witness
        self.plan = plan or BlockPlan()
        self.counted: Tensor | None = None
        """Real tokens of the running batch, `[batch, pos]`; set by the executor before each forward pass."""
        self.calls = 0

    @contextmanager
    def attached(self, model: nn.Module) -> Iterator[AttentionTap]:
        """Route the model's attention through this tap; everything is put back on exit, also after an error."""
        clash = self.sites.keys() & _attached.keys()
        if clash:
            raise ModelError(
                "This model is already being traced.", hint="Leave the other `with` block first."
            )
        _register()
        configs = attention_configs(model)
        before = [(config, config._attn_implementation) for config in configs]
        try:
            for config, implementation in before:
                config._attn_implementation_internal = self._name_for(config, implementation)
            _attached.update(dict.fromkeys(self.sites, self))
            yield self
        finally:
            for key in self.sites:
                _attached.pop(key, None)
            for config, implementation in before:
                config._attn_implementation_internal = implementation
            if not _attached:
                _unregister()

    def _name_for(self, config: Any, implementation: str | None) -> str:
        # The fused pass replaces the kernel, so it can take the cheap boolean mask even where the model is eager.
        if implementation == "eager" and self.mode is Mode.FAITHFUL:
            return _NAME_OF["eager"]
        if implementation in ("sdpa", "eager"):
            return _NAME_OF["sdpa"]
        if implementation in STANDS_FOR:
            return str(implementation)
        raise ModelError(
            f"Attention implementation {implementation!r} cannot be traced.",
            detail=f"Expected 'sdpa' or 'eager' in {type(config).__name__}.",
            hint="Load the model with attn_implementation='sdpa'.",
        )

    def run(
        self, site: Site, own: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """One attention call: output (and weights if the own kernel makes them), statistics to the observer."""
        self.calls += 1
        call = attention_call(args, kwargs, eager=STANDS_FOR[name] == "eager", counted=self.counted)
        want = self.asks(site, call)
        weights = None
        if not want.stats:
            output, weights = own(*args, **kwargs)
        elif self.mode is Mode.FUSED:
            output, statistics = attention_fused(call, want, self.plan)
            self.observer(site, call, statistics)
        else:
            with captured_lse() if self.witness is not None else nullcontext() as captured:
                output, weights = own(*args, **kwargs)
            if captured is not None and self.witness is not None:
                self.witness(site, call, _witnessed(captured, call))
            self.observer(site, call, attention_sweep(call, want, None, self.plan))
        if self.edit is not None:
            output = self.edit(site, call, output)
        return output, weights


def _witnessed(captured: Captured, call: AttentionCall) -> Tensor | None:
    """The kernel's log-sum-exp; NaN if a kernel ran on something else than `call` (scale, mask, shape)."""
    lse = captured.lse_for(call)
    if lse is None and captured.lse is not None:
        return torch.full(call.query.shape[:3], float("nan"), device=call.query.device)
    return lse


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


def _register() -> None:
    """Add the tap's names to the two registries, for as long as any tap is attached."""
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

    for name, implementation in STANDS_FOR.items():
        AttentionInterface.register(name, _entry(name))
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[implementation])


def _unregister() -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    for name in STANDS_FOR:
        AttentionInterface._global_mapping.pop(name, None)
        AttentionMaskInterface._global_mapping.pop(name, None)


def _entry(name: str) -> Callable[..., Any]:
    # The parameter names matter: some vision towers pass the mask by keyword.
    def sinklens_attention(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        own = own_kernel(module, STANDS_FOR[name])
        tap = _attached.get(id(module))
        if tap is None:
            return own(module, *args, **kwargs)
        return tap.run(tap.sites[id(module)], own, name, (module, *args), kwargs)

    return sinklens_attention


def no_statistics(site: Site, call: AttentionCall) -> Want:
    """For taps that only edit."""
    return Want(frozenset())


def ignore(site: Site, call: AttentionCall, statistics: AttentionStatistics) -> None:
    """An observer for taps that only edit."""
