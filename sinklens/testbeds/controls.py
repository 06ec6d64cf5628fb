"""Models in which there is nothing to find: what a detector must stay silent on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .blocks import decoder_layers

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def random_control(config: PretrainedConfig, seed: int = 0) -> PreTrainedModel:
    """An untrained model in float32 and eval mode; the caller's random state is left as it was."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def uniform_control(config: PretrainedConfig, seed: int = 0) -> PreTrainedModel:
    """The same with queries of 0: every head attends to all visible tokens alike, exactly."""
    model = random_control(config, seed)
    with torch.no_grad():
        for layer in decoder_layers(model):
            layer.query.clear(slice(None))
    return model


def one_layer_control(config: PretrainedConfig, seed: int = 0) -> PreTrainedModel:
    """One block: nothing can be written in one block and read in a later one."""
    import copy

    shallow = copy.deepcopy(config)
    shallow.num_hidden_layers = 1
    if getattr(shallow, "layer_types", None):
        shallow.layer_types = shallow.layer_types[:1]
    return random_control(shallow, seed)
