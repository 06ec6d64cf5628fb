"""Prompts with pictures: models that add them between blocks, and vision towers that run once per prompt."""

from __future__ import annotations

from typing import Any

import pytest

from sinklens.inputs.vision import load_pictures
from sinklens.models.opening import open_model
from sinklens.tracers.executor import TracePlan, trace
from sinklens.tracers.signals_vision import VISION_NORM
from sinklens.tracers.store import RunStore
from tests.inputs.vision.painting import noise
from tests.vlms import VLMS, build, processor

from .cases import differences

PLAN = TracePlan()


@pytest.fixture(scope="module", params=list(VLMS))
def case(request, tmp_path_factory):
    """The model in memory and in a folder, and prompts with one picture and with two."""
    folder = tmp_path_factory.mktemp(request.param)
    model, reader = build(request.param), processor(request.param)
    model.save_pretrained(folder)
    reader.tokenizer.save_pretrained(folder)
    shown = [noise(30, 50, 1), [noise(70, 33, 2), noise(30, 50, 3)]]
    prompts = load_pictures(shown, reader, model.config, question="how many ?").prompts
    return open_model(model, processor=reader), str(folder), prompts


def test_equal_with_pictures(case):
    reference, folder, prompts = case
    model: Any = open_model(folder, stream=True)
    ran = _counted(model)
    found = trace(model, prompts, PLAN)
    assert VISION_NORM in found.signals
    assert not differences(trace(reference, prompts, PLAN), found)
    assert model.blocks.loads == [1] * len(model.blocks)
    # Once for each prompt, and for the pass that replays are held against and the replay of its prompt.
    assert len(ran) == len(prompts) + 2


def _counted(model: Any) -> list[int]:
    """Grows by one each time the vision tower runs."""
    ran: list[int] = []
    first = next(tower for tower in model.anatomy.towers if tower is not model.anatomy.main).blocks[0]
    model.module.get_submodule(first.path).register_forward_hook(lambda *_: ran.append(1))
    return ran


def test_an_interrupted_sweep_goes_on_with_pictures(case, tmp_path):
    reference, folder, prompts = case
    store, calls = RunStore(tmp_path / "run"), []
    store.create()

    def stop(*_: int) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trace(open_model(folder, stream=True), prompts, PLAN, store=store, progress=stop)
    model: Any = open_model(folder, stream=True)
    assert not differences(trace(reference, prompts, PLAN), trace(model, prompts, PLAN, store=store))
    assert model.blocks.loads[0] == 0
