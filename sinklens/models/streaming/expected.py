"""What blocks will hand on to later ones, told from the shapes of a model without weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..spec import Anatomy
from ..sums import states_of
from .passed import Entries, passing

TOKENS = 32


@torch.no_grad()
def bytes_per_token(shell: nn.Module, anatomy: Anatomy, itemsize: int) -> float | None:
    """Bytes that are handed on between two blocks for each token, at most: states and what is carried beside them.

    Args:
        shell: On the meta device, where a pass computes shapes and nothing else. Feed-forward parts are left out.
        itemsize: Of the numbers that the model computes with.

    Returns:
        None where a pass needs more than shapes.
    """
    most, known, others = 0, Entries(), ()

    def size(value: Any) -> int:
        leaves = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
        widths = (itemsize if leaf.is_floating_point() else leaf.element_size() for leaf in leaves)
        return sum(leaf.numel() * width for leaf, width in zip(leaves, widths, strict=True))

    def watched(own: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal most, known, others
            given = tree_leaves((args, kwargs))
            handed = [one for one in others if any(one is leaf for leaf in given)]
            most = max(most, size((states_of(args, kwargs), handed, known)))
            output, known = passing(known, own, args, kwargs)
            others = tree_leaves(output[1:]) if isinstance(output, tuple) else ()
            return output

        return run

    with ExitStack() as stack:
        for block in anatomy.main.blocks:
            module = shell.get_submodule(block.path)
            stack.enter_context(_in_place(module, watched(module.forward)))
            part = block.experts or block.mlp  # some choose by values
            if part is not None:
                feed_forward = shell.get_submodule(part)
                stack.enter_context(_in_place(feed_forward, lambda x, *_, **__: torch.zeros_like(x)))
        try:
            ids = torch.zeros(1, TOKENS, dtype=torch.long, device="meta")
            mask = torch.zeros(1, 1, TOKENS, TOKENS, device="meta")  # as it is: others are looked into
            with torch.device("meta"):
                shell(input_ids=ids, attention_mask=mask, use_cache=False)
        except Exception:  # whatever a model does that shapes do not tell
            return None
    return most / TOKENS or None


@contextmanager
def _in_place(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Inside, a module runs something else."""
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        del module.__dict__["forward"]
