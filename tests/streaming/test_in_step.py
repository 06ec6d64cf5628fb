"""Several that go through the blocks in step trace what one traces, bit for bit, whatever is carried between blocks."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch.distributed as dist

from sinklens.tracers.executor import empty_trace, partition, trace
from sinklens.tracers.store import STREAMING, RunStore
from sinklens.tracers.streaming import InStep, trace_streamed
from sinklens.tracers.team import Elsewhere, Team

from . import cases, sharing
from .cases import PLAN, differences, opened, prompts


def saved(family, folder):
    return sharing.saved(family, folder) if family in sharing.SHARING else cases.saved(family, folder)


def together(folder, size, *, store=None, stops=None):
    """The merged trace of `size` members, each with a model of its own; and the blocks that each loaded.

    Args:
        stops: The block before which the last member gives up.
    """
    common: Any = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    groups = partition(prompts(), most=PLAN.batch_prompts, tokens=PLAN.batch_tokens)

    models = [opened(folder) for _ in range(size)]
    one_runs = threading.Lock()  # they stand for processes, which share nothing but what they tell each other

    def member(rank):
        model = models[rank]
        try:
            with Team(common, rank, size) as team, one_runs:
                steps = Waiting(team, groups, one_runs)
                if stops is not None and rank == size - 1:
                    _stopping(steps, stops)
                if not steps.mine:
                    return [], model.blocks.loads
                done = trace_streamed(model, groups, PLAN, store=store, progress=lambda *_: None, steps=steps)
                return done, model.blocks.loads
        except Exception as error:
            return error, model.blocks.loads

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(member, range(size)))


class Waiting(InStep):
    """Lets the others run while it waits for them."""

    def __init__(self, team, groups, running):
        super().__init__(team, groups)
        self.running = running

    def _agree(self, name, mine):
        self.running.release()
        try:
            return super()._agree(name, mine)
        finally:
            self.running.acquire()


def _stopping(steps, block):
    own = steps.reached

    def reached(index):
        if index == block:
            raise MemoryError
        own(index)

    steps.reached = reached


def merged(folder, members):
    result = empty_trace(opened(folder), PLAN)
    result.records = sorted((r for records, _ in members for r in records), key=lambda r: r.index)
    return result


@pytest.mark.parametrize(("family", "size"), [("qwen3_moe", 2), ("gemma3n", 2), ("llama", 5)])
def test_members_trace_what_one_traces(family, size, tmp_path):
    folder = saved(family, tmp_path / "model")
    members = together(folder, size)
    assert not differences(trace(opened(folder, stream=False), prompts(), PLAN), merged(folder, members))
    takes_part = [bool(records) for records, _ in members]
    assert takes_part == [True] * min(size, 3) + [False] * (size - min(size, 3))  # three batches there are
    for taken, (_, loads) in zip(takes_part, members, strict=True):
        assert loads == [int(taken)] * len(loads)


@pytest.mark.parametrize(("family", "size"), [("qwen3_moe", 3), ("gemma3n", 1)])
def test_another_number_goes_on_where_one_gave_up(family, size, tmp_path):
    folder, store = saved(family, tmp_path / "model"), RunStore(tmp_path / "run")
    store.create()
    first, last = together(folder, 2, store=store, stops=2)
    assert isinstance(first[0], Elsewhere)
    assert isinstance(last[0], MemoryError)
    assert store.passed_blocks() == 1
    members = together(folder, size, store=store)
    assert not differences(trace(opened(folder, stream=False), prompts(), PLAN), merged(folder, members))
    assert all(loads[:2] == [0, 0] for _, loads in members)
    assert not (store.folder / STREAMING).exists()
