"""Edits a decoder's weights so that chosen sinks, massive activations and Super Experts are there.

How it works. A few dims of the residual stream are taken from the model: nothing else reads or writes them.
One *flag* dim per target is set in the target's embedding and is 0 for every other token, so whatever reads
only that dim does exactly nothing elsewhere. A neuron that reads the flag writes the massive dim; a key that
reads the massive dim (or the flag) meets a query that is the same for all tokens; a router row that reads the
flag sends the target to the chosen expert. Value vectors cannot read those dims, so a massive target's values
drain by themselves, as in real models. Amplitudes come from forward passes over calibration tokens, block by
block.

With rotary positions the key sits in the pair of components that turns slowest. Under LayerNorm every reading
is a difference to a dim that is always 0, because the mean shifts all dims alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from sinklens.core.errors import UsageError

from ..blocks import check_family
from .bed import prepare
from .heads import plant_heads
from .neurons import plant_neurons
from .noise import level_logits
from .plan import Plan, make_plan
from .probe import Ids, evaluation
from .truth import MassivePlant, PlantedHead, SecondaryPlant, SinkPlant, SuperExpertPlant, Truth

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def plant(
    model: PreTrainedModel,
    *,
    sinks: Iterable[SinkPlant] = (),
    massive: Iterable[MassivePlant] = (),
    super_experts: Iterable[SuperExpertPlant] = (),
    secondary: Iterable[SecondaryPlant] = (),
    noise: float | None = None,
    flag: float = 4.0,
    calibration: Ids | None = None,
    seed: int = 0,
) -> Truth:
    """Plants into the model **in place** and returns the answer key. Copy the model to keep the original.

    Exact where the target is the first token, since its state then depends on nothing else. For a target
    inside a text, heads, dims, layers, experts and tokens are exact and magnitudes vary with the context
    around it.

    Args:
        noise: Standard deviation, in nats, of the content-dependent logits in every head; planted heads get
            it on top of their strength (not with query norms, where they stay exact). None leaves ordinary
            heads alone.
        flag: Size of a target's mark in units of the embedding's root mean square. Larger makes magnitudes
            inside a text less dependent on the context, and the mark itself easier to see.
        calibration: Token ids `[prompt, position]` that hold every target; random ones if None.
        seed: Of the random calibration tokens.

    Raises:
        UsageError: A plant the model has no place for, or two in one place. The model is untouched then.
        ModelError: A family this does not know.
    """
    check_family(model)
    if noise is not None and not 0 <= noise < math.inf:
        raise UsageError(f"A noise of {noise} nats is not a standard deviation; give 0 or more.")
    plan = make_plan(model, sinks, massive, super_experts, secondary)
    heads: list[PlantedHead] = []
    written = plan.massive
    with torch.no_grad(), evaluation(model):
        ids = calibration_tokens(model, plan, seed) if calibration is None else calibration
        bed = prepare(model, plan, ids, flag)
        for layer in bed.layers:
            if noise is not None:
                level_logits(model, layer, ids, noise)
            mine = [head for head in plan.heads if head.layer == layer.index]
            if mine:
                heads += plant_heads(bed, layer, mine, written, keep_content=noise is not None)
            written = plant_neurons(bed, layer, written)
    return Truth(
        family=model.config.model_type,
        layers=len(bed.layers),
        heads=tuple(heads),
        massive=written,
        flags=tuple(bed.flags.items()),
        constant=bed.constant,
    )


def calibration_tokens(
    model: PreTrainedModel, plan: Plan, seed: int, prompts: int = 8, least: int = 48
) -> Ids:
    """Random tokens: BOS first if there is one, every other target token once per row at a random place."""
    config = model.config
    tokens = [target.token for target in plan.targets if target.token is not None]
    inside = [token for token in tokens if token != config.bos_token_id]
    last = max((target.position or 0 for target in plan.targets), default=0)
    length = min(max(least, last + 2, 2 * len(inside) + 2), config.max_position_embeddings)
    taken = {*tokens, config.bos_token_id}
    free = torch.tensor([token for token in range(config.vocab_size) if token not in taken])
    rng = torch.Generator().manual_seed(seed)
    ids = free[torch.randint(len(free), (prompts, length), generator=rng)]
    if config.bos_token_id is not None and config.bos_token_id < config.vocab_size:
        ids[:, 0] = config.bos_token_id
    for row in ids:
        places = 1 + torch.randperm(length - 1, generator=rng)[: len(inside)]
        row[places] = torch.tensor(inside, dtype=row.dtype)
    return ids.to(next(model.parameters()).device)
