"""Blocks that read what earlier ones wrote are streamed, too: it is carried beside the state, and nothing else is."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

from sinklens.core.errors import ModelError
from sinklens.models.opening import open_model
from sinklens.models.streaming.sampling import samples
from sinklens.tracers.executor import trace
from sinklens.tracers.store import STREAMING, RunStore
from sinklens.tracers.trace import Trace

from . import cases, sharing
from .cases import PLAN, differences, opened, prompts

FEW = (23, 17, 9, 31)


class Case:
    """A model in a folder, and its trace in memory."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, sharing.saved(name, folder)
        self.expected: Trace = trace(open_model(sharing.build(name)), prompts(FEW), PLAN)


@pytest.fixture(scope="module", params=list(sharing.SHARING))
def case(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(request.param, tmp_path_factory.mktemp(request.param))


def test_equal(case: Case) -> None:
    model = opened(case.folder)
    found = trace(model, prompts(FEW), PLAN)
    assert len(found.signals) > 30
    assert not differences(case.expected, found)
    assert model.blocks.loads == [1] * sharing.LAYERS


@pytest.mark.parametrize("budget", [0, 60_000])
def test_equal_whatever_is_spilled(
    case: Case, budget: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sinklens.tracers.streaming.kept import Kept

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model, held, keep = opened(case.folder), [], Kept.keep
    model.blocks.budget = budget

    def watched(self: Kept, journey: Any) -> None:
        keep(self, journey)
        held.append(sum(one.passed.nbytes for one in self.journeys if one.passed is not None))

    monkeypatch.setattr(Kept, "keep", watched)
    assert not differences(case.expected, trace(model, prompts(FEW), PLAN))
    assert max(held) <= budget
    assert budget == 0 or max(held) > 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("steps", [5, 8])
def test_an_interrupted_sweep_goes_on(case: Case, steps: int, tmp_path: Path) -> None:
    """Two batches: stopped within and after blocks, before, among and behind those that write and read."""
    store, calls = RunStore(tmp_path / "run"), []
    store.create()

    def stop(*_: int) -> None:
        calls.append(1)
        if len(calls) == steps:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trace(opened(case.folder), prompts(FEW), PLAN, store=store, progress=stop)
    model = opened(case.folder)
    assert not differences(case.expected, trace(model, prompts(FEW), PLAN, store=store))
    passed = steps // 2
    assert model.blocks.loads == [0] * passed + [1] * (sharing.LAYERS - passed)
    assert not (store.folder / STREAMING).exists()


def test_half_precision(case: Case, tmp_path: Path) -> None:
    folder = sharing.saved(case.name, tmp_path, torch.bfloat16)
    model = opened(folder)
    model.blocks.budget = 0
    expected = trace(opened(folder, stream=False), prompts((23, 17)), PLAN)
    assert not differences(expected, trace(model, prompts((23, 17)), PLAN))


def test_what_is_carried_is_what_later_blocks_read(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The state, one entry for each place that is written, and what the next block is given."""
    from sinklens.tracers.streaming.kept import Kept

    seen: list[Any] = []
    monkeypatch.setattr(Kept, "keep", lambda _, journey: seen.append(journey.passed))
    trace(opened(case.folder), prompts((9,)), PLAN)
    entries = [passed.entries.get("shared_kv_states", {}) for passed in seen]
    if case.name == "mistral_large4":
        assert [sorted(one) for one in entries] == [["rope"], *[["nope", "rope"]] * 4, []]
        assert [list(passed.others) for passed in seen] == [[1]] * 5 + [[]]
    else:
        assert [len(one) for one in entries] == [0, 0, 1, 2, 2, 0]
        assert not any(passed.others for passed in seen)
    assert all(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(entries))


def test_a_sample_has_the_blocks_that_write_for_it(case: Case) -> None:
    from sinklens.models.streaming import sampled

    model = opened(case.folder)
    blocks = model.blocks
    sharing_all = {(0, 2), (0, 1, 3), (0, 4), (0, 1, 5), (0, 1)}
    wanted = sharing_all if case.name == "mistral_large4" else {(2, 4), (3, 5), (0, 1)}
    found = set()
    for pair in samples(blocks):
        with sampled(blocks, model.anatomy, pair) as anatomy:
            assert len(anatomy.main.blocks) == len(blocks.resident)
            found.add(blocks.resident)
    assert found == wanted


# Made-up sharing: what is found is found by what it is, not by the name of a model.


class Box:
    """Something that is neither a mapping nor tensors."""

    value: Any = None


def _passing_on(model: Any, made: Any, write: Any, read: Any) -> Any:
    """Llama whose second block writes its output into what is made for each pass; the third one adds it."""
    inner = model.module.model

    def begin(_: Any, args: Any, kwargs: Any) -> Any:
        return args, {**kwargs, "noted": made()}

    def after(_: Any, args: Any, kwargs: Any, output: Any) -> None:
        write(kwargs["noted"], output)

    def before(_: Any, args: Any, kwargs: Any) -> Any:
        return (args[0] + read(kwargs["noted"]), *args[1:]), kwargs

    inner.register_forward_pre_hook(begin, with_kwargs=True)
    inner.layers[1].register_forward_hook(after, with_kwargs=True)
    inner.layers[3].register_forward_pre_hook(before, with_kwargs=True)
    return model


def _boxed(value: Any) -> Box:
    box = Box()
    box.value = value
    return box


def _add_in_place(noted: Any, output: Any) -> None:
    noted["sum"] += output.sum()


NOTED = {
    "new": (dict, lambda noted, output: noted.update(x=output * 2), lambda noted: noted["x"]),
    "in place": (lambda: {"sum": torch.zeros(())}, _add_in_place, lambda noted: noted["sum"]),
    "nested": (
        lambda: {"x": 1.0},
        lambda noted, output: noted.update(x=[{"a": (output, 3)}]),
        lambda noted: noted["x"][0]["a"][0] * noted["x"][0]["a"][1],
    ),
}
REFUSED = {
    "attribute": (Box, lambda noted, output: setattr(noted, "value", output), lambda noted: noted.value),
    "object": (dict, lambda noted, output: noted.update(x=_boxed(output)), lambda noted: noted["x"].value),
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cases.saved("llama", tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("how", list(NOTED))
@pytest.mark.parametrize("budget", [0, 10**9])
def test_what_is_written_into_a_mapping_is_carried(how: str, budget: int, llama: Path) -> None:
    model = _passing_on(opened(llama), *NOTED[how])
    model.blocks.budget = budget
    expected = trace(_passing_on(opened(llama, stream=False), *NOTED[how]), prompts(), PLAN)
    assert not differences(expected, trace(model, prompts(), PLAN))
    assert differences(expected, trace(opened(llama), prompts(), PLAN))


@pytest.mark.parametrize(("how", "block"), [("attribute", 3), ("object", 1)])
def test_what_cannot_be_carried_is_refused(how: str, block: int, llama: Path) -> None:
    model = _passing_on(opened(llama), *REFUSED[how])
    with pytest.raises(ModelError, match="pass on more than can be carried") as caught:
        trace(model, prompts(), PLAN)
    assert f"Block {block} does not do" in str(caught.value)
    assert model.blocks.loads == [1] * (block + 1) + [0] * (3 - block)
