"""The memory of a block that was let go holds a later one, unless somebody still looks at it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sinklens.models.streaming.tensors import Spare

from .cases import opened, saved


def test_what_was_let_go_is_used_again() -> None:
    spare, tensor = Spare(), torch.zeros(3, 5)
    place = tensor.data_ptr()
    spare.put(tensor)
    del tensor
    assert spare.take((5, 3), torch.float32).data_ptr() != place
    assert spare.take((3, 5), torch.float16).data_ptr() != place
    assert spare.take((3, 5), torch.float32).data_ptr() == place


@pytest.mark.parametrize("view", [lambda t: t, lambda t: t[1:], lambda t: t.detach(), lambda t: t.numpy()])
def test_what_is_looked_at_is_not(view) -> None:
    spare, tensor = Spare(), torch.zeros(3, 5)
    held = view(tensor)
    spare.put(tensor)
    del tensor
    spare.take((3, 5), torch.float32).fill_(7.0)
    assert held.sum() == 0


def test_shapes_that_nobody_asks_for_are_let_go() -> None:
    spare = Spare()
    spare.put(torch.zeros(3, 5))
    spare.put(torch.zeros(4, 4))
    spare.take((4, 4), torch.float32)
    spare.settle()
    assert list(spare._kept) == [((4, 4), torch.float32)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved("llama", tmp_path_factory.mktemp("llama"))


def test_two_blocks_share_their_memory_in_turn(folder: Path) -> None:
    blocks = opened(folder).blocks
    blocks.close()
    places = []
    for index in [*range(len(blocks)), *range(len(blocks))]:
        with blocks.loaded(index):
            block = blocks.module.get_submodule(blocks.blocks[index].path)
            places.append(block.mlp.down_proj.weight.data_ptr())
    assert len(places) >= 4
    assert len(set(places)) <= 2


def test_a_weight_that_is_kept_stays_what_it_was(folder: Path) -> None:
    model, whole = opened(folder), opened(folder, stream=False)
    blocks, held = model.blocks, []
    blocks.close()
    for index in range(len(blocks)):
        with blocks.loaded(index):
            held.append(model.module.get_submodule(blocks.blocks[index].path).mlp.down_proj.weight.data)
    for index, weight in enumerate(held):
        path = blocks.blocks[index].path
        assert torch.equal(weight, whole.module.get_submodule(path).mlp.down_proj.weight)


def test_what_inference_mode_made_is_not_handed_on() -> None:
    spare = Spare()
    with torch.inference_mode():
        spare.put(torch.zeros(3, 5))
    spare.take((3, 5), torch.float32).fill_(1.0)
