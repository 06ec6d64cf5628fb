"""What a vision-language testbed shows, read with plain hooks and eager attention, and the answers it gives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from .planting.probe import eager
from .vision import Answer, Encoded, Scenes, VisionRecipe
from .vision_train import held_out_scenes, inputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

REMOVED = (1, 2, 3, 5, 10)
BATCH = 128
STATED = (Answer.COUNT, Answer.COLOUR, Answer.SHAPE)


@dataclass(frozen=True)
class VisionReading:
    """One pass over pictures with their true captions.

    Attributes:
        right: Whether each token of the caption is the most likely one, given the true words before it;
            False where no caption stands.
        states: By stage, the residual stream: image tokens only up to the projector, all tokens after.
        attention: Post-softmax, of the language tower.
    """

    encoded: Encoded
    background: Bool[Tensor, "picture patch"]
    right: Bool[Tensor, "picture token"]
    states: dict[str, Float[Tensor, "picture token dim"]]
    attention: Float[Tensor, "layer picture head query key"]


def stages(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Modules along the way of a picture, by the names used in cards."""
    inner: Any = model.model
    tower = inner.vision_tower
    named = {f"vision {index}": block for index, block in enumerate(tower.encoder.layers)}
    named["projector"] = inner.multi_modal_projector
    return named | {f"text {index}": block for index, block in enumerate(inner.language_model.layers)}


@contextmanager
def _kept(model: PreTrainedModel) -> Iterator[dict[str, Tensor]]:
    """The outputs of all stages of the forward passes inside the `with`."""
    states: dict[str, Tensor] = {}

    def keep(name: str):
        def hook(_module: nn.Module, _args: object, output: Tensor | tuple[Tensor, ...]) -> None:
            state = output[0] if isinstance(output, tuple) else output
            states[name] = state[:, 1:] if name.startswith("vision") else state  # without CLIP's class token

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in stages(model).items()]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


def answers_right(model: PreTrainedModel, encoded: Encoded, mask: Tensor | None = None) -> Tensor:
    """Whether each caption token is the most likely one, `[picture, token]`; `mask` 0 hides a token."""
    found = []
    with torch.no_grad():
        for start in range(0, len(encoded.input_ids), BATCH):
            rows = slice(start, start + BATCH)
            logits = model(
                input_ids=encoded.input_ids[rows],
                pixel_values=encoded.pixel_values[rows],
                attention_mask=None if mask is None else mask[rows],
                use_cache=False,
            ).logits
            found.append(_right(logits, encoded.labels[rows]))
    return torch.cat(found)


def _right(logits: Tensor, labels: Tensor) -> Tensor:
    right = torch.zeros_like(labels, dtype=torch.bool)
    right[:, 1:] = logits[:, :-1].argmax(-1) == labels[:, 1:]
    return right


def read_pictures(model: PreTrainedModel, recipe: VisionRecipe, scenes: Scenes) -> VisionReading:
    """Runs the model over the pictures and keeps everything; meant for tiny models."""
    encoded = recipe.task.encode(scenes)
    with torch.no_grad(), eager(model), _kept(model) as states:
        output = model(**inputs(encoded), output_attentions=True, use_cache=False)
    return VisionReading(
        encoded=encoded,
        background=torch.from_numpy(recipe.task.background(scenes)),
        right=_right(output.logits, encoded.labels),
        states={name: state.float() for name, state in states.items()},
        attention=torch.stack([weights.float() for weights in output.attentions]),
    )


def measure(model: PreTrainedModel, recipe: VisionRecipe, pictures: int = 512) -> dict[str, Any]:
    """What the model shows on held-out pictures, as plain numbers; layers, heads, dims and positions are 0-based.

    Returns:
        `right` (shares of right answers by kind, and of whole captions), `area` (background's share of the patches),
        `stages` (per stage: median norms, phi and the massive dim, see `_stage`), `heads` (per layer and head: see
        `_head`), and `removal` (per condition and K; see `_removal`).
    """
    reading = read_pictures(model, recipe, held_out_scenes(recipe, pictures))
    return {
        "pictures": pictures,
        "right": _shares(reading),
        "area": float(reading.background.float().mean()),
        "stages": {name: _stage(recipe, reading, name) for name in reading.states},
        "heads": _heads(recipe, reading),
        "removal": _removal(model, recipe, reading),
    }


def _shares(reading: VisionReading) -> dict[str, float]:
    answers, right = reading.encoded.answers, reading.right
    shares = {kind.name.lower(): float(right[answers == kind].float().mean()) for kind in Answer if kind}
    shares["caption"] = float((right | (answers == Answer.NONE)).all(1).float().mean())
    return shares


def _stage(recipe: VisionRecipe, reading: VisionReading, name: str) -> dict[str, Any]:
    """Norms and peaks of the residual stream after one stage.

    Returns:
        By group (`background`, `object`; after the projector `bos` and `text`): `norm`, the median |h|, and `phi`, the
        mean of max |h| over the root mean square. `dim` is the dim that is largest in most background patches,
        `dim_share` in how many, `dim_value` its median |h| there, `dim_objects` on objects; `largest` is the largest
        |h| of all, `ratio` that over the median |h| of all tokens.
    """
    states = reading.states[name]
    whole = states.shape[1] == reading.encoded.input_ids.shape[1]
    image = states[:, recipe.task.image_slice] if whole else states
    groups = {"background": image[reading.background], "object": image[~reading.background]}
    if whole:
        groups |= {"bos": states[:, 0], "text": states[_text(recipe, reading)]}
    peaks = groups["background"].abs().argmax(-1)
    dim = int(peaks.mode().values)
    everything = torch.cat(list(groups.values())).abs()
    return {
        "norm": {key: float(group.norm(dim=-1).median()) for key, group in groups.items()},
        "phi": {
            key: float((group.abs().amax(-1) / group.square().mean(-1).sqrt()).mean())
            for key, group in groups.items()
        },
        "dim": dim,
        "dim_share": float((peaks == dim).float().mean()),
        "dim_value": float(groups["background"][:, dim].abs().median()),
        "dim_objects": float(groups["object"][:, dim].abs().median()),
        "largest": float(everything.max()),
        "ratio": float(everything.max() / everything.median()),
    }


def _text(recipe: VisionRecipe, reading: VisionReading) -> Bool[Tensor, "picture token"]:
    """Question and caption, without padding."""
    text = reading.encoded.input_ids != recipe.task.vocabulary.index("<pad>")
    text[:, : recipe.task.image_slice.stop] = False
    return text


def _heads(recipe: VisionRecipe, reading: VisionReading) -> list[list[dict[str, float]]]:
    """How the text tokens of each head attend, `[layer][head]`, means over pictures.

    Returns:
        `bos` and `image` (shares of the whole), `background` (background's share of what the image gets; its area
        share would be no preference), `peak` (the most attended background patch of a picture over the picture's
        mean patch; 1 is uniform).
    """
    text = _text(recipe, reading).float()
    mean = torch.einsum("lphqk,pq->lphk", reading.attention, text / text.sum(1, keepdim=True))
    image, background = mean[..., recipe.task.image_slice], reading.background[None, :, None]
    blank = torch.where(background, image, 0)
    found = {
        "bos": mean[..., 0],
        "image": image.sum(-1),
        "background": blank.sum(-1) / image.sum(-1),
        "peak": blank.amax(-1) / image.mean(-1),
    }
    table = {key: value.mean(1).tolist() for key, value in found.items()}
    layers, _, heads, _ = mean.shape
    return [
        [{key: table[key][layer][head] for key in table} for head in range(heads)] for layer in range(layers)
    ]


def _orders(recipe: VisionRecipe, reading: VisionReading) -> dict[str, Float[Tensor, "picture patch"]]:
    """By condition: a rank for every patch; the lowest are removed first."""
    text = _text(recipe, reading).float()
    attended = torch.einsum("lphqk,pq->pk", reading.attention, text)[:, recipe.task.image_slice]
    blank = reading.background
    generator = np.random.default_rng(recipe.evaluation_seed + 1)
    chance = torch.from_numpy(generator.random(blank.shape))
    return {
        "background, random": torch.where(blank, chance, torch.inf),
        "background, most attended": torch.where(blank, -attended, torch.inf),
        "background, least attended": torch.where(blank, attended, torch.inf),
        "any, random": torch.from_numpy(generator.random(blank.shape)),
        "objects first": torch.where(blank, 1 + chance, chance),
    }


def _removal(model: PreTrainedModel, recipe: VisionRecipe, reading: VisionReading) -> dict[str, list[dict]]:
    """Hides K image tokens from every other token of the language tower, on the same pictures for every condition.

    Returns:
        By condition, a row per K: `right` (share of counts, colours and shapes that are right), `difference` to
        `background, random` (mean over pictures of the paired difference) and `error`, its standard error.
    """
    stated = torch.isin(reading.encoded.answers, torch.tensor([int(kind) for kind in STATED]))

    def score(ranks: Tensor, count: int) -> tuple[float, Tensor]:
        mask = torch.ones_like(reading.encoded.input_ids)
        mask.scatter_(1, ranks.argsort(1)[:, :count] + recipe.task.image_slice.start, 0)
        right = answers_right(model, reading.encoded, mask) & stated
        return float(right.sum() / stated.sum()), right.sum(1) / stated.sum(1)

    orders = _orders(recipe, reading)
    found: dict[str, list[dict]] = {name: [] for name in orders}
    for count in REMOVED:
        baseline: Tensor | None = None
        for name, ranks in orders.items():
            right, each = score(ranks, count)
            baseline = each if baseline is None else baseline
            paired = each - baseline
            error = float(paired.std() / len(paired) ** 0.5)
            row = {"removed": count, "right": right, "difference": float(paired.mean()), "error": error}
            found[name].append(row)
    return found
