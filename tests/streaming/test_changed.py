"""What changes a model by its functions works on a streamed one: experts switched off, attention edited, states set."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace

import pytest

from sinklens.tracers.batch import collate
from sinklens.tracers.executor import trace
from sinklens.tracers.interventions import EntriesSet, Entry

from .cases import PLAN, differences, opened, prompts, saved


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved("qwen3_moe", tmp_path_factory.mktemp("moe"))


def _both(folder, change, plan=PLAN):
    """Traces in memory and streamed, with a change on the model, and the one without it."""
    few, found = prompts((23, 17)), []
    for stream in (False, True):
        model = opened(folder, stream=stream)
        with ExitStack() as stack:
            change(model, stack)
            found.append(trace(model, few, plan))
    assert not differences(*found)
    assert differences(found[1], trace(opened(folder), few, PLAN))


def test_ablated_experts(folder):
    _both(folder, lambda *_: None, replace(PLAN, ablate=frozenset({(1, 2), (2, 5)})))


def test_expert_pruning(folder):
    from sinklens.mitigations import ExpertPruning

    pruning = ExpertPruning(experts=((1, 2), (2, 5)))
    _both(folder, lambda model, stack: stack.enter_context(pruning(model)))


def test_attention_edits(folder):
    from sinklens.mitigations import ZeroTuning

    _both(folder, lambda model, stack: stack.enter_context(ZeroTuning(gamma=3.0)(model)))


def test_states_that_are_set(folder):
    entries = EntriesSet((Entry(None, 1, 0, 7, 40.0), Entry(None, 2, 3, 5, -9.0)))

    def change(model, stack):
        acted = stack.enter_context(entries.applied(model, collate(prompts((23, 17)))))
        stack.callback(lambda: pytest.fail("nothing was set") if not acted.edited else None)

    _both(folder, change)
