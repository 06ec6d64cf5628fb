"""One of each method, and what it does to a whole map by its formula."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sinklens.mitigations import ACT, AttentionScaling, KnockOut, Mitigation, ZeroTuning
from sinklens.tracers.attention import Site

from ..families import HEADS, LAYERS
from .dense import act_map, act_sinks, places, scaled_map

# One of every kind: MHA, GQA, MLA, sliding windows of two sorts, learned sinks, soft caps, images, bidirectional.
CLASSES = (
    "gpt2",
    "llama",
    "qwen3_moe",
    "deepseek_v2",
    "deepseek_v3",
    "mistral",
    "gemma3_text",
    "gpt_oss",
    "gemma2",
    "phi3",
    "llava",
    "qwen2_5_vl",
    "bert_mlm",
)
GAMMAS = {(0, 1): 0.3, (1, 0): 4.0, (3, 3): 1.0}
TABLE = torch.full((LAYERS, HEADS), 2.0).index_put(
    tuple(torch.tensor(list(GAMMAS)).T), torch.tensor(list(GAMMAS.values()))
)


def definition(mitigation: Mitigation, real: Tensor, causal: bool = True) -> Any:
    """A map rewritten by the method's formula."""

    def rewrite(site: Site, weights: Tensor) -> Tensor:
        match mitigation:
            case ZeroTuning():
                new = scaled_map(weights, places(real, 0)[:, None], TABLE[site.layer])
            case KnockOut():
                at = torch.stack([places(real, p) for p in mitigation.positions], 1)
                new = scaled_map(weights, at, 0.0, spare_own=True)
            case AttentionScaling():
                at = torch.stack([places(real, p) for p in mitigation.positions], 1)
                new = scaled_map(weights, at, mitigation.factor, renormalise=mitigation.renormalise)
            case ACT():
                new = act_map(weights, act_sinks(weights, real, mitigation.alpha), mitigation.beta)
            case _:
                raise AssertionError(mitigation)
        if causal and isinstance(mitigation, ZeroTuning | AttentionScaling):
            for row, first in enumerate(places(real, 0).tolist()):
                new[row, :, first] = weights[row, :, first]
        return new

    return rewrite


METHODS = {
    "zero-tuning": ZeroTuning(gamma=2.0, gammas=GAMMAS),
    "knock-out": KnockOut(positions=(0, 3)),
    "scaling": AttentionScaling(factor=3.0, positions=(1, 2, 4)),
    "scaling-unnormalised": AttentionScaling(factor=0.2, positions=(0, 5), renormalise=False),
    "act": ACT(alpha=2.5, layers=range(LAYERS)),
}
