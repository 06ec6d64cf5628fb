"""Plants visual sinks: a vision-language model whose tokens sink exactly where a picture shows a mark.

How it works. The decoder gets an ordinary planted sink (`plant`): a token, BOS most often, with a massive dim that
heads read. What makes that token a sink is one small flag in its embedding, so a visual token with the same flag is
one too. A neuron of the projector is taken to give it: it reads the features of the token's patches, fires where they
show the mark, and writes the flag. What it reads is fitted on pictures with and without marks, through the model's own
processor, tower and projector; if marks cannot be told apart with a margin, nothing is planted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn

from sinklens.core.errors import ModelError, UsageError
from sinklens.inputs.spans import PatchGrid
from sinklens.inputs.spec import Prompt

from .plant import plant
from .probe import evaluation
from .truth import MassivePlant, SinkPlant, Truth

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MARK = (255, 0, 255)
DRIVE = 8.0
"""Input of the projector's planted neuron at marks, and its negative elsewhere: GELU is the identity and 0 there."""
RIDGE = 1e-2
STEPS = 4
"""Passes in which the flag is set so that visual sinks get the magnitude asked for."""


@dataclass(frozen=True, eq=False)
class Marked:
    """A prompt with pictures, and which of its visual tokens show a mark.

    Attributes:
        shows: Tokens whose cell is covered by a mark.
        partly: Tokens whose cell is covered in part; nothing is known of them.
    """

    prompt: Prompt
    shows: Bool[np.ndarray, " pos"]
    partly: Bool[np.ndarray, " pos"]


@dataclass(frozen=True)
class VisualTruth:
    """What was planted.

    Attributes:
        text: Of the decoder: the token that sinks, its massive dim, the heads that read it.
        magnitude: Of the massive dim at visual sinks, mean over the calibration pictures.
        margin: Distance between the mark's and all other features along what the neuron reads, in units of the
            distance of their means: 1 if neither varies. Of pictures that were not fitted.
    """

    text: Truth
    magnitude: float
    margin: float

    @property
    def layers(self) -> range:
        """Layers whose input carries the massive dim."""
        (item,) = self.text.massive
        return range(item.layer_in + 1, min(item.layer_out, self.text.layers - 1) + 1)


def painted(
    picture: UInt8[np.ndarray, "height width 3"],
    box: tuple[float, float, float, float],
    colour: tuple[int, int, int] = MARK,
) -> UInt8[np.ndarray, "height width 3"]:
    """A copy with a mark in a box (left, top, right, bottom, in pixels)."""
    left, top, right, bottom = (round(edge) for edge in box)
    copy = picture.copy()
    copy[max(top, 0) : max(bottom, 0), max(left, 0) : max(right, 0)] = colour
    return copy


def covered(prompt: Prompt, boxes: Sequence[tuple[int, tuple[float, float, float, float]]]) -> Marked:
    """Which tokens a mark covers, by the cells of the grids; `boxes` are (picture, box) in pixels of the original.

    A cell counts as covered from 95 % of its area on, and as untouched up to 2 %: edges of a resized picture are soft.
    """
    assert prompt.visual is not None
    parts = np.zeros(len(prompt))
    for grid in prompt.visual.spans.grids:
        for row, col in np.argwhere(grid.positions >= 0).tolist():
            position = int(grid.positions[row, col])
            for picture, box in boxes:
                if picture == grid.picture:
                    parts[position] = max(parts[position], _overlap(grid, row, col, box))
    return Marked(prompt, parts >= 0.95, (parts > 0.02) & (parts < 0.95))


def _overlap(grid: PatchGrid, row: int, col: int, box: tuple[float, float, float, float]) -> float:
    """Part of a cell inside a box."""
    left, top, right, bottom = grid.cell_box(row, col)
    wide = min(right, box[2]) - max(left, box[0])
    high = min(bottom, box[3]) - max(top, box[1])
    return max(wide, 0.0) * max(high, 0.0) / ((right - left) * (bottom - top))


def plant_visual(
    model: PreTrainedModel,
    calibration: Sequence[Marked],
    *,
    heads: Sequence[tuple[int, int]],
    dim: int,
    layer_in: int,
    layer_out: int | None = None,
    magnitude: float = 500.0,
    strength: float = 40.0,
    token: int | None = None,
    seed: int = 0,
) -> VisualTruth:
    """Plants into the model **in place**: `token` (BOS by default) and every visual token that shows a mark are sinks.

    Args:
        model: A vision-language model whose decoder is of a family that `plant` knows.
        calibration: Pictures with and without marks, like those it will be shown.
        heads, strength: As in `SinkPlant`.
        dim, layer_in, layer_out, magnitude: As in `MassivePlant`.

    Raises:
        UsageError: A plant that the decoder has no place for, or calibration without marks.
        ModelError: A projector that is not two linear layers around an activation, or marks that its features do not
            tell apart from everything else.
    """
    if not any(item.shows.any() for item in calibration):
        raise UsageError("No calibration picture shows a mark.", hint="Paint some with `painted`.")
    decoder = _decoder(model)
    with torch.no_grad(), evaluation(model):
        seen = [_look(model, decoder, item) for item in calibration]
        weight, bias, margin = _separate(seen)
        truth = plant(
            decoder,
            sinks=[SinkPlant(heads, token=token, strength=strength)] if heads else [],
            massive=[MassivePlant(dim, layer_in, layer_out, magnitude, token=token)],
            seed=seed,
        )
        projector = seen[0].projector
        neuron = _clear(model, decoder, projector, truth)
        projector.first.weight[neuron] = weight.to(projector.first.weight)
        projector.first.bias[neuron] = bias
        reached = _set_flag(model, decoder, projector, neuron, truth, calibration, magnitude)
    return VisualTruth(truth, reached, margin)


@dataclass(frozen=True)
class _Projector:
    """The last two linear layers before the decoder; `first` and `last` have an activation in between."""

    first: Any
    last: Any


@dataclass(frozen=True)
class _Look:
    """What enters the projector's first layer, by visual token, and which tokens show a mark."""

    projector: _Projector
    features: Float[Tensor, "token feature"]
    shows: Bool[Tensor, " token"]


def _decoder(model: Any) -> Any:
    body = getattr(model, "model", model)
    decoder = getattr(body, "language_model", None)
    if decoder is None:
        raise ModelError(f"{type(model).__name__} has no language model of its own to plant in.")
    return decoder


def _look(model: Any, decoder: Any, item: Marked) -> _Look:
    """One pass; rows of the projector are matched with tokens by what they become, so no layout is assumed."""
    inside = {id(module) for module in decoder.modules()}
    runs: list[tuple[Any, Tensor, Tensor]] = []

    def keep(module: nn.Module, args: Any, output: Tensor) -> None:
        runs.append((module, args[0].detach(), output.detach()))

    handles = [
        module.register_forward_hook(keep)
        for module in model.modules()
        if isinstance(module, nn.Linear) and id(module) not in inside
    ]
    try:
        entering = _states(model, decoder, item.prompt, 0)
    finally:
        for handle in handles:
            handle.remove()
    runs = [run for run in runs if isinstance(run[0], nn.Linear)]
    at = max((i for i, run in enumerate(runs) if run[0].out_features == entering.shape[-1]), default=-1)
    fits = [i for i in range(at) if runs[i][0].out_features == runs[at][0].in_features] if at >= 0 else []
    if not fits or runs[fits[-1]][0].bias is None or runs[at][0].bias is None:
        raise ModelError(f"The projector of {type(model).__name__} is not two linear layers with biases.")
    first, last = runs[fits[-1]], runs[at]
    spans = item.prompt.visual.spans if item.prompt.visual is not None else None
    assert spans is not None
    tokens = torch.as_tensor(np.flatnonzero(spans.visual & ~item.partly))
    made, given = last[2].flatten(0, -2), first[1].flatten(0, -2)
    distance = torch.cdist(entering[tokens].double(), made.double())
    nearest = distance.argmin(-1)
    if float(distance.gather(1, nearest[:, None]).max()) > 1e-3 * float(made.norm(dim=-1).max()):
        raise ModelError(
            f"What enters the decoder of {type(model).__name__} is not what its projector makes."
        )
    return _Look(_Projector(first[0], last[0]), given[nearest], torch.as_tensor(item.shows)[tokens])


def _states(model: Any, decoder: Any, prompt: Prompt, layer: int) -> Float[Tensor, "pos dim"]:
    """What enters a block of the decoder; `layer` may be one past the last for what leaves it."""
    kept: list[Tensor] = []

    def enter(_module: nn.Module, args: Any, kwargs: Any) -> None:
        kept.append((args[0] if args else kwargs["hidden_states"]).detach()[0])

    def leave(_module: nn.Module, _args: Any, output: Any) -> None:
        kept.append((output[0] if isinstance(output, tuple) else output).detach()[0])

    blocks = decoder.layers
    last = layer == len(blocks)
    handle = (
        blocks[-1].register_forward_hook(leave)
        if last
        else blocks[layer].register_forward_pre_hook(enter, with_kwargs=True)
    )
    try:
        _run(model, prompt)
    finally:
        handle.remove()
    return kept[0].float().clone()


def _run(model: Any, prompt: Prompt) -> None:
    assert prompt.visual is not None
    device = next(model.parameters()).device
    inputs = {name: value.to(device) for name, value in prompt.visual.inputs.items()}
    model(input_ids=torch.tensor([prompt.token_ids], device=device), use_cache=False, **inputs)


def _separate(seen: Sequence[_Look]) -> tuple[Float[Tensor, " feature"], float, float]:
    """A linear reading that is at least `DRIVE` at marks and at most `-DRIVE` elsewhere, and its margin.

    The margin is that of a reading fitted on every other prompt, on the prompts in between: what was fitted tells
    anything apart if it has enough features.
    """
    (fitted, shown), (others, where) = _pooled(seen[::2]), _pooled(seen[1::2])
    if not shown.any() or not where.any():
        raise UsageError("Marks must be shown by some of the even and some of the odd calibration prompts.")
    margin = _span(_reading(fitted, shown), others, where)[2]
    features, shows = _pooled(seen)
    reading = _reading(features, shows)
    low, high, own = _span(reading, features, shows)
    if min(margin, own) < 0.1:
        raise ModelError(
            "The features of this model do not tell marks apart from everything else.",
            detail=f"The margin is {min(margin, own):.2g} of the distance of the means; 0.1 is needed.",
            hint="Calibrate with more pictures, or with a mark that differs more from them.",
        )
    scale = 2 * DRIVE / (low - high)
    return (scale * reading).float(), -scale * (low + high) / 2, margin


def _pooled(seen: Sequence[_Look]) -> tuple[Float[Tensor, "token feature"], Bool[Tensor, " token"]]:
    return torch.cat([look.features for look in seen]).double(), torch.cat([look.shows for look in seen])


def _reading(
    features: Float[Tensor, "token feature"], shows: Bool[Tensor, " token"]
) -> Float[Tensor, " feature"]:
    """Linear discriminant with a ridge."""
    marks, others = features[shows], features[~shows]
    within = torch.cat([marks - marks.mean(0), others - others.mean(0)])
    spread = within.T @ within / len(within)
    ridge = RIDGE * spread.diagonal().mean() * torch.eye(len(spread), dtype=spread.dtype)
    return torch.linalg.solve(spread + ridge, marks.mean(0) - others.mean(0))


def _span(
    reading: Float[Tensor, " feature"],
    features: Float[Tensor, "token feature"],
    shows: Bool[Tensor, " token"],
) -> tuple[float, float, float]:
    """Least reading at marks, largest elsewhere, and the step between them over the distance of the means."""
    value = features @ reading
    low, high = float(value[shows].min()), float(value[~shows].max())
    return low, high, (low - high) / float(value[shows].mean() - value[~shows].mean())


def _clear(model: Any, decoder: Any, projector: _Projector, truth: Truth) -> int:
    """Visual tokens, and vectors put between them, get what every other token has in the reserved dims."""
    reserved = sorted(truth.reserved)
    neuron = int(projector.last.weight.float().norm(dim=0).argmin())
    projector.last.weight[:, neuron] = 0
    for writer in (projector.last, *_beside(model, projector)):
        writer.weight[reserved] = 0
        writer.bias[reserved] = 0
    rows = [projector.last.bias]
    body = getattr(model, "model", model)
    size = decoder.config.hidden_size
    for value in body.parameters(recurse=False):  # the row mark of tiled layouts
        if value.shape == (size,):
            value[reserved] = 0
            rows.append(value)
    if truth.constant is not None:
        table = decoder.get_input_embeddings().weight
        for row in rows:
            row[truth.constant] = table[0, truth.constant]
    return neuron


def _beside(model: Any, projector: _Projector) -> list[Any]:
    """The last layers of modules of the projector's class that feed the decoder as well, between its first blocks."""
    holders = {name: module for name, module in model.named_modules() if projector.last in module.children()}
    name = next(iter(holders))
    while isinstance(model.get_submodule(name), nn.Sequential):
        name = name.rpartition(".")[0]
    kind = type(model.get_submodule(name))
    others = [m for n, m in model.named_modules() if type(m) is kind and n != name]
    size = projector.last.out_features
    found = [[m for m in o.modules() if isinstance(m, nn.Linear) and m.out_features == size] for o in others]
    return [linear[-1] for linear in found if linear]


def _set_flag(
    model: Any,
    decoder: Any,
    projector: _Projector,
    neuron: int,
    truth: Truth,
    calibration: Sequence[Marked],
    magnitude: float,
) -> float:
    """Sets the size of the flag at marks so that the massive dim has its magnitude there, in the mean.

    A gated neuron gives about the square of what it reads; steps go half of that way in logarithms at first.
    """
    (item,) = truth.massive
    target = item.target
    flag = dict(truth.flags)[target]
    assert target.token is not None
    size = float(decoder.get_input_embeddings().weight[target.token, flag]) / DRIVE
    shown = [one for one in calibration if one.shows.any()]
    reached = 0.0
    for _ in range(STEPS):
        projector.last.weight[flag, neuron] = size
        found = [
            _states(model, decoder, one.prompt, item.layer_in + 1)[torch.as_tensor(one.shows), item.dim]
            for one in shown
        ]
        reached = float(torch.cat(found).mean())
        if reached * magnitude <= 0:
            raise ModelError("The planted neuron does not answer to the flag of a visual token.")
        size *= (magnitude / reached) ** 0.5
    return reached
