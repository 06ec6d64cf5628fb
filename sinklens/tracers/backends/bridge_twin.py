"""A bridge seen as the transformers model it was made from.

TransformerLens puts its own components where the parts of a transformers model were. What they wrap keeps its weights,
so the model can be put together again without a copy: the same tensors in the same places. That twin says what the
parts are (anatomy, sums of blocks), and what the bridge should compute.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from sinklens.core.errors import ModelError
from sinklens.models.parts import unwrapped
from sinklens.models.spec import Anatomy, Block


def twin_of(root: Any) -> nn.Module:
    """A transformers model in eval mode that shares every weight and buffer with `root`.

    Raises:
        ModelError: `root` has no part where transformers has one.
    """
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        twin = type(root)(copy.deepcopy(root.config))
    for path, module in twin.named_modules():
        source = unwrapped(part_of(root, path))
        for kept in (module._parameters, module._buffers):
            for name, value in kept.items():
                if value is not None:
                    kept[name] = getattr(source, name)
    return twin.eval()


def part_of(root: nn.Module, path: str) -> Any:
    """The component that stands at a path of the transformers model."""
    try:
        return root.get_submodule(path)
    except AttributeError as error:
        raise ModelError(
            f"{type(root).__name__} cannot be followed through TransformerLens.",
            detail=f"There is nothing at {path!r} any more: {str(error)[:120]}",
            hint="Profile the transformers model itself: --backend hf",
        ) from error


def check_parts(root: nn.Module, anatomy: Anatomy) -> None:
    """Refuse a bridge that lacks a part of the main tower."""
    for block in anatomy.main.blocks:
        for path in paths_of(block):
            part_of(root, path)


def paths_of(block: Block) -> list[str]:
    """All module paths of a block."""
    paths = [block.path, block.attention, block.attention_output, block.mlp, block.down_proj]
    paths += [block.shared_down_proj, block.experts, block.router, block.residual_norm]
    return [path for path in paths if path is not None]
