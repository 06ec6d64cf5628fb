"""The self-check: evidence that the measurement measures, taken on the model at hand before numbers are printed.

A failed check means no verdict. Each check states its value, its limit and what it compared.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sinklens.inputs.spec import Prompt
from sinklens.kernels.blocked import attention_sweep
from sinklens.kernels.reference import attention_reference
from sinklens.kernels.spec import AttentionCall, AttentionStatistics, Stat, Want
from sinklens.models.spec import OpenedModel
from sinklens.models.verify import verify_anatomy

from .attention import AttentionTap, Mode, Site, ignore, unedited
from .backends import backend_of
from .batch import Batch, collate, device_of, first_tensor, forward, text_config
from .executor import Pass, TracePlan, edited_output, recordable, sites, trace_batch
from .fallback import calls_kernel_directly
from .recorder import Recorder
from .signals import Source

DENSE_BUDGET = 20_000_000
"""Attention weights of one layer that the dense comparison may hold; heads are sampled beyond it."""


@dataclass(frozen=True)
class Check:
    """One check. `value` and `limit` are in the unit that `detail` names; None where there is no number."""

    name: str
    passed: bool
    value: float | None = None
    limit: float | None = None
    detail: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Asking(Protocol):
    """Who says which statistics of a call are wanted."""

    def asks(self, site: Site, call: AttentionCall) -> Want: ...


@dataclass
class Agreement:
    """Compares the blocked statistics that `seen` asks for with the dense reference inside a running model."""

    seen: Asking
    worst: float = 0.0
    where: str = ""
    mass: float = 0.0
    tokens: int = 0
    layers: set[int] = field(default_factory=set)

    def asks(self, site: Site, call: AttentionCall) -> Want:
        return self.seen.asks(site, call)

    def on_attention(self, site: Site, call: AttentionCall, statistics: AttentionStatistics) -> None:
        want = self.asks(site, call)
        heads = _sampled_heads(call, site.layer)
        small = _only_heads(call, heads)
        _, dense = attention_reference(small, want)
        for stat in want.stats - {Stat.TOP1}:  # ties may fall either way; TOP1 is compared by its sum below
            error = _relative_error(
                statistics[stat][:, heads], dense[stat], call.key.shape[2] if stat is Stat.DISTANCE else 1
            )
            if error > self.worst or math.isnan(error):
                self.worst, self.where = error, f"{stat} in layer {site.layer}"
        self._count_mass(statistics)
        self.tokens = max(self.tokens, call.query.shape[2])
        self.layers.add(site.layer)

    def _count_mass(self, statistics: AttentionStatistics) -> None:
        """Attention given out must equal the number of rows, less what learned sinks take."""
        if Stat.RECEIVED not in statistics.values or statistics.rows is None:
            return
        rows = statistics.rows.sum(-1).double()[:, None]
        given = statistics[Stat.RECEIVED].double().sum(-1)
        if Stat.LEARNED_SINK in statistics.values:
            given = given + statistics[Stat.LEARNED_SINK].double().sum(-1)
        self.mass = max(self.mass, float(((given - rows).abs() / rows.clamp(min=1)).max()))


def self_check(opened: OpenedModel, prompts: Iterable[Prompt], plan: TracePlan) -> list[Check]:
    """Run all checks on a few of the prompts.

    Args:
        prompts: The first two are used: a short cut of one, and both together as a padded batch that is longer
            than any sliding window that engages in the run.
    """
    from .check_pictures import dense_batch, picture_batch

    everything, plan = list(prompts), recordable(opened, plan)
    chosen = everything[:2]
    if (hosted := backend_of(opened).self_checks(opened, chosen, plan)) is not None:
        return hosted
    window = sliding_window(opened.module)
    longest = max(len(prompt) for prompt in chosen)
    device = next(opened.module.parameters()).device
    pictures = picture_batch(everything, device)
    if pictures is not None:
        short = dense_batch(pictures, opened.anatomy.main.heads, device)
        return _run_checks(opened, short, [short], pictures, plan, window, max(map(len, everything)))
    short = _batch(opened, [_cut(chosen[0], 12)])
    batches = [short]
    if window is not None and longest > window:
        batches.append(_batch(opened, [_cut(prompt, window + 8) for prompt in chosen]))
    elif len(chosen) > 1:
        batches.append(_batch(opened, [_cut(chosen[0], 24), _cut(chosen[1], 17)]))
    return _run_checks(opened, short, batches, batches[-1], plan, window, longest)


def _run_checks(
    opened: OpenedModel,
    short: Batch,
    batches: list[Batch],
    whole: Batch,
    plan: TracePlan,
    window: int | None,
    longest: int,
) -> list[Check]:
    """All checks: statistics on `batches`, the output with and without tracing on `whole`."""
    checks = [_eval_mode(opened.module), _parts(opened, short)]
    checks += _tracing_checks(opened, whole, plan)
    if opened.anatomy.routed and Source.ATTENTION in plan.sources():
        checks += [_agreement(opened, batch, plan) for batch in batches[:1]]
        if len(batches) > 1:
            checks.append(_agreement(opened, batches[1], plan, name="blocked = dense, padded batch"))
        checks.append(_mass(opened, batches[-1], plan))
        if plan.sampling is not None:
            from .check_sampling import sampling_check

            checks.append(sampling_check(opened, batches[-1], plan))
        checks += _kernel_agrees(opened, batches[-1], plan)
        checks.append(_causal(opened, short))
    if window is not None:
        checks.append(_window_seen(window, longest))
    return checks + backend_of(opened).checks(opened, batches[-1])


def sliding_window(model: nn.Module) -> int | None:
    """The sliding window of the text config, if the model has one that is switched on."""
    config = text_config(model)
    window = getattr(config, "sliding_window", None) or getattr(config, "window_size", None)
    if not isinstance(window, int) or getattr(config, "use_sliding_window", True) is False:
        return None
    kinds = getattr(config, "layer_types", None) or getattr(config, "attention_layers", None)
    return window if kinds is None or any("sliding" in kind or "local" in kind for kind in kinds) else None


def _tracing_checks(opened: OpenedModel, batch: Batch, plan: TracePlan) -> list[Check]:
    backend = backend_of(opened)
    plain = first_tensor(backend.forward(opened, batch))
    traced = trace_batch(opened, batch, plan)
    after = first_tensor(backend.forward(opened, batch))
    checks = [
        _same_output(plain, first_tensor(traced.output), batch, plan, opened),
        Check(
            "nothing left on the model",
            torch.equal(_real(plain, batch), _real(after, batch)),
            float((_real(plain, batch) - _real(after, batch)).abs().max()),
            0.0,
            "max |change of the output| between a pass before and one after tracing",
        ),
        _finite(traced, plain, batch),
    ]
    if Source.ATTENTION in plan.sources():
        expected = sum(block.attention is not None for block in opened.anatomy.main.blocks)
        detail = "attention calls seen, of one per block with attention"
        checks.append(
            Check(
                "all attention seen",
                traced.attention_calls == expected,
                traced.attention_calls,
                expected,
                detail,
            )
        )
    if Source.EXPERTS in plan.sources() and opened.anatomy.main.n_experts:
        checks.append(_experts_seen(opened, batch, traced))
    return checks + _picture_checks(opened, batch, traced, plan)


def _picture_checks(opened: OpenedModel, batch: Batch, traced: Pass, plan: TracePlan) -> list[Check]:
    from .check_pictures import painted_check, vision_checks
    from .record_vision import shows_pictures

    if not shows_pictures(batch):
        return []
    painted = painted_check(opened, batch)
    return vision_checks(opened, batch, traced, plan) + ([] if painted is None else [painted])


def _same_output(plain: Tensor, traced: Tensor, batch: Batch, plan: TracePlan, opened: OpenedModel) -> Check:
    """Bit-identical in faithful mode; to the rounding of the dtype in fused mode."""
    difference = float((_real(plain, batch).float() - _real(traced, batch).float()).abs().max())
    if not opened.anatomy.routed and not calls_kernel_directly(opened.module):
        # The eager attention stands in for the family's own kernel, so only rounding may differ.
        limit = 1e-4
    elif plan.mode is Mode.FAITHFUL or not opened.anatomy.routed:
        limit = 0.0
    else:
        epsilon = torch.finfo(plain.dtype).eps
        limit = 100 * epsilon * float(_real(plain, batch).float().abs().max())
    return Check(
        "tracing leaves the output unchanged",
        difference <= limit,
        difference,
        limit,
        f"max |difference of the output| with tracing ({plan.mode}) and without",
    )


def _finite(traced: Pass, plain: Tensor, batch: Batch) -> Check:
    bad = int((~torch.isfinite(_real(plain, batch))).sum())
    for record in traced.records:
        norms = record.arrays.get("residual_norm")
        bad += int((~torch.isfinite(torch.as_tensor(norms))).sum()) if norms is not None else 0
    return Check(
        "all values finite", bad == 0, float(bad), 0.0, "NaN or infinite values in output and hidden states"
    )


def _experts_seen(opened: OpenedModel, batch: Batch, traced: Pass) -> Check:
    tower = opened.anatomy.main
    layers = sum(block.experts is not None for block in tower.blocks)
    tokens = batch.valid.numel() if batch.valid is not None else 0
    expected = layers * tokens * tower.top_k
    detail = f"routed rows seen, of {layers} MoE layers x {tokens} tokens x top-{tower.top_k}"
    return Check(
        "all experts seen", traced.routed_rows == expected, float(traced.routed_rows), float(expected), detail
    )


def _agreement(
    opened: OpenedModel, batch: Batch, plan: TracePlan, name: str = "blocked = dense, short prompt"
) -> Check:
    agreement = _observe(opened, batch, plan)
    # The reference works on the same q, k, v in double precision; what is left is float32 rounding, and with it
    # the rounding of scores that grow with the logits.
    limit = 1e-4 if plan.blocks.score_dtype == torch.float32 else 2e-2
    passed = agreement.worst <= limit and bool(agreement.layers)
    at = f", worst: {agreement.where}" if agreement.where else ""
    detail = f"largest relative error of any statistic at {agreement.tokens} tokens, {len(agreement.layers)} layers{at}"
    return Check(name, passed, agreement.worst, limit, detail)


def _mass(opened: OpenedModel, batch: Batch, plan: TracePlan) -> Check:
    agreement = _observe(opened, batch, plan)
    detail = "max |attention received by all keys / rows - 1|, learned sinks included"
    return Check("attention mass is one", agreement.mass <= 1e-4, agreement.mass, 1e-4, detail)


def _kernel_agrees(opened: OpenedModel, batch: Batch, plan: TracePlan) -> list[Check]:
    """Our row normaliser against the one the model's own kernel computed; no check where no kernel tells it."""
    worst: list[float] = []

    def compare(site: Site, call: AttentionCall, lse: Tensor | None) -> None:
        if lse is not None:
            found = attention_sweep(call, Want(frozenset({Stat.LSE})))
            assert found.rows is not None
            rows = found.rows[:, None].expand_as(lse)
            worst.append(float((found[Stat.LSE][rows] - lse[rows]).abs().max()))

    where = sites(opened.plain, opened.anatomy.main, "attention")
    # One statistic must be asked for, or the tap has nothing to sweep.
    one = Want(frozenset({Stat.LSE}))
    tap = AttentionTap(where, lambda *_: one, ignore, mode=Mode.FAITHFUL, plan=plan.blocks, witness=compare)
    tap.counted = batch.valid
    with tap.attached(opened.plain):
        forward(opened.plain, batch)
    if not worst:
        return []
    # Kernels approximate the exponential in half precision; a wrong mask or scale is off by far more.
    detail = (
        f"max |log-sum-exp of our sweep - that of the model's own kernel| over {len(worst)} layers (nats)"
    )
    largest = float(torch.tensor(worst).max())  # NaN if a kernel was given something else than we were
    return [Check("normaliser = the kernel's own", largest <= 1e-3, largest, 1e-3, detail)]


def _observe(opened: OpenedModel, batch: Batch, plan: TracePlan) -> Agreement:
    recorder = Recorder(batch, len(opened.anatomy.main.blocks), plan.signals, plan.limits, plan.sinks)
    agreement = Agreement(recorder.attention)
    plan = replace(plan, sampling=None)  # every row; samples have a check of their own
    backend = backend_of(opened)
    with backend.attention(opened, batch, agreement, plan):
        backend.forward(opened, batch)
    return agreement


def _causal(opened: OpenedModel, batch: Batch) -> Check:
    """If what is measured is what the model uses, replacing it must change the output."""
    generator = torch.Generator().manual_seed(0)

    def replace_rows(site: Site, call: AttentionCall, output: Tensor) -> Tensor:
        noise = torch.randn(output.shape, generator=generator).to(output)
        return noise * output.float().std().clamp(min=1e-3).to(output.dtype)

    plain = first_tensor(backend_of(opened).forward(opened, batch))
    changed = first_tensor(edited_output(opened, batch, replace_rows))
    difference = float((_real(plain, batch) - _real(changed, batch)).abs().max())
    detail = "max |change of the output| when attention outputs are replaced by noise"
    return Check("replacing attention changes the output", difference > 0, difference, 0.0, detail)


def _window_seen(window: int, longest: int) -> Check:
    engaged = longest > window
    how = "engages" if engaged else "never engages: nothing is said about longer inputs"
    detail = f"sliding window of {window} tokens; the longest prompt has {longest}, so the window {how}"
    return Check("sliding window", True, float(longest), float(window), detail)


def _parts(opened: OpenedModel, batch: Batch) -> Check:
    """Whether blocks, writers, norms and the direction of attention are what the anatomy says, by experiment.

    Mitigations are left out here: one that chooses its tokens by what the whole prompt does (ACT) is not causal.
    """
    with unedited(sites(opened.module, opened.anatomy.main, "attention")):
        found = verify_anatomy(opened.plain, opened.anatomy, lambda: forward(opened.plain, batch))
    wrong = [check for check in found if not check.passed]
    if wrong:
        detail = "; ".join(f"{check.name}: {check.detail}" for check in wrong)
    else:
        detail = f"confirmed by running: {', '.join(check.name.partition(': ')[2] for check in found)}"
    return Check(
        "parts are where they are said to be",
        not wrong,
        float(len(found) - len(wrong)),
        float(len(found)),
        detail,
    )


def _eval_mode(model: nn.Module) -> Check:
    training = [name or "(model)" for name, module in model.named_modules() if module.training]
    detail = "modules in training mode" + (f": {', '.join(training[:3])}" if training else "")
    return Check("evaluation mode", not training, float(len(training)), 0.0, detail)


def _batch(opened: OpenedModel, prompts: list[Prompt]) -> Batch:
    pad = getattr(opened.tokenizer, "pad_token_id", None) or 0
    return collate(prompts, pad_id=pad, device=device_of(opened))


def _cut(prompt: Prompt, length: int) -> Prompt:
    return replace(prompt, token_ids=prompt.token_ids[:length], pieces=prompt.pieces[:length])


def _real(output: Tensor, batch: Batch) -> Tensor:
    """The output at real tokens; outputs without a token axis are taken whole."""
    if batch.valid is None or output.shape[:2] != batch.valid.shape:
        return output
    return output[batch.valid]


def _sampled_heads(call: AttentionCall, layer: int) -> Tensor:
    """Whole key-value groups, as many as the dense comparison may hold, starting at another one per layer."""
    heads, kv_heads = call.query.shape[1], call.key.shape[1]
    group = heads // kv_heads
    per_group = call.query.shape[0] * group * call.query.shape[2] * call.key.shape[2]
    take = max(1, min(kv_heads, DENSE_BUDGET // max(1, per_group)))
    chosen = (torch.arange(take) + layer) % kv_heads
    return (chosen[:, None] * group + torch.arange(group)).flatten().to(call.query.device)


def _only_heads(call: AttentionCall, heads: Tensor) -> AttentionCall:
    group = call.query.shape[1] // call.key.shape[1]
    kv = heads[::group] // group
    by_head = call.mask is not None and call.mask.ndim == 4 and call.mask.shape[1] > 1
    return replace(
        call,
        query=call.query[:, heads],
        key=call.key[:, kv],
        value=call.value[:, kv],
        mask=call.mask[:, heads] if by_head and call.mask is not None else call.mask,
        learned_sinks=call.learned_sinks[heads] if call.learned_sinks is not None else None,
        edits=tuple(edit.of(slice(None), heads) for edit in call.edits),
    )


def _relative_error(found: Tensor, expected: Tensor, extent: int) -> float:
    # A distance is a difference of positions, so its rounding is that of positions.
    scale = expected.abs().max().clamp(min=float(extent))
    return float((found.float() - expected.float()).abs().max() / scale)
