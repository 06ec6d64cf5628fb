"""Hiding one key from the queries after it.

An exact computation, not a correction of the output: the model's own kernel gets a mask in which no other query sees
the key, so learned sink logits, soft caps and windows stay what they are, and a tap that measures sees the same mask.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from sinklens.core.errors import ModelError
from sinklens.models.spec import OpenedModel

from .batch import Batch
from .interventions import Acted, places_of, shape_of

_DENSE = ("eager", "sinklens_dense")
"""Attention implementations that see everything where they are given no mask, and take additive ones."""


@dataclass(frozen=True)
class KeyBlocked:
    """No query but its own sees the key of one position, in all blocks; rows share their attention among the rest."""

    position: int

    @contextmanager
    def applied(self, opened: OpenedModel, batch: Batch) -> Iterator[Acted]:
        acted = Acted()
        with ExitStack() as stack:
            for block in opened.anatomy.main.blocks:
                if block.attention is not None:
                    module = opened.module.get_submodule(block.attention)
                    hook = self._hook(module, batch, acted)
                    stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            yield acted

    def _hook(self, module: nn.Module, batch: Batch, acted: Acted) -> Callable[..., Any]:
        names = list(inspect.signature(module.forward).parameters)
        if "attention_mask" not in names:
            raise ModelError(
                "Keys cannot be blocked in this model.",
                detail=f"{type(module).__name__} takes no attention mask.",
            )
        place = names.index("attention_mask")

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            given = args[place] if len(args) > place else kwargs.get("attention_mask")
            hidden = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
            if hidden.shape[:2] != shape_of(batch):
                return None
            mask = self._mask(module, given, batch, hidden)
            acted.edited += sum(1 for _ in places_of(batch, self.position))
            if len(args) > place:
                return (*args[:place], mask, *args[place + 1 :]), kwargs
            return args, {**kwargs, "attention_mask": mask}

        return hook

    def _mask(self, module: nn.Module, given: Tensor | None, batch: Batch, hidden: Tensor) -> Tensor:
        """The mask the attention would have used, without the key."""
        length = hidden.shape[1]
        dense = getattr(getattr(module, "config", None), "_attn_implementation", None) in _DENSE
        if given is None:
            seen = torch.ones(1, 1, length, length, dtype=torch.bool, device=hidden.device)
            # Kernels that get no mask draw the causal triangle themselves; the dense ones do not.
            given = seen.tril() if getattr(module, "is_causal", True) and not dense else seen
            if dense:
                given = torch.zeros_like(given, dtype=hidden.dtype)
        blocked = self.blocked(batch, given.shape[-2], given.shape[-1]).to(given.device)
        given = given.expand(batch.size, *given.shape[1:])
        if given.dtype == torch.bool:
            return given & ~blocked if _true_is_visible(given, batch) else given | blocked
        return given.masked_fill(blocked, torch.finfo(given.dtype).min)

    def blocked(self, batch: Batch, queries: int, keys: int) -> Bool[Tensor, "batch 1 query key"]:
        """Pairs of a query and a key that no longer meet."""
        out = torch.zeros(batch.size, 1, queries, keys, dtype=torch.bool)
        for row, place in places_of(batch, self.position):
            out[row, :, :, place] = True
            out[row, :, place - (keys - queries), place] = False
        return out


def _true_is_visible(mask: Bool[Tensor, "batch head query key"], batch: Batch) -> bool:
    """Whether a boolean mask marks what is seen, or (MPT) what is hidden: real tokens see themselves."""
    own = mask.diagonal(mask.shape[-1] - mask.shape[-2], -2, -1)[:, 0]
    if batch.valid is not None:
        own = own[batch.valid[:, -own.shape[1] :].to(own.device)]
    return bool(own.float().mean() > 0.5)
