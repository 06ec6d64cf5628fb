"""What a trace records of prompts with pictures is that of the maps as the mitigations left them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from sinklens.inputs.spans import Kind
from sinklens.mitigations import GIFT, PAI, PAINT, VAR, LearnedSink, Mitigation, SinkGating
from sinklens.models.spec import OpenedModel
from sinklens.tracers import signals as sig
from sinklens.tracers import signals_pictures as pic
from sinklens.tracers.attention import Mode
from sinklens.tracers.batch import collate, forward
from sinklens.tracers.executor import TracePlan, trace
from sinklens.tracers.sink_dims import SinkDims, SinkRule
from tests.mitigations.test_var import DIMS, TAU
from tests.pictures import opened_vlm, picture_prompt

METHODS: dict[str, Any] = {
    "var": VAR(dims=DIMS, tau=TAU, rho=0.3, floor=0.05),
    "sink-gating": SinkGating(sink=0.2, rest=2.5, dims=DIMS, tau=TAU),
    "pai": PAI(alpha=0.9, start=0),
    "gift": GIFT(saliency=0, layers=(1, 2, 3)),
    "paint": PAINT(start=0),
    "learned-sink": LearnedSink(logit=1.0, replaces=(0,)),
}
CASES = [
    (family, name) for name in METHODS for family in ("llava", "qwen2_5_vl", "gemma3")
    if name != "paint" or family == "llava"
]  # fmt: skip


def maps(family: str, method: Any, prompt: Any) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Maps that an eager model hands out under the method, and without it."""
    model = opened_vlm(family, eager=True)
    batch = collate([prompt])
    batch.inputs["output_attentions"] = True
    plain = [a[0].double() for a in forward(model.module, batch).attentions]
    with method(model.module) as effect:
        found = [a[0].double() for a in forward(model.module, batch).attentions]
    assert effect.acted
    return found, plain


def recorded(model: OpenedModel, method: Mitigation, prompt: Any, mode: Mode) -> Any:
    rule = SinkRule(SinkDims.given(DIMS, model.info.hidden_size), TAU)
    with method(model):
        found = trace(model, [prompt], TracePlan(sinks=rule, mode=mode))
    assert found.tracing["mitigations"][0]["name"] == method.name
    return found.records[0]


@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize(("family", "name"), CASES)
def test_records_are_those_of_the_edited_maps(family: str, name: str, mode: Mode) -> None:
    method, prompt = METHODS[name], picture_prompt(family, 19)
    assert prompt.visual is not None
    spans = prompt.visual.spans
    text, visual = spans.is_(Kind.QUESTION).nonzero()[0], spans.visual.nonzero()[0]
    edited, plain = maps(family, method, prompt)
    record = recorded(opened_vlm(family), method, prompt, mode)
    apart = 0.0
    for layer, weights in enumerate(edited):
        a = weights.numpy()
        apart = max(apart, float(np.abs(a - plain[layer].numpy()).max()))
        received = record[pic.QUERIES_RECEIVED][layer]
        np.testing.assert_allclose(received[0], a[:, text].mean(0).sum(0), atol=3e-5)
        np.testing.assert_allclose(received[1], a[:, -1].mean(0), atol=1e-5)
        rises = np.maximum(np.diff(a[:, text][:, :, visual], axis=1), 0)
        kept = np.argsort(-rises.sum((1, 2)), kind="stable")[: len(a) // 2]
        np.testing.assert_allclose(record[pic.GAZE_SHIFT][layer], rises[kept].mean((0, 1)), atol=1e-5)
        sink = record[sig.PHI][layer] >= TAU
        on_pictures = a[:, text][..., visual].sum(-1).mean(-1)
        masses = record[sig.KEY_CLASS_MASS][layer]
        np.testing.assert_allclose(masses[:, 0] + masses[:, 1], on_pictures, atol=3e-6)
        on_sinks = a[:, text][..., spans.visual & sink].sum(-1).mean(-1)
        np.testing.assert_allclose(masses[:, 1], on_sinks, atol=3e-6)
    assert apart > 1e-2
