"""Many and large pictures: no map of tokens by tokens, and no pixels beyond what a set may hold."""

# pyright: reportOptionalMemberAccess=false

from __future__ import annotations

import pytest

from sinklens.inputs.vision import again, load_pictures
from sinklens.kernels.spec import BlockPlan
from sinklens.kernels.workspace import workspace
from sinklens.models.opening import open_model
from sinklens.tracers import signals as sig
from sinklens.tracers.batch import collate
from sinklens.tracers.executor import TracePlan, trace_batch
from tests.inputs.vision.painting import noise
from tests.kernels.test_memory import Largest
from tests.vlms import build, processor


def test_pixels_beyond_the_budget_are_made_again_and_equal(monkeypatch):
    made, config = processor("qwen2_5_vl"), build("qwen2_5_vl").config
    pictures = [noise(32, 48, seed) for seed in range(4)]
    kept = load_pictures(pictures, made, config, question="what ?").prompts
    size = sum(value.nbytes for value in kept[0].visual.inputs.values())
    monkeypatch.setattr(again.Store.__init__, "__defaults__", (2 * size,))
    lazy = load_pictures(pictures, made, config, question="what ?").prompts
    assert [isinstance(prompt.visual.inputs, again.Again) for prompt in lazy] == [False, False, True, True]
    for one, other in zip(kept, lazy, strict=True):
        assert list(one.visual.inputs) == list(other.visual.inputs)
        for name, value in other.visual.inputs.items():
            assert value.equal(one.visual.inputs[name])


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava_next"])
def test_the_largest_tensor_grows_with_the_tokens(name):
    """Not with their square: neither in the language model nor where a picture's patches attend to each other."""
    model, made = build(name), processor(name)
    if name == "qwen2_5_vl":
        made.image_processor.size = {"shortest_edge": 64, "longest_edge": 10**6}
    opened = open_model(model)
    of_pictures = {signal for signal in sig.ALL_SIGNALS if signal.source is sig.Source.VISION}
    signals = frozenset({sig.ATTENTION_RECEIVED, sig.RESIDUAL_NORM, *of_pictures})
    plan = TracePlan(signals, blocks=BlockPlan(scores=20_000))
    found = {}
    for count in (2, 5):
        pictures = [noise(96, 160, seed) for seed in range(count)]
        batch = collate(load_pictures([pictures], made, model.config, question="what ?").prompts)
        workspace().release()
        trace_batch(opened, batch, plan, logits=False)
        with Largest() as largest:
            trace_batch(opened, batch, plan, logits=False)
        found[batch.inputs["input_ids"].shape[1]] = largest.elements
    (few, small), (many, large) = found.items()
    assert large / small <= 1.1 * many / few
