"""NDIF: models that nnsight runs on somebody else's machines.

One trace per batch reads what enters attention, what leaves the blocks and their down projections, reduces it there
and ends after the last block. No hook of this process reaches the model, so signals that need more than these places
are not given.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sinklens.core.errors import ModelError, ResourceError, UsageError
from sinklens.inputs.spec import Prompt
from sinklens.kernels.magnitudes import Largest
from sinklens.kernels.spec import AttentionCall, AttentionStatistics, Stat
from sinklens.models.opening import described_module
from sinklens.models.spec import OpenedModel, Tower

from .. import signals as sig
from ..attention import Site
from ..batch import Batch, collate
from ..recorder import Recorder
from ..signals import ALL_SIGNALS, Signal, Source
from .base import Backend

if TYPE_CHECKING:
    from ..executor import Pass, TracePlan
    from ..selfcheck import Check

BLOCK = 256
"""Rows of a map that are in the host's memory at once."""
COMPUTED = (
    Stat.RECEIVED,
    Stat.RECEIVED_LOG,
    Stat.RECEIVED_TAIL,
    Stat.TOP1,
    Stat.ENTROPY,
    Stat.ENTROPY_NORMALISED,
    Stat.DISTANCE,
    Stat.ROW_MAX,
    Stat.DIAGONAL,
    Stat.LEARNED_SINK,
)
STATES = frozenset({sig.RESIDUAL_NORM, sig.RESIDUAL_MEDIAN, sig.RESIDUAL_TOP, sig.DOWN_PROJ_TOP})
NORMS = frozenset({sig.VALUE_NORM, sig.VALUE_NORM_MEAN, sig.KEY_NORM, sig.KEY_NORM_MEAN})
ATTENTION = frozenset(
    {
        sig.ATTENTION_RECEIVED,
        sig.ATTENTION_RECEIVED_MEAN,
        sig.ATTENTION_RECEIVED_PEAK,
        sig.KEPT_POSITIONS,
        sig.VISIBLE_QUERIES,
        sig.ATTENTION_SELF,
        sig.ATTENTION_TOP1,
        sig.ATTENTION_ENTROPY,
        sig.ATTENTION_ENTROPY_NORMALISED,
        sig.ATTENTION_DISTANCE,
        sig.ATTENTION_ROW_MAX,
        sig.FIRST_MASS,
        sig.LEARNED_SINK_MASS,
        sig.COLUMN_ENTROPY,
        sig.COLUMN_ENTROPY_PEAK,
        sig.ATTENTION_TAIL,
        sig.TAIL_ENTROPY,
        sig.TAIL_PEAK,
    }
)
CALL = "attention_interface"
"""How transformers' attention modules name the function they call."""


def gives(signal: Signal) -> bool:
    """Whether a signal can be made of what is reduced on the host."""
    return signal in ATTENTION | NORMS | STATES


def _why(signal: Signal) -> str:
    if signal.source is Source.EXPERTS:
        return "experts are read at a registered function, which the host does not have"
    if signal.source is Source.ATTENTION:
        return "it is not among the reductions that run on the host"
    return "it compares whole states, which stay on the host"


@dataclass
class Hosted:
    """A model of nnsight without weights, and where it runs: True for NDIF, `local` for nnsight's simulation."""

    model: Any
    target: Any = True


class Ndif(Backend):
    """Signals reduced on the machines of NDIF."""

    name = "ndif"
    title = "NDIF (nnsight)"
    about = "A model on the machines of NDIF (--remote): attention, norms and largest entries, reduced there."
    package = "nnsight"
    extra = "nnsight"
    lacks: Mapping[Signal, str] = {signal: _why(signal) for signal in ALL_SIGNALS if not gives(signal)}  # pyright: ignore

    def owns(self, model: Any) -> bool:
        return False

    def takes(self, model: Any) -> bool:
        return _is_held(model)

    def open(self, model: Any, tokenizer: Any = None, **source: Any) -> OpenedModel:
        revision = source.pop("revision", None)
        source.pop("trust_remote_code", None)
        chosen = [name for name, value in source.items() if value not in (None, "auto")]
        if chosen:
            raise UsageError(f"{', '.join(chosen)} cannot be chosen for a model on NDIF.")
        require_key()
        held = model if _is_held(model) else _named(model, revision)
        module: Any = held._module
        name = getattr(module.config, "_name_or_path", "") or str(model)
        own = tokenizer if tokenizer is not None else getattr(held, "tokenizer", None)
        return described_module(module, own, name, revision, backend=self.name, handle=Hosted(held))

    def forward(self, opened: OpenedModel, batch: Batch, *, logits: bool = True) -> Any:
        raise ModelError("A model on NDIF runs inside a trace of its own; its output does not come back.")

    def attention_path(self, opened: OpenedModel, plan: TracePlan) -> str:
        return "the host's own attention; a dense pass over what it was given, in blocks, reduced on the host"

    def for_experiments(self, opened: OpenedModel) -> str:
        return "The model runs on other machines, where nothing is taken away from it."

    def self_checks(self, opened: OpenedModel, prompts: Sequence[Prompt], plan: TracePlan) -> list[Check]:
        pad = getattr(opened.tokenizer, "pad_token_id", None) or 0
        return hosted_checks(opened, collate(prompts[:1], pad_id=pad))

    def hosted(self, opened: OpenedModel, batch: Batch, plan: TracePlan) -> Pass:
        from ..executor import Pass

        recorder = Recorder(batch, len(opened.anatomy.main.blocks), plan.signals, plan.limits)
        layers = remote_pass(opened, batch, ranks=plan.limits.ranks)
        calls = 0
        for block, layer in zip(opened.anatomy.main.blocks, layers, strict=True):
            if layer["attention"] is not None and Source.ATTENTION in plan.sources():
                site = Site(opened.anatomy.main.name, block.index)
                call, statistics = as_statistics(layer["attention"], opened.anatomy.main)
                recorder.attention.asks(site, call)
                recorder.attention.on_attention(site, call, statistics)
                calls += 1
            for row, made in enumerate(layer["down"] or ()):
                recorder.states.put_largest(row, sig.DOWN_PROJ_TOP, block.index, _largest(made))
            for row, made in enumerate(layer["state"]):
                _put_state(recorder, row, block.index, made)
        return Pass(recorder.records(), None, calls, 0)


def _is_held(model: Any) -> bool:
    return any(cls.__module__.partition(".")[0] == "nnsight" for cls in type(model).__mro__)


def _named(model: Any, revision: str | None) -> Any:
    from nnsight.modeling.transformers import TransformersModel

    from sinklens.models.catalog import locate

    source = locate(model, revision)
    if source.folder is not None:
        raise ModelError(
            f"NDIF runs models of the hub, and {source.id!r} is a folder here.",
            hint="Give org/name, or run it here: --backend nnsight",
        )
    return TransformersModel(source.location, revision=source.revision, task="text-generation")


def require_key() -> None:
    """Refuse without a key, before anything is loaded.

    Raises:
        ModelError: With where a key comes from.
    """
    from nnsight import CONFIG

    if not (CONFIG.API.APIKEY or os.environ.get("NDIF_API_KEY")):
        raise ModelError(
            "NDIF needs an API key, and none is set.",
            detail="A key is free for researchers: https://login.ndif.us",
            hint="Set it: nnsight login, or NDIF_API_KEY=...",
        )


def call_name(model: Any, path: str) -> str:
    """The operation of an attention module that calls the attention function.

    Raises:
        ModelError: It calls none.
    """
    names = [name for name in model.get(path).source.names if name.rpartition("_")[0] == CALL]
    if not names:
        raise ModelError(
            f"The attention at {path!r} does not call a function that could be read on the host.",
            hint="Profile it here: --backend nnsight",
        )
    return names[-1]  # the first is the assignment of the function


def remote_pass(opened: OpenedModel, batch: Batch, *, ranks: int) -> list[dict[str, Any]]:
    """One trace on the host: reductions of every block, in order."""
    import nnsight

    from .remote_code import reduce_attention, reduce_state

    model, target = opened.handle.model, opened.handle.target
    blocks = [
        (
            block.path,
            block.attention,
            call_name(model, block.attention) if block.attention else "",
            block.down_proj or block.shared_down_proj,
            block.residual_norm,
        )
        for block in opened.anatomy.main.blocks
    ]
    valid = (
        batch.valid
        if batch.valid is not None
        else torch.ones_like(batch.inputs["input_ids"], dtype=torch.bool)
    )
    inputs, names, size = batch.inputs, [str(stat) for stat in COMPUTED] + ["first"], BLOCK
    layers: list[dict[str, Any]] = []
    with _by_value(), _explained(), torch.no_grad(), model.trace(**inputs, remote=target) as tracer:
        found = []
        for path, attention, call, down, norm in blocks:
            layer: dict[str, Any] = {"attention": None, "down": None}
            if attention:
                args, kwargs = getattr(model.get(attention).source, call).inputs
                layer["attention"] = reduce_attention(args, kwargs, valid, names, size)
            if down:
                layer["down"] = reduce_state(model.get(down).output, valid, ranks)
            if norm:
                layer["state"] = reduce_state(model.get(norm).input, valid, ranks)
            else:
                layer["state"] = reduce_state(model.get(path).output, valid, ranks)
            found.append(layer)
        layers = nnsight.save(found)
        tracer.stop()
    return layers


@contextmanager
def _by_value() -> Any:
    """Send the functions of `remote_code` as source, as long as a trace is sent."""
    import cloudpickle

    from . import remote_code

    cloudpickle.register_pickle_by_value(remote_code)
    try:
        yield
    finally:
        cloudpickle.unregister_pickle_by_value(remote_code)


@contextmanager
def _explained() -> Any:
    """Say what a refusal of the host means."""
    from nnsight.intervention.backends.remote import RemoteError

    try:
        yield
    except RemoteError as error:
        raise explained(str(error)) from error


def explained(said: str) -> ModelError | ResourceError:
    """The host's words as an error of ours: memory, key, versions, or as they are."""
    first = (said.strip().splitlines() or [""])[-1][:200]
    low = said.lower()
    if "out of memory" in low:
        return ResourceError(
            f"The host ran out of memory: {first}", hint="Try: --batch-size 1, or a smaller --seq-len"
        )
    if "api key" in low or "401" in low or "unauthorized" in low:
        return ModelError(
            f"NDIF refused the API key: {first}", hint="Set another: nnsight login, or NDIF_API_KEY=..."
        )
    skew = version_skew()
    if "version" in low or skew is not None:
        return ModelError(
            f"NDIF and this machine run different versions: {first}",
            detail=f"{skew or 'Which ones, it does not say'}.",
            hint="Install the versions of the host, or run here: --backend nnsight",
        )
    return ModelError(f"NDIF could not run the model: {first}", hint="Run it here: --backend nnsight")


def version_skew() -> str | None:
    """Packages that matter whose versions differ between the host and here; None if none does or nobody answers."""
    import nnsight

    try:
        found = nnsight.compare().critical_mismatches
    except Exception:  # the host cannot be reached, in whatever way; the first error is the one to tell
        return None
    told = [
        f"{name} is {pair['local']} here and {pair['remote']} there" for name, pair in sorted(found.items())
    ]
    return "; ".join(told) or None


def as_statistics(found: dict[str, Tensor], tower: Tower) -> tuple[AttentionCall, AttentionStatistics]:
    """What came back, as a call and its statistics. Norms stand in for keys and values, which do not travel."""
    key, value = found["key_norm"][..., None], found["value_norm"][..., None]
    batch, heads = found["received"].shape[:2]
    query = torch.zeros(batch, heads, found["rows"].shape[1], 1)
    learned = torch.zeros(heads) if "learned_sink" in found else None
    call = AttentionCall(query, key, value, scale=1.0, causal=tower.causal, learned_sinks=learned)
    values = {Stat(name): tensor for name, tensor in found.items() if name in set(Stat)}
    if "first" in found:
        values[Stat.GROUP_MASS] = found["first"][..., None]
    return call, AttentionStatistics(values, found["visible"], found["rows"])


def _largest(made: dict[str, Tensor]) -> Largest:
    return Largest(made["value"], made["pos"], made["dim"])


def _put_state(recorder: Recorder, row: int, layer: int, made: dict[str, Tensor]) -> None:
    wanted, put = recorder.ledger.wanted, recorder.ledger.put
    put(row, sig.RESIDUAL_NORM.name, layer, made["norm"])
    if sig.RESIDUAL_MEDIAN in wanted:
        put(row, sig.RESIDUAL_MEDIAN.name, layer, made["median"])
    if sig.RESIDUAL_TOP in wanted:
        recorder.states.put_largest(row, sig.RESIDUAL_TOP, layer, _largest(made))


def hosted_checks(opened: OpenedModel, batch: Batch) -> list[Check]:
    """What can be checked from here: every layer answered, weights add up to 1, all values are numbers."""
    from ..selfcheck import Check

    layers = remote_pass(opened, batch, ranks=4)
    blocks = opened.anatomy.main.blocks
    expected = sum(block.attention is not None for block in blocks)
    seen, error, bad = 0, 0.0, 0
    for layer in layers:
        found = layer["attention"]
        bad += sum(int((~torch.isfinite(made["norm"])).sum()) for made in layer["state"])
        if found is None:
            continue
        seen += 1
        rows = found["rows"].sum(-1).double()[:, None]
        given = found["received"].double().sum(-1)
        if "learned_sink" in found:
            given = given + found["learned_sink"].double().sum(-1)
        error = max(error, float(((given - rows).abs() / rows.clamp(min=1)).max()))
    mass = "max |attention received by all keys / rows - 1|, learned sinks included"
    return [
        Check(
            "all attention seen",
            seen == expected,
            seen,
            expected,
            "attention calls that came back from the host",
        ),
        Check("attention mass is one", error <= 1e-4, error, 1e-4, mass),
        Check("all values finite", bad == 0, float(bad), 0.0, "NaN or infinite norms of hidden states"),
    ]
