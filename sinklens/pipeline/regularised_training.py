"""A testbed trained with and without a regulariser: what becomes of its sink, and what that costs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from sinklens.core.errors import UsageError
from sinklens.evaluation.paired import mean_interval, paired_difference
from sinklens.mitigations.regularisers import Decorrelation, MassivePenalty, Regularised, SinkMass, Term
from sinklens.testbeds.measure import read
from sinklens.testbeds.recipe import Recipe
from sinklens.testbeds.train import batches_of, build_model, fit, held_out

Terms = Callable[[], Mapping[Term, float]]
QUANTITIES = ("loss", "sink_mass", "sink_rate", "squared_cosine", "largest_ratio", "norm_ratio")
VARIANTS: dict[str, Terms | None] = {
    "plain": None,
    "sink mass": lambda: {SinkMass(): 0.3},
    "decorrelation": lambda: {Decorrelation(): 1.0},
    "massive penalty": lambda: {MassivePenalty(): 1.0},
}
"""The recorded comparison."""


def regularised_training(
    recipe: Recipe,
    variants: Mapping[str, Terms | None] = VARIANTS,
    *,
    steps: int = 1000,
    seeds: Sequence[int] = (0, 1, 2),
    prompts: int = 64,
    start: Any = None,
    progress: Callable[[str, int], None] | None = None,
) -> dict[str, Any]:
    """Train every variant from the same weights on the same data, once per seed, and read held-out sequences.

    Args:
        variants: By name, what is added to the loss; the first one must add nothing.
        seeds: Of the data, and of the weights where `start` is None.
        start: A model of the recipe to go on from, for instance one that has a sink; it stays as it is.

    Returns:
        Plain JSON. By variant and quantity the `values` per seed, their mean with its interval over seeds, and the
        paired `difference` to the first variant. `loss` is the task's, without terms (nats per token); `sink_mass`
        what queries behind the first token give it, mean over layers and heads; `sink_rate` the share of prompts,
        layers and heads above 0.3; `squared_cosine` and `norm_ratio` (first token over the median token) of states
        between blocks; `largest_ratio` the largest entry of such states over their median entry.

    Raises:
        UsageError: The first variant is regularised, or there is none.
    """
    if not variants or next(iter(variants.values())) is not None:
        raise UsageError("The first variant must be the one without terms: the others are held against it.")
    ids = held_out(recipe, prompts)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in variants}
    for seed in seeds:
        for name, terms in variants.items():
            plan = replace(recipe, steps=steps, seed=seed)
            model = build_model(plan) if start is None else copy.deepcopy(start)
            trained: Any = model if terms is None else Regularised(model, terms())
            fit(trained, plan, ({"input_ids": batch, "labels": batch} for batch in batches_of(plan, seed)))
            found[name].append(_read(model.eval(), ids))
            if progress:
                progress(name, seed)
    base = found[next(iter(variants))]
    return {
        "recipe": recipe.name, "from_scratch": start is None, "steps": steps, "seeds": list(seeds), "prompts": prompts,
        "interval": "95 % t interval over seeds, paired",
        "variants": {name: {key: _row(rows, base, key) for key in QUANTITIES} for name, rows in found.items()},
    }  # fmt: skip


def _row(rows: list[dict[str, float]], base: list[dict[str, float]], key: str) -> dict[str, Any]:
    mine, plain = np.array([row[key] for row in rows]), np.array([row[key] for row in base])
    return {
        "values": mine.tolist(),
        "mean": mean_interval(mine).to_json(),
        "difference": paired_difference(mine, plain).to_json(),
    }


def _read(model: Any, ids: torch.Tensor) -> dict[str, float]:
    """One model on held-out sequences, read with plain hooks and eager attention."""
    with torch.no_grad():
        reading = read(model, ids)
    inner = reading.states[:-1]
    cosine = torch.nn.functional.cosine_similarity(inner[:, :, 1:], inner[:, :, :1], dim=-1)
    largest = [row[3] for row in reading.largest()[:-1]]
    return {
        "loss": reading.loss,
        "sink_mass": float(reading.attention[..., 1:, 0].mean()),
        "sink_rate": reading.sink_rate(),
        "squared_cosine": float(cosine.square().mean()),
        "largest_ratio": max(largest),
        "norm_ratio": float(reading.norm_ratio()[:-1].max()),
    }
