"""What quantisation costs, and how much of it massive activations, sink tokens and Super Experts explain."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sinklens.analyzers.base import Finding, Status
from sinklens.analyzers.super_experts import ROUTED
from sinklens.core.errors import DataError, ModelError, UsageError
from sinklens.evaluation.paired import mean_interval, paired_difference
from sinklens.evaluation.predictions import next_token_loss
from sinklens.inputs.spec import Prompt, PromptSet
from sinklens.mitigations.protection import Protection
from sinklens.mitigations.quantise import FakeQuantisation
from sinklens.models.spec import OpenedModel
from sinklens.tracers.batch import Batch, collate, forward
from sinklens.tracers.executor import partition
from sinklens.tracers.states import residual_tap
from sinklens.tracers.trace import Trace

from .causes import is_found, sink_position, spike_places

TOKENS, BATCH = 2048, 8
Progress = Callable[[int, int], None]


def protection_of(trace: Trace, findings: Mapping[str, Finding]) -> Protection:
    """What a run found: massive dims, the blocks that write them, sink tokens, and Super Experts.

    Where nothing is massive by the published rule, the strongest entries stand in, as in causal verification.
    """
    places = spike_places(trace, findings)
    position = sink_position(findings) if is_found(findings, "primary-sinks") else None
    positions = {at for at, _ in places} | ({position} if position is not None else set())
    finding = findings.get("super-experts")
    rows = finding.rows if finding is not None and finding.status is Status.FOUND else []
    experts = sorted((row["layer"], row["expert"]) for row in rows if row["kind"] == ROUTED)
    dense = [i.index for i in trace.layers if i.down_proj or i.shared_expert]
    return Protection(
        tuple(sorted({layer for layer in places.values() if layer in dense})),
        tuple(sorted({dim for _, dim in places})),
        tuple(sorted(positions)),
        tuple(experts),
    )


@dataclass
class _Look:
    """One variant of the model, a value per prompt."""

    loss: list[float] = field(default_factory=list)
    others: list[np.ndarray] = field(default_factory=list)
    sinks: list[np.ndarray] = field(default_factory=list)

    def losses(self) -> np.ndarray:
        return np.array(self.loss)


def quantisation_probe(
    opened: OpenedModel,
    prompts: PromptSet | Sequence[Prompt],
    method: FakeQuantisation,
    protection: Protection,
    *,
    draws: int = 5,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Run prompts through the model as it is, quantised, quantised with parts kept, and with as many others kept.

    Args:
        method: How to quantise; what it protects itself is protected in every variant.
        protection: What to keep, for instance of `protection_of`.
        draws: Random controls; their effects are averaged within a prompt.

    Returns:
        Plain JSON. `variants`: for `full`, `quantised`, `protected` and `control` the `loss` (nats per token, mean
        over prompts with its interval), `perplexity`, `added` (loss over `full`, paired), and by layer the relative
        error of the residual stream, `|h' - h| / |h|`, mean over tokens and prompts, at the protected positions
        (`error_at_sinks`) and elsewhere (`error`). `recovered`: of the added loss, what `protected` and `control`
        take back, in nats, and `beyond`, their paired difference. `explained`: the protected part's share of the
        added loss, and the controls'; None where the added loss cannot be told from 0. `verdict`: one sentence.

    Raises:
        UsageError: There is nothing to protect.
        DataError: No prompt has two tokens.
        ModelError: The model predicts no next tokens.
    """
    if protection.empty:
        raise UsageError(
            "Nothing was found that a quantiser could protect: no massive dim, sink token or Super Expert.",
            hint="Quantise with FakeQuantisation alone, or name what to keep: Protection(dims=[...]).",
        )
    if not opened.anatomy.main.causal:
        raise ModelError("The model predicts no next tokens, so quantisation has no loss to add to.")
    few = [prompt for prompt in prompts if len(prompt) > 1] if not isinstance(prompts, PromptSet) else [
        prompt for prompt in prompts.prompts if len(prompt) > 1
    ]  # fmt: skip
    if not few:
        raise DataError("No prompt has two tokens, so there is no next token to predict.")
    shortest = min(len(prompt) for prompt in few)
    controls = protection.controls(opened, tokens=shortest, draws=draws, seed=seed)
    variants: dict[str, FakeQuantisation | None] = {
        "full": None, "quantised": method, "protected": protection.applied(method),
        **{f"control {i}": control.applied(method) for i, control in enumerate(controls)},
    }  # fmt: skip
    looks = {name: _Look() for name in variants}
    batches = partition(few, most=BATCH, tokens=TOKENS)
    for done, group in enumerate(batches):
        base: dict[int, Tensor] = {}
        for at, (name, variant) in enumerate(variants.items()):
            _pass(opened, group, variant, base, protection.positions, looks[name])
            if progress:
                progress(done * len(variants) + at + 1, len(batches) * len(variants))
    return _summed(looks, few, method, protection, seed)


def _pass(
    opened: OpenedModel,
    group: Sequence[Prompt],
    variant: FakeQuantisation | None,
    base: dict[int, Tensor],
    positions: tuple[int, ...],
    look: _Look,
) -> None:
    """One variant on one batch; the unchanged model's states are kept in `base` for the others."""
    device = next(opened.module.parameters()).device
    batch = collate(group, pad_id=getattr(opened.tokenizer, "pad_token_id", None) or 0, device=device)
    assert batch.valid is not None
    errors: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def see(layer: int, state: Tensor) -> None:
        if variant is None:
            base[layer] = state.detach().clone()
        else:
            errors[layer] = _errors(base[layer], state.detach(), batch, positions)

    with (
        nullcontext() if variant is None else variant(opened),
        residual_tap(opened.module, opened.anatomy.main, see),
    ):
        logits = forward(opened.module, batch).logits
    for row, prompt in enumerate(group):
        real = batch.valid[row]
        look.loss.append(next_token_loss(logits[row][real], torch.tensor(prompt.token_ids)))
        if errors:
            look.others.append(np.array([errors[layer][0][row] for layer in sorted(errors)]))
            look.sinks.append(np.array([errors[layer][1][row] for layer in sorted(errors)]))


def _errors(
    before: Tensor, after: Tensor, batch: Batch, positions: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Relative error per prompt, mean over ordinary tokens and over protected ones; NaN where there are none."""
    assert batch.valid is not None
    before = before.float()
    size = before.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
    error = ((after.float() - before).norm(dim=-1) / size).double()
    place = batch.valid.long().cumsum(1) - 1
    chosen = torch.isin(place, torch.tensor(positions, dtype=torch.long, device=place.device)) & batch.valid

    def mean(rows: Tensor) -> np.ndarray:
        count = rows.sum(1)
        return torch.where(count > 0, (error * rows).sum(1) / count, torch.nan).cpu().numpy()

    return mean(batch.valid & ~chosen), mean(chosen)


def _summed(
    looks: Mapping[str, _Look],
    prompts: Sequence[Prompt],
    method: FakeQuantisation,
    protection: Protection,
    seed: int,
) -> dict[str, Any]:
    draws = [look for name, look in looks.items() if name.startswith("control ")]
    full, plain, kept = (looks[name].losses() for name in ("full", "quantised", "protected"))
    control = np.mean([draw.losses() for draw in draws], axis=0) if draws else np.full_like(full, np.nan)
    rows = {
        "full": _row(full, full, []),
        "quantised": _row(plain, full, [looks["quantised"]]),
        "protected": _row(kept, full, [looks["protected"]]),
        "control": _row(control, full, draws),
    }
    added = paired_difference(plain, full)
    known = added.low is not None and added.low > 0
    total = float((plain - full).mean())
    explained = {
        "protected": float((plain - kept).mean()) / total if known else None,
        "control": float((plain - control).mean()) / total if known and draws else None,
    }
    found = {
        "method": _plain({**method.parameters, "name": method.name}),
        "protection": {
            "layers": list(protection.layers), "dims": list(protection.dims),
            "positions": list(protection.positions), "experts": [list(pair) for pair in protection.experts],
        },
        "n_prompts": len(prompts),
        "n_tokens": sum(len(prompt) - 1 for prompt in prompts),
        "draws": len(draws),
        "seed": seed,
        "interval": "95 % t interval over prompts, paired",
        "variants": rows,
        "recovered": {
            "protected": paired_difference(plain, kept).to_json(),
            "control": paired_difference(plain, control).to_json(),
            "beyond": paired_difference(control, kept).to_json(),
        },
        "explained": explained,
    }  # fmt: skip
    return {**found, "verdict": _verdict(found)}


def _plain(value: Any) -> Any:
    """With lists for tuples, as JSON has them."""
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, (tuple, list)) else value


def _row(loss: np.ndarray, full: np.ndarray, looks: Sequence[_Look]) -> dict[str, Any]:
    mean = mean_interval(loss)
    return {
        "loss": mean.to_json(),
        "perplexity": None if mean.mean is None else math.exp(mean.mean),
        "added": paired_difference(loss, full).to_json(),
        "error": _layers([prompt for look in looks for prompt in look.others]),
        "error_at_sinks": _layers([prompt for look in looks for prompt in look.sinks]),
    }


def _layers(errors: Sequence[np.ndarray]) -> list[float | None]:
    if not errors:
        return []
    columns = np.array(errors).T
    return [float(np.nanmean(column)) if np.isfinite(column).any() else None for column in columns]


def _verdict(found: Mapping[str, Any]) -> str:
    rows, explained = found["variants"], found["explained"]
    added = rows["quantised"]["added"]
    head = f"Quantisation adds {added['mean']:+.4f} nats per token"
    if explained["protected"] is None:
        return f"{head}, which cannot be told from 0: there is nothing for protection to explain."
    beyond = found["recovered"]["beyond"]
    said = f"{head}; what was protected takes back {explained['protected']:.0%} of it"
    if explained["control"] is None or beyond["low"] is None:
        return f"{said}; there is no control to compare with."
    said += f", as many others {explained['control']:.0%}"
    if beyond["low"] > 0:
        return f"{said}: it matters more than chance would have it."
    return (
        f"{said}: that is no more than protecting others does."
        if beyond["high"] >= 0
        else f"{said}: it does harm."
    )
