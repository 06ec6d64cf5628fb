"""The streamed executor: each block is read once, and all batches pass through it before the next one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from sinklens.core.errors import ResourceError, SinklensError
from sinklens.inputs.spec import Prompt
from sinklens.models.spec import OpenedModel
from sinklens.models.streamable import shares_more
from sinklens.models.streaming import StreamedBlocks
from sinklens.models.streaming.passed import Passed, Uncarried, same, same_passed
from sinklens.models.sums import find_sums

from ..attention import sites, unedited
from ..backends import backend_of
from ..batch import Batch, collate, device_of, forward, shortened
from ..executor import TracePlan, recording
from ..record_vision import vision_tap
from ..recorder import Recorder
from ..store import RunStore
from ..trace import PromptRecord
from .kept import Kept
from .steps import Alone
from .walks import OrdinaryPass, Remembered, Replay

Progress = Callable[[int, int], None]


@dataclass
class Journey:
    """One batch on its way through the blocks.

    Attributes:
        done: Blocks it has passed.
        passed: What the last of them handed on; None where it is on disk, or before the first.
        vision: Arrays of the vision tower, of a prompt with pictures.
    """

    group: list[Prompt]
    batch: Batch
    recorder: Recorder
    towers: Remembered
    done: int = 0
    passed: Passed | None = None
    vision: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.group[0].index:06d}"


def trace_streamed(
    opened: OpenedModel,
    groups: Sequence[list[Prompt]],
    plan: TracePlan,
    *,
    store: RunStore | None = None,
    progress: Progress | None = None,
    steps: Alone | None = None,
) -> list[PromptRecord]:
    """Trace batches of prompts through a model whose blocks are on disk.

    Args:
        store: Where finished batches go, and what is needed to go on after an interruption.
        progress: Called with (passed, in all), counted in prompts: one that is half way through counts half.
        steps: Who else goes through the blocks, with which batches; those of this process are traced.

    Raises:
        ModelError: A file of the model cannot be used any more, or the model does not allow streaming.
        ResourceError: Memory or disk do not suffice; what was finished is kept.
    """
    sweep = Sweep(opened, steps or Alone(groups), plan, store, progress)
    try:
        return sweep.run()
    finally:
        sweep.close()


class Sweep:
    """One way through the blocks."""

    def __init__(
        self,
        opened: OpenedModel,
        steps: Alone,
        plan: TracePlan,
        store: RunStore | None,
        progress: Progress | None,
    ) -> None:
        assert opened.blocks is not None
        self.steps = steps
        self.opened, self.plan, self.store, self.progress = opened, plan, store, progress
        self.blocks: StreamedBlocks = opened.blocks
        self.tower = opened.anatomy.main
        self.journeys = [self._journey(group) for group in steps.mine]
        self.kept = Kept(opened, self.journeys, store, self.blocks.budget, steps)
        self.votes: Counter[Any] = Counter()
        self.probe = self._probe()
        self._ordinary: OrdinaryPass | None = None
        self._replayed: Passed | None = None
        self._handed: Collection[int] | None = None
        self._towers = Remembered(opened.module, opened.anatomy)

    def _batch(self, group: list[Prompt]) -> Batch:
        pad = getattr(self.opened.tokenizer, "pad_token_id", None) or 0
        return collate(group, pad_id=pad, device=device_of(self.opened))

    def _journey(self, group: list[Prompt]) -> Journey:
        batch, plan = self._batch(group), self.plan
        recorder = Recorder(batch, len(self.tower.blocks), plan.signals, plan.limits, plan.sinks)
        return Journey(group, batch, recorder, Remembered(self.opened.module, self.opened.anatomy))

    def _probe(self) -> Batch:
        """A short batch that is passed through ordinarily too: with pictures if any prompt has some."""
        groups = self.steps.batches
        pictured = [group for group in groups if any(prompt.visual is not None for prompt in group)]
        return shortened(self._batch(list(min(pictured, key=lambda group: len(group[0]), default=groups[0]))))

    def close(self) -> None:
        if self._ordinary is not None:
            self._ordinary.stop()
        self.blocks.close()
        self.kept.close()

    def run(self) -> list[PromptRecord]:
        self.kept.open()
        first = self.kept.first
        for index in range(first, len(self.blocks)):
            self.steps.reached(index)
            try:
                with self.blocks.loaded(index):
                    self._pass(index, first)
            except Uncarried as error:
                raise shares_more(self.opened.anatomy.family, index) from error
        self.blocks.close()  # records are put together in the room of the blocks
        records = [record for journey in self.journeys for record in self._records(journey)]
        self.steps.reached(len(self.blocks))
        if self.steps.leads:
            self.kept.discard()
        return records

    def _pass(self, index: int, first: int) -> None:
        """All batches through one block, which is in memory."""
        # Without mitigations: some know of one pass at a time, and this one waits while others run.
        with unedited(sites(self.opened.module, self.tower, "attention")):
            self._check(index, first)
        for journey in self.journeys:
            if journey.done <= index:
                self._step(journey, index)
                self.kept.keep(journey)
                self._tell()

    def _tell(self) -> None:
        if self.progress is not None:
            mine = sum(len(journey.group) * journey.done for journey in self.journeys)
            self.progress(self.steps.passed(mine) // len(self.blocks), self.steps.prompts)

    def _only(self, index: int) -> OpenedModel:
        """The model as if it had one block: taps are put on that one."""
        anatomy = self.opened.anatomy
        alone = replace(self.tower, blocks=(self.tower.blocks[index],))
        towers = tuple(alone if tower is self.tower else tower for tower in anatomy.towers)
        return replace(self.opened, anatomy=replace(anatomy, towers=towers))

    def _step(self, journey: Journey, index: int) -> None:
        """Pass one batch through one block, recording."""
        opened, plan, batch = self._only(index), self.plan, journey.batch
        replay = Replay(self.blocks, index, self.kept.passed(journey))
        try:
            with ExitStack() as stack:
                stack.enter_context(recording(opened, batch, plan, journey.recorder))
                vision = stack.enter_context(vision_tap(opened, batch, plan)) if index == 0 else None
                stack.enter_context(journey.towers.at_hand())
                backend = backend_of(opened)
                left = replay.run(lambda: backend.forward(opened, batch, logits=False))
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise self._out_of_memory(journey, index) from error
        if vision is not None:
            visual = batch.prompts[0].visual
            journey.vision = vision.arrays(None if visual is None else visual.objects)
        journey.done = index + 1
        last = journey.done == len(self.blocks)
        journey.passed = Passed(left.state) if last else left.with_others(self._handed)

    def _out_of_memory(self, journey: Journey, index: int) -> ResourceError:
        longest = max(len(prompt) for prompt in journey.group)
        return ResourceError(
            f"Out of memory in block {index}, in a batch of {len(journey.group)} x {longest} tokens.",
            detail=None if self.store is None else "What passed the blocks before is saved.",
            hint=f"Try: --batch-size 1, or --seq-len {max(32, longest // 2)}, or a smaller --stream-budget",
        )

    def _check(self, index: int, first: int) -> None:
        """Pass the probe through a block twice, ordinarily and replayed, and look for what the block adds."""
        module, block = self.opened.module, self.tower.blocks[index]

        def run() -> Any:
            return forward(module, self.probe, logits=False)

        if self._ordinary is None:
            self._replayed = self.kept.probe if first else None
            if first and self._replayed is None:
                return
            self._ordinary = OrdinaryPass(self.blocks, run, first, self._replayed)
        entering, left = self._ordinary.advance(index)
        replay = Replay(self.blocks, index, self._replayed, copied=True)
        try:
            with self._towers.at_hand(), torch.no_grad():
                if any(j.recorder.states.closely for j in self.journeys) and not block.sum.checked:
                    alone = self._only(index).anatomy.main
                    find_sums(module, alone, lambda: replay.run(run), self.votes)
                else:
                    replay.run(run)
        except (SinklensError, Uncarried, torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:  # the ordinary pass went through, so this is for want of something it has
            raise shares_more(self.opened.anatomy.family, index) from error
        self._handed = left.others.keys()
        replayed = replay.left and replay.left.with_others(self._handed)
        if not same(replay.entering, entering) or not same_passed(replayed, left):
            raise shares_more(self.opened.anatomy.family, index)
        self._replayed = replayed
        if self.steps.leads:
            self.kept.keep_probe(index + 1, self._replayed)

    def _records(self, journey: Journey) -> list[PromptRecord]:
        self.kept.bring_back(journey)
        records = journey.recorder.records()
        journey.recorder.ledger.seen.clear()
        if journey.vision:
            records[0].arrays.update(journey.vision)
        if self.store is not None:
            self.store.append(records)
        return records
