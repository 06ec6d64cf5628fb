"""Models whose late blocks read what earlier ones wrote: what is measured is theirs, is self-checked, can be edited."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sinklens.models.opening import open_model
from sinklens.tracers.batch import collate
from sinklens.tracers.executor import TracePlan, trace
from sinklens.tracers.interventions import EntriesSet, Entry
from sinklens.tracers.selfcheck import self_check
from sinklens.tracers.streaming.check import check_streamed

from . import sharing
from .cases import PLAN, differences, opened, prompts

ONE = TracePlan(batch_prompts=1)


@pytest.fixture(scope="module", params=list(sharing.SHARING))
def name(request: Any) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sharing.saved(name, tmp_path_factory.mktemp(name))


def test_measured_is_what_transformers_says(name: str, folder: Path) -> None:
    """Attention to the keys that a block really reads; norms of all positions in the blocks that read them, too."""
    few, plain = prompts((23,)), sharing.build(name)
    record = trace(opened(folder), few, ONE).records[0]
    plain.set_attn_implementation("eager")
    with torch.no_grad():
        ids = torch.tensor([few[0].token_ids])
        out = plain(input_ids=ids, output_attentions=True, output_hidden_states=True, use_cache=False)
    maps = torch.stack([one[0] for one in out.attentions]).double().numpy()
    received = record.arrays["attention_received"]
    assert received.shape == (sharing.LAYERS, 4, 23)
    seen = (maps > 0).sum(2)  # an indexer may leave a key out for all queries
    np.testing.assert_allclose(received, maps.sum(2) / seen.clip(min=1), rtol=2e-4, atol=2e-5)
    states = [state[0] for state in out.hidden_states[1:-1]]  # the last one is normed
    states = [state[0] if state.ndim == 3 else state for state in states]  # the first of four streams
    norms = torch.stack([state.norm(dim=-1) for state in states]).numpy()
    np.testing.assert_allclose(record.arrays["residual_norm"][:-1], norms, rtol=2e-5)


def test_self_check(name: str, folder: Path) -> None:
    plan = replace(PLAN, own_experts=True)
    few = prompts((23, 17))
    held = {check.name for check in self_check(open_model(sharing.build(name)), few, plan)}
    streamed = check_streamed(opened(folder), few, plan)
    assert [check for check in streamed if not check.passed] == []
    assert held <= {check.name for check in streamed}


def test_attention_edits_and_states_that_are_set(name: str, folder: Path) -> None:
    from sinklens.mitigations import ZeroTuning

    few = prompts((23, 17))
    entries = EntriesSet((Entry(None, 1, 0, 7, 40.0), Entry(None, 4, 3, 5, -9.0)))
    for change in (lambda model: ZeroTuning(gamma=3.0)(model), lambda m: entries.applied(m, collate(few))):
        found = []
        for model in (open_model(sharing.build(name)), opened(folder)):
            with ExitStack() as stack:
                stack.enter_context(change(model))
                found.append(trace(model, few, PLAN))
        assert not differences(*found)
        assert differences(found[1], trace(opened(folder), few, PLAN))


def test_a_set_entry_is_in_the_stream_that_is_measured(name: str) -> None:
    model, few = open_model(sharing.build(name)), prompts((23,))
    with EntriesSet((Entry(None, 2, 3, 5, 700.0),)).applied(model, collate(few)):
        record = trace(model, few, ONE).records[0]
    top = record.arrays
    assert (top["residual_top_pos"][2, 0], top["residual_top_dim"][2, 0]) == (3, 5)
    assert top["residual_top"][2, 0] == 700.0


@pytest.mark.parametrize(
    ("name", "expected"),
    [("gemma3n", 4 * 256 + 2 * 256), ("gemma4", 256 + 256 + 384), ("mistral_large4", 256 + 80 + 112 + 24)],
)
def test_what_will_be_handed_on_is_told_before(name: str, expected: int, tmp_path: Path) -> None:
    """A state, keys and values of each kind, the tokens of an indexer; and that is what a run keeps at most."""
    from sinklens.models.opening import describe_model
    from sinklens.pipeline.options import ProfileOptions
    from sinklens.pipeline.plan import predict

    folder = str(sharing.saved(name, tmp_path))
    assert describe_model(folder).handed_bytes == expected
    few: dict[str, Any] = {"n": 2, "seq_len": 16, "analyzers": ("massive-activations",), "verify": False}
    stream = predict(folder, ProfileOptions(stream="on", **few))[2].stream
    assert stream is not None
    assert stream.states == 2 * 16 * expected
