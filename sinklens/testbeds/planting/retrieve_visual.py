"""Plants a head that looks a picture's cell up, with visual and text sinks that draw its attention away.

How it works. The vision tower passes the pixels of a patch on, less their mean and over their deviation; its block
reads and mixes them with random weights, and writes into dims that are read no further. The projector has one neuron
for every kind of patch there is, which fires there alone and writes that kind's embedding, and a few that leave a faint
trace of the pixels. So every visual token is known exactly, whatever stands beside it. Every other weight is 0. The
language model is that of `retrieve`: embeddings with a root mean square of 1, and one head that writes. BOS and the
tokens of specks carry the massive dim; BOS more of it. In the head's row of the asking word

    the cell asked for has a logit of `match`, a speck one of `strength`, BOS one of `text_strength`, all others 0.

Taking attention from sinks and dividing the row by its sum again gives most of it to the other sinks and to text. The
answer is right only above `threshold`, which lies between what any of that gives to the cell asked for and what it gets
when the sinks' attention goes to visual tokens that are none: VAR.

All other heads from block 1 on are dormant: they attend to the sinks and write nothing. One head of block 1 writes
nothing either, and attends to objects, the more the later they stand (`looker`): a pruner that ranks by this block sees
objects behind sinks and recency.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from sinklens.core.errors import ModelError, UsageError

from ..vision import COLOURS, SHAPES, VisionRecipe
from ..visual_retrieval import QUESTION, VisualRetrievalTask
from .retrieve import (
    HEADS,
    MARK,
    SIZE,
    STILL,
    WIDTH,
    Dims,
    RetrievalTruth,
    empty,
    language_sizes,
    write_answer,
    write_head,
)

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration

REMEDY: tuple[str, dict[str, Any]] = ("var", {"p": 0.6, "rho": 0.5})
TEXT_SINK, SPECK = 8.0, 5.8
"""Values of the massive dim at BOS and at specks; states have a root mean square of 1."""
NOISE_SIZE = 1.0
DORMANT = 3.0
"""Logit of a speck in heads that write nothing, nats."""
LOOK, RECENCY = 1.0, 4.2
"""Logits of an object, and of the nearest token over one at right angles, in the head that looks at objects; nats."""
TURNING = 2
"""The rotary component that turns by about a radian over a picture: attention falls with distance."""
DRIVE = 8.0
"""What a neuron of the projector gives at its kind of patch; at all others at most GELU(-8), which is 0."""
LEVEL = 1.0
"""What the vision tower adds to every feature, so that empty patches have a state that is not much smaller."""
TRACE, FAINT = 16, 0.2
"""Dims that hold a trace of the pixels, and its size."""
REST = 64
"""Dims that fill the embeddings up: so many that none of them is larger than a mark."""


@dataclass(frozen=True)
class VisualRetrievalTruth(RetrievalTruth):
    """`RetrievalTruth` of a picture's cell; `strength` is the logit of a visual sink.

    Attributes:
        text_strength: Logit of BOS.
        visual_sinks, visual_others, text_others: Tokens of each kind beside the cell asked for and BOS.
        looker: The head (block, head) that attends to objects.
    """

    text_strength: float = math.nan
    visual_sinks: int = 0
    visual_others: int = 0
    text_others: int = 0
    looker: tuple[int, int] = (1, 0)

    def share(self, others: int, sinks: int = 1, gamma: float = 1.0) -> float:
        """Attention on the cell asked for, without noise; `sinks` are visual ones, and BOS is one beside them."""
        right = math.exp(self.match)
        held = sinks * math.exp(self.strength) + math.exp(self.text_strength)
        return right / (right + gamma * held + others)

    def masses(self, *, text: float = 1.0, visual: float = 1.0) -> dict[str, float]:
        """Attention of the head's row, without noise, in parts that sum to 1.

        Args:
            text, visual: Factors on the weights of the sinks before the row is divided by its sum again.
        """
        weights = {
            "asked": math.exp(self.match),
            "visual_others": float(self.visual_others),
            "visual_sinks": visual * self.visual_sinks * math.exp(self.strength),
            "text_sink": text * math.exp(self.text_strength),
            "text_others": float(self.text_others),
        }
        total = sum(weights.values())
        return {name: weight / total for name, weight in weights.items()}

    @property
    def non_sink_ratio(self) -> float:
        """Part of the visual attention on visual tokens that are no sinks: VAR's r."""
        parts = self.masses()
        seen = parts["asked"] + parts["visual_others"]
        return seen / (seen + parts["visual_sinks"])

    def redistributed(self, p: float) -> float:
        """Attention on the cell asked for when VAR has moved the share `p` of all sinks' attention."""
        parts = self.masses()
        moved = p * (parts["visual_sinks"] + parts["text_sink"])
        return parts["asked"] * (1 + moved / (parts["asked"] + parts["visual_others"]))


def plant_visual_retrieval(
    *,
    seed: int = 0,
    task: VisualRetrievalTask | None = None,
    match: float = 4.0,
    strength: float = 2.74,
    noise: float = 0.03,
) -> tuple[LlavaForConditionalGeneration, VisualRetrievalTruth]:
    """A model that answers the questions of `VisualRetrievalTask` once attention goes from sinks to visual non-sinks.

    The seed draws the head (in block 2 or 3 of 5), the head that looks at objects, the dims and the noise.

    Args:
        match, strength, noise: Logits in nats, see `VisualRetrievalTruth`.

    Raises:
        UsageError: With these logits VAR would not select the head, or removing the sinks would do as well.
    """
    if not 0 <= noise < math.inf:
        raise UsageError(f"A noise of {noise} nats is not a standard deviation; give 0 or more.")
    task = task or VisualRetrievalTask()
    rng = torch.Generator().manual_seed(seed)
    layer, head, looker = (int(torch.randint(n, (), generator=rng)) for n in (2, HEADS, HEADS))
    dims = Dims(len(COLOURS), len(SHAPES), rng, noise_size=NOISE_SIZE, sink_size=SPECK, rest=REST)
    truth = VisualRetrievalTruth(
        "visual", 2 + layer, head, match, strength, noise, 0.0, *REMEDY, dims.sink,
        strength * TEXT_SINK / SPECK, task.specks, task.patches - 1 - task.specks, len(QUESTION) + 1, (1, looker),
    )  # fmt: skip
    truth = replace(truth, threshold=_threshold(truth))
    with torch.no_grad():
        model = _written(task, truth, dims, rng)
    return model.eval(), truth


def _threshold(truth: VisualRetrievalTruth) -> float:
    """Between the largest share that the cell gets without its sinks (of one kind) and the share under VAR."""
    freed = max(truth.masses(text=0.0)["asked"], truth.masses(visual=0.0)["asked"])
    moved = truth.redistributed(truth.remedy_parameters["p"])
    if not (freed * 1.1 < moved and truth.non_sink_ratio > truth.remedy_parameters["rho"] + 0.02):
        raise UsageError(
            f"With a match of {truth.match:g} and visual sinks of {truth.strength:g} nats only VAR cannot be right.",
            detail=f"The cell asked for has {freed:.1%} of the attention without a kind of sinks and {moved:.1%} under "
            f"VAR, and {truth.non_sink_ratio:.2f} of the visual attention is on tokens that are no sinks.",
        )
    return math.sqrt(freed * moved)


def retrieval_recipe(task: VisualRetrievalTask) -> VisionRecipe:
    """Config, pictures and processor of the model; nothing of it is trained."""
    vision = {
        "hidden_size": 3 * task.cell**2 + 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    own = ("max_position_embeddings", "tie_word_embeddings")
    text = {name: value for name, value in language_sizes().items() if name not in own}
    return VisionRecipe(name="retrieval-visual", vision=vision, text=text, task=task)


def _written(
    task: VisualRetrievalTask, truth: VisualRetrievalTruth, dims: Dims, rng: torch.Generator
) -> LlavaForConditionalGeneration:
    from transformers import LlavaForConditionalGeneration

    with torch.random.fork_rng(devices=[]):
        model = LlavaForConditionalGeneration(retrieval_config(task)).float()
    empty(model)
    for name, bias in model.named_parameters():
        if name.endswith("bias"):
            bias.fill_(0.0)
    body: Any = model.model
    _write_tower(body.vision_tower, task, rng)
    _write_projector(body, task, _patch_rows(task, dims, rng), dims, rng)
    rows = body.language_model.get_input_embeddings().weight
    words = {word: place for place, word in enumerate(task.vocabulary)}
    for colour, name in enumerate(COLOURS):
        rows[words[task.asking(name)], [dims.asked[colour], dims.guess[task.suggested(colour)]]] = MARK
    rows[words["<s>"], dims.sink] = TEXT_SINK
    rows[:, dims.constant] = MARK
    dims.fill(rows, rng)
    for block, layer in enumerate(body.language_model.layers):
        for head in range(HEADS):
            if (block, head) == (truth.layer, truth.head):
                write_head(layer.self_attn, truth, dims, rng, everyone=True)
            elif (block, head) == truth.looker:
                _write_looker(layer.self_attn, head, dims)
            elif block:
                _write_dormant(layer.self_attn, head, dims)
    for shape, name in enumerate(SHAPES):
        write_answer(model.lm_head.weight[words[name]], dims, shape, truth.threshold)
    return model


def retrieval_config(task: VisualRetrievalTask) -> Any:
    return retrieval_recipe(task).config()


def _write_tower(tower: Any, task: VisualRetrievalTask, rng: torch.Generator) -> None:
    """Pixels in the order of channel, row, column; the block writes into the dims behind them, at random."""
    inner = getattr(tower, "vision_model", tower)
    pixels = 3 * task.cell**2
    weight = inner.embeddings.patch_embedding.weight
    weight[:pixels].copy_(torch.eye(pixels).view_as(weight[:pixels]))
    inner.pre_layrnorm.bias.fill_(LEVEL)
    for name, value in inner.encoder.layers.named_parameters():
        if value.ndim == 2:
            value.copy_(torch.randn(value.shape, generator=rng) / math.sqrt(value.shape[1]))
            if name.endswith(("out_proj.weight", "fc2.weight")):
                value[:pixels] = 0.0


def _patch_rows(task: VisualRetrievalTask, dims: Dims, rng: torch.Generator) -> torch.Tensor:
    """The embedding of every kind of patch, in the order of `patch_kinds`."""
    kinds = torch.zeros(len(task.patch_kinds()), SIZE)
    for colour in range(len(COLOURS)):
        for shape in range(len(SHAPES)):
            kinds[colour * len(SHAPES) + shape, [dims.keys[colour], dims.values[shape]]] = MARK
    kinds[-2, dims.sink] = SPECK
    kinds[:, dims.constant] = MARK
    dims.fill(kinds, rng)
    return kinds


def _write_projector(
    body: Any, task: VisualRetrievalTask, kinds: torch.Tensor, dims: Dims, rng: torch.Generator
) -> None:
    """A neuron per kind but the empty one, whose embedding is the bias; and a trace of the pixels that nobody reads."""
    pixels = 3 * task.cell**2
    first, last = body.multi_modal_projector.linear_1, body.multi_modal_projector.linear_2
    features = _features(body.vision_tower, task)[:, :pixels] - LEVEL
    used = len(features) - 1
    size = features[:-1].square().sum(-1)
    overlap = features[:-1] @ features.T / size[:, None]
    nearest = (overlap - 2 * torch.eye(*overlap.shape)).amax(-1)
    if float(nearest.max()) > 0.95:
        raise ModelError("Two kinds of patches look alike to the vision tower.")
    steep = 2 * DRIVE / (size * (1 - nearest))
    weight = steep[:, None] * features[:-1]
    first.weight[:used, :pixels] = weight.float()
    first.bias[:used] = (-steep * size * (1 + nearest) / 2 - LEVEL * weight.sum(-1)).float()
    trace, marks = slice(used, used + TRACE), dims.spare[:TRACE]
    first.weight[trace, :pixels] = torch.randn(TRACE, pixels, generator=rng) / math.sqrt(pixels)
    last.weight[marks, range(trace.start, trace.stop)] = FAINT
    # What the trace adds is taken from the dims that fill every embedding up.
    faint = (
        body.multi_modal_projector(_features(body.vision_tower, task).float()).square().sum(-1, keepdim=True)
    )
    kinds[:, dims.rest] = (kinds[:, dims.rest].square() - faint / len(dims.rest)).sqrt()
    last.bias.copy_(kinds[-1])
    last.weight[:, :used] += ((kinds[:-1] - kinds[-1]) / DRIVE).T


def _features(tower: Any, task: VisualRetrievalTask) -> torch.Tensor:
    """What leaves the tower for every kind of patch, in double precision."""
    kinds = torch.arange(len(task.patch_kinds()))[:, None].expand(-1, task.patches).numpy()
    pictures = torch.from_numpy(task.painted(kinds)).float() / 255
    return tower(pictures, output_hidden_states=True).hidden_states[-1][:, 1].double()


def _rows(attention: Any, head: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows = slice(head * WIDTH, (head + 1) * WIDTH)
    return attention.q_proj.weight[rows], attention.k_proj.weight[rows]


def _write_dormant(attention: Any, head: int, dims: Dims) -> None:
    """Attends to sinks and writes nothing."""
    query, key = _rows(attention, head)
    query[STILL[0], dims.constant] = DORMANT / (attention.scaling * MARK)
    key[STILL[0], dims.sink] = 1.0 / dims.sink_size


def _write_looker(attention: Any, head: int, dims: Dims) -> None:
    """Attends to objects, and to what is near; writes nothing."""
    query, key = _rows(attention, head)
    query[STILL[0], dims.constant] = LOOK / (attention.scaling * MARK)
    key[STILL[0], dims.keys] = 1.0 / MARK
    query[TURNING, dims.constant] = RECENCY / (attention.scaling * MARK)
    key[TURNING, dims.constant] = 1.0 / MARK
