"""Models whose blocks accelerate keeps on disk are traced, too; what needs weights after a block has run is unknown."""

from __future__ import annotations

import numpy as np
import pytest

from sinklens.models.opening import open_model
from sinklens.tracers import signals as sig
from sinklens.tracers.executor import trace

from .cases import PLAN, differences, in_memory, prompts, saved

LACKING = {
    "write_neuron",
    "write_neuron_value",
    *(f"{name} is missing" for name in ("head_output_norm", "value_out_norm", "value_out_norm_mean")),
}


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_offloaded_to_disk(family, tmp_path):
    import transformers

    folder = saved(family, tmp_path / "model")
    place = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu", "model.rotary_emb": "cpu"}
    place |= {f"model.layers.{layer}": "disk" for layer in range(4)}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, device_map=place, offload_folder=tmp_path / "offload"
    )
    found = trace(open_model(model), prompts((23, 17)), PLAN)
    different = {
        name.partition("/")[2]
        for name in differences(trace(in_memory(family), prompts((23, 17)), PLAN), found)
    }
    assert different == LACKING | ({"write_expert", "write_expert_value"} if family == "qwen3_moe" else set())
    for record in found:
        assert (record[sig.WRITE_NEURON] == -1).all()
        assert np.isnan(record[sig.WRITE_NEURON_VALUE]).all()
