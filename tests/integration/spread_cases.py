"""Models that are spread over two processes in tests, and the prompts they read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import sinklens
from sinklens.inputs.spec import Prompt
from sinklens.testbeds.controls import random_control
from sinklens.testbeds.planting.plant import plant
from sinklens.testbeds.planting.truth import MassivePlant, SecondaryPlant, SuperExpertPlant
from sinklens.tracers.attention import Mode
from sinklens.tracers.executor import TracePlan
from tests.testbeds.families import BOS, VOCABULARY, tiny, tiny_config

BUNDLED = str(Path(sinklens.__file__).parent / "checkpoints" / "moe-ind")
ANALYZERS = ("primary-sinks", "massive-activations", "super-experts", "causal-effects")
TEXTS = [
    "A bird sat on the wall and sang for a while. Nobody in the house heard it, for all of them were at the table, and "
    "the window was closed against the wind that came over the sea.",
    "When the rain had passed she went down to the river, where the boats lay one beside the other in the mud, and "
    "counted them as she did every evening since the bridge was gone.",
]
TOKEN = 33
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def planted(family: str, **changes: Any) -> Any:
    """A massive dim of BOS in block 1 and a secondary sink two blocks later, so that there are births and writers."""
    model = tiny(family, 1, **HEADS, **changes)
    secondary = [SecondaryPlant(3, token=TOKEN, lifetime=2, expert=3 if "moe" in family else None)]
    if "moe" in family:
        experts = [SuperExpertPlant(1, 1, 11, layer_out=5, magnitude=700.0)]
        plant(model, super_experts=experts, secondary=secondary, seed=1)
    else:
        plant(model, massive=[MassivePlant(11, 1, layer_out=5, magnitude=700.0)], secondary=secondary, seed=1)
    return model


def plain(family: str, **changes: Any) -> Any:
    """A random model whose feed-forward parts write enough to be looked into."""
    model = random_control(tiny_config(family, **HEADS, **changes), 5)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".mlp." in name and weight.ndim > 1:
                weight.mul_(5)
    return model


CASES = {
    # 77 neurons: 39 in one process and 38 in the other.
    "llama": lambda: planted("llama"),
    "qwen3_moe": lambda: planted("qwen3_moe", moe_intermediate_size=40),
    # Soft caps, sliding windows, norms after the sublayers; one pass for output and statistics.
    "gemma2_fused": lambda: plain("gemma2", sliding_window=7),
    # The plan joins all heads before the attention, and all neurons before the down projection.
    "phi3": lambda: plain("phi3", hidden_size=56),
}


def plan_of(name: str) -> TracePlan:
    """Everything, two prompts at a time."""
    return TracePlan(batch_prompts=2, mode=Mode.FUSED if name.endswith("_fused") else Mode.FAITHFUL)


def prompts() -> list[Prompt]:
    """Co-prime lengths, so that the first batch is padded; BOS first, and the other target twice."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for index, length in enumerate((53, 37, 23)):
        ids = torch.randint(40, VOCABULARY - 3, (length,), generator=generator)
        ids[0], ids[[11, 19]] = BOS, TOKEN
        pieces = tuple(str(token) for token in ids.tolist())
        found.append(Prompt(index, tuple(ids.tolist()), pieces, f"prompt:{index}"))
    return found
