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

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor, nn

from sinklens.core.errors import ModelError
from sinklens.kernels.blocked import attention_fused, attention_sweep
from sinklens.kernels.capture import Captured, captured_lse
from sinklens.kernels.sample import RowSample
from sinklens.kernels.sampled import sampled_sweep
from sinklens.kernels.spec import AttentionCall, AttentionStatistics, BlockPlan, Want
from sinklens.models.parts import unwrapped
from sinklens.models.spec import Tower
from sinklens.models.spread import refuse_spread

from .hf_attention import attention_call, attention_configs, own_kernel, standing_in
from .whole_heads import Whole


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

# Attached taps by id of the attention module, in the order in which they came. Several models may be traced at once.
_attached: dict[int, list[AttentionTap]] = {}


@dataclass
class Routed:
    """A config whose attention goes through the taps: what it said before, and how many taps need it so."""

    config: Any
    implementation: str | None
    holders: int = 0


_routed: dict[int, Routed] = {}


@dataclass(frozen=True)
class Attended:
    """One attention call on its way through the taps.

    Attributes:
        call: What the kernel was given; its `edits` are what was done to the map since.
        output: `[batch, query, head, value_dim]`, after those edits.
        weights: The map as the kernel handed it out, after those edits; None if it made none.
        kernel: The log-sum-exp that the model's own kernel computed; None if nobody wanted it.
        dropout: Share of the attention that the kernel dropped.
        remember: Whether somebody measures or edits the map next, so that an edit must say what it did.
    """

    call: AttentionCall
    output: Tensor
    weights: Tensor | None
    kernel: Captured | None
    dropout: float
    remember: bool = False


class AttentionTap:
    """Sees, and may edit, every softmax attention of some modules while attached.

    A module may have several taps. Those that edit the map come first, in the order in which they were attached;
    then those that measure, which see the edited map; last what replaces the output, whose map nobody knows.

    Args:
        sites: Attention modules and where they are. Modules not listed run as without the tap.
        asks: Which statistics to compute for a call. `Want(frozenset())` computes none.
        observer: Receives the statistics of each call, in order.
        edit: Replaces the output `[batch, query, head, value_dim]`, for checks.
        witness: Receives the log-sum-exp `[batch, head, query]` that the model's own kernel computed (faithful mode),
            None where the kernel does not tell it.
        whole: Joins the heads of a model that is spread over processes, before the observer is told.
    """

    edits_map = False
    """Whether it changes where attention goes (`rewrite`), in a way that can be measured."""

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
        whole: Whole | None = None,
    ) -> None:
        self.sites = {id(module): site for module, site in sites.items()}
        self.asks, self.observer, self.mode, self.edit, self.witness = asks, observer, mode, edit, witness
        self.plan, self.whole = plan or BlockPlan(), whole
        self.counted: Tensor | None = None
        """Real tokens of the running batch, `[batch, pos]`; set by the executor before each forward pass."""
        self.samples: tuple[RowSample | None, ...] | None = None
        """Per prompt of the running batch the rows that are measured, None for all; None for all rows of all."""
        self.calls = 0
        self.paused = False

    @contextmanager
    def attached(self, model: nn.Module) -> Iterator[AttentionTap]:
        """Route the model's attention through this tap; everything is put back on exit, also after an error."""
        self._check_company()
        if self.edits_map:
            refuse_spread(model)
        _register()
        with ExitStack() as stack:
            stack.callback(_unregister_if_idle)
            for config in attention_configs(model):
                stack.enter_context(_routing(config, self.mode))
            for key in self.sites:
                _attached.setdefault(key, []).append(self)
                stack.callback(_detach, key, self)
            yield self

    def _check_company(self) -> None:
        """Refuse to measure a map that somebody else makes unknowable, and the other way round."""
        others = [tap for key in self.sites for tap in _attached.get(key, ()) if not tap.edits_map]
        if not self.edits_map and any((self.edit is None) != (tap.edit is None) for tap in others):
            raise ModelError(
                "This model's attention cannot be measured and replaced at the same time.",
                detail="A function stands in for its output, and what map that would come from is not known.",
                hint="Leave the other `with` block first.",
            )

    def rewrite(self, site: Site, attended: Attended) -> Attended:
        """Edit the map and what was made of it; only where `edits_map` says so."""
        raise NotImplementedError

    def counting(self, call: AttentionCall) -> AttentionCall:
        """The call with the rows that count for this tap."""
        counted = self.counted
        known = counted is not None and counted.shape == (call.query.shape[0], call.query.shape[2])
        return replace(call, counted=counted if known else None)

    def lead(self, site: Site, call: AttentionCall) -> Tensor | None:
        """Output and statistics in one pass; None where that is not this tap's way, or nothing is asked."""
        if self.mode is not Mode.FUSED:
            return None
        call = self.counting(call)
        want = self.asks(site, call)
        if not want.stats:
            return None
        output, statistics = attention_fused(call, want, self.plan)
        self._show(site, call, statistics)
        return output

    def measure(self, site: Site, attended: Attended) -> None:
        """Statistics of the map as it is now, to the observer."""
        call = self.counting(attended.call)
        want = self.asks(site, call)
        if not want.stats:
            return
        if self.witness is not None:
            self.witness(site, call, _witnessed(attended.kernel, call))
        if self.samples is not None and len(self.samples) == len(call.query):
            statistics = sampled_sweep(call, want, self.samples, self.plan)
        else:
            statistics = attention_sweep(call, want, None, self.plan)
        self._show(site, call, statistics)

    def _show(self, site: Site, call: AttentionCall, statistics: AttentionStatistics) -> None:
        if self.whole is not None:
            call, statistics = self.whole(call, statistics)
        self.observer(site, call, statistics)


def _through(
    taps: list[AttentionTap], key: int, own: Callable[..., Any], name: str, args: Any, kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """One attention call: the kernel, the edits of the map, the measurements, what replaces the output."""
    call = attention_call(args, kwargs, eager=STANDS_FOR[name] == "eager", counted=None)
    editors = [tap for tap in taps if tap.edits_map and not tap.paused]
    others = [tap for tap in taps if not tap.edits_map]
    for tap in taps:
        tap.calls += 1
    output = None
    leader = others[0] if others and not editors else None
    if leader is not None:
        output = leader.lead(leader.sites[key], call)
    if output is not None:
        attended = Attended(call, output, None, None, 0.0)
    else:
        leader = None
        curious = bool(editors) or any(tap.witness is not None for tap in others)
        with captured_lse() if curious else nullcontext() as captured:
            output, weights = own(*args, **kwargs)
        dropout = float(kwargs.get("dropout") or 0.0)
        attended = Attended(call, output, weights, captured, dropout)
    for tap in editors:
        remember = bool(others) or tap is not editors[-1]
        attended = tap.rewrite(tap.sites[key], replace(attended, remember=remember))
    for tap in others:
        if tap is not leader:
            tap.measure(tap.sites[key], attended)
    output = attended.output
    for tap in others:
        if tap.edit is not None:
            output = tap.edit(tap.sites[key], tap.counting(attended.call), output)
    return output, attended.weights


def _witnessed(captured: Captured | None, call: AttentionCall) -> Tensor | None:
    """The kernel's log-sum-exp; NaN if a kernel ran on something else than `call` (scale, mask, shape)."""
    if captured is None:
        return None
    lse = captured.lse_for(call)
    if lse is None and captured.lse is not None:
        return torch.full(call.query.shape[:3], float("nan"), device=call.query.device)
    return lse


@contextmanager
def _routing(config: Any, mode: Mode) -> Iterator[None]:
    """Let a config name the taps as its attention; the last one to leave puts back what it said."""
    key = id(config)
    if key not in _routed:
        before = config._attn_implementation
        name = _name_for(config, before, mode)
        _routed[key] = Routed(config, before)
        config._attn_implementation_internal = standing_in(config, name, STANDS_FOR[name])
    _routed[key].holders += 1
    try:
        yield
    finally:
        _routed[key].holders -= 1
        if not _routed[key].holders:
            config._attn_implementation_internal = _routed.pop(key).implementation


def _name_for(config: Any, implementation: str | None, mode: Mode) -> str:
    # The fused pass replaces the kernel, so it can take the cheap boolean mask even where the model is eager.
    if implementation == "eager" and mode is Mode.FAITHFUL:
        return _NAME_OF["eager"]
    if implementation in ("sdpa", "eager"):
        return _NAME_OF["sdpa"]
    raise ModelError(
        f"Attention implementation {implementation!r} cannot be traced.",
        detail=f"Expected 'sdpa' or 'eager' in {type(config).__name__}.",
        hint="Load the model with attn_implementation='sdpa'.",
    )


def implementation_of(config: Any) -> str | None:
    """The attention that a config asks for, also while taps stand in for it."""
    routed = _routed.get(id(config))
    return getattr(config, "_attn_implementation", None) if routed is None else routed.implementation


def editors_of(modules: Iterable[nn.Module]) -> list[AttentionTap]:
    """Taps that edit the maps of these attention modules right now, in the order in which they act."""
    taps = dict.fromkeys(tap for module in modules for tap in _attached.get(id(module), ()))
    return [tap for tap in taps if tap.edits_map]


def rewritten(module: nn.Module, call: AttentionCall, output: Tensor) -> Tensor:
    """The output `[batch, query, head, value_dim]` of a call computed elsewhere, after the edits on `module`."""
    attended, taps = Attended(call, output, None, None, 0.0), editors_of([module])
    for tap in (tap for tap in taps if not tap.paused):
        tap.calls += 1
        attended = tap.rewrite(
            tap.sites[id(module)], replace(attended, remember=len(taps) > 1 and tap is not taps[-1])
        )
    return attended.output


@contextmanager
def unedited(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Run these attention modules without what edits their maps, for questions about the model itself."""
    taps = [tap for tap in editors_of(modules) if not tap.paused]
    for tap in taps:
        tap.paused = True
    try:
        yield
    finally:
        for tap in taps:
            tap.paused = False


def _detach(key: int, tap: AttentionTap) -> None:
    _attached[key].remove(tap)
    if not _attached[key]:
        del _attached[key]


def _register() -> None:
    """Add the tap's names to the two registries, for as long as any tap is attached."""
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

    for name, implementation in STANDS_FOR.items():
        AttentionInterface.register(name, _entry(name))
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[implementation])


def _unregister_if_idle() -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    if _attached:
        return
    for name in STANDS_FOR:
        AttentionInterface._global_mapping.pop(name, None)
        AttentionMaskInterface._global_mapping.pop(name, None)


def _entry(name: str) -> Callable[..., Any]:
    # The parameter names matter: some vision towers pass the mask by keyword.
    def sinklens_attention(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        own = own_kernel(module, STANDS_FOR[name])
        taps = _attached.get(id(module))
        if not taps:
            return own(module, *args, **kwargs)
        return _through(taps, id(module), own, name, (module, *args), kwargs)

    return sinklens_attention


def no_statistics(site: Site, call: AttentionCall) -> Want:
    """For taps that only edit."""
    return Want(frozenset())


def ignore(site: Site, call: AttentionCall, statistics: AttentionStatistics) -> None:
    """An observer for taps that only edit."""
