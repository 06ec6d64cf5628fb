"""Hiding pairs of a query and a key from a model's own attention, in whole passes and in decoding from a cache.

An exact computation, not a correction of the output: the model's own kernel gets a mask in which the pairs do not meet,
so learned sink logits, soft caps and windows stay what they are, and a tap that measures sees the same mask.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from sinklens.core.errors import ModelError
from sinklens.models.spec import OpenedModel

from .batch import Batch
from .interventions import shape_of

Hide = Callable[[Int[Tensor, " query"], Int[Tensor, " key"]], Bool[Tensor, "batch query key"]]
"""Pairs that must not meet, by the places of queries and keys in the padded row; generated tokens follow it."""

_DENSE = ("eager", "sinklens_dense")
"""Attention implementations that see everything where they are given no mask, and take additive ones."""


@contextmanager
def pairs_hidden(opened: OpenedModel, batch: Batch, layers: Collection[int], hide: Hide) -> Iterator[None]:
    """Hide pairs in the softmax attention of some layers, for passes of this batch and what is generated after it.

    A pass from an empty cache belongs to the batch if it has its shape; one that goes on from a cache does if the pass
    that filled the cache did.

    Raises:
        ModelError: The attention of a layer takes no mask.
    """
    with ExitStack() as stack:
        for block in opened.anatomy.main.blocks:
            if block.attention is not None and block.index in layers:
                module = opened.module.get_submodule(block.attention)
                hook = _Hook(module, batch, block.index, hide)
                stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


class _Hook:
    """Puts the mask without the hidden pairs in place of the one a module is given."""

    def __init__(self, module: nn.Module, batch: Batch, layer: int, hide: Hide) -> None:
        names = list(inspect.signature(module.forward).parameters)
        if "attention_mask" not in names:
            raise ModelError(
                "Keys cannot be hidden in this model.",
                detail=f"{type(module).__name__} takes no attention mask.",
            )
        self.place = names.index("attention_mask")
        self.batch, self.hide = batch, hide
        self.layer = int(getattr(module, "layer_idx", None) or layer)
        self.begun = False

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = args[self.place] if len(args) > self.place else kwargs.get("attention_mask")
        hidden = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        cache = kwargs.get("past_key_values")
        done = int(cache.get_seq_length(self.layer)) if cache is not None else 0
        if not done:
            self.begun = hidden.shape[:2] == shape_of(self.batch)
        if not self.begun or hidden.shape[0] != shape_of(self.batch)[0]:
            return None
        length, keys, offset = hidden.shape[1], hidden.shape[1], 0
        if cache is not None:
            keys, offset = cache.get_mask_sizes(length, self.layer)
        if isinstance(given, Tensor):
            keys = given.shape[-1]
        at = torch.arange(length) + done, torch.arange(keys) + offset
        mask = self._without(module, given, hidden, self.hide(*at)[:, None], done - offset)
        if len(args) > self.place:
            return (*args[: self.place], mask, *args[self.place + 1 :]), kwargs
        return args, {**kwargs, "attention_mask": mask}

    def _without(self, module: nn.Module, given: Any, hidden: Tensor, gone: Tensor, first: int) -> Tensor:
        """The mask the attention would have used, without the hidden pairs; `first` is the first query's own key."""
        queries, keys = gone.shape[-2:]
        dense = getattr(getattr(module, "config", None), "_attn_implementation", None) in _DENSE
        if given is None:
            seen = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=hidden.device)
            # Kernels that get no mask draw the causal triangle themselves; the dense ones do not.
            given = seen.tril(first) if getattr(module, "is_causal", True) and not dense else seen
            if dense:
                given = torch.zeros_like(given, dtype=hidden.dtype)
        if not isinstance(given, Tensor) or given.ndim != 4:
            raise ModelError(
                "Keys cannot be hidden in this model.",
                detail=f"{type(module).__name__} is given no mask of queries by keys.",
                hint="Load the model with attn_implementation='sdpa'.",
            )
        gone = gone.to(given.device)
        given = given.expand(len(gone), *given.shape[1:])
        if given.dtype == torch.bool:
            return given & ~gone if _true_is_visible(given, self.batch, first) else given | gone
        return given.masked_fill(gone, torch.finfo(given.dtype).min)


def _true_is_visible(mask: Bool[Tensor, "batch head query key"], batch: Batch, first: int) -> bool:
    """Whether a boolean mask marks what is seen, or (MPT) what is hidden: real tokens see themselves."""
    own = mask.diagonal(first, -2, -1)[:, 0]
    if batch.valid is not None and own.shape[1] == batch.valid.shape[1]:
        own = own[batch.valid.to(own.device)]
    return bool(own.float().mean() > 0.5)
