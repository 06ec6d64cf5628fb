"""Plants a head that looks things up, and a sink that draws its attention away.

How it works. The model is a Llama of which every weight is 0 but those named here. All embeddings have a root mean
square of 1, so norms do nothing, and no other part writes before the head reads. Rotary positions turn so slowly in
the components used that they do not count. In the head's row of the asking word, the token asked for has a logit of
`match`, the sink one of `strength`, all others 0, each up to the noise. So the token asked for gets

    share = e^match / (e^match + sinks e^strength + others)

and the answer is right exactly if this exceeds `threshold`, the share at which what is looked up outweighs what the
asking word suggests. Without a change the share is below it; with the sink's attention out of the way it is above.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from sinklens.core.errors import UsageError

from ..retrieval import DELIMITER, RetrievalTask

if TYPE_CHECKING:
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

SIZE, WIDTH, HEADS, LAYERS = 128, 32, 4, 5
MARK = 4.0
"""Size of every mark in an embedding."""
STILL = (*range(10, 16), *range(26, 32))
"""Components of a head that turn by less than 1e-6 radians per token; pairs are 16 apart."""
GAIN = 40.0
"""Logit of an answer to which the head gives all its attention."""


@dataclass(frozen=True)
class RetrievalTruth:
    """What was planted, and what is then true.

    Attributes:
        sink: `first` (BOS), `inner` (the delimiter) or `visual` (tokens of empty background).
        layer, head: The head, 0-based; nothing else of the model writes anything.
        match, strength: Logits of the token asked for and of a sink, nats.
        noise: Standard deviation of all logits around these.
        threshold: Share of the head's attention above which the looked-up answer is given.
        remedy: Registry name of the mitigation that was built for such a sink.
        remedy_parameters: With which it answers every question.
        sink_dim: The massive dim of visual sinks; None for the others.
    """

    sink: Literal["first", "inner", "visual"]
    layer: int
    head: int
    match: float
    strength: float
    noise: float
    threshold: float
    remedy: str
    remedy_parameters: dict[str, Any]
    sink_dim: int | None = None

    def share(self, others: int, sinks: int = 1, gamma: float = 1.0) -> float:
        """Attention on the token asked for, without noise.

        Args:
            others: Tokens that are neither it nor a sink, the asking word among them.
            gamma: Factor on the sinks' weights before the row is divided by its sum again.
        """
        right = math.exp(self.match)
        return right / (right + gamma * sinks * math.exp(self.strength) + others)

    def to_json(self) -> dict[str, Any]:
        return {"kind": "retrieval", **asdict(self)}


REMEDIES: dict[str, tuple[str, dict[str, Any]]] = {
    "first": ("zero-tuning", {"gamma": 0.25}),
    "inner": ("act", {"beta": 0.4}),
}


def plant_retrieval(
    sink: Literal["first", "inner"],
    *,
    seed: int = 0,
    task: RetrievalTask | None = None,
    match: float = 5.0,
    strength: float = 8.0,
    noise: float = 0.1,
) -> tuple[PreTrainedModel, RetrievalTruth]:
    """A model that answers the questions of `RetrievalTask` once a sink is out of its way.

    The seed draws the head (in block 2 or 3 of 5), the dims and the noise.

    Args:
        match, strength: In nats. `strength` must be so large that it matters whether the sink's weight is quartered.
        noise: In nats.

    Raises:
        UsageError: With these logits the sink would not be in the way, or the head could not be freed.
    """
    if sink not in REMEDIES:
        raise UsageError(f"There is no planted sink {sink!r}; there are: {', '.join(REMEDIES)}.")
    if not 0 <= noise < math.inf:
        raise UsageError(f"A noise of {noise} nats is not a standard deviation; give 0 or more.")
    task = task or RetrievalTask()
    rng = torch.Generator().manual_seed(seed)
    layer, head = 2 + int(torch.randint(2, (), generator=rng)), int(torch.randint(HEADS, (), generator=rng))
    remedy, parameters = REMEDIES[sink]
    truth = RetrievalTruth(sink, layer, head, match, strength, noise, 0.0, remedy, parameters)
    others = task.length - 2
    before, after = truth.share(others), truth.share(others, gamma=0.25)
    if not before * 1.5 < after:
        raise UsageError(
            f"A sink of {strength:g} nats is not in the way of a match of {match:g} nats.",
            detail=f"The token asked for has {before:.1%} of the attention, and {after:.1%} with a quarter of the "
            "sink's weight.",
        )
    truth = RetrievalTruth(**{**asdict(truth), "threshold": math.sqrt(before * after)})
    model = _empty(task)
    with torch.no_grad():
        _Writer(model, task, truth, rng).write()
    return model.eval(), truth


def retrieval_config(task: RetrievalTask) -> LlamaConfig:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(task.vocabulary),
        bos_token_id=task.id_of("<s>"),
        eos_token_id=None,
        pad_token_id=task.id_of("<pad>"),
        **language_sizes(),
    )


def language_sizes() -> dict[str, Any]:
    """Of the language model in which the head is planted."""
    return {
        "hidden_size": SIZE,
        "intermediate_size": 32,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "head_dim": WIDTH,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e12},
    }


def _empty(task: RetrievalTask) -> LlamaForCausalLM:
    from transformers import LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        model = LlamaForCausalLM(retrieval_config(task)).float()
    empty(model)
    return model


def empty(model: Any) -> None:
    """Every matrix becomes 0, every norm 1."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(0.0 if weight.ndim > 1 else 1.0)


class _Writer:
    """Lays out the dims and writes the weights."""

    def __init__(
        self, model: LlamaForCausalLM, task: RetrievalTask, truth: RetrievalTruth, rng: torch.Generator
    ) -> None:
        self.task, self.truth, self.rng = task, truth, rng
        self.model = model
        self.dims = Dims(task.keys, task.values, rng)

    def write(self) -> None:
        task, dims, truth = self.task, self.dims, self.truth
        table: Any = self.model.get_input_embeddings()
        words = {word: place for place, word in enumerate(task.vocabulary)}
        rows = table.weight
        for key in range(task.keys):
            for value in range(task.values):
                rows[task.pair_id(key, value), [dims.keys[key], dims.values[value]]] = MARK
            rows[task.asking_id(key), [dims.asked[key], dims.guess[task.suggested(key)]]] = MARK
        rows[words["<s>" if truth.sink == "first" else DELIMITER], dims.sink] = MARK
        rows[:, dims.constant] = MARK
        dims.fill(rows, self.rng)
        write_head(self.model.model.layers[truth.layer].self_attn, truth, dims, self.rng, everyone=True)
        for value in range(task.values):
            write_answer(self.model.lm_head.weight[task.answer_id(value)], dims, value, truth.threshold)


class Dims:
    """Which dims of the residual stream hold what, drawn at random; all of them are different.

    Args:
        noise_size: Norm of the noise dims in every embedding.
        sink_size: Value of the sink dim at sinks, where their logit is `strength`.
        rest: Dims that fill every embedding up to its size, each alike.
    """

    def __init__(
        self,
        keys: int,
        values: int,
        rng: torch.Generator,
        *,
        noise_size: float = MARK,
        sink_size: float = MARK,
        rest: int = 1,
    ) -> None:
        self.noise_size, self.sink_size = noise_size, sink_size
        order = iter(torch.randperm(SIZE, generator=rng).tolist())

        def take(count: int) -> list[int]:
            return [next(order) for _ in range(count)]

        self.keys, self.asked = take(keys), take(keys)
        self.values, self.guess, self.found = take(values), take(values), take(values)
        self.noise = take(16)
        self.sink, self.constant = take(2)
        self.rest = take(rest)
        self.spare = list(order)

    def fill(self, rows: torch.Tensor, rng: torch.Generator) -> None:
        """Adds the noise and brings every row to a root mean square of 1, by dims that nobody reads."""
        noise = torch.randn(len(rows), len(self.noise), generator=rng).to(rows)
        rows[:, self.noise] = self.noise_size * noise / noise.norm(dim=-1, keepdim=True)
        left = (SIZE - rows.square().sum(-1, keepdim=True)) / len(self.rest)
        rows[:, self.rest] = left.sqrt().expand(-1, len(self.rest))


def write_head(
    attention: Any, truth: RetrievalTruth, dims: Dims, rng: torch.Generator, *, everyone: bool
) -> None:
    """Queries, keys and values of the head, and what it writes.

    Args:
        everyone: All tokens attend to the sink; otherwise the asking word alone.
    """
    rows = slice(truth.head * WIDTH, (truth.head + 1) * WIDTH)
    query, key, value = (part.weight[rows] for part in (attention.q_proj, attention.k_proj, attention.v_proj))
    places = iter(STILL)
    scale = attention.scaling
    match, strength = (math.sqrt(logit / scale) / MARK for logit in (truth.match, truth.strength))
    for asked, known in zip(dims.asked, dims.keys, strict=True):
        place = next(places)
        query[place, asked], key[place, known] = match, match
    place = next(places)
    key[place, dims.sink] = strength * MARK / dims.sink_size
    query[place, [dims.constant] if everyone else dims.asked] = strength
    # A query that is equal for all tokens meets a random direction of the noise dims: logits of this spread.
    place = next(places)
    direction = torch.randn(len(dims.noise), generator=rng)
    query[place, dims.constant] = 1.0 / MARK
    spread = truth.noise / scale / dims.noise_size * math.sqrt(len(dims.noise))
    key[place, dims.noise] = spread * direction / direction.norm()
    for place, (known, found) in enumerate(zip(dims.values, dims.found, strict=True)):
        value[place, known] = 1.0 / MARK
        attention.o_proj.weight[found, truth.head * WIDTH + place] = 1.0


def write_answer(row: torch.Tensor, dims: Dims, value: int, threshold: float) -> None:
    """The output word of a value: what was found against what was suggested."""
    row[dims.found[value]] = GAIN
    row[dims.guess[value]] = GAIN * threshold / MARK
