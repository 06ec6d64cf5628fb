"""Massive dims: neurons (in an MoE block, of an expert) write them at the target, others erase them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from ..blocks import Layer, Mlp, Norm
from .bed import Bed
from .probe import inputs_of, outputs_of
from .truth import PlantedMassive, Target

DRIVE = 8.0
"""Input of a planted neuron at its target, where SiLU and GELU are the identity to 0.3 %."""

ROUTER_LOGIT = 30.0
"""Logit of the chosen expert at its target; the others' are of order 1, so its weight is 1 to rounding."""

VETO = 100.0
"""How strongly a neuron without gate is held down at a target it must leave alone, in drives."""

SECONDARY_SIZE = 12.0
"""Default size of a secondary sink's dim over the norm of the target's own state."""

ERASERS, SHARPNESS, SLACK, RIDGE = 12, 2.0, 1.3, 1e-11
"""Neurons that erase together; steepness of their kinks in drives; how far past the calibration they fit."""

SANDWICH = 0.99
"""Share of the squared norm that planted dims take under a norm after the feed-forward part (Gemma2)."""


@dataclass(frozen=True)
class _Job:
    """Neurons that together change a dim of a target by `amount`; `weights` are their relative outputs."""

    item: PlantedMassive
    mlp: Mlp
    neurons: tuple[int, ...]
    weights: Float[Tensor, " neuron"]
    amount: float

    def write(self, scale: float) -> None:
        down = self.mlp.down.weight
        down[self.item.dim, list(self.neurons)] = (scale * self.weights).to(down)


def plant_neurons(bed: Bed, layer: Layer, massive: tuple[PlantedMassive, ...]) -> tuple[PlantedMassive, ...]:
    """Writes the dims that begin in this block and erases those that end in it.

    Returns:
        All of `massive`, with the magnitudes that were left open and the neurons that were taken filled in.
    """
    begins = [item.layer_in == layer.index for item in massive]
    ends = [item.erased and item.layer_out == layer.index for item in massive]
    if not any(begins) and not any(ends):
        return massive
    states = outputs_of(bed.model, layer.pre_mlp.module, bed.ids)
    residual = inputs_of(bed.model, layer.pre_mlp.module, bed.ids)[0].float()
    filled = tuple(
        _with_magnitude(bed, item, residual) if begin else item
        for item, begin in zip(massive, begins, strict=True)
    )
    jobs = [_writer(bed, layer, item, states) for item, begin in zip(filled, begins, strict=True) if begin]
    writers = {job.item: job.neurons[0] for job in jobs}
    erasers: dict[PlantedMassive, tuple[int, ...]] = {}
    for item, end in zip(filled, ends, strict=True):
        if end:
            rivals = [i.target for i in filled if i.dim == item.dim and i.target != item.target]
            amount = float(residual[..., item.dim][bed.where(item.target)].mean())
            jobs.append(_eraser(bed, layer, item, amount, list(dict.fromkeys(rivals)), states))
            erasers[item] = jobs[-1].neurons
    if layer.post_mlp is None:
        _set_amplitudes(bed, layer, jobs)
    else:
        _under_norm(bed, layer, layer.post_mlp, jobs)
    return tuple(
        replace(
            item,
            neuron=writers.get(item, item.neuron),
            eraser_neurons=erasers.get(item, item.eraser_neurons),
        )
        for item in filled
    )


def _with_magnitude(bed: Bed, item: PlantedMassive, residual: Tensor) -> PlantedMassive:
    if not math.isnan(item.magnitude):
        return item
    return replace(
        item, magnitude=SECONDARY_SIZE * float(residual[bed.where(item.target)].norm(dim=-1).mean())
    )


def _writer(bed: Bed, layer: Layer, item: PlantedMassive, states: Tensor) -> _Job:
    mlp = _route(bed, layer, item.target, item.expert, states)
    return _flag_job(bed, layer, mlp, item, item.expert, item.magnitude, states)


def _eraser(
    bed: Bed, layer: Layer, item: PlantedMassive, amount: float, rivals: list[Target], states: Tensor
) -> _Job:
    mlp = _route(bed, layer, item.target, item.eraser, states)
    if layer.post_mlp is not None:
        # The norm that follows makes what was written, and what erases it, independent of the context.
        return _flag_job(bed, layer, mlp, item, item.eraser, -amount, states)
    neurons, weights = _inverse(bed, layer, mlp, item, rivals, states)
    return _Job(item, mlp, neurons, weights, -amount)


def _route(bed: Bed, layer: Layer, target: Target, expert: int | None, states: Tensor) -> Mlp:
    """The feed-forward part that shall do it; in an MoE block the router sends the target there first."""
    if expert is None:
        assert layer.mlp is not None
        return layer.mlp
    assert layer.router is not None
    dim = bed.flags[target]
    layer.router.weight[expert, dim] = ROUTER_LOGIT / bed.mean_reading(states, dim, target)
    return layer.expert(expert)


def _take(bed: Bed, layer: Layer, expert: int | None, mlp: Mlp) -> int:
    """The neuron that writes least, cleared."""
    taken = bed.neurons.setdefault((layer.index, expert), set())
    neuron = next(
        i for i in mlp.down.weight.float().norm(dim=0).argsort(stable=True).tolist() if i not in taken
    )
    taken.add(neuron)
    for reader in mlp.readers:
        reader.clear([neuron])
    mlp.down.weight[:, neuron] = 0
    return neuron


def _flag_job(
    bed: Bed, layer: Layer, mlp: Mlp, item: PlantedMassive, expert: int | None, amount: float, states: Tensor
) -> _Job:
    """One neuron that fires at the target alone, because it reads nothing but the flag."""
    neuron = _take(bed, layer, expert, mlp)
    flag = bed.flags[item.target]
    for reader in mlp.readers:
        bed.look(reader.weight[neuron], flag, DRIVE / bed.mean_reading(states, flag, item.target))
    return _Job(item, mlp, (neuron,), torch.ones(1), amount)


def _inverse(
    bed: Bed, layer: Layer, mlp: Mlp, item: PlantedMassive, rivals: list[Target], states: Tensor
) -> tuple[tuple[int, ...], Float[Tensor, " neuron"]]:
    """Neurons whose sum is proportional to the massive value itself, although the norm hides it.

    The flag is constant in the residual stream, so its reading over its mean, f, is inverse to the massive
    value, while the massive dim's own reading over its mean is 1. With that 1 as a bias, neurons with kinks
    at different f add up to 1 / f over the range the context can cause. Nothing fires without the flag.
    """
    flag = bed.flags[item.target]
    count = max(3, min(ERASERS, mlp.down.weight.shape[1] // 4))
    readings = bed.reading(states, flag)[bed.where(item.target)]
    f, m = float(readings.mean()), bed.mean_reading(states, item.dim, item.target)
    low, high = float(readings.min()) / f / SLACK, float(readings.max()) / f * SLACK
    knots = torch.logspace(math.log10(low), math.log10(high), count - 1, dtype=torch.float64).tolist()
    kinks = [(0.0, 1.0), *((SHARPNESS / knot, -SHARPNESS) for knot in knots)]
    neurons = tuple(_take(bed, layer, item.eraser, mlp) for _ in kinks)
    for neuron, (by_flag, bias) in zip(neurons, kinks, strict=True):
        first = (mlp.up if mlp.gate is None else mlp.gate).weight[neuron]
        bed.look(first, flag, DRIVE * by_flag / f)
        bed.look(first, item.dim, DRIVE * bias / m)
        if mlp.gate is not None:
            bed.look(mlp.up.weight[neuron], flag, DRIVE / f)
            continue
        for rival in rivals:
            seen = bed.mean_reading(states, bed.flags[rival], rival)
            bed.look(first, bed.flags[rival], -VETO * DRIVE / seen)
    samples = torch.linspace(low, high, 401, dtype=torch.float64)
    return neurons, _fit(layer, mlp.gate is not None, kinks, samples)


def _fit(
    layer: Layer, gated: bool, kinks: list[tuple[float, float]], f: Float[Tensor, " sample"]
) -> Float[Tensor, " neuron"]:
    """Least squares, relative to 1 / f: how much each neuron adds. The ridge keeps the parts small."""
    basis = layer.activation(DRIVE * torch.stack([by_flag * f + bias for by_flag, bias in kinks], -1))
    basis = basis * (f * f if gated else f)[:, None]
    gram = basis.T @ basis
    ridge = RIDGE * gram.diagonal().mean() * torch.eye(len(kinks), dtype=f.dtype)
    return torch.linalg.solve(gram + ridge, basis.sum(0)).float()


def _written(bed: Bed, layer: Layer, jobs: list[_Job]) -> list[float]:
    """What the feed-forward part now adds to each job's dim at its target, before any norm."""
    output = outputs_of(bed.model, layer.module.mlp, bed.ids)
    return [float(output[..., job.item.dim][bed.where(job.item.target)].float().mean()) for job in jobs]


def _set_amplitudes(bed: Bed, layer: Layer, jobs: list[_Job]) -> None:
    """Scales each job by what it gives at its target. Nothing else writes these dims there."""
    for job in jobs:
        job.write(1.0)
    for job, seen in zip(jobs, _written(bed, layer, jobs), strict=True):
        job.write(job.amount / seen)


def _under_norm(bed: Bed, layer: Layer, norm: Norm, jobs: list[_Job]) -> None:
    """The same where a norm follows: the planted dims take a fixed share of the norm, its gain sets the size.

    Where one dim gets different amounts at several targets, the gain serves the largest and the others take
    less of their norm.
    """
    width = bed.model.config.hidden_size
    output = outputs_of(bed.model, layer.module.mlp, bed.ids).float()
    content = output.square().sum(-1) + width * norm.module.eps
    per_target: dict[Target, list[_Job]] = {}
    for job in jobs:
        per_target.setdefault(job.item.target, []).append(job)
    most = max(len(group) for group in per_target.values())
    gains: dict[int, float] = {}
    for job in jobs:
        needed = abs(job.amount) * math.sqrt(most / (SANDWICH * width))
        gains[job.item.dim] = max(gains.get(job.item.dim, 0.0), needed)
    for dim, gain in gains.items():
        norm.set_gain([dim], gain)
    raw: dict[int, float] = {}
    for target, group in per_target.items():
        parts = [(job.amount / gains[job.item.dim]) ** 2 / width for job in group]
        total = float(content[bed.where(target)].mean()) / (1 - sum(parts))
        for job, part in zip(group, parts, strict=True):
            raw[id(job)] = math.copysign(math.sqrt(total * part), job.amount)
    for job in jobs:
        job.write(1.0)
    for job, seen in zip(jobs, _written(bed, layer, jobs), strict=True):
        job.write(raw[id(job)] / seen)
