"""What is handed on between two blocks, and what they showed: in memory within a budget, on disk beyond it.

With a run folder both are written there after every block, to go on from. What blocks showed is needed again when a
batch has passed the last of them; it goes out of memory before states do, which every block needs.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from sinklens.core.errors import ResourceError
from sinklens.models.spec import OpenedModel
from sinklens.models.streaming import StreamedBlocks
from sinklens.models.streaming.passed import Passed

from ..ledger import Arrays
from ..own_memory import in_own_memory
from ..store import STREAMING, RunStore
from .carried import carried_by, give_back, pack, unpack
from .steps import Alone

if TYPE_CHECKING:
    from .sweep import Journey

PROBE = "probe"


class Kept:
    """What the last block handed on of all batches of a sweep: "states" for short.

    Attributes:
        folder: Where they are written; None if they stay in memory.
        first: The first block that some batch of any process still has to pass.
        probe: What the last block before it handed on of the probe.
        sizes: Bytes by batch: expected before the first block, found after each.
        shown: Bytes in memory of what blocks showed, of all batches.
    """

    def __init__(
        self,
        opened: OpenedModel,
        journeys: Sequence[Journey],
        store: RunStore | None,
        budget: int,
        steps: Alone,
    ) -> None:
        self.steps, self.first = steps, 0
        self.opened, self.journeys, self.store, self.budget = opened, journeys, store, budget
        assert opened.blocks is not None
        self.form_of = opened.blocks
        self.probe: Passed | None = None
        self.sizes = {journey.name: self._size(journey) for journey in journeys}
        self.in_memory = _within(self.sizes, budget)
        self.folder: Path | None = None if store is None else store.folder / STREAMING
        self._temporary: Path | None = None
        self.shown = 0
        self._away: dict[str, set[int]] = {journey.name: set() for journey in journeys}
        self._room_known = False

    def _size(self, journey: Journey) -> int:
        itemsize = next(self.opened.module.parameters()).dtype.itemsize
        tokens = journey.batch.valid.numel() if journey.batch.valid is not None else 0
        return tokens * self.opened.anatomy.main.hidden_size * itemsize

    def open(self) -> None:
        """Make the folder, and take up what an interrupted sweep left there.

        Raises:
            ResourceError: The states do not fit on the disk.
        """
        if self.folder is None and len(self.in_memory) < len(self.sizes):
            self._make_room()
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._temporary is None:
            for journey in self.journeys:
                self._take_up(journey)
            self.first = self.steps.least("first", min(journey.done for journey in self.journeys))
            self._take_up_probe()
        self._refuse_full_disk()

    def _make_room(self) -> None:
        self._temporary = self.folder = Path(tempfile.mkdtemp(prefix="sinklens-states-"))

    def _refuse_full_disk(self) -> None:
        assert self.folder is not None
        writes = (
            self.sizes
            if self.store is not None
            else {n: self.sizes[n] for n in self.sizes.keys() - self.in_memory}
        )
        needed = sum(writes.values()) + max(writes.values(), default=0)
        if self._temporary is None:
            # The others write there as soon as all have asked for room.
            written = sum(path.stat().st_size for path in self.folder.iterdir())
            needed = self.steps.total("states", needed) - written
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            place = "the run folder" if self._temporary is None else str(self.folder.parent)
            raise ResourceError(
                f"The states between two blocks need {needed / 1e9:.1f} GB on disk; {free / 1e9:.1f} GB are free.",
                detail=f"They are written to {place}, and removed at the end.",
                hint="Free some space, choose another --out, or take fewer or shorter prompts (-n, --seq-len).",
            )

    def passed(self, journey: Journey) -> Passed | None:
        """What the last block handed on."""
        if journey.done == 0 or journey.passed is not None:
            return journey.passed
        return self._unpacked(*self._read(journey.name))

    def keep(self, journey: Journey) -> None:
        """A batch has passed a block."""
        assert journey.passed is not None
        self.sizes[journey.name] = journey.passed.nbytes
        self.in_memory = _within(self.sizes, self.budget)
        held = journey.name in self.in_memory and journey.towers.nbytes + self._held() <= self.budget
        if not held:
            journey.towers.forget()
        if self.store is not None:
            self._write(journey)
        for other in self.journeys:  # those that had room before this one grew, too
            if other.passed is not None and other.name not in self.in_memory:
                if self.store is None:
                    self._write(other)
                other.passed = None
        self._put_away(journey)

    def _put_away(self, journey: Journey) -> None:
        """What the block just passed showed: into memory of its own, or onto the disk where the budget is used up."""
        ledger, layer = journey.recorder.ledger, journey.done - 1
        arrays = ledger.shown(layer)
        size = sum(array.nbytes for array in arrays.values())
        self._refuse_too_much(journey, size)
        if self._held() + self.shown + size <= self.budget:
            ledger.recall(layer, in_own_memory(arrays))
            self.shown += size
            return
        if self.store is None:  # else it is there already
            self._write_shown(journey.name, layer, arrays)
        ledger.forget(layer)
        self._away[journey.name].add(layer)

    def _refuse_too_much(self, journey: Journey, size: int) -> None:
        """After the first block of the first batch it is known what all will show: refuse what the disk cannot take."""
        if self._room_known:
            return
        self._room_known = True
        mine, everyone = sum(map(len, journey.group)), sum(len(p) for one in self.journeys for p in one.group)
        left = size * everyone / mine * (len(self.form_of) - journey.done)
        needed = left if self.store is not None else left + sum(self.sizes.values()) - self.budget
        free = shutil.disk_usage(self.folder or tempfile.gettempdir()).free
        if needed > free:
            raise ResourceError(
                f"What the blocks show needs {needed / 1e9:.1f} GB on disk; {free / 1e9:.1f} GB are free.",
                detail="It is kept until the last block has run, and removed then.",
                hint="Free some space, choose another --out, or take fewer or shorter prompts (-n, --seq-len).",
            )

    def bring_back(self, journey: Journey) -> None:
        """All that blocks showed of a batch, for its records."""
        for layer in sorted(self._away[journey.name]):
            journey.recorder.ledger.recall(layer, self._piece(journey.name, layer))

    def _held(self) -> int:
        """Bytes of all states that may be in memory, and of what other towers gave."""
        states = sum(self.sizes[name] for name in self.in_memory)
        return states + sum(journey.towers.nbytes for journey in self.journeys)

    def keep_probe(self, done: int, passed: Passed | None) -> None:
        """The probe has passed a block; what it was before that is kept until all batches have passed, too."""
        if self.store is not None and self.folder is not None and passed is not None:
            tensors, packed = self._packed(passed)
            self._save(_probe_at(done), tensors, {"form": self.form_of.form, "passed": packed})
            (self.folder / f"{_probe_at(done - 2)}.safetensors").unlink(missing_ok=True)

    def discard(self) -> None:
        """The sweep is over: nothing of it is needed on disk."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def close(self) -> None:
        """Leave nothing outside the run folder."""
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)

    # files -----------------------------------------------------------------------------------------------------

    def _write(self, journey: Journey) -> None:
        """With a run folder what the block just passed showed, in a file of its own; then what is handed on."""
        assert journey.passed is not None
        if self.folder is None:
            self._make_room()
        tensors, packed = self._packed(journey.passed)
        if self.store is not None:
            layer = journey.done - 1
            self._write_shown(journey.name, layer, journey.recorder.ledger.shown(layer))
            carried = pack(carried_by(journey.recorder), tensors)
            vision = pack(journey.vision, tensors)
        else:
            carried = vision = None
        about = {
            "prompts": [prompt.index for prompt in journey.group],
            "done": journey.done,
            "form": self.form_of.form,
            "passed": packed,
            "carried": carried,
            "vision": vision,
        }
        self._save(journey.name, tensors, about)

    def _write_shown(self, name: str, layer: int, arrays: Arrays) -> None:
        if self.folder is None:
            self._make_room()
        tensors = {key: torch.from_numpy(np.array(array, order="C")) for key, array in arrays.items()}
        self._save(f"{name}-{layer:04d}", tensors, {})

    def _packed(self, passed: Passed) -> tuple[dict[str, Tensor], Any]:
        """Tensors to be written, and how what was handed on is put together from them."""
        tensors: dict[str, Tensor] = {}
        parts = {"state": passed.state, "others": dict(passed.others), "entries": passed.entries}
        return tensors, pack(parts, tensors, home=self.form_of.device)

    def _unpacked(self, tensors: dict[str, Tensor], about: dict[str, Any]) -> Passed:
        return Passed(**unpack(about["passed"], tensors, self.form_of.device))

    def _save(self, name: str, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
        from safetensors.torch import save

        assert self.folder is not None
        path, data = self.folder / f"{name}.safetensors", save(tensors, metadata={"about": json.dumps(about)})
        if self.store is not None:
            self.store.write_bytes(path, data)
            return
        try:
            path.write_bytes(data)
        except OSError as error:
            raise ResourceError(
                f"What is between two blocks cannot be written: {error.strerror or error}.",
                detail=f"They were to go to {self.folder.parent}, because they exceed the budget.",
                hint="Give a larger --stream-budget, or an --out on a disk with more space.",
            ) from error

    def _read(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        from safetensors import safe_open

        assert self.folder is not None
        with safe_open(self.folder / f"{name}.safetensors", "pt") as file:
            about = json.loads((file.metadata() or {}).get("about", "{}"))
            return {key: file.get_tensor(key).clone() for key in list(file.keys())}, about

    def _take_up(self, journey: Journey) -> None:
        """Go on with a batch where an interrupted sweep left it, if it is the same batch."""
        assert self.folder is not None
        if not (self.folder / f"{journey.name}.safetensors").is_file():
            return
        tensors, about = self._read(journey.name)
        if about.get("prompts") != [prompt.index for prompt in journey.group] or "passed" not in about:
            return
        self._away[journey.name] = set(range(about["done"]))
        give_back(journey.recorder, unpack(about["carried"], tensors, self.form_of.device))
        journey.vision = unpack(about["vision"], tensors, self.form_of.device)
        journey.done, self.form_of.form = about["done"], about["form"]
        passed = self._unpacked(tensors, about)
        self.sizes[journey.name] = passed.nbytes
        self.in_memory = _within(self.sizes, self.budget)
        journey.passed = passed if journey.name in self.in_memory else None

    def _piece(self, name: str, layer: int) -> Arrays:
        return {key: value.numpy() for key, value in self._read(f"{name}-{layer:04d}")[0].items()}

    def _take_up_probe(self) -> None:
        assert self.folder is not None
        name = _probe_at(self.first)
        if (self.folder / f"{name}.safetensors").is_file():
            self.probe = self._unpacked(*self._read(name))


def take_up(blocks: StreamedBlocks, store: RunStore) -> None:
    """Tell the blocks where an interrupted run stopped, before anything is read for its self-check."""
    from safetensors import safe_open

    passed = store.passed_blocks()
    if passed:
        with safe_open(store.folder / STREAMING / f"{_probe_at(passed + 1)}.safetensors", "pt") as file:
            blocks.form = json.loads(file.metadata()["about"])["form"]
        blocks.start = passed


def _probe_at(done: int) -> str:
    return f"{PROBE}-{done:04d}"


def _within(sizes: dict[str, int], budget: int) -> set[str]:
    """The batches whose states stay in memory: as many as the budget allows, in order."""
    chosen, total = set(), 0
    for name, size in sizes.items():
        if total + size <= budget:
            chosen.add(name)
            total += size
    return chosen
