"""Takes a few dims of the residual stream from a model and marks the targets in them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sinklens.core.errors import UsageError

from ..blocks import Layer, Part, decoder_layers, final_norm, trunk
from .plan import Plan
from .probe import Ids
from .truth import Target

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class Bed:
    """A model whose reserved dims are cleared, and where they are.

    Attributes:
        ids: Calibration tokens that hold every target.
        flags: The dim that marks each target.
        constant: A dim that is equal for all tokens; None where queries have a bias.
        zero: A dim that is 0 in every state; only under LayerNorm.
        neurons: Taken neurons by (block, expert or None).
    """

    model: PreTrainedModel
    layers: list[Layer]
    ids: Ids
    flags: dict[Target, int]
    constant: int | None
    zero: int | None
    neurons: dict[tuple[int, int | None], set[int]] = field(default_factory=dict)

    def where(self, target: Target) -> Bool[Tensor, "prompt position"]:
        """Calibration cells that hold the target."""
        if target.token is not None:
            return self.ids == target.token
        return (torch.arange(self.ids.shape[1], device=self.ids.device) == target.position).expand(
            self.ids.shape
        )

    @property
    def ordinary(self) -> Bool[Tensor, "prompt position"]:
        """Calibration cells that hold no target."""
        return ~torch.stack([self.where(target) for target in self.flags]).any(0)

    def reading(
        self, states: Float[Tensor, "prompt position dim"], dim: int
    ) -> Float[Tensor, "prompt position"]:
        """What a planted reader of `dim` sees."""
        seen = states[..., dim].float()
        return seen if self.zero is None else seen - states[..., self.zero].float()

    def mean_reading(self, states: Float[Tensor, "prompt position dim"], dim: int, target: Target) -> float:
        return float(self.reading(states, dim)[self.where(target)].mean())

    def look(self, row: Float[Tensor, " dim"], dim: int, weight: float) -> None:
        """Adds `weight` times the reading of `dim` to what a row of weights computes."""
        row[dim] += weight
        if self.zero is not None:
            row[self.zero] -= weight


def prepare(model: PreTrainedModel, plan: Plan, ids: Ids, flag: float) -> Bed:
    """Chooses the reserved dims, cuts them out of the model and marks the targets."""
    layers = decoder_layers(model)
    massive = {item.dim for item in plan.massive}
    spare = _spare_dims(model, ids, massive)
    if len(plan.targets) + 2 > model.config.hidden_size // 4:
        raise UsageError(
            f"{len(plan.targets)} targets are too many for {model.config.hidden_size} dims.",
            detail=f"Each takes a dim, and at most a quarter ({model.config.hidden_size // 4}) is taken.",
        )
    flags = {target: next(spare) for target in plan.targets}
    constant = next(spare) if layers[0].query.bias is None else None
    zero = next(spare) if isinstance(layers[0].pre_attention.module, nn.LayerNorm) else None
    bed = Bed(model, layers, ids, flags, constant, zero)
    for target in plan.targets:
        if not bed.where(target).any():
            raise UsageError(f"The calibration tokens do not hold {target}, so it cannot be measured there.")
    _clear(bed, sorted({*massive, *flags.values(), *(dim for dim in (constant, zero) if dim is not None)}))
    _mark(bed, flag)
    return bed


def _tables(model: PreTrainedModel) -> list[Float[Tensor, "row dim"]]:
    """Token embedding and, if there is one, position embedding, as views."""
    body: Part = trunk(model)
    words: Part = model.get_input_embeddings()
    positions = getattr(body, "wpe", None)
    return [words.weight.data] if positions is None else [words.weight.data, positions.weight.data]


def _spare_dims(model: PreTrainedModel, ids: Ids, taken: set[int]) -> Iterator[int]:
    """Dims by how little the model uses them: the largest value in any block's output, smallest first.

    The embedding alone would not do: a model's own massive dim is often small there.
    """
    peaks: list[Float[Tensor, " dim"]] = []

    def keep(_module: nn.Module, _args: object, output: Tensor | tuple[Tensor, ...]) -> None:
        state = output[0] if isinstance(output, tuple) else output
        peaks.append(state.float().abs().flatten(0, -2).amax(0))

    handles = [layer.module.register_forward_hook(keep) for layer in decoder_layers(model)]
    try:
        trunk(model)(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    order = torch.stack(peaks).amax(0).argsort(stable=True).tolist()
    return (dim for dim in order if dim not in taken)


def _clear(bed: Bed, dims: list[int]) -> None:
    """Nothing reads or writes these dims any more; the head reads them as 0."""
    for table in _tables(bed.model):
        table[:, dims] = 0
    for layer in bed.layers:
        readers = [layer.query, layer.key, layer.value]
        readers += [reader for mlp in layer.mlps for reader in mlp.readers]
        readers += [] if layer.router is None else [layer.router]
        for reader in readers:
            reader.weight[:, dims] = 0
        for writer in (layer.output, *(mlp.down for mlp in layer.mlps)):
            writer.clear(dims)
        layer.pre_attention.set_gain(dims, 1.0)
        layer.pre_mlp.set_gain(dims, 1.0)
    final_norm(bed.model).set_gain(dims, 0.0)


def _mark(bed: Bed, flag: float) -> None:
    tables = _tables(bed.model)
    scale = float(tables[0].float().square().mean().sqrt())
    if bed.constant is not None:
        tables[0][:, bed.constant] = scale
    for target, dim in bed.flags.items():
        table, row = (tables[0], target.token) if target.token is not None else (tables[1], target.position)
        table[row, dim] = flag * scale
