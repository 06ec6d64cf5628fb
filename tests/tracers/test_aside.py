from __future__ import annotations

from typing import Any

import pytest
import torch

from sinklens.mitigations import ZeroTuning
from sinklens.models.anatomy import find_anatomy
from sinklens.tracers.aside import aside
from sinklens.tracers.attention import AttentionTap, ignore, no_statistics, sites
from sinklens.tracers.experts import ExpertsTap
from sinklens.tracers.states import input_tap
from tests.families import build, inputs
from tests.mitigations.test_with import logits, state


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "llava"])
def test_nothing_sees_it_and_everything_comes_back(family: str) -> None:
    model, given = build(family), inputs(family, padding="left")
    real = given["attention_mask"] != 0
    plain = logits(build(family), given)
    tower = find_anatomy(model).main
    where = sites(model, tower, "attention")
    seen: list[Any] = []
    user = model.register_forward_hook(lambda *_: seen.append("user"))
    attention = AttentionTap(where, no_statistics, ignore)
    experts = ExpertsTap(sites(model, tower, "experts"), lambda *_: seen.append("experts"))
    with (
        ZeroTuning(gamma=4.0)(model),
        attention.attached(model),
        input_tap(model, tower, lambda *_: seen.append("input")),
        experts.attached(),
    ):
        edited = logits(model, given)
        heard, before, calls = len(seen), state(model), attention.calls
        with aside(model):
            inner = AttentionTap(where, no_statistics, ignore)
            with inner.attached(model):
                torch.testing.assert_close(logits(model, given)[real], plain[real], rtol=0, atol=1e-5)
            model.lm_head.register_forward_hook(lambda *_: seen.append("late"))
        assert inner.calls == calls == attention.calls
        assert seen[heard:] == ["user"]
        assert state(model)[1:] == before[1:]
        assert torch.equal(logits(model, given), edited)
        assert {"input", "late", "user"} <= set(seen[heard + 1 :])
        assert ("experts" in seen[heard + 1 :]) == (family != "llava")
    user.remove()
    with pytest.raises(ZeroDivisionError), ZeroTuning()(model), aside(model):
        raise ZeroDivisionError
    assert state(model)[1:] == state(build(family))[1:]
