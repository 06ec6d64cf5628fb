"""What a run takes, told from shapes: bytes of records, working memory, and seconds."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

from sinklens.tracers import signals as sig
from sinklens.tracers.executor import TracePlan
from sinklens.tracers.record_vision import vision_tower
from sinklens.tracers.signals import LISTED, PLACED, POSITIONED, Signal, Source
from sinklens.tracers.signals_pictures import LENS, LENS_RANKS, PAIR_SETS, QUERY_SETS, REASONS
from sinklens.tracers.signals_visual import KEY_CLASSES, LEAST_ENERGY, MASS_FLOORS, SHARE_BINS

if TYPE_CHECKING:
    from sinklens.inputs.spec import Prompt, PromptSet
    from sinklens.models.opening import ModelDescription

BYTES = 4
VARIANTS = 2
"""Entries of the `variant` axis: as it is, and without the first token's column."""


def patches_of(prompt: Prompt) -> int:
    """Places that a prompt's pictures take in the vision tower's sequence, 0 for text alone."""
    grids = () if prompt.visual is None else prompt.visual.spans.grids
    return max((int(grid.members.max()) + 1 for grid in grids if grid.members is not None), default=0)


def picture_sizes(prompt: Prompt, hidden: int) -> dict[str, int]:
    """Lengths of the axes that only prompts with pictures have, all 0 for text alone."""
    spans = None if prompt.visual is None else prompt.visual.spans
    tokens = 0 if spans is None else int(spans.visual.sum())
    pictures = 0 if spans is None else len(spans.pictures)
    of_sets = {"sublayer": 2, "trace": 2, "query_set": len(QUERY_SETS), "pair_set": len(PAIR_SETS)}
    return {
        "visual": tokens,
        "picture": pictures,
        "value": 0
        if spans is None
        else min(
            hidden,
            max(
                (
                    sum(int((grid.positions >= 0).sum()) for grid in spans.of_picture(i))
                    for i in range(pictures)
                ),
                default=0,
            ),
        ),
        "patch": patches_of(prompt),
        "reason": len(REASONS),
        **{axis: size if tokens else 0 for axis, size in of_sets.items()},
    }


def large_per_state(hidden: int) -> float:
    """Entries that hold the least energy listed: those of a state of normal numbers, and one that stands out."""
    return 1 + hidden * math.erfc(math.sqrt(LEAST_ENERGY * hidden / 2))


def record_bytes(described: ModelDescription, prompt: Prompt, plan: TracePlan) -> int:
    """Size of one prompt's record on disk, at most: as many positions are kept as may be."""
    kept = min(len(prompt), plan.limits.leading + plan.limits.strongest)
    return _array_bytes(described, prompt, plan, kept)


def shown_bytes(described: ModelDescription, prompt: Prompt, plan: TracePlan) -> int:
    """About what all blocks show of one prompt: which positions are kept is known after the last of them."""
    return _array_bytes(described, prompt, plan, len(prompt))


def _array_bytes(described: ModelDescription, prompt: Prompt, plan: TracePlan, kept_positions: int) -> int:
    tower, vision, length = described.anatomy.main, vision_tower(described.anatomy), len(prompt)
    sizes = {
        "layer": len(tower.blocks),
        "head": tower.heads,
        "kv_head": tower.kv_heads,
        "pos": length,
        "kept": kept_positions,
        "rank": plan.limits.ranks,
        "expert": tower.n_experts,
        "slot": tower.top_k,
        "bin": sig.FIRST_MASS_BINS,
        "reference": sig.REFERENCES,
        "entry": sig.ENTRIES,
        "birth": sig.BIRTHS,
        "part": len(sig.PARTS),
        "row": sig.PREFIX,
        "col": sig.PREFIX,
        "variant": VARIANTS,
        "dim": tower.hidden_size,
        "large": len(tower.blocks) * round(length * large_per_state(tower.hidden_size)),
        "share_bin": SHARE_BINS,
        "floor": len(MASS_FLOORS),
        "key_class": len(KEY_CLASSES),
        "vision_layer": 0 if vision is None else len(vision.blocks),
        "vision_head": 0 if vision is None else vision.heads,
        **picture_sizes(prompt, tower.hidden_size),
    }
    dense = any(block.down_proj or block.shared_down_proj for block in tower.blocks)
    absent = {*([] if dense else [Source.DOWN_PROJ]), *([] if sizes["patch"] else [Source.VISION])}
    kept = [signal for signal in plan.signals if signal.source not in absent]
    lens = {**sizes, "rank": LENS_RANKS}
    return sum(
        _elements(signal, lens if signal in LENS else sizes) * BYTES * _arrays(signal) for signal in kept
    )


def _arrays(signal: Signal) -> int:
    """How many arrays a signal is stored as: its values, and the positions and dims of those that have a place."""
    return 1 + 2 * (signal in PLACED) + (signal in POSITIONED) + (signal in LISTED)


def working_bytes(described: ModelDescription, tokens: int, plan: TracePlan) -> int:
    """Peak beyond the weights for a batch of `tokens`: hidden states, the widest MLP, statistics, scores."""
    tower = described.anatomy.main
    # About six states of the residual width are alive in a block, and two of four times that width in its MLP.
    hidden = tokens * tower.hidden_size * BYTES * (6 + 2 * 4)
    per_key = tokens * tower.heads * len(tower.blocks) * BYTES * 3
    return hidden + per_key + plan.blocks.scores * BYTES * 4


def picture_bytes(described: ModelDescription, prompts: PromptSet, plan: TracePlan) -> int:
    """Peak in the vision tower for the prompt with most patches, and the pixels of the prompt."""
    vision = vision_tower(described.anatomy)
    visual = [prompt for prompt in prompts.prompts if prompt.visual is not None]
    if vision is None or not visual:
        return 0
    patches = max(map(patches_of, visual))
    pixels = max(sum(v.nbytes for v in prompt.visual.inputs.values()) for prompt in visual if prompt.visual)
    per_key = patches * vision.heads * len(vision.blocks) * BYTES
    return patches * vision.hidden_size * BYTES * (6 + 2 * 4) + per_key + 2 * pixels


def _elements(signal: Signal, sizes: dict[str, int]) -> int:
    count = 1
    for axis in signal.axes:
        count *= sizes[axis]
    return count


def seconds_for(described: ModelDescription, tokens: int) -> float:
    """Two operations per active weight and token, at the speed of one matrix product measured now."""
    import torch

    tower, info = described.anatomy.main, described.info
    active = float(info.parameters)
    if tower.n_experts:
        # Nearly all weights of a mixture are in its experts.
        active *= min(1.0, 1.5 * tower.top_k / tower.n_experts)
    a = torch.randn(512, 512)
    start, products = time.perf_counter(), 0
    while time.perf_counter() - start < 0.05:
        torch.mm(a, a)
        products += 1
    speed = products * 2 * 512**3 / (time.perf_counter() - start)
    return 2 * active * tokens / speed
